//! The eBPF toolchain: parts that are there are used, missing ones are installed.

use std::env;
use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::{apt, found};
use crate::process;
use crate::toolchain::{self, Compiler, Kind, Linker};
use crate::workspace;

/// Debian's compiler, and the `core` that belongs to it.
const COMPILER_PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];

/// The sources of its standard library, which [`crate::lint`] compiles for other systems.
const SOURCES_PACKAGE: &str = "rust-web-src";

/// Packages that cannot be installed beside [`COMPILER_PACKAGES`].
const CONFLICTING_PACKAGES: [&str; 3] = ["rustc", "rustc-mozilla", "rustup"];

/// The contents of [`SOURCES_PACKAGE`].
const LIBRARY_SOURCES: &str = "the sources of the compiler's standard library";

/// The release of bpf-linker the project is built with.
const LINKER_VERSION: &str = "0.13.0";

/// The LLVM versions with which that release can be built.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;

/// The missing parts, as text for people.
pub(super) fn missing() -> Option<String> {
    let Some(compiler) = Compiler::find() else {
        return Some(format!("a compiler for {}", toolchain::TARGET));
    };
    let llvm = compiler.version.llvm;
    Linker::find(llvm)
        .is_none()
        .then(|| format!("bpf-linker with LLVM {llvm} or newer"))
}

/// The sources of the standard library if they are missing, as text for people.
pub(super) fn missing_library_sources() -> Option<String> {
    let has_sources = Compiler::find().is_some_and(|compiler| compiler.has_library_sources());
    (!has_sources).then(|| LIBRARY_SOURCES.to_owned())
}

/// Makes sure of a compiler and of a linker.
pub(super) fn ensure() -> Result<()> {
    let compiler = match Compiler::find() {
        Some(compiler) if !needs_download(&compiler) => compiler,
        // The distribution builds its compiler's linker too, so nothing has to come from elsewhere.
        Some(_) if packaged_compiler_fits()? => install_packaged_compiler()?,
        Some(compiler) => compiler,
        None => {
            println!("missing: a compiler for {}", toolchain::TARGET);
            install_compiler()?
        }
    };
    found("compiler", &compiler.to_string());

    let llvm = compiler.version.llvm;
    let linker = if let Some(linker) = Linker::find(llvm) {
        linker
    } else {
        println!("missing: bpf-linker with LLVM {llvm} or newer");
        install_linker(llvm)?
    };
    found("linker", &linker.to_string());
    Ok(())
}

/// Makes sure of the sources of the compiler's standard library. rustup's nightly was installed with them.
pub(super) fn ensure_library_sources() -> Result<()> {
    let compiler = Compiler::find().context("the compiler is gone that was found just now")?;
    if compiler.has_library_sources() {
        return Ok(());
    }
    println!("missing: {LIBRARY_SOURCES}");
    apt::install(&[SOURCES_PACKAGE])?;
    if !compiler.has_library_sources() {
        bail!(
            "{SOURCES_PACKAGE} was installed, but holds no sources for this compiler: {compiler}"
        );
    }
    Ok(())
}

/// Whether `compiler` is rustup's and its linker has yet to be installed.
fn needs_download(compiler: &Compiler) -> bool {
    matches!(compiler.kind, Kind::Nightly(_)) && Linker::find(compiler.version.llvm).is_none()
}

fn install_compiler() -> Result<Compiler> {
    if packaged_compiler_fits()? {
        return install_packaged_compiler();
    }
    let Some(rustup) = process::find("rustup") else {
        bail!(
            "no compiler for {}: install rustup (https://rustup.rs) and run this again",
            toolchain::TARGET
        );
    };
    println!("taking rustup's nightly with the sources of core");
    process::run(Command::new(rustup).args([
        "toolchain",
        "install",
        "nightly",
        "--profile=minimal",
        "--component=rust-src",
    ]))
    .context("install a nightly with rust-src, which needs the network, and run this again")?;
    installed_compiler()
}

fn install_packaged_compiler() -> Result<Compiler> {
    println!("taking the distribution's compiler with its prebuilt core");
    apt::install(&COMPILER_PACKAGES)?;
    installed_compiler()
}

fn installed_compiler() -> Result<Compiler> {
    Compiler::find().with_context(|| {
        format!(
            "the compiler was installed but has no core for {}",
            toolchain::TARGET
        )
    })
}

/// Whether the distribution has a compiler that is new enough and removes nothing of the user's.
fn packaged_compiler_fits() -> Result<bool> {
    let may_install = apt::is_here() && (process::is_root() || process::find("sudo").is_some());
    let mut conflicting = CONFLICTING_PACKAGES.iter();
    if !may_install || conflicting.any(|package| apt::is_installed(package)) {
        return Ok(false);
    }
    apt::offers(&COMPILER_PACKAGES, toolchain::is_new_enough)
}

/// Installs a linker that reads what LLVM `llvm` writes: built from source where the distribution
/// has that LLVM, else the project's own released binary, which has a newer one inside.
fn install_linker(llvm: u32) -> Result<Linker> {
    if LINKER_LLVM.contains(&llvm) && llvm_packages(llvm)? {
        build_linker(llvm)?;
    } else {
        download_linker()?;
    }
    Linker::find(llvm).with_context(|| {
        let found: Vec<_> = Linker::all().iter().map(ToString::to_string).collect();
        format!(
            "bpf-linker was installed but none reads LLVM {llvm} (found: {}): \
             install bpf-linker built with LLVM {llvm} and run this again",
            if found.is_empty() {
                "none that starts".to_owned()
            } else {
                found.join(", ")
            }
        )
    })
}

/// Makes sure of LLVM's development files; false when the distribution does not have them.
fn llvm_packages(llvm: u32) -> Result<bool> {
    let packages = [
        format!("llvm-{llvm}-dev"),
        format!("libpolly-{llvm}-dev"),
        "zlib1g-dev".to_owned(),
        "libzstd-dev".to_owned(),
        "g++".to_owned(),
    ];
    let missing: Vec<&str> = packages
        .iter()
        .map(String::as_str)
        .filter(|package| !apt::is_installed(package))
        .collect();
    if missing.is_empty() {
        return Ok(true);
    }
    if !apt::is_here() {
        return Ok(false);
    }
    if !apt::offers(&missing, |_| true)? {
        return Ok(false);
    }
    apt::install(&missing)?;
    Ok(true)
}

/// Builds the linker; beside the user's own if there is one, which stays as it is.
fn build_linker(llvm: u32) -> Result<()> {
    let mut command = process::cargo();
    command.args([
        "install",
        "bpf-linker",
        "--version",
        LINKER_VERSION,
        "--locked",
    ]);
    command.args([
        "--no-default-features",
        "--features",
        &format!("llvm-{llvm}"),
    ]);
    if !Linker::all().is_empty() {
        command.arg("--force").arg("--root").arg(workspace::tools());
    }
    command.env("LLVM_PREFIX", format!("/usr/lib/llvm-{llvm}"));
    process::long(&mut command, "building bpf-linker")
}

/// Downloads the linker that its project releases as a static executable.
fn download_linker() -> Result<()> {
    let architecture = env::consts::ARCH;
    let archive = format!("bpf-linker-{architecture}-unknown-linux-musl.tar.zst");
    let address = format!(
        "https://github.com/aya-rs/bpf-linker/releases/download/v{LINKER_VERSION}/{archive}"
    );
    if process::find("zstd").is_none() {
        apt::install(&[apt::first_available(&["zstd"])?])?;
    }
    let directory = workspace::tools().join("bin");
    let downloaded = workspace::tools().join(&archive);
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    process::run(
        Command::new("curl")
            .args([
                "--fail",
                "--silent",
                "--show-error",
                "--location",
                "--output",
            ])
            .arg(&downloaded)
            .arg(&address),
    )
    .with_context(|| {
        format!(
            "put the `bpf-linker` of {address} into {} and run this again",
            directory.display()
        )
    })?;
    let mut unpack = Command::new("tar");
    unpack
        .args(["--extract", "--zstd", "--no-same-owner", "--file"])
        .arg(&downloaded);
    unpack.arg("--directory").arg(&directory);
    process::run(&mut unpack)
}
