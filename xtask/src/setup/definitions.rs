//! The server of definitions that tests run: the part of a current Kubernetes API server that checks the schemas of
//! policy objects and evaluates the expressions in them (`tests/tests/admission/server`).
//!
//! Debian sid has the libraries of current releases, and a compiler for them. Both are unpacked beside the system, used
//! once, and removed. sid moves, so the release is the current one of the day on which the server is built.
//! `DEFINITION_SERVER` names another one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::{apt, found, kubernetes};
use crate::{process, workspace};

/// The directory of the server, in the user's cache and in `target/kubernetes`.
const DIRECTORY: &str = "definitions";
/// The server's program.
const PROGRAM: &str = "server";
/// The source that the program beside it was built from.
const SOURCE: &str = "server.go";
/// Where the source is.
const SOURCE_PATH: &str = "tests/tests/admission/server/server.go";
/// Names another server.
const NAMED: &str = "DEFINITION_SERVER";
/// The release of Debian.
const RELEASE: &str = "sid";
/// Packages whose dependencies are all that is needed: the library, and the compiler.
const PACKAGES: [&str; 2] = ["golang-k8s-apiextensions-apiserver-dev", "golang-go"];
/// Parts of the names of large packages that others of these depend on, and that the server does not use. They have
/// more than half of all files.
const UNUSED: [&str; 9] = [
    "-apache-arrow-",
    "-aws-sdk-",
    "-cloudflare-circl-",
    "-gonum-",
    "-google-api-",
    "-google-cloud-",
    "-mongo-driver-",
    "-pierrec-lz4-",
    "-x-image-",
];

/// The missing part, as text for people.
pub(super) fn missing() -> Option<String> {
    let is_there = kubernetes::names_program(NAMED) || version(&directory()).is_some();
    (!is_there).then(|| "the server of definitions".to_owned())
}

/// Makes sure that the server is there.
pub(super) fn ensure() -> Result<()> {
    if kubernetes::names_program(NAMED) {
        return Ok(());
    }
    if version(&directory()).is_none() {
        let kept = kubernetes::cache().join(DIRECTORY);
        if version(&kept).is_none() {
            println!("missing: the server of definitions (for the tests); builds in some minutes");
            build(&kept).with_context(|| {
                format!(
                    "build it elsewhere (tests/tests/admission/README.md), and name it with {NAMED}"
                )
            })?;
        }
        for file in [PROGRAM, SOURCE] {
            kubernetes::place(&kept.join(file), &directory().join(file))?;
        }
    }
    let version = version(&directory()).context("the server that was built does not run")?;
    found("server of definitions", &version);
    Ok(())
}

/// Where the tests look for it.
fn directory() -> PathBuf {
    workspace::kubernetes(DIRECTORY)
}

fn source() -> PathBuf {
    workspace::root().join(SOURCE_PATH)
}

/// The version of the server in a directory, if there is one that was built from today's source.
fn version(directory: &Path) -> Option<String> {
    let built_from = fs::read(directory.join(SOURCE)).ok()?;
    if built_from != fs::read(source()).ok()? {
        return None;
    }
    let text = process::output(Command::new(directory.join(PROGRAM)).arg("-version")).ok()?;
    text.trim().strip_prefix("Kubernetes v").map(str::to_owned)
}

/// Builds the server in a directory that is removed afterwards, and keeps it in `target`.
fn build(target: &Path) -> Result<()> {
    if !apt::is_here() || process::find("dpkg-deb").is_none() {
        bail!("this system has no apt and dpkg, so Debian's libraries cannot be downloaded");
    }
    let directory = workspace::root().join("target/kubernetes/definitions-build");
    _ = fs::remove_dir_all(&directory);
    let packages = directory.join("packages");
    create(&packages)?;
    let root = directory.join("root");
    create(&root)?;
    let apt = Apt::new(&directory)?;
    apt.run(&["update"])?;
    let names = needed(&apt.output(&[&["--simulate", "install"][..], &PACKAGES].concat())?);
    println!("downloading {} packages of Debian {RELEASE}", names.len());
    apt.download(&names, &packages)?;
    unpack(&packages, &root)?;

    let go = compiler(&root)?;
    let mut command = Command::new(go.join("bin/go"));
    command
        .args(["build", "-ldflags", "-s -w", "-o"])
        .arg(directory.join(PROGRAM))
        .arg(source())
        .env("GOROOT", &go)
        .env("GOPATH", root.join("usr/share/gocode"))
        .env("GOCACHE", directory.join("cache"))
        .env("HOME", &directory)
        .env("GO111MODULE", "off")
        .env("GOTOOLCHAIN", "local")
        .env("GOFLAGS", "")
        .env("CGO_ENABLED", "0");
    process::long(&mut command, "building the server of definitions")?;
    kubernetes::place(&directory.join(PROGRAM), &target.join(PROGRAM))?;
    _ = fs::remove_file(target.join(SOURCE));
    fs::copy(source(), target.join(SOURCE)).context("cannot keep the server's source")?;
    if let Err(error) = fs::remove_dir_all(&directory) {
        println!("{} may be removed: {error}", directory.display());
    }
    Ok(())
}

fn create(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))
}

/// apt with a list of sources and a state of its own. The system's stay unchanged.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    fn new(directory: &Path) -> Result<Self> {
        let sources = directory.join("debian.sources");
        fs::write(&sources, kubernetes::sources("deb", RELEASE)?)
            .with_context(|| format!("cannot write {}", sources.display()))?;
        // No package is installed.
        let status = directory.join("status");
        fs::write(&status, "").with_context(|| format!("cannot write {}", status.display()))?;
        let [lists, cache] = ["lists", "cache"].map(|part| directory.join(part));
        create(&lists.join("partial"))?;
        create(&cache.join("archives/partial"))?;
        let paths = [
            ("Dir::Etc::sourcelist", sources.as_path()),
            ("Dir::Etc::sourceparts", Path::new("/dev/null")),
            ("Dir::State::lists", &lists),
            ("Dir::State::status", &status),
            ("Dir::Cache", &cache),
        ]
        .map(|(key, path)| format!("{key}={}", path.display()));
        let settings = [
            "Acquire::Languages=none",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
            "APT::Install-Recommends=false",
        ]
        .map(str::to_owned);
        let options = paths.into_iter().chain(settings);
        Ok(Self {
            options: options
                .flat_map(|option| ["--option".to_owned(), option])
                .collect(),
        })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("apt-get");
        command.arg("--quiet").args(&self.options).args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> Result<()> {
        process::run(&mut self.command(arguments))
    }

    fn output(&self, arguments: &[&str]) -> Result<String> {
        process::output(&mut self.command(arguments))
    }

    /// Downloads packages into a directory. apt checks them against the signed list.
    fn download(&self, names: &[String], directory: &Path) -> Result<()> {
        let mut command = self.command(&["download"]);
        process::output(command.args(names).current_dir(directory)).map(drop)
    }
}

/// The packages, of those that apt would install, that have Go sources or the compiler.
fn needed(simulated: &str) -> Vec<String> {
    let packages = simulated.lines().filter_map(|line| {
        let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
        let is_source = rest.contains("[all]");
        let is_unused = UNUSED.iter().any(|part| name.contains(part));
        let is_of_go = name.starts_with("golang-") && (is_source || name.ends_with("-go"));
        (is_of_go && !is_unused).then(|| name.to_owned())
    });
    packages.collect()
}

fn unpack(packages: &Path, root: &Path) -> Result<()> {
    let files = fs::read_dir(packages)
        .with_context(|| format!("cannot list {}", packages.display()))?
        .filter_map(|file| Some(file.ok()?.path()));
    for file in files {
        let mut command = Command::new("dpkg-deb");
        process::output(command.arg("--extract").arg(&file).arg(root))?;
    }
    Ok(())
}

/// The directory of the unpacked compiler.
fn compiler(root: &Path) -> Result<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(root.join("usr/lib"))
        .context("no compiler was unpacked")?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("bin/go").is_file())
        .collect();
    found.sort();
    found.pop().context("no compiler was unpacked")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_of_go_and_its_compiler_are_needed() {
        let simulated = "NOTE: This is only a simulation!\n\
                         Inst libc6 (2.43-7 Debian:unstable [amd64])\n\
                         Inst golang-1.27-src (1.27.3-1 Debian:unstable [all])\n\
                         Inst golang-1.27-go (1.27.3-1 Debian:unstable [amd64])\n\
                         Inst golang-golang-x-tools (1:0.52.0+ds-3 Debian:unstable [amd64])\n\
                         Inst golang-google-cloud-dev (0.123.0-5 Debian:unstable [all])\n\
                         Inst golang-k8s-api-dev (0.36.4-1 Debian:unstable [all])\n\
                         Conf golang-k8s-api-dev (0.36.4-1 Debian:unstable [all])\n";
        assert_eq!(
            needed(simulated),
            ["golang-1.27-src", "golang-1.27-go", "golang-k8s-api-dev"]
        );
    }
}
