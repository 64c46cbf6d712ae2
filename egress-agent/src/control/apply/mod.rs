//! Step 3: carries out the plan. It is the only step that changes the kernel or asks the gate.
//!
//! [`Applier::apply`] carries out a plan's actions in their order and returns an [`Outcome`]: which actions failed,
//! and why. A pod whose action failed keeps the state that it had, hinders no other pod, and is planned again in the
//! next reconcile.
//!
//! | file | what it does |
//! |---|---|
//! | `prepare` | makes maps for new policies |
//! | `enforce` | begins with pods, changes their policies, moves them to other interfaces |
//! | `seed`, `connections` | notes connections from before, and judges everything from then on |
//! | `remove`, `leftovers` | releases, detaches, and removes state |
//! | `hardware`, `node_addresses` | keeps the node's and the neighbours' addresses from pods |
//! | `hooks`, `watched_hooks`, `stamps` | makes sure that packets pass the programs |
//! | `upkeep` | does the work of the two rows above in each reconcile, whatever is planned |
//! | `ranges` | puts other ranges and resolvers in force |
//! | `unused` | removes maps that nobody uses any more |
//! | `sweep` | forgets idle flows and expired addresses |

mod connections;
mod enforce;
pub(in crate::control) mod enforced;
mod hardware;
mod hooks;
mod leftovers;
mod node_addresses;
mod outcome;
mod prepare;
pub(in crate::control) mod ranges;
mod remove;
mod seed;
mod stamps;
mod sweep;
mod translations;
mod unused;
mod upkeep;
mod watched_hooks;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::PathBuf,
    sync::Arc,
};

use anyhow::{Context as _, Result};
use egress_common::{
    ids::{IfIndex, PodId, PolicyId},
    records::{INTERFACE_SOURCES, MODE_RELEASED},
};

use super::{
    observe::{InForce, InKernel, machine::Machine},
    plan::{Action, Plan},
    settings::Settings,
};
use crate::{
    datapath::{Adoptable, Datapath, Removal, Unused},
    gate::Gate,
    report::{Reporter, Subject},
    serve::Published,
};
use connections::Connections;
use enforced::Enforced;
pub(in crate::control) use outcome::Outcome;
use sweep::Crowded;
use translations::Judged;
use upkeep::Upkeep;

/// Changes the kernel and asks the gate, and knows what is enforced.
pub(in crate::control) struct Applier {
    datapath: Datapath,
    gate: Gate,
    /// The node's name.
    node: String,
    enforced: BTreeMap<Subject, Enforced>,
    /// State in the kernel with which no pod is enforced, by the pod's id: left by an earlier agent, or by
    /// an attempt that failed.
    left: BTreeMap<PodId, Adoptable>,
    ids: Ids,
    /// Maps in the kernel that nobody uses any more. They are removed at the end of each reconcile.
    unused: Vec<Unused>,
    /// Those of them that a thread is removing now.
    removal: Option<Removal>,
    upkeep: Upkeep,
    connections: Connections,
    /// Pods that have begun with only the sources of their packets judged.
    settling: Vec<Subject>,
    /// The interfaces on which the plan enforces somebody.
    claimed: HashSet<IfIndex>,
    /// Those of them that their last pod has left. The programs are there without an entry, and drop everything.
    vacated: BTreeSet<IfIndex>,
    /// Whether the gate reads messages.
    is_reading: bool,
    next_swept: usize,
    /// The connections that the node translates.
    translations: Judged,
    /// Pods that wait for room in their maps.
    crowded: Crowded,
    published: Arc<Published>,
}

/// The next ids of pods and policies.
struct Ids {
    pod: PodId,
    policy: PolicyId,
}

impl Ids {
    fn next_pod(&mut self) -> PodId {
        let id = self.pod;
        self.pod = PodId::new(id.get() + 1);
        id
    }

    fn next_policy(&mut self) -> PolicyId {
        let id = self.policy;
        self.policy = PolicyId::new(id.get() + 1);
        id
    }
}

/// What an applier begins with.
pub(in crate::control) struct Parts {
    pub(in crate::control) datapath: Datapath,
    pub(in crate::control) gate: Gate,
    /// What an earlier agent left in the kernel, by the pods' ids.
    pub(in crate::control) left: BTreeMap<PodId, Adoptable>,
    pub(in crate::control) published: Arc<Published>,
    pub(in crate::control) reporter: Reporter,
}

impl Applier {
    /// # Errors
    ///
    /// When the kernel's maps cannot be opened or read.
    pub(in crate::control) fn new(parts: Parts, settings: &Settings) -> Result<Self> {
        let Parts {
            datapath,
            gate,
            left,
            published,
            reporter,
        } = parts;
        let last_policy = datapath.policy_ids()?.into_iter().max();
        Ok(Self {
            node: settings.configured.node.clone(),
            enforced: BTreeMap::new(),
            ids: Ids {
                pod: PodId::new(left.keys().max().map_or(1, |last| last.get() + 1)),
                policy: PolicyId::new(last_policy.map_or(1, |last| last.get() + 1)),
            },
            left,
            unused: Vec::new(),
            removal: None,
            upkeep: Upkeep::open(&datapath, reporter)?,
            connections: Connections::new(&settings.configured),
            settling: Vec::new(),
            claimed: HashSet::new(),
            vacated: BTreeSet::new(),
            is_reading: false,
            next_swept: 0,
            translations: Judged::never(),
            crowded: Crowded::new(datapath.counters()?),
            published,
            datapath,
            gate,
        })
    }

    /// The interfaces on which an earlier agent left a whole policy in force. Where it judged only sources when it
    /// ended, the rest is unjudged; where it had released the pod, everything is.
    pub(in crate::control) fn left_judged(&self) -> HashSet<IfIndex> {
        let left = self.left.values().flat_map(|left| &left.interfaces);
        let judged = left.filter(|(_, entry)| {
            entry.flags & INTERFACE_SOURCES == 0 && entry.mode != MODE_RELEASED
        });
        judged.map(|&(ifindex, _)| ifindex).collect()
    }

    /// What is enforced, for the observation.
    pub(in crate::control) fn in_kernel(&self) -> InKernel {
        let enforced = self.enforced.iter().map(|(subject, enforced)| {
            let in_force = InForce {
                pod: enforced.pod,
                wanted: Arc::clone(&enforced.wanted),
            };
            (subject.clone(), in_force)
        });
        InKernel {
            enforced: enforced.collect(),
            left: self.left.clone(),
        }
    }

    /// Carries out the plan's actions.
    pub(in crate::control) async fn apply(
        &mut self,
        plan: &Plan,
        machine: &mut Machine,
    ) -> Outcome {
        let mut outcome = Outcome::default();
        let mut versions = BTreeMap::new();
        self.claimed.clone_from(&plan.claimed);
        for action in &plan.actions {
            // The gate starts reading once it has all pods that an earlier agent left enforced.
            let adopts = matches!(action, Action::Begin { adopts: true, .. });
            let changes_nothing = matches!(
                action,
                Action::Release(_) | Action::Retire(_) | Action::Prepare
            );
            if !(adopts || changes_nothing) {
                self.start_reading();
            }
            match action {
                Action::Release(subjects) => self.release(subjects).await,
                Action::Retire(subject) => self.retire(subject),
                Action::Prepare => versions = self.prepare(&plan.actions),
                Action::Change { subject, wanted } => {
                    let done = self.change(subject, wanted, versions.remove(subject)).await;
                    outcome.note(subject, wanted, done);
                }
                Action::Move {
                    subject,
                    wanted,
                    has_unjudged,
                } => {
                    if !outcome.has_failed(subject, &wanted.uid) {
                        let moved =
                            self.move_to(subject, wanted, *has_unjudged, machine, &mut outcome);
                        let done = Box::pin(moved).await;
                        outcome.note(subject, wanted, done);
                    }
                }
                Action::Begin {
                    subject,
                    wanted,
                    before,
                    ..
                } => {
                    let version = versions.remove(subject);
                    let done = self
                        .begin(subject, wanted, version, *before, machine, &mut outcome)
                        .await;
                    outcome.note(subject, wanted, done);
                }
                Action::Settle => self.settle(machine, &mut outcome).await,
                Action::Remove {
                    subject,
                    taken_over,
                } => {
                    let enforced = self.enforced.get(subject);
                    if enforced.is_some_and(|pod| self.are_taken_over(pod.pod, taken_over)) {
                        self.remove(subject).await;
                    }
                }
                Action::RemoveLeft { pod, taken_over } => {
                    if self.are_taken_over(*pod, taken_over) {
                        self.remove_left(*pod, &mut outcome).await;
                    }
                }
            }
        }
        self.detach_vacated();
        self.start_reading();
        outcome
    }

    /// Tells the gate to read messages from now on.
    fn start_reading(&mut self) {
        if !self.is_reading {
            self.gate.read();
            self.is_reading = true;
        }
    }

    /// How pods are enforced.
    pub(in crate::control) fn enforced(&self) -> &BTreeMap<Subject, Enforced> {
        &self.enforced
    }

    /// State in the kernel with which no pod is enforced.
    pub(in crate::control) fn left(&self) -> &BTreeMap<PodId, Adoptable> {
        &self.left
    }

    /// The kernel side, for reading.
    pub(in crate::control) fn datapath(&self) -> &Datapath {
        &self.datapath
    }

    /// The gate's handle.
    pub(in crate::control) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// What happened to connections from before.
    pub(in crate::control) fn connections(&self) -> &Connections {
        &self.connections
    }

    /// The pods that were there at the start have been dealt with.
    pub(in crate::control) fn end_start(&mut self) {
        self.connections.trusting = false;
    }

    /// Marks these interfaces (all without a list) for a check of their hooks, because their filters have changed.
    /// Returns whether pods are enforced on any of them.
    pub(in crate::control) fn note_changed_filters(&mut self, changed: Option<&[IfIndex]>) -> bool {
        self.upkeep.hooks.hurry(changed)
    }

    /// Marks the tables of nf_tables to be checked next, because some have changed.
    pub(in crate::control) fn note_changed_tables(&mut self) {
        self.upkeep.stamps.hurry();
    }

    /// Detaches from every interface. Everything else goes with the pins.
    pub(in crate::control) fn detach_all(&mut self) {
        if let Err(error) = self.datapath.detach_all() {
            tracing::error!(error = %format!("{error:#}"), "cannot detach from every interface");
        }
    }

    /// Closes the programs; what is pinned stays. Returns the mount point of bpffs.
    pub(in crate::control) fn close(self) -> PathBuf {
        self.datapath.bpffs().to_owned()
    }

    /// A handle on a pod's flows.
    fn flows_of(&self, pod: PodId) -> Result<crate::datapath::FlowMap> {
        self.datapath
            .flow_map(pod)?
            .with_context(|| format!("pod {pod} has no flow map"))
    }
}
