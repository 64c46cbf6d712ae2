//! Rules that stand for the endpoints of Services.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use egress_common::{
    address::Address,
    classes::ClassSet,
    limits::CIDR_ENTRIES,
    protocol::bits,
    records::{Policy, PortClass},
};

use super::{
    ServiceName, Services, Transport,
    coarse::{Room, close, greedy},
};
use crate::{
    PolicyError, Settings,
    classes::{Action, Classes, with_actions},
    compile::{Cidr, Compiled, EntrySource, Source, build, deciding, unreadable_tiers},
    effective::Rule,
    entry::Destination,
    error::PREFIXES,
    limits::check_limit,
    objects::TierAction,
    prefix::{Prefix, inherit},
    tiers::{Effect, Run, Tiers},
};

/// How many namespaces a text names.
const NAMED: usize = 4;

/// Every packet.
pub(crate) const EVERYTHING: PortClass = PortClass {
    port_min: 0,
    port_max: u16::MAX,
    protocols: bits::ALL,
    ..PortClass::NONE
};

/// The place of an added rule among those of the policy. A class is a number in the policy without added rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Place {
    /// Before the rules that this class is of.
    Before(u8),
    /// Among the rules that this class is of.
    At(u8),
    /// After all rules.
    Last,
}

/// Kinds of addresses of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Of {
    /// A cluster IP.
    ClusterIp,
    /// An address that the author of the Service may choose.
    External,
    /// The addresses of nodes.
    NodePort,
}

/// A rule that is added for the endpoints of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Added {
    /// The addresses of the Service, or those with its node ports.
    pub(crate) to: Vec<Prefix>,
    pub(crate) class: PortClass,
    pub(crate) place: Place,
    pub(crate) is_denial: bool,
    /// Which addresses they are.
    pub(crate) of: Of,
    /// The entry that decides about the endpoint.
    pub(crate) source: EntrySource,
    /// The Service and the endpoint for which it stands.
    pub(crate) about: Arc<About>,
}

/// The Service for which a rule is added, and the endpoint that decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// The Service.
    pub service: Arc<ServiceName>,
    /// The endpoint.
    pub endpoint: SocketAddr,
    /// The protocol.
    pub transport: Transport,
}

impl About {
    /// The endpoint as an entry: `203.0.113.9:25/tcp`.
    pub fn endpoint_entry(&self) -> String {
        format!("{}/{}", self.endpoint, self.transport.as_str())
    }
}

impl Added {
    fn rules(&self, under_any: bool) -> impl Iterator<Item = Rule> {
        let destinations = self.to.iter().copied().map(Destination::Addresses);
        destinations.map(move |destination| Rule {
            destination,
            class: self.class,
            under_any,
            text: self.source.text.to_string(),
            at: self.source.at,
            origin: self.source.origin.clone(),
        })
    }

    pub(super) fn namespace(&self) -> &str {
        &self.about.service.namespace
    }

    fn concerns(&self, address: &Address, (protocol, port): (u8, u16)) -> bool {
        let PortClass {
            port_min,
            port_max,
            protocols,
            ..
        } = self.class;
        let is_there = self.to.iter().any(|prefix| prefix.contains(address));
        is_there && protocols & protocol != 0 && (port_min..=port_max).contains(&port)
    }
}

/// How far runs of ordered rules have moved back.
pub(crate) struct Moved {
    admin: BTreeSet<usize>,
    baseline: BTreeSet<usize>,
}

impl Moved {
    /// The action that rules with this one have now.
    pub(crate) fn action(&self, action: Action) -> Action {
        let place = |inserted: &BTreeSet<usize>, run| run + inserted.range(..=run).count();
        match action {
            Action::Admin(run, effect) => Action::Admin(place(&self.admin, run), effect),
            Action::Baseline(run, effect) => Action::Baseline(place(&self.baseline, run), effect),
            other @ (Action::Deny | Action::Allow | Action::AllowUnderAny) => other,
        }
    }
}

/// Puts the rules at their places. `classes` are those of the policy without them.
pub(crate) fn insert(
    added: &[Added],
    classes: &Classes,
    tiers: &mut Tiers,
    allow: &mut Vec<Rule>,
    deny: &mut Vec<Rule>,
) -> Moved {
    let mut before_admin = Inserted::default();
    let mut before_baseline = Inserted::default();
    let mut last: Vec<Rule> = Vec::new();
    for one in added {
        let (is_before, class) = match one.place {
            Place::Before(class) => (true, Some(class)),
            Place::At(class) => (false, Some(class)),
            Place::Last => (false, None),
        };
        let action = class.and_then(|class| classes.action(class));
        match action {
            Some(Action::Admin(run, _)) if is_before => before_admin.add(run, one),
            Some(Action::Admin(run, _)) => tiers.admin[run].rules.extend(one.rules(false)),
            Some(Action::Baseline(run, _)) if is_before => before_baseline.add(run, one),
            Some(Action::Baseline(run, _)) => tiers.baseline[run].rules.extend(one.rules(false)),
            Some(Action::Allow) if !one.is_denial => allow.extend(one.rules(false)),
            Some(Action::AllowUnderAny) if !one.is_denial => allow.extend(one.rules(true)),
            Some(Action::Deny | Action::Allow | Action::AllowUnderAny) => {
                deny.extend(one.rules(false));
            }
            None if is_before => deny.extend(one.rules(false)),
            None => last.extend(one.rules(false)),
        }
    }
    let moved = Moved {
        admin: before_admin.0.keys().copied().collect(),
        baseline: before_baseline.0.keys().copied().collect(),
    };
    before_admin.into_runs(&mut tiers.admin);
    before_baseline.into_runs(&mut tiers.baseline);
    if !last.is_empty() {
        tiers.baseline.push(denying(last));
    }
    moved
}

/// Connections that the pod opens are denied, and no reply.
fn denying(rules: Vec<Rule>) -> Run {
    Run {
        effect: Effect {
            action: TierAction::Deny,
            spares_answers: true,
        },
        rules,
    }
}

/// Rules before the runs of a tier with these numbers.
#[derive(Default)]
struct Inserted(BTreeMap<usize, Vec<Rule>>);

impl Inserted {
    fn add(&mut self, run: usize, added: &Added) {
        self.0.entry(run).or_default().extend(added.rules(false));
    }

    fn into_runs(self, runs: &mut Vec<Run>) {
        for (at, rules) in self.0.into_iter().rev() {
            runs.insert(at, denying(rules));
        }
    }
}

fn listed(namespaces: &BTreeSet<&str>) -> String {
    let named: Vec<&str> = namespaces.iter().copied().take(NAMED).collect();
    let named = named.join(", ");
    match namespaces.len().saturating_sub(NAMED) {
        0 => format!("namespace {named}"),
        others => format!("namespaces {named} and {others} others"),
    }
}

impl Compiled {
    /// The policy [with these rules](Self::with_services), which knows this one.
    pub fn completed(
        self: &Arc<Self>,
        settings: &Settings,
        added: &[Added],
        all: &Services,
    ) -> (Arc<Self>, Option<String>) {
        if added.is_empty() {
            return (Arc::clone(self), None);
        }
        let (mut compiled, problem) = self.with_services(settings, added, all);
        compiled.alone = Some(Arc::clone(self));
        (Arc::new(compiled), problem)
    }

    /// The policy without its rules for Services.
    pub fn without_services(&self) -> &Self {
        self.alone.as_deref().unwrap_or(self)
    }

    /// The classes in the policy [without its rules for Services](Self::without_services) of the rules that have these
    /// classes here. Rules for Services put the others at other numbers.
    pub fn classes_without_services(&self, classes: ClassSet) -> ClassSet {
        let mut found = ClassSet::EMPTY;
        for (here, there) in self.own.iter().zip(0..) {
            if classes.meets(ClassSet::one(here)) {
                found |= ClassSet::one(there);
            }
        }
        found
    }

    /// The policy with these rules. If that exceeds a limit, the Services of the namespaces that need most are closed as a
    /// whole; then those of all namespaces; and at last everything is denied. The text says so.
    /// Where that takes wider prefixes, they contain few cluster IPs of other Services of the cluster (`all`).
    pub fn with_services(
        &self,
        settings: &Settings,
        added: &[Added],
        all: &Services,
    ) -> (Self, Option<String>) {
        if added.is_empty() {
            return (self.clone(), None);
        }
        let error = match self.with(settings, added) {
            Ok(compiled) => return (compiled, None),
            Err(error) => error,
        };
        let what = "the policy with its rules for Services";
        let greedy = greedy(added);
        // One entry more may keep IPv4 addresses out of an IPv6 prefix.
        let room = (CIDR_ENTRIES as usize).saturating_sub(self.cidrs.len() + 1);
        let every: BTreeSet<&str> = added.iter().map(Added::namespace).collect();
        for (namespaces, are_all, ranges) in [
            (&greedy, false, Room::RANGES),
            (&greedy, false, 1),
            (&every, true, 1),
        ] {
            if namespaces.is_empty() {
                continue;
            }
            let left = Room {
                prefixes: room,
                ranges,
                addresses: &all.cluster_ips_but(namespaces),
                ports: &all.node_ports_but(namespaces),
            };
            let closed = close(added, namespaces, &left);
            if let Ok(compiled) = self.with(settings, &closed) {
                let of = if are_all {
                    "Services".to_owned()
                } else {
                    format!("Services of {}", listed(namespaces))
                };
                let text = format!(
                    "{what}: {error}; {of} with an endpoint that is denied are closed, and those that are to be open \
                     because of their endpoints are not"
                );
                return (compiled, Some(text));
            }
        }
        let closed = Self {
            mode: self.mode,
            ..unreadable_tiers(settings)
        };
        (
            closed,
            Some(format!("{what}: {error}; everything is denied")),
        )
    }

    fn with(&self, settings: &Settings, added: &[Added]) -> Result<Self, PolicyError> {
        let built = match &self.source {
            Source(Some(effective)) => build(effective, settings, added)?,
            Source(None) => self.closed_with(added)?,
        };
        let record = Policy {
            flags: self.record.flags | built.record.flags,
            annotations: self.record.annotations,
            ..built.record
        };
        Ok(Self {
            mode: self.mode,
            record,
            warnings: self.warnings.clone(),
            closed_by: Arc::clone(&self.closed_by),
            ..built
        })
    }

    /// The closed form of a policy without any rule.
    fn closed_with(&self, added: &[Added]) -> Result<Self, PolicyError> {
        let (mut tiers, mut allow, mut deny) = (Tiers::default(), Vec::new(), Vec::new());
        let none = Classes::new(false, &tiers, &[], &[])?;
        insert(added, &none, &mut tiers, &mut allow, &mut deny);
        let classes = Classes::new(false, &tiers, &allow, &deny)?;
        let mut record = classes.record()?;
        record.flags = self.record.flags;
        record.names = self.record.names;
        let mut prefixes = Vec::new();
        for (action, rule) in with_actions(&tiers, &allow, &deny) {
            let bit = classes.bit(action, rule);
            match &rule.destination {
                Destination::Addresses(prefix) => prefixes.push((*prefix, bit)),
                Destination::Any => record.any |= bit,
                Destination::Names(_) => {}
            }
        }
        let cidrs: Vec<Cidr> = inherit(prefixes).into_iter().map(Cidr::of).collect();
        check_limit(PREFIXES, cidrs.len(), CIDR_ENTRIES as usize)?;
        Ok(Self {
            record,
            cidrs,
            services: added.into(),
            deciding: deciding(&classes, &tiers, &allow, &deny),
            ..self.clone()
        })
    }

    /// The Service because of which this entry denies packets to an address, and the endpoint that decides.
    pub fn denied_service(
        &self,
        address: &Address,
        at: (u8, u16),
        entry: &EntrySource,
    ) -> Option<&About> {
        let mut denials = self.services.iter().filter(|added| added.is_denial);
        let found = denials.find(|added| added.concerns(address, at) && added.source == *entry);
        found.map(|added| &*added.about)
    }

    /// The Service whose cluster IP this is, if packets to it pass because its endpoints are allowed.
    pub fn opened_service(&self, address: &Address, at: (u8, u16)) -> Option<&About> {
        let mut openings = self.services.iter().filter(|added| !added.is_denial);
        let found = openings.find(|added| added.concerns(address, at));
        found.map(|added| &*added.about)
    }
}
