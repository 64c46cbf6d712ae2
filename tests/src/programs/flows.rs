//! The maps of flows and destinations of the pod.

use std::{collections::HashSet, net::IpAddr, thread};

use egress_agent::datapath::{FlowMap, Hook, OpenFlows, Seed, SeedState, boottime_ns};
use egress_common::{
    address::Address,
    ids::PodId,
    protocol,
    records::{Flow, FlowKey},
};

use super::{POD, PORT, Programs, address};

impl Programs {
    /// Runs `from_pod` once on each of these frames while control sweeps the pod's flows. Returns how many destinations the
    /// sweep has removed.
    #[track_caller]
    pub fn flood_amid_sweep(&mut self, frames: Vec<Vec<u8>>) -> usize {
        let mut flows = self.flow_map();
        thread::scope(|scope| {
            let sweep = scope.spawn(move || flows.sweep(boottime_ns(), |_| ()));
            self.flood(Hook::FromPod, frames.into_iter(), 1);
            let swept = sweep.join().expect("the sweep does not panic");
            swept.expect("the pod's flows").called
        })
    }

    /// Notes that the pod has connected to these ports, at the time (in nanoseconds of `CLOCK_BOOTTIME`) of their numbers.
    #[track_caller]
    pub fn notes_called(&self, host: IpAddr, ports: impl Iterator<Item = u16>) {
        let mut flows = self.flow_map();
        for port in ports {
            let seed = Seed {
                protocol: protocol::TCP,
                pod: (address(IpAddr::from(self.own())), 0),
                peer: (address(host), port),
                state: SeedState::Unjudged,
            };
            flows
                .note_called(&seed, port.into())
                .expect("a place for the destination");
        }
    }

    /// The addresses and ports to which the pod has connected.
    #[track_caller]
    pub fn called(&self) -> Vec<(FlowKey, Flow)> {
        self.flow_map().called().expect("the pod's destinations")
    }

    /// The pod's flows, its fragmented packets, and the connections that others have accepted.
    #[track_caller]
    pub fn flows(&self) -> Vec<(FlowKey, Flow)> {
        self.flow_map().entries().expect("the pod's flows")
    }

    /// The destinations of the pod's open flows, and in how many parts they were read.
    #[track_caller]
    pub fn open_flows(&self) -> (HashSet<Address>, usize) {
        let (flows, mut open) = (self.flow_map(), OpenFlows::default());
        let mut parts = 1;
        while flows.read_open(&mut open, boottime_ns()).is_pending() {
            parts += 1;
        }
        (open.to, parts)
    }

    /// Records connections that the pod has opened to these peers, as control does when it begins to enforce a pod.
    #[track_caller]
    pub fn has_open(&self, peers: impl Iterator<Item = Address>) {
        let mut flows = self.flow_map();
        for peer in peers {
            let seed = Seed {
                protocol: protocol::TCP,
                pod: (address(IpAddr::from(self.own())), 7),
                peer: (peer, PORT),
                state: SeedState::Unjudged,
            };
            assert!(flows.seed(&seed, boottime_ns()).expect("the pod's flows"));
        }
    }

    /// Copies the flows and destinations of the first pod to the other pod that now has the interface.
    #[track_caller]
    pub fn takes_noted(&mut self) {
        let mut flows = self.flow_map_of(self.interface.pod());
        flows
            .take_noted(&self.flow_map(), boottime_ns())
            .expect("the pod's flows");
    }

    /// Copies the flows that peers have opened towards the first pod to the other pod that the interface has become.
    /// Returns their number.
    #[track_caller]
    pub fn takes_inbound(&mut self) -> usize {
        let mut flows = self.flow_map_of(self.interface.pod());
        flows
            .take_inbound(&self.flow_map(), boottime_ns())
            .expect("the pod's flows")
    }

    /// Removes the flows that are too old at this time, as control does. The time is in nanoseconds of `CLOCK_BOOTTIME`.
    #[track_caller]
    pub fn sweeps_at(&mut self, now_ns: u64) {
        self.flow_map()
            .sweep(now_ns, |_| ())
            .expect("the pod's flows");
    }

    fn flow_map(&self) -> FlowMap {
        self.flow_map_of(POD)
    }

    fn flow_map_of(&self, pod: PodId) -> FlowMap {
        let flows = self.datapath.flow_map(pod).expect("the map of flows");
        flows.expect("the pod's flows")
    }
}
