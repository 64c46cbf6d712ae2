//! The part of an explanation that is about Services.

use egress_policy::{EntrySource, Origin, services::About};

/// Why an address of a Service is denied.
pub(super) fn denied_behind(entry: &EntrySource, behind: &About) -> String {
    let service = &behind.service;
    let endpoint = behind.endpoint_entry();
    let EntrySource { text, origin, .. } = entry;
    let leads = format!("it leads to {endpoint}, an endpoint of Service {service}");
    match origin {
        Origin::Service(_) => format!("{leads}, and no entry allows that"),
        Origin::Policy(_) | Origin::Rule(_) => {
            format!("{leads}, which {origin} denies with the entry `{text}`")
        }
        Origin::Pod | Origin::Namespace => {
            format!("{leads}, which the deny entry `{text}` matches")
        }
    }
}
