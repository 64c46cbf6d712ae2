//! The policy that denied a packet, as denial lines and metrics name it.

use std::borrow::Cow;

use egress_common::reason::Reason;
use egress_policy::{Closer, EntrySource, Origin, objects::ObjectName};
use serde::Serialize;

use super::{Denied, PodIdentity};

/// The kind that lines and metrics give to decisions of the agent's configuration.
const CONFIGURATION: &str = "Configuration";

/// The policy that denied a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DecidedBy<'a> {
    /// The kind of object; `Pod` or `Namespace` for annotations, `Configuration` for the agent's, `Service` where no
    /// entry allows an endpoint of one.
    pub kind: &'static str,
    /// Its namespace, if the kind has one.
    pub namespace: Option<&'a str>,
    /// Its name; a key of the configuration.
    pub name: &'a str,
    /// The rule's name, or its number from 1; none for an object without ordered rules.
    pub rule: Option<Cow<'a, str>>,
    /// The entry that matched; none if a list lacks one.
    pub entry: Option<&'a str>,
}

impl<'a> DecidedBy<'a> {
    /// The policy that decided; `None` if the packet was not denied by a policy. If several close the pod together,
    /// this is the first.
    pub fn of(denied: &'a Denied) -> Option<Self> {
        if let Some(EntrySource { text, origin, .. }) = &denied.rule {
            return Some(Self {
                entry: Some(text),
                ..Self::of_origin(origin, &denied.pod)
            });
        }
        if is_for_lack_of_an_entry(denied.reason) {
            return denied
                .closed_by
                .first()
                .map(|closer| Self::of_closer(closer, &denied.pod));
        }
        match denied.reason {
            Reason::Protected => Some(Self::of_configuration("ranges.protected")),
            Reason::Tunnel => Some(Self::of_configuration("ranges.tunnels")),
            Reason::UnenforcedInterface => Some(Self::of_configuration("unenforcedInterfaces")),
            _ => None,
        }
    }

    /// All that close the pod, if the packet was denied because no entry allows it.
    pub(super) fn closers(denied: &'a Denied) -> Vec<Self> {
        if denied.rule.is_some() || !is_for_lack_of_an_entry(denied.reason) {
            return Vec::new();
        }
        let closers = denied.closed_by.iter();
        closers
            .map(|closer| Self::of_closer(closer, &denied.pod))
            .collect()
    }

    fn of_closer(closer: &'a Closer, pod: &'a PodIdentity) -> Self {
        match closer {
            Closer::Written(origin) => Self::of_origin(origin, pod),
            Closer::DefaultMode => Self::of_configuration("defaultMode"),
        }
    }

    fn of_configuration(key: &'static str) -> Self {
        Self {
            kind: CONFIGURATION,
            namespace: None,
            name: key,
            rule: None,
            entry: None,
        }
    }

    fn of_origin(origin: &'a Origin, pod: &'a PodIdentity) -> Self {
        let rule = match origin {
            Origin::Rule(rule) => Some(match &rule.name {
                Some(name) => Cow::Borrowed(name.as_str()),
                None => Cow::Owned((rule.index + 1).to_string()),
            }),
            _ => None,
        };
        let of_object = |object: &'a ObjectName| {
            let namespace = object.namespace.as_deref();
            (object.kind.as_str(), namespace, object.name.as_str())
        };
        let (kind, namespace, name) = match origin {
            Origin::Policy(object) => of_object(object),
            Origin::Rule(rule) => of_object(&rule.object),
            Origin::Service(service) => ("Service", Some(&*service.namespace), &*service.name),
            Origin::Pod => ("Pod", Some(&*pod.namespace), &*pod.name),
            Origin::Namespace => ("Namespace", None, &*pod.namespace),
        };
        Self {
            kind,
            namespace,
            name,
            rule,
            entry: None,
        }
    }
}

/// Whether a packet is denied for this reason because the pod is closed and no entry that can be read allows the
/// packet.
pub fn is_for_lack_of_an_entry(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::NoRule
            | Reason::PortNotAllowed
            | Reason::AddressNotLearned
            | Reason::Expired
            | Reason::InternalAnswer
            | Reason::DnsName
            | Reason::DnsElsewhere
            | Reason::PolicyUnreadable
    )
}
