//! Keeping the agent's programs first on the hooks of enforced interfaces.
//!
//! Another program in front of them on the same hook can redirect or drop a packet before they see it. Then the
//! packet is not judged, and no counter shows it. So the agent checks the order on each hook and corrects it. Probes
//! ([`crate::gate::Probe`]) show whether packets reach the programs at all. An interface whose packets another
//! program takes counts as not enforced, and its pod has a problem.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use anyhow::Result;
use egress_common::ids::IfIndex;

use super::{
    Applier,
    upkeep::Upkeep,
    watched_hooks::{MOVES, MOVES_WITHIN, Sent, Watched},
};
use crate::{
    datapath::{Hook, Position, ProbeMap},
    gate::Probe,
    host::interface_name,
};

/// How often an interface is checked: a little less than a second, so that each round finds it due.
const EVERY: Duration = Duration::from_millis(900);
/// A probe can get lost like any packet. If so many in a row do not arrive, something takes them.
const MISSES: u32 = 3;
/// How many interfaces are checked in one round.
const AT_ONCE: usize = 128;

/// Sources of probes on interfaces whose pods' addresses are not known: addresses for documentation (RFC 5737,
/// RFC 3849).
const ANY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const ANY6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// What is known of the hooks of enforced interfaces.
pub(in crate::control) struct Hooks {
    probes: ProbeMap,
    interfaces: BTreeMap<IfIndex, Watched>,
    /// Whether there may be counts of interfaces that are not enforced any more.
    stale: bool,
}

impl Hooks {
    pub(in crate::control) fn new(probes: ProbeMap) -> Self {
        Self {
            probes,
            interfaces: BTreeMap::new(),
            stale: true,
        }
    }

    /// Why packets of these interfaces may not be judged.
    pub(in crate::control) fn problem(&self, interfaces: &[IfIndex]) -> Option<&str> {
        let mut watched = interfaces.iter().filter_map(|at| self.interfaces.get(at));
        watched.find_map(|watched| watched.problem.as_deref())
    }

    /// Marks these interfaces (all without a list) to be checked next, because their filters have changed. Returns
    /// whether any of them is enforced.
    pub(in crate::control) fn hurry(&mut self, changed: Option<&[IfIndex]>) -> bool {
        let mut any = false;
        for (ifindex, watched) in &mut self.interfaces {
            if changed.is_none_or(|changed| changed.contains(ifindex)) {
                watched.looked = None;
                any = true;
            }
        }
        any
    }

    /// Removes the counts of interfaces that are not enforced any more.
    fn remove_stale(&mut self) -> Result<()> {
        if self.stale {
            let interfaces = &self.interfaces;
            self.probes
                .retain(|ifindex| interfaces.contains_key(&ifindex))?;
            self.stale = false;
        }
        Ok(())
    }

    /// Records that an interface could not be checked. A removed interface is no problem.
    fn fail(&mut self, ifindex: IfIndex, error: &anyhow::Error) {
        if let (Some(watched), Some(name)) =
            (self.interfaces.get_mut(&ifindex), interface_name(ifindex))
        {
            watched.problem = Some(format!(
                "not enforced for certain: what is attached to interface {name} cannot be looked at: \
                 {error:#}"
            ));
        }
    }

    /// The interfaces that are due to be checked.
    fn due(&self) -> Vec<IfIndex> {
        let mut due: Vec<_> = self
            .interfaces
            .iter()
            .filter(|(_, watched)| watched.looked.is_none_or(|at| at.elapsed() >= EVERY))
            .map(|(&ifindex, watched)| (watched.looked, ifindex))
            .collect();
        due.sort_unstable();
        due.truncate(AT_ONCE);
        due.into_iter().map(|(_, ifindex)| ifindex).collect()
    }
}

impl Applier {
    /// Checks the hooks of the enforced interfaces that are due.
    pub(in crate::control) async fn check_hooks(&mut self) {
        let sources: BTreeMap<IfIndex, Probe> = self
            .enforced
            .values()
            .flat_map(|enforced| {
                let record = &enforced.wanted.record;
                let own = record.own.iter().take(record.own_len as usize);
                let own = own.map(|address| Ipv6Addr::from(*address).to_canonical());
                let (v4, v6) = families(&own.collect::<Vec<_>>());
                let interfaces = enforced.wanted.interfaces.iter();
                interfaces.map(move |&ifindex| (ifindex, Probe { ifindex, v4, v6 }))
            })
            .collect();
        let Hooks {
            interfaces, stale, ..
        } = &mut self.upkeep.hooks;
        interfaces.retain(|ifindex, _| {
            let is_kept = sources.contains_key(ifindex);
            *stale |= !is_kept;
            is_kept
        });
        for &ifindex in sources.keys() {
            self.upkeep.hooks.interfaces.entry(ifindex).or_default();
        }
        let mut ready = Vec::new();
        let mut moved = Vec::new();
        for ifindex in self.upkeep.hooks.due() {
            match self.check_hook(ifindex, &mut moved) {
                Ok(true) => ready.extend(sources.get(&ifindex)),
                Ok(false) => {}
                Err(error) => self.upkeep.hooks.fail(ifindex, &error),
            }
        }
        if let Some(first) = moved.first() {
            self.published.hooks_moved.add(moved.len() as u64);
            tracing::warn!(
                hooks = moved.len(),
                %first,
                "the agent's programs were not first on their hooks; they were put in front again"
            );
        }
        if let Err(error) = self.send_probes(&ready).await {
            tracing::error!(error = %format!("{error:#}"), "cannot send probes");
        }
        if let Err(error) = self.upkeep.hooks.remove_stale() {
            tracing::error!(error = %format!("{error:#}"), "cannot remove counts of probes");
        }
    }

    /// Checks one interface. Returns whether it is to be probed now.
    fn check_hook(&mut self, ifindex: IfIndex, moved: &mut Vec<String>) -> Result<bool> {
        let now = Instant::now();
        let Self {
            datapath,
            upkeep: Upkeep { hooks, .. },
            ..
        } = self;
        let Some(watched) = hooks.interfaces.get_mut(&ifindex) else {
            return Ok(false);
        };
        watched.looked = Some(now);
        let Some(name) = interface_name(ifindex) else {
            // The interface is gone, so nothing passes it any more.
            *watched = Watched {
                looked: Some(now),
                ..Watched::default()
            };
            return Ok(false);
        };
        let count = hooks.probes.count(ifindex)?;
        let missed = watched.missed;
        let may_probe = watched.receive(count);
        if watched.missed > missed {
            self.published.probes_missed.add(1);
        }
        let mut problem = None;
        let mut failed = None;
        for hook in Hook::BOTH {
            let mut position = datapath.position(ifindex, hook)?;
            if position != Position::First && watched.may_move(now) {
                let done = match &position {
                    Position::Missing => datapath.attach(ifindex),
                    _ => datapath.come_first(ifindex, hook),
                };
                let before = describe(&position);
                position = datapath.position(ifindex, hook)?;
                if position == Position::First {
                    moved.push(format!("{name}: {before}"));
                    watched.failed = None;
                } else if let Err(error) = done {
                    watched.failed = Some(format!("{error:#}"));
                }
            }
            if position != Position::First {
                failed = failed.or(watched.failed.clone());
                problem = problem.or(Some(describe(&position)));
            }
        }
        if problem.is_none() {
            watched.failed = None;
        }
        match (&mut problem, failed) {
            // The problem's text is the same whether or not another attempt has just been made.
            (Some(problem), Some(failed)) => *problem = format!("{problem}; {failed}"),
            (problem, _) if watched.is_contested(now) => {
                let seconds = MOVES_WITHIN.as_secs();
                *problem = Some(format!(
                    "another program insists on being first; the agent's are put in front of it only \
                     {MOVES} times in {seconds} seconds"
                ));
            }
            _ => {}
        }
        if problem.is_none() && watched.missed >= MISSES {
            problem = Some(
                "none of the agent's probes has come to its programs lately: something takes packets \
                 before them"
                    .to_owned(),
            );
        }
        // An error because the interface is gone is no problem: nothing passes it any more.
        let problem = problem.filter(|_| interface_name(ifindex).is_some());
        watched.problem = problem.map(|why| {
            format!(
                "not enforced for certain: packets of interface {name} may leave or arrive unjudged: {why}"
            )
        });
        Ok(may_probe)
    }

    async fn send_probes(&mut self, probes: &[Probe]) -> Result<()> {
        if probes.is_empty() {
            return Ok(());
        }
        let at = Instant::now();
        let mut before = Vec::with_capacity(probes.len());
        for probe in probes {
            before.push(self.upkeep.hooks.probes.count(probe.ifindex)?);
        }
        let sent = self.gate.probe(probes.to_vec()).await?;
        for ((&probe, before), sent) in probes.iter().zip(before).zip(sent) {
            // Nothing can be sent on an interface that is down. It is probed again later.
            if let Some(watched) = self
                .upkeep
                .hooks
                .interfaces
                .get_mut(&probe.ifindex)
                .filter(|_| sent)
            {
                watched.sent = Some(Sent { at, before, probe });
            }
        }
        Ok(())
    }
}

/// An address of each family that a pod has, or of both when none is known.
fn families(own: &[IpAddr]) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
    let v4 = own.iter().find_map(|address| match address {
        IpAddr::V4(v4) => Some(*v4),
        IpAddr::V6(_) => None,
    });
    let v6 = own.iter().find_map(|address| match address {
        IpAddr::V6(v6) => Some(*v6),
        IpAddr::V4(_) => None,
    });
    match (v4, v6) {
        (None, None) => (Some(ANY), Some(ANY6)),
        families => families,
    }
}

fn describe(position: &Position) -> String {
    match position {
        Position::First => "the agent's program is in front".to_owned(),
        Position::Behind(other) => format!("{other} is in front of the agent's program"),
        Position::Missing => "somebody has taken the agent's program away".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_come_from_an_address_of_each_family_that_the_pod_has() {
        let v4 = IpAddr::V4(Ipv4Addr::new(10, 1, 1, 2));
        let v6 = IpAddr::V6(Ipv6Addr::LOCALHOST);
        assert_eq!(
            families(&[v6, v4]),
            (Some(Ipv4Addr::new(10, 1, 1, 2)), Some(Ipv6Addr::LOCALHOST))
        );
        assert_eq!(families(&[v6]), (None, Some(Ipv6Addr::LOCALHOST)));
        assert_eq!(families(&[]), (Some(ANY), Some(ANY6)));
    }
}
