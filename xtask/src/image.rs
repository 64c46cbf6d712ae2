//! `cargo xtask image`: builds the container image as an OCI archive, without a daemon.
//!
//! The image contains one static program and nothing else: no shell, no library, no package that would need
//! updates. The same sources result in the same bytes.

mod archive;

use std::env;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use object::{Object as _, ObjectSymbol};

use crate::build::{self, Warnings};
use crate::{process, setup, workspace};

use archive::Image;

/// The image's name in manifests/base/daemonset.yaml, so that a runtime that has loaded the archive
/// finds it. Such a registry does not and will not exist (RFC 2606, section 2).
const NAME: &str = "registry.invalid/egress-agent";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Builds the static agent and writes it as a container image, an OCI archive.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Output file [default: target/egress-agent-VERSION-ARCH.oci.tar]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Packs this program instead of building one; it must be static
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Writes the static program to this file, and no image
    #[arg(long, value_name = "FILE", conflicts_with_all = ["output", "program"])]
    program_only: Option<PathBuf>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let architecture = architecture(env::consts::ARCH)?;
    let program = match &options.program {
        Some(program) => {
            fs::read(program).with_context(|| format!("cannot read {}", program.display()))?
        }
        None => static_agent()?,
    };
    check_static(&program)?;
    if let Some(output) = &options.program_only {
        return write_program(output, &program);
    }
    let image = Image {
        program: &program,
        name: &format!("{NAME}:{VERSION}"),
        version: VERSION,
        architecture,
        revision: &revision(),
        seconds: source_date()?,
    };
    let output = options.output.clone().unwrap_or_else(|| {
        workspace::target().join(format!("egress-agent-{VERSION}-{architecture}.oci.tar"))
    });
    let bytes = image.archive()?;
    fs::write(&output, &bytes).with_context(|| format!("cannot write {}", output.display()))?;
    println!(
        "wrote {} ({} KiB): {NAME}:{VERSION} for linux/{architecture}",
        output.display(),
        bytes.len() / 1024
    );
    Ok(())
}

/// Builds the agent and writes its image to `output`.
///
/// # Errors
///
/// Fails when the image cannot be built or written.
pub(crate) fn write(output: &Path) -> Result<()> {
    run(&Options {
        output: Some(output.to_owned()),
        program: None,
        program_only: None,
    })
}

/// Writes the program as an executable file.
fn write_program(output: &Path, program: &[u8]) -> Result<()> {
    fs::write(output, program)
        .and_then(|()| fs::set_permissions(output, Permissions::from_mode(0o755)))
        .with_context(|| format!("cannot write {}", output.display()))?;
    println!("wrote {}", output.display());
    Ok(())
}

/// Builds the agent linked statically, and strips its symbols. Rustup has the library of musl for that;
/// distributions' compilers often have only the GNU C library.
fn static_agent() -> Result<Vec<u8>> {
    setup::ensure(setup::Purpose::Build)?;
    build::ebpf(Warnings::Show)?;
    let target = if setup::has_musl() {
        setup::musl_target()
    } else {
        format!("{}-unknown-linux-gnu", env::consts::ARCH)
    };
    let mut command = process::cargo();
    command.args([
        "build",
        "--release",
        "--locked",
        "--package",
        "egress-agent",
    ]);
    // Named explicitly, though it may be the host's, so that build scripts are linked as usual.
    command.args(["--target", &target]);
    command.arg("--target-dir").arg(workspace::target());
    if target.ends_with("gnu") {
        command.env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    }
    process::long(&mut command, "building the static agent")?;
    let built = workspace::target()
        .join(&target)
        .join("release/egress-agent");
    let stripped = built.with_extension("stripped");
    let mut strip = Command::new("strip");
    process::run(strip.arg("-o").arg(&stripped).arg(&built))?;
    fs::read(&stripped).with_context(|| format!("cannot read {}", stripped.display()))
}

/// Checks that the program starts without anything but the kernel.
fn check_static(program: &[u8]) -> Result<()> {
    let file = object::File::parse(program).context("the program is not an ELF file")?;
    if file.section_by_name(".interp").is_some() {
        bail!(
            "the program is not static: it needs a dynamic linker, which the image does not have"
        );
    }
    if let Some(symbol) = file.dynamic_symbols().find(ObjectSymbol::is_undefined) {
        let name = symbol.name().unwrap_or_default();
        if !name.is_empty() {
            bail!("the program is not static: it needs `{name}` from a library");
        }
    }
    Ok(())
}

/// The architecture's name in images, which is Go's name.
fn architecture(machine: &str) -> Result<&'static str> {
    match machine {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        _ => bail!("images are built for x86_64 and aarch64 only, not for {machine}"),
    }
}

/// The commit that the image is built from; empty outside a clone.
fn revision() -> String {
    git(&["rev-parse", "HEAD"]).unwrap_or_default()
}

/// The time of all files in the image: `SOURCE_DATE_EPOCH`, or the commit's time.
fn source_date() -> Result<u64> {
    let given = match env::var("SOURCE_DATE_EPOCH") {
        Ok(given) => given,
        Err(_) => git(&["log", "-1", "--format=%ct"]).unwrap_or_else(|| "0".to_owned()),
    };
    given
        .parse()
        .with_context(|| format!("SOURCE_DATE_EPOCH is not a number of seconds: {given}"))
}

fn git(arguments: &[&str]) -> Option<String> {
    let root: &Path = workspace::root();
    let output = process::output(Command::new("git").arg("-C").arg(root).args(arguments)).ok()?;
    Some(output.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_needs_a_library_is_refused() {
        let own = fs::read(env::current_exe().expect("the test's own path")).expect("its bytes");
        let error = check_static(&own).expect_err("linked with the C library");
        assert!(error.to_string().contains("not static"), "{error}");
        assert!(check_static(b"no ELF at all").is_err());
    }
}
