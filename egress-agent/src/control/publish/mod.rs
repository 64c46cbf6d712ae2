//! Step 4: publishes the result to people and to the other threads.
//!
//! | file | to whom, and what |
//! |---|---|
//! | `problems` | the log: new problems, and those that are gone |
//! | `events` | people in the cluster: the same, and denials, as Events on pods |
//! | `status` | `serve/`: the snapshot from which `status`, `explain` and the metrics are answered |
//! | `denials` | people: a line for each packet that was denied |
//! | `applied_policies`, `node_report` | people in the cluster: which policies are in force, in one object for the node |

mod applied_policies;
pub(in crate::control) mod denials;
pub(in crate::control) mod events;
mod node_report;
pub(in crate::control) mod problems;
pub(in crate::control) mod status;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use super::{
    apply::{Applier, Outcome},
    observe::{Observed, Observer},
    plan::Plan,
    settings::Settings,
    start::source::ClusterSide,
};
use crate::{
    datapath::Adoptable,
    report::{PodIdentity, Subject},
    serve::{PodRecord, Published},
};
use applied_policies::AppliedPolicies;
use egress_common::ids::PodId;
use egress_policy::Mode;
use problems::Problems;

/// Publishes the results of reconciles, and remembers what it published last.
pub(in crate::control) struct Publisher {
    /// The node's name.
    node: String,
    published: Arc<Published>,
    /// The pods that are in the kernel and not enforced, by their ids.
    left: HashMap<PodId, Arc<PodRecord>>,
    /// The problems of the last reconcile, so that each is logged once.
    problems: Problems,
    applied: AppliedPolicies,
    /// Where Events go, and the state of the watches; none without a cluster.
    cluster: Option<ClusterSide>,
}

impl Publisher {
    /// `left` are the pods that an earlier agent left in the kernel, by their ids.
    pub(in crate::control) fn new(
        node: &str,
        published: Arc<Published>,
        left: &BTreeMap<PodId, Adoptable>,
        cluster: Option<ClusterSide>,
    ) -> Self {
        let mut new = Self {
            node: node.to_owned(),
            left: HashMap::new(),
            published,
            problems: Problems::default(),
            applied: AppliedPolicies::default(),
            cluster,
        };
        new.note_left(left);
        new
    }

    /// Makes a record of each pod that is in the kernel and not enforced: the denials of such a pod name it.
    fn note_left(&mut self, left: &BTreeMap<PodId, Adoptable>) {
        self.left.retain(|id, _| left.contains_key(id));
        for (&id, left) in left {
            let (node, published) = (self.node.as_str(), &self.published);
            self.left
                .entry(id)
                .or_insert_with(|| Arc::new(record_of(left, node, published)));
        }
    }

    /// Everything that is wrong with pods and with their source.
    pub(in crate::control) fn problems(
        observed: &Observed<'_>,
        plan: &Plan,
        outcome: &Outcome,
        applier: &Applier,
        looks: &Observer,
    ) -> Problems {
        let mut problems = observed.problems.clone();
        for subject in observed.pods.keys() {
            let enforced = applier.enforced().get(subject);
            let failed = outcome.failed.get(subject);
            let failed = failed.and_then(|failure| failure.problem.clone());
            let planned = || plan.problems.get(subject).cloned();
            let unseen = observed.unseen_responses.filter(|_| enforced.is_some());
            let taps = enforced.map_or_else(Vec::new, |enforced| {
                looks.taps.of(&enforced.wanted.interfaces)
            });
            let all: Vec<String> = looks
                .policies
                .problem(subject)
                .into_iter()
                .chain(failed.or_else(planned))
                .chain(unseen.map(str::to_owned))
                .chain(applier.bypassed(subject))
                .chain(taps)
                .chain(applier.hardware_problem(subject))
                .chain(looks.exits.passed(subject))
                .collect();
            if !all.is_empty() {
                problems.set(subject.clone(), all.join("; "));
            }
        }
        problems
            .and(plan.other_problems.clone())
            .and(outcome.problems.clone())
    }

    /// Publishes the enforced pods and the problems.
    pub(in crate::control) fn publish(
        &mut self,
        observed: &Observed<'_>,
        problems: Problems,
        applier: &Applier,
        looks: &Observer,
        settings: &Settings,
    ) {
        if let Some(cluster) = &self.cluster {
            let events = events::problems(observed, &problems, &self.problems);
            events.for_each(|event| cluster.events.send(event));
        }
        problems.log_changes(&self.problems);
        self.problems = problems;
        self.note_applied(observed, applier, looks);
        self.note_left(applier.left());
        let left = self.left.iter();
        let left = left.map(|(id, record)| (*id, Arc::clone(record)));
        let node = self.node(observed, applier, looks, settings);
        self.report(observed, &node);
        self.published.publish(node, left);
    }

    /// Records how long a reconcile took.
    pub(in crate::control) fn reconciled(&self, took: Duration) {
        self.published.reconciled(took);
    }

    /// Whether pods come from a cluster.
    pub(in crate::control) fn has_cluster(&self) -> bool {
        self.cluster.is_some()
    }
}

/// The record of a pod that is in the kernel and not enforced.
fn record_of(left: &Adoptable, node: &str, published: &Published) -> PodRecord {
    let (namespace, name) = (left.namespace.as_str(), left.name.as_str());
    let identity = PodIdentity::new(node, namespace, name, left.uid.as_str())
        .counted_in(published.denials_of(namespace));
    PodRecord {
        uid: left.uid.clone(),
        mode: Mode::Enforce,
        host_network: false,
        quarantined: Subject::from_fields(namespace, name).is_interface(),
        identity: Some(Arc::new(identity)),
        attached: None,
        compiled: None,
        written: Arc::default(),
        unreadable: false,
        exits: Arc::default(),
        problem: None,
    }
}
