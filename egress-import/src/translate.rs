//! The translation of rules to entries.

use std::collections::BTreeMap;

use egress_api::Action;
use egress_policy::{Prefix, check_entry, name_pattern, prefix::to_mapped};

use crate::{
    names::{self, Translated, Verb, Wildcards},
    object::{ClusterRule, Entries, Line},
    remark::Remark,
    rule::{Peer, Ports, Protocol, Rule},
};

/// What rules could not express, so that later rules may let too much through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Barrier {
    /// Everything is expressed.
    #[default]
    None,
    /// Destinations in the cluster are not expressed.
    Addresses,
    /// Anything may be missing.
    All,
}

/// Most pairs of a destination and a port of one rule.
const ENTRIES: usize = 10_000;

/// How rules are translated.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Translator {
    /// Whether a wildcard for one label becomes one for any depth.
    pub(crate) deep: bool,
    /// Whether the written object denies what is in the cluster too, so that a lost peer there matters.
    pub(crate) denies_inside: bool,
}

impl Translator {
    /// The entries of a rule.
    pub(crate) fn entries(self, rule: &Rule) -> (Entries, Barrier) {
        let verb = match rule.action {
            Action::Allow => Verb::Allow,
            Action::Deny => Verb::Deny,
            Action::Pass => Verb::Pass,
        };
        let mut work = Work {
            translator: self,
            verb,
            entries: Entries::default(),
            barrier: Barrier::None,
            offered: false,
        };
        for remark in &rule.remarks {
            work.entries.remark(remark.clone());
        }
        work.conditions(&rule.conditions);
        let ports = work.ports(&rule.ports);
        if rule.peers.len() * ports.len() > ENTRIES {
            let text = format!(
                "it has more than {ENTRIES} pairs of a destination and a port; not written"
            );
            if verb == Verb::Allow {
                work.remark(Remark::left_out(text));
            } else {
                work.refuse(text, Barrier::All);
            }
        } else if verb != Verb::Pass || work.barrier == Barrier::None {
            for peer in &rule.peers {
                work.peer(peer, &ports);
            }
        }
        (work.entries, work.barrier)
    }

    /// The rules of an ordered list. A rule without entries leaves its remarks to the next one.
    ///
    /// `before` is what earlier rules could not express. Returns this with what these rules could not express.
    pub(crate) fn ordered(
        mut self,
        rules: &[Rule],
        before: Barrier,
    ) -> (Vec<ClusterRule>, Barrier) {
        self.denies_inside |= rules.iter().any(Rule::denies_addresses);
        let mut barrier = before;
        let mut written = Vec::new();
        for rule in rules {
            let (mut entries, missing) = self.entries(rule);
            if rule.action == Action::Allow {
                hold_back(&mut entries, barrier);
            }
            barrier = barrier.max(missing);
            written.push(ClusterRule {
                name: rule.name.clone(),
                action: rule.action,
                entries,
            });
        }
        (written, barrier)
    }
}

/// What policies could not express. Policies of different namespaces do not affect each other.
#[derive(Debug, Default)]
pub(crate) struct Barriers {
    cluster: Barrier,
    namespaces: BTreeMap<String, Barrier>,
}

impl Barriers {
    /// What concerns a policy of a namespace, or of the cluster.
    pub(crate) fn of(&self, namespace: Option<&str>) -> Barrier {
        let others = match namespace {
            Some(namespace) => self.namespaces.get(namespace).copied(),
            None => self.namespaces.values().max().copied(),
        };
        self.cluster.max(others.unwrap_or_default())
    }

    /// Notes what a policy of a namespace, or of the cluster, could not express.
    pub(crate) fn add(&mut self, namespace: Option<&str>, barrier: Barrier) {
        let noted = match namespace {
            Some(namespace) => self.namespaces.entry(namespace.to_owned()).or_default(),
            None => &mut self.cluster,
        };
        *noted = barrier.max(*noted);
    }
}

/// Turns entries to comments, if an earlier rule that limits them could not be written.
pub(crate) fn hold_back(entries: &mut Entries, barrier: Barrier) {
    let is_held = |line: &Line| match line {
        Line::Entry { is_name, .. } => match barrier {
            Barrier::None => false,
            Barrier::Addresses => !is_name,
            Barrier::All => true,
        },
        Line::Remark(_) | Line::Offered(_) => false,
    };
    let Some(first) = entries.0.iter().position(is_held) else {
        return;
    };
    for line in &mut entries.0 {
        if is_held(line)
            && let Line::Entry { text, .. } = line
        {
            *line = Line::Offered(std::mem::take(text));
        }
    }
    let remark = Remark::left_out(
        "a rule that was refused may limit the commented entries; write that one first",
    );
    entries.0.insert(first, Line::Remark(remark));
}

/// A rule in translation.
struct Work {
    translator: Translator,
    verb: Verb,
    entries: Entries,
    barrier: Barrier,
    /// Whether entries are only offered.
    offered: bool,
}

impl Work {
    fn remark(&mut self, remark: Remark) {
        self.entries.remark(remark);
    }

    fn refuse(&mut self, text: String, barrier: Barrier) {
        self.barrier = self.barrier.max(barrier);
        self.remark(Remark::refused(text));
    }

    fn conditions(&mut self, conditions: &[String]) {
        if conditions.is_empty() {
            return;
        }
        let what = conditions.join("; ");
        match self.verb {
            Verb::Allow => {
                self.offered = true;
                self.remark(Remark::left_out(format!(
                    "{what}: no counterpart; the commented entries would allow more"
                )));
            }
            Verb::Deny => self.remark(Remark::note(format!(
                "{what}: no counterpart, so the deny is wider"
            ))),
            Verb::Pass => self.refuse(
                format!("{what}: no counterpart, so the Pass rule is not written"),
                Barrier::All,
            ),
        }
    }

    fn ports(&mut self, ports: &[Ports]) -> Vec<(Protocol, Option<(u16, u16)>)> {
        if ports.is_empty() {
            return vec![(Protocol::All, None)];
        }
        let mut read = Vec::new();
        for port in ports {
            match port {
                Ports::Of { protocol, range } => read.push((*protocol, *range)),
                Ports::Unsupported { what, widest } => match self.verb {
                    Verb::Allow => self.remark(Remark::left_out(what.clone())),
                    Verb::Deny => {
                        self.remark(Remark::note(format!("{what}; the deny is for every port")));
                        read.push((*widest, None));
                    }
                    Verb::Pass => self.refuse(what.clone(), Barrier::All),
                },
            }
        }
        read
    }

    fn peer(&mut self, peer: &Peer, ports: &[(Protocol, Option<(u16, u16)>)]) {
        match peer {
            Peer::Anywhere => self.destination("*", None, ports),
            Peer::World => {
                self.remark(Remark::note(match self.verb {
                    Verb::Allow => {
                        "`*` is every address but protected ones, also in the cluster; only with \
                         `ranges.allowInternal: false` that is more than without the entry"
                    }
                    Verb::Deny | Verb::Pass => "`*` is every address, also in the cluster",
                }));
                self.destination("*", None, ports);
            }
            Peer::Prefixes { shown, prefixes } => {
                if shown.contains(" except ") {
                    self.remark(Remark::note(format!(
                        "{shown}: as the prefixes that remain"
                    )));
                }
                for prefix in prefixes {
                    self.prefix(prefix, ports);
                }
            }
            Peer::Name { text, wildcards } => self.name(text, *wildcards, ports),
            Peer::Set(name) => self.destination(&format!("@{name}"), None, ports),
            Peer::Cluster(what) => self.cluster(what),
            Peer::Dns(what) if self.verb == Verb::Allow => self.remark(Remark::note(format!(
                "DNS at {what}: queries to the cluster's resolvers need no entry"
            ))),
            Peer::Dns(what) => self.cluster(&format!("DNS at {what}")),
            Peer::Unsupported(what) => match self.verb {
                Verb::Allow => self.remark(Remark::left_out(what.clone())),
                Verb::Deny | Verb::Pass => self.refuse(what.clone(), Barrier::All),
            },
        }
    }

    fn cluster(&mut self, what: &str) {
        match self.verb {
            Verb::Allow if self.translator.denies_inside => self.remark(Remark::left_out(format!(
                "{what}: no entry selects pods or Services; allow the cluster's ranges instead"
            ))),
            Verb::Allow => self.remark(Remark::note(format!(
                "{what}: traffic within the cluster needs no entry (unless `ranges.allowInternal: false`)"
            ))),
            Verb::Deny | Verb::Pass => self.refuse(
                format!("{what}: no entry selects pods or Services; keep a NetworkPolicy for it"),
                Barrier::Addresses,
            ),
        }
    }

    fn prefix(&mut self, prefix: &Prefix, ports: &[(Protocol, Option<(u16, u16)>)]) {
        let metadata = to_mapped([169, 254, 169, 254].into());
        if self.verb == Verb::Allow && prefix.contains(&metadata) {
            self.remark(Remark::note(format!(
                "{prefix} has protected addresses, such as the clouds' metadata service; as an address entry it \
                 opens them, as the original does"
            )));
        }
        self.destination(&prefix.to_string(), Some(prefix.is_v4()), ports);
    }

    fn name(&mut self, text: &str, wildcards: Wildcards, ports: &[(Protocol, Option<(u16, u16)>)]) {
        let mut translated = names::translate(text, wildcards, self.verb, self.translator.deep);
        // An entry may be more than a name, such as an address, and the original is not.
        let error = |name: &String| match name.as_str() {
            "*" => None,
            name => name_pattern(name).err(),
        };
        if let Some(error) = translated.names.iter().find_map(error) {
            translated = Translated {
                left_out: Some(format!("`{text}` is no name: {error}")),
                ..Translated::default()
            };
        }
        if let Some(note) = translated.note {
            self.remark(Remark::note(note));
        }
        if let Some(reason) = translated.left_out {
            match self.verb {
                Verb::Allow => {
                    self.remark(Remark::left_out(reason));
                    if let Some(wider) = translated.wider {
                        self.offer(&wider, ports);
                    }
                }
                Verb::Deny | Verb::Pass => self.refuse(reason, Barrier::All),
            }
        }
        if self.verb == Verb::Deny && !translated.names.is_empty() {
            if ports.iter().any(|port| *port != (Protocol::All, None)) {
                self.remark(Remark::note(
                    "a denied name takes no port: the query for it is refused, which concerns every port",
                ));
            }
            self.remark(Remark::note(
                "a denied name is not resolved; an address that a program knows already is not denied by it",
            ));
        }
        for name in &translated.names {
            if self.verb == Verb::Deny {
                self.write(name, name != "*");
            } else {
                self.destination(name, None, ports);
            }
        }
    }

    /// Adds an entry for each port. `v4` is set for addresses.
    fn destination(
        &mut self,
        text: &str,
        v4: Option<bool>,
        ports: &[(Protocol, Option<(u16, u16)>)],
    ) {
        let is_name = v4.is_none() && text != "*" && !text.starts_with('@');
        for (protocol, range) in ports {
            for suffix in self.suffixes(*protocol, *range, v4) {
                self.write(&entry(text, &suffix), is_name);
            }
        }
    }

    fn offer(&mut self, text: &str, ports: &[(Protocol, Option<(u16, u16)>)]) {
        for (protocol, range) in ports {
            for suffix in self.suffixes(*protocol, *range, None) {
                self.entries.add(Line::Offered(entry(text, &suffix)));
            }
        }
    }

    fn suffixes(
        &mut self,
        protocol: Protocol,
        range: Option<(u16, u16)>,
        v4: Option<bool>,
    ) -> Vec<String> {
        let ports = match range {
            None => String::new(),
            Some((min, max)) if min == max => format!(":{min}"),
            Some((min, max)) => format!(":{min}-{max}"),
        };
        let word = match protocol {
            Protocol::All => {
                if range.is_none() {
                    if self.verb == Verb::Allow {
                        self.remark(Remark::note(
                            "every protocol there; an entry without one is TCP, UDP and ping here",
                        ));
                    }
                    return vec![String::new()];
                }
                if self.verb == Verb::Allow {
                    return vec![ports];
                }
                return vec![ports.clone(), format!("{ports}/sctp")];
            }
            Protocol::Tcp => "tcp".to_owned(),
            Protocol::Udp => "udp".to_owned(),
            Protocol::Sctp => "sctp".to_owned(),
            Protocol::Number(number) => {
                if range.is_none() {
                    return vec![format!("/ip-{number}")];
                }
                let what =
                    format!("ports of protocol {number}: an entry with this protocol has none");
                match self.verb {
                    Verb::Allow => self.remark(Remark::left_out(what)),
                    Verb::Deny => {
                        self.remark(Remark::note(format!("{what}; the deny is for all of it")));
                        return vec![format!("/ip-{number}")];
                    }
                    Verb::Pass => self.refuse(what, Barrier::All),
                }
                return Vec::new();
            }
            Protocol::Icmp {
                v4: in_v4,
                v6: in_v6,
            } => {
                let exact = match v4 {
                    Some(true) if in_v4 => true,
                    Some(false) if in_v6 => true,
                    // A packet to this family never has the protocol.
                    Some(_) => return Vec::new(),
                    None => in_v4 && in_v6,
                };
                if !exact {
                    match self.verb {
                        Verb::Allow => {
                            self.remark(Remark::left_out(
                                "ICMP of one IP version: `/icmp` is ICMP and ICMPv6",
                            ));
                            return Vec::new();
                        }
                        Verb::Deny => self.remark(Remark::note(
                            "ICMP of one IP version: the deny is for ICMP and ICMPv6",
                        )),
                        Verb::Pass => {
                            self.refuse(
                                "ICMP of one IP version: `/icmp` is ICMP and ICMPv6".to_owned(),
                                Barrier::All,
                            );
                            return Vec::new();
                        }
                    }
                }
                "icmp".to_owned()
            }
        };
        vec![format!("{ports}/{word}")]
    }

    /// Adds an entry, if the grammar admits it.
    fn write(&mut self, text: &str, is_name: bool) {
        // The grammar of a set's use is that of any other destination.
        let checked = match text.strip_prefix('@') {
            Some(rest) => format!("*{}", rest.find([':', '/']).map_or("", |at| &rest[at..])),
            None => text.to_owned(),
        };
        if let Err(error) = check_entry(&checked) {
            match self.verb {
                Verb::Allow => self.remark(Remark::left_out(format!("{text}: {error}"))),
                Verb::Deny | Verb::Pass => self.refuse(format!("{text}: {error}"), Barrier::All),
            }
            return;
        }
        self.entries.add(if self.offered {
            Line::Offered(text.to_owned())
        } else {
            Line::Entry {
                text: text.to_owned(),
                is_name,
            }
        });
    }
}

/// A destination with its ports and protocol.
fn entry(destination: &str, suffix: &str) -> String {
    if destination.contains(':') && suffix.starts_with(':') {
        format!("[{destination}]{suffix}")
    } else {
        format!("{destination}{suffix}")
    }
}
