//! The state of the agent and of each pod.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use egress_common::{ids::IfIndex, reason::Reason};

use super::{
    PodRecord, Sources, StatusSnapshot, health,
    protocol::{
        AddressStatus, AgentStatus, ExistingStatus, InterfaceStatus, PodStatus, PolicyStatus,
        ProblemStatus, ResolvedStatus, ResolverStatus, Status, UnenforcedStatus,
    },
};
use crate::{
    datapath::boottime_ns,
    gate::{About, Resolutions},
    host::interface_name,
    pods::PolicyState,
    report::{DenialCounts, Subject, log, rfc3339},
};
use egress_policy::{Mode, prefix::from_mapped};

/// Most addresses of all pods together in one response.
const ADDRESSES: usize = 20_000;

/// The state of all pods, or of one; `names` requests their resolved names too.
///
/// # Errors
///
/// When the pod does not exist.
pub(super) async fn status(
    sources: &Sources,
    pod: Option<&str>,
    names: bool,
) -> Result<Status, String> {
    let node = sources.published.current().await;
    let one = pod.map(|pod| find(&node, pod)).transpose()?;
    let mut pods = Vec::new();
    let mut room = ADDRESSES;
    let mut names_left_out_of = 0;
    for (key, state) in &node.pods {
        if one.is_some_and(|(one, _)| one != key) {
            continue;
        }
        let resolutions = match &state.attached {
            Some(attached) => sources.gate.resolutions(attached.pod, About::All).await,
            None => Ok(None),
        };
        let resolutions = resolutions
            .map_err(|error| format!("{error:#}"))?
            .unwrap_or_default();
        let mut names = names;
        if names && one.is_none() {
            match room.checked_sub(resolutions.addresses) {
                Some(rest) => room = rest,
                None => {
                    names = false;
                    names_left_out_of += 1;
                }
            }
        }
        pods.push(pod_status(key, state, resolutions, names));
    }
    Ok(Status {
        agent: agent(sources, &node),
        resolvers: node
            .resolvers
            .iter()
            .map(|(resolver, source)| ResolverStatus {
                address: resolver.address,
                port: resolver.port,
                source: source.clone(),
            })
            .collect(),
        problems: node
            .problems
            .iter()
            .map(|(about, message)| ProblemStatus {
                about: about.clone(),
                message: message.clone(),
            })
            .collect(),
        losses: losses(sources).map_err(|error| format!("{error:#}"))?,
        policies: node.policies.iter().map(policy_status).collect(),
        pods,
        names_left_out_of,
    })
}

/// Finds a pod by `namespace/pod`.
pub(super) fn find<'a>(
    node: &'a StatusSnapshot,
    pod: &str,
) -> Result<(&'a Subject, &'a Arc<PodRecord>), String> {
    let key = pod
        .split_once('/')
        .map(|(namespace, name)| Subject::from_fields(namespace, name))
        .ok_or_else(|| format!("`{pod}` is not a pod: expected namespace/pod"))?;
    node.pods.get_key_value(&key).ok_or_else(|| {
        format!("there is no pod {pod} on this node, as far as this node's agent knows")
    })
}

/// A pod's mode or state, as one word.
pub(super) fn mode_of(pod: &PodRecord) -> &'static str {
    if pod.host_network {
        "host_network"
    } else if pod.is_missing() {
        "missing"
    } else if pod.quarantined {
        "quarantined"
    } else if pod.is_waiting() {
        "waiting"
    } else if pod.mode == Mode::Enforce && !pod.exits.is_empty() {
        "partly_enforced"
    } else {
        pod.mode.as_str()
    }
}

fn agent(sources: &Sources, node: &StatusSnapshot) -> AgentStatus {
    let (unhealthy, not_ready) = (health::unwell(sources), health::unready(sources));
    AgentStatus {
        node: sources.node.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        hook: sources.hook.to_owned(),
        started: time(sources.published.began()),
        uptime_seconds: sources.published.uptime().as_secs(),
        healthy: unhealthy.is_empty(),
        unhealthy,
        ready: not_ready.is_empty(),
        not_ready,
        pods_known: sources.published.last_reconciled().is_some() && !node.incomplete,
        existing_connections: ExistingStatus {
            outbound: if node.trusted { "trusted" } else { "judged" }.to_owned(),
            because: node.trust.clone(),
            inbound_kept: node.existing.inbound,
            inbound_judged: node.existing.unconfirmed,
            outbound_trusted: node.existing.trusted,
        },
    }
}

/// The counters of everything that can be lost.
fn losses(sources: &Sources) -> anyhow::Result<BTreeMap<String, u64>> {
    let kernel = sources.counters.counters()?;
    let stats = sources.gate.stats();
    let mut losses: BTreeMap<String, u64> = [
        ("held_lost", kernel.held_lost),
        ("held_limited", kernel.held_limited),
        ("held_too_long", kernel.held_too_long),
        ("rejects_lost", kernel.rejects_lost),
        ("denials_limited", kernel.denials_limited),
        ("denials_lost", kernel.denials_lost),
        ("flows_full", kernel.flows_full),
        ("openings_evicted", kernel.openings_evicted),
        (
            "flows_evicted",
            kernel.flows_evicted + sources.published.flows_evicted.get(),
        ),
        ("no_policy", kernel.no_policy),
        ("dns_segments_damaged", stats.segments_damaged.get()),
        ("dns_fragments_late", stats.fragments_late.get()),
        ("dns_unclaimed", stats.unclaimed.get()),
        ("dns_stale", stats.stale.get()),
        ("dns_backlog_full", stats.backlog_full.get()),
        ("frames_unsent", stats.unsent.get()),
        ("names_not_kept", stats.names_not_kept.get()),
        ("notes_without_room", stats.notes_without_room.get()),
        ("log_lines_lost", log::lost_lines()),
    ]
    .map(|(what, count)| (what.to_owned(), count))
    .into();
    for (why, count) in sources.reporter.lost().by_why() {
        losses.insert(format!("unreported_{why}"), count);
    }
    Ok(losses)
}

fn pod_status(
    subject: &Subject,
    state: &PodRecord,
    resolutions: Resolutions,
    names: bool,
) -> PodStatus {
    let (namespace, pod) = subject.fields();
    let attached = state.attached.as_ref();
    let identity = attached.and(state.identity.as_ref());
    let counts = identity.map(|identity| &identity.counts);
    let last_denial = identity
        .and_then(|identity| identity.last_line())
        .and_then(|line| serde_json::from_str(&line).ok());
    PodStatus {
        namespace: namespace.to_owned(),
        pod: pod.to_owned(),
        uid: state.uid.clone(),
        mode: match mode_of(state) {
            "missing" | "waiting" if state.quarantined => "quarantined",
            "missing" | "waiting" => state.mode.as_str(),
            other => other,
        }
        .to_owned(),
        enforced: attached.is_some_and(|attached| !attached.bypassed),
        interfaces: attached.map_or_else(Vec::new, |attached| {
            attached
                .interfaces
                .iter()
                .map(|&at| interface(at))
                .collect()
        }),
        unenforced_interfaces: state
            .exits
            .named
            .iter()
            .map(|exit| UnenforcedStatus {
                name: exit.name.clone(),
                kind: exit.kind.clone(),
                leads_to: exit.to.as_str().to_owned(),
            })
            .collect(),
        applied: attached.map(|attached| time(attached.since)),
        policy_version: attached.map(|attached| attached.version),
        names: resolutions
            .names
            .iter()
            .filter(|resolved| resolved.listed && resolved.name.is_some())
            .count(),
        addresses: resolutions.addresses,
        denied: counts
            .map(|counts| by_reason(counts.denied()))
            .unwrap_or_default(),
        would_deny: counts
            .map(|counts| by_reason(counts.audited()))
            .unwrap_or_default(),
        denials_unreported: counts.map_or(0, DenialCounts::unreported),
        last_denial,
        problem: state.problem.clone(),
        resolved_left_out: resolutions.left_out,
        resolved: names.then(|| resolved(resolutions)),
    }
}

fn policy_status(state: &PolicyState) -> PolicyStatus {
    PolicyStatus {
        kind: state.name.kind.as_str().to_owned(),
        namespace: state.name.namespace.clone(),
        name: state.name.name.clone(),
        generation: state.generation,
        applied_generation: state.applied,
        selected: state.selected,
        enforced: state.enforced,
        applied: state.is_applied(),
        problem: state.problem.clone(),
    }
}

fn interface(ifindex: IfIndex) -> InterfaceStatus {
    InterfaceStatus {
        index: ifindex.get(),
        name: interface_name(ifindex),
    }
}

fn by_reason(counts: impl Iterator<Item = (Reason, u64)>) -> BTreeMap<String, u64> {
    counts
        .map(|(reason, count)| (reason.as_str().to_owned(), count))
        .collect()
}

fn resolved(resolutions: Resolutions) -> Vec<ResolvedStatus> {
    let now_ns = boottime_ns();
    let mut all: Vec<ResolvedStatus> = resolutions
        .names
        .into_iter()
        .map(|resolved| {
            let mut addresses: Vec<AddressStatus> = resolved
                .addresses
                .iter()
                .map(|(address, expires_ns)| AddressStatus {
                    address: from_mapped(address),
                    remaining_seconds: remaining(*expires_ns, now_ns),
                })
                .collect();
            addresses.sort_by_key(|address| address.address);
            ResolvedStatus {
                name: resolved.name.map(|name| name.to_string()),
                listed: resolved.listed,
                addresses,
            }
        })
        .collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

/// The remaining seconds of a TTL, rounded up; 0 is expired.
pub(super) fn remaining(expires_ns: u64, now_ns: u64) -> u64 {
    expires_ns.saturating_sub(now_ns).div_ceil(1_000_000_000)
}

fn time(time: SystemTime) -> String {
    rfc3339(time).unwrap_or_else(|error| error.to_string())
}
