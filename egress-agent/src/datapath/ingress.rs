//! Making room for clsact where an `ingress` qdisc is.
//!
//! An interface has one of the two. On an `ingress` qdisc there is no place for a filter on what the
//! interface sends: one for egress would hang on ingress (`ingress_tcf_block`,
//! `net/sched/sch_ingress.c`). The CNI plugin `bandwidth` makes one to redirect what a pod sends to an
//! ifb device that limits it. So its filters move to a clsact qdisc, each one priority further back;
//! they do there what they did.
//!
//! With tcx none of this is needed: its programs run before every qdisc.

use anyhow::{Context as _, Result, bail};

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

/// Of a u32 filter's handle, the bit that says that it is in the table that every priority has
/// (`gen_new_htid`, `net/sched/cls_u32.c`).
const ROOT_TABLE: u32 = 0x8000_0000;
/// And the bits that are 0 of a table itself.
const WITHIN: u32 = 0x000f_ffff;

/// Puts a clsact qdisc in the place of an ingress qdisc, with its filters.
///
/// # Errors
///
/// When there is a filter that cannot be moved: nothing has changed then. Or when the kernel refuses.
pub(super) fn replace(tc: &mut TrafficControl, ifindex: u32) -> Result<()> {
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
        ifindex,
        filters = moved.len(),
        "a clsact qdisc is in place of the interface's ingress qdisc, with its filters"
    );
    Ok(())
}

/// The filters as they are to be added again.
fn moved(filters: &[Filter]) -> Result<Vec<Filter>> {
    let mut moved = Vec::new();
    for filter in filters {
        let Some(options) = options(filter) else {
            bail!(
                "the interface has an ingress qdisc, on which nothing can be attached to egress, and its \
                 {} filter of priority {} cannot be moved to a clsact qdisc: remove the qdisc, or have \
                 whoever adds it use clsact",
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

/// The options with which a filter like this one can be added; none for an entry of the list that is no
/// filter, and `None` when that is not known.
fn options(filter: &Filter) -> Option<Vec<u8>> {
    let mut options = Vec::new();
    let (kept, nested, left_out): (&[u16], u16, &[u16]) = match filter.kind.as_str() {
        // The entry that stands for all filters of a priority.
        _ if filter.handle == 0 => return Some(options),
        "u32" if is_root_table(filter) => return Some(options),
        "u32" if filter.handle & ROOT_TABLE != 0 => (
            &[TCA_U32_CLASSID, TCA_U32_SEL, TCA_U32_INDEV, TCA_U32_MARK],
            TCA_U32_ACT,
            // Counters, and what says where the filter is.
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
    fn what_the_bandwidth_plugin_makes_moves_one_priority_back() {
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
    fn filters_that_are_not_understood_are_not_moved() {
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
