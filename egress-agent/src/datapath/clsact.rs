//! Attaches the programs as filters on a clsact qdisc, on kernels without tcx (below 6.6).
//!
//! Packets meet filters in the order of their priorities. Within one priority, the newest BPF filter comes
//! first (`cls_bpf_change`, `net/sched/cls_bpf.c`). So a filter that is added later can be in front of
//! ours, and ours gets back in front only if it is added again: see [`Datapath::clsact_first`].

use std::{fs, io, os::fd::AsFd as _, os::fd::AsRawFd as _, path::Path};

use anyhow::{Context as _, Result, bail};
use egress_common::ids::IfIndex;

use super::{
    Datapath, ingress,
    links::{Hook, Position},
    traffic_control::{BpfFilter, Filter, Side, TrafficControl},
};

/// The first priority: before all others.
const FIRST: u16 = 1;
/// The last priority that is tried if filters of other kinds have the first ones.
const LAST: u16 = 64;

impl Hook {
    const fn side(self) -> Side {
        match self {
            Self::FromPod => Side::Ingress,
            Self::ToPod => Side::Egress,
        }
    }

    /// The two handles of the hook's filter, of which one is in use at a time. They differ from the usual
    /// handle 1, because adding a filter with the same priority and handle replaces the existing one.
    const fn handles(self) -> [u32; 2] {
        match self {
            Self::FromPod => [0xe9e1, 0xe9f1],
            Self::ToPod => [0xe9e2, 0xe9f2],
        }
    }

    /// Whether a filter belongs to the agent and to this hook, whichever agent added it.
    fn is_filter(self, filter: &Filter) -> bool {
        self.handles().contains(&filter.handle)
            && filter.program_name().as_deref() == Some(self.program())
    }
}

impl Datapath {
    /// Attaches one program, and replaces the filter of an earlier agent or an existing one.
    pub(super) fn attach_clsact(&mut self, ifindex: IfIndex, hook: Hook) -> Result<()> {
        let mut tc = TrafficControl::open().context("cannot open a netlink socket")?;
        if !tc
            .add_clsact(ifindex)
            .context("cannot add a clsact qdisc")?
        {
            ingress::replace(&mut tc, ifindex)?;
        }
        // bpffs stores only BPF objects and directories, so a directory is the marker.
        let marker = self.layout.links().join(format!("{ifindex}_clsact"));
        if let Err(error) = fs::create_dir(&marker)
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(error).with_context(|| format!("cannot create {}", marker.display()));
        }
        let filters = tc.filters(ifindex, hook.side())?;
        let mut ours = filters.iter().filter(|filter| hook.is_filter(filter));
        let (priority, handle) = match ours.next() {
            Some(earlier) => (earlier.priority, earlier.handle),
            None => (lowest_priority(&filters)?, hook.handles()[0]),
        };
        self.put(&mut tc, ifindex, hook, priority, handle)?;
        // An agent that was killed while it moved its filter has left two filters.
        for second in ours {
            tc.remove(ifindex, hook.side(), second)
                .context("cannot remove an earlier filter")?;
        }
        Ok(())
    }

    /// The position of the program among the filters of its side.
    pub(super) fn clsact_position(&mut self, ifindex: IfIndex, hook: Hook) -> Result<Position> {
        let mut tc = TrafficControl::open().context("cannot open a netlink socket")?;
        let program = self.program(hook)?.info()?.id();
        let filters = tc.filters(ifindex, hook.side())?;
        let mut filters = filters.iter().filter(|filter| is_met(filter));
        let first = filters.next();
        let is_ours = |filter: &Filter| filter.program() == Some(program);
        Ok(match first {
            Some(first) if is_ours(first) => Position::First,
            Some(first) if filters.any(is_ours) => Position::Behind(describe(first)),
            _ => Position::Missing,
        })
    }

    /// Moves the program in front of all filters of its side. The new filter is added before the old
    /// one is removed, so that no packet passes unjudged. In between, a frame may meet the program twice: the
    /// same rules judge it twice, and a DNS message may be lost, as any datagram may be.
    pub(super) fn clsact_first(&mut self, ifindex: IfIndex, hook: Hook) -> Result<()> {
        let mut tc = TrafficControl::open().context("cannot open a netlink socket")?;
        let filters = tc.filters(ifindex, hook.side())?;
        let priority = lowest_priority(&filters)?;
        let first = filters.iter().find(|filter| is_met(filter));
        if let Some(first) = first.filter(|first| first.priority < priority) {
            bail!(
                "no filter can be in front of the filter with priority {}, which is not a BPF filter for \
                 every protocol",
                first.priority
            );
        }
        let ours: Vec<_> = filters
            .iter()
            .filter(|filter| hook.is_filter(filter))
            .collect();
        let handle = hook
            .handles()
            .into_iter()
            .find(|handle| !ours.iter().any(|filter| filter.handle == *handle))
            .context(
                "the agent has two filters there already; restart the agent, which removes one",
            )?;
        self.put(&mut tc, ifindex, hook, priority, handle)?;
        for old in ours {
            tc.remove(ifindex, hook.side(), old)
                .context("cannot remove the filter that is behind")?;
        }
        Ok(())
    }

    fn put(
        &mut self,
        tc: &mut TrafficControl,
        ifindex: IfIndex,
        hook: Hook,
        priority: u16,
        handle: u32,
    ) -> Result<()> {
        let descriptor = self.program(hook)?.fd()?;
        let filter = BpfFilter {
            priority,
            handle,
            name: hook.program(),
            program: descriptor.as_fd().as_raw_fd(),
        };
        tc.put(ifindex, hook.side(), &filter)
            .context("cannot add a filter")
    }
}

/// Removes our filters from an interface, and then the marker. If the interface is gone, so are its filters.
pub(super) fn detach(links: &Path, ifindex: IfIndex) -> Result<()> {
    let marker = links.join(format!("{ifindex}_clsact"));
    if !marker.exists() {
        return Ok(());
    }
    let mut tc = TrafficControl::open().context("cannot open a netlink socket")?;
    for hook in Hook::BOTH {
        let filters = tc.filters(ifindex, hook.side())?;
        for ours in filters.iter().filter(|filter| hook.is_filter(filter)) {
            tc.remove(ifindex, hook.side(), ours).with_context(|| {
                format!(
                    "cannot detach `{}` from interface {ifindex}",
                    hook.program()
                )
            })?;
        }
    }
    fs::remove_dir(&marker).with_context(|| format!("cannot remove {}", marker.display()))
}

/// Whether packets meet this filter if no earlier filter ends the processing.
fn is_met(filter: &Filter) -> bool {
    filter.handle != 0 && filter.chain == 0
}

/// The first priority at which a filter of ours can be added.
fn lowest_priority(filters: &[Filter]) -> Result<u16> {
    let has_room = |priority: &u16| {
        filters
            .iter()
            .filter(|filter| filter.chain == 0 && filter.priority == *priority)
            .all(Filter::has_room_for_ours)
    };
    (FIRST..=LAST)
        .find(has_room)
        .context("filters of other kinds occupy all priorities that the agent tries")
}

fn describe(filter: &Filter) -> String {
    let Filter { kind, priority, .. } = filter;
    match filter.program_name() {
        Some(name) => format!("the {kind} filter `{name}` of priority {priority}"),
        None => format!("a {kind} filter of priority {priority}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(priority: u16, protocol: u16, kind: &str) -> Filter {
        Filter {
            priority,
            protocol: protocol.to_be(),
            chain: 0,
            handle: 1,
            kind: kind.into(),
            options: Vec::new(),
        }
    }

    #[test]
    fn a_filter_of_ours_gets_the_first_priority_with_room_for_it() {
        for (filters, expected) in [
            (vec![], 1),
            (vec![filter(1, 3, "bpf")], 1),
            (vec![filter(1, 3, "u32")], 2),
            (vec![filter(1, 0x0800, "bpf")], 2),
            (vec![filter(1, 3, "u32"), filter(2, 3, "bpf")], 2),
            (vec![filter(2, 3, "u32")], 1),
        ] {
            assert_eq!(lowest_priority(&filters).unwrap(), expected, "{filters:?}");
        }
        let full: Vec<_> = (1..=LAST).map(|n| filter(n, 3, "u32")).collect();
        assert!(lowest_priority(&full).is_err());
    }
}
