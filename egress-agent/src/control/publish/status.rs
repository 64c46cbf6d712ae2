//! What `status`, `explain` and the metrics answer with.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use anyhow::Result;

use super::{Publisher, problems::About};
use crate::{
    config::Config,
    control::{
        apply::{Applier, enforced::Enforced},
        observe::{Observed, Observer},
        settings::Settings,
        start::source::ClusterSide,
    },
    pods::Pod,
    report::{Reporter, Subject},
    serve::{Attached, Board, NodeState, PodState, Serving, Sources},
};
use egress_policy::Mode;

/// Where a resolver comes from that the configuration names.
const CONFIGURED: &str = "configuration (dns.resolvers)";

/// Starts answering questions about the agent.
///
/// # Errors
///
/// When the kernel's maps cannot be opened, or no thread can be started. An address that cannot be listened on is
/// logged and tried again.
pub(in crate::control) fn serve(
    config: &Config,
    applier: &Applier,
    board: Arc<Board>,
    reporter: Reporter,
) -> Result<Serving> {
    let datapath = applier.datapath();
    Serving::start(
        &config.serve,
        Sources {
            node: config.node.clone(),
            hook: datapath.hook(),
            addresses_per_pod: config.limits.addresses_per_pod,
            board,
            gate: applier.gate().clone(),
            reporter,
            counters: datapath.counters()?,
            view: datapath.view()?,
        },
    )
}

impl Publisher {
    /// The node as it is now.
    pub(super) fn node(
        &self,
        observed: &Observed<'_>,
        applier: &Applier,
        observer: &Observer,
        settings: &Settings,
    ) -> NodeState {
        let before = self.board.node();
        let pods: BTreeMap<Subject, PodState> = observed
            .pods
            .iter()
            .map(|(subject, found)| {
                let before = before.pods.get(subject);
                let state = self.pod(subject, &found.pod, before, applier, observer);
                (subject.clone(), state)
            })
            .collect();
        let configured = settings.configured.dns.resolvers.iter();
        let mut resolvers: BTreeMap<_, _> = configured
            .map(|&resolver| (resolver, CONFIGURED.to_owned()))
            .collect();
        for (&resolver, found) in &settings.facts.resolvers {
            resolvers.entry(resolver).or_insert_with(|| found.clone());
        }
        let is_pod = |about: &About| match about {
            About::Subject(subject) => !subject.is_interface() && pods.contains_key(subject),
            About::Node(_) => false,
        };
        let problems = self.problems.iter().filter(|(about, _)| !is_pod(about));
        let connections = applier.connections();
        NodeState {
            resolvers,
            problems: problems
                .map(|(about, what)| (about.to_string(), what.clone()))
                .collect(),
            settings: Some(observed.policy_settings.clone()),
            existing: connections.existing,
            trusted: connections.trust.is_given(),
            trust: connections.trust.to_string(),
            incomplete: observed.incomplete,
            cluster: self.cluster.as_ref().map(ClusterSide::state),
            pods,
        }
    }

    fn pod(
        &self,
        subject: &Subject,
        pod: &Pod,
        before: Option<&PodState>,
        applier: &Applier,
        observer: &Observer,
    ) -> PodState {
        let enforced = applier.enforced().get(subject);
        let read = observer.policies.last(subject);
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
            quarantined: subject.is_interface(),
            attached: enforced.map(|enforced| Attached {
                bypassed: applier.bypassed(subject).is_some(),
                ..attached(enforced, before)
            }),
            compiled: compiled.cloned(),
            written: read
                .map(|(_, written, _)| Arc::clone(written))
                .unwrap_or_default(),
            unreadable: read.is_some_and(|(.., unreadable)| unreadable),
            exits: enforced
                .and(observer.exits.last(subject))
                .cloned()
                .unwrap_or_default(),
            problem: self.problems.of(subject).cloned(),
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
