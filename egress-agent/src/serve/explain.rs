//! Explains whether a pod may reach a target, and which entry or reason decides.
//!
//! The decision comes from the enforcing code. The pod's rules in the gate decide whether a name may be
//! queried. The kernel's maps, read as `from_pod` reads them, and the function that it calls
//! ([`super::reach`]) decide about a new connection. The annotations are read again only to find the place
//! of an entry.

mod entries;
mod grants;
mod services;

use std::collections::BTreeSet;

use egress_common::{
    address::Address,
    protocol::bits,
    reason::Reason,
    records::{Policy, RANGE_INTERNAL, Range, TunnelKey},
    verdict::Destination,
};

use self::{
    entries::{allowing, denying, statuses},
    grants::Grants,
    services::denied_behind,
};
use super::{
    Attached, PodRecord, Sources, StatusSnapshot,
    protocol::{
        AddressExplained, Decision, EntryStatus, Explanation, PortsStatus, QuestionExplained,
    },
    reach::{Ports, Reach},
    status::{find, mode_of, remaining},
};
use crate::{
    datapath::boottime_ns,
    gate::{About, Resolutions},
    report::is_for_lack_of_an_entry,
};
use egress_dns::Name;
use egress_policy::{
    Closer, Compiled, EntrySource, Mode, Origin, QuestionRule,
    annotations::PREFIX,
    explain::{Entries, EntryMatch, List, Target, To},
    prefix::{from_mapped, to_mapped},
};

/// Most addresses of a name that are explained.
const ADDRESSES: usize = 256;
/// How often an explanation starts again because the policy has changed.
const ATTEMPTS: usize = 5;

/// Explains the verdict on packets of a pod to a target.
///
/// # Errors
///
/// When the pod does not exist, or the target or the maps cannot be read.
pub(super) async fn explain(
    sources: &Sources,
    pod: &str,
    target: &str,
) -> Result<Explanation, String> {
    let read = Target::read(target)?;
    for _ in 0..ATTEMPTS {
        let node = sources.published.current().await;
        let (_, state) = find(&node, pod)?;
        let mut explanation = Explanation {
            pod: pod.to_owned(),
            target: target.to_owned(),
            mode: mode_of(state).to_owned(),
            decision: Decision::Unknown,
            because: String::new(),
            reason: None,
            closed_by: Vec::new(),
            entries: Vec::new(),
            ports: Vec::new(),
            question: None,
            addresses: Vec::new(),
            addresses_left_out: 0,
            hint: None,
            problem: state.problem.clone(),
        };
        let (Some(attached), Some(compiled)) = (&state.attached, &state.compiled) else {
            not_judged(state, &mut explanation);
            return Ok(explanation);
        };
        let policy = sources.view.policy(attached.policy);
        // If it is gone, the pod has a newer policy by now.
        let Some(policy) = policy.map_err(|error| format!("{error:#}"))? else {
            continue;
        };
        let inquiry = Inquiry {
            sources,
            attached,
            compiled,
            policy: &policy,
            entries: entries(state, &node),
            grants: grants(state, &node),
            tunnels: sources
                .view
                .tunnels()
                .map_err(|error| format!("{error:#}"))?,
            target: &read,
            now_ns: boottime_ns(),
        };
        let explained = match &read.to {
            To::Name(name) => inquiry.name(name, &mut explanation).await,
            To::Address(address) => inquiry.to_address(address, &mut explanation).await,
        };
        if !sources.published.is_in_force(attached) {
            continue;
        }
        explained.map_err(|error| format!("{error:#}"))?;
        if explanation.decision == Decision::Denied {
            explanation.closed_by = closed_by(compiled, explanation.reason.as_deref());
        }
        if explanation.decision == Decision::Denied && state.mode == Mode::Audit {
            explanation.decision = Decision::WouldDeny;
        }
        return Ok(explanation);
    }
    Err("the pod's policy changes too fast to be explained; try again".to_owned())
}

fn not_judged(state: &PodRecord, explanation: &mut Explanation) {
    if state.host_network {
        "the pod is in the host's network, where no packet is judged"
            .clone_into(&mut explanation.because);
    } else if state.mode == Mode::Off {
        explanation.decision = Decision::Allowed;
        "the mode is off, so no packet is judged".clone_into(&mut explanation.because);
    } else {
        "the pod should be enforced and is not enforced yet".clone_into(&mut explanation.because);
    }
}

/// The entries in effect; `None` if the annotations cannot be read.
fn entries(state: &PodRecord, node: &StatusSnapshot) -> Option<Entries> {
    let settings = node.settings.as_ref()?;
    Entries::read(state.written.inputs(), settings).ok()
}

/// The entries by the list that grants them; `None` if the annotations cannot be read.
fn grants(state: &PodRecord, node: &StatusSnapshot) -> Option<Grants> {
    Grants::read(&state.written, node.settings.as_ref()?).ok()
}

/// The pod and target of one explanation, with what is needed to judge it.
struct Inquiry<'a> {
    sources: &'a Sources,
    attached: &'a Attached,
    compiled: &'a Compiled,
    policy: &'a Policy,
    entries: Option<Entries>,
    grants: Option<Grants>,
    tunnels: Vec<TunnelKey>,
    target: &'a Target,
    now_ns: u64,
}

impl Inquiry<'_> {
    async fn name(&self, name: &Name, explanation: &mut Explanation) -> anyhow::Result<()> {
        let question = self.question(name);
        let may_ask = question.allowed;
        let resolutions = self.resolutions(About::Name(name.clone())).await?;
        let addresses: BTreeSet<Address> = resolutions
            .names
            .iter()
            .flat_map(|resolved| &resolved.addresses)
            .map(|&(address, _)| address)
            .collect();
        explanation.addresses_left_out =
            resolutions.left_out + addresses.len().saturating_sub(ADDRESSES);
        for address in addresses.iter().take(ADDRESSES) {
            let explained = self.address(address).await?;
            explanation.addresses.push(explained);
        }
        let alive = |address: &&AddressExplained| {
            let remaining = address.remaining_seconds.or_else(|| {
                let of = resolutions
                    .names
                    .iter()
                    .flat_map(|resolved| &resolved.addresses);
                of.filter(|(other, _)| from_mapped(other) == address.address)
                    .map(|&(_, expires_ns)| remaining(expires_ns, self.now_ns))
                    .max()
            });
            remaining.is_some_and(|seconds| seconds > 0)
        };
        if !may_ask {
            explanation.decision = Decision::Denied;
            explanation.reason = Some(Reason::DnsName.as_str().to_owned());
            explanation.because.clone_from(&question.because);
            explanation.entries.clone_from(&question.entries);
        } else if explanation.addresses.iter().any(|address| alive(&address)) {
            let of_name: Vec<&AddressExplained> =
                explanation.addresses.iter().filter(alive).collect();
            let chosen = of_name.iter().find(|address| address.allowed);
            let shown = chosen.or(of_name.first()).copied().cloned();
            let reached = of_name.iter().filter(|address| address.allowed).count();
            let all = of_name.len();
            if let Some(shown) = shown {
                explanation.because = if reached == 0 || reached == all {
                    shown.because.clone()
                } else {
                    format!(
                        "{reached} of its {all} addresses may be reached: {}",
                        shown.because
                    )
                };
                explanation.decision = decision(shown.allowed);
                explanation.reason.clone_from(&shown.reason);
                explanation.entries = shown.entries;
                explanation.ports = shown.ports;
            }
        } else {
            self.not_resolved(name, explanation);
        }
        if explanation.decision == Decision::Denied {
            explanation.hint = Some(self.hint(explanation.reason.as_deref(), &explanation.entries));
        }
        explanation.question = Some(question);
        Ok(())
    }

    /// Explains the verdict on an address that the name resolves to and that no other entry or range matches.
    fn not_resolved(&self, name: &Name, explanation: &mut Explanation) {
        let destination = Destination {
            learned: self.compiled.names.classes(name),
            ..Destination::default()
        };
        let reach = self.reach(&destination);
        let matches = self.matches_of_name(name);
        if let Some((reason, _, ports)) = reach.denied {
            explanation.decision = Decision::Denied;
            explanation.reason = Some(reason.as_str().to_owned());
            explanation.because = match reason {
                Reason::AddressNotLearned | Reason::NoRule => {
                    "the name may be queried, but no entry allows its addresses with this protocol and port"
                        .to_owned()
                }
                other => because_denied(other).to_owned(),
            };
            explanation.entries = denying(&matches, reason, ports);
        } else {
            explanation.decision = Decision::Allowed;
            explanation.because = format!(
                "{}; the pod has no live address of it now, and may reach the addresses in its resolver's \
                 responses, unless they are protected or denied themselves",
                self.because_open(&destination, &reach.open)
            );
            explanation.entries = allowing(&destination, &self.tunnels, &matches, &reach.open);
        }
        explanation.ports = self.ports(&reach.open);
    }

    async fn to_address(
        &self,
        address: &Address,
        explanation: &mut Explanation,
    ) -> anyhow::Result<()> {
        let explained = self.address(address).await?;
        explanation.decision = decision(explained.allowed);
        explanation.because.clone_from(&explained.because);
        explanation.reason.clone_from(&explained.reason);
        explanation.entries.clone_from(&explained.entries);
        explanation.ports.clone_from(&explained.ports);
        if !explained.allowed {
            explanation.hint = Some(self.hint(explained.reason.as_deref(), &explained.entries));
        }
        explanation.addresses = vec![explained];
        Ok(())
    }

    /// Explains the verdict on a new connection to an address.
    async fn address(&self, address: &Address) -> anyhow::Result<AddressExplained> {
        let view = &self.sources.view;
        let (destination, expires_ns) =
            view.destination((self.attached.policy, self.policy), address, self.now_ns)?;
        let resolutions = self.resolutions(About::Address(*address)).await?;
        let mut names: Vec<String> = Vec::new();
        let mut matches = self.matches_of_address(address);
        for resolved in &resolutions.names {
            if let Some(name) = &resolved.name {
                names.push(name.to_string());
                if resolved.listed {
                    let of_name = self.matches_of_name(name).into_iter();
                    matches.extend(of_name.filter(|entry| entry.is_name));
                }
            }
        }
        names.sort_unstable();
        names.dedup();
        let mut explained = AddressExplained {
            address: from_mapped(address),
            names,
            remaining_seconds: expires_ns.map(|at| remaining(at, self.now_ns)),
            allowed: true,
            because: String::new(),
            reason: None,
            entries: Vec::new(),
            ports: Vec::new(),
        };
        if self.is_asked(&view.range(address)?) {
            "it is a resolver: queries to it are judged by the names in them"
                .clone_into(&mut explained.because);
            return Ok(explained);
        }
        let reach = self.reach(&destination);
        if let Some((reason, class, ports)) = reach.denied {
            explained.allowed = false;
            explained.reason = Some(reason.as_str().to_owned());
            let decides = self.compiled.deciding_entry(address, class);
            let decides = decides.filter(|_| reason == Reason::DenyRule);
            let at = (ports.protocol, ports.first);
            let behind = decides.and_then(|entry| self.compiled.denied_service(address, at, entry));
            // One ordered rule decides, but of lists every entry is named.
            let mut matches = matches;
            let mut ports = ports;
            if let Some(behind) = behind {
                // The entries are those about the endpoint.
                let (ip, port) = (behind.endpoint.ip(), behind.endpoint.port());
                matches = self.matches_of_address(&to_mapped(ip));
                ports = Ports {
                    first: port,
                    last: port,
                    ..ports
                };
            }
            if let Some(EntrySource {
                origin: rule @ Origin::Rule(_),
                ..
            }) = decides
            {
                matches.retain(|entry| entry.origin == *rule);
            }
            explained.because = match (decides, behind) {
                (Some(entry), Some(behind)) => denied_behind(entry, behind),
                (Some(entry), None) => denied_by(entry),
                (None, _) => because_denied(reason).to_owned(),
            };
            explained.entries = denying(&matches, reason, ports);
        } else {
            explained.because = self.because_open(&destination, &reach.open);
            let behind = reach.open.first().and_then(|ports| {
                let at = (ports.protocol, ports.first);
                self.compiled.opened_service(address, at)
            });
            if let Some(behind) = behind.filter(|_| explained.because == BY_ENTRY) {
                explained.because = format!(
                    "allow entries match all endpoints of Service {}",
                    behind.service
                );
            }
            if explained.because == BY_ENTRY && resolutions.names.iter().any(|of| of.name.is_none())
            {
                explained.because.push_str(
                    "; an earlier agent learned the address, from a name that was not kept",
                );
            }
            explained.entries = allowing(&destination, &self.tunnels, &matches, &reach.open);
        }
        explained.ports = self.ports(&reach.open);
        Ok(explained)
    }

    /// Explains whether the name may be queried.
    fn question(&self, name: &Name) -> QuestionExplained {
        let names = &self.compiled.names;
        let matches = self.matches_of_name(name);
        let of = |list: &[List]| {
            let of = |entry: &&EntryMatch| list.contains(&entry.list);
            statuses(matches.iter().filter(of))
        };
        let walks = self.sources.gate.stats().walks_search_lists.get() != 0;
        match names.question(name, walks) {
            QuestionRule::Denied => QuestionExplained {
                allowed: false,
                because: match names.explain_denied(name) {
                    Some(entry) => denied_by(entry),
                    None => "a deny entry matches it".to_owned(),
                },
                entries: statuses(
                    matches
                        .iter()
                        .filter(|entry| entry.list == List::Deny && entry.is_name),
                ),
            },
            QuestionRule::NotListed => QuestionExplained {
                allowed: false,
                because: if walks && names.is_of_cluster(name) {
                    "the resolver walks search lists, and no entry matches the name that it would query \
                     upstream"
                        .to_owned()
                } else {
                    "no entry matches it, so it may not be queried".to_owned()
                },
                entries: Vec::new(),
            },
            QuestionRule::Allowed => {
                let entries = of(&[List::Allow, List::Resolve]);
                QuestionExplained {
                    allowed: true,
                    because: if entries.is_empty() {
                        "querying it needs no entry".to_owned()
                    } else {
                        "an entry matches it".to_owned()
                    },
                    entries,
                }
            }
        }
    }

    async fn resolutions(&self, about: About) -> anyhow::Result<Resolutions> {
        let resolutions = self
            .sources
            .gate
            .resolutions(self.attached.pod, about)
            .await?;
        Ok(resolutions.unwrap_or_default())
    }

    fn matches_of_address(&self, address: &Address) -> Vec<EntryMatch> {
        self.entries
            .as_ref()
            .map(|entries| entries.matching_address(address))
            .unwrap_or_default()
    }

    fn matches_of_name(&self, name: &Name) -> Vec<EntryMatch> {
        self.entries
            .as_ref()
            .map(|entries| entries.matching_name(name))
            .unwrap_or_default()
    }

    fn reach(&self, destination: &Destination) -> Reach {
        Reach::of(
            self.policy,
            destination,
            &self.tunnels,
            self.target.protocol,
            self.target.port,
        )
    }

    /// Whether packets to the target are queries to a resolver.
    fn is_asked(&self, range: &Range) -> bool {
        let port = self.target.port;
        port.is_some_and(|port| range.is_resolver_at(port))
            && matches!(self.target.protocol, Some(bits::TCP | bits::UDP))
    }

    /// The open ports, unless the target has a port.
    fn ports(&self, open: &[Ports]) -> Vec<PortsStatus> {
        if self.target.port.is_some() {
            return Vec::new();
        }
        open.iter().map(PortsStatus::from).collect()
    }

    fn because_open(&self, destination: &Destination, open: &[Ports]) -> String {
        let by_entry = |ports: &Ports| ports.pass_by_entry(self.policy, destination, &self.tunnels);
        if open.iter().any(by_entry) {
            BY_ENTRY.to_owned()
        } else if destination.ranges & RANGE_INTERNAL != 0 {
            "it is internal (ranges.internal), and internal addresses pass unless denied".to_owned()
        } else {
            "the policy has only deny entries, and none matches it".to_owned()
        }
    }

    fn hint(&self, reason: Option<&str>, entries: &[EntryStatus]) -> String {
        let entry = format!("`{}`", self.target.entry());
        let is_address = matches!(self.target.to, To::Address(_));
        let reason = reason_of(reason);
        if let Some(denying) = entries.iter().find(|entry| entry.annotation == deny_key()) {
            return format!(
                "remove `{}` from {} of the {}, or narrow it",
                denying.entry, denying.annotation, denying.of
            );
        }
        let is_denial = matches!(reason, Some(Reason::DenyRule | Reason::DnsName));
        let mut of_objects = entries.iter();
        if let Some(denying) =
            of_objects.find(|entry| is_denial && entry.annotation.starts_with("spec."))
        {
            return format!(
                "remove `{}` from {} of {}, narrow it, or allow the destination in an earlier rule",
                denying.entry, denying.annotation, denying.of
            );
        }
        let add = |entry: &str| match &self.grants {
            Some(grants) => grants.add(entry, self.target, reason),
            None => format!("add {entry} to {PREFIX}allow"),
        };
        match reason {
            Some(Reason::PolicyUnreadable) => "correct the annotation: see the problem".to_owned(),
            Some(Reason::UnenforcedInterface) => {
                "remove the interface that cannot be enforced: see the problem".to_owned()
            }
            Some(Reason::Expired) => {
                "its TTL has expired: the program has to resolve the name again".to_owned()
            }
            Some(Reason::AddressNotLearned) if is_address => format!(
                "entries with a name allow this port: the pod has to resolve that name with one of \
                 its resolvers; or {}",
                add(&entry)
            ),
            Some(Reason::InternalAnswer) if !is_address => format!(
                "add the name to dns.internalAnswers of the agent's configuration, or {}",
                add("its address")
            ),
            Some(Reason::DnsElsewhere) if !is_address => format!(
                "add the server's address to dns.resolvers of the agent's configuration, or {}",
                add("it")
            ),
            Some(Reason::Protected) if !is_address => {
                "only an entry with its address opens a protected address, never a name".to_owned()
            }
            Some(Reason::Tunnel) if !is_address => {
                "only an entry with its address opens a tunnel to an internal address or to the node, \
                 never a name"
                    .to_owned()
            }
            _ => add(&entry),
        }
    }
}

const BY_ENTRY: &str = "an allow entry matches it";

/// The reason of this name.
fn reason_of(name: Option<&str>) -> Option<Reason> {
    let mut all = Reason::ALL.iter();
    all.find(|known| Some(known.as_str()) == name).copied()
}

/// What closes the pod, if that is why the target is denied.
fn closed_by(compiled: &Compiled, reason: Option<&str>) -> Vec<String> {
    if reason_of(reason).is_some_and(is_for_lack_of_an_entry) {
        compiled.closed_by.iter().map(Closer::to_string).collect()
    } else {
        Vec::new()
    }
}

fn deny_key() -> String {
    format!("{PREFIX}{}", List::Deny.as_str())
}

fn decision(allowed: bool) -> Decision {
    if allowed {
        Decision::Allowed
    } else {
        Decision::Denied
    }
}

fn because_denied(reason: Reason) -> &'static str {
    match reason {
        Reason::PolicyUnreadable => {
            "the annotations cannot be read, so everything external is denied"
        }
        Reason::UnenforcedInterface => {
            "the pod has an interface that cannot be enforced, and is therefore closed \
             (unenforcedInterfaces: refuse)"
        }
        Reason::Protected => "it is protected, and no entry matches it by address",
        Reason::Tunnel => {
            "it is a tunnel (ranges.tunnels) to an internal address or to the node, and no entry matches \
             it by address"
        }
        Reason::Expired => "the TTL of the name that the pod resolved has expired",
        Reason::PortNotAllowed => "entries allow it, but not with this protocol and port",
        Reason::AddressNotLearned => {
            "an entry with a name allows this protocol and port, but the pod has not resolved the \
             address"
        }
        Reason::DenyRule => "a deny entry matches it",
        Reason::InternalAnswer => {
            "an entry with a name allows it, but the address is internal and the name may not resolve to \
             internal addresses (dns.internalAnswers)"
        }
        Reason::DnsElsewhere => {
            "it is a DNS server that is not a resolver, and the policy has names: only an entry with its \
             address opens it"
        }
        _ => "no entry matches it",
    }
}

fn denied_by(entry: &EntrySource) -> String {
    let EntrySource { text, origin, .. } = entry;
    match origin.object() {
        Some(_) => format!("{origin} denies it with the entry `{text}`"),
        None => format!("the deny entry `{text}` matches it"),
    }
}
