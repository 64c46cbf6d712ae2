//! Telling people in the cluster, by Events on their pods, what the log and the denial lines say.

use crate::{
    pods::{
        Pod,
        cluster::{EventSink, PodEvent},
    },
    report::{Denied, Line, Listener, Subject, Summary, Verdict},
};

/// Something is wrong with a pod's policy, or with enforcing it.
const PROBLEM: &str = "EgressPolicyProblem";
/// Something that the pod sent did not leave.
const DENIED: &str = "EgressDenied";
/// Something that the pod sent would not have left, if its policy were enforced.
const WOULD_DENY: &str = "EgressWouldBeDenied";

/// What is wrong with a pod, as an Event.
pub(in crate::control) fn problem(key: &Subject, pod: &Pod, what: &str) -> Option<PodEvent> {
    (!key.is_interface()).then(|| PodEvent {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        reason: PROBLEM,
        note: what.to_owned(),
        warning: true,
    })
}

/// Makes an Event of each line about denials; those that repeat one are told as a series of it.
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
