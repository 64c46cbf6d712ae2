//! Step 3: does what was planned. It is the only step that changes the kernel or asks the gate.
//!
//! [`Applier::apply`] carries out a plan's actions in their order and returns an [`Outcome`]: which pods are as they
//! should be now, and which are not and why. A pod whose action failed keeps the state that it had, hinders no other
//! pod, and is planned again in the next reconcile.
//!
//! | file | what it does |
//! |---|---|
//! | `prepare` | makes maps for new policies |
//! | `enforce` | begins with pods, changes their policies, moves them to other interfaces |
//! | `seed`, `connections` | notes connections from before, and judges everything from then on |
//! | `remove`, `leftovers` | releases, detaches, and removes state |
//! | `hardware`, `node_addresses` | keeps the node's and the neighbours' addresses from pods |
//! | `hooks`, `stamps` | makes sure that packets pass the programs |
//! | `ranges` | puts other ranges and resolvers in force |
//! | `sweep` | forgets idle flows and expired addresses |

mod connections;
mod enforce;
pub(in crate::control) mod enforced;
mod hardware;
mod hooks;
mod leftovers;
mod node_addresses;
mod prepare;
pub(in crate::control) mod ranges;
mod remove;
mod seed;
mod stamps;
mod sweep;

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
    sync::Arc,
};

use anyhow::{Context as _, Result};
use egress_common::records::INTERFACE_SOURCES;

use super::{
    observe::{InForce, InKernel, Observed, machine::Machine},
    plan::{Action, Plan, wanted::Wanted},
    publish::problems::{About, Problems},
    settings::Settings,
};
use crate::{
    datapath::{Adoptable, Datapath, NodeAddressMap, Unused},
    gate::Gate,
    host::interface_name,
    pods::Facts,
    report::{Reporter, Subject},
    serve::Published,
};
use connections::Connections;
use enforced::Enforced;
use hardware::Hardware;
use hooks::Hooks;
use stamps::Stamps;

/// Changes the kernel and asks the gate, and knows what is enforced.
pub(in crate::control) struct Applier {
    datapath: Datapath,
    gate: Gate,
    /// The node's name.
    node: String,
    enforced: BTreeMap<Subject, Enforced>,
    /// What is in the kernel though no pod is enforced with it, by the pod's id: left by an earlier agent, or by
    /// an attempt that failed.
    left: BTreeMap<u32, Adoptable>,
    ids: Ids,
    /// Maps in the kernel that nobody uses any more. They are removed at the end of each reconcile.
    unused: Vec<Unused>,
    upkeep: Upkeep,
    connections: Connections,
    /// Pods that have begun with only the sources judged of what they send.
    settling: Vec<Subject>,
    /// Whether the gate reads messages.
    is_reading: bool,
    next_swept: usize,
    published: Arc<Published>,
}

/// The next ids of pods and policies.
struct Ids {
    pod: u32,
    policy: u32,
}

impl Ids {
    fn next_pod(&mut self) -> u32 {
        self.pod += 1;
        self.pod - 1
    }

    fn next_policy(&mut self) -> u32 {
        self.policy += 1;
        self.policy - 1
    }
}

/// What is kept as it should be in each reconcile, whatever is planned.
struct Upkeep {
    hardware: Hardware,
    node_addresses: NodeAddressMap,
    hooks: Hooks,
    stamps: Stamps,
}

/// What came of a plan.
#[derive(Default)]
pub(in crate::control) struct Outcome {
    /// The pods whose actions all succeeded.
    pub(in crate::control) succeeded: HashSet<Subject>,
    /// The pods that are not as they should be. They are planned again.
    pub(in crate::control) failed: BTreeMap<Subject, Failure>,
    /// What is wrong with something else, and with pods that are not in the source.
    pub(in crate::control) problems: Problems,
    /// The interfaces on which everything is judged from now on.
    pub(in crate::control) judged: Vec<u32>,
    /// The interfaces of pods that began to be enforced and were detached from again.
    pub(in crate::control) unjudged: Vec<u32>,
}

/// A pod whose action failed.
pub(in crate::control) struct Failure {
    uid: String,
    /// Why; `None` if its interface has gone meanwhile: so a pod may end. If it does not, the next reconcile says
    /// what is missing.
    pub(in crate::control) problem: Option<String>,
}

impl Outcome {
    fn note(&mut self, subject: &Subject, wanted: &Wanted, done: Result<()>) {
        let Err(error) = done else {
            self.succeeded.insert(subject.clone());
            return;
        };
        let mut interfaces = wanted.interfaces.iter();
        let are_there = interfaces.all(|&ifindex| interface_name(ifindex).is_some());
        self.fail(
            subject,
            &wanted.uid,
            are_there.then(|| format!("{error:#}")),
        );
    }

    fn fail(&mut self, subject: &Subject, uid: &str, problem: Option<String>) {
        self.succeeded.remove(subject);
        let uid = uid.to_owned();
        self.failed
            .insert(subject.clone(), Failure { uid, problem });
    }

    fn has_failed(&self, subject: &Subject, uid: &str) -> bool {
        let failure = self.failed.get(subject);
        failure.is_some_and(|failure| failure.uid == uid)
    }
}

/// What an applier begins with.
pub(in crate::control) struct Parts {
    pub(in crate::control) datapath: Datapath,
    pub(in crate::control) gate: Gate,
    /// What an earlier agent left in the kernel, by the pods' ids.
    pub(in crate::control) left: BTreeMap<u32, Adoptable>,
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
                pod: left.keys().max().map_or(1, |last| last + 1),
                policy: last_policy.map_or(1, |last| last + 1),
            },
            left,
            unused: Vec::new(),
            upkeep: Upkeep {
                hardware: Hardware::open(&datapath)?,
                node_addresses: datapath.node_addresses()?,
                hooks: Hooks::new(datapath.probes()?),
                stamps: Stamps::new(reporter),
            },
            connections: Connections::new(&settings.configured),
            settling: Vec::new(),
            is_reading: false,
            next_swept: 0,
            published,
            datapath,
            gate,
        })
    }

    /// The interfaces on which an earlier agent left a whole policy in force. Where it judged only sources when it
    /// ended, the rest is unjudged.
    pub(in crate::control) fn left_judged(&self) -> HashSet<u32> {
        let left = self.left.values().flat_map(|left| &left.interfaces);
        let judged = left.filter(|(_, entry)| entry.flags & INTERFACE_SOURCES == 0);
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
        for action in &plan.actions {
            // Once the gate has all pods that an earlier agent left enforced.
            let adopts = matches!(action, Action::Begin { adopts: true, .. });
            if !(adopts || matches!(action, Action::Release(_) | Action::Prepare)) {
                self.start_reading();
            }
            match action {
                Action::Release(subjects) => self.release(subjects).await,
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
                        let done = self
                            .move_to(subject, wanted, *has_unjudged, machine, &mut outcome)
                            .await;
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
                    if self.are_taken_over(subject, taken_over) {
                        self.remove(subject).await;
                    }
                }
                Action::RemoveLeft(pod) => self.remove_left(*pod, &mut outcome).await,
            }
        }
        self.start_reading();
        outcome
    }

    /// Has the gate read messages.
    fn start_reading(&mut self) {
        if !self.is_reading {
            self.gate.read();
            self.is_reading = true;
        }
    }

    /// Does what comes before a plan's actions: keeps from pods what is the node's and their neighbours'.
    pub(in crate::control) fn protect_neighbours(
        &mut self,
        machine: &mut Machine,
        observed: &Observed<'_>,
    ) -> Problems {
        let mut problems = Problems::default();
        let mut note = |about: &str, done: Result<()>, what: &str| {
            if let Err(error) = done {
                problems.set(About::node(about), format!("{what}: {error:#}"));
            }
        };
        note(
            "link-local addresses",
            node_addresses::protect_link_locals(&self.datapath),
            "pods could take link-local addresses that are not theirs",
        );
        note(
            "the node's addresses",
            node_addresses::protect(&mut self.upkeep.node_addresses, machine),
            "tunnels to some of the node's own addresses may leave pods",
        );
        let running = hardware::running(observed);
        note(
            "hardware addresses",
            self.upkeep.hardware.bind(machine, &running),
            "pods on bridges could send from hardware addresses of others",
        );
        problems
    }

    /// Does what comes after a plan's actions: keeps the programs in front on their hooks, and removes what nobody
    /// uses any more.
    pub(in crate::control) async fn clean_up(
        &mut self,
        plan: &Plan,
        settings: &Settings,
        in_cluster: bool,
    ) -> Problems {
        let mut problems = Problems::default();
        // Without the cluster's addresses, flows to them would be denied.
        let is_known = !in_cluster || settings.facts != Facts::default();
        if is_known && let Err(error) = self.judge_left_again(&plan.kept, settings.ranges) {
            let about = About::node("connections of an earlier agent's pods");
            let what = format!("cannot judge all of them by the changed `ranges` yet: {error:#}");
            problems.set(about, what);
        }
        self.check_hooks().await;
        self.check_stamps();
        if let Some(unsupported) = self.upkeep.stamps.unsupported() {
            problems.set(About::node("stamp check"), unsupported);
        }
        if let Err(error) = self.drop_unused() {
            let about = About::node("maps that nobody uses any more");
            problems.set(about, format!("cannot remove all of them yet: {error:#}"));
        }
        problems
    }

    /// Why what an enforced pod sends or receives may not be judged.
    pub(in crate::control) fn bypassed(&self, subject: &Subject) -> Option<String> {
        let interfaces = &self.enforced.get(subject)?.wanted.interfaces;
        let problem = self.upkeep.hooks.problem(interfaces).map(str::to_owned);
        problem.or_else(|| self.upkeep.stamps.problem())
    }

    /// Why an enforced pod may not send from its hardware address.
    pub(in crate::control) fn hardware_problem(&self, subject: &Subject) -> Option<String> {
        let enforced = self.enforced.get(subject)?;
        self.upkeep.hardware.problem(&enforced.wanted.interfaces)
    }

    /// How pods are enforced.
    pub(in crate::control) fn enforced(&self) -> &BTreeMap<Subject, Enforced> {
        &self.enforced
    }

    /// What is in the kernel though no pod is enforced with it.
    pub(in crate::control) fn left(&self) -> &BTreeMap<u32, Adoptable> {
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

    /// What became of connections from before.
    pub(in crate::control) fn connections(&self) -> &Connections {
        &self.connections
    }

    /// The pods that were there at the start have been dealt with.
    pub(in crate::control) fn end_start(&mut self) {
        self.connections.trusting = false;
    }

    /// Filters of these interfaces have changed (of all without a list): their hooks are looked at next. Returns
    /// whether pods are enforced on any of them.
    pub(in crate::control) fn note_changed_filters(&mut self, changed: Option<&[u32]>) -> bool {
        self.upkeep.hooks.hurry(changed)
    }

    /// Tables of nf_tables have changed: they are looked at next.
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
    fn flows_of(&self, pod: u32) -> Result<crate::datapath::FlowMap> {
        self.datapath
            .flow_map(pod)?
            .with_context(|| format!("pod {pod} has no flow map"))
    }
}
