//! Telling those who serve what is enforced.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Instant, SystemTime},
};

use anyhow::Result;

use crate::control::{
    observe::locations::Pods, plan::wanted::Enforced, publish::problems::About,
    reconcile::Reconciler, start::source::ClusterSide,
};
use crate::{
    pods::Pod,
    report::{Reporter, Subject},
    serve::{Attached, NodeState, PodState, Serving, Sources},
};
use egress_policy::Mode;

/// Where a resolver comes from that the configuration names.
const CONFIGURED: &str = "configuration (dns.resolvers)";

impl Reconciler {
    /// Starts answering questions about the agent.
    ///
    /// # Errors
    ///
    /// When the kernel's maps cannot be opened, or no thread can be started. What cannot be listened
    /// on is said and tried again.
    pub(in crate::control) fn serve(&self, reporter: &Reporter) -> Result<Serving> {
        Serving::start(
            &self.config.serve,
            Sources {
                node: self.config.node.clone(),
                hook: self.datapath.hook(),
                addresses_per_pod: self.config.limits.addresses_per_pod,
                board: Arc::clone(&self.board),
                gate: self.gate.clone(),
                reporter: reporter.clone(),
                counters: self.datapath.counters()?,
                view: self.datapath.view()?,
            },
        )
    }

    /// Puts what is so now on the board.
    pub(in crate::control) fn tell(&self, incomplete: bool, pods: &Pods<'_>, began: Instant) {
        let before = self.board.node();
        let pods: BTreeMap<Subject, PodState> = pods
            .iter()
            .map(|(key, pod)| {
                let state = self.state(key, pod, before.pods.get(key));
                (key.clone(), state)
            })
            .collect();
        let configured = self.configured.dns.resolvers.iter();
        let mut resolvers: BTreeMap<_, _> = configured
            .map(|&resolver| (resolver, CONFIGURED.to_owned()))
            .collect();
        for (&resolver, found) in &self.facts.resolvers {
            resolvers.entry(resolver).or_insert_with(|| found.clone());
        }
        let is_pod = |about: &About| match about {
            About::Subject(subject) => !subject.is_interface() && pods.contains_key(subject),
            About::Node(_) => false,
        };
        let problems = self.problems.iter().filter(|(about, _)| !is_pod(about));
        let node = NodeState {
            resolvers,
            problems: problems
                .map(|(about, what)| (about.to_string(), what.clone()))
                .collect(),
            settings: Some(self.readings.settings().clone()),
            existing: self.existing,
            trusted: self.trust.is_given(),
            trust: self.trust.to_string(),
            incomplete,
            cluster: self.cluster.as_ref().map(ClusterSide::state),
            pods,
        };
        self.board.reconciled(node, began.elapsed());
    }

    fn state(&self, key: &Subject, pod: &Pod, before: Option<&PodState>) -> PodState {
        let enforced = self.enforced.get(key);
        let read = self.readings.last(key);
        let compiled = enforced
            .map(|enforced| &enforced.wanted.compiled)
            .or(read.map(|(compiled, ..)| compiled));
        PodState {
            uid: pod.uid.clone(),
            mode: match compiled {
                Some(compiled) => compiled.mode,
                // What its namespace demands is not known yet.
                None if !pod.namespace_known => Mode::Enforce,
                None => Mode::Off,
            },
            host_network: pod.host_network,
            quarantined: key.is_interface(),
            attached: enforced.map(|enforced| Attached {
                bypassed: self.bypassed(key).is_some(),
                ..attached(enforced, before)
            }),
            compiled: compiled.cloned(),
            written: read
                .map(|(_, written, _)| Arc::clone(written))
                .unwrap_or_default(),
            unreadable: read.is_some_and(|(.., unreadable)| unreadable),
            exits: enforced
                .and(self.exits.last(key))
                .cloned()
                .unwrap_or_default(),
            problem: self.problems.of(key).cloned(),
        }
    }
}

fn attached(enforced: &Enforced, before: Option<&PodState>) -> Attached {
    let since = before
        .and_then(|before| before.attached.as_ref())
        .filter(|before| (before.pod, before.policy) == (enforced.pod, enforced.policy))
        .map_or_else(SystemTime::now, |before| before.since);
    Attached {
        identity: Arc::clone(&enforced.identity),
        pod: enforced.pod,
        policy: enforced.policy,
        version: enforced.version,
        since,
        interfaces: enforced.wanted.interfaces.clone(),
        bypassed: false,
    }
}
