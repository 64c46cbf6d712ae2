//! With clsact: leaving a new interface alone until its network is complete.
//!
//! An interface has room for one qdisc that filters hang on. While a pod's network is made, CNI plugins
//! may add theirs (`bandwidth` does), and they fail when there is one already: no pod with a limit
//! would start. So the agent does not attach to an interface whose pod is not known before a process stays in the
//! network behind it. A container runtime makes a pod's network first, so until then nothing can send there.
//! Plugins run programs in that network too, each for a moment (`ip`, `sysctl`). An interface to which no process
//! comes is quarantined after a while.
//!
//! With tcx there is nothing to wait for: its programs need no qdisc.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use egress_common::ids::IfIndex;

use crate::host::{Host, Links};

/// How long making a network may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// A process that has been in the network for this long is the pod's, and no program of a plugin.
const STAYS: Duration = Duration::from_millis(100);
/// How soon to look again while an interface is left alone: between a pod's first process and its
/// first program, its runtime makes and starts a container.
pub(in crate::control) const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Interfaces whose pods are not known.
pub(in crate::control) struct NewInterfaces {
    /// Since when each interface is there whose network may be incomplete.
    since: HashMap<IfIndex, Instant>,
    /// The processes in other networks (the host's number of the network, the id of the process), and
    /// when each was seen first.
    processes: HashMap<(i32, u32), Instant>,
    /// The interfaces whose network is complete.
    made: HashSet<IfIndex>,
    /// Whether any interface is left alone now.
    pub(in crate::control) waiting: bool,
}

impl NewInterfaces {
    /// `attached` are the interfaces that an earlier agent has attached to.
    pub(in crate::control) fn new(attached: impl IntoIterator<Item = IfIndex>) -> Self {
        Self {
            since: HashMap::new(),
            processes: HashMap::new(),
            made: attached.into_iter().collect(),
            waiting: false,
        }
    }

    /// Notes that the agent is attached to these interfaces, so that they need no wait when their pods are gone.
    pub(in crate::control) fn note_attached(
        &mut self,
        interfaces: impl IntoIterator<Item = IfIndex>,
    ) {
        self.made.extend(interfaces);
    }

    /// Removes the interfaces (name and index) whose network may be incomplete.
    pub(in crate::control) fn leave_out(
        &mut self,
        unidentified: &mut Vec<(String, IfIndex)>,
        links: &Links,
        host: &mut Host,
        now: Instant,
    ) {
        let is_there = |ifindex: &IfIndex| links.get(*ifindex).is_some();
        self.since.retain(|ifindex, _| is_there(ifindex));
        self.made.retain(is_there);
        let unknown = |(_, ifindex): &(String, IfIndex)| !self.made.contains(ifindex);
        self.waiting = unidentified.iter().any(unknown);
        if !self.waiting {
            return;
        }
        let inhabited = host
            .processes_by_namespace()
            .map(|processes| self.note_processes(processes, now));
        if let Err(error) = &inhabited {
            tracing::error!(%error, "cannot list processes: new interfaces are quarantined at once");
        }
        unidentified.retain(|(_, ifindex)| {
            let peer = links.get(*ifindex).and_then(|link| link.peer);
            let is_empty = match (&inhabited, peer) {
                (Ok(inhabited), Some(peer)) => !inhabited.contains(&peer.nsid),
                _ => false,
            };
            let since = *self.since.entry(*ifindex).or_insert(now);
            if is_empty && now.duration_since(since) < PATIENCE {
                return self.made.contains(ifindex);
            }
            self.made.insert(*ifindex);
            true
        });
        self.waiting = self
            .since
            .keys()
            .any(|ifindex| !self.made.contains(ifindex));
    }

    /// Records which processes there are now. Returns the networks in which one has stayed.
    fn note_processes(&mut self, there: HashSet<(i32, u32)>, now: Instant) -> HashSet<i32> {
        self.processes.retain(|process, _| there.contains(process));
        let mut inhabited = HashSet::new();
        for process in there {
            let since = *self.processes.entry(process).or_insert(now);
            if now.duration_since(since) >= STAYS {
                inhabited.insert(process.0);
            }
        }
        inhabited
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_the_agent_is_attached_to_is_complete() {
        let mut new_interfaces = NewInterfaces::new([]);
        new_interfaces.note_attached([IfIndex::new(7)]);
        assert!(new_interfaces.made.contains(&IfIndex::new(7)));
    }

    #[test]
    fn a_network_is_inhabited_when_one_process_stays_in_it() {
        let mut new_interfaces = NewInterfaces::new([]);
        let start = Instant::now();
        let later = start + STAYS;
        let look = |new_interfaces: &mut NewInterfaces, processes: &[(i32, u32)], now| {
            new_interfaces.note_processes(processes.iter().copied().collect(), now)
        };
        assert!(look(&mut new_interfaces, &[(1, 10), (2, 20)], start).is_empty());
        let inhabited = look(&mut new_interfaces, &[(1, 11), (2, 20)], later);
        assert_eq!(inhabited, HashSet::from([2]), "10 has gone, 20 has stayed");
        let inhabited = look(&mut new_interfaces, &[(1, 11), (3, 20)], later + STAYS);
        assert_eq!(
            inhabited,
            HashSet::from([1]),
            "20 is in another network now"
        );
    }
}
