//! The API server that the tests run, and its etcd.
//!
//! No distribution has a built API server, but Debian has Kubernetes' whole source. It is old,
//! and that is worth something: what it lacks, the agent must do without. `KUBE_APISERVER` names
//! another one, such as that of a current release, and `ETCD` another etcd.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::{Program, apt, found, missing_programs, programs};
use crate::{process, workspace};

/// The version that is built, and the only one that the source package is taken for.
const VERSION: &str = "1.20.2";
/// The version of Debian whose sources have it.
const RELEASE: &str = "bookworm";
/// The source package.
const SOURCE: &str = "kubernetes";
/// The compiler it is built with: later ones refuse its modules.
const GO: &str = "/usr/lib/go-1.19/bin";

/// What running it needs.
const TO_RUN: [Program; 1] = [Program {
    name: "etcd",
    packages: &["etcd-server"],
    purpose: "what an API server in the tests keeps its objects in",
    services: &["etcd"],
}];

/// What building it needs.
const TO_BUILD: [Program; 3] = [
    Program {
        name: "make",
        packages: &["make"],
        purpose: "building an API server for the tests",
        services: &[],
    },
    Program {
        name: "rsync",
        packages: &["rsync"],
        purpose: "building an API server for the tests",
        services: &[],
    },
    Program {
        name: "jq",
        packages: &["jq"],
        purpose: "building an API server for the tests",
        services: &[],
    },
];

/// What is missing, for a person to read.
pub(super) fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    if !names_program("ETCD") && !missing_programs(&TO_RUN).is_empty() {
        missing.push("etcd".to_owned());
    }
    if !names_program("KUBE_APISERVER") && !is_right(&workspace::apiserver(VERSION)) {
        missing.push(format!("kube-apiserver {VERSION}"));
    }
    missing
}

/// Makes sure of both.
pub(super) fn ensure() -> Result<()> {
    if !names_program("ETCD") {
        programs(&TO_RUN)?;
    }
    if names_program("KUBE_APISERVER") {
        return Ok(());
    }
    let wanted = workspace::apiserver(VERSION);
    if !is_right(&wanted) {
        let kept = cache().join(VERSION).join("kube-apiserver");
        if !is_right(&kept) {
            println!("missing: kube-apiserver {VERSION} (for the tests); builds in some minutes");
            build(&kept).context(
                "build it elsewhere, or take one of another version, and name it with \
                 KUBE_APISERVER",
            )?;
        }
        place(&kept, &wanted)?;
    }
    found("kube-apiserver", VERSION);
    Ok(())
}

/// Whether the user says with this variable which program to take.
fn names_program(variable: &str) -> bool {
    let Some(path) = env::var_os(variable) else {
        return false;
    };
    found(variable, &path.to_string_lossy());
    true
}

/// Whether this is an API server of the right version, and whole.
fn is_right(path: &Path) -> bool {
    path.exists()
        && process::output(Command::new(path).arg("--version"))
            .is_ok_and(|text| text.trim() == format!("Kubernetes v{VERSION}"))
}

/// What is kept for the next checkout on this machine.
fn cache() -> PathBuf {
    let named = |variable| env::var_os(variable).filter(|path| !path.is_empty());
    let caches = named("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| named("HOME").map(|home| Path::new(&home).join(".cache")));
    caches
        .unwrap_or_else(|| workspace::root().join("target/cache"))
        .join("egress-agent/kubernetes")
}

/// Puts the program where the tests look for it: the same file where that is possible.
fn place(from: &Path, to: &Path) -> Result<()> {
    let directory = to.parent().context("a path without a directory")?;
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    // What is there is not the right one.
    _ = fs::remove_file(to);
    fs::hard_link(from, to)
        .or_else(|_| fs::copy(from, to).map(drop))
        .with_context(|| format!("cannot put {} in place", to.display()))
}

/// Builds it from Debian's source package, in a directory that is removed afterwards.
fn build(target: &Path) -> Result<()> {
    if !apt::is_here() {
        bail!("this system has no apt, so Debian's sources cannot be had");
    }
    programs(&TO_BUILD)?;
    if !Path::new(GO).exists() {
        apt::install(&[apt::first_available(&["golang-1.19-go"])?], &[])?;
    }
    let directory = workspace::root().join("target/kubernetes/build");
    _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    let archive = download(&directory)?;
    let sources = directory.join("sources");
    fs::create_dir_all(&sources).with_context(|| format!("cannot create {}", sources.display()))?;
    let mut unpack = Command::new("tar");
    unpack.args(["--extract", "--gzip", "--strip-components=1", "--file"]);
    process::run(unpack.arg(&archive).arg("--directory").arg(&sources))?;

    let mut path = std::ffi::OsString::from(GO);
    path.push(":");
    path.push(env::var_os("PATH").unwrap_or_default());
    let mut make = Command::new("make");
    make.args(["--silent", "WHAT=cmd/kube-apiserver"]);
    make.current_dir(&sources)
        .env("PATH", path)
        // Its caches go with the rest, and nothing of the user's Go has a say.
        .env("HOME", &directory)
        .env("CGO_ENABLED", "0")
        .env("GOFLAGS", "")
        .env_remove("GOPATH")
        .env_remove("GOROOT")
        .env_remove("GO111MODULE");
    process::run(&mut make)?;
    let built = sources.join("_output/bin/kube-apiserver");
    if !is_right(&built) {
        bail!("what was built does not say that it is version {VERSION}");
    }
    place(&built, target)?;
    // Go makes its module directories read-only, which root does not notice.
    if let Err(error) = fs::remove_dir_all(&directory) {
        println!("{} may be removed: {error}", directory.display());
    }
    Ok(())
}

/// Downloads the source's archive, from where this machine has its packages from. Lists and
/// settings of the system stay as they are.
fn download(directory: &Path) -> Result<PathBuf> {
    let sources = directory.join("debian.sources");
    let text = format!(
        "Types: deb-src\nURIs: {}\nSuites: {RELEASE}\nComponents: main\n\
         Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
        mirror()?
    );
    fs::write(&sources, text).with_context(|| format!("cannot write {}", sources.display()))?;
    for part in ["lists/partial", "cache/archives/partial"] {
        let part = directory.join(part);
        fs::create_dir_all(&part).with_context(|| format!("cannot create {}", part.display()))?;
    }
    let options = [
        ("Dir::Etc::sourcelist", sources.as_path()),
        ("Dir::Etc::sourceparts", Path::new("/dev/null")),
        ("Dir::State::lists", &directory.join("lists")),
        ("Dir::Cache", &directory.join("cache")),
    ]
    .map(|(key, path)| format!("{key}={}", path.display()));
    for action in [
        &["update"][..],
        // Checks what it downloads against the signed list.
        &["source", "--download-only", "--only-source", SOURCE],
    ] {
        let mut command = Command::new("apt-get");
        command.arg("--quiet").current_dir(directory);
        for option in &options {
            command.args(["--option", option]);
        }
        process::run(command.args(action))?;
    }
    let files =
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    files
        .filter_map(|file| Some(file.ok()?.path()))
        .find(|file| is_archive(file.file_name().unwrap_or_default()))
        .with_context(|| format!("{RELEASE} has no source of Kubernetes {VERSION}"))
}

fn is_archive(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    name.starts_with(SOURCE) && name.ends_with(&format!("{VERSION}.orig.tar.gz"))
}

/// The address of a Debian mirror among the system's sources.
fn mirror() -> Result<String> {
    let policy = process::output(Command::new("apt-cache").arg("policy"))?;
    mirror_in(&policy).context("this system has no Debian mirror among its sources of packages")
}

fn mirror_in(policy: &str) -> Option<String> {
    let addresses = policy.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = words.find(|word| word.starts_with("http"))?;
        let suite = words.next()?;
        // Not the one of security updates, whose suites have no sources of their own.
        (suite.ends_with("/main") && !suite.contains("security")).then_some(address)
    });
    addresses
        .into_iter()
        .find(|address| address.trim_end_matches('/').ends_with("/debian"))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_one_that_has_debian_s_packages() {
        let policy = "Package files:\n 100 /var/lib/dpkg/status\n     release a=now\n \
                      500 https://packages.example/apt sdk/main amd64 Packages\n \
                      500 http://mirror.example/debian-security bookworm-security/main amd64 Packages\n \
                      500 http://mirror.example/debian bookworm/main amd64 Packages\n";
        assert_eq!(
            mirror_in(policy).as_deref(),
            Some("http://mirror.example/debian")
        );
        assert_eq!(mirror_in("Package files:\n"), None);
    }

    #[test]
    fn the_archive_is_told_from_the_packaging() {
        for (name, expected) in [
            ("kubernetes_1.20.5+really1.20.2.orig.tar.gz", true),
            (
                "kubernetes_1.20.5+really1.20.2-1.1+deb12u1.debian.tar.xz",
                false,
            ),
            ("kubernetes_1.20.5+really1.20.2-1.1+deb12u1.dsc", false),
            ("debian.sources", false),
        ] {
            assert_eq!(is_archive(OsStr::new(name)), expected, "{name}");
        }
    }
}
