//! Finding the interfaces of pods.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
    io,
    net::IpAddr,
    time::{Duration, Instant},
};

use super::{
    arrivals::{Arrivals, LOOK_AGAIN},
    enforced::PodKey,
    named::Named,
    quarantine,
    reconcile::Reconciler,
    sights::{FirstAddresses, Sights},
    waiting::{RETRY_MIN, longer},
};
use crate::{
    config::Quarantine,
    host::{self, Host, Links, Network, SocketsOf},
    pods::Snapshot,
};

/// How long what was found is believed without another look, as long as its interfaces are there.
const BELIEVED_FOR: Duration = Duration::from_secs(10);
/// The same, when quarantine shows that every interface has its pod: no pod can then be behind another.
const BELIEVED_LONGER_FOR: Duration = Duration::from_secs(60);

/// Where a pod is.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// Behind these interfaces.
    Found(Found),
    /// Nowhere yet; the text says why.
    NotYet(String),
    /// Nothing of the pod runs: it has not begun, or it has ended.
    Nobody {
        /// How that is known.
        why: String,
        /// Whether it has a control group.
        has_group: bool,
    },
    /// Nowhere where it could be enforced; the text says why.
    Nowhere(String),
}

/// Behind which interfaces a pod is.
#[derive(Clone, Debug, Default)]
pub(super) struct Found {
    /// Their indexes, in order; never empty.
    pub(super) interfaces: Vec<u32>,
    /// Whether the pod's end has addresses: otherwise its network may be half made.
    pub(super) has_addresses: bool,
    /// The addresses that its interfaces had when they were made.
    pub(super) first: FirstAddresses,
    /// The network namespaces on their other ends.
    pub(super) networks: Vec<Network>,
    /// What is wrong with the place all the same.
    pub(super) note: Option<String>,
}

/// What is known of where pods are.
pub(super) struct Places {
    /// Nothing only while it is looked on.
    host: Option<Host>,
    /// By the interfaces that manifests name, where only those pods are found.
    named: Option<Named>,
    quarantine: Quarantine,
    /// Where interfaces are left alone until their networks are made.
    arrivals: Option<Arrivals>,
    /// By UID.
    found: HashMap<String, (Found, Instant)>,
    /// By UID: the last reason, when to look again, and how long to wait after that.
    missed: HashMap<String, Missed>,
    /// The interfaces that were there before the source of pods first said which pods there are.
    /// Until it has, they are left as they are.
    before: Option<HashSet<u32>>,
    /// Interfaces that were there at the last look.
    known: HashSet<u32>,
    /// What was seen of each interface at first.
    sights: Sights,
    /// The interfaces behind which pods were found at the last look.
    identified: HashSet<u32>,
    /// The node's own addresses.
    node: HashSet<IpAddr>,
    /// Those of the gateways in its routes.
    gateways: HashSet<IpAddr>,
    /// The interfaces of the host at the last look.
    links: Links,
    /// The machine's own ways out, and when they were last read.
    uplinks: Option<(HashSet<String>, Instant)>,
    /// Whether some interface has no pod yet.
    pub(super) unidentified: bool,
}

/// What a look at the machine yields.
struct Look {
    places: BTreeMap<PodKey, Place>,
    /// The names and indexes of interfaces whose pods are not known; `None` when that cannot be
    /// found out now.
    unidentified: Option<Vec<(String, u32)>>,
}

struct Missed {
    place: Place,
    again: Instant,
    wait: Duration,
}

impl Places {
    /// Pods are found by their manifests alone.
    pub(super) fn named(host: Host, named: Named) -> Self {
        let quarantine = Quarantine {
            enabled: false,
            exclude: Vec::new(),
        };
        Self::new(host, Some(named), quarantine, None)
    }

    /// Pods are found on this machine.
    pub(super) fn on_host(
        host: Host,
        quarantine: Quarantine,
        arrivals: Option<Arrivals>,
        sights: Sights,
    ) -> Self {
        Self {
            sights,
            ..Self::new(host, None, quarantine, arrivals)
        }
    }

    /// The node's own addresses.
    pub(super) fn node_addresses(&self) -> &HashSet<IpAddr> {
        &self.node
    }

    fn new(
        host: Host,
        named: Option<Named>,
        quarantine: Quarantine,
        arrivals: Option<Arrivals>,
    ) -> Self {
        Self {
            host: Some(host),
            named,
            quarantine,
            arrivals,
            found: HashMap::new(),
            missed: HashMap::new(),
            before: None,
            known: HashSet::new(),
            sights: Sights::default(),
            identified: HashSet::new(),
            node: HashSet::new(),
            gateways: HashSet::new(),
            links: Links::default(),
            uplinks: None,
            unidentified: false,
        }
    }

    /// The addresses of the gateways that the node's routes lead through.
    pub(super) fn gateways(&self) -> &HashSet<IpAddr> {
        &self.gateways
    }

    /// The host's interfaces at the last look.
    pub(super) fn links(&self) -> &Links {
        &self.links
    }

    /// The host, and its interfaces at the last look.
    pub(super) fn on(&mut self) -> Option<(&mut Host, &Links)> {
        let host = self.host.as_mut()?;
        Some((host, &self.links))
    }

    /// The sockets in a network namespace of a pod.
    ///
    /// # Errors
    ///
    /// When they cannot be read.
    pub(super) fn sockets(&self, network: &Network) -> io::Result<SocketsOf> {
        match &self.host {
            Some(host) => host.sockets(network),
            None => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// The sockets in the network namespace that an interface leads to.
    ///
    /// # Errors
    ///
    /// When there is none, or they cannot be read.
    pub(super) fn sockets_behind(&mut self, ifindex: u32) -> io::Result<SocketsOf> {
        match &mut self.host {
            Some(host) => host.sockets_behind(ifindex),
            None => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// The interfaces of the host at the last look; none where pods name theirs.
    pub(super) fn there(&self) -> &HashSet<u32> {
        &self.known
    }

    /// Whether interfaces are closed until their pods are known.
    pub(super) fn has_quarantine(&self) -> bool {
        self.quarantine.enabled
    }

    /// Where each pod is, and the names and indexes of interfaces whose pods are not known.
    fn look(&mut self, snapshot: &Snapshot) -> Look {
        let Some(mut host) = self.host.take() else {
            unreachable!("it is put back after each look");
        };
        match host.own_addresses() {
            Ok(addresses) => self.node = addresses.into_iter().collect(),
            Err(error) => tracing::error!(%error, "the node's addresses cannot be listed"),
        }
        match host::gateways() {
            Ok(gateways) => self.gateways = gateways,
            Err(error) => tracing::error!(%error, "the node's gateways cannot be listed"),
        }
        let links = host.links();
        let result = if let Some(named) = &mut self.named {
            match links {
                Ok(links) => self.links = links,
                Err(error) => tracing::error!(%error, "the interfaces cannot be listed"),
            }
            Look {
                places: named.look(snapshot),
                unidentified: Some(Vec::new()),
            }
        } else {
            self.look_on(&mut host, links, snapshot)
        };
        self.host = Some(host);
        result
    }

    fn look_on(&mut self, host: &mut Host, links: io::Result<Links>, snapshot: &Snapshot) -> Look {
        let links = match links {
            Ok(links) => links,
            Err(error) => {
                let why = format!("the interfaces cannot be listed: {error:#}");
                let pods = snapshot.pods.keys();
                let places = pods.map(|key| (key.clone(), Place::NotYet(why.clone())));
                return Look {
                    places: places.collect(),
                    unidentified: None,
                };
            }
        };
        let now = Instant::now();
        let identified = self.identified.iter();
        let running: HashSet<i32> = identified
            .filter_map(|&ifindex| Some(links.get(ifindex)?.peer?.nsid))
            .collect();
        self.sights
            .look(host, &links, |nsid| running.contains(&nsid), now);
        let there: HashSet<u32> = links.iter().map(|link| link.ifindex).collect();
        let fresh: HashSet<i32> = links
            .iter()
            .filter(|link| !self.known.contains(&link.ifindex))
            .filter_map(|link| Some(link.peer?.nsid))
            .collect();
        if !there.is_subset(&self.known) {
            // Something new is there: it may be what was looked for, or a pod's second interface.
            self.missed.clear();
            self.found.retain(|_, (found, _)| {
                // Without quarantine a pod's interface in another namespace would be open.
                if !self.quarantine.enabled {
                    return false;
                }
                let mut own = found.interfaces.iter().filter_map(|&own| links.get(own));
                !own.any(|link| link.peer.is_some_and(|peer| fresh.contains(&peer.nsid)))
            });
        }
        self.known = there;
        let uids: HashSet<&str> = snapshot
            .pods
            .values()
            .filter_map(|pod| pod.cgroup_uid.as_deref())
            .collect();
        self.found.retain(|uid, _| uids.contains(uid.as_str()));
        self.missed.retain(|uid, _| uids.contains(uid.as_str()));

        let mut places = BTreeMap::new();
        let mut identified = HashSet::new();
        for (key, pod) in &snapshot.pods {
            let place = match &pod.cgroup_uid {
                None => {
                    Place::Nowhere("not enforced: nothing says which control group is its".into())
                }
                Some(_) if pod.host_network => {
                    Place::Nowhere("the pod is in the host's network".into())
                }
                Some(uid) => self.by_uid(host, &links, uid, now),
            };
            if let Place::Found(found) = &place {
                identified.extend(found.interfaces.iter().copied());
            }
            places.insert(key.clone(), place);
        }
        let mut unidentified = self.unidentified(&links, &identified, !snapshot.unreadable);
        // Without the routes nobody could tell the machine's own way out from a pod's.
        let can_tell =
            unidentified.is_empty() || self.leave_out_uplinks(host, &mut unidentified, now);
        self.unidentified = !unidentified.is_empty();
        if let Some(arrivals) = &mut self.arrivals {
            arrivals.leave_out(&mut unidentified, &links, host, now);
        }
        self.identified = identified;
        self.links = links;
        Look {
            places,
            unidentified: can_tell.then_some(unidentified),
        }
    }

    /// Leaves the machine's own ways out alone. With many routes reading them takes longer than
    /// everything else, so it is done anew only for an interface that was not one of them. Returns
    /// whether they can be told.
    fn leave_out_uplinks(
        &mut self,
        host: &Host,
        unidentified: &mut Vec<(String, u32)>,
        now: Instant,
    ) -> bool {
        let known = self.uplinks.take().filter(|(uplinks, read)| {
            let mut names = unidentified.iter().map(|(name, _)| name);
            now.duration_since(*read) < BELIEVED_FOR && names.all(|name| uplinks.contains(name))
        });
        let known = known.map_or_else(|| host.uplinks().map(|uplinks| (uplinks, now)), Ok);
        match known {
            Ok(known) => {
                unidentified.retain(|(name, _)| !known.0.contains(name));
                self.uplinks = Some(known);
                true
            }
            Err(error) => {
                tracing::error!(%error, "quarantine stays as it is: the routes cannot be read");
                false
            }
        }
    }

    fn by_uid(&mut self, host: &mut Host, links: &Links, uid: &str, now: Instant) -> Place {
        let believed_for = if self.quarantine.enabled && !self.unidentified {
            BELIEVED_LONGER_FOR
        } else {
            BELIEVED_FOR
        };
        if let Some((found, looked)) = self.found.get(uid)
            && now.duration_since(*looked) < believed_for
            // Otherwise its network may be half made.
            && found.has_addresses
            && found
                .interfaces
                .iter()
                .all(|ifindex| self.known.contains(ifindex))
        {
            let first = self.sights.of(&found.interfaces);
            return Place::Found(Found {
                first,
                ..found.clone()
            });
        }
        if let Some(missed) = self.missed.get(uid)
            && now < missed.again
        {
            return missed.place.clone();
        }
        let place = match host.locate(links, uid) {
            Ok(located) => {
                self.missed.remove(uid);
                for &ifindex in &located.interfaces {
                    self.sights.is_running(ifindex, now);
                }
                let found = Found {
                    first: self.sights.of(&located.interfaces),
                    interfaces: located.interfaces,
                    has_addresses: !located.addresses.is_empty(),
                    networks: located.namespaces,
                    note: None,
                };
                self.found.insert(uid.to_owned(), (found.clone(), now));
                return Place::Found(found);
            }
            Err(missing) if missing.is_nobody() => Place::Nobody {
                why: missing.to_string(),
                has_group: missing.has_group(),
            },
            Err(missing) if missing.may_pass() => Place::NotYet(missing.to_string()),
            Err(missing) => Place::Nowhere(format!("not enforced: {missing}")),
        };
        let wait = self.missed.get(uid).map_or(RETRY_MIN, |missed| missed.wait);
        let missed = Missed {
            place: place.clone(),
            again: now + wait,
            wait: longer(wait),
        };
        self.missed.insert(uid.to_owned(), missed);
        place
    }

    fn unidentified(
        &mut self,
        links: &Links,
        identified: &HashSet<u32>,
        complete: bool,
    ) -> Vec<(String, u32)> {
        if !self.quarantine.enabled {
            return Vec::new();
        }
        let candidates = || links.pod_like(&self.quarantine.exclude);
        if complete {
            self.before = Some(HashSet::new());
        }
        let before = self
            .before
            .get_or_insert_with(|| candidates().map(|link| link.ifindex).collect());
        candidates()
            .filter(|link| !identified.contains(&link.ifindex) && !before.contains(&link.ifindex))
            .map(|link| (link.name.clone(), link.ifindex))
            .collect()
    }
}

impl Reconciler {
    /// Where each pod is; and among the pods those that stand for interfaces in quarantine.
    pub(super) fn look_around<'a>(
        &mut self,
        source: &'a Snapshot,
    ) -> (Cow<'a, Snapshot>, BTreeMap<PodKey, Place>) {
        let Look {
            mut places,
            unidentified,
        } = self.places.look(source);
        let mut unidentified = unidentified.unwrap_or_else(|| self.quarantined());
        // A pod of which nothing runs any more is still enforced on its interface.
        let held = self.held(source);
        unidentified.retain(|(_, ifindex)| !held.contains(ifindex));
        let mut snapshot = Cow::Borrowed(source);
        for (name, ifindex) in unidentified {
            let (key, pod) = quarantine::stand_in(&name);
            let place = Place::Found(Found {
                interfaces: vec![ifindex],
                first: self.places.sights.of(&[ifindex]),
                ..Found::default()
            });
            places.insert(key.clone(), place);
            snapshot.to_mut().pods.insert(key, pod);
        }
        (snapshot, places)
    }

    /// The interfaces on which pods are enforced that are still there.
    fn held(&self, source: &Snapshot) -> HashSet<u32> {
        let is_there = |key: &PodKey, uid: &str| {
            let pod = source.pods.get(key);
            pod.is_some_and(|pod| pod.uid == uid)
        };
        let enforced = self.enforced.iter();
        enforced
            .filter(|(key, enforced)| is_there(key, &enforced.wanted.uid))
            .flat_map(|(_, enforced)| enforced.wanted.interfaces.iter().copied())
            .collect()
    }

    /// The names and indexes of the interfaces that are in quarantine now.
    fn quarantined(&self) -> Vec<(String, u32)> {
        let enforced = self.enforced.iter();
        enforced
            .filter(|(key, _)| quarantine::is_quarantined(key))
            .filter_map(|(key, enforced)| {
                let ifindex = *enforced.wanted.interfaces.first()?;
                Some((key.1.clone(), ifindex))
            })
            .collect()
    }

    /// How long to wait for the next look, which would be after this.
    pub(super) fn look_again(&self, after: Duration) -> Duration {
        let arrivals = self.places.arrivals.as_ref();
        if arrivals.is_some_and(|arrivals| arrivals.waiting) {
            after.min(LOOK_AGAIN)
        } else {
            after
        }
    }

    /// Whether something is expected to be found soon.
    pub(super) fn is_expecting(&self) -> bool {
        self.waiting.any() || self.places.unidentified
    }
}
