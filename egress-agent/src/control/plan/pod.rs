//! The decision about one pod.

use std::{borrow::Cow, collections::HashMap, sync::Arc};

use egress_common::{ids::IfIndex, limits::OWN_ADDRESSES, records::POLICY_REFUSED};

use super::{own_addresses::own_addresses, wanted::Wanted};
use crate::{
    config::{OnDeny, UnenforcedInterfaces},
    control::{
        observe::{
            Observed, ObservedPod, exits,
            locations::{Location, PodLocation},
            unlocated::Absence,
        },
        settings::Settings,
    },
    pods::{ObjectsOf, Pod},
    report::Subject,
};
use egress_policy::{Annotations, Compiled, Mode};

/// Why a pod is not under a policy of its own.
const UNKNOWN_OBJECTS: &str = "which policy objects select it is not known, because the API server does not list a kind of them";

/// The decision about one pod.
pub(super) enum Decision {
    /// Put it under this; the text is a problem that exists all the same.
    Enforce(Arc<Wanted>, Option<String>),
    /// Do not enforce it, for now or for good; the text says why where somebody should know.
    Free(Option<String>),
    /// Keep the policy in force, because the wanted one cannot be determined; the text says why, where somebody should
    /// know.
    Keep(Option<String>),
    /// Keep the policy that an earlier agent left in force, because the wanted one cannot be determined; the text says
    /// why.
    KeepLeft(String),
    /// Enforce nobody on its interfaces, because others are enforced there; the text says who. None of them is
    /// released.
    Refuse(String),
    /// Keep the pod on its earlier interfaces, because it cannot be found any more. The text says why. It becomes a
    /// problem only if that lasts: every pod ends like this. The pod gets this version there; without one, its present
    /// version stays.
    KeepUnlocated(Option<Arc<Wanted>>, String),
    /// It cannot be found yet.
    Wait(Absence),
}

/// What should be done with the pod `subject`. `taken` are the interfaces that have their pod already; the pod's own
/// are added if it is to be enforced.
pub(super) fn decide(
    observed: &Observed<'_>,
    settings: &Settings,
    subject: &Subject,
    found: &ObservedPod<'_>,
    taken: &mut HashMap<IfIndex, Subject>,
) -> Decision {
    let pod = &*found.pod;
    let is_enforced = is_enforced(observed, subject, &pod.uid);
    if found.policy.mode == Mode::Off {
        return Decision::Free(None);
    }
    if pod.host_network {
        // Without annotations only `defaultMode` asks for it, as for the agent's own pod.
        let is_asked_for = !(pod.annotations.is_empty() && pod.namespace_annotations.is_empty());
        return Decision::Free(
            is_asked_for
                .then(|| "not enforced: the pod is in the host's network (hostNetwork)".to_owned()),
        );
    }
    if !pod.namespace_known && is_enforced {
        let why = "its namespace is not known; the last good policy stays";
        return Decision::Keep(Some(why.to_owned()));
    }
    let mut notes = Vec::new();
    match pod.objects_of {
        ObjectsOf::Known => {}
        ObjectsOf::UnknownButEnforced if is_left_on_all(observed, subject, found) => {
            let why = "enforced as an earlier agent left it, without DNS";
            return Decision::KeepLeft(format!("{UNKNOWN_OBJECTS}; {why}"));
        }
        ObjectsOf::Unknown | ObjectsOf::UnknownButEnforced => {
            let in_force = observed.enforced.get(subject);
            if is_enforced
                && in_force.is_some_and(|in_force| in_force.wanted.compiled != found.policy)
            {
                let why = format!("{UNKNOWN_OBJECTS}; the last good policy stays");
                return Decision::Keep(Some(why));
            }
            notes.push(format!("{UNKNOWN_OBJECTS}; {}", follows(found.policy.mode)));
        }
    }
    let location = match &found.location {
        Location::Found(location) => location,
        // The pod has ended, and the cluster does not say so yet.
        Location::Nobody { .. } if is_enforced => return Decision::Keep(None),
        // A look for its interfaces may fail for a moment only. A pod can also hide them, in a namespace without a
        // process: edits of its policy take effect all the same.
        Location::NotYet(why) | Location::Nowhere(why)
            if pod.cgroup_uid.is_some() && is_enforced =>
        {
            let wanted = in_place(observed, settings, subject, found);
            let why = format!("{why}; enforced on its earlier interfaces");
            return Decision::KeepUnlocated(wanted, why);
        }
        Location::NotYet(why) => {
            return Decision::Wait(Absence::new(format!("not enforced yet: {why}")));
        }
        Location::Nobody { why, has_group } => {
            return Decision::Wait(Absence {
                why: format!("not enforced yet: {why}"),
                is_empty: *has_group,
            });
        }
        Location::Nowhere(why) => return Decision::Free(Some(why.clone())),
    };
    notes.extend(location.note.clone());
    let is_anothers = |ifindex: &IfIndex| taken.get(ifindex).is_some_and(|other| other != subject);
    let (others, free): (Vec<IfIndex>, Vec<IfIndex>) =
        location.interfaces.iter().partition(|at| is_anothers(at));
    let why = others
        .first()
        .map(|&first| already_anothers(observed, first, taken));
    let location = match why {
        None => Cow::Borrowed(location),
        Some(why) if !free.is_empty() => {
            notes.push(format!("{why}; enforced on its other interfaces"));
            Cow::Owned(PodLocation {
                interfaces: free,
                ..location.clone()
            })
        }
        Some(why) if is_enforced => {
            let why = Some(format!("{why}; enforced on its earlier interface"));
            return match in_place(observed, settings, subject, found) {
                Some(wanted) => Decision::Enforce(wanted, why),
                None => Decision::Keep(why),
            };
        }
        Some(why) => return Decision::Refuse(format!("not enforced: {why}")),
    };
    let location = &*location;
    for &ifindex in &location.interfaces {
        taken.insert(ifindex, subject.clone());
    }
    let mut policy = Arc::clone(&found.policy);
    if let Some((exits, error)) = &found.exits {
        notes.extend(error.clone());
        if !exits.is_empty() {
            // In audit mode nothing is denied, so nothing is refused either.
            let and = match policy.mode {
                Mode::Enforce => settings.config.unenforced_interfaces,
                Mode::Audit | Mode::Off => UnenforcedInterfaces::Report,
            };
            if and == UnenforcedInterfaces::Refuse {
                policy = Arc::new(egress_policy::refused(&observed.policy_settings));
            }
            notes.push(exits::problem(exits, and));
        }
    }
    let owners = &observed.owners;
    let (own, not_own) = own_addresses(settings, owners, subject, pod, location);
    notes.extend(not_own);
    let on_deny = if subject.is_interface() {
        // The program in the pod should try again instead of giving up.
        OnDeny::Drop
    } else {
        settings.config.on_deny
    };
    let wanted = |policy| {
        Arc::new(Wanted::new(
            pod,
            &own,
            location,
            policy,
            on_deny,
            settings.ranges,
        ))
    };
    let count = own.len();
    if count <= OWN_ADDRESSES {
        if own.is_empty() && !subject.is_interface() {
            notes.push(crate::pods::NO_ADDRESS.to_owned());
        }
        let why = (!notes.is_empty()).then(|| notes.join("; "));
        return Decision::Enforce(wanted(policy), why);
    }
    let why = format!(
        "the pod has {count} addresses in status.podIPs; at most {OWN_ADDRESSES} are supported"
    );
    if is_enforced {
        return Decision::Keep(Some(format!("{why}; the last good policy stays")));
    }
    let follows = follows(policy.mode);
    let closed = closed(policy.mode, pod, &observed.policy_settings);
    Decision::Enforce(wanted(closed), Some(format!("{why}; {follows}")))
}

/// The pod's policy where it is enforced now, with the own addresses that it has there. `None` if it is closed there
/// for another reason than its policy: that reason may still hold.
fn in_place(
    observed: &Observed<'_>,
    settings: &Settings,
    subject: &Subject,
    found: &ObservedPod<'_>,
) -> Option<Arc<Wanted>> {
    let in_force = &observed.enforced.get(subject)?.wanted;
    let is_refused = in_force.compiled.record.flags & POLICY_REFUSED != 0;
    if is_refused || found.pod.addresses.len() > OWN_ADDRESSES {
        return None;
    }
    let policy = Arc::clone(&found.policy);
    Some(Arc::new(in_force.under(policy, settings.ranges)))
}

/// Whether this very pod is enforced, and no earlier pod of its name.
fn is_enforced(observed: &Observed<'_>, subject: &Subject, uid: &str) -> bool {
    let in_force = observed.enforced.get(subject);
    in_force.is_some_and(|in_force| in_force.wanted.uid == uid)
}

/// Whether an earlier agent left this very pod enforced on all of its interfaces.
fn is_left_on_all(observed: &Observed<'_>, subject: &Subject, found: &ObservedPod<'_>) -> bool {
    let mut left = observed.left.values();
    let left = left.find(|left| {
        (&*left.namespace, &*left.name) == subject.fields() && left.uid == found.pod.uid
    });
    left.is_some_and(|left| {
        let is_left = |ifindex: &IfIndex| left.interfaces.iter().any(|(at, _)| at == ifindex);
        let mut interfaces = found.location.interfaces().iter();
        interfaces.all(is_left)
    })
}

/// Who has an interface already.
fn already_anothers(
    observed: &Observed<'_>,
    ifindex: IfIndex,
    taken: &HashMap<IfIndex, Subject>,
) -> String {
    let name = observed.interface_names.get(&ifindex);
    let name = name.map_or_else(|| ifindex.to_string(), String::clone);
    match taken.get(&ifindex) {
        Some(pod @ Subject::Pod(_)) => format!("interface {name} is already that of pod {pod}"),
        _ => format!("interface {name} is in quarantine"),
    }
}

/// What happens to a pod's traffic under a closed policy in this mode.
fn follows(mode: Mode) -> &'static str {
    match mode {
        Mode::Enforce => "everything external is denied",
        Mode::Audit | Mode::Off => "everything external would be denied; nothing is stopped",
    }
}

/// A policy that allows nothing external but what ordered rules allow, in this mode.
fn closed(mode: Mode, pod: &Pod, settings: &egress_policy::Settings) -> Arc<Compiled> {
    let none = Annotations::default();
    let namespace = Annotations::from_map(&pod.namespace_annotations);
    let mut closed = egress_policy::unreadable(&none, &namespace, &pod.objects, settings);
    closed.mode = mode;
    Arc::new(closed)
}
