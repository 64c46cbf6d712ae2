//! `cargo xtask build`: builds the eBPF object, and then the agent that embeds it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

use crate::{process, setup, toolchain, workspace};

/// The programs that the agent loads; the object must contain each.
const PROGRAMS: [&str; 2] = ["from_pod", "to_pod"];

/// Builds the eBPF object and the agent, after setting up what that needs.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Builds the agent without optimisation; the eBPF object is always optimised, because the
    /// kernel's verifier would reject it otherwise
    #[arg(long)]
    debug: bool,
}

/// Whether compiler warnings fail the build.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Warnings {
    Show,
    Deny,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::ensure(setup::Purpose::Build)?;
    ebpf(Warnings::Show)?;
    agent(options.debug)
}

/// Builds the eBPF object and writes it to the path that the agent's build script reads.
///
/// # Errors
///
/// Fails when the toolchain is incomplete, when the build fails, and when the object lacks its
/// type information or one of the programs.
pub(crate) fn ebpf(warnings: Warnings) -> Result<()> {
    let (compiler, linker) = toolchain::find()?;
    // A directory of its own, so that this build and the host's do not wait for each other's lock.
    let directory = workspace::root().join("target/ebpf-build");
    let mut command = compiler.cargo("rustc", &linker);
    command.args(["--package", "egress-ebpf", "--release", "--locked"]);
    command.env("CARGO_TARGET_DIR", &directory);
    if warnings == Warnings::Deny {
        command.args(["--", "-Dwarnings"]);
    }
    process::long(&mut command, "building the eBPF object")?;

    let built = directory
        .join(toolchain::TARGET)
        .join("release/egress-ebpf");
    let bytes = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    check(&bytes).with_context(|| format!("{} is not usable", built.display()))?;
    install(&bytes, &workspace::ebpf_object())
}

/// Writes the object, but leaves an equal one untouched, so that the agent is not rebuilt.
fn install(bytes: &[u8], object: &Path) -> Result<()> {
    if fs::read(object).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let write = || {
        fs::create_dir_all(object.parent().unwrap_or(object))?;
        let new = object.with_extension("new");
        fs::write(&new, bytes)?;
        fs::rename(new, object)
    };
    write().with_context(|| format!("cannot write {}", object.display()))
}

/// Checks that the kernel and bpftool can read the object.
fn check(bytes: &[u8]) -> Result<()> {
    let file = object::File::parse(bytes).context("it is not an ELF file")?;
    if file.architecture() != object::Architecture::Bpf {
        bail!("it is made for {:?}, not for BPF", file.architecture());
    }
    let types = file.section_by_name(".BTF");
    if types.is_none_or(|section| section.size() == 0) {
        bail!("it has no .BTF section: the linker needs the flag --btf");
    }
    for program in PROGRAMS {
        let found = file
            .symbols()
            .any(|symbol| symbol.is_definition() && symbol.name() == Ok(program));
        if !found {
            bail!("it lacks the program `{program}`");
        }
    }
    Ok(())
}

/// Builds the agent.
///
/// # Errors
///
/// Fails when the build fails.
pub(crate) fn agent(debug: bool) -> Result<()> {
    let mut command = process::cargo();
    command.args(["build", "--package", "egress-agent", "--locked"]);
    command.arg("--target-dir").arg(workspace::target());
    if !debug {
        command.arg("--release");
    }
    process::long(&mut command, "building the agent")?;
    let built = if debug {
        workspace::debug_agent()
    } else {
        workspace::agent()
    };
    println!("built {}", built.display());
    Ok(())
}

/// Builds the system tests of a folder of `tests/tests`. Returns their program.
///
/// # Errors
///
/// Fails when the build fails.
pub(crate) fn tests(folder: &str) -> Result<PathBuf> {
    let mut command = process::cargo();
    command.args(["test", "--package", "egress-tests", "--locked", "--no-run"]);
    command.args(["--message-format=json", "--test", folder]);
    println!("building the system tests: takes minutes when nothing is built yet");
    // Cargo writes its progress there.
    command.stderr(Stdio::inherit());
    let messages = process::output(&mut command)?;
    messages
        .lines()
        .find_map(|line| program_of(line, folder))
        .with_context(|| format!("cargo built no test program {folder}"))
}

/// Parses one line of cargo's messages: the program of that test, if the line is about it.
fn program_of(line: &str, test: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    if message["target"]["name"] != test {
        return None;
    }
    Some(message["executable"].as_str()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_a_bpf_object_is_refused() {
        let error = check(b"no ELF at all").expect_err("not ELF");
        assert_eq!(error.to_string(), "it is not an ELF file");

        let own =
            fs::read(std::env::current_exe().expect("the test's own path")).expect("its bytes");
        let error = check(&own).expect_err("made for the host");
        assert!(error.to_string().ends_with("not for BPF"), "{error}");
    }

    #[test]
    fn the_program_of_a_test_is_read_from_cargos_messages() {
        let line = r#"{"target":{"name":"packets"},"executable":"/target/packets-1"}"#;
        assert_eq!(
            program_of(line, "packets"),
            Some("/target/packets-1".into())
        );
        assert_eq!(program_of(line, "policy"), None);
        assert_eq!(program_of("warning: no JSON", "packets"), None);
    }
}
