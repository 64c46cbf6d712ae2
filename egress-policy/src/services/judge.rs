//! Finds the Services about which a policy decides otherwise than about their endpoints.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use egress_common::{
    address::Address,
    classes::ClassSet,
    reason::Reason,
    records::{PortClass, RANGE_INTERNAL, Range},
    verdict::{Destination, Verdict, deciding_entries, judge, skipped_classes},
};

use super::{
    Places, ServiceName, Services, Transport,
    added::{About, Added, EVERYTHING, Of, Place},
    closed,
    places::{Trie, is_plain},
    whole::{ClusterIp, Endpoint, Route, Whole, WholePort},
};
use crate::{
    annotations::At,
    compile::{Compiled, EntrySource},
    entry::Destination as To,
    error::Origin,
    prefix::{self, Prefix, to_mapped},
};

/// The Services of a cluster, and the kinds of addresses on this node.
#[derive(Debug, Default)]
pub struct Known {
    pub(super) services: Arc<Services>,
    pub(super) places: Arc<Places>,
    /// The Services with an endpoint that may be denied without a rule.
    suspects: BTreeSet<Arc<ServiceName>>,
}

/// The rules for Services that one policy needs, by the Service.
pub type ByService = BTreeMap<Arc<ServiceName>, Vec<Added>>;

/// Which Services have to be judged again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Again {
    /// All of them.
    All,
    /// These.
    These(BTreeSet<Arc<ServiceName>>),
}

impl Known {
    /// Replaces the Services and the kinds of addresses. Returns which Services have to be judged again; `None` if
    /// nothing has changed.
    pub fn update(&mut self, services: &Arc<Services>, places: &Arc<Places>) -> Option<Again> {
        let is_same_place = Arc::ptr_eq(&self.places, places) || self.places == *places;
        let is_elsewhere = !is_same_place || self.services.nodes != services.nodes;
        if !is_elsewhere && Arc::ptr_eq(&self.services, services) {
            return None;
        }
        let again = if is_elsewhere {
            self.suspects.clear();
            let is_suspect = |name: &&Arc<ServiceName>| {
                let service = services.whole(name);
                service.is_some_and(|service| places.are_suspect(&service))
            };
            let suspects = services.names().into_iter().filter(is_suspect);
            self.suspects.extend(suspects.cloned());
            Again::All
        } else {
            let changed = services.changed(&self.services);
            for name in &changed {
                let service = services.whole(name);
                if service.is_some_and(|service| places.are_suspect(&service)) {
                    self.suspects.insert(Arc::clone(name));
                } else {
                    self.suspects.remove(name);
                }
            }
            Again::These(changed)
        };
        self.services = Arc::clone(services);
        self.places = Arc::clone(places);
        match again {
            Again::These(none) if none.is_empty() => None,
            again => Some(again),
        }
    }

    /// Where Services have node ports.
    pub(super) fn nodes(&self) -> impl Iterator<Item = &Prefix> {
        self.places
            .with_node_ports
            .iter()
            .chain(&self.services.nodes)
    }

    fn nodes_of(&self, is_v4: bool) -> Vec<Prefix> {
        let all = self.nodes().copied();
        all.filter(|of| of.is_v4() == is_v4).collect()
    }

    /// Whether there are no Services.
    pub fn are_none(&self) -> bool {
        self.services.is_empty()
    }

    /// These of the Services, with what they have lost lately as if it were still there.
    pub fn only(&self, names: &BTreeSet<&Arc<ServiceName>>) -> Services {
        self.services.only(names)
    }

    /// The rules that a policy needs for all Services.
    pub fn judge_all(&self, policy: &Compiled) -> ByService {
        if self.services.is_empty() {
            return ByService::new();
        }
        let candidates = self.services.index().candidates(policy);
        let names: BTreeSet<_> = self.suspects.iter().chain(candidates).collect();
        if names.is_empty() {
            return ByService::new();
        }
        let judge = Judge::new(policy, self);
        names
            .into_iter()
            .filter_map(|name| Some((Arc::clone(name), judge.needed_for(name)?)))
            .collect()
    }

    /// Judges Services again. Returns whether that has changed anything.
    pub fn judge_again(&self, policy: &Compiled, of_policy: &mut ByService, again: &Again) -> bool {
        let names = match again {
            Again::All => {
                let before = std::mem::replace(of_policy, self.judge_all(policy));
                return *of_policy != before;
            }
            Again::These(names) => names,
        };
        let of_addresses = !policy.cidrs.is_empty() || policy.record.any.meets(policy.record.deny);
        let mut concerned = names
            .iter()
            .filter(|name| {
                let is_suspect = self.suspects.contains(*name);
                is_suspect || of_addresses || of_policy.contains_key(*name)
            })
            .peekable();
        if concerned.peek().is_none() {
            return false;
        }
        let judge = Judge::new(policy, self);
        let mut changed: Vec<(&Arc<ServiceName>, Option<Vec<Added>>)> = Vec::new();
        for name in concerned {
            let needed = judge.needed_for(name);
            if of_policy.get(name) != needed.as_ref() {
                changed.push((name, needed));
            }
        }
        let is_changed = !changed.is_empty();
        for (name, needed) in changed {
            match needed {
                Some(added) => of_policy.insert(Arc::clone(name), added),
                None => of_policy.remove(name),
            };
        }
        is_changed
    }
}

/// Judges the endpoints of Services under one policy.
pub(super) struct Judge<'a> {
    pub(super) policy: &'a Compiled,
    known: &'a Known,
    cidrs: Trie<ClassSet>,
    /// The classes of entries with exactly an address.
    hosts: HashMap<Address, ClassSet>,
}

/// The policy's classes for packets to a Service's address and port, without its endpoints.
pub(super) struct Seen {
    /// The address, if it is one.
    address: Option<Address>,
    /// The classes that they certainly have.
    classes: ClassSet,
    /// Those that they may have, without those of entries with exactly the address.
    wide: ClassSet,
    /// Those of entries with exactly the address.
    pub(super) exact: ClassSet,
    is_internal: bool,
    port: u16,
}

/// A rule that a port needs.
#[derive(PartialEq, Eq)]
pub(super) struct Needed {
    place: Place,
    is_denial: bool,
    /// The entry that decides about the endpoint, if one does.
    source: Option<EntrySource>,
    endpoint: SocketAddr,
}

/// Why an endpoint is denied: the number of a class, or none if no entry allows it.
type Denial = Option<u8>;

impl<'a> Judge<'a> {
    pub(super) fn new(policy: &'a Compiled, known: &'a Known) -> Self {
        let mut hosts: HashMap<Address, ClassSet> = HashMap::new();
        for entry in &policy.deciding {
            if let To::Addresses(prefix) = entry.destination
                && prefix.is_host()
            {
                *hosts.entry(prefix.network()).or_default() |= ClassSet::one(entry.class);
            }
        }
        Self {
            policy,
            known,
            cidrs: Trie::<ClassSet>::of_cidrs(&policy.cidrs),
            hosts,
        }
    }

    /// The rules that the policy needs for a Service; `None` if it needs none.
    fn needed_for(&self, name: &ServiceName) -> Option<Vec<Added>> {
        let service = &self.known.services.whole(name)?;
        if service.is_closed {
            return Some(closed::rules(service, self.known));
        }
        let mut added = Vec::new();
        for cluster in &service.cluster {
            self.cluster_ip(service, *cluster, &mut added);
        }
        for port in &service.ports {
            let Route {
                transport,
                port: number,
                node_port,
            } = port.route;
            // One rule for all addresses that are denied alike: there may be many.
            let mut denied: Vec<(Needed, Vec<Prefix>)> = Vec::new();
            let of_families = [true, false].map(|is_v4| port.of_family(is_v4));
            for ip in &service.external {
                let endpoints = &of_families[usize::from(!ip.is_ipv4())];
                let seen = self.seen_at_external(*ip, (transport, number));
                let Some(needed) = self.denial(&seen, transport, endpoints) else {
                    continue;
                };
                let alike = denied.iter_mut().find(|(other, _)| *other == needed);
                match alike {
                    Some((_, to)) => to.push(Prefix::host(*ip)),
                    None => denied.push((needed, vec![Prefix::host(*ip)])),
                }
            }
            for (needed, to) in denied {
                let to = (to, class_of(transport, number));
                added.push(rule(service, transport, needed, to, Of::External));
            }
            if let Some(node_port) = node_port {
                self.node_port(service, (port, node_port), &mut added);
            }
        }
        (!added.is_empty()).then_some(added)
    }

    fn cluster_ip(&self, service: &Whole, cluster: ClusterIp, added: &mut Vec<Added>) {
        let ClusterIp { ip, is_lost } = cluster;
        let mut needed: Vec<(Route, Needed)> = Vec::new();
        let mut ports = 0_usize;
        for port in &service.ports {
            let route = port.route;
            let endpoints = port.of_family(ip.is_ipv4());
            if endpoints.is_empty() {
                continue;
            }
            ports += 1;
            let Route {
                transport, port, ..
            } = route;
            // The gate decides about queries to resolvers.
            if self.is_resolver(SocketAddr::new(ip, port), transport) {
                continue;
            }
            let seen = self.seen_at(ip, (transport, port));
            let mut of_port = self.denial(&seen, transport, &endpoints);
            if of_port.is_none() && !is_lost {
                of_port = self.opening(ip, (transport, port), &endpoints);
            }
            needed.extend(of_port.map(|needed| (route, needed)));
        }
        let to = || vec![Prefix::host(ip)];
        // Where every port is denied alike, the policy needs no class for each.
        let mut denials = needed.iter().filter(|(_, needed)| needed.is_denial);
        let first = denials.next();
        let is_whole = first.is_some_and(|(_, first)| {
            needed.len() == ports
                && needed
                    .iter()
                    .all(|(_, other)| other.is_denial && other.place == first.place)
        });
        if is_whole {
            needed.truncate(1);
        }
        for (route, of_port) in needed {
            let class = if is_whole {
                EVERYTHING
            } else {
                class_of(route.transport, route.port)
            };
            let (transport, of) = (route.transport, Of::ClusterIp);
            added.push(rule(service, transport, of_port, (to(), class), of));
        }
    }

    fn node_port(
        &self,
        service: &Whole,
        (port, node_port): (&WholePort, u16),
        added: &mut Vec<Added>,
    ) {
        for is_v4 in [true, false] {
            let endpoints = port.of_family(is_v4);
            let transport = port.route.transport;
            let nodes = self.known.nodes_of(is_v4);
            if endpoints.is_empty() || nodes.is_empty() {
                continue;
            }
            let seen = self.seen_within(&nodes, (transport, node_port));
            if let Some(needed) = self.denial(&seen, transport, &endpoints) {
                let class = class_of(transport, node_port);
                let to = prefix::merge(&nodes);
                added.push(rule(service, transport, needed, (to, class), Of::NodePort));
            }
        }
    }

    /// Whether packets to this address and port are queries to a resolver.
    pub(super) fn is_resolver(&self, at: SocketAddr, transport: Transport) -> bool {
        let places = &self.known.places;
        places.is_resolver(&to_mapped(at.ip()), transport, at.port())
    }

    pub(super) fn destination(&self, ip: IpAddr, at: (Transport, u16)) -> Destination {
        self.destination_in(self.known.places.range(ip), ip, at)
    }

    pub(super) fn endpoint(&self, endpoint: &Endpoint, transport: Transport) -> Destination {
        let Endpoint { at, .. } = endpoint;
        let range = self.known.places.range_of(endpoint);
        self.destination_in(range, at.ip(), (transport, at.port()))
    }

    fn destination_in(&self, range: Range, ip: IpAddr, at: (Transport, u16)) -> Destination {
        let record = &self.policy.record;
        let places = &self.known.places;
        places.destination(record, &self.cidrs, &to_mapped(ip), range, at)
    }

    /// The policy's classes for an address of the Service.
    pub(super) fn seen_at(&self, ip: IpAddr, (transport, port): (Transport, u16)) -> Seen {
        let address = to_mapped(ip);
        let record = &self.policy.record;
        let destination = self.destination(ip, (transport, port));
        let skipped = skipped_classes(record, &destination);
        let matching = record.ports.matching(transport.bit(), port);
        let matching = matching.without(skipped);
        let classes = destination.cidr.or(record.any).and(matching);
        let exact = self.hosts.get(&address).copied().unwrap_or_default();
        let exact = exact.and(matching);
        Seen {
            address: Some(address),
            classes,
            wide: classes.without(exact),
            exact,
            is_internal: destination.ranges & RANGE_INTERNAL != 0,
            port,
        }
    }

    /// The policy's classes for an external address of the Service. Who writes the Service chooses it: entries with the
    /// address, and names that lead there, may be about the host outside that has it.
    pub(super) fn seen_at_external(&self, ip: IpAddr, (transport, port): (Transport, u16)) -> Seen {
        let record = &self.policy.record;
        let matching = record.ports.matching(transport.bit(), port);
        let seen = self.seen_at(ip, (transport, port));
        Seen {
            wide: seen.wide.or(seen.exact).or(record.named.and(matching)),
            exact: ClassSet::EMPTY,
            ..seen
        }
    }

    /// The policy's classes for a port of the nodes.
    pub(super) fn seen_at_nodes(&self, is_v4: bool, at: (Transport, u16)) -> Seen {
        self.seen_within(&self.known.nodes_of(is_v4), at)
    }

    /// The policy's classes for a port of these nodes.
    fn seen_within(&self, nodes: &[Prefix], (transport, port): (Transport, u16)) -> Seen {
        let record = &self.policy.record;
        let matching = record.ports.matching(transport.bit(), port);
        let mut wide = record.any;
        for node in nodes {
            wide |= self.cidrs.within(&node.network(), node.prefix_len());
        }
        for cidr in &self.policy.cidrs {
            let prefix = Prefix::of_map(cidr.network, cidr.prefix_len);
            if !prefix.is_host() && nodes.iter().any(|node| node.covers(&prefix)) {
                wide |= cidr.classes;
            }
        }
        Seen {
            address: None,
            classes: record.any.and(matching),
            wide: wide.and(matching),
            exact: ClassSet::EMPTY,
            is_internal: true,
            port,
        }
    }

    /// The rule that denies a port of a Service because of an endpoint.
    pub(super) fn denial(
        &self,
        seen: &Seen,
        transport: Transport,
        endpoints: &[Endpoint],
    ) -> Option<Needed> {
        let denied = endpoints.iter().filter_map(|endpoint| {
            let denial = self.denial_of(seen, transport, endpoint)?;
            Some((endpoint, denial))
        });
        // The first class decides.
        let (endpoint, denial) = denied.min_by_key(|(_, denial)| denial.unwrap_or(u8::MAX))?;
        let record = &self.policy.record;
        let precedes = |classes: ClassSet| {
            let first = classes.without(record.deny).first();
            let is_before = denial.is_none_or(|denial| first < denial);
            (!classes.without(record.deny).is_empty() && is_before).then_some(first)
        };
        if precedes(seen.exact).is_some() {
            return None;
        }
        let place = match (precedes(seen.wide), denial) {
            (Some(wide), _) => Place::Before(wide),
            (None, Some(class)) => Place::At(class),
            (None, None) => Place::Last,
        };
        let by_entry = denial.and_then(|class| {
            let address = to_mapped(endpoint.at.ip());
            self.policy.deciding_entry(&address, class)
        });
        Some(Needed {
            place,
            is_denial: true,
            source: by_entry.cloned(),
            endpoint: endpoint.at,
        })
    }

    /// Whether and why an endpoint is denied, unless the same follows for the Service.
    fn denial_of(&self, seen: &Seen, transport: Transport, endpoint: &Endpoint) -> Option<Denial> {
        let record = &self.policy.record;
        let port = endpoint.at.port();
        let address = to_mapped(endpoint.at.ip());
        let destination = self.endpoint(endpoint, transport);
        let verdict = judge(record, &destination, transport.bit(), port);
        let Verdict::Deny { reason, class } = verdict else {
            return None;
        };
        let places = &self.known.places;
        let is_same_port = seen.is_internal && seen.port == port;
        let is_plain = is_plain(places.range_of(endpoint))
            && (is_same_port || !places.is_special(transport, port));
        if reason != Reason::DenyRule {
            return (!is_plain || !seen.is_internal).then_some(None);
        }
        if !seen.classes.meets(ClassSet::one(class)) {
            return Some(Some(class));
        }
        // An entry that denies both counts where it is, for the Service, too. Another may deny the endpoint alone.
        let matching = record.ports.matching(transport.bit(), port);
        let denying = destination
            .cidr
            .or(record.any)
            .and(matching)
            .and(record.deny);
        let mut alone = denying.without(seen.classes);
        for entry in &self.policy.deciding {
            if let To::Addresses(prefix) = &entry.destination
                && prefix.contains(&address)
                && !seen.address.is_some_and(|of| prefix.contains(&of))
            {
                alone |= ClassSet::one(entry.class).and(denying);
            }
        }
        if !alone.is_empty() {
            return Some(Some(alone.first()));
        }
        // An entry about outside hosts may allow the Service's address before that.
        let allowing = (seen.classes.or(seen.wide)).without(record.deny);
        let is_allowed = !allowing.is_empty() && allowing.first() < class;
        (!is_plain || is_allowed && !seen.is_internal).then_some(Some(class))
    }

    /// The rule that allows a port of a cluster IP because entries with their addresses allow all endpoints.
    fn opening(
        &self,
        ip: IpAddr,
        (transport, port): (Transport, u16),
        endpoints: &[Endpoint],
    ) -> Option<Needed> {
        let record = &self.policy.record;
        let service = self.destination(ip, (transport, port));
        let is_passing = |destination: &Destination, port| {
            judge(record, destination, transport.bit(), port) == Verdict::Pass
        };
        if is_passing(&service, port) {
            return None;
        }
        let mut last: Option<(u8, SocketAddr)> = None;
        // Of lost ones it may be that nothing has their addresses any more, and so no entry.
        let present = endpoints.iter().filter(|endpoint| endpoint.lost.is_none());
        for endpoint in present {
            let at = endpoint.at;
            let destination = self.endpoint(endpoint, transport);
            let decides = deciding_entries(record, &destination, transport.bit(), at.port());
            let by_address = decides.and(destination.cidr);
            if by_address.is_empty() || !is_passing(&destination, at.port()) {
                return None;
            }
            let class = by_address.first();
            if last.is_none_or(|(latest, _)| class > latest) {
                last = Some((class, at));
            }
        }
        let (class, endpoint) = last?;
        let source = self
            .policy
            .deciding_entry(&to_mapped(endpoint.ip()), class)?;
        Some(Needed {
            place: Place::At(class),
            is_denial: false,
            source: Some(source.clone()),
            endpoint,
        })
    }
}

fn class_of(transport: Transport, port: u16) -> PortClass {
    PortClass {
        port_min: port,
        port_max: port,
        protocols: transport.bit(),
        ..PortClass::NONE
    }
}

fn rule(
    service: &Whole,
    transport: Transport,
    needed: Needed,
    (to, class): (Vec<Prefix>, PortClass),
    of: Of,
) -> Added {
    let about = About {
        service: Arc::clone(&service.name),
        endpoint: needed.endpoint,
        transport,
    };
    let source = needed.source.unwrap_or_else(|| EntrySource {
        text: about.endpoint_entry().into(),
        origin: Origin::Service(Arc::clone(&service.name)),
        at: At::default(),
    });
    Added {
        to,
        class,
        place: needed.place,
        is_denial: needed.is_denial,
        of,
        source,
        about: Arc::new(about),
    }
}
