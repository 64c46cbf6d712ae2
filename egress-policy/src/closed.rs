//! Who closes a pod, and who sets its mode: for messages, never for a decision.

use super::{Mode, annotations::Lists, error::Origin, objects::ObjectName};

/// Most closers of one pod that are named.
pub const CLOSERS: usize = 8;

/// What closes a pod, so that a destination that no entry allows is denied.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Closer {
    /// Annotations, or a policy object.
    Written(Origin),
    /// The agent's `defaultMode`.
    DefaultMode,
}

impl Closer {
    /// The policy object, if it is one.
    pub fn object(&self) -> Option<&ObjectName> {
        match self {
            Self::Written(origin) => origin.object(),
            Self::DefaultMode => None,
        }
    }
}

/// `pod`, `namespace`, `EgressPolicy shop/web`, `defaultMode`
impl std::fmt::Display for Closer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Written(origin) => origin.fmt(f),
            Self::DefaultMode => f.write_str("defaultMode"),
        }
    }
}

/// What one object says about whether its pods are closed, and in which mode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Spoken {
    pub(super) origin: Origin,
    /// Whether it has an `allow`, or closes its pods as if it had.
    pub(super) allows: bool,
    pub(super) mode: Option<Mode>,
}

/// What closes a pod that these lists do not leave open.
pub(super) fn closers(pod: &Lists, namespace: &Lists) -> Vec<Closer> {
    let all = || namespace.spoken.iter().chain(&pod.spoken);
    let written = |spoken: &Spoken| Closer::Written(spoken.origin.clone());
    let allow: Vec<Closer> = all().filter(|one| one.allows).map(written).collect();
    if !allow.is_empty() {
        return allow;
    }
    // A pod with nothing but a `deny` is closed if it is closed without its own annotations.
    let with_mode: Vec<Closer> = if pod.has_rules() || namespace.has_rules() {
        let of_namespace = namespace.spoken.iter();
        of_namespace
            .filter(|one| one.mode.is_some())
            .map(written)
            .collect()
    } else {
        all()
            .filter(|one| one.mode.is_some())
            .map(written)
            .collect()
    };
    if with_mode.is_empty() {
        vec![Closer::DefaultMode]
    } else {
        with_mode
    }
}

/// Who sets the mode of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModeSource {
    /// These have it as their `mode`.
    Written(Vec<Origin>),
    /// It follows from the lists of these.
    Lists(Vec<Origin>),
    /// It follows from the ordered rules that select the pod.
    OrderedRules,
    /// The agent's `defaultMode`.
    DefaultMode,
}

impl ModeSource {
    /// Who sets this mode, if nothing but these lists does.
    pub(super) fn of(mode: Mode, pod: &Lists, namespace: &Lists) -> Self {
        let all = || namespace.spoken.iter().chain(&pod.spoken);
        let origins = |spoken: &Spoken| spoken.origin.clone();
        let written: Vec<Origin> = all()
            .filter(|one| one.mode == Some(mode))
            .map(origins)
            .collect();
        if !written.is_empty() {
            Self::Written(written)
        } else if pod.has_rules() || namespace.has_rules() {
            Self::Lists(all().map(origins).collect())
        } else {
            Self::DefaultMode
        }
    }
}

/// `mode of the pod`, `lists of the namespace and EgressPolicy shop/web`, `defaultMode`
impl std::fmt::Display for ModeSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Written(origins) => write!(f, "mode of {}", listed(origins)),
            Self::Lists(origins) => write!(f, "lists of {}", listed(origins)),
            Self::OrderedRules => f.write_str("ordered rules"),
            Self::DefaultMode => f.write_str("defaultMode"),
        }
    }
}

/// The first few of many, as a text: `a, b and 3 more`.
pub(super) fn listed<T: std::fmt::Display>(all: &[T]) -> String {
    let shown: Vec<String> = all.iter().take(CLOSERS).map(ToString::to_string).collect();
    match (all.len() - shown.len(), shown.as_slice()) {
        (0, [most @ .., last]) if !most.is_empty() => format!("{} and {last}", most.join(", ")),
        (0, shown) => shown.concat(),
        (more, shown) => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        Annotations, Inputs, PodAnnotations, Settings, compile,
        objects::{NamespacePolicy, ObjectKind, Objects},
        reference::settings,
    };

    fn closers(pod: &Annotations, namespace: &Annotations, of: &Settings) -> Vec<String> {
        let web = |name: &str, allow: Option<Vec<String>>, deny: Option<Vec<String>>| {
            Arc::new(NamespacePolicy {
                name: Arc::new(ObjectName {
                    kind: ObjectKind::EgressPolicy,
                    namespace: Some("shop".to_owned()),
                    name: name.to_owned(),
                }),
                mode: None,
                allow,
                deny,
                resolve: None,
            })
        };
        let mut objects = Objects::default();
        if pod.interface.is_some() {
            objects.namespace = vec![
                web("none", None, None),
                web("only-denies", None, Some(vec!["192.0.2.1".to_owned()])),
                web("web", Some(vec![]), None),
            ];
        }
        let inputs = Inputs {
            pod,
            namespace,
            objects: &objects,
        };
        let compiled = compile(inputs, of).unwrap();
        compiled.closed_by.iter().map(Closer::to_string).collect()
    }

    #[test]
    fn every_object_that_closes_a_pod_is_named() {
        let nothing = Annotations::default();
        let with = |allow: Option<&str>, deny: Option<&str>, mode: Option<&str>| Annotations {
            allow: allow.map(str::to_owned),
            deny: deny.map(str::to_owned),
            mode: mode.map(str::to_owned),
            ..Annotations::default()
        };
        let grant = settings();
        let allow = with(Some("a.test"), None, None);
        assert_eq!(closers(&allow, &nothing, &grant), ["pod"]);
        assert_eq!(closers(&allow, &allow, &grant), ["namespace", "pod"]);
        // A `deny` alone leaves the pod open, and so does nothing.
        assert!(closers(&with(None, Some("192.0.2.1"), None), &nothing, &grant).is_empty());
        assert!(closers(&nothing, &nothing, &grant).is_empty());
        let mode = with(None, None, Some("enforce"));
        assert_eq!(closers(&mode, &nothing, &grant), ["pod"]);
        let by_default = Settings {
            default_mode: Mode::Enforce,
            ..settings()
        };
        assert_eq!(closers(&nothing, &nothing, &by_default), ["defaultMode"]);
        let narrow = Settings {
            pod_annotations: PodAnnotations::Narrow,
            ..by_default
        };
        let deny = with(None, Some("192.0.2.1"), None);
        assert_eq!(closers(&deny, &nothing, &narrow), ["defaultMode"]);
        assert_eq!(closers(&deny, &mode, &narrow), ["namespace"]);
        let selected = Annotations {
            interface: Some("veth".to_owned()),
            ..Annotations::default()
        };
        assert_eq!(
            closers(&selected, &nothing, &grant),
            ["EgressPolicy shop/none", "EgressPolicy shop/web"]
        );
    }

    #[test]
    fn many_are_counted() {
        assert_eq!(listed(&["a"]), "a");
        assert_eq!(listed(&["a", "b"]), "a and b");
        let many: Vec<u8> = (0..10).collect();
        assert_eq!(listed(&many), "0, 1, 2, 3, 4, 5, 6, 7 and 2 more");
    }
}
