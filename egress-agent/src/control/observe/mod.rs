//! Step 1: reads the state of the source, the machine and the kernel.
//!
//! [`Observer::observe`] combines the source's pods, their places on this machine, the policies from their
//! annotations and objects, and the state of the kernel. The result, [`Observed`], is plain data: a plan made from it
//! ([`super::plan`]) needs no kernel, no gate and no clock.
//!
//! | file | what it reads |
//! |---|---|
//! | `locations`, `named`, `on_host` | behind which interfaces pods are: by their manifests, or by their control groups |
//! | `quarantine`, `new_interfaces` | interfaces whose pods are not known, and those that are left alone at first |
//! | `first_addresses`, `owners` | the addresses that interfaces were made with, and whose addresses are known |
//! | `exits` | interfaces of pods that nobody can enforce |
//! | `policies`, `fallback` | what annotations mean, and what counts when they cannot be read |
//! | `unjudged` | interfaces that nobody has judged until now |
//! | `unseen_responses`, `taps` | signs that packets bypass the agent's programs |
//! | `unlocated`, `backoff` | how long pods have been looked for, and when to look again |

pub(in crate::control) mod backoff;
pub(in crate::control) mod exits;
mod fallback;
pub(in crate::control) mod first_addresses;
pub(in crate::control) mod locations;
pub(in crate::control) mod machine;
pub(in crate::control) mod named;
pub(in crate::control) mod new_interfaces;
pub(in crate::control) mod on_host;
pub(in crate::control) mod owners;
pub(in crate::control) mod policies;
pub(in crate::control) mod quarantine;
pub(in crate::control) mod taps;
pub(in crate::control) mod unjudged;
pub(in crate::control) mod unlocated;
pub(in crate::control) mod unseen_responses;

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use egress_common::ids::{IfIndex, PodId};

use super::{
    plan::{Plan, wanted::Wanted},
    publish::problems::{About, Problems},
    settings::Settings,
};
use crate::{
    datapath::{Adoptable, CounterMap},
    gate::Stats,
    host::{Exits, Link},
    pods::{NamespacedName, ObjectsOf, Pod, PolicyKind, PolicyObjects, Snapshot},
    report::Subject,
};
pub(in crate::control) use fallback::Present;

use egress_policy::{Compiled, Mode, Objects, services::Claim};
use exits::PodExits;
use locations::{Location, PodLocation, PodLocations};
use machine::Machine;
use owners::Owners;
use policies::Policies;
use taps::Taps;
use unjudged::Unjudged;
use unlocated::Unlocated;
use unseen_responses::UnseenResponses;

/// Everything that a plan is made from.
pub(in crate::control) struct Observed<'a> {
    /// The pods of the source, and the interfaces in quarantine.
    pub(in crate::control) pods: BTreeMap<Subject, ObservedPod<'a>>,
    /// Whether the source could not be read in full, so that pods may be missing in `pods`.
    pub(in crate::control) incomplete: bool,
    /// The kinds of policy objects that an earlier agent knew and that the source does not list.
    pub(in crate::control) withheld: Vec<PolicyKind>,
    /// Whether the source is a cluster's API server.
    pub(in crate::control) in_cluster: bool,
    /// All policy objects of the source.
    pub(in crate::control) policies: Arc<PolicyObjects>,
    /// The UID of the node's object in the cluster.
    pub(in crate::control) node_uid: Option<&'a str>,
    /// What is enforced.
    pub(in crate::control) enforced: BTreeMap<Subject, InForce>,
    /// State in the kernel with which no pod is enforced, by the pod's id: left by an earlier agent, or by
    /// an attempt that failed.
    pub(in crate::control) left: BTreeMap<PodId, Adoptable>,
    /// The interfaces that nobody has judged until now.
    pub(in crate::control) unjudged: Unjudged,
    /// Whose addresses are known.
    pub(in crate::control) owners: Owners,
    /// The names of the host's interfaces, by their indexes.
    pub(in crate::control) interface_names: HashMap<IfIndex, String>,
    /// The settings with which the policies were compiled.
    pub(in crate::control) policy_settings: egress_policy::Settings,
    /// When this agent began.
    pub(in crate::control) began: Instant,
    /// Problems of the source, and of the node.
    pub(in crate::control) problems: Problems,
    /// Why DNS responses may bypass the agent's programs.
    pub(in crate::control) unseen_responses: Option<&'static str>,
}

/// A pod of the source, or the stand-in for an interface in quarantine.
pub(in crate::control) struct ObservedPod<'a> {
    pub(in crate::control) pod: Cow<'a, Pod>,
    pub(in crate::control) location: Location,
    /// What its annotations mean, or meant when they could last be read, or a closed policy.
    pub(in crate::control) policy: Arc<Compiled>,
    /// Its interfaces that cannot be enforced, and why they are not known in full. They are not read for a pod that
    /// is not known or is not to be enforced.
    pub(in crate::control) exits: Option<(Arc<Exits>, Option<String>)>,
}

/// How a pod, or an interface in quarantine, is enforced.
#[derive(Clone)]
pub(in crate::control) struct InForce {
    /// The pod's id in the maps.
    pub(in crate::control) pod: PodId,
    /// Its policy and its interfaces.
    pub(in crate::control) wanted: Arc<Wanted>,
}

/// The enforced pods, and other state that is left in the kernel.
pub(in crate::control) struct InKernel {
    pub(in crate::control) enforced: BTreeMap<Subject, InForce>,
    pub(in crate::control) left: BTreeMap<PodId, Adoptable>,
}

/// Makes observations, and remembers the parts of earlier ones that it needs.
pub(in crate::control) struct Observer {
    in_cluster: bool,
    began: Instant,
    locations: PodLocations,
    pub(in crate::control) exits: PodExits,
    pub(in crate::control) policies: Policies,
    pub(in crate::control) taps: Taps,
    unseen_responses: UnseenResponses,
    /// The gate's counters.
    stats: Arc<Stats>,
    /// The programs' counters.
    counters: CounterMap,
    pub(in crate::control) unjudged: Unjudged,
    unlocated: Unlocated,
}

impl Observer {
    /// `judged` are the interfaces on which an earlier agent left a whole policy in force.
    ///
    /// # Errors
    ///
    /// When the kernel cannot be asked for interfaces of pods, or for packet sockets.
    pub(in crate::control) fn new(
        in_cluster: bool,
        locations: PodLocations,
        policy_settings: egress_policy::Settings,
        judged: HashSet<IfIndex>,
        stats: Arc<Stats>,
        counters: CounterMap,
    ) -> Result<Self> {
        Ok(Self {
            in_cluster,
            began: Instant::now(),
            unjudged: Unjudged::new(locations.has_quarantine(), judged),
            locations,
            exits: PodExits::open().context("cannot look at pods' interfaces")?,
            policies: Policies::new(policy_settings),
            taps: Taps::open()?,
            unseen_responses: UnseenResponses::default(),
            stats,
            counters,
            unlocated: Unlocated::default(),
        })
    }

    /// Records interfaces that existed since the last observation.
    pub(in crate::control) fn note_seen(&mut self, seen: Vec<Link>) {
        self.exits.note_seen(seen);
    }

    /// Reads everything.
    pub(in crate::control) fn observe<'a>(
        &mut self,
        machine: &mut Machine,
        source: &'a Snapshot,
        settings: &Settings,
        InKernel { enforced, left }: InKernel,
    ) -> Observed<'a> {
        let (pods, mut locations) = self.locate(machine, source, &enforced, &left);
        self.unjudged.look(&self.locations.there());
        self.exits.begin(&locations, &machine.links);
        self.policies.retain(|subject| pods.contains_key(subject));
        self.policies
            .take_services(settings.losses.services(), &settings.places);
        self.taps.look();
        let owners = Owners::new(
            &pods,
            &locations,
            machine,
            &self.policies.settings().protected,
        );
        let mut problems = Problems::default();
        for problem in &source.problems {
            problems.add(About::node(&*problem.origin), &problem.message);
        }
        let counters = self.counters.counters().unwrap_or_default();
        let passed = (counters.passed_questions, counters.passed_answers);
        let unseen_responses = self.unseen_responses.problem(&self.stats, passed);
        if let Some(what) = unseen_responses {
            problems.set(About::node("DNS"), what);
        }
        if let Some(what) = self.exits.strange() {
            problems.set(About::node("interfaces of other namespaces"), what);
        }
        if let Some((about, what)) = self.taps.of_node() {
            problems.set(About::Node(about), what);
        }
        for (resolver, Claim { service, endpoint }) in &settings.claims {
            let what = format!(
                "Service {service} has this address among its external ones, or had it within the last minute, and \
                 leads to {endpoint}, which is no resolver. Queries to it are dropped, and no response from it is \
                 delivered. Remove the address from the Service, or name the endpoint in dns.resolvers"
            );
            problems.set(About::node(format!("resolver {resolver}")), what);
        }
        let pods = pods.into_iter().filter_map(|(subject, pod)| {
            let location = locations.remove(&subject)?;
            let observed = self.pod(settings, &source.of_unknown, &subject, pod, location);
            Some((subject, observed))
        });
        Observed {
            pods: pods.collect(),
            incomplete: source.unreadable,
            withheld: source.kinds.withheld.iter().copied().collect(),
            in_cluster: self.in_cluster,
            policies: Arc::clone(&source.policies),
            node_uid: source.node_uid.as_deref(),
            enforced,
            left,
            unjudged: self.unjudged.clone(),
            owners,
            interface_names: machine
                .links
                .iter()
                .map(|link| (link.ifindex, link.name.clone()))
                .collect(),
            policy_settings: self.policies.settings().clone(),
            began: self.began,
            problems,
            unseen_responses,
        }
    }

    /// The pods of the source and the interfaces in quarantine, and where each is.
    fn locate<'a>(
        &mut self,
        machine: &mut Machine,
        source: &'a Snapshot,
        enforced: &BTreeMap<Subject, InForce>,
        left: &BTreeMap<PodId, Adoptable>,
    ) -> (BTreeMap<Subject, Cow<'a, Pod>>, BTreeMap<Subject, Location>) {
        let in_force = enforced.values().map(|in_force| &in_force.wanted);
        let attached = in_force.flat_map(|wanted| wanted.interfaces.iter().copied());
        self.locations.note_attached(attached);
        let look = self.locations.look(machine, source);
        let mut locations = look.locations;
        // A pod that no longer runs anything is still enforced on its interface.
        let mut held = held(source, enforced, &locations);
        held.extend(kept_left(source, left));
        let mut unidentified = look.unidentified.unwrap_or_else(|| {
            let gone = self.locations.has_quarantine();
            quarantine::as_before(enforced, gone.then_some(&machine.links))
        });
        unidentified.retain(|(_, ifindex)| !held.contains(ifindex));
        let pods = source.pods.iter();
        let mut pods: BTreeMap<Subject, Cow<'a, Pod>> = pods
            .map(|(name, pod)| (name.clone().into(), Cow::Borrowed(pod)))
            .collect();
        for (name, ifindex) in unidentified {
            let (subject, pod) = quarantine::stand_in(&name);
            let location = Location::Found(PodLocation {
                interfaces: vec![ifindex],
                first: self.locations.first_addresses(ifindex),
                ..PodLocation::default()
            });
            locations.insert(subject.clone(), location);
            pods.insert(subject, Cow::Owned(pod));
        }
        (pods, locations)
    }

    fn pod<'a>(
        &mut self,
        settings: &Settings,
        of_unknown: &Arc<Objects>,
        subject: &Subject,
        pod: Cow<'a, Pod>,
        location: Location,
    ) -> ObservedPod<'a> {
        let policy = if subject.is_interface() {
            self.policies.unidentified(of_unknown)
        } else if !pod.is_known() {
            let quarantine = settings.config.quarantine.enabled;
            self.policies
                .without_namespace(&pod, quarantine, of_unknown)
        } else {
            self.policies.read(subject, &pod)
        };
        let is_enforceable = policy.mode != Mode::Off && !pod.host_network;
        let exits = match &location {
            Location::Found(location)
                if is_enforceable && !subject.is_interface() && pod.is_known() =>
            {
                Some(self.exits.of(subject, location, pod.cgroup_uid.is_some()))
            }
            _ => None,
        };
        ObservedPod {
            pod,
            location,
            policy,
            exits,
        }
    }

    /// Records the pods that the plan leaves alone and those that it could not find. Adds to the plan's problems
    /// those that have been looked for too long.
    pub(in crate::control) fn note(&mut self, observed: &Observed<'_>, plan: &mut Plan) {
        self.unjudged.leave(&plan.left_alone);
        let unlocated = std::mem::take(&mut plan.unlocated);
        let unlocated = self.unlocated.note(unlocated, observed, Instant::now());
        plan.problems.extend(unlocated);
    }

    /// How long to wait before the next observation, which would otherwise come `after` this time.
    pub(in crate::control) fn look_again(&self, after: Duration) -> Duration {
        self.locations.look_again(after)
    }

    /// Whether something is expected to be found soon.
    pub(in crate::control) fn is_expecting(&self) -> bool {
        self.unlocated.any() || self.locations.has_unidentified()
    }
}

/// The interfaces on which an earlier agent left pods of the source whose objects are not known.
fn kept_left(
    source: &Snapshot,
    left: &BTreeMap<PodId, Adoptable>,
) -> impl Iterator<Item = IfIndex> {
    let left = left.values().filter(|left| {
        let pod = source
            .pods
            .get(&NamespacedName::new(&*left.namespace, &*left.name));
        pod.is_some_and(|pod| {
            pod.uid == left.uid && pod.objects_of == ObjectsOf::UnknownButEnforced
        })
    });
    left.flat_map(|left| left.interfaces.iter().map(|&(ifindex, _)| ifindex))
}

/// The interfaces on which pods of the source are enforced, without those that a pod was found to have left.
fn held(
    source: &Snapshot,
    enforced: &BTreeMap<Subject, InForce>,
    locations: &BTreeMap<Subject, Location>,
) -> HashSet<IfIndex> {
    let is_there = |subject: &Subject, uid: &str| {
        let Subject::Pod(name) = subject else {
            return false;
        };
        let pod = source.pods.get(name);
        pod.is_some_and(|pod| pod.uid == uid)
    };
    enforced
        .iter()
        .filter(|(subject, in_force)| is_there(subject, &in_force.wanted.uid))
        .flat_map(|(subject, in_force)| {
            let found = locations.get(subject);
            let found = found.filter(|location| matches!(location, Location::Found(_)));
            let interfaces = in_force.wanted.interfaces.iter().copied();
            interfaces.filter(move |ifindex| {
                found.is_none_or(|found| found.interfaces().contains(ifindex))
            })
        })
        .collect()
}
