//! The flows of a pod that its denial lines have counted.

use std::{
    collections::{HashSet, VecDeque},
    hash::{BuildHasher, RandomState},
};

use super::Denied;

/// Most flows of one pod that are remembered. The next packet of a forgotten flow counts again.
const FLOWS_PER_POD: usize = 1024;

/// The latest flows, each as a hash with keys of this pod. An attacker cannot choose flows with equal
/// hashes.
#[derive(Debug, Default)]
pub(super) struct Flows {
    keys: RandomState,
    known: HashSet<u64>,
    oldest: VecDeque<u64>,
}

impl Flows {
    /// Whether no earlier denial of this flow is remembered. A flow is the protocol, both addresses and both
    /// ports, with the reason and the verdict. A packet whose headers could not be parsed is in no flow.
    pub(super) fn is_new(&mut self, denied: &Denied) -> bool {
        let (Some(src), Some(dst)) = (denied.src, denied.dst) else {
            return false;
        };
        let flow = (denied.protocol, src, dst, denied.reason, denied.verdict);
        let flow = self.keys.hash_one(flow);
        if !self.known.insert(flow) {
            return false;
        }
        self.oldest.push_back(flow);
        if self.oldest.len() > FLOWS_PER_POD
            && let Some(oldest) = self.oldest.pop_front()
        {
            self.known.remove(&oldest);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Endpoint, line::tests::denied};

    fn from_port(port: u16) -> Denied {
        let src = denied().src.map(|src| Endpoint {
            port: Some(port),
            ..src
        });
        Denied { src, ..denied() }
    }

    #[test]
    fn a_flow_is_new_only_once() {
        let mut flows = Flows::default();
        assert!(flows.is_new(&from_port(1)));
        assert!(!flows.is_new(&from_port(1)));
        assert!(flows.is_new(&from_port(2)));
        let unreadable = Denied {
            src: None,
            dst: None,
            ..denied()
        };
        assert!(!flows.is_new(&unreadable));
    }

    #[test]
    fn the_oldest_flows_are_forgotten_first() {
        let mut flows = Flows::default();
        for port in 1..=FLOWS_PER_POD as u16 + 1 {
            assert!(flows.is_new(&from_port(port)));
        }
        assert!(!flows.is_new(&from_port(2)));
        assert!(flows.is_new(&from_port(1)));
        assert_eq!(flows.known.len(), FLOWS_PER_POD);
        assert_eq!(flows.oldest.len(), FLOWS_PER_POD);
    }
}
