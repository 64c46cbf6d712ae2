//! A simulated node, for tests of plans.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::Instant,
};

use egress_common::{
    ids::{IfIndex, PodId, PolicyId},
    records::Interface,
};

use super::{Action, Before, Plan, plan, wanted::Wanted};
use crate::{
    config::Config,
    control::{
        inherited_ranges::Inherited,
        observe::{
            InForce, Observed, ObservedPod,
            locations::{Location, PodLocation},
            owners::Owners,
            quarantine,
            unjudged::Unjudged,
        },
        publish::problems::Problems,
        settings::Settings,
    },
    datapath::Adoptable,
    host::Exits,
    pods::{ObjectsOf, Pod, Snapshot},
    report::Subject,
};
use egress_policy::{Annotations, Compiled, Inputs, objects::Objects};

/// A pod, and where it is.
#[derive(Clone)]
pub(super) struct ScenePod {
    pub(super) pod: Pod,
    pub(super) location: Location,
    pub(super) policy: Arc<Compiled>,
    pub(super) exits: Option<(Arc<Exits>, Option<String>)>,
}

/// A node, as an observation finds it.
pub(super) struct Scene {
    pub(super) settings: Settings,
    pub(super) policy_settings: egress_policy::Settings,
    pub(super) began: Instant,
    pub(super) pods: BTreeMap<Subject, ScenePod>,
    pub(super) incomplete: bool,
    pub(super) in_cluster: bool,
    pub(super) enforced: BTreeMap<Subject, InForce>,
    pub(super) left: BTreeMap<PodId, Adoptable>,
    /// The interfaces that the programs are on.
    pub(super) attached: HashSet<IfIndex>,
    /// Those of them that pods have left, and that others are to have.
    vacated: HashSet<IfIndex>,
    pub(super) unjudged: Unjudged,
    pub(super) owners: Owners,
    next_pod: PodId,
}

impl Scene {
    /// A node of a cluster with quarantine, on which nothing is enforced yet.
    pub(super) fn new() -> Self {
        Self::configured("")
    }

    /// The same with these lines in the configuration.
    pub(super) fn configured(lines: &str) -> Self {
        let text = format!("dns: {{resolvers: [10.0.0.53]}}\nnode: n1\n{lines}");
        let config = Config::from_yaml(&text).expect("a configuration");
        let policy_settings = config.policy_settings();
        Self {
            settings: Settings::new(
                config,
                &Snapshot::default(),
                Inherited::default(),
                Arc::default(),
            ),
            policy_settings,
            began: Instant::now(),
            pods: BTreeMap::new(),
            incomplete: false,
            in_cluster: true,
            enforced: BTreeMap::new(),
            left: BTreeMap::new(),
            attached: HashSet::new(),
            vacated: HashSet::new(),
            unjudged: Unjudged::new(true, HashSet::new()),
            owners: Owners::default(),
            next_pod: PodId::new(1),
        }
    }

    /// A policy out of annotations without their prefix.
    pub(super) fn policy(&self, annotations: &[(&str, &str)]) -> Arc<Compiled> {
        let own = annotations_of(annotations);
        let own = Annotations::from_map(&own);
        let none = Annotations::default();
        let compiled =
            egress_policy::compile(Inputs::annotations(&own, &none), &self.policy_settings);
        Arc::new(compiled.expect("a policy"))
    }

    /// Puts a pod behind an interface, with an `allow` list.
    pub(super) fn add(&mut self, name: &str, ifindex: u32) -> &mut ScenePod {
        let policy = self.policy(&[("allow", "a.test")]);
        let pod = ScenePod {
            pod: pod(name),
            location: behind(&[ifindex]),
            policy,
            exits: None,
        };
        let subject = subject(name);
        self.pods.insert(subject.clone(), pod);
        self.pods.get_mut(&subject).expect("just added")
    }

    /// Puts an interface into the node whose pod is not known.
    pub(super) fn add_unknown(&mut self, name: &str, ifindex: u32) {
        let (subject, pod) = quarantine::stand_in(name);
        let policy = Arc::new(egress_policy::unidentified(
            &egress_policy::Objects::default(),
            &self.policy_settings,
        ));
        let stand_in = ScenePod {
            pod,
            location: behind(&[ifindex]),
            policy,
            exits: None,
        };
        self.pods.insert(subject, stand_in);
    }

    pub(super) fn get(&mut self, name: &str) -> &mut ScenePod {
        self.pods.get_mut(&subject(name)).expect("the pod")
    }

    pub(super) fn observed(&self) -> Observed<'static> {
        let pods = self.pods.iter().map(|(subject, pod)| {
            let observed = ObservedPod {
                pod: Cow::Owned(pod.pod.clone()),
                location: pod.location.clone(),
                policy: Arc::clone(&pod.policy),
                exits: pod.exits.clone(),
            };
            (subject.clone(), observed)
        });
        Observed {
            pods: pods.collect(),
            incomplete: self.incomplete,
            withheld: Vec::new(),
            in_cluster: self.in_cluster,
            policies: Arc::default(),
            node_uid: None,
            enforced: self.enforced.clone(),
            left: self.left.clone(),
            unjudged: self.unjudged.clone(),
            owners: self.owners.clone(),
            interface_names: HashMap::from([
                (IfIndex::new(1), "veth1".to_owned()),
                (IfIndex::new(2), "veth2".to_owned()),
            ]),
            policy_settings: self.policy_settings.clone(),
            began: self.began,
            problems: Problems::default(),
            unseen_responses: None,
        }
    }

    pub(super) fn plan(&self) -> Plan {
        plan(&self.observed(), &self.settings, self.began)
    }

    /// Plans, and carries out the plan.
    pub(super) fn reconcile(&mut self) -> Plan {
        let plan = self.plan();
        self.unjudged.leave(&plan.left_alone);
        for action in &plan.actions {
            self.carry_out(action, &plan);
        }
        self.detach_vacated(&plan);
        plan
    }

    /// Changes the node as a successful action of this plan does.
    pub(super) fn carry_out(&mut self, action: &Action, plan: &Plan) {
        match action {
            Action::Release(_) | Action::Settle => {}
            Action::Retire(subject) => {
                let in_force = self.enforced.remove(subject).expect("it is enforced");
                self.leave(subject, &in_force);
            }
            Action::Prepare => {
                for action in &plan.actions {
                    if let Action::Begin {
                        subject, wanted, ..
                    } = action
                    {
                        self.prepare(subject, wanted);
                    }
                }
            }
            Action::Change { subject, wanted } => {
                let in_force = self.enforced.get_mut(subject).expect("it is enforced");
                let wanted = Wanted::clone(wanted).on_interfaces_of(&in_force.wanted);
                in_force.wanted = Arc::new(wanted);
            }
            Action::Move {
                subject, wanted, ..
            } => {
                let in_force = self.enforced.get_mut(subject).expect("it is enforced");
                let before = Arc::clone(&in_force.wanted);
                let moved = Wanted::clone(&before).on_interfaces_of(wanted);
                in_force.wanted = Arc::new(moved);
                self.attached.extend(&wanted.interfaces);
                self.detach(before.interfaces.iter().copied(), plan);
                self.unjudged.judge(&wanted.interfaces);
            }
            Action::Begin {
                subject, wanted, ..
            } => {
                let pod = self.left_as(subject, wanted).expect("it is prepared");
                let left = self.left.remove(&pod).expect("just found");
                let in_force = InForce {
                    pod,
                    wanted: Arc::clone(wanted),
                };
                assert!(
                    self.enforced.insert(subject.clone(), in_force).is_none(),
                    "{subject} is enforced already"
                );
                self.attached.extend(&wanted.interfaces);
                self.detach(left.interfaces.iter().map(|&(ifindex, _)| ifindex), plan);
                self.unjudged.judge(&wanted.interfaces);
            }
            Action::Remove { subject, .. } => {
                let in_force = self.enforced.remove(subject).expect("it is enforced");
                self.detach(in_force.wanted.interfaces.iter().copied(), plan);
            }
            Action::RemoveLeft { pod, .. } => {
                let left = self.left.remove(pod).expect("it is left");
                self.detach(left.interfaces.iter().map(|&(ifindex, _)| ifindex), plan);
            }
        }
    }

    /// Notes a pod that is about to begin as left in the kernel, on the interfaces that it is to have.
    fn prepare(&mut self, subject: &Subject, wanted: &Wanted) {
        let pod = self.left_as(subject, wanted).unwrap_or(self.next_pod);
        self.next_pod = self.next_pod.max(PodId::new(pod.get() + 1));
        let (namespace, name) = subject.fields();
        let left = self.left.entry(pod).or_insert_with(|| Adoptable {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: wanted.uid.clone(),
            interfaces: Vec::new(),
        });
        let entry = wanted.entry(pod, PolicyId::new(pod.get()));
        let interfaces = wanted.interfaces.iter();
        left.interfaces.extend(interfaces.map(|&at| (at, entry)));
    }

    fn left_as(&self, subject: &Subject, wanted: &Wanted) -> Option<PodId> {
        let mut left = self.left.iter();
        let left = left.find(|(_, left)| {
            (&*left.namespace, &*left.name) == subject.fields() && left.uid == wanted.uid
        });
        left.map(|(&pod, _)| pod)
    }

    /// Takes the programs off the interfaces that a pod has left, except those that this pod or another one has, or is
    /// to have.
    fn detach(&mut self, interfaces: impl Iterator<Item = IfIndex>, plan: &Plan) {
        for ifindex in interfaces {
            if self.is_somebodys(ifindex) {
                continue;
            }
            if plan.claimed.contains(&ifindex) {
                self.vacated.insert(ifindex);
            } else {
                self.attached.remove(&ifindex);
            }
        }
    }

    /// What happens at the end of a plan.
    pub(super) fn detach_vacated(&mut self, plan: &Plan) {
        let vacated = std::mem::take(&mut self.vacated).into_iter();
        let vacated: Vec<IfIndex> = vacated.filter(|&at| !self.is_somebodys(at)).collect();
        self.detach(vacated.into_iter(), plan);
    }

    fn is_somebodys(&self, ifindex: IfIndex) -> bool {
        let mut enforced = self.enforced.values();
        let mut left = self.left.values().flat_map(|left| &left.interfaces);
        enforced.any(|pod| pod.wanted.interfaces.contains(&ifindex))
            || left.any(|&(other, _)| other == ifindex)
    }

    /// Another agent starts, and finds what this one has enforced.
    pub(super) fn restart(&mut self) {
        for (subject, in_force) in std::mem::take(&mut self.enforced) {
            self.leave(&subject, &in_force);
        }
        let left = self.left.values().flat_map(|left| &left.interfaces);
        let left = left.map(|&(ifindex, _): &(IfIndex, Interface)| ifindex);
        self.unjudged = Unjudged::new(true, left.collect());
    }

    /// Turns an enforced pod into state that is left in the kernel.
    fn leave(&mut self, subject: &Subject, in_force: &InForce) {
        let (namespace, name) = subject.fields();
        let entry = in_force
            .wanted
            .entry(in_force.pod, PolicyId::new(in_force.pod.get()));
        let interfaces = in_force.wanted.interfaces.iter();
        let left = Adoptable {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: in_force.wanted.uid.clone(),
            interfaces: interfaces.map(|&ifindex| (ifindex, entry)).collect(),
        };
        self.left.insert(in_force.pod, left);
    }

    /// The problem of a pod.
    pub(super) fn problem(&self, name: &str) -> String {
        let problems = self.plan().problems;
        problems.get(&subject(name)).cloned().unwrap_or_default()
    }
}

/// The pod `name` of the namespace `shop`.
pub(super) fn subject(name: &str) -> Subject {
    Subject::pod("shop", name)
}

pub(in crate::control) fn pod(name: &str) -> Pod {
    Pod {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        uid: format!("uid-{name}"),
        interface: None,
        cgroup_uid: Some(format!("uid-{name}")),
        addresses: vec![IpAddr::from([10, 1, 0, 1])],
        further: Vec::new(),
        annotations: annotations_of(&[("allow", "a.test")]),
        namespace_annotations: BTreeMap::new(),
        namespace_known: true,
        objects: Objects::default(),
        objects_of: ObjectsOf::Known,
        host_network: false,
        is_pending: false,
        node_name: None,
        origin: format!("pod shop/{name}"),
    }
}

pub(super) fn behind(interfaces: &[u32]) -> Location {
    Location::Found(PodLocation {
        interfaces: interfaces.iter().copied().map(IfIndex::new).collect(),
        has_addresses: true,
        ..PodLocation::default()
    })
}

fn annotations_of(annotations: &[(&str, &str)]) -> BTreeMap<String, String> {
    let annotations = annotations.iter();
    annotations
        .map(|(key, value)| (format!("egress-agent.dev/{key}"), (*value).to_owned()))
        .collect()
}

/// The actions of a plan, each in a few words.
pub(super) fn summary(plan: &Plan) -> Vec<String> {
    let name = |subject: &Subject| subject.fields().1.to_owned();
    let actions = plan.actions.iter().map(|action| match action {
        Action::Release(subjects) => {
            let names: Vec<String> = subjects.iter().map(name).collect();
            format!("release {}", names.join(" "))
        }
        Action::Retire(subject) => format!("retire {}", name(subject)),
        Action::Prepare => "prepare".to_owned(),
        Action::Change { subject, .. } => format!("change {}", name(subject)),
        Action::Move {
            subject,
            wanted,
            has_unjudged,
        } => {
            let notes = if *has_unjudged { ", note" } else { "" };
            format!("move {} to {:?}{notes}", name(subject), wanted.interfaces)
        }
        Action::Begin {
            subject,
            adopts,
            before,
            ..
        } => {
            let how = if *adopts { "adopt" } else { "begin" };
            let before = match before {
                Before::Judged => "",
                Before::Settle => ", settle",
                Before::NoteNow => ", note",
            };
            format!("{how} {}{before}", name(subject))
        }
        Action::Settle => "settle".to_owned(),
        Action::Remove {
            subject,
            taken_over,
        } if taken_over.is_empty() => format!("remove {}", name(subject)),
        Action::Remove {
            subject,
            taken_over,
        } => format!("remove {}, if {taken_over:?} are taken over", name(subject)),
        Action::RemoveLeft { pod, taken_over } if taken_over.is_empty() => {
            format!("remove the leftovers of {pod}")
        }
        Action::RemoveLeft { pod, taken_over } => {
            format!("remove the leftovers of {pod}, if {taken_over:?} are taken over")
        }
    });
    actions.collect()
}
