//! Leftovers of tests: a test run that leaves any has failed.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context as _, Result, bail};

use crate::process;

/// How long the kernel may take to free unreferenced objects.
const PATIENCE: Duration = Duration::from_secs(15);

/// Names of the agent's programs and maps, as the kernel truncates them.
const OBJECTS: [&str; 6] = [
    "name from_pod",
    "name to_pod",
    "name interfaces",
    "name policies",
    "name identities",
    "name meters",
];

/// Name of the agent's tables of nf_tables.
const TABLE: &str = " egress-agent";

/// The objects on the machine that the agent or the laboratory creates, at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Inventory(BTreeSet<String>);

impl Inventory {
    /// Lists them.
    ///
    /// # Errors
    ///
    /// When the kernel's programs and maps cannot be listed.
    pub(crate) fn take() -> Result<Self> {
        let mut found = BTreeSet::new();
        for kind in ["prog", "map"] {
            let bpftool = process::find("bpftool").context("bpftool is missing")?;
            let mut command = process::as_root(&bpftool.to_string_lossy())?;
            let listed = process::output(command.args([kind, "show"]))?;
            found.extend(
                listed
                    .lines()
                    .filter(|line| OBJECTS.iter().any(|name| line.contains(name)))
                    .map(|line| format!("{kind} {line}")),
            );
        }
        // A laboratory's tables disappear with its namespaces. Without nft no test has created any.
        if let Some(nft) = process::find("nft") {
            let mut command = process::as_root(&nft.to_string_lossy())?;
            let listed = process::output(command.args(["list", "tables"]))?;
            let ours = listed.lines().filter(|line| line.ends_with(TABLE));
            found.extend(ours.map(|line| format!("nftables {line}")));
        }
        let namespaces = process::output(Command::new("ip").args(["netns", "list"]))?;
        found.extend(
            namespaces
                .lines()
                .map(|line| format!("network namespace {line}")),
        );
        let mounts = fs::read_to_string("/proc/mounts").context("cannot read /proc/mounts")?;
        for mount in mounts.lines() {
            let mut words = mount.split(' ').skip(1);
            let (Some(point), Some(kind)) = (words.next(), words.next()) else {
                continue;
            };
            match kind {
                "bpf" => _ = found.insert(format!("mount {point}")),
                "cgroup" | "cgroup2" => {
                    let mut groups = Vec::new();
                    list_directories(Path::new(point), &mut groups)
                        .with_context(|| format!("cannot list the cgroups in {point}"))?;
                    // Hierarchies of version 1 have other users too; only pods' groups are ours.
                    let ours = |group: &String| kind == "cgroup2" || group.contains("kubepods");
                    let groups = groups.into_iter().filter(ours);
                    found.extend(groups.map(|group| format!("cgroup {group}")));
                }
                _ => {}
            }
        }
        Ok(Self(found))
    }

    /// Fails when there are more objects than before.
    ///
    /// # Errors
    ///
    /// Names the leftovers.
    pub(crate) fn compare(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            let now = Self::take()?;
            let left: Vec<&String> = now.0.difference(&self.0).collect();
            if left.is_empty() {
                println!(
                    "nothing is left behind: no program, map, pin, table, namespace or cgroup"
                );
                return Ok(());
            }
            if start.elapsed() > PATIENCE {
                let left: Vec<&str> = left.into_iter().map(String::as_str).collect();
                bail!("the tests left behind:\n  {}", left.join("\n  "));
            }
            sleep(Duration::from_millis(500));
        }
    }
}

fn list_directories(directory: &Path, found: &mut Vec<String>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path().to_string_lossy().into_owned());
            list_directories(&entry.path(), found)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace;

    #[test]
    fn directories_are_listed_recursively() {
        let mut found = Vec::new();
        list_directories(&workspace::root().join("xtask"), &mut found).unwrap();
        assert!(found.iter().any(|path| path.ends_with("/src")));
    }
}
