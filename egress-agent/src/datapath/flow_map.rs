//! A pod's flows.

use std::{cmp::Reverse, collections::HashSet};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData, MapError};
use egress_common::{
    address::Address,
    flow::{UDP_NS, idle_limit_ns, is_alive, is_open},
    ids::PolicyId,
    protocol,
    records::{
        FLOW_IN, FLOW_KEY_ACCEPTED, FLOW_KEY_ACCEPTED_GROUP, FLOW_KEY_FLOW, FLOW_OUT,
        FLOW_SEEN_AGAIN, FLOW_SEEN_IN, FLOW_SEEN_OUT, Flow, FlowKey, FlowValue, UNJUDGED,
    },
};

use super::{
    keyed::{Keyed, read, values},
    policies::ignore_missing,
    take::take,
};

/// `BPF_ANY`: insert or replace.
const ANY: u64 = 0;
/// `BPF_NOEXIST`: insert, and replace nothing.
const NOEXIST: u64 = 1;

/// A program that notes a destination opens the flow within this time.
const CALLING_NS: u64 = 100_000_000;

type Flows = HashMap<MapData, FlowKey, FlowValue>;

impl Keyed for FlowValue {
    type Key = FlowKey;

    fn key(&self) -> FlowKey {
        self.key
    }
}

/// Handle on one pod's flows.
pub struct FlowMap {
    /// Established flows that the pod opened.
    pub(super) flows: Flows,
    /// Established flows that peers opened.
    inbound: Flows,
    /// Flows that are not established, or closed, and the connections that peers have accepted.
    pub(super) opening: Flows,
    /// The addresses and ports to which the pod has connected ([`FlowKey::called`]).
    called: HashMap<MapData, FlowKey, Flow>,
    limits: Limits,
    /// How long a UDP flow that the pod opened may be idle.
    pub(super) udp_ns: u64,
    /// The secret of [`FlowKey::accepted_group`].
    secret: u32,
}

/// The capacities of the maps.
#[derive(Clone, Copy, Debug)]
struct Limits {
    established: usize,
    called: usize,
}

/// The result of sweeping all flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepResult {
    /// How many flows are tracked.
    pub alive: usize,
    /// How many established inbound flows were evicted.
    pub evicted: usize,
    /// How many destinations of the pod (addresses and ports) were evicted.
    pub called: usize,
}

/// A connection from before the enforcement of its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed {
    /// IP protocol number.
    pub protocol: u8,
    /// The pod's address and port.
    pub pod: (Address, u16),
    /// The peer's address and port.
    pub peer: (Address, u16),
    /// How it is treated.
    pub state: SeedState,
}

/// How a connection from before the enforcement is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeedState {
    /// The peer opened it, so the pod may reply.
    Inbound,
    /// The pod opened it, and it counts as admitted by this policy.
    Admitted(PolicyId),
    /// The pod opened it, and the next packet that it sends is judged. Until then, no packet of the
    /// peer can make the flow look inbound.
    Unjudged,
}

impl Seed {
    const fn key(&self) -> FlowKey {
        FlowKey {
            pod_addr: self.pod.0,
            peer_addr: self.peer.0,
            pod_port: self.pod.1,
            peer_port: self.peer.1,
            protocol: self.protocol,
            kind: FLOW_KEY_FLOW,
            pad: 0,
        }
    }

    const fn flow(&self, now_ns: u64) -> Flow {
        let (state, policy) = match self.state {
            SeedState::Inbound => (FLOW_IN, UNJUDGED),
            SeedState::Admitted(policy) => (FLOW_OUT, policy),
            SeedState::Unjudged => (FLOW_OUT, UNJUDGED),
        };
        let mut flow = Flow::new(policy, state, now_ns);
        flow.seen = FLOW_SEEN_IN | FLOW_SEEN_OUT | FLOW_SEEN_AGAIN;
        flow
    }
}

impl FlowMap {
    pub(super) fn new(
        flows: MapData,
        inbound: MapData,
        opening: MapData,
        called: MapData,
        (udp_ns, secret): (u64, u32),
    ) -> Result<Self> {
        let limits = Limits {
            established: entries_of(&inbound)?,
            called: entries_of(&called)?,
        };
        Ok(Self {
            flows: Map::HashMap(flows).try_into()?,
            inbound: Map::HashMap(inbound).try_into()?,
            opening: Map::HashMap(opening).try_into()?,
            called: Map::HashMap(called).try_into()?,
            limits,
            udp_ns,
            secret,
        })
    }

    /// Every tracked flow, every tracked fragmented packet, and every connection that a peer has accepted.
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    pub fn entries(&self) -> Result<Vec<(FlowKey, Flow)>> {
        let maps = [&self.flows, &self.inbound, &self.opening];
        maps.into_iter()
            .flat_map(flows_of)
            .collect::<Result<_, _>>()
            .context("cannot read a pod's flows")
    }

    /// Records that the pod has opened a TCP connection to the peer's address and port, so that no packet
    /// from there opens a connection to the pod.
    ///
    /// # Errors
    ///
    /// When the map is full or cannot be written.
    pub fn note_called(&mut self, seed: &Seed, now_ns: u64) -> Result<()> {
        let inserted = self
            .called
            .insert(seed.key().called(), seed.flow(now_ns), NOEXIST);
        is_added(inserted).map(|_| ())
    }

    /// Whether the map has this connection as one that the other side has opened.
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    pub fn has_inbound(&self, seed: &Seed) -> Result<bool> {
        for map in [&self.inbound, &self.opening] {
            let value = read(map, &seed.key()).context("cannot read a pod's flows")?;
            if value.is_some_and(|value| value.flow.state == FLOW_IN) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Adds a connection as an established flow. A flow that exists already stays unchanged. Returns whether
    /// the flow was added.
    ///
    /// # Errors
    ///
    /// When the map is full or cannot be written.
    pub fn seed(&mut self, seed: &Seed, now_ns: u64) -> Result<bool> {
        let map = match seed.state {
            SeedState::Inbound => &mut self.inbound,
            SeedState::Admitted(_) | SeedState::Unjudged => &mut self.flows,
        };
        add(map, &seed.key(), seed.flow(now_ns))
    }

    /// Copies from another pod's maps the flows that peers have opened towards the pod, and what [`Self::take_noted`]
    /// copies. Returns the number of flows. If there are more than the map has room for, those that were seen last are
    /// copied: otherwise a pod with many connections would stay in quarantine.
    ///
    /// # Errors
    ///
    /// When a map cannot be read or written.
    pub fn take_inbound(&mut self, other: &Self, now_ns: u64) -> Result<usize> {
        self.take_noted(other, now_ns)?;
        let mut flows = other.entries()?;
        flows.retain(|(key, flow)| key.kind == FLOW_KEY_FLOW && flow.state == FLOW_IN);
        flows.sort_unstable_by_key(|(_, flow)| Reverse(flow.last_seen_ns));
        let mut room = self.limits.established;
        for item in self.inbound.keys() {
            item.context("cannot read a pod's flows")?;
            room = room.saturating_sub(1);
        }
        let mut taken = 0;
        for (key, flow) in flows {
            if taken >= room {
                break;
            }
            // The pod has connected to the peer, so the peer did not open the flow.
            if key.protocol == protocol::TCP && self.has_called(&key)? {
                continue;
            }
            taken += usize::from(add(&mut self.inbound, &key, flow)?);
        }
        Ok(taken)
    }

    fn has_called(&self, key: &FlowKey) -> Result<bool> {
        match self.called.get(&key.called(), 0) {
            Ok(_) => Ok(true),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(error) => Err(error).context("cannot read the destinations of a pod"),
        }
    }

    /// Copies from another pod's maps what shows that a peer has not opened a connection: the addresses and ports to
    /// which the pod has connected, and the groups of the peers that have accepted a connection. If there are more
    /// destinations than the map has room for, those that were seen last are copied, as [`Self::sweep`] would keep them:
    /// otherwise a pod that connects to many would stay in quarantine. The map has room for all groups, but not for the
    /// record of each connection: these have a place in a queue, which only the programs write.
    ///
    /// # Errors
    ///
    /// When a map cannot be read or written.
    pub fn take_noted(&mut self, other: &Self, now_ns: u64) -> Result<()> {
        let called = other.called.iter().collect::<Result<Vec<_>, _>>();
        let mut called = called.context("cannot read the destinations of a pod")?;
        called.sort_unstable_by_key(|(_, flow)| Reverse(flow.last_seen_ns));
        for (key, flow) in called {
            match self.called.insert(key, flow, NOEXIST) {
                Err(error) if is_errno(&error, libc::E2BIG) => break,
                Err(error) if !is_errno(&error, libc::EEXIST) => {
                    return Err(error).context("cannot write the destinations of a pod");
                }
                Ok(()) | Err(_) => {}
            }
        }
        let mut groups = HashSet::new();
        for item in flows_of(&other.opening) {
            let (key, flow) = item.context("cannot read a pod's flows")?;
            let is_alive = is_alive(&key, &flow, now_ns, self.udp_ns);
            match key.kind {
                FLOW_KEY_ACCEPTED if is_alive => groups.insert(key.accepted_group(self.secret)),
                FLOW_KEY_ACCEPTED_GROUP if is_alive => groups.insert(key),
                _ => false,
            };
        }
        for key in groups {
            // A program may have written a later time than that of the copy.
            let flow = Flow::new(UNJUDGED, FLOW_IN, now_ns);
            self.opening
                .insert(key, FlowValue { flow, key }, ANY)
                .context("cannot write a pod's flows")?;
        }
        Ok(())
    }

    /// Removes the flows that peers have opened towards the pod. Returns how many there were.
    ///
    /// # Errors
    ///
    /// When a map cannot be read or written.
    pub fn forget_inbound(&mut self) -> Result<usize> {
        let mut forgotten = 0;
        for (key, flow) in self.entries()? {
            if key.kind == FLOW_KEY_FLOW && flow.state == FLOW_IN {
                for map in [&mut self.inbound, &mut self.opening] {
                    ignore_missing(map.remove(&key)).context("cannot forget a flow")?;
                }
                forgotten += 1;
            }
        }
        Ok(forgotten)
    }

    /// Removes flows that have been idle for too long, evicts entries if there are too many established
    /// inbound flows or destinations of the pod, and passes each destination of an open flow of the pod to
    /// `open`.
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    pub fn sweep(&mut self, now_ns: u64, mut open: impl FnMut(Address)) -> Result<SweepResult> {
        let mut swept = SweepResult::default();
        let mut in_use = HashSet::new();
        let udp_ns = self.udp_ns;
        for map in [&mut self.flows, &mut self.opening] {
            swept.alive += forget_idle(map, now_ns, udp_ns, |key, flow| {
                if is_open(key, flow, now_ns, udp_ns) {
                    open(key.peer_addr);
                    in_use.insert(key.called());
                }
            })?;
        }
        swept.called = self.forget_called(&in_use, now_ns.saturating_sub(CALLING_NS))?;
        let mut inbound = Vec::new();
        forget_idle(&mut self.inbound, now_ns, udp_ns, |key, flow| {
            inbound.push((*key, *flow));
        })?;
        let surplus = surplus(&mut inbound, self.limits.established);
        for (key, _) in surplus {
            ignore_missing(self.inbound.remove(key)).context("cannot forget a flow")?;
        }
        swept.evicted = surplus.len();
        swept.alive += inbound.len() - swept.evicted;
        Ok(swept)
    }

    /// The destinations of the pod.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    #[cfg(feature = "test-support")]
    pub fn called(&self) -> Result<Vec<(FlowKey, Flow)>> {
        let called = self.called.iter().collect::<Result<_, _>>();
        called.context("cannot read the destinations of a pod")
    }

    /// When three quarters of the capacity are used, removes the destinations to which the pod has not
    /// connected for the longest time and to which it has no open flow, until half of the capacity is free.
    /// Those stay to which the pod has connected since `before_ns`: `in_use` may not have their flows yet. Returns how
    /// many it has removed.
    fn forget_called(&mut self, in_use: &HashSet<FlowKey>, before_ns: u64) -> Result<usize> {
        let known = self.called.iter().collect::<Result<Vec<_>, _>>();
        let mut known = known.context("cannot read the destinations of a pod")?;
        let places = self.limits.called;
        if known.len() < places - places / 4 {
            return Ok(0);
        }
        let surplus = known.len() - places / 2;
        known.retain(|(key, flow)| flow.last_seen_ns < before_ns && !in_use.contains(key));
        known.sort_unstable_by_key(|(_, flow)| flow.last_seen_ns);
        known.truncate(surplus);
        let mut forgotten = 0;
        let mut full = Vec::new();
        for (key, judged) in known {
            let taken = take(&mut self.called, &key);
            match taken.context("cannot remove a destination of a pod")? {
                // The pod has connected to it again meanwhile.
                Some(now) if now != judged => match self.called.insert(key, now, NOEXIST) {
                    Err(error) if is_errno(&error, libc::E2BIG) => full.push((key, now)),
                    inserted => drop(is_added(inserted)?),
                },
                taken => forgotten += usize::from(taken.is_some()),
            }
        }
        // Others had taken their places, and now there is room.
        for (key, now) in full {
            is_added(self.called.insert(key, now, NOEXIST))?;
        }
        Ok(forgotten)
    }
}

/// The flows of a map.
fn flows_of(map: &Flows) -> impl Iterator<Item = Result<(FlowKey, Flow), MapError>> {
    values(map).map(|value| value.map(|FlowValue { key, flow }| (key, flow)))
}

/// Adds a flow unless the map has it already. Returns whether it was added.
fn add(map: &mut Flows, key: &FlowKey, flow: Flow) -> Result<bool> {
    let key = *key;
    is_added(map.insert(key, FlowValue { flow, key }, NOEXIST))
}

/// Whether an insertion has added an entry that the map did not have.
fn is_added(inserted: Result<(), MapError>) -> Result<bool> {
    match inserted {
        Ok(()) => Ok(true),
        Err(error) if is_errno(&error, libc::EEXIST) => Ok(false),
        Err(error) => Err(error).context("cannot write a pod's flows"),
    }
}

/// Whether the kernel refused with this error number.
fn is_errno(error: &MapError, errno: i32) -> bool {
    matches!(error, MapError::SyscallError(error) if error.io_error.raw_os_error() == Some(errno))
}

/// Removes flows that have been idle for too long, and passes the others to `alive`. Returns their number.
///
/// The records of connections that peers have accepted stay until newer ones evict them. A program may renew one between
/// the moment when it is read here and its removal, and a record that is too old does not count in any case.
fn forget_idle(
    map: &mut Flows,
    now_ns: u64,
    udp_ns: u64,
    mut alive: impl FnMut(&FlowKey, &Flow),
) -> Result<usize> {
    let mut idle = Vec::new();
    let mut count = 0;
    for item in flows_of(map) {
        let (key, flow) = item.context("cannot read a pod's flows")?;
        if matches!(key.kind, FLOW_KEY_ACCEPTED | FLOW_KEY_ACCEPTED_GROUP) {
            continue;
        }
        if is_alive(&key, &flow, now_ns, udp_ns) {
            count += 1;
            alive(&key, &flow);
        } else {
            idle.push(key);
        }
    }
    for key in idle {
        ignore_missing(map.remove(&key)).context("cannot forget a flow")?;
    }
    Ok(count)
}

/// The established inbound flows to evict. When fewer than a sixteenth of the capacity is free, these are as
/// many as leave an eighth free. They are the ones that would expire first: flows over UDP, and then the TCP
/// connection that has been silent for the longest time.
fn surplus(flows: &mut [(FlowKey, Flow)], places: usize) -> &[(FlowKey, Flow)] {
    if flows.len() < places - places / 16 {
        return &[];
    }
    let surplus = flows.len() - (places - places / 8);
    if surplus == 0 {
        return &[];
    }
    let ends = |(key, flow): &(FlowKey, Flow)| {
        (
            key.protocol == protocol::TCP,
            flow.last_seen_ns
                .saturating_add(idle_limit_ns(key, flow, UDP_NS)),
        )
    };
    flows.select_nth_unstable_by_key(surplus - 1, ends);
    &flows[..surplus]
}

fn entries_of(map: &MapData) -> Result<usize> {
    let info = map
        .info()
        .context("cannot read the kernel's description of a flow map")?;
    Ok(info.max_entries() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(protocol: u8, port: u16, last_seen_ns: u64) -> (FlowKey, Flow) {
        let key = FlowKey {
            pod_addr: [0; 16],
            peer_addr: [0; 16],
            pod_port: 80,
            peer_port: port,
            protocol,
            kind: FLOW_KEY_FLOW,
            pad: 0,
        };
        let mut flow = Flow::new(UNJUDGED, FLOW_IN, last_seen_ns);
        flow.seen = FLOW_SEEN_IN | FLOW_SEEN_OUT | FLOW_SEEN_AGAIN;
        (key, flow)
    }

    fn ports(surplus: &[(FlowKey, Flow)]) -> Vec<u16> {
        let mut ports: Vec<u16> = surplus.iter().map(|(key, _)| key.peer_port).collect();
        ports.sort_unstable();
        ports
    }

    #[test]
    fn no_flow_is_evicted_while_there_is_room() {
        let mut flows: Vec<_> = (0..59).map(|n| flow(protocol::TCP, n, 0)).collect();
        assert!(surplus(&mut flows, 64).is_empty());
    }

    #[test]
    fn connections_that_were_silent_for_the_longest_time_are_evicted() {
        let mut flows: Vec<_> = (0..60u16)
            .map(|n| flow(protocol::TCP, n, u64::from((n * 7) % 60)))
            .collect();
        let longest: Vec<u16> = (0..60).filter(|n| (n * 7) % 60 < 4).collect();
        assert_eq!(ports(surplus(&mut flows, 64)), longest);
    }

    #[test]
    fn udp_flows_are_evicted_before_tcp_connections() {
        let mut flows: Vec<_> = (0..60u16)
            .map(|n| {
                if n < 4 {
                    flow(protocol::UDP, n, u64::MAX)
                } else {
                    flow(protocol::TCP, n, 0)
                }
            })
            .collect();
        assert_eq!(ports(surplus(&mut flows, 64)), [0, 1, 2, 3]);
    }
}
