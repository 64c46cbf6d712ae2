//! Kubernetes Events on pods, which show people in the cluster what the log and the denial lines say.

use super::problems::Problems;
use crate::{
    control::observe::Observed,
    pods::cluster::{EventSink, PodEvent},
    report::{Denied, Line, Listener, Summary, Verdict},
};

/// Something is wrong with a pod's policy, or with enforcing it.
const PROBLEM: &str = "EgressPolicyProblem";
/// Something that the pod sent did not leave.
const DENIED: &str = "EgressDenied";
/// Something that the pod sent would not have left, if its policy were enforced.
const WOULD_DENY: &str = "EgressWouldBeDenied";

/// The problems of pods that are new since the last reconcile, as Events.
pub(super) fn problems<'a>(
    observed: &'a Observed<'_>,
    problems: &'a Problems,
    before: &'a Problems,
) -> impl Iterator<Item = PodEvent> + 'a {
    let pods = observed
        .pods
        .iter()
        .filter(|(subject, _)| !subject.is_interface());
    pods.filter_map(move |(subject, found)| {
        let what = problems.of(subject)?;
        (before.of(subject) != Some(what)).then(|| PodEvent {
            namespace: found.pod.namespace.clone(),
            name: found.pod.name.clone(),
            uid: found.pod.uid.clone(),
            reason: PROBLEM,
            note: what.clone(),
            warning: true,
        })
    })
}

/// Makes an Event of each denial line. Lines that repeat one become a series of its Event.
pub(in crate::control) fn denials(events: EventSink) -> Listener {
    Box::new(move |line| {
        if let Line::Denied { first, .. } = line
            && !first.pod.subject().is_interface()
        {
            events.send(denied(first));
        }
    })
}

fn denied(denied: &Denied) -> PodEvent {
    let (reason, verb) = match denied.verdict {
        Verdict::Audited => (WOULD_DENY, "would be denied"),
        _ => (DENIED, "denied"),
    };
    PodEvent {
        namespace: denied.pod.namespace.clone(),
        name: denied.pod.name.clone(),
        uid: denied.pod.uid.clone(),
        reason,
        note: format!("{}: {verb}, {}", Summary(denied), denied.reason.as_str()),
        warning: true,
    }
}
