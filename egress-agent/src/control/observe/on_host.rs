//! Finding the interfaces of pods that a kubelet runs, and interfaces whose pods are not known.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{Duration, Instant},
};

use egress_common::ids::IfIndex;

use super::{
    backoff::{RETRY_MIN, longer},
    first_addresses::{FirstAddresses, FirstSights},
    locations::{Location, Look, PodLocation},
    new_interfaces::NewInterfaces,
};
use crate::{
    config::Quarantine,
    host::{Host, Links},
    pods::Snapshot,
};

/// How long a location is used without another look, as long as its interfaces are there.
const BELIEVED_FOR: Duration = Duration::from_secs(10);
/// How long a location is used when every interface has its pod: quarantine would show another interface of the pod.
const BELIEVED_LONGER_FOR: Duration = Duration::from_secs(60);

/// Finds pods by their control groups, and remembers their locations.
pub(in crate::control) struct OnHost {
    quarantine: Quarantine,
    /// With clsact: the interfaces that are left alone until their networks are complete.
    new_interfaces: Option<NewInterfaces>,
    /// By UID: the location, and when it was found.
    found: HashMap<String, (PodLocation, Instant)>,
    /// By UID: the pods that were not found.
    missed: HashMap<String, Missed>,
    /// The interfaces that were there before the source of pods first said which pods there are. They are not
    /// quarantined before it has.
    before: Option<HashSet<IfIndex>>,
    /// Interfaces that were there at the last look.
    known: HashSet<IfIndex>,
    /// The addresses that each interface had at first sight.
    sights: FirstSights,
    /// The interfaces behind which pods were found at the last look.
    identified: HashSet<IfIndex>,
    /// The interfaces that the machine's default routes lead through, and when they were last read.
    uplinks: Option<(HashSet<String>, Instant)>,
    /// Whether some interface has no pod yet.
    unidentified: bool,
}

/// A pod that was not found.
struct Missed {
    /// Why.
    location: Location,
    /// When to look again.
    again: Instant,
    /// How long to wait after that.
    wait: Duration,
}

impl OnHost {
    pub(in crate::control) fn new(
        quarantine: Quarantine,
        new_interfaces: Option<NewInterfaces>,
        sights: FirstSights,
    ) -> Self {
        Self {
            quarantine,
            new_interfaces,
            found: HashMap::new(),
            missed: HashMap::new(),
            before: None,
            known: HashSet::new(),
            sights,
            identified: HashSet::new(),
            uplinks: None,
            unidentified: false,
        }
    }

    /// The interfaces of the host at the last look.
    pub(super) fn there(&self) -> &HashSet<IfIndex> {
        &self.known
    }

    /// Whether interfaces are closed until their pods are known.
    pub(super) fn has_quarantine(&self) -> bool {
        self.quarantine.enabled
    }

    /// Whether some interface has no pod yet.
    pub(super) fn has_unidentified(&self) -> bool {
        self.unidentified
    }

    /// Whether an interface is left alone until its network is complete.
    pub(super) fn waits_for_networks(&self) -> bool {
        let new_interfaces = self.new_interfaces.as_ref();
        new_interfaces.is_some_and(|new_interfaces| new_interfaces.waiting)
    }

    /// Notes that the agent is attached to these interfaces.
    pub(super) fn note_attached(&mut self, interfaces: impl IntoIterator<Item = IfIndex>) {
        if let Some(new_interfaces) = &mut self.new_interfaces {
            new_interfaces.note_attached(interfaces);
        }
    }

    /// The addresses that an interface had at first sight.
    pub(super) fn first_addresses(&self, ifindex: IfIndex) -> FirstAddresses {
        self.sights.of(&[ifindex])
    }

    /// Looks for every pod, and for interfaces without one, among these interfaces of the host.
    pub(super) fn look(&mut self, host: &mut Host, links: &Links, snapshot: &Snapshot) -> Look {
        let now = Instant::now();
        let identified = self.identified.iter();
        let running: HashSet<i32> = identified
            .filter_map(|&ifindex| Some(links.get(ifindex)?.peer?.nsid))
            .collect();
        self.sights
            .look(host, links, |nsid| running.contains(&nsid), now);
        let there: HashSet<IfIndex> = links.iter().map(|link| link.ifindex).collect();
        let fresh: HashSet<i32> = links
            .iter()
            .filter(|link| !self.known.contains(&link.ifindex))
            .filter_map(|link| Some(link.peer?.nsid))
            .collect();
        if !there.is_subset(&self.known) {
            // A new interface may belong to a pod that was not found, or be the second one of a pod.
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

        let mut locations = BTreeMap::new();
        let mut identified = HashSet::new();
        for (key, pod) in &snapshot.pods {
            let location = match &pod.cgroup_uid {
                None => Location::Nowhere(
                    "not enforced: nothing says which control group is its".into(),
                ),
                Some(_) if pod.host_network => {
                    Location::Nowhere("the pod is in the host's network".into())
                }
                Some(uid) => self.by_uid(host, links, uid, now),
            };
            if let Location::Found(found) = &location {
                identified.extend(found.interfaces.iter().copied());
            }
            locations.insert(key.clone().into(), location);
        }
        let mut unidentified = self.unidentified(links, &identified, !snapshot.unreadable);
        // Without the routes the machine's own interface could be quarantined.
        let can_tell =
            unidentified.is_empty() || self.leave_out_uplinks(host, &mut unidentified, now);
        self.unidentified = !unidentified.is_empty();
        if let Some(new_interfaces) = &mut self.new_interfaces {
            new_interfaces.leave_out(&mut unidentified, links, host, now);
        }
        self.identified = identified;
        Look {
            locations,
            unidentified: can_tell.then_some(unidentified),
        }
    }

    /// Removes the interfaces that the machine's default routes lead through. Where there are many routes, reading
    /// them takes longer than everything else, so they are read again only for an interface that was not one of
    /// them. Returns whether they could be read.
    fn leave_out_uplinks(
        &mut self,
        host: &Host,
        unidentified: &mut Vec<(String, IfIndex)>,
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
                tracing::error!(%error, "cannot read the routes: quarantine is not changed");
                false
            }
        }
    }

    fn by_uid(&mut self, host: &mut Host, links: &Links, uid: &str, now: Instant) -> Location {
        let believed_for = if self.quarantine.enabled && !self.unidentified {
            BELIEVED_LONGER_FOR
        } else {
            BELIEVED_FOR
        };
        if let Some((found, looked)) = self.found.get(uid)
            && now.duration_since(*looked) < believed_for
            // Without addresses the pod's network may be incomplete.
            && found.has_addresses
            && found
                .interfaces
                .iter()
                .all(|ifindex| self.known.contains(ifindex))
        {
            let first = self.sights.of(&found.interfaces);
            return Location::Found(PodLocation {
                first,
                ..found.clone()
            });
        }
        if let Some(missed) = self.missed.get(uid)
            && now < missed.again
        {
            return missed.location.clone();
        }
        let location = match host.locate(links, uid) {
            Ok(located) => {
                self.missed.remove(uid);
                for &ifindex in &located.interfaces {
                    self.sights.is_running(ifindex, now);
                }
                let found = PodLocation {
                    first: self.sights.of(&located.interfaces),
                    interfaces: located.interfaces,
                    has_addresses: !located.addresses.is_empty(),
                    networks: located.namespaces,
                    note: None,
                };
                self.found.insert(uid.to_owned(), (found.clone(), now));
                return Location::Found(found);
            }
            Err(missing) if missing.has_no_process() => Location::Nobody {
                why: missing.to_string(),
                has_group: missing.has_group(),
            },
            Err(missing) if missing.is_transient() => Location::NotYet(missing.to_string()),
            Err(missing) => Location::Nowhere(format!("not enforced: {missing}")),
        };
        let wait = self.missed.get(uid).map_or(RETRY_MIN, |missed| missed.wait);
        let missed = Missed {
            location: location.clone(),
            again: now + wait,
            wait: longer(wait),
        };
        self.missed.insert(uid.to_owned(), missed);
        location
    }

    fn unidentified(
        &mut self,
        links: &Links,
        identified: &HashSet<IfIndex>,
        complete: bool,
    ) -> Vec<(String, IfIndex)> {
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
