//! The kubelet's configuration file, for the resolvers that it gives to pods.

use std::{
    fs::File,
    io::{self, Read as _},
    net::IpAddr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{super::Problem, facts::machine_address};

/// Longest file that is read, in bytes.
const FILE_MAX: u64 = 1 << 20;

/// The resolvers in the file, read again when the file changes.
#[derive(Debug)]
pub(super) struct Kubelet {
    path: PathBuf,
    version: Option<FileVersion>,
    resolvers: Vec<IpAddr>,
    problem: Option<Problem>,
}

/// The attributes that distinguish a changed file: inode, length, times of change.
type FileVersion = (u64, u64, i64, i64, i64, i64);

#[derive(Deserialize)]
struct Configuration {
    #[serde(rename = "clusterDNS", default)]
    cluster_dns: Option<Vec<String>>,
}

impl Kubelet {
    pub(super) fn new(path: &Path) -> Self {
        let mut kubelet = Self {
            path: path.to_owned(),
            version: None,
            resolvers: Vec::new(),
            problem: None,
        };
        kubelet.read();
        kubelet
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The file's `clusterDNS`.
    pub(super) fn resolvers(&self) -> &[IpAddr] {
        &self.resolvers
    }

    pub(super) fn problem(&self) -> Option<&Problem> {
        self.problem.as_ref()
    }

    /// Reads the file if it has changed; returns true if the result has changed. A missing file names no
    /// resolvers. If the file cannot be read, the last resolvers stay.
    pub(super) fn read(&mut self) -> bool {
        let before = (self.resolvers.clone(), self.problem.clone());
        match self.try_read() {
            Ok(None) => {}
            Ok(Some(resolvers)) => {
                self.resolvers = resolvers;
                self.problem = None;
            }
            Err(message) => {
                self.problem = Some(Problem {
                    origin: self.path.display().to_string(),
                    message: format!(
                        "cannot read clusterDNS in the kubelet's configuration: {message}"
                    ),
                });
            }
        }
        before != (self.resolvers.clone(), self.problem.clone())
    }

    /// The resolvers; `None` if the file looks unchanged.
    fn try_read(&mut self) -> Result<Option<Vec<IpAddr>>, String> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.version = None;
                return Ok(Some(Vec::new()));
            }
            Err(error) => return Err(error.to_string()),
        };
        let metadata = file.metadata().map_err(|error| error.to_string())?;
        let version = (
            metadata.ino(),
            metadata.len(),
            metadata.mtime(),
            metadata.mtime_nsec(),
            metadata.ctime(),
            metadata.ctime_nsec(),
        );
        if self.version == Some(version) {
            return Ok(None);
        }
        let mut text = String::new();
        file.take(FILE_MAX)
            .read_to_string(&mut text)
            .map_err(|error| error.to_string())?;
        let read: Option<Configuration> =
            serde_saphyr::from_str(&text).map_err(|error| error.to_string())?;
        self.version = Some(version);
        let texts = read.and_then(|read| read.cluster_dns).unwrap_or_default();
        let mut resolvers = Vec::new();
        for text in texts {
            match text.parse().ok().filter(machine_address) {
                Some(address) => resolvers.push(address),
                None => return Err(format!("{text:?} is not the address of a machine")),
            }
        }
        Ok(Some(resolvers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_read_again_when_it_changes_or_disappears() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.yaml");
        let mut kubelet = Kubelet::new(&path);
        assert!(kubelet.resolvers().is_empty());
        assert_eq!(kubelet.problem(), None);

        let write = |text: &str| std::fs::write(&path, text).unwrap();
        write(
            "kind: KubeletConfiguration\nclusterDNS:\n- 169.254.20.10\n- fd00::a\ncgroupDriver: systemd\n",
        );
        assert!(kubelet.read());
        assert_eq!(
            kubelet.resolvers(),
            ["169.254.20.10", "fd00::a"].map(|text| text.parse::<IpAddr>().unwrap())
        );
        assert!(!kubelet.read());

        write("clusterDNS: [0.0.0.0, 1.2.3.4]\n");
        assert!(kubelet.read());
        assert_eq!(kubelet.resolvers().len(), 2, "the last resolvers stay");
        assert!(kubelet.problem().unwrap().message.contains("0.0.0.0"));

        write("kind: KubeletConfiguration\n");
        assert!(kubelet.read());
        assert!(kubelet.resolvers().is_empty());
        assert_eq!(kubelet.problem(), None);

        std::fs::remove_file(&path).unwrap();
        assert!(!kubelet.read());
    }
}
