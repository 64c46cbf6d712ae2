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

/// What the file says, as long as it stays as it is.
#[derive(Debug)]
pub(super) struct Kubelet {
    path: PathBuf,
    stamp: Option<Stamp>,
    resolvers: Vec<IpAddr>,
    problem: Option<Problem>,
}

/// By what a changed file is told from an unchanged one: inode, length, times of change.
type Stamp = (u64, u64, i64, i64, i64, i64);

#[derive(Deserialize)]
struct Configuration {
    #[serde(rename = "clusterDNS", default)]
    cluster_dns: Option<Vec<String>>,
}

impl Kubelet {
    pub(super) fn new(path: &Path) -> Self {
        let mut kubelet = Self {
            path: path.to_owned(),
            stamp: None,
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

    /// Reads the file if it has changed; true when it has. A file that is not there says nothing;
    /// of one that cannot be read, what it said before stays.
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
                        "the kubelet's configuration cannot be read for its clusterDNS: {message}"
                    ),
                });
            }
        }
        before != (self.resolvers.clone(), self.problem.clone())
    }

    /// The resolvers, unless the file looks as it did.
    fn try_read(&mut self) -> Result<Option<Vec<IpAddr>>, String> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.stamp = None;
                return Ok(Some(Vec::new()));
            }
            Err(error) => return Err(error.to_string()),
        };
        let metadata = file.metadata().map_err(|error| error.to_string())?;
        let stamp = (
            metadata.ino(),
            metadata.len(),
            metadata.mtime(),
            metadata.mtime_nsec(),
            metadata.ctime(),
            metadata.ctime_nsec(),
        );
        if self.stamp == Some(stamp) {
            return Ok(None);
        }
        let mut text = String::new();
        file.take(FILE_MAX)
            .read_to_string(&mut text)
            .map_err(|error| error.to_string())?;
        let read: Option<Configuration> =
            serde_saphyr::from_str(&text).map_err(|error| error.to_string())?;
        self.stamp = Some(stamp);
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
    fn the_file_is_read_again_when_it_changes_and_missed_when_it_is_gone() {
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
        assert_eq!(kubelet.resolvers().len(), 2, "what it said before stays");
        assert!(kubelet.problem().unwrap().message.contains("0.0.0.0"));

        write("kind: KubeletConfiguration\n");
        assert!(kubelet.read());
        assert!(kubelet.resolvers().is_empty());
        assert_eq!(kubelet.problem(), None);

        std::fs::remove_file(&path).unwrap();
        assert!(!kubelet.read());
    }
}
