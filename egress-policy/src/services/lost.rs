//! What Services have lost within the last minute.
//!
//! A node follows the API server with some delay, and translates connections that it knows as before. So what a Service
//! has lost denies for [`LASTS`] as if it were still there. It opens nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use egress_common::records::Range;

use super::{Places, Service, ServiceName, Services, whole::Route};

/// How long a lost part counts at least. A node needs some seconds to follow (kube-proxy tries again after 30 seconds,
/// `--iptables-sync-period`).
const LASTS: Duration = Duration::from_secs(60);

/// Most lost parts that count for one Service. Those that were lost first are forgotten first: a node has followed them
/// first, too.
const MOST: usize = 512;

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
}

impl Lost {
    fn add(&mut self, part: Part, range: Range) {
        match part {
            Part::Cluster(ip) => self.cluster.push(ip),
            Part::External(ip) => self.external.push(ip),
            Part::Endpoint(route, endpoint) => self.endpoints.push((route, endpoint, range)),
        }
    }
}

fn parts(service: &Service) -> BTreeSet<Part> {
    let cluster = service.cluster.iter().map(|ip| Part::Cluster(*ip));
    let external = service.external.iter().map(|ip| Part::External(*ip));
    let endpoints = service.ports.iter().flat_map(|port| {
        let endpoints = port.endpoints.iter();
        endpoints.map(|endpoint| Part::Endpoint(port.route(), *endpoint))
    });
    cluster.chain(external).chain(endpoints).collect()
}

/// Forgets the parts that were lost first, if there are too many.
fn forget_first(lost: &mut BTreeMap<Part, (Instant, Range)>) {
    let surplus = lost.len().saturating_sub(MOST);
    if surplus > 0 {
        let mut since: Vec<(Instant, Part)> = lost
            .iter()
            .map(|(part, (since, _))| (*since, *part))
            .collect();
        since.sort_unstable();
        for (_, part) in since.into_iter().take(surplus) {
            lost.remove(&part);
        }
    }
}

/// The Services of the API server, and what these have lost.
#[derive(Debug)]
pub struct Losses {
    present: Arc<Services>,
    /// Since when each part is lost, and the kind of an endpoint's address before.
    lost: BTreeMap<Arc<ServiceName>, BTreeMap<Part, (Instant, Range)>>,
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
        let mut before: BTreeMap<Arc<ServiceName>, BTreeSet<Part>> = BTreeMap::new();
        for name in services.changed(&self.present) {
            let service = self.present.get(&name);
            let parts = service.map(|service| parts(service)).unwrap_or_default();
            before.insert(name, parts);
        }
        for service in &services.passed {
            let known = before.entry(Arc::clone(&service.name)).or_default();
            known.extend(parts(service));
        }
        for (name, before) in before {
            let service = services.get(&name);
            let after = service.map(|service| parts(service)).unwrap_or_default();
            let lost = self.lost.entry(Arc::clone(&name)).or_default();
            for part in before {
                if !after.contains(&part) {
                    let range = match part {
                        Part::Cluster(_) | Part::External(_) => Range::default(),
                        Part::Endpoint(_, endpoint) => places.range(endpoint.ip()),
                    };
                    // A part that is lost again counts anew, with the kind that its address had first.
                    let again = lost.entry(part).and_modify(|(since, _)| *since = now);
                    again.or_insert((now, range));
                }
            }
            lost.retain(|part, _| !after.contains(part));
            forget_first(lost);
            if lost.is_empty() {
                self.lost.remove(&name);
            }
        }
        self.present = Arc::clone(services);
        self.renew();
    }

    /// Whether something has been lost for so long that it may be forgotten.
    pub fn are_due(&self, now: Instant) -> bool {
        let mut all = self.lost.values().flat_map(BTreeMap::values);
        all.any(|(since, _)| now.duration_since(*since) >= LASTS)
    }

    /// Forgets the parts that Services lost at least [`LASTS`] before `now`.
    pub fn forget(&mut self, now: Instant) {
        self.lost.retain(|_, lost| {
            lost.retain(|_, (since, _)| now.duration_since(*since) < LASTS);
            !lost.is_empty()
        });
        self.renew();
    }

    fn renew(&mut self) {
        let lost = self.lost.iter().map(|(name, parts)| {
            let mut lost = Lost::default();
            for (part, (_, range)) in parts {
                lost.add(*part, *range);
            }
            (Arc::clone(name), lost)
        });
        let lost: BTreeMap<_, _> = lost.collect();
        self.with_lost = if lost.is_empty() {
            Arc::clone(&self.present)
        } else {
            Arc::new(self.present.with_lost(lost))
        };
    }
}
