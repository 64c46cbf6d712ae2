//! Kubernetes' own programs: the API server that the tests run, with its etcd, and the rest of a node
//! for `cargo xtask e2e`.
//!
//! No distribution has them built, but Debian has the whole source of Kubernetes. This version is old, which is
//! useful: the agent must work without everything that it lacks. `KUBE_APISERVER` names another API server for the
//! tests, such as that of a current release, and `ETCD` another etcd. `KUBERNETES_PROGRAMS` names a directory with
//! another version's programs for `cargo xtask e2e`.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::{Program, Purpose, apt, found, missing_programs, programs};
use crate::{process, workspace};

/// The version that is built, and the only one for which the source package is used.
const VERSION: &str = "1.20.2";
/// The version, and the number of the way in which it is built, for the names of directories.
const BUILD: &str = "1.20.2-2";
/// The version of Debian whose sources have it.
const RELEASE: &str = "bookworm";
/// The source package.
const SOURCE: &str = "kubernetes";
/// The program of it that the tests run.
const API_SERVER: &str = "kube-apiserver";
/// The programs of a cluster with one node.
const NODE: [&str; 4] = [
    API_SERVER,
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
];
/// Names a directory with these programs of another version.
const OTHER_PROGRAMS: &str = "KUBERNETES_PROGRAMS";
/// The compiler: later ones refuse the modules of this version.
const GO: &str = "/usr/lib/go-1.19/bin";

/// The programs that an API server needs to run.
const TO_RUN: [Program; 1] = [Program {
    name: "etcd",
    packages: &["etcd-server"],
    purpose: "the store of an API server in the tests",
    needed_for: Purpose::Test,
    services: &["etcd.service"],
}];

/// The programs that a build needs.
const TO_BUILD: [Program; 3] = [
    Program {
        name: "make",
        packages: &["make"],
        purpose: "building Kubernetes' programs",
        needed_for: Purpose::Test,
        services: &[],
    },
    Program {
        name: "rsync",
        packages: &["rsync"],
        purpose: "building Kubernetes' programs",
        needed_for: Purpose::Test,
        services: &[],
    },
    Program {
        name: "jq",
        packages: &["jq"],
        purpose: "building Kubernetes' programs",
        needed_for: Purpose::Test,
        services: &[],
    },
];

/// The tests' missing parts, as text for people.
pub(super) fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    if !names_program("ETCD") && !missing_programs(&TO_RUN).is_empty() {
        missing.push("etcd".to_owned());
    }
    if !names_program("KUBE_APISERVER") && !is_right(&directory().join(API_SERVER)) {
        missing.push(format!("{API_SERVER} {VERSION}"));
    }
    missing
}

/// A node's missing parts, as text for people.
pub(super) fn missing_node() -> Vec<String> {
    NODE.iter()
        .filter(|name| **name != API_SERVER && !is_right(&directory().join(name)))
        .map(|name| format!("{name} {VERSION}"))
        .collect()
}

/// Makes sure that everything for the tests is there.
pub(super) fn ensure() -> Result<()> {
    if !names_program("ETCD") {
        programs(&TO_RUN)?;
    }
    if names_program("KUBE_APISERVER") {
        return Ok(());
    }
    ensure_programs(&[API_SERVER]).context(
        "build it elsewhere, or take one of another version, and name it with KUBE_APISERVER",
    )
}

/// The programs of a cluster with one node.
pub(crate) struct Node {
    /// Where its programs are.
    pub(crate) programs: PathBuf,
    /// Their version, as in 1.20.
    pub(crate) version: (u32, u32),
}

/// Makes sure that the programs of a cluster with one node are there.
///
/// # Errors
///
/// Fails when something is missing and can be neither installed nor built.
pub(crate) fn ensure_node() -> Result<Node> {
    programs(&TO_RUN)?;
    if let Some(named) = env::var_os(OTHER_PROGRAMS).filter(|named| !named.is_empty()) {
        return other_programs(Path::new(&named));
    }
    ensure_programs(&NODE)?;
    let version = minor_version(VERSION).context("a version without a minor one")?;
    Ok(Node {
        programs: directory(),
        version,
    })
}

/// The programs that the user names.
fn other_programs(directory: &Path) -> Result<Node> {
    let mut versions = Vec::new();
    for name in NODE {
        let program = directory.join(name);
        let printed =
            process::output(Command::new(&program).arg("--version")).with_context(|| {
                format!(
                    "{OTHER_PROGRAMS} names {}, where {} have to be",
                    directory.display(),
                    NODE.join(", ")
                )
            })?;
        let version = printed
            .trim()
            .strip_prefix("Kubernetes v")
            .and_then(minor_version);
        versions.push(version.with_context(|| {
            format!(
                "{} --version says `{}`, and no version of Kubernetes",
                program.display(),
                printed.trim()
            )
        })?);
    }
    let (Some(oldest), Some(newest)) = (versions.iter().min(), versions.iter().max()) else {
        bail!("no programs");
    };
    if oldest != newest {
        bail!(
            "the programs in {} are of versions {}.{} to {}.{}: {OTHER_PROGRAMS} has to name those of one version",
            directory.display(),
            oldest.0,
            oldest.1,
            newest.0,
            newest.1
        );
    }
    found(
        OTHER_PROGRAMS,
        &format!("{}, version {}.{}", directory.display(), newest.0, newest.1),
    );
    Ok(Node {
        programs: directory.to_owned(),
        version: *newest,
    })
}

/// Major and minor number of a version such as 1.36.2.
fn minor_version(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Makes sure that these programs of Kubernetes are there.
fn ensure_programs(names: &[&'static str]) -> Result<()> {
    let kept = cache().join(BUILD);
    let lacking = |directory: &Path| -> Vec<&str> {
        let names = names.iter().copied();
        names
            .filter(|name| !is_right(&directory.join(name)))
            .collect()
    };
    let wanted = lacking(&directory());
    let to_build: Vec<_> = lacking(&kept)
        .into_iter()
        .filter(|name| wanted.contains(name))
        .collect();
    if !to_build.is_empty() {
        let listed = to_build.join(", ");
        println!("missing: {listed} {VERSION} (for the tests); builds in some minutes");
        build(&to_build, &kept)?;
    }
    for name in wanted {
        place(&kept.join(name), &directory().join(name))?;
    }
    found(&names.join(" "), VERSION);
    Ok(())
}

/// Where the tests look for them.
fn directory() -> PathBuf {
    workspace::kubernetes(BUILD)
}

/// Whether the user has named a program with this variable.
pub(super) fn names_program(variable: &str) -> bool {
    let Some(path) = env::var_os(variable) else {
        return false;
    };
    found(variable, &path.to_string_lossy());
    true
}

/// Whether this is a program of the right version, and whole.
fn is_right(path: &Path) -> bool {
    path.exists()
        && process::output(Command::new(path).arg("--version"))
            .is_ok_and(|text| text.trim() == format!("Kubernetes v{VERSION}"))
}

/// The place where a program is kept for the next checkout on this machine.
pub(super) fn cache() -> PathBuf {
    let named = |variable| env::var_os(variable).filter(|path| !path.is_empty());
    let caches = named("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| named("HOME").map(|home| Path::new(&home).join(".cache")));
    caches
        .unwrap_or_else(|| workspace::root().join("target/cache"))
        .join("egress-agent/kubernetes")
}

/// Puts the program where the tests look for it: the same file where that is possible.
pub(super) fn place(from: &Path, to: &Path) -> Result<()> {
    let directory = to.parent().context("a path without a directory")?;
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    // The existing file is not the right one.
    _ = fs::remove_file(to);
    fs::hard_link(from, to)
        .or_else(|_| fs::copy(from, to).map(drop))
        .with_context(|| format!("cannot put {} in place", to.display()))
}

/// Builds programs from Debian's source package, in a directory that is removed afterwards, and keeps
/// them in `target`.
fn build(names: &[&str], target: &Path) -> Result<()> {
    if !apt::is_here() {
        bail!("this system has no apt, so Debian's sources cannot be downloaded");
    }
    programs(&TO_BUILD)?;
    if !Path::new(GO).exists() {
        apt::install(&[apt::first_available(&["golang-1.19-go"])?])?;
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
    patch(&sources)?;

    let mut path = std::ffi::OsString::from(GO);
    path.push(":");
    path.push(env::var_os("PATH").unwrap_or_default());
    let mut make = Command::new("make");
    let commands: Vec<_> = names.iter().map(|name| format!("cmd/{name}")).collect();
    make.arg("--silent")
        .arg(format!("WHAT={}", commands.join(" ")));
    make.current_dir(&sources)
        .env("PATH", path)
        // Its caches are removed with the directory, and the user's settings of Go do not count.
        .env("HOME", &directory)
        .env("CGO_ENABLED", "0")
        .env("GOFLAGS", "")
        .env_remove("GOPATH")
        .env_remove("GOROOT")
        .env_remove("GO111MODULE");
    process::long(&mut make, "building programs of Kubernetes")?;
    for name in names {
        let built = sources.join("_output/bin").join(name);
        if !is_right(&built) {
            bail!("the {name} that was built does not say that it is version {VERSION}");
        }
        place(&built, &target.join(name))?;
    }
    // Go makes its module directories read-only, which root does not notice.
    if let Err(error) = fs::remove_dir_all(&directory) {
        println!("{} may be removed: {error}", directory.display());
    }
    Ok(())
}

/// Changes that the sources need with this compiler, each as file, text and what replaces it.
///
/// The library reflect2 calls a function of Go's runtime that has had its third argument since Go 1.18. Without it the
/// API server ends at the first custom resource. The rest of the structure is that of Go 1.19's runtime (`hiter` in
/// runtime/map.go).
const PATCHES: [(&str, &str, &str); 3] = [
    (
        "unsafe_link.go",
        "func mapiterinit(rtype unsafe.Pointer, m unsafe.Pointer) *hiter",
        "func mapiterinit(rtype unsafe.Pointer, m unsafe.Pointer, it *hiter)",
    ),
    (
        "unsafe_link.go",
        "\t// rest fields are ignored\n",
        "\tt, h, buckets, bptr, overflow, oldoverflow unsafe.Pointer\n\tstartBucket uintptr\n\
         \toffset, wrapped, b, i uint8\n\tbucket, checkBucket uintptr\n",
    ),
    (
        "unsafe_map.go",
        "\treturn &UnsafeMapIterator{\n\t\thiter:      mapiterinit(type2.rtype, *(*unsafe.Pointer)(obj)),\n",
        "\tit := &hiter{}\n\tmapiterinit(type2.rtype, *(*unsafe.Pointer)(obj), it)\n\
         \treturn &UnsafeMapIterator{\n\t\thiter:      it,\n",
    ),
];

/// Applies [`PATCHES`].
fn patch(sources: &Path) -> Result<()> {
    let directory = sources.join("vendor/github.com/modern-go/reflect2");
    for (file, text, replacement) in PATCHES {
        let path = directory.join(file);
        let before =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if !before.contains(text) {
            bail!(
                "{} differs from the text that the patch replaces",
                path.display()
            );
        }
        fs::write(&path, before.replace(text, replacement))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Downloads the source's archive, from where this machine has its packages from. Lists and
/// settings of the system stay as they are.
fn download(directory: &Path) -> Result<PathBuf> {
    let sources = directory.join("debian.sources");
    fs::write(&sources, self::sources("deb-src", RELEASE)?)
        .with_context(|| format!("cannot write {}", sources.display()))?;
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

/// A list of sources with packages of this type, from a release of Debian, at the mirror that this machine uses.
pub(super) fn sources(types: &str, release: &str) -> Result<String> {
    Ok(format!(
        "Types: {types}\nURIs: {}\nSuites: {release}\nComponents: main\n\
         Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
        mirror()?
    ))
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
    fn a_version_is_read_as_kubernetes_writes_it() {
        assert_eq!(minor_version("1.36.2"), Some((1, 36)));
        assert_eq!(minor_version("1.34.0-alpha.1+dirty"), Some((1, 34)));
        assert_eq!(minor_version("unknown"), None);
    }

    #[test]
    fn the_archive_is_distinguished_from_the_packaging() {
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
