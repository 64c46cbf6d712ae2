//! The addresses that pods' interfaces had when they were made.
//!
//! A network plugin configures the pod's end of an interface before any program of the pod runs.
//! After that a program with `CAP_NET_ADMIN` may give it any address. So the agent reads the kernel's addresses
//! until there are some, and never again.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use egress_common::{
    address,
    ids::IfIndex,
    limits::OWN_ADDRESSES,
    records::{POLICY_OWN_UNSURE, POLICY_UNIDENTIFIED},
};

use crate::{
    datapath::{Adoptable, Datapath},
    host::{Host, Links},
};

/// A plugin sets the addresses of one interface within this time of each other.
const SETTLES_IN: Duration = Duration::from_millis(100);

/// A look this much later than the last one without addresses may find addresses that a program chose: a container
/// may have been started meanwhile.
const LATE: Duration = Duration::from_secs(2);

/// An interface that has no addresses for this long is not looked at any more: nobody configures it now.
const GIVE_UP: Duration = Duration::from_secs(60);

/// Most addresses of one interface that count.
const ADDRESSES: usize = OWN_ADDRESSES;

/// The addresses that one interface had at first sight.
#[derive(Debug)]
struct Sight {
    addresses: Vec<IpAddr>,
    /// Whether the addresses were there before a program of a pod could change them.
    made: bool,
    /// The look that found the interface.
    since: Instant,
    /// The last look without addresses; none of an interface that was there at the first look.
    without: Option<Instant>,
    /// The first look with addresses.
    with: Option<Instant>,
    /// Whether the addresses are final.
    settled: bool,
}

/// The addresses that were seen on each interface, by the index of its host end.
#[derive(Debug, Default)]
pub(in crate::control) struct FirstSights {
    interfaces: HashMap<IfIndex, Sight>,
    last_look: Option<Instant>,
}

impl FirstSights {
    /// Starts with the addresses that an earlier agent took for its pods' own.
    ///
    /// # Errors
    ///
    /// When the kernel's maps cannot be read.
    pub(in crate::control) fn inherit<'a>(
        datapath: &Datapath,
        left: impl Iterator<Item = &'a Adoptable>,
    ) -> anyhow::Result<Self> {
        let mut sights = Self::default();
        for &(ifindex, entry) in left.flat_map(|left| &left.interfaces) {
            let Some(policy) = datapath.policy(entry.policy())? else {
                continue;
            };
            if policy.own_len == 0 {
                // The earlier agent had not seen any yet.
                continue;
            }
            let own = policy.own.iter().take(policy.own_len as usize);
            let sight = Sight {
                addresses: own.map(to_ip).collect(),
                // If the pod was not known, or had no address in its status, a program may have set the address.
                made: policy.flags & (POLICY_UNIDENTIFIED | POLICY_OWN_UNSURE) == 0,
                since: Instant::now(),
                without: None,
                with: None,
                settled: true,
            };
            sights.interfaces.insert(ifindex, sight);
        }
        Ok(sights)
    }

    /// Looks at the interfaces that are there now. `is_running` says whether a process of a pod was
    /// found in the network namespace of this number.
    pub(super) fn look(
        &mut self,
        host: &mut Host,
        links: &Links,
        is_running: impl Fn(i32) -> bool,
        now: Instant,
    ) {
        let last_look = self.last_look.replace(now);
        self.interfaces
            .retain(|&ifindex, _| links.get(ifindex).is_some());
        for link in links.iter().filter(|link| link.is_host_end()) {
            let Some(peer) = link.peer else {
                continue;
            };
            let sight = self.interfaces.entry(link.ifindex).or_insert(Sight {
                addresses: Vec::new(),
                made: last_look.is_some(),
                since: now,
                without: last_look,
                with: None,
                // A program may configure an interface that is added to a running pod.
                settled: is_running(peer.nsid),
            });
            if sight.settled {
                continue;
            }
            // An interface that has gone, or moved, counts as a new one at the next look.
            let Ok(Some(addresses)) = host.addresses_of(link.ifindex, peer) else {
                continue;
            };
            sight.note(&addresses, now);
        }
    }

    /// A process of a pod was found behind this interface.
    pub(in crate::control) fn is_running(&mut self, ifindex: IfIndex, now: Instant) {
        if let Some(sight) = self.interfaces.get_mut(&ifindex) {
            // A program may have chosen addresses that appear for the first time now, or later.
            sight.made &= sight.settled || sight.with.is_some_and(|with| with < now);
        }
    }

    /// The addresses that these interfaces had at first sight, and which of them no program can have chosen.
    pub(in crate::control) fn of(&self, interfaces: &[IfIndex]) -> FirstAddresses {
        let mut first = FirstAddresses::default();
        for sight in interfaces
            .iter()
            .filter_map(|index| self.interfaces.get(index))
        {
            first.seen.extend(&sight.addresses);
            if sight.made {
                first.made.extend(&sight.addresses);
            }
        }
        for addresses in [&mut first.seen, &mut first.made] {
            addresses.sort_unstable();
            addresses.dedup();
        }
        first
    }
}

/// The addresses that a pod's interfaces had at first sight, in order.
#[derive(Clone, Debug, Default)]
pub(in crate::control) struct FirstAddresses {
    /// All of them.
    pub(in crate::control) seen: Vec<IpAddr>,
    /// Those that no program of the pod can have chosen.
    pub(in crate::control) made: Vec<IpAddr>,
}

impl Sight {
    /// Records the addresses that the interface has now.
    fn note(&mut self, addresses: &[IpAddr], now: Instant) {
        match self.with {
            None if addresses.is_empty() => {
                self.without = Some(now);
                self.settled = now.duration_since(self.since) > GIVE_UP;
                return;
            }
            None => {
                let is_late = |without| now.duration_since(without) > LATE;
                self.made &= !self.without.is_none_or(is_late);
                self.with = Some(now);
            }
            Some(with) if now.duration_since(with) > SETTLES_IN => {
                self.settled = true;
                return;
            }
            Some(_) => {}
        }
        for address in addresses {
            if self.addresses.len() < ADDRESSES && !self.addresses.contains(address) {
                self.addresses.push(*address);
            }
        }
    }
}

fn to_ip(mapped: &address::Address) -> IpAddr {
    std::net::Ipv6Addr::from(*mapped).to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    const VETH: IfIndex = IfIndex::new(7);
    const FIRST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const SECOND: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    fn sights(last_look: Option<Instant>) -> FirstSights {
        let sight = Sight {
            addresses: Vec::new(),
            made: last_look.is_some(),
            since: Instant::now(),
            without: last_look,
            with: None,
            settled: false,
        };
        FirstSights {
            interfaces: HashMap::from([(VETH, sight)]),
            last_look,
        }
    }

    impl FirstSights {
        fn note(&mut self, addresses: &[IpAddr], now: Instant) {
            let sight = self.interfaces.get_mut(&VETH).expect("the interface");
            if !sight.settled {
                sight.note(addresses, now);
            }
        }

        /// How many addresses were seen, and how many no program can have chosen.
        fn counts(&self) -> (usize, usize) {
            let first = self.of(&[VETH]);
            (first.seen.len(), first.made.len())
        }
    }

    #[test]
    fn addresses_count_that_are_there_together_and_none_that_come_later() {
        let start = Instant::now();
        let mut sights = sights(Some(start));
        let at = |millis| start + Duration::from_millis(millis);
        sights.note(&[], at(10));
        sights.note(&[FIRST], at(30));
        sights.note(&[FIRST, SECOND], at(60));
        sights.is_running(VETH, at(70));
        sights.note(&[IpAddr::from([10, 0, 0, 3])], at(200));
        sights.note(&[IpAddr::from([10, 0, 0, 4])], at(210));
        assert_eq!(sights.counts(), (2, 2));
        assert_eq!(sights.of(&[VETH]).made, [FIRST, SECOND]);
        assert_eq!(sights.of(&[IfIndex::new(8)]).seen.len(), 0);
    }

    #[test]
    fn what_a_program_may_have_chosen_is_told_from_what_the_interface_was_made_with() {
        let start = Instant::now();
        // A program runs before there are addresses.
        let mut running = sights(Some(start));
        running.is_running(VETH, start);
        running.note(&[FIRST], start);
        assert_eq!(running.counts(), (1, 0));
        // Both are found by the same look.
        let mut together = sights(Some(start));
        together.note(&[FIRST], start);
        together.is_running(VETH, start);
        assert_eq!(together.counts(), (1, 0));
        // There was no look for a long time.
        let mut late = sights(Some(start));
        late.note(&[FIRST], start + LATE + Duration::from_millis(1));
        assert_eq!(late.counts(), (1, 0));
        // It was there before the first look.
        let mut before = sights(None);
        before.note(&[FIRST], start);
        assert_eq!(before.counts(), (1, 0));
    }
}
