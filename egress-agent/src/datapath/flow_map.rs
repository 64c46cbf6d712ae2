//! A pod's flows.

use std::collections::HashSet;

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData, MapError};
use egress_common::{
    address::Address,
    flow::{is_alive, is_open},
    limits::FLOW_ENTRIES,
    records::{
        FLOW_IN, FLOW_KEY_FLOW, FLOW_OUT, FLOW_SEEN_IN, FLOW_SEEN_OUT, Flow, FlowKey, UNJUDGED,
    },
};

use super::{AllowError, policies::gone};

/// `BPF_NOEXIST`: insert, and replace nothing.
const NOEXIST: u64 = 1;

/// Handle on one pod's flows.
pub struct FlowMap(pub(super) HashMap<MapData, FlowKey, Flow>);

/// The flows that a pod has open.
#[derive(Debug, Default)]
pub struct OpenFlows {
    /// Where they lead.
    pub to: HashSet<Address>,
    /// How many flows were looked at, open or not.
    pub flows: usize,
}

/// A connection that was open before anybody looked at its packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seed {
    /// IP protocol number.
    pub protocol: u8,
    /// The pod's address and port.
    pub pod: (Address, u16),
    /// The other side's.
    pub peer: (Address, u16),
    /// What becomes of it.
    pub state: SeedState,
}

/// What becomes of a connection that was open before anybody looked at its packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeedState {
    /// The other side opened it, so the pod may answer.
    Inbound,
    /// The pod opened it, and it counts as admitted by this policy.
    Admitted(u32),
    /// The pod opened it, and the next packet that it sends is judged. Until then nothing that the
    /// other side sends makes it look as if that had opened it.
    Unjudged,
}

impl FlowMap {
    /// Every flow and every fragmented packet that is remembered.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn entries(&self) -> Result<Vec<(FlowKey, Flow)>> {
        self.0
            .iter()
            .collect::<Result<_, _>>()
            .context("cannot read a pod's flows")
    }

    /// The flows that the pod has open.
    ///
    /// # Errors
    ///
    /// When the map cannot be read; [`AllowError::Full`] when it changes too fast for that.
    pub fn open(&self, now_ns: u64) -> Result<OpenFlows, AllowError> {
        let mut open = OpenFlows::default();
        for item in &self.0 {
            let (key, flow) = item.map_err(AllowError::Kernel)?;
            if is_open(&key, &flow, now_ns) {
                open.to.insert(key.peer_addr);
            }
            // Where the entry last seen is removed, the kernel begins again with the first.
            open.flows += 1;
            if open.flows > 2 * FLOW_ENTRIES as usize {
                return Err(AllowError::Full);
            }
        }
        Ok(open)
    }

    /// Takes a connection for one that both sides have spoken on. A flow that is known already stays as
    /// it is; returns whether it was not.
    ///
    /// # Errors
    ///
    /// When the map is full or cannot be written.
    pub fn seed(&mut self, seed: &Seed, now_ns: u64) -> Result<bool> {
        let key = FlowKey {
            pod_addr: seed.pod.0,
            peer_addr: seed.peer.0,
            pod_port: seed.pod.1,
            peer_port: seed.peer.1,
            protocol: seed.protocol,
            kind: FLOW_KEY_FLOW,
            pad: 0,
        };
        let (state, policy) = match seed.state {
            SeedState::Inbound => (FLOW_IN, UNJUDGED),
            SeedState::Admitted(policy) => (FLOW_OUT, policy),
            SeedState::Unjudged => (FLOW_OUT, UNJUDGED),
        };
        let flow = Flow {
            last_seen_ns: now_ns,
            policy,
            state,
            seen: FLOW_SEEN_IN | FLOW_SEEN_OUT,
            pad: 0,
        };
        self.add(&key, flow)
    }

    /// Takes over the flows that others have opened towards the pod, and that another map remembers.
    /// Returns how many.
    ///
    /// # Errors
    ///
    /// When this map is full, or one of the two cannot be read or written.
    pub fn take_inbound(&mut self, other: &Self) -> Result<usize> {
        let mut taken = 0;
        for (key, flow) in other.entries()? {
            if key.kind == FLOW_KEY_FLOW && flow.state == FLOW_IN {
                taken += usize::from(self.add(&key, flow)?);
            }
        }
        Ok(taken)
    }

    /// Adds a flow unless it is known. Returns whether it was not.
    fn add(&mut self, key: &FlowKey, flow: Flow) -> Result<bool> {
        match self.0.insert(key, flow, NOEXIST) {
            Ok(()) => Ok(true),
            Err(MapError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::EEXIST) =>
            {
                Ok(false)
            }
            Err(error) => Err(error).context("cannot write a pod's flows"),
        }
    }

    /// Forgets flows that have been idle for too long, and gives each destination of a flow that
    /// the pod has open to `open`. Returns how many are remembered.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn sweep(&mut self, now_ns: u64, mut open: impl FnMut(Address)) -> Result<usize> {
        let mut idle = Vec::new();
        let mut alive = 0;
        for item in &self.0 {
            let (key, flow) = item.context("cannot read a pod's flows")?;
            if !is_alive(&key, &flow, now_ns) {
                idle.push(key);
                continue;
            }
            alive += 1;
            if is_open(&key, &flow, now_ns) {
                open(key.peer_addr);
            }
        }
        for key in idle {
            gone(self.0.remove(&key)).context("cannot forget a flow")?;
        }
        Ok(alive)
    }
}
