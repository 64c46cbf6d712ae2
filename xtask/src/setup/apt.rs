//! Debian's and Ubuntu's packages.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::process;

/// Whether this system has apt at all.
pub(super) fn is_here() -> bool {
    process::find("apt-get").is_some()
}

/// The version of `package` that would be installed, if the distribution has it.
pub(super) fn candidate(package: &str) -> Option<String> {
    let policy = process::output(Command::new("apt-cache").args(["policy", package])).ok()?;
    candidate_in(&policy)
}

fn candidate_in(policy: &str) -> Option<String> {
    let line = policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (line != "(none)").then(|| line.to_owned())
}

/// Whether the distribution has each of `packages` in a version that `fits`. If the lists on this system
/// say no, they may be old: they are fetched anew, and asked again.
///
/// # Errors
///
/// Fails when the lists cannot be fetched.
pub(super) fn offers(packages: &[&str], fits: impl Fn(&str) -> bool) -> Result<bool> {
    let offers = || {
        let mut candidates = packages.iter().map(|package| candidate(package));
        candidates.all(|version| version.is_some_and(|version| fits(&version)))
    };
    if offers() {
        return Ok(true);
    }
    update()?;
    Ok(offers())
}

/// The first of `packages` that the distribution has.
///
/// # Errors
///
/// Fails when there is no apt, or when the distribution has none of them.
pub(super) fn first_available(packages: &[&'static str]) -> Result<&'static str> {
    require()?;
    refresh()?;
    match packages.iter().find(|package| candidate(package).is_some()) {
        Some(package) => Ok(package),
        None => bail!("this distribution has no package {}", packages.join(" or ")),
    }
}

fn require() -> Result<()> {
    if !is_here() {
        bail!("this system has no apt, so packages have to be installed by hand");
    }
    Ok(())
}

/// The names of packages that match a regular expression.
///
/// # Errors
///
/// Fails when there is no apt.
pub(crate) fn search(pattern: &str) -> Result<Vec<String>> {
    require()?;
    refresh()?;
    let search = ["search", "--names-only", pattern];
    let found = process::output(Command::new("apt-cache").args(search))?;
    let names = found.lines().filter_map(|line| line.split(" - ").next());
    Ok(names.map(str::to_owned).collect())
}

/// Downloads a package into an empty directory, and returns its file there. Nothing is installed.
///
/// # Errors
///
/// Fails when apt fails, as it does when its lists name a file that is gone.
pub(crate) fn download(package: &str, directory: &Path) -> Result<PathBuf> {
    let mut command = Command::new("apt-get");
    command.args(["download", "--quiet", package]);
    process::run(command.current_dir(directory))?;
    let mut files = fs::read_dir(directory)
        .with_context(|| format!("cannot list {}", directory.display()))?
        .filter_map(|file| Some(file.ok()?.path()));
    files
        .find(|file| file.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt has not downloaded {package}"))
}

/// Whether `package` is installed.
pub(super) fn is_installed(package: &str) -> bool {
    let query = ["--show", "--showformat=${db:Status-Status}", package];
    process::output(Command::new("dpkg-query").args(query)).is_ok_and(|text| text == "installed")
}

/// Fetches the lists of packages when there are none, as in a fresh container image.
pub(super) fn refresh() -> Result<()> {
    let has_lists = fs::read_dir("/var/lib/apt/lists").is_ok_and(|mut files| {
        files.any(|file| {
            file.is_ok_and(|file| file.file_name().to_string_lossy().contains("_Packages"))
        })
    });
    if has_lists { Ok(()) } else { update() }
}

/// Fetches the lists of packages.
pub(crate) fn update() -> Result<()> {
    process::run(process::as_root("apt-get")?.args(["update", "--quiet"]))
}

/// Installs `packages`; fetches the lists anew and tries again when they name files that are gone.
///
/// Never removes a package to make room: that is the user's to decide.
///
/// # Errors
///
/// Fails when apt fails, or without root and sudo.
pub(super) fn install(packages: &[&str]) -> Result<()> {
    let install = || -> Result<()> {
        // `env` hands the variable through sudo.
        let mut command = process::as_root("env")?;
        command.args([
            "DEBIAN_FRONTEND=noninteractive",
            "apt-get",
            "install",
            "--yes",
            "--quiet",
        ]);
        command
            .args(["--no-install-recommends", "--no-remove"])
            .args(packages);
        process::run(&mut command)
    };
    install().or_else(|_| {
        update()?;
        install()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_without_candidate_is_not_available() {
        let policy = |candidate| format!("x:\n  Installed: (none)\n  Candidate: {candidate}\n");
        assert_eq!(
            candidate_in(&policy("1.96.0+dfsg1-1")).as_deref(),
            Some("1.96.0+dfsg1-1")
        );
        assert_eq!(candidate_in(&policy("(none)")), None);
        assert_eq!(candidate_in(""), None);
    }
}
