//! The cluster's pods, namespaces and facts as they were last applied, in a file on the node.
//!
//! The kernel has a pod's addresses and prefixes, but not the names that its policy allows. An agent that starts
//! while the API server does not answer reads them here, so that pods that an earlier agent left enforced
//! resolve names at once. Pods that are not enforced in the kernel are not taken from the file.
//!
//! The file may be older than what is in force: writing or removing it may have failed, or an agent with another
//! `stateDir` may have run meanwhile. So only what the kernel confirms is taken from it. A pod's policy in the kernel
//! has the digest of the annotations and objects that it was compiled from, and the map `ranges` has the cluster's
//! addresses.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use egress_api::only_takes_away;
use egress_common::{
    address::Address,
    ids::PodId,
    records::{RANGE_INTERNAL, Range},
};
use egress_policy::Objects;
use serde::{Deserialize, Serialize};

use super::{
    objects::SavedObjects,
    withheld::{LeftPod, Withheld},
};
use crate::control::{plan::wanted::mapped, state_dir::file as state_file};
use crate::{
    config::Config,
    datapath::{Adoptable, Datapath, View},
    pods::{Facts, Pod, PolicyKind, PolicyKinds, Snapshot, SourcedFacts},
};
use egress_policy::{
    Prefix,
    services::{Service, Services},
};

/// The file in `stateDir`.
const FILE: &str = "cluster.json";
/// Raised whenever an older agent would misread the file.
const VERSION: u32 = 2;

/// What the file says.
#[derive(Debug, Serialize, Deserialize)]
struct Document<P> {
    version: u32,
    /// The node's name.
    node: String,
    pods: P,
    /// The policy objects of the pods. An agent that does not know this field trusts no pod that has objects, because
    /// the digest in the kernel covers them.
    #[serde(default)]
    objects: SavedObjects,
    /// The kinds of policy objects that were listed. Earlier agents did not write it.
    #[serde(default)]
    kinds: Option<BTreeSet<PolicyKind>>,
    facts: SourcedFacts,
    /// The Services that pods' policies name. Earlier agents did not write them.
    #[serde(default)]
    services: SavedServices,
}

/// Services of a cluster.
#[derive(Debug, Default, Serialize, Deserialize)]
struct SavedServices {
    all: Vec<Arc<Service>>,
    nodes: Vec<Prefix>,
}

impl SavedServices {
    fn of(services: &Services) -> Self {
        Self {
            all: services.all().cloned().collect(),
            nodes: services.nodes().to_vec(),
        }
    }

    fn read(self) -> Services {
        Services::new(self.all, self.nodes)
    }
}

/// What is taken from the file.
#[derive(Default)]
struct Believed {
    /// The pods that are enforced as the file says.
    pods: Vec<Pod>,
    /// The pods that are not enforced.
    others: Vec<Pod>,
    facts: SourcedFacts,
    kinds: BTreeSet<PolicyKind>,
    services: Services,
}

/// The file, and what is taken from it until the source has said which pods there are.
pub(in crate::control) struct Saved {
    path: PathBuf,
    node: String,
    /// The file's pods, until the source knows pods.
    pods: Option<Vec<Pod>>,
    /// Those of the file's facts that the source may still name.
    facts: SourcedFacts,
    /// The Services that policies name; until the source knows pods, the file's.
    services: Arc<Services>,
    /// The file's objects of kinds that the source may still list.
    withheld: Withheld,
    written: Option<Arc<Snapshot>>,
    /// Why the last attempt to write failed.
    problem: Option<String>,
}

impl Saved {
    /// Reads the file. `left` is what an earlier agent left enforced. To be called before anything is changed in
    /// `datapath`.
    pub(in crate::control) fn open(
        config: &Config,
        left: &BTreeMap<PodId, Adoptable>,
        datapath: &Datapath,
    ) -> Self {
        let path = config.state_dir.join(FILE);
        let (read, left) = match read_believed(&path, &config.node, left, datapath) {
            Ok(read) => read,
            Err(error) => {
                warn_unreadable(&error);
                (None, Vec::new())
            }
        };
        let is_read = read.is_some();
        let Believed {
            pods,
            others,
            facts,
            kinds,
            services,
        } = read.unwrap_or_default();
        let known = pods.iter().chain(&others);
        let withheld = Withheld::new(is_read.then_some(kinds), left, known);
        Self {
            path,
            node: config.node.clone(),
            pods: is_read.then_some(pods),
            facts,
            services: Arc::new(services),
            withheld,
            written: None,
            problem: None,
        }
    }

    /// The snapshot to reconcile with: the source's, or the file's content as long as the source knows no pods. The
    /// file's facts stay until what they come from is known: a watch that is not complete yet has removed nothing.
    ///
    /// A snapshot is saved before it is used, so an agent that starts later never uses an older one.
    pub(in crate::control) fn current(&mut self, snapshot: Arc<Snapshot>) -> Arc<Snapshot> {
        if !snapshot.unreadable {
            self.pods = None;
            let snapshot = self.with_unknown_facts(snapshot);
            let snapshot = self.withheld.complete(snapshot);
            self.keep(&snapshot);
            return snapshot;
        }
        let Some(pods) = &self.pods else {
            return snapshot;
        };
        let of_unknown = Arc::new(of_unknown(pods));
        let pods = pods.iter().cloned();
        Arc::new(Snapshot {
            of_unknown,
            pods: pods.map(|pod| (pod.key(), pod)).collect(),
            problems: snapshot.problems.clone(),
            unreadable: true,
            facts: self.facts.merged(),
            sources: self.facts.clone(),
            services: Arc::clone(&self.services),
            ..Snapshot::default()
        })
    }

    /// The Services that policies name; until the source knows pods, the file's.
    pub(in crate::control) fn services(&self) -> &Arc<Services> {
        &self.services
    }

    /// Records the Services that policies name. They are saved with the next snapshot.
    pub(in crate::control) fn note_services(&mut self, in_force: Services) {
        if self.pods.is_none() && *self.services != in_force {
            self.services = Arc::new(in_force);
            self.written = None;
        }
    }

    fn with_unknown_facts(&mut self, snapshot: Arc<Snapshot>) -> Arc<Snapshot> {
        self.facts.retain_unknown(&snapshot.knowledge);
        if self.facts == SourcedFacts::default() {
            return snapshot;
        }
        let mut snapshot = Snapshot::clone(&snapshot);
        snapshot.sources.add_missing(&self.facts);
        snapshot.facts = snapshot.sources.merged();
        Arc::new(snapshot)
    }

    fn keep(&mut self, snapshot: &Arc<Snapshot>) {
        let is_written = self.written.as_ref().is_some_and(|written| {
            Arc::ptr_eq(written, snapshot)
                || (written.pods == snapshot.pods
                    && written.sources == snapshot.sources
                    && written.kinds == snapshot.kinds)
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
                // A later agent must not use the older state.
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
                "cannot save the state of the cluster in stateDir: if an agent starts while the API server does \
                 not answer, its pods cannot resolve names"
            );
        }
        self.problem = problem;
    }

    fn write(&self, snapshot: &Snapshot) -> Result<()> {
        let PolicyKinds {
            listed, withheld, ..
        } = &snapshot.kinds;
        let document = Document {
            version: VERSION,
            node: self.node.clone(),
            pods: snapshot.pods.values().collect::<Vec<_>>(),
            objects: SavedObjects::of(snapshot.pods.values()),
            kinds: Some(listed | withheld),
            facts: snapshot.sources.clone(),
            services: SavedServices::of(&self.services),
        };
        state_file::write(&self.path, &document)
    }
}

/// The objects for pods that are not in the file. The file does not say which objects select every pod.
fn of_unknown(pods: &[Pod]) -> Objects {
    let policies = pods.iter().flat_map(|pod| &pod.objects.tiers);
    let tiers: BTreeMap<_, _> = policies.map(|policy| (&policy.name, policy)).collect();
    let tiers = tiers.into_values();
    let sets = pods.iter().map(|pod| &pod.objects.sets);
    Objects {
        namespace: Vec::new(),
        tiers: tiers
            .filter_map(|policy| only_takes_away(policy).map(Arc::new))
            .collect(),
        sets: sets
            .max_by_key(|sets| sets.len())
            .cloned()
            .unwrap_or_default(),
    }
}

/// The kinds of policy objects that an earlier agent had listed, according to its file, and that the source does not
/// list.
pub(in crate::control) fn unlisted(config: &Config, snapshot: &Snapshot) -> BTreeSet<PolicyKind> {
    let unlisted = &snapshot.kinds.unlisted;
    if unlisted.is_empty() {
        return BTreeSet::new();
    }
    // An agent that takes over reports a file that cannot be read.
    let read = read(&config.state_dir.join(FILE), &config.node);
    let earlier = read.ok().flatten().unwrap_or_default().kinds;
    earlier.intersection(unlisted).copied().collect()
}

/// The file's content about pods that an earlier agent left enforced, as far as the kernel confirms it, and these pods.
fn read_believed(
    path: &Path,
    node: &str,
    left: &BTreeMap<PodId, Adoptable>,
    datapath: &Datapath,
) -> Result<(Option<Believed>, Vec<LeftPod>)> {
    let view = datapath.view()?;
    let left = LeftPod::read(left.iter(), &view)?;
    let read = match read(path, node) {
        Ok(read) => read,
        Err(error) => {
            warn_unreadable(&error);
            None
        }
    };
    let Some(mut read) = read else {
        return Ok((None, left));
    };
    let mut outdated = Vec::new();
    for pod in std::mem::take(&mut read.pods) {
        match left.iter().find(|left| left.is(&pod)) {
            Some(left) if left.is_under(&pod) => read.pods.push(pod),
            Some(_) => outdated.push(format!("{}/{}", pod.namespace, pod.name)),
            None if pod.is_known() => read.others.push(pod),
            None => {}
        }
    }
    if !outdated.is_empty() {
        tracing::warn!(
            file = %path.display(),
            pods = %outdated.join(", "),
            "the saved annotations of pods are not those that they are enforced with: these pods stay enforced as \
             an earlier agent left them, and resolve names when the API server answers"
        );
    }
    for facts in read.facts.each() {
        retain_known(facts, &view)?;
    }
    Ok((Some(read), left))
}

fn warn_unreadable(error: &anyhow::Error) {
    tracing::warn!(
        error = %format!("{error:#}"),
        "cannot read the saved state of the cluster; pods resolve names again when the API server answers"
    );
}

/// Keeps the facts that the kernel's map `ranges` confirms. The others are outdated, or were not in force yet.
fn retain_known(facts: &mut Facts, view: &View) -> Result<()> {
    let mut failure = Ok(());
    let mut has = |network: &Address, prefix_len, is: &dyn Fn(&Range) -> bool| {
        let range = view.range_of(network, prefix_len);
        match range {
            Ok(range) => is(&range),
            Err(error) => {
                failure = Err(error);
                false
            }
        }
    };
    facts.resolvers.retain(|resolver, _| {
        has(&mapped(resolver.address), 128, &|range| {
            range.is_resolver_at(resolver.port)
        })
    });
    facts.internal.retain(|prefix, _| {
        has(&prefix.network(), prefix.prefix_len(), &|range| {
            range.kinds & RANGE_INTERNAL != 0
        })
    });
    let internal = &facts.internal;
    facts.pods.retain(|prefix| internal.contains_key(prefix));
    facts
        .services
        .retain(|prefix| internal.contains_key(prefix));
    failure
}

/// The file's content; `None` without a file, or when it is another node's or another version's.
fn read(path: &Path, node: &str) -> Result<Option<Believed>> {
    let document: Option<Document<Vec<Pod>>> = state_file::read(path)?;
    let ours = document.filter(|document| document.version == VERSION && document.node == node);
    let Some(Document {
        mut pods,
        objects,
        kinds,
        facts,
        services,
        ..
    }) = ours
    else {
        return Ok(None);
    };
    for (index, pod) in pods.iter_mut().enumerate() {
        let of_pod = objects.of_pod(index);
        pod.objects = of_pod
            .with_context(|| format!("{}: a pod has an object that is missing", path.display()))?;
    }
    Ok(Some(Believed {
        pods,
        others: Vec::new(),
        facts,
        kinds: kinds.unwrap_or_else(|| objects.kinds()),
        services: services.read(),
    }))
}
