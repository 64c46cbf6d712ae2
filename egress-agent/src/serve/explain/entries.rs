//! The entries that an explanation names.

use egress_common::{reason::Reason, records::TunnelKey, verdict::Destination};
use egress_policy::{
    Origin,
    annotations::PREFIX,
    explain::{EntryMatch, List},
};

use crate::serve::{protocol::EntryStatus, reach::Ports};

/// The entries that allow the open ports.
pub(super) fn allowing(
    destination: &Destination,
    tunnels: &[TunnelKey],
    matches: &[EntryMatch],
    open: &[Ports],
) -> Vec<EntryStatus> {
    let needs_address = |ports: &Ports| ports.of(destination, tunnels).needs_address_entry();
    let by_address = !open.is_empty() && open.iter().all(needs_address);
    let counts = |entry: &&EntryMatch| {
        entry.list == List::Allow
            && !(entry.is_name && (destination.expired != 0 || by_address))
            && !(entry.is_any && by_address)
            && open
                .iter()
                .any(|&ports| entry.covers_any_port(ports.protocol, ports.first..=ports.last))
    };
    statuses(matches.iter().filter(counts))
}

/// The entries that concern the denied packets.
pub(super) fn denying(matches: &[EntryMatch], reason: Reason, ports: Ports) -> Vec<EntryStatus> {
    let counts = |entry: &&EntryMatch| match reason {
        Reason::DenyRule => {
            entry.list == List::Deny
                && entry.covers_any_port(ports.protocol, ports.first..=ports.last)
        }
        Reason::PortNotAllowed => entry.list == List::Allow,
        Reason::Expired | Reason::InternalAnswer => {
            entry.list == List::Allow
                && entry.is_name
                && entry.covers_any_port(ports.protocol, ports.first..=ports.last)
        }
        _ => false,
    };
    statuses(matches.iter().filter(counts))
}

/// The entries as the answer has them, each once.
pub(super) fn statuses<'a>(matches: impl Iterator<Item = &'a EntryMatch>) -> Vec<EntryStatus> {
    let mut statuses: Vec<EntryStatus> = Vec::new();
    for entry in matches {
        let status = EntryStatus {
            of: entry.origin.to_string(),
            annotation: match &entry.origin {
                Origin::Pod | Origin::Namespace => format!("{PREFIX}{}", entry.list.as_str()),
                Origin::Policy(_) => format!("spec.{}", entry.list.as_str()),
                Origin::Rule(rule) => format!("spec.rules[{}].entries", rule.index),
                Origin::Service(_) => "endpoints".to_owned(),
            },
            entry: entry.text.clone(),
            line: entry.at.line,
            column: entry.at.column,
        };
        if !statuses.contains(&status) {
            statuses.push(status);
        }
    }
    statuses
}
