//! Replaces an `ingress` qdisc by clsact.
//!
//! An interface can have only one of the two. An `ingress` qdisc has no place for a filter on what the
//! interface sends: a filter for egress would be attached to ingress (`ingress_tcf_block`,
//! `net/sched/sch_ingress.c`). The CNI plugin `bandwidth` adds such a qdisc to redirect what a pod sends to
//! an ifb device that limits it. So the agent moves its filters to a clsact qdisc, each one priority further
//! back, where they work as before.
//!
//! With tcx this is not needed, because tcx programs run before every qdisc.

use anyhow::{Context as _, Result, bail};
use egress_common::ids::IfIndex;

use super::{
    netlink::{NESTED, add, attributes},
    traffic_control::{Filter, Side, TrafficControl},
};

/// Attributes of u32 filters, `include/uapi/linux/pkt_cls.h`.
const TCA_U32_CLASSID: u16 = 1;
const TCA_U32_HASH: u16 = 2;
const TCA_U32_DIVISOR: u16 = 4;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TCA_U32_INDEV: u16 = 8;
const TCA_U32_PCNT: u16 = 9;
const TCA_U32_MARK: u16 = 10;
const TCA_U32_FLAGS: u16 = 11;
/// Attributes of matchall filters.
const TCA_MATCHALL_CLASSID: u16 = 1;
const TCA_MATCHALL_ACT: u16 = 2;
const TCA_MATCHALL_FLAGS: u16 = 3;
const TCA_MATCHALL_PCNT: u16 = 4;

/// Bit of a u32 filter's handle: the filter is in the table that every priority has
/// (`gen_new_htid`, `net/sched/cls_u32.c`).
const ROOT_TABLE: u32 = 0x8000_0000;
/// Bits of the handle that are 0 in the handle of a table itself.
const WITHIN: u32 = 0x000f_ffff;

/// Replaces an ingress qdisc by a clsact qdisc, and keeps its filters.
///
/// # Errors
///
/// When a filter cannot be moved; then nothing has changed. Or when the kernel rejects a change.
pub(super) fn replace(tc: &mut TrafficControl, ifindex: IfIndex) -> Result<()> {
    let filters = tc
        .filters(ifindex, Side::Ingress)
        .context("cannot list the filters of an ingress qdisc")?;
    let moved = moved(&filters)?;
    tc.remove_hook_qdisc(ifindex)
        .context("cannot remove an ingress qdisc to put a clsact qdisc in its place")?;
    tc.add_clsact(ifindex)
        .context("cannot add a clsact qdisc in place of an ingress qdisc")?;
    for filter in &moved {
        tc.add(ifindex, Side::Ingress, filter).with_context(|| {
            format!(
                "cannot add the {} filter of an ingress qdisc to the clsact qdisc in its place",
                filter.kind
            )
        })?;
    }
    tracing::info!(
        ifindex = ifindex.get(),
        filters = moved.len(),
        "replaced the interface's ingress qdisc by a clsact qdisc, and kept its filters"
    );
    Ok(())
}

/// The filters in the form in which they are added again.
fn moved(filters: &[Filter]) -> Result<Vec<Filter>> {
    let mut moved = Vec::new();
    for filter in filters {
        let Some(options) = options(filter) else {
            bail!(
                "the interface has an ingress qdisc, which has no place for an egress filter, and its \
                 {} filter of priority {} cannot be moved to a clsact qdisc: remove the qdisc, or configure \
                 the program that adds it to use clsact",
                filter.kind,
                filter.priority
            );
        };
        if options.is_empty() {
            continue;
        }
        moved.push(Filter {
            priority: filter.priority.saturating_add(1),
            options,
            ..filter.clone()
        });
    }
    Ok(moved)
}

/// The options with which such a filter can be added: empty for a list entry that is not a filter, and `None`
/// if they are unknown.
fn options(filter: &Filter) -> Option<Vec<u8>> {
    let mut options = Vec::new();
    let (kept, nested, left_out): (&[u16], u16, &[u16]) = match filter.kind.as_str() {
        // The entry that represents all filters of a priority.
        _ if filter.handle == 0 => return Some(options),
        "u32" if is_root_table(filter) => return Some(options),
        "u32" if filter.handle & ROOT_TABLE != 0 => (
            &[TCA_U32_CLASSID, TCA_U32_SEL, TCA_U32_INDEV, TCA_U32_MARK],
            TCA_U32_ACT,
            // Counters, and attributes that define where the filter is.
            &[TCA_U32_HASH, TCA_U32_PCNT, TCA_U32_FLAGS],
        ),
        "matchall" => (
            &[TCA_MATCHALL_CLASSID],
            TCA_MATCHALL_ACT,
            &[TCA_MATCHALL_FLAGS, TCA_MATCHALL_PCNT],
        ),
        _ => return None,
    };
    for (kind, value) in attributes(&filter.options) {
        if kind == nested {
            add(&mut options, kind | NESTED, value);
        } else if kept.contains(&kind) {
            add(&mut options, kind, value);
        } else if !left_out.contains(&kind) {
            return None;
        }
    }
    Some(options)
}

/// Whether an entry of the list of u32 filters is the table that every priority has.
fn is_root_table(filter: &Filter) -> bool {
    filter.handle & ROOT_TABLE != 0
        && filter.handle & WITHIN == 0
        && attributes(&filter.options).any(|(kind, _)| kind == TCA_U32_DIVISOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(kind: &str, handle: u32, attributes: &[u16]) -> Filter {
        let mut options = Vec::new();
        for &kind in attributes {
            add(&mut options, kind, &[1, 2, 3, 4]);
        }
        Filter {
            priority: 1,
            protocol: 3u16.to_be(),
            chain: 0,
            handle,
            kind: kind.into(),
            options,
        }
    }

    #[test]
    fn filters_of_the_bandwidth_plugin_move_one_priority_back() {
        // As the kernel lists it: the priority, its table, the filter.
        let listed = [
            filter("u32", 0, &[]),
            filter("u32", ROOT_TABLE, &[TCA_U32_DIVISOR]),
            filter(
                "u32",
                ROOT_TABLE | 0x800,
                &[
                    TCA_U32_SEL,
                    TCA_U32_HASH,
                    TCA_U32_CLASSID,
                    TCA_U32_FLAGS,
                    TCA_U32_ACT,
                    TCA_U32_PCNT,
                ],
            ),
        ];
        let moved = moved(&listed).unwrap();
        assert_eq!(moved.len(), 1);
        assert_eq!(moved[0].priority, 2);
        let kinds: Vec<u16> = attributes(&moved[0].options)
            .map(|(kind, _)| kind)
            .collect();
        assert_eq!(kinds, [TCA_U32_SEL, TCA_U32_CLASSID, TCA_U32_ACT]);
    }

    #[test]
    fn filters_with_unknown_options_are_not_moved() {
        const TCA_U32_LINK: u16 = 3;
        for filter in [
            filter("flower", 1, &[]),
            filter("bpf", 1, &[]),
            filter("u32", ROOT_TABLE | 0x800, &[TCA_U32_SEL, TCA_U32_LINK]),
            filter("u32", 0x0010_0800, &[TCA_U32_SEL]),
        ] {
            let error = moved(&[filter]).unwrap_err().to_string();
            assert!(error.contains("cannot be moved"), "{error}");
        }
    }
}
