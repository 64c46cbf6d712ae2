//! `cargo xtask setup`: finds, or installs, the programs and libraries that building and running the project needs.
//!
//! Looks for everything first. Installs what is missing and the command at hand needs: programs from the
//! distribution's packages, the eBPF toolchain in one of the two ways that [`crate::toolchain`] knows.

pub(crate) mod apt;
mod definitions;
mod ebpf;
pub(crate) mod kubernetes;

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum as _;

use crate::process;

/// Finds what building and running needs, and installs what is missing.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Says what is missing and installs nothing; fails when anything is
    #[arg(long)]
    check: bool,
    /// Which command to set up for; each needs what those before it need
    #[arg(long = "for", value_name = "COMMAND", default_value = "test")]
    purpose: Purpose,
}

/// The commands. Each needs what those before it need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Purpose {
    /// `cargo xtask build`: compilers
    Build,
    /// `cargo xtask demo`: also programs that show what passes
    Demo,
    /// `cargo xtask test` and `lint`: also resolvers, clients and Kubernetes API servers
    Test,
    /// `cargo xtask e2e`: also the other programs of a Kubernetes node
    E2e,
}

/// A program of the distribution that the project's commands run.
pub(crate) struct Program {
    pub(crate) name: &'static str,
    /// The packages that may have it. The first one that the distribution has is installed.
    pub(crate) packages: &'static [&'static str],
    pub(crate) purpose: &'static str,
    /// The first command that needs it.
    pub(crate) needed_for: Purpose,
    /// Services that its package would start, now and at every boot. They are masked first: the tests start the
    /// program themselves, and nothing else should listen on the machine because of them.
    pub(crate) services: &'static [&'static str],
}

const PROGRAMS: [Program; 22] = [
    Program {
        name: "ip",
        packages: &["iproute2"],
        purpose: "network namespaces",
        needed_for: Purpose::Demo,
        services: &[],
    },
    Program {
        name: "tc",
        packages: &["iproute2"],
        purpose: "looking at attached programs",
        needed_for: Purpose::Test,
        services: &[],
    },
    Program {
        name: "bpftool",
        // On Ubuntu /usr/sbin/bpftool only starts the one that belongs to the running kernel.
        packages: &["bpftool", "linux-tools-generic"],
        purpose: "looking into the maps",
        needed_for: Purpose::Demo,
        services: &[],
    },
    Program {
        // Not in the PATH: container runtimes look for plugins there.
        name: "/usr/lib/cni/bandwidth",
        packages: &["containernetworking-plugins"],
        purpose: "a network plugin for the tests",
        needed_for: Purpose::Test,
        services: &[],
    },
    Program {
        name: "unbound",
        packages: &["unbound"],
        purpose: "a resolver for the tests",
        needed_for: Purpose::Test,
        services: &["unbound.service"],
    },
    Program {
        name: "named",
        packages: &["bind9"],
        purpose: "a resolver for the tests",
        needed_for: Purpose::Test,
        services: &["named.service"],
    },
    Program {
        name: "kresd",
        packages: &["knot-resolver"],
        purpose: "a resolver for the tests",
        needed_for: Purpose::Test,
        services: &["kres-cache-gc.service"],
    },
    Program {
        name: "pdns_recursor",
        packages: &["pdns-recursor"],
        purpose: "a resolver for the tests",
        needed_for: Purpose::Test,
        services: &["pdns-recursor.service"],
    },
    Program {
        name: "dnsmasq",
        packages: &["dnsmasq-base"],
        purpose: "a resolver to compare with",
        needed_for: Purpose::Test,
        services: &[],
    },
    Program {
        name: "haproxy",
        packages: &["haproxy"],
        purpose: "a proxy to compare with",
        needed_for: Purpose::Test,
        services: &["haproxy.service"],
    },
    Program {
        name: "busybox",
        packages: &["busybox-static"],
        purpose: "a DHCP client for the tests",
        needed_for: Purpose::Test,
        services: &[],
    },
    Program {
        name: "nft",
        packages: &["nftables"],
        purpose: "the sets that dnsmasq fills, to compare with",
        needed_for: Purpose::Test,
        services: &[],
    },
    Program {
        name: "dig",
        packages: &["bind9-dnsutils", "dnsutils"],
        purpose: "asking by hand",
        needed_for: Purpose::Test,
        services: &[],
    },
    Program {
        name: "delv",
        packages: &["bind9-dnsutils"],
        purpose: "a client that validates, for the tests",
        needed_for: Purpose::Test,
        services: &[],
    },
    Program {
        name: "dnssec-signzone",
        packages: &["bind9-utils", "bind9utils"],
        purpose: "signing a zone for the tests",
        needed_for: Purpose::Test,
        services: &[],
    },
    Program {
        name: "musl-gcc",
        packages: &["musl-tools"],
        purpose: "a second C library for the tests",
        needed_for: Purpose::Test,
        services: &[],
    },
    Program {
        name: "curl",
        packages: &["curl"],
        purpose: "connecting by hand",
        needed_for: Purpose::Demo,
        services: &[],
    },
    Program {
        name: "go",
        packages: &["golang-go"],
        purpose: "a program with Go's resolver for the tests",
        needed_for: Purpose::Test,
        services: &[],
    },
    Program {
        name: "openssl",
        packages: &["openssl"],
        purpose: "keys for an API server in the tests",
        needed_for: Purpose::Test,
        services: &[],
    },
    Program {
        name: "cc",
        packages: &["gcc", "build-essential"],
        purpose: "linking",
        needed_for: Purpose::Build,
        services: &[],
    },
    Program {
        name: "x86_64-w64-mingw32-dlltool",
        packages: &["binutils-mingw-w64-x86-64"],
        purpose: "compiling the portable crates for Windows",
        needed_for: Purpose::Test,
        services: &[],
    },
    Program {
        name: "c++",
        packages: &["g++", "build-essential"],
        purpose: "libFuzzer",
        needed_for: Purpose::Test,
        services: &[],
    },
];

/// The version of cargo-deny that deny.toml is written for.
const CARGO_DENY: &str = "^0.20.2";

pub(crate) fn run(options: &Options) -> Result<()> {
    let Options { check, purpose } = *options;
    if check {
        return self::check(purpose);
    }
    ensure(purpose)
}

/// Sets up for a command.
///
/// # Errors
///
/// Fails when something is missing and cannot be installed.
pub(crate) fn ensure(purpose: Purpose) -> Result<()> {
    announce(purpose);
    if purpose > Purpose::Build {
        kernel()?;
    }
    programs_for(purpose)?;
    ebpf::ensure()?;
    if purpose >= Purpose::Test {
        components()?;
        musl()?;
        ebpf::ensure_library_sources()?;
        kubernetes::ensure()?;
        definitions::ensure()?;
        deny()?;
    }
    if purpose == Purpose::E2e {
        kubernetes::ensure_node()?;
    }
    Ok(())
}

/// Announces what will be installed, before it takes minutes.
fn announce(purpose: Purpose) {
    let missing = missing(purpose);
    if missing.is_empty() {
        return;
    }
    println!("to be installed or built: {}", missing.join(", "));
    println!(
        "this takes {}",
        match purpose {
            Purpose::Build | Purpose::Demo => "some minutes, most of them for compilers",
            Purpose::Test | Purpose::E2e => {
                "up to a quarter of an hour, most of it for Kubernetes' programs"
            }
        }
    );
}

/// Says what is missing.
fn check(purpose: Purpose) -> Result<()> {
    if purpose > Purpose::Build {
        kernel()?;
    }
    let missing = missing(purpose);
    if missing.is_empty() {
        println!("setup: nothing is missing");
        return Ok(());
    }
    let name = purpose.to_possible_value();
    bail!(
        "missing: {}; `cargo xtask setup --for {}` installs it",
        missing.join(", "),
        name.as_ref().map_or("test", |name| name.get_name())
    );
}

/// What a command needs and lacks.
fn missing(purpose: Purpose) -> Vec<String> {
    let programs = PROGRAMS
        .iter()
        .filter(|program| program.needed_for <= purpose);
    let mut missing: Vec<String> = programs
        .filter(|program| !is_usable(program.name))
        .map(|program| program.name.to_owned())
        .collect();
    missing.extend(ebpf::missing());
    if purpose >= Purpose::Test {
        let components = missing_components();
        missing.extend(components.iter().map(|name| format!("cargo {name}")));
        if !has_musl() {
            missing.push(format!("the target {}", musl_target()));
        }
        missing.extend(ebpf::missing_library_sources());
        missing.extend(kubernetes::missing());
        missing.extend(definitions::missing());
        if !has_deny() {
            missing.push("cargo deny".to_owned());
        }
    }
    if purpose == Purpose::E2e {
        missing.extend(kubernetes::missing_node());
    }
    missing
}

/// Checks that the running kernel has type information, without which nothing can be loaded.
fn kernel() -> Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        bail!(
            "kernel {release} lacks BTF (/sys/kernel/btf/vmlinux): \
             boot one built with CONFIG_DEBUG_INFO_BTF=y, as distributions build theirs"
        );
    }
    found("kernel", &format!("{release}, with BTF"));
    Ok(())
}

/// Finds the programs that a command needs, and installs those that are missing.
fn programs_for(purpose: Purpose) -> Result<()> {
    let wanted: Vec<_> = PROGRAMS
        .iter()
        .filter(|program| program.needed_for <= purpose)
        .collect();
    install_missing(&wanted)
}

/// Finds programs, and installs those that are missing.
///
/// # Errors
///
/// Fails when one is missing and cannot be installed.
pub(crate) fn programs(wanted: &'static [Program]) -> Result<()> {
    install_missing(&wanted.iter().collect::<Vec<_>>())
}

fn install_missing(wanted: &[&'static Program]) -> Result<()> {
    let missing: Vec<_> = wanted
        .iter()
        .filter(|program| !is_usable(program.name))
        .copied()
        .collect();
    if missing.is_empty() {
        let names: Vec<_> = wanted.iter().map(|program| program.name).collect();
        found("programs", &names.join(" "));
        return Ok(());
    }
    let mut packages = Vec::new();
    for program in &missing {
        println!("missing: {} ({})", program.name, program.purpose);
        packages.push(apt::first_available(program.packages).with_context(|| {
            let Program { name, packages, .. } = program;
            format!(
                "install `{name}` (package {}) and run this again",
                packages[0]
            )
        })?);
    }
    for program in &missing {
        mask(program)?;
    }
    apt::install(&packages)?;
    if let Some(Program { name, .. }) = wanted.iter().find(|program| !is_usable(program.name)) {
        bail!(
            "`{name}` is still missing after installing {}: install the package of your \
             distribution that has it, for the kernel that runs, and run this again",
            packages.join(" ")
        );
    }
    Ok(())
}

/// Masks the program's services before they can be started, where there is a systemd.
fn mask(program: &Program) -> Result<()> {
    if program.services.is_empty() || process::find("systemctl").is_none() {
        return Ok(());
    }
    let services = program.services.join(" ");
    println!("masking {services}, which would be started; `systemctl unmask {services}` undoes it");
    let mut command = process::as_root("systemctl")?;
    process::run(command.args(["--quiet", "mask"]).args(program.services))
}

fn missing_programs(wanted: &'static [Program]) -> Vec<&'static Program> {
    wanted
        .iter()
        .filter(|program| !is_usable(program.name))
        .collect()
}

fn is_usable(name: &str) -> bool {
    process::find(name).is_some_and(|path| {
        // Only bpftool can be installed and not work.
        name != "bpftool" || process::succeeds(Command::new(path).arg("version"))
    })
}

/// rustfmt and clippy, which rustup's smallest profile leaves out.
fn components() -> Result<()> {
    let missing = missing_components();
    if missing.is_empty() {
        found("cargo", "fmt clippy");
        return Ok(());
    }
    let names: Vec<_> = missing
        .iter()
        .map(|name| if *name == "fmt" { "rustfmt" } else { *name })
        .collect();
    println!("missing: {}", names.join(", "));
    if process::find("rustup").is_none() {
        bail!(
            "install {} for the compiler in use and run this again",
            names.join(" and ")
        );
    }
    process::run(
        Command::new("rustup")
            .args(["component", "add"])
            .args(&names),
    )
}

fn missing_components() -> Vec<&'static str> {
    ["fmt", "clippy"]
        .into_iter()
        .filter(|name| !process::succeeds(process::cargo().args([name, "--version"])))
        .collect()
}

/// The standard library with musl: the image's static agent, and a test with a program that resolves names as
/// musl does.
fn musl() -> Result<()> {
    let target = musl_target();
    if has_musl() {
        found("target", &target);
        return Ok(());
    }
    println!("missing: the target {target} (the image's static program; a resolver for the tests)");
    if process::find("rustup").is_none() {
        bail!("install the standard library for {target} and run this again");
    }
    process::run(Command::new("rustup").args(["target", "add", &target]))
}

pub(crate) fn musl_target() -> String {
    format!("{}-unknown-linux-musl", env::consts::ARCH)
}

pub(crate) fn has_musl() -> bool {
    let mut rustc = Command::new("rustc");
    rustc.args(["--print", "target-libdir", "--target", &musl_target()]);
    rustc.output().is_ok_and(|output| {
        let directory = String::from_utf8_lossy(&output.stdout);
        output.status.success() && Path::new(directory.trim()).exists()
    })
}

/// cargo-deny, which checks licences and sources in `cargo xtask lint`.
fn deny() -> Result<()> {
    if has_deny() {
        found("cargo", "deny");
        return Ok(());
    }
    println!(
        "missing: cargo deny (licences and sources of dependencies); builds in about a minute"
    );
    // Unoptimised: it builds several times faster, and runs for a second.
    let install = [
        "install",
        "cargo-deny",
        "--version",
        CARGO_DENY,
        "--locked",
        "--debug",
    ];
    process::run(
        process::cargo()
            .args(install)
            .env("CARGO_PROFILE_DEV_DEBUG", "false"),
    )
    .context("install cargo-deny (`cargo install cargo-deny --locked`) and run this again")
}

fn has_deny() -> bool {
    process::succeeds(process::cargo().args(["deny", "--version"]))
}

/// Reports something that is there.
fn found(what: &str, detail: &str) {
    println!("found    {what}: {detail}");
}
