//! Debian's kernels: the offered ones, and their files.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context as _, Result, anyhow, bail};

use crate::process;
use crate::setup::apt;

/// The parts of a kernel package's name before and after the version. The variant for clouds is the
/// smallest, and it exists for every kernel.
const PREFIX: &str = "linux-image-";
const SUFFIX: &str = "-cloud-amd64";

/// The first two numbers of a kernel's version.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Series {
    major: u32,
    minor: u32,
}

impl Series {
    pub(super) const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { major, minor } = self;
        write!(f, "{major}.{minor}")
    }
}

impl FromStr for Series {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        text.split_once('.')
            .and_then(|(major, minor)| Some(Self::new(major.parse().ok()?, minor.parse().ok()?)))
            .ok_or_else(|| anyhow!("expected two numbers, such as 6.1"))
    }
}

/// A kernel package.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Package {
    name: String,
    /// All numbers of the version, beginning with those of the series.
    version: Vec<u32>,
}

impl Package {
    /// Parses a package's name; `None` if it is not one kernel, such as the metapackage
    /// for the newest kernel of a series.
    fn read(name: &str) -> Option<Self> {
        let release = name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?;
        let version = release
            .split(|c: char| !c.is_ascii_digit())
            .filter(|number| !number.is_empty())
            .map(|number| number.parse().ok())
            .collect::<Option<Vec<_>>>()?;
        (version.len() > 2).then(|| Self {
            name: name.to_owned(),
            version,
        })
    }

    fn series(&self) -> Series {
        Series::new(self.version[0], self.version[1])
    }
}

/// The files of a kernel's package.
pub(super) struct Kernel {
    pub(super) series: Series,
    directory: PathBuf,
    /// The output of `uname -r`.
    pub(super) release: String,
}

impl Kernel {
    /// The kernel itself.
    pub(super) fn image(&self) -> PathBuf {
        self.directory
            .join("boot")
            .join(format!("vmlinuz-{}", self.release))
    }

    /// The directory of its modules.
    pub(super) fn modules(&self) -> PathBuf {
        // Newer packages have everything below usr/.
        let directories = ["usr/lib/modules", "lib/modules"];
        let [usr, top] = directories.map(|path| self.directory.join(path).join(&self.release));
        if usr.exists() { usr } else { top }
    }
}

/// Every series for which the distribution has a kernel.
///
/// # Errors
///
/// Fails when there is none, or apt is missing.
pub(super) fn offered() -> Result<Vec<Series>> {
    let mut series: Vec<_> = packages()?.iter().map(Package::series).collect();
    series.sort_unstable();
    series.dedup();
    if series.is_empty() {
        bail!("apt offers no kernel named {PREFIX}*{SUFFIX}, as Debian's are");
    }
    Ok(series)
}

/// The newest kernel of the series, unpacked below `cache`.
///
/// # Errors
///
/// Fails when the distribution has none, or it cannot be fetched.
pub(super) fn newest(series: Series, cache: &Path) -> Result<Kernel> {
    let mut package = choose(series)?;
    if ensure(&package, cache).is_err() {
        // The package lists may name a package that has been replaced since.
        apt::update()?;
        package = choose(series)?;
        ensure(&package, cache).with_context(|| format!("cannot fetch {}", package.name))?;
    }
    Ok(Kernel {
        series,
        directory: cache.join(&package.name),
        release: package.name[PREFIX.len()..].to_owned(),
    })
}

fn choose(series: Series) -> Result<Package> {
    let packages = packages()?;
    newest_of(series, &packages).cloned().ok_or_else(|| {
        anyhow!("apt offers no kernel {PREFIX}{series}.*{SUFFIX}: see `apt-cache search {PREFIX}`")
    })
}

fn newest_of(series: Series, packages: &[Package]) -> Option<&Package> {
    packages
        .iter()
        .filter(|package| package.series() == series)
        .max_by(|a, b| a.version.cmp(&b.version))
}

fn packages() -> Result<Vec<Package>> {
    let names = apt::search(&format!("^{PREFIX}[0-9].*{SUFFIX}$"))?;
    Ok(names
        .iter()
        .filter_map(|name| Package::read(name))
        .collect())
}

/// Downloads and unpacks a package, unless that has been done.
fn ensure(package: &Package, cache: &Path) -> Result<()> {
    let directory = cache.join(&package.name);
    if directory.exists() {
        return Ok(());
    }
    // An incomplete directory must never be used as a kernel.
    let partial = cache.join(format!("{}.partial", package.name));
    if partial.exists() {
        fs::remove_dir_all(&partial).context("cannot remove an earlier attempt")?;
    }
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    let archive = apt::download(&package.name, &partial)?;
    let files = partial.join("files");
    process::run(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(&archive)
            .arg(&files),
    )?;
    fs::rename(&files, directory).context("cannot move the unpacked files")?;
    fs::remove_dir_all(&partial).context("cannot remove the package")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_of_a_series_is_chosen_by_its_numbers() {
        let packages: Vec<_> = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.1.0-60-cloud-amd64-unsigned",
            "linux-image-6.1.0-61-amd64",
            "linux-image-6.12-cloud-amd64",
            "linux-image-6.12.99+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
        ]
        .into_iter()
        .filter_map(Package::read)
        .collect();
        let newest = |major, minor| {
            newest_of(Series::new(major, minor), &packages).map(|package| package.name.as_str())
        };
        assert_eq!(newest(6, 1), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(
            newest(6, 12),
            Some("linux-image-6.12.117+deb12-cloud-amd64")
        );
        assert_eq!(newest(5, 10), None);
    }

    #[test]
    fn series_are_compared_by_their_numbers() {
        let read = |text: &str| text.parse::<Series>().expect("a series");
        assert!(read("6.6") < read("6.12"));
        assert_eq!(read("6.12").to_string(), "6.12");
        assert!("6".parse::<Series>().is_err());
        assert!("6.x".parse::<Series>().is_err());
    }
}
