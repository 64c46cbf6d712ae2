//! `cargo xtask setup`: finds, or installs, what building and running the project needs.
//!
//! Everything is looked for first, and only what is missing is installed: programs from the
//! distribution's packages, the eBPF toolchain in one of the two ways [`crate::toolchain`] knows.

pub(crate) mod apt;
mod ebpf;
pub(crate) mod kubernetes;

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::process;

/// Finds what building and running needs, and installs what is missing.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Says what is missing and installs nothing; fails when anything is
    #[arg(long)]
    check: bool,
}

/// A program of the distribution that the project's commands run.
pub(crate) struct Program {
    pub(crate) name: &'static str,
    /// The packages that may hold it, the first that the distribution has is installed.
    pub(crate) packages: &'static [&'static str],
    pub(crate) purpose: &'static str,
    /// What a package of its would start, now and at every boot. It is masked first: the tests start
    /// the program themselves, and nothing else is to listen on the machine for their sake.
    pub(crate) services: &'static [&'static str],
}

const PROGRAMS: [Program; 19] = [
    Program {
        name: "ip",
        packages: &["iproute2"],
        purpose: "network namespaces",
        services: &[],
    },
    Program {
        name: "tc",
        packages: &["iproute2"],
        purpose: "looking at attached programs",
        services: &[],
    },
    Program {
        name: "bpftool",
        // On Ubuntu /usr/sbin/bpftool only starts the one that belongs to the running kernel.
        packages: &["bpftool", "linux-tools-generic"],
        purpose: "looking into the maps",
        services: &[],
    },
    Program {
        // Not in the PATH: container runtimes look for plugins there.
        name: "/usr/lib/cni/bandwidth",
        packages: &["containernetworking-plugins"],
        purpose: "a network plugin for the tests",
        services: &[],
    },
    Program {
        name: "unbound",
        packages: &["unbound"],
        purpose: "a resolver for the tests",
        services: &["unbound.service"],
    },
    Program {
        name: "named",
        packages: &["bind9"],
        purpose: "a resolver for the tests",
        services: &["named.service"],
    },
    Program {
        name: "kresd",
        packages: &["knot-resolver"],
        purpose: "a resolver for the tests",
        services: &["kres-cache-gc.service"],
    },
    Program {
        name: "dnsmasq",
        packages: &["dnsmasq-base"],
        purpose: "a resolver to compare with",
        services: &[],
    },
    Program {
        name: "busybox",
        packages: &["busybox-static"],
        purpose: "a DHCP client for the tests",
        services: &[],
    },
    Program {
        name: "nft",
        packages: &["nftables"],
        purpose: "what dnsmasq fills, to compare with",
        services: &[],
    },
    Program {
        name: "dig",
        packages: &["bind9-dnsutils", "dnsutils"],
        purpose: "asking by hand",
        services: &[],
    },
    Program {
        name: "delv",
        packages: &["bind9-dnsutils"],
        purpose: "a client that validates, for the tests",
        services: &[],
    },
    Program {
        name: "dnssec-signzone",
        packages: &["bind9-utils", "bind9utils"],
        purpose: "signing a zone for the tests",
        services: &[],
    },
    Program {
        name: "musl-gcc",
        packages: &["musl-tools"],
        purpose: "a second C library for the tests",
        services: &[],
    },
    Program {
        name: "curl",
        packages: &["curl"],
        purpose: "connecting by hand",
        services: &[],
    },
    Program {
        name: "go",
        packages: &["golang-go"],
        purpose: "a program with Go's resolver for the tests",
        services: &[],
    },
    Program {
        name: "openssl",
        packages: &["openssl"],
        purpose: "keys for an API server in the tests",
        services: &[],
    },
    Program {
        name: "cc",
        packages: &["gcc", "build-essential"],
        purpose: "linking",
        services: &[],
    },
    Program {
        name: "c++",
        packages: &["g++", "build-essential"],
        purpose: "libFuzzer",
        services: &[],
    },
];

/// The version of cargo-deny that deny.toml is written for.
const CARGO_DENY: &str = "^0.20.2";

pub(crate) fn run(options: &Options) -> Result<()> {
    if options.check {
        return check();
    }
    kernel()?;
    programs(&PROGRAMS)?;
    components()?;
    musl()?;
    ebpf::ensure()?;
    kubernetes::ensure()?;
    deny()
}

/// Sets up for another command.
pub(crate) fn ensure() -> Result<()> {
    run(&Options { check: false })
}

/// Sets up what builds the eBPF object, and nothing else.
///
/// # Errors
///
/// Fails when something is missing and cannot be installed.
pub(crate) fn ensure_ebpf() -> Result<()> {
    ebpf::ensure()
}

/// Says what is missing.
fn check() -> Result<()> {
    kernel()?;
    let mut missing: Vec<String> = missing_programs(&PROGRAMS)
        .iter()
        .map(|program| program.name.to_owned())
        .collect();
    missing.extend(
        missing_components()
            .iter()
            .map(|name| format!("cargo {name}")),
    );
    if !has_musl() {
        missing.push(format!("the target {}", musl_target()));
    }
    missing.extend(ebpf::missing());
    missing.extend(kubernetes::missing());
    if !has_deny() {
        missing.push("cargo deny".to_owned());
    }
    if missing.is_empty() {
        println!("setup: nothing is missing");
        return Ok(());
    }
    bail!(
        "missing: {}; `cargo xtask setup` installs it",
        missing.join(", ")
    );
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

/// Finds programs, and installs those that are missing.
///
/// # Errors
///
/// Fails when one is missing and cannot be installed.
pub(crate) fn programs(wanted: &'static [Program]) -> Result<()> {
    let missing = missing_programs(wanted);
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
    if let Some(Program { name, .. }) = missing_programs(wanted).first() {
        bail!(
            "`{name}` is still missing after installing {}: install the package of your \
             distribution that has it, for the kernel that runs, and run this again",
            packages.join(" ")
        );
    }
    Ok(())
}

/// Keeps the program's services from being started, where there is a systemd to start them.
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
        // Only bpftool can be there and not work.
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
