//! The compiler and the linker that build the eBPF object.
//!
//! There are two kinds of compilers, of which the first that is found is used:
//!
//! - the distribution's, with a prebuilt `core` for [`TARGET`]: Debian's packages
//!   `rustc-web` and `libstd-rust-web-dev-bpf`. It is a stable compiler, so it gets the names of the crates
//!   that may use unstable features ([`UNSTABLE_CRATES`]);
//! - rustup's nightly, with the component `rust-src`, from which cargo builds `core` itself.
//!
//! Both write LLVM bitcode, which `bpf-linker` turns into the object. LLVM reads bitcode of its own
//! and of older versions, so the linker's LLVM must not be older than the compiler's.

use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::{process, workspace};

/// The target of the eBPF object: little-endian, like every architecture that the agent runs on.
pub(crate) const TARGET: &str = "bpfel-unknown-none";

/// The crates of the eBPF object that use unstable features (`asm_experimental_arch`).
const UNSTABLE_CRATES: &str = "aya_ebpf";

/// The variable that names a compiler to use instead of [`SYSTEM_RUSTC`].
const RUSTC_VARIABLE: &str = "EGRESS_EBPF_RUSTC";

/// The distribution's compiler.
const SYSTEM_RUSTC: &str = "/usr/bin/rustc";

/// The directory of the standard library's sources below a compiler's sysroot.
const LIBRARY_SOURCES: &str = "lib/rustlib/src/rust/library";

/// The oldest compiler that can build the workspace, equal to its `rust-version`.
const OLDEST_RUSTC: (u32, u32) = (1, 90);

/// A compiler that can build for [`TARGET`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Compiler {
    pub(crate) kind: Kind,
    pub(crate) version: Version,
}

/// The origin of a compiler and its `core`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A compiler with a prebuilt `core` for the target; its path.
    Prebuilt(PathBuf),
    /// rustup's nightly with `rust-src`; the path of its cargo.
    Nightly(PathBuf),
}

/// The version from `rustc -vV`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Version {
    /// For example `1.96.0`.
    pub(crate) release: String,
    /// The major version of its LLVM.
    pub(crate) llvm: u32,
}

/// A `bpf-linker`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Linker {
    pub(crate) path: PathBuf,
    /// The major version of the LLVM that it loads; `None` if LLVM is built into it.
    pub(crate) llvm: Option<u32>,
}

impl Compiler {
    /// Finds a compiler for the target.
    pub(crate) fn find() -> Option<Self> {
        Self::find_prebuilt().or_else(Self::find_nightly)
    }

    fn find_prebuilt() -> Option<Self> {
        let rustc = env::var_os(RUSTC_VARIABLE).unwrap_or_else(|| SYSTEM_RUSTC.into());
        let rustc = PathBuf::from(rustc);
        let version = Version::of(Command::new(&rustc).arg("-vV")).ok()?;
        let sysroot = process::output(Command::new(&rustc).args(["--print", "sysroot"])).ok()?;
        let libraries = Path::new(sysroot.trim())
            .join("lib/rustlib")
            .join(TARGET)
            .join("lib");
        let has_core = fs::read_dir(libraries).is_ok_and(|mut files| {
            files.any(|file| {
                file.is_ok_and(|file| file.file_name().to_string_lossy().starts_with("libcore-"))
            })
        });
        let new_enough = release(&version.release)? >= OLDEST_RUSTC;
        (has_core && new_enough).then_some(Self {
            kind: Kind::Prebuilt(rustc),
            version,
        })
    }

    fn find_nightly() -> Option<Self> {
        let rustup = process::find("rustup")?;
        // `rustup which` and `rustup run` would install a missing toolchain; the list does not.
        let toolchains = process::output(Command::new(&rustup).args(["toolchain", "list"])).ok()?;
        if !toolchains.lines().any(|line| line.starts_with("nightly-")) {
            return None;
        }
        let which = |tool: &str| {
            process::output(Command::new(&rustup).args(["which", "--toolchain", "nightly", tool]))
        };
        let rustc = PathBuf::from(which("rustc").ok()?.trim());
        let sysroot = rustc.parent()?.parent()?;
        if !sysroot.join(LIBRARY_SOURCES).join("core").is_dir() {
            return None;
        }
        let version = Version::of(Command::new(&rustc).arg("-vV")).ok()?;
        let cargo = PathBuf::from(which("cargo").ok()?.trim());
        Some(Self {
            kind: Kind::Nightly(cargo),
            version,
        })
    }

    /// Finds a compiler that has the sources of its standard library.
    ///
    /// # Errors
    ///
    /// Fails when there is none.
    pub(crate) fn with_library_sources() -> Result<Self> {
        Self::find().filter(Self::has_library_sources).with_context(
            || "no compiler with the sources of the standard library: run `cargo xtask setup`",
        )
    }

    /// Whether this compiler has the sources of the standard library.
    pub(crate) fn has_library_sources(&self) -> bool {
        let rustc = self.rustc();
        process::output(Command::new(rustc).args(["--print", "sysroot"])).is_ok_and(|sysroot| {
            Path::new(sysroot.trim())
                .join(LIBRARY_SOURCES)
                .join("Cargo.lock")
                .is_file()
        })
    }

    fn rustc(&self) -> PathBuf {
        match &self.kind {
            Kind::Prebuilt(rustc) => rustc.clone(),
            Kind::Nightly(cargo) => cargo.with_file_name("rustc"),
        }
    }

    /// A cargo command that compiles the standard library too, for a target that the caller names.
    pub(crate) fn cargo_with_library(&self) -> Command {
        let mut command = match &self.kind {
            // The standard library uses unstable features everywhere, and so does `-Z`.
            Kind::Prebuilt(_) => {
                let mut command = process::cargo();
                command.env("RUSTC_BOOTSTRAP", "1");
                command
            }
            Kind::Nightly(cargo) => {
                let mut command = Command::new(cargo);
                command.current_dir(workspace::root());
                command
            }
        };
        command.env("RUSTC", self.rustc());
        command.env_remove("RUSTC_WORKSPACE_WRAPPER");
        command.arg("-Zbuild-std=std,panic_abort");
        command
    }

    /// A cargo command that compiles with this compiler for the target: `subcommand`, followed by what
    /// the caller adds.
    pub(crate) fn cargo(&self, subcommand: &str, linker: &Linker) -> Command {
        let mut command = match &self.kind {
            Kind::Prebuilt(rustc) => {
                let mut command = process::cargo();
                command
                    .env("RUSTC", rustc)
                    .env("RUSTC_BOOTSTRAP", UNSTABLE_CRATES);
                command
            }
            Kind::Nightly(cargo) => {
                let mut command = Command::new(cargo);
                command.current_dir(workspace::root());
                command.env("RUSTC", cargo.with_file_name("rustc"));
                command
            }
        };
        command.arg(subcommand).args(["--target", TARGET]);
        if matches!(self.kind, Kind::Nightly(_)) {
            command.arg("-Zbuild-std=core");
        }
        // This variable overrides RUSTFLAGS and every configuration file, so the
        // environment cannot remove `--btf`; 0x1f separates the flags.
        let flags = [
            "-Cdebuginfo=2".to_owned(),
            "-Clink-arg=--btf".to_owned(),
            // Otherwise zeroing a record becomes a call of a function that writes byte by byte.
            "-Clink-arg=--disable-expand-memcpy-in-order".to_owned(),
            format!("-Clinker={}", linker.path.display()),
            format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
        ];
        command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        // Wrappers such as clippy's are for the host's compiler.
        command.env_remove("RUSTC_WORKSPACE_WRAPPER");
        command
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Version { release, llvm } = &self.version;
        match &self.kind {
            Kind::Prebuilt(rustc) => {
                write!(
                    f,
                    "{} {release} (LLVM {llvm}), prebuilt core for {TARGET}",
                    rustc.display()
                )
            }
            Kind::Nightly(_) => write!(f, "rustup's nightly, {release} (LLVM {llvm}), rust-src"),
        }
    }
}

impl Version {
    /// Runs a compiler to read its version.
    fn of(command: &mut Command) -> Result<Self> {
        let text = process::output(command)?;
        Self::parse(&text).with_context(|| format!("cannot read the version from:\n{text}"))
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
        };
        let (llvm, _) = field("LLVM version")?.split_once('.')?;
        Some(Self {
            release: field("release")?.to_owned(),
            llvm: llvm.parse().ok()?,
        })
    }
}

/// The first two numbers of a release such as `1.97.0-nightly`.
pub(crate) fn release(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Whether a Debian package of `rustc` in `version` is new enough for the workspace.
pub(crate) fn is_new_enough(version: &str) -> bool {
    release(version).is_some_and(|release| release >= OLDEST_RUSTC)
}

impl Linker {
    /// Finds a linker whose LLVM reads the bitcode of a compiler with LLVM `llvm`: the project's own
    /// first, then the user's.
    pub(crate) fn find(llvm: u32) -> Option<Self> {
        Self::all().into_iter().find(|linker| linker.reads(llvm))
    }

    /// Every linker that can be started.
    pub(crate) fn all() -> Vec<Self> {
        let own = workspace::tools().join("bin/bpf-linker");
        let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
        let cargo_home = cargo_home.or_else(|| Some(env::home_dir()?.join(".cargo")));
        let installed = cargo_home.map(|home| home.join("bin/bpf-linker"));
        [Some(own), process::find("bpf-linker"), installed]
            .into_iter()
            .flatten()
            .filter_map(Self::at)
            .collect()
    }

    fn at(path: PathBuf) -> Option<Self> {
        if !process::succeeds(Command::new(&path).arg("--version")) {
            return None;
        }
        // ldd fails on a static executable, which has LLVM built in.
        let libraries = process::output(Command::new("ldd").arg(&path)).unwrap_or_default();
        Some(Self {
            path,
            llvm: llvm_of(&libraries),
        })
    }

    pub(crate) fn reads(&self, llvm: u32) -> bool {
        self.llvm.is_none_or(|own| own >= llvm)
    }
}

impl fmt::Display for Linker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        match self.llvm {
            Some(llvm) => write!(f, " (LLVM {llvm})"),
            None => write!(f, " (LLVM built in)"),
        }
    }
}

/// The major version of the LLVM among the shared libraries that `ldd` lists.
fn llvm_of(libraries: &str) -> Option<u32> {
    let library = libraries
        .split_whitespace()
        .find(|word| word.starts_with("libLLVM"))?;
    // `libLLVM.so.22.1`, `libLLVM-17.so.1`, and rustc's own `libLLVM.so.22.1-rust-1.97.0-nightly`.
    let digits = library.trim_start_matches(|c: char| !c.is_ascii_digit());
    digits
        .split(|c: char| !c.is_ascii_digit())
        .next()?
        .parse()
        .ok()
}

/// Finds both, or returns which one is missing and the command that installs it.
///
/// # Errors
///
/// Fails when either is missing.
pub(crate) fn find() -> Result<(Compiler, Linker)> {
    let Some(compiler) = Compiler::find() else {
        bail!("no compiler for {TARGET}: run `cargo xtask setup`");
    };
    let Some(linker) = Linker::find(compiler.version.llvm) else {
        let llvm = compiler.version.llvm;
        bail!("no bpf-linker with LLVM {llvm} or newer: run `cargo xtask setup`");
    };
    Ok((compiler, linker))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_and_llvm_are_read_from_a_compilers_version() {
        let text = "rustc 1.96.0 (ac68faa20 2026-05-25)\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        let version = Version::parse(text).expect("a version");
        assert_eq!(
            version,
            Version {
                release: "1.96.0".to_owned(),
                llvm: 22
            }
        );
        assert_eq!(release("1.97.0-nightly"), Some((1, 97)));
        assert!(is_new_enough("1.96.0+dfsg1-1~deb12u2"));
        assert!(!is_new_enough("1.85.0+dfsg3-1"));
        assert!(!is_new_enough("(none)"));
    }

    #[test]
    fn a_linkers_llvm_is_read_from_its_libraries() {
        for (libraries, llvm) in [
            ("\tlibLLVM.so.22.1 => /lib/libLLVM.so.22.1 (0x0)", Some(22)),
            ("\tlibLLVM-17.so.1 => /lib/libLLVM-17.so.1 (0x0)", Some(17)),
            (
                "\tlibLLVM.so.21.1-rust-1.92.0-nightly => not found",
                Some(21),
            ),
            ("\tlibc.so.6 => /lib/libc.so.6 (0x0)", None),
            ("", None),
        ] {
            assert_eq!(llvm_of(libraries), llvm, "{libraries}");
        }
    }

    #[test]
    fn a_linker_reads_bitcode_of_its_own_and_older_llvm_versions() {
        let linker = |llvm| Linker {
            path: PathBuf::new(),
            llvm,
        };
        assert!(linker(Some(22)).reads(22));
        assert!(linker(Some(23)).reads(22));
        assert!(!linker(Some(21)).reads(22));
        assert!(linker(None).reads(22));
    }
}
