//! The contents of the virtual machine's file system: the agent, the programs that drive it, and modules.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use object::{Object as _, ObjectSection as _};

use super::archive::Archive;
use super::modules;
use super::package::Kernel;
use crate::{process, workspace};

/// The first process.
const INIT: &str = include_str!("init.sh");

/// Programs of this machine that [`INIT`] uses.
const PROGRAMS: [&str; 5] = ["ip", "tc", "bpftool", "dnsmasq", "nft"];

/// The modules for the pod's interface, clsact filters and the stamp check, for a device that sends frames
/// again so that they skip filters, and for the tests.
const MODULES: [&str; 10] = [
    "veth",
    "sch_ingress",
    "cls_bpf",
    "tun",
    "bridge",
    "nf_tables",
    "nft_fwd_netdev",
    "nft_meta_bridge",
    "ifb",
    "act_mirred",
];

/// Directories that [`INIT`] mounts file systems on, or writes to.
const DIRECTORIES: [&str; 6] = ["proc", "sys", "dev", "run", "tmp", "etc"];

/// The file system that `kernel` starts from, with this program of tests.
///
/// # Errors
///
/// Fails when a program, one of its libraries or a module is missing.
pub(super) fn archive(kernel: &Kernel, tests: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in DIRECTORIES {
        archive.directory(directory)?;
    }
    archive.program("init", INIT.as_bytes())?;
    add_busybox(&mut archive)?;
    add_program(&mut archive, &workspace::agent(), "usr/bin/egress-agent")?;
    for name in PROGRAMS {
        add_program(&mut archive, &find(name)?, &format!("usr/bin/{name}"))?;
    }
    add_program(&mut archive, tests, "tests/packets")?;
    for (number, (name, content)) in modules::load_order(kernel, &MODULES)?.iter().enumerate() {
        // The first process loads them in the order of their names.
        archive.program(&format!("modules/{number:02}-{name}.ko"), content)?;
    }
    archive.finish()
}

/// Adds busybox with a link for each of its programs.
fn add_busybox(archive: &mut Archive) -> Result<()> {
    let busybox = find("busybox")?;
    add_program(archive, &busybox, "bin/busybox")?;
    let applets = process::output(Command::new(&busybox).arg("--list"))?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        archive.link(&format!("bin/{applet}"), "busybox")?;
    }
    Ok(())
}

fn find(name: &str) -> Result<PathBuf> {
    process::find(name).with_context(|| format!("there is no `{name}`"))
}

/// Adds a program as `path`, and its libraries under their paths on this machine.
fn add_program(archive: &mut Archive, file: &Path, path: &str) -> Result<()> {
    let content = read(file)?;
    for library in libraries(file, &content)? {
        archive.program(library.trim_start_matches('/'), &read(library.as_ref())?)?;
    }
    archive.program(path, &content)
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// The libraries, and the loader, of a program.
fn libraries(file: &Path, content: &[u8]) -> Result<Vec<String>> {
    let parsed = object::File::parse(content)
        .with_context(|| format!("{} is not a binary program", file.display()))?;
    let loader = parsed.section_by_name(".interp");
    if loader.is_none_or(|section| section.size() == 0) {
        return Ok(Vec::new());
    }
    libraries_in(&process::output(Command::new("ldd").arg(file))?)
        .with_context(|| format!("libraries of {}", file.display()))
}

/// Parses the output of ldd: `name => path (address)`, `path (address)`, `name (address)` for a library of
/// the kernel itself, and `name => not found`.
fn libraries_in(listed: &str) -> Result<Vec<String>> {
    let mut paths = Vec::new();
    for line in listed.lines().map(str::trim) {
        let target = line.split_once(" => ").map_or(line, |(_, target)| target);
        if target == "not found" {
            bail!("{line}");
        }
        let path = target.split(" (").next().unwrap_or(target);
        if path.starts_with('/') {
            paths.push(path.to_owned());
        }
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_the_output_of_ldd() {
        let listed = "\tlinux-vdso.so.1 (0x00007ff317af2000)\n\
            \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f5a33cee000)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f5a33fb0000)\n";
        assert_eq!(
            libraries_in(listed).expect("all libraries"),
            [
                "/lib/x86_64-linux-gnu/libc.so.6",
                "/lib64/ld-linux-x86-64.so.2"
            ]
        );
        let error = libraries_in("\tlibz.so.1 => not found\n").expect_err("missing");
        assert_eq!(error.to_string(), "libz.so.1 => not found");
    }
}
