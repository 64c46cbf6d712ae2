//! The content of the node's report object.

use std::collections::BTreeMap;

use egress_policy::Mode;

use super::{Publisher, applied_policies::PodInForce};
use crate::{
    control::{
        apply::Applier,
        observe::{Observed, Observer},
    },
    pods::cluster::NodeReport,
    serve::StatusSnapshot,
};

impl Publisher {
    /// Records which policies are in the kernel.
    pub(super) fn note_applied(
        &mut self,
        observed: &Observed<'_>,
        applier: &Applier,
        looks: &Observer,
    ) {
        if observed.incomplete {
            return;
        }
        let pods = observed.pods.iter();
        let pods = pods.filter(|(subject, _)| !subject.is_interface());
        let pods: BTreeMap<_, _> = pods
            .map(|(subject, found)| {
                let enforced = applier.enforced().get(subject);
                let enforced = enforced.filter(|enforced| enforced.wanted.uid == found.pod.uid);
                let has_exits = looks
                    .exits
                    .last(subject)
                    .is_some_and(|exits| !exits.is_empty());
                let is_partly = has_exits && found.policy.mode == Mode::Enforce;
                let read = looks.policies.last(subject);
                let pod = PodInForce {
                    uid: &found.pod.uid,
                    objects: &found.pod.objects,
                    policy: &found.policy,
                    present: read
                        .filter(|_| found.pod.namespace_known)
                        .map(|(.., present)| present)
                        .unwrap_or_default(),
                    in_kernel: enforced.map(|enforced| &enforced.wanted.compiled),
                    is_whole: !is_partly && applier.bypassed(subject).is_none(),
                    is_wanted: found.policy.mode != Mode::Off && !found.pod.host_network,
                };
                (subject, pod)
            })
            .collect();
        self.applied.note(&observed.policies, &pods);
    }

    /// Sends the node's report. Until the source has said which pods there are, the last report stays.
    pub(super) fn report(&self, observed: &Observed<'_>, node: &StatusSnapshot) {
        let Some(cluster) = &self.cluster else {
            return;
        };
        if observed.incomplete {
            return;
        }
        let problems = self.problems.iter();
        let problems = problems.map(|(about, what)| (about.to_string(), what.as_str()));
        let report = NodeReport::new(observed.node_uid, node.counts, &node.policies, problems);
        cluster.reports.publish(report);
    }
}
