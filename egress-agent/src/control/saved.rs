//! The cluster's pods, namespaces and facts as they were last applied, in a file on the node.
//!
//! The kernel has a pod's addresses and prefixes, but not the names that its policy allows. An agent that starts
//! while the API server does not answer reads them here, so that pods that an earlier agent left enforced
//! resolve names at once. Pods that are not enforced in the kernel are not taken from the file.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::state_file;
use crate::{
    config::Config,
    datapath::Adoptable,
    pods::{Facts, Pod, Snapshot},
};

/// The file in `stateDir`.
const FILE: &str = "cluster.json";
/// Raised whenever an older agent would read the file in another sense.
const VERSION: u32 = 1;

/// What the file says.
#[derive(Debug, Serialize, Deserialize)]
struct Document<P> {
    version: u32,
    /// The node's name.
    node: String,
    pods: P,
    facts: Facts,
}

/// The file, and what is taken from it until the source has said which pods there are.
pub(super) struct Saved {
    path: PathBuf,
    node: String,
    read: Option<(Vec<Pod>, Facts)>,
    written: Option<Arc<Snapshot>>,
    /// What was wrong at the last attempt to write.
    problem: Option<String>,
}

impl Saved {
    /// Reads the file. `left` is what an earlier agent left enforced.
    pub(super) fn open(config: &Config, left: &BTreeMap<u32, Adoptable>) -> Self {
        let path = config.state_dir.join(FILE);
        let read = match read(&path, &config.node) {
            Ok(Some((mut pods, facts))) => {
                pods.retain(|pod| left.values().any(|left| is_of(left, pod)));
                (!pods.is_empty()).then_some((pods, facts))
            }
            Ok(None) => None,
            Err(error) => {
                tracing::warn!(
                    error = %format!("{error:#}"),
                    "what the API server said last cannot be read; pods resolve names when it answers"
                );
                None
            }
        };
        Self {
            path,
            node: config.node.clone(),
            read,
            written: None,
            problem: None,
        }
    }

    /// What is to be applied: the snapshot, or the file's content as long as the source knows no pods. A snapshot
    /// is in the file before it is applied, so an agent that starts later never applies an older one.
    pub(super) fn current(&mut self, snapshot: Arc<Snapshot>) -> Arc<Snapshot> {
        if !snapshot.unreadable {
            self.read = None;
            self.keep(&snapshot);
            return snapshot;
        }
        let Some((pods, facts)) = &self.read else {
            return snapshot;
        };
        let pods = pods.iter().cloned();
        Arc::new(Snapshot {
            pods: pods
                .map(|pod| ((pod.namespace.clone(), pod.name.clone()), pod))
                .collect(),
            problems: snapshot.problems.clone(),
            unreadable: true,
            facts: facts.clone(),
        })
    }

    fn keep(&mut self, snapshot: &Arc<Snapshot>) {
        let is_written = self.written.as_ref().is_some_and(|written| {
            Arc::ptr_eq(written, snapshot)
                || (written.pods == snapshot.pods && written.facts == snapshot.facts)
        });
        if is_written {
            return;
        }
        let problem = match self.write(snapshot) {
            Ok(()) => {
                self.written = Some(Arc::clone(snapshot));
                None
            }
            Err(error) => {
                self.written = None;
                // An older state must not come back.
                Some(match state_file::remove(&self.path) {
                    Ok(()) => format!("{error:#}"),
                    Err(also) => format!("{error:#}; {also:#}"),
                })
            }
        };
        if let Some(problem) = problem
            .as_ref()
            .filter(|now| self.problem.as_ref() != Some(now))
        {
            tracing::error!(
                error = %problem,
                "what the API server says cannot be saved in stateDir: an agent that starts while the server \
                 does not answer cannot resolve names for pods"
            );
        }
        self.problem = problem;
    }

    fn write(&self, snapshot: &Snapshot) -> Result<()> {
        let document = Document {
            version: VERSION,
            node: self.node.clone(),
            pods: snapshot.pods.values().collect::<Vec<_>>(),
            facts: snapshot.facts.clone(),
        };
        state_file::write(&self.path, &document)
    }
}

/// Whether the kernel has this very pod.
fn is_of(left: &Adoptable, pod: &Pod) -> bool {
    left.uid == pod.uid && left.namespace == pod.namespace && left.name == pod.name
}

/// The file's content; `None` without a file, or when it is another node's or another version's.
fn read(path: &Path, node: &str) -> Result<Option<(Vec<Pod>, Facts)>> {
    let document: Option<Document<Vec<Pod>>> = state_file::read(path)?;
    let ours = document.filter(|document| document.version == VERSION && document.node == node);
    Ok(ours.map(|document| (document.pods, document.facts)))
}
