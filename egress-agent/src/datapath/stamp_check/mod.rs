//! Drops frames that have bypassed `from_pod`.
//!
//! A frame can pass an interface without meeting the programs on it: the kernel skips all of tc for a frame
//! that an `ifb` device has sent again (`tc_skip_classify`, drivers/net/ifb.c), and a program in front of
//! ours may end the processing of a packet. So `from_pod` stamps each frame that it passes (`skb->priority`).
//! netfilter, which comes next, removes the stamp, and drops frames from an enforced interface that have
//! none.
//!
//! nf_tables does this, because every supported kernel has it, and because it also sees bridged frames and
//! ARP. Each of the three families has a table. The tables stay when the agent ends, as the pins do.

mod message;
mod parts;
mod table;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use egress_common::ids::IfIndex;

use self::{
    message::Family,
    table::{Elements, Tables},
};
use super::{Datapath, stamp::Stamp};

/// Name of the tables.
pub const TABLE: &str = "egress-agent";

/// How often a table that the kernel has rejected is tried again: a module may have been loaded.
const TRY_AGAIN: Duration = Duration::from_secs(60);

/// What happens to a frame without a stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WithoutStamp {
    /// It is dropped.
    Drop,
    /// It is counted and passes: the interface's pod is audited.
    Count,
}

impl WithoutStamp {
    const ALL: [Self; 2] = [Self::Drop, Self::Count];
}

/// Frames without a stamp from one interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unstamped {
    /// The interface.
    pub ifindex: IfIndex,
    /// What happened to them.
    pub what: WithoutStamp,
    /// How many there were since the last check.
    pub packets: u64,
}

/// The result of checking the tables.
#[derive(Debug, Default)]
pub struct Looked {
    /// Frames without a stamp.
    pub unstamped: Vec<Unstamped>,
    /// Tables that somebody had removed or changed, and that were restored.
    pub restored: Vec<&'static str>,
    /// Why the check is not in force, although it was before.
    pub problem: Option<String>,
    /// The tables that the kernel does not support, and why.
    pub unsupported: Option<String>,
}

/// See the module.
pub(super) struct StampCheck {
    tables: Tables,
    wanted: BTreeMap<IfIndex, WithoutStamp>,
    states: BTreeMap<Family, State>,
}

/// One family's table.
#[derive(Default)]
struct State {
    /// Set if the kernel has never accepted the table.
    refused: Option<Refused>,
    /// Its elements and counters at the last check.
    last: Elements,
}

struct Refused {
    why: String,
    tried: Instant,
}

impl Refused {
    fn now(error: &io::Error) -> Self {
        Self {
            why: error.to_string(),
            tried: Instant::now(),
        }
    }
}

impl StampCheck {
    /// Takes over an earlier agent's tables, or creates them. Interfaces to which no programs are attached
    /// are removed from them.
    pub(super) fn open(stamp: Stamp, attached: &[IfIndex]) -> Self {
        let mut check = Self {
            tables: Tables::new(stamp),
            wanted: BTreeMap::new(),
            states: BTreeMap::new(),
        };
        let mut packets = 0;
        for family in Family::ALL {
            let elements = check.tables.elements(family).unwrap_or_default();
            packets += elements.values().sum::<u64>();
            let kept = elements
                .iter()
                .filter(|((ifindex, _), _)| attached.contains(ifindex));
            for (&(ifindex, what), _) in kept {
                // If one family drops, all do.
                let known = check.wanted.entry(ifindex).or_insert(what);
                *known = what.min(*known);
            }
            let refused = None;
            let last = elements;
            check.states.insert(family, State { refused, last });
        }
        if packets > 0 {
            tracing::warn!(
                packets,
                "frames had no stamp before this agent started; an earlier agent may have reported some"
            );
        }
        for family in Family::ALL {
            if let Err(error) = check.look_at(family) {
                tracing::warn!(
                    family = family.as_str(),
                    %error,
                    "the kernel rejects the nf_tables table of this family: frames that skip the programs \
                     are not dropped there"
                );
                check.refuse(family, &error);
            }
        }
        check
    }

    fn refuse(&mut self, family: Family, error: &io::Error) {
        let state = self.states.entry(family).or_default();
        state.refused = Some(Refused::now(error));
    }

    /// The families whose tables are, or were, in force.
    fn supported(&self) -> Vec<Family> {
        let states = self.states.iter();
        let supported = states.filter(|(_, state)| state.refused.is_none());
        supported.map(|(&family, _)| family).collect()
    }

    /// Sets what happens to frames without a stamp from these interfaces. The next check retries what fails,
    /// and reports it.
    fn require(&mut self, interfaces: &[IfIndex], what: WithoutStamp) {
        let wanted = interfaces.iter().map(|&ifindex| (ifindex, what));
        self.wanted.extend(wanted);
        for family in self.supported() {
            // The next check reports an error if it persists.
            let _ = self.adjust(family);
        }
    }

    /// Lets frames without a stamp from an interface pass.
    fn exempt(&mut self, ifindex: IfIndex) -> Result<()> {
        let Some(what) = self.wanted.remove(&ifindex) else {
            return Ok(());
        };
        for family in self.supported() {
            // The table may have been removed meanwhile.
            let adjusted = self.adjust(family).map(drop);
            let done = adjusted.or_else(|_| self.look_at(family).map(drop));
            if let Err(error) = done {
                self.wanted.insert(ifindex, what);
                return Err(error).with_context(|| {
                    format!(
                        "cannot remove interface {ifindex} from the {} table of nf_tables",
                        family.as_str()
                    )
                });
            }
        }
        Ok(())
    }

    /// Changes the elements to the wanted ones, based on the last known elements.
    fn adjust(&mut self, family: Family) -> io::Result<bool> {
        let Some(state) = self.states.get_mut(&family) else {
            return Ok(false);
        };
        let is = state.last.keys().copied().collect();
        let wanted: BTreeSet<_> = self.wanted.iter().map(|(&at, &what)| (at, what)).collect();
        let changed = self.tables.change_elements(family, &is, &wanted)?;
        if changed {
            state.last.retain(|element, _| wanted.contains(element));
            for element in wanted {
                state.last.entry(element).or_insert(0);
            }
        }
        Ok(changed)
    }

    /// Checks one table and restores it. Returns the packets that were counted, and whether the table was
    /// restored.
    fn look_at(&mut self, family: Family) -> io::Result<(Vec<Unstamped>, bool)> {
        if !self.tables.is_whole(family)? {
            let wanted: BTreeSet<_> = self.wanted.iter().map(|(&at, &what)| (at, what)).collect();
            self.tables.install(family, &wanted)?;
            let last = wanted.into_iter().map(|element| (element, 0)).collect();
            let refused = None;
            self.states.insert(family, State { refused, last });
            return Ok((Vec::new(), true));
        }
        let now = self.tables.elements(family)?;
        let last = self
            .states
            .get_mut(&family)
            .map_or_else(Elements::new, |state| {
                std::mem::replace(&mut state.last, now.clone())
            });
        let counted = now.into_iter().filter_map(|((ifindex, what), packets)| {
            // The counter of an element that was created again starts at zero.
            let before = last
                .get(&(ifindex, what))
                .filter(|before| **before <= packets);
            let packets = packets - before.unwrap_or(&0);
            let unstamped = Unstamped {
                ifindex,
                what,
                packets,
            };
            (packets > 0).then_some(unstamped)
        });
        let counted = counted.collect();
        let changed = self.adjust(family)?;
        Ok((counted, changed))
    }

    /// Checks all tables.
    fn look(&mut self) -> Looked {
        let mut looked = Looked::default();
        let mut counted: BTreeMap<(IfIndex, WithoutStamp), u64> = BTreeMap::new();
        let (mut lost, mut refused) = (Vec::new(), Vec::new());
        for family in Family::ALL {
            let refusal = self
                .states
                .get(&family)
                .and_then(|state| state.refused.as_ref());
            if let Some(Refused { why, tried }) = refusal
                && tried.elapsed() < TRY_AGAIN
            {
                refused.push(format!("{}: {why}", family.as_str()));
                continue;
            }
            let was_refused = refusal.is_some();
            match self.look_at(family) {
                Ok((unstamped, restored)) => {
                    for Unstamped {
                        ifindex,
                        what,
                        packets,
                    } in unstamped
                    {
                        *counted.entry((ifindex, what)).or_default() += packets;
                    }
                    if restored && !was_refused {
                        looked.restored.push(family.as_str());
                    }
                }
                Err(error) if was_refused => {
                    refused.push(format!("{}: {error}", family.as_str()));
                    self.refuse(family, &error);
                }
                Err(error) => lost.push(format!("{}: {error}", family.as_str())),
            }
        }
        looked.unstamped = counted
            .into_iter()
            .map(|((ifindex, what), packets)| Unstamped {
                ifindex,
                what,
                packets,
            })
            .collect();
        looked.problem = (!lost.is_empty()).then(|| lost.join("; "));
        looked.unsupported = (!refused.is_empty()).then(|| refused.join("; "));
        looked
    }
}

/// Removes the tables, of this agent or an earlier one. Returns whether any existed.
///
/// # Errors
///
/// When an existing table cannot be removed.
pub(super) fn remove() -> Result<bool> {
    let mut any = false;
    for family in Family::ALL {
        any |= table::remove(family).with_context(|| {
            format!(
                "cannot remove the table `{} {}` of nf_tables",
                family.as_str(),
                TABLE
            )
        })?;
    }
    Ok(any)
}

impl Datapath {
    /// Sets what happens to frames from these interfaces that have bypassed `from_pod`. Call this when it is
    /// attached to them. The next [`Self::look_for_unstamped`] retries what fails.
    pub fn require_stamps(&mut self, interfaces: &[IfIndex], what: WithoutStamp) {
        if let Some(check) = &mut self.stamp_check {
            check.require(interfaces, what);
        }
    }

    /// The frames without a stamp since the last check. Restores tables that somebody has changed.
    pub fn look_for_unstamped(&mut self) -> Looked {
        let check = self.stamp_check.as_mut();
        check.map_or_else(Looked::default, StampCheck::look)
    }

    /// Whether frames without a stamp had passed from one of these audited interfaces at the last
    /// check.
    pub fn has_passed_unstamped(&self, interfaces: &[IfIndex]) -> bool {
        let states = self
            .stamp_check
            .iter()
            .flat_map(|check| check.states.values());
        states
            .flat_map(|state| &state.last)
            .any(|((ifindex, what), packets)| {
                *what == WithoutStamp::Count && *packets > 0 && interfaces.contains(ifindex)
            })
    }

    /// Whether frames without a stamp pass from one of these interfaces now.
    pub fn lets_unstamped_pass(&self, interfaces: &[IfIndex]) -> bool {
        let mut wanted = self.stamp_check.iter().flat_map(|check| &check.wanted);
        wanted.any(|(ifindex, what)| *what == WithoutStamp::Count && interfaces.contains(ifindex))
    }

    /// Lets frames without a stamp from this interface pass. Call this before detaching `from_pod` from it.
    pub(super) fn exempt_from_stamps(&mut self, ifindex: IfIndex) -> Result<()> {
        match &mut self.stamp_check {
            Some(check) => check.exempt(ifindex),
            None => Ok(()),
        }
    }
}
