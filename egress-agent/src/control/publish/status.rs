//! The status snapshot, from which `status`, `explain` and the metrics are answered.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::Result;

use super::{Publisher, problems::About};
use crate::{
    config::Config,
    control::{
        apply::Applier,
        observe::{Observed, Observer, Present},
        settings::Settings,
        start::source::ClusterSide,
    },
    pods::{Pod, PolicyState},
    report::{Reporter, Subject},
    serve::{PodRecord, Published, Serving, Sources, StatusSnapshot},
};
use egress_policy::Mode;

/// The source of a resolver that the configuration names.
const CONFIGURED: &str = "configuration (dns.resolvers)";
const INHERITED: &str = "an earlier agent, until the API server has named all resolvers";

/// Starts answering requests about the agent.
///
/// # Errors
///
/// When the kernel's maps cannot be opened, or no thread can be started. An address that cannot be listened on is
/// logged and tried again.
pub(in crate::control) fn serve(
    config: &Config,
    applier: &Applier,
    published: Arc<Published>,
    reporter: Reporter,
) -> Result<Serving> {
    let datapath = applier.datapath();
    Serving::start(
        &config.serve,
        Sources {
            node: config.node.clone(),
            hook: datapath.hook(),
            addresses_per_pod: config.limits.addresses_per_pod,
            published,
            gate: applier.gate().clone(),
            reporter,
            counters: datapath.counters()?,
            view: datapath.view()?,
        },
    )
}

impl Publisher {
    /// The node's current state.
    pub(super) fn node(
        &self,
        observed: &Observed<'_>,
        applier: &Applier,
        looks: &Observer,
        settings: &Settings,
    ) -> StatusSnapshot {
        let pods: BTreeMap<Subject, Arc<PodRecord>> = observed
            .pods
            .iter()
            .map(|(subject, found)| {
                let record = self.pod(subject, &found.pod, applier, looks);
                (subject.clone(), Arc::new(record))
            })
            .collect();
        let configured = settings.configured.dns.resolvers.iter();
        let mut resolvers: BTreeMap<_, _> = configured
            .map(|&resolver| (resolver, CONFIGURED.to_owned()))
            .collect();
        for (&resolver, found) in &settings.facts.resolvers {
            resolvers.entry(resolver).or_insert_with(|| found.clone());
        }
        for &resolver in &settings.inherited.resolvers {
            resolvers
                .entry(resolver)
                .or_insert_with(|| INHERITED.to_owned());
        }
        let is_pod = |about: &About| match about {
            About::Subject(subject) => !subject.is_interface() && pods.contains_key(subject),
            About::Node(_) => false,
        };
        let problems = self.problems.iter().filter(|(about, _)| !is_pod(about));
        let policies = self.applied.states().iter().map(|state| {
            let about = About::node(state.name.to_string());
            PolicyState {
                problem: self.problems.about(&about).cloned(),
                ..state.clone()
            }
        });
        let connections = applier.connections();
        StatusSnapshot {
            policies: policies.collect(),
            counts: self.applied.pods(),
            resolvers,
            problems: problems
                .map(|(about, what)| (about.to_string(), what.clone()))
                .collect(),
            settings: Some(observed.policy_settings.clone()),
            existing: connections.existing,
            trusted: connections.trust.is_given(),
            trust: connections.trust.to_string(),
            incomplete: observed.incomplete,
            withheld: observed.withheld.clone(),
            cluster: self.cluster.as_ref().map(ClusterSide::state),
            pods,
        }
    }

    fn pod(&self, subject: &Subject, pod: &Pod, applier: &Applier, looks: &Observer) -> PodRecord {
        let read = looks.policies.last(subject);
        let written = read.map(|(_, written, _)| Arc::clone(written));
        let unreadable = read.is_some_and(|(.., present)| present != Present::WHOLE);
        let problem = self.problems.of(subject).cloned();
        if let Some(enforced) = applier.enforced().get(subject) {
            let mut record = enforced.record(subject);
            if let Some(attached) = &mut record.attached {
                attached.bypassed = applier.bypassed(subject).is_some();
            }
            return PodRecord {
                uid: pod.uid.clone(),
                host_network: pod.host_network,
                written: written.unwrap_or_default(),
                unreadable,
                exits: looks.exits.last(subject).cloned().unwrap_or_default(),
                problem,
                ..record
            };
        }
        let compiled = read.map(|(compiled, ..)| Arc::clone(compiled));
        PodRecord {
            uid: pod.uid.clone(),
            mode: match &compiled {
                Some(compiled) => compiled.mode,
                // The mode that its namespace, or a policy object, demands is not known yet.
                None if !pod.is_known() => Mode::Enforce,
                None => Mode::Off,
            },
            host_network: pod.host_network,
            quarantined: subject.is_interface(),
            identity: None,
            attached: None,
            compiled,
            written: written.unwrap_or_default(),
            unreadable,
            exits: Arc::default(),
            problem,
        }
    }
}
