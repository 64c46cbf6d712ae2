//! What Services have lost within the last minute.
//!
//! A node follows the API server with some delay, and translates connections that it knows as before. So what a Service
//! has lost denies for [`LASTS`] as if it were still there. It opens nothing.
//!
//! What the agent remembers is bounded for each Service and each namespace. A Service that has lost more is
//! [closed](super::closed) for as long.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use egress_common::records::Range;

use super::{
    Passed, Places, Service, ServiceName, ServicePort, Services,
    whole::{self, Route},
};

/// How long a lost part counts at least. A node needs some seconds to follow (kube-proxy tries again after 30 seconds,
/// `--iptables-sync-period`).
const LASTS: Duration = Duration::from_secs(60);

/// Most endpoints, each at one port, that a Service may have lost. If it has lost more, it is [closed](super::closed): one
/// object must not decide how much the agent has to remember.
const ENDPOINTS: usize = 8_192;
/// Most external addresses that a Service may have lost. Beyond it those are forgotten that it lost first.
const EXTERNAL: usize = 4_096;
/// Most endpoints, and most external addresses, of all Services of a namespace. Beyond it, those of the Service count as
/// too many that has lost most.
const OF_NAMESPACE: usize = 32_768;
/// Most cluster IPs of Services of a namespace that are remembered for longer than [`LASTS`], because connections through
/// them could not be ended.
const OVERDUE: usize = 8_192;
/// Most ports of a closed Service that are remembered.
const ROUTES: usize = 8_192;

/// A part of a Service that it can lose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Cluster(IpAddr),
    External(IpAddr),
    Endpoint(Route, SocketAddr),
}

/// What a Service has lost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lost {
    pub(super) cluster: Vec<IpAddr>,
    pub(super) external: Vec<IpAddr>,
    /// Endpoints, each with the kind of its address when it was lost: the address may have been a pod's or a node's that
    /// is gone.
    pub(super) endpoints: Vec<(Route, SocketAddr, Range)>,
    /// If it has lost more endpoints than the agent remembers: ports that it had.
    pub(super) closed: Option<Vec<Route>>,
}

fn addresses(service: &Service) -> impl Iterator<Item = Part> {
    let cluster = service.cluster.iter().map(|ip| Part::Cluster(*ip));
    let external = service.external.iter().map(|ip| Part::External(*ip));
    cluster.chain(external)
}

fn endpoints(service: &Service) -> impl Iterator<Item = Part> {
    service.ports.iter().flat_map(|port| {
        let endpoints = port.endpoints.iter();
        endpoints.map(|endpoint| Part::Endpoint(port.route(), *endpoint))
    })
}

/// The parts that a Service has now.
#[derive(Default)]
struct Present<'a> {
    addresses: HashSet<IpAddr>,
    external: HashSet<IpAddr>,
    endpoints: HashMap<Route, HashSet<&'a SocketAddr>>,
}

impl<'a> Present<'a> {
    fn of(service: &'a Service) -> Self {
        let mut endpoints: HashMap<Route, HashSet<&SocketAddr>> = HashMap::new();
        for port in &service.ports {
            let of_route = endpoints.entry(port.route()).or_default();
            of_route.extend(&port.endpoints);
        }
        Self {
            addresses: service.cluster.iter().copied().collect(),
            external: service.external.iter().copied().collect(),
            endpoints,
        }
    }

    fn has(&self, part: &Part) -> bool {
        match part {
            Part::Cluster(ip) => self.addresses.contains(ip),
            Part::External(ip) => self.external.contains(ip),
            Part::Endpoint(route, endpoint) => {
                let of_route = self.endpoints.get(route);
                of_route.is_some_and(|endpoints| endpoints.contains(endpoint))
            }
        }
    }
}

/// What the agent remembers of one Service: since when each part is lost.
#[derive(Debug, Default)]
struct Memory {
    cluster: BTreeMap<IpAddr, Instant>,
    external: BTreeMap<IpAddr, Instant>,
    /// With the kind of the endpoint's address before.
    endpoints: BTreeMap<(Route, SocketAddr), (Instant, Range)>,
    /// Since when it has lost more endpoints than these.
    closed: Option<Instant>,
    /// Ports of the endpoints that are not remembered.
    routes: BTreeSet<Route>,
    /// Since when it has lost more external addresses than are remembered.
    forgot_addresses: Option<Instant>,
}

/// How many endpoints and how many external addresses are remembered.
type Size = [usize; 2];

impl Memory {
    fn size(&self) -> Size {
        [self.endpoints.len(), self.external.len()]
    }

    /// Returns false if there is no room.
    fn lose(&mut self, part: Part, places: &Places, now: Instant) -> bool {
        match part {
            Part::Cluster(ip) => {
                self.cluster.insert(ip, now);
            }
            Part::External(ip) => {
                self.external.insert(ip, now);
            }
            Part::Endpoint(route, endpoint) => {
                // An endpoint that is lost again counts anew, with the kind that its address had first.
                let lost = self.endpoints.entry((route, endpoint));
                let lost = lost.and_modify(|(since, _)| *since = now);
                lost.or_insert_with(|| (now, places.range(endpoint.ip())));
            }
        }
        self.endpoints.len() <= ENDPOINTS
    }

    /// Forgets the endpoints: the Service is closed instead.
    fn close(&mut self, now: Instant) {
        self.closed = Some(now);
        let endpoints = std::mem::take(&mut self.endpoints);
        self.note_routes(endpoints.into_keys().map(|(route, _)| route));
    }

    /// Notes ports that a closed Service had.
    fn note_routes(&mut self, routes: impl Iterator<Item = Route>) {
        for route in routes {
            if self.routes.len() >= ROUTES {
                // The addresses are denied at all ports, those of nodes are not.
                self.routes.retain(|route| route.node_port.is_some());
            }
            if self.routes.len() < ROUTES {
                self.routes.insert(route);
            }
        }
    }

    /// Forgets the external addresses that were lost first, so that only so many are left.
    fn forget_external(&mut self, most: usize, now: Instant) {
        let surplus = self.external.len().saturating_sub(most);
        if surplus == 0 {
            return;
        }
        self.forgot_addresses = Some(now);
        let mut since: Vec<_> = self.external.iter().map(|(ip, at)| (*at, *ip)).collect();
        since.sort_unstable();
        for (_, ip) in since.into_iter().take(surplus) {
            self.external.remove(&ip);
        }
    }

    /// Removes addresses and endpoints that the Service has again.
    fn without(&mut self, present: &Present<'_>) {
        self.cluster
            .retain(|ip, _| !present.has(&Part::Cluster(*ip)));
        self.external
            .retain(|ip, _| !present.has(&Part::External(*ip)));
        self.endpoints
            .retain(|(route, endpoint), _| !present.has(&Part::Endpoint(*route, *endpoint)));
    }

    fn forget(&mut self, now: Instant) {
        let lasts = |since: &Instant| now.duration_since(*since) < LASTS;
        self.cluster.retain(|_, since| lasts(since));
        self.external.retain(|_, since| lasts(since));
        self.endpoints.retain(|_, (since, _)| lasts(since));
        self.closed = self.closed.filter(lasts);
        self.forgot_addresses = self.forgot_addresses.filter(lasts);
        if self.closed.is_none() {
            self.routes.clear();
        }
    }

    fn is_empty(&self) -> bool {
        self.times().next().is_none()
    }

    fn times(&self) -> impl Iterator<Item = &Instant> {
        let addresses = self.cluster.values().chain(self.external.values());
        let endpoints = self.endpoints.values().map(|(since, _)| since);
        let flags = self.closed.iter().chain(&self.forgot_addresses);
        addresses.chain(endpoints).chain(flags)
    }

    fn lost(&self) -> Lost {
        let endpoints = self.endpoints.iter();
        Lost {
            cluster: self.cluster.keys().copied().collect(),
            external: self.external.keys().copied().collect(),
            endpoints: endpoints
                .map(|((route, endpoint), (_, range))| (*route, *endpoint, *range))
                .collect(),
            closed: self.closed.map(|_| self.routes.iter().copied().collect()),
        }
    }
}

/// Of which Services the agent has not remembered everything that they have lost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overflown {
    /// Those that are closed for it.
    pub closed: BTreeSet<Arc<ServiceName>>,
    /// Those that are closed because of what they have.
    pub too_large: BTreeSet<Arc<ServiceName>>,
    /// Those of which external addresses were forgotten.
    pub with_forgotten_addresses: BTreeSet<Arc<ServiceName>>,
}

/// The Services of the API server, and what these have lost.
#[derive(Debug)]
pub struct Losses {
    present: Arc<Services>,
    lost: BTreeMap<Arc<ServiceName>, Memory>,
    with_lost: Arc<Services>,
}

impl Losses {
    /// No Service has lost anything.
    pub fn new(present: Arc<Services>) -> Self {
        Self {
            with_lost: Arc::clone(&present),
            present,
            lost: BTreeMap::new(),
        }
    }

    /// The Services with what they have lost.
    pub fn services(&self) -> &Arc<Services> {
        &self.with_lost
    }

    /// The Services as the API server has them.
    pub fn present(&self) -> &Arc<Services> {
        &self.present
    }

    /// Takes the Services as the API server has them at this time. `places` are the kinds of addresses until now.
    pub fn take(&mut self, services: &Arc<Services>, places: &Places, now: Instant) {
        if Arc::ptr_eq(&self.present, services) {
            return;
        }
        let mut names = services.changed(&self.present);
        let mut passed: HashMap<&ServiceName, Vec<&Passed>> = HashMap::new();
        for one in &services.passed {
            passed.entry(&one.service.name).or_default().push(one);
            names.insert(Arc::clone(&one.service.name));
        }
        let mut sizes = self.sizes();
        let former = Arc::clone(&self.present);
        for name in names {
            let before = former.get(&name).map(|service| &**service);
            let passed = passed.get(&*name).map_or(&[][..], Vec::as_slice);
            // What it had more before may be what it has no more now.
            let had_more = passed.iter().any(|passed| passed.had_more)
                || before.is_some_and(|service| service.has_more)
                    && services.get(&name).is_none_or(|now| !now.has_more);
            let had_more_addresses = passed.iter().any(|passed| passed.had_more_addresses);
            let had = before
                .into_iter()
                .chain(passed.iter().map(|one| &*one.service));
            let present = services.get(&name);
            let present = present.map_or_else(Present::default, |service| Present::of(service));
            let memory = self.lost.entry(Arc::clone(&name)).or_default();
            let size = memory.size();
            memory.without(&present);
            let addresses = had.clone().flat_map(addresses);
            let mut lost = addresses
                .chain(had.clone().flat_map(endpoints))
                .filter(|part| !present.has(part));
            let has_room = lost.all(|part| memory.lose(part, places, now));
            if had_more || !has_room {
                memory.close(now);
                memory.note_routes(had.flat_map(|one| &one.ports).map(ServicePort::route));
            }
            if had_more_addresses {
                memory.forgot_addresses = Some(now);
            }
            memory.forget_external(EXTERNAL, now);
            let of_namespace = sizes.entry(name.namespace.clone()).or_default();
            let grown = memory.size();
            for (sum, (before, after)) in of_namespace.iter_mut().zip(size.into_iter().zip(grown)) {
                *sum = (*sum + after).saturating_sub(before);
            }
            if memory.is_empty() {
                self.lost.remove(&name);
            }
            self.limit(&name.namespace, of_namespace, now);
        }
        self.forget_overdue(now);
        self.present = Arc::clone(services);
        self.renew();
    }

    /// Forgets what the Services of a namespace have lost for long enough if that is very much. Otherwise it would become
    /// ever more where [`Self::forget`] is not called: on a node that cannot say which connections it translates.
    fn forget_overdue(&mut self, now: Instant) {
        let mut counts: HashMap<Box<str>, usize> = HashMap::new();
        for (name, memory) in &self.lost {
            let of_namespace = counts.entry(name.namespace.clone()).or_default();
            *of_namespace += memory.cluster.len().max(1);
        }
        counts.retain(|_, count| *count > OVERDUE);
        if !counts.is_empty() {
            self.lost.retain(|name, memory| {
                if counts.contains_key(&name.namespace) {
                    memory.forget(now);
                }
                !memory.is_empty()
            });
        }
    }

    /// What the agent remembers of each namespace.
    fn sizes(&self) -> HashMap<Box<str>, Size> {
        let mut sizes: HashMap<Box<str>, Size> = HashMap::new();
        for (name, memory) in &self.lost {
            let of_namespace = sizes.entry(name.namespace.clone()).or_default();
            for (sum, one) in of_namespace.iter_mut().zip(memory.size()) {
                *sum += one;
            }
        }
        sizes
    }

    /// Forgets what the Services of this namespace have lost that have lost most, until the rest is not too much.
    fn limit(&mut self, namespace: &str, [endpoints, external]: &mut Size, now: Instant) {
        while *endpoints > OF_NAMESPACE || *external > OF_NAMESPACE {
            let index = usize::from(*endpoints <= OF_NAMESPACE);
            let of_namespace = self.lost.iter_mut();
            let of_namespace = of_namespace.filter(|(name, _)| *name.namespace == *namespace);
            let largest = of_namespace.max_by_key(|(_, memory)| memory.size()[index]);
            let Some((_, memory)) = largest.filter(|(_, memory)| memory.size()[index] > 0) else {
                return;
            };
            let sum = if index == 0 {
                &mut *endpoints
            } else {
                &mut *external
            };
            *sum = sum.saturating_sub(memory.size()[index]);
            if index == 0 {
                memory.close(now);
            } else {
                memory.forget_external(0, now);
            }
        }
    }

    /// Of which Services the agent does not remember everything.
    pub fn overflown(&self) -> Overflown {
        let of = |is_so: fn(&Memory) -> bool| {
            let found = self.lost.iter().filter(|(_, memory)| is_so(memory));
            found.map(|(name, _)| Arc::clone(name)).collect()
        };
        let too_large = self
            .present
            .all()
            .filter(|service| whole::is_too_large(service));
        Overflown {
            closed: of(|memory| memory.closed.is_some()),
            too_large: too_large.map(|service| Arc::clone(&service.name)).collect(),
            with_forgotten_addresses: of(|memory| memory.forgot_addresses.is_some()),
        }
    }

    /// Whether something has been lost for so long that it may be forgotten.
    pub fn are_due(&self, now: Instant) -> bool {
        let mut all = self.lost.values().flat_map(Memory::times);
        all.any(|since| now.duration_since(*since) >= LASTS)
    }

    /// Forgets the parts that Services lost at least [`LASTS`] before `now`.
    pub fn forget(&mut self, now: Instant) {
        self.lost.retain(|_, memory| {
            memory.forget(now);
            !memory.is_empty()
        });
        self.renew();
    }

    fn renew(&mut self) {
        let lost = self.lost.iter();
        let lost: BTreeMap<_, _> = lost
            .map(|(name, memory)| (Arc::clone(name), memory.lost()))
            .collect();
        self.with_lost = if lost.is_empty() {
            Arc::clone(&self.present)
        } else {
            Arc::new(self.present.with_lost(lost))
        };
    }
}
