//! Requests to the kernel about qdiscs and filters (rtnetlink, `net/sched`).
//!
//! Requests identify an interface by its index, because its name may belong to another interface by the time
//! the kernel reads it. Replies are read attribute by attribute, as in [`crate::host`].

use std::io;

use egress_common::ids::IfIndex;
use rtnetlink::{
    packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL},
    sys::protocols::NETLINK_ROUTE,
};

use super::netlink::{NESTED, Netlink, Request, add, attributes, number, text};

/// Length of `struct tcmsg`, `include/uapi/linux/rtnetlink.h`.
const TC_HEADER: usize = 20;

/// Kinds of messages, of the same file.
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;

/// Attributes of qdiscs and filters.
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_CHAIN: u16 = 11;
/// Attributes of a `bpf` filter, `include/uapi/linux/pkt_cls.h`.
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
/// The program's return value is the verdict on the packet.
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;

/// `TC_H_CLSACT`, which is `TC_H_INGRESS`: the parent of such a qdisc.
const CLSACT: u32 = 0xffff_fff1;
/// The handle that the kernel assigns to it.
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// `ETH_P_ALL`, in the network byte order that the kernel expects.
const EVERY_PROTOCOL: u16 = 3u16.to_be();
/// A side of an interface to which filters are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Packets that the interface receives.
    Ingress,
    /// Packets that it sends.
    Egress,
}

impl Side {
    const fn parent(self) -> u32 {
        match self {
            Self::Ingress => 0xffff_fff2,
            Self::Egress => 0xffff_fff3,
        }
    }
}

/// A filter, as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) priority: u16,
    /// In network byte order.
    pub(super) protocol: u16,
    pub(super) chain: u32,
    /// 0 for the entry that represents all filters of a priority.
    pub(super) handle: u32,
    pub(super) kind: String,
    /// The attributes of its kind.
    pub(super) options: Vec<u8>,
}

impl Filter {
    /// The id of the BPF program that it runs.
    pub(super) fn program(&self) -> Option<u32> {
        let of_bpf = (self.kind == "bpf").then_some(&self.options)?;
        let id = attributes(of_bpf).find(|(kind, _)| *kind == TCA_BPF_ID)?.1;
        Some(u32::from_ne_bytes(id.try_into().ok()?))
    }

    /// The name of the BPF program that it runs.
    pub(super) fn program_name(&self) -> Option<String> {
        let of_bpf = (self.kind == "bpf").then_some(&self.options)?;
        let mut attributes = attributes(of_bpf);
        attributes
            .find(|(kind, _)| *kind == TCA_BPF_NAME)
            .map(|(_, name)| text(name))
    }

    /// Whether BPF filters for every protocol can be added with the same priority: all filters of a
    /// priority have one kind and one protocol (`tcf_chain_tp_find`, `net/sched/cls_api.c`).
    pub(super) fn has_room_for_ours(&self) -> bool {
        self.kind == "bpf" && self.protocol == EVERY_PROTOCOL
    }
}

/// A BPF filter to add.
pub(super) struct BpfFilter<'a> {
    pub(super) priority: u16,
    pub(super) handle: u32,
    pub(super) name: &'a str,
    pub(super) program: i32,
}

/// A socket of the network namespace of the thread that opened it.
pub(super) struct TrafficControl {
    netlink: Netlink,
}

impl TrafficControl {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self {
            netlink: Netlink::open(NETLINK_ROUTE)?,
        })
    }

    /// Adds a clsact qdisc. Returns whether the interface has one now: false if it has a qdisc of another
    /// kind in its place.
    pub(super) fn add_clsact(&mut self, ifindex: IfIndex) -> io::Result<bool> {
        let mut request = request(RTM_NEWQDISC, ifindex, CLSACT_HANDLE, CLSACT, 0);
        request.add(TCA_KIND, b"clsact\0");
        match self.exchange(request, NLM_F_CREATE | NLM_F_EXCL, |_| ()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Ok(self.hook_qdisc(ifindex)?.as_deref() == Some("clsact"))
            }
            Err(error) => Err(error),
        }
    }

    /// The kind of the qdisc to which an interface's filters are attached: `clsact` or `ingress`. This lists
    /// all qdiscs, because the kernel sends the reply to a request about one of them to everybody who listens
    /// for changes (`tc_get_qdisc`, `net/sched/sch_api.c`), which includes the agent.
    fn hook_qdisc(&mut self, ifindex: IfIndex) -> io::Result<Option<String>> {
        let mut found = None;
        let request = request(RTM_GETQDISC, IfIndex::NONE, 0, 0, 0);
        self.exchange(request, NLM_F_DUMP, |body| {
            let Some(header) = body.get(..TC_HEADER) else {
                return;
            };
            if number(&header[4..8]) == ifindex.get() && number(&header[12..16]) == CLSACT {
                found = attributes(&body[TC_HEADER..])
                    .find(|(kind, _)| *kind == TCA_KIND)
                    .map(|(_, value)| text(value));
            }
        })?;
        Ok(found)
    }

    /// Removes the qdisc to which an interface's filters are attached, with all of them.
    pub(super) fn remove_hook_qdisc(&mut self, ifindex: IfIndex) -> io::Result<()> {
        let request = request(RTM_DELQDISC, ifindex, CLSACT_HANDLE, CLSACT, 0);
        self.exchange(request, 0, |_| ())
    }

    /// The filters of one side, in the order in which packets meet them. An interface that does not exist has
    /// none.
    pub(super) fn filters(&mut self, ifindex: IfIndex, side: Side) -> io::Result<Vec<Filter>> {
        let mut filters = Vec::new();
        let request = request(RTM_GETTFILTER, ifindex, 0, side.parent(), 0);
        let listed = self.exchange(request, NLM_F_DUMP, |body| filters.extend(read(body)));
        match listed {
            Ok(()) => Ok(filters),
            // Without the qdisc there are no filters; kernels return different errors for it.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)
                ) =>
            {
                Ok(Vec::new())
            }
            Err(error) => Err(error),
        }
    }

    /// Adds a BPF filter in front of the others of its priority. A filter with the same handle is replaced in
    /// its place.
    pub(super) fn put(
        &mut self,
        ifindex: IfIndex,
        side: Side,
        filter: &BpfFilter<'_>,
    ) -> io::Result<()> {
        let info = info(filter.priority, EVERY_PROTOCOL);
        let parent = side.parent();
        let mut request = request(RTM_NEWTFILTER, ifindex, filter.handle, parent, info);
        request.add(TCA_KIND, b"bpf\0");
        let mut options = Vec::new();
        add(&mut options, TCA_BPF_FD, &filter.program.to_ne_bytes());
        add(
            &mut options,
            TCA_BPF_NAME,
            format!("{}\0", filter.name).as_bytes(),
        );
        let flags = TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes();
        add(&mut options, TCA_BPF_FLAGS, &flags);
        request.add(TCA_OPTIONS | NESTED, &options);
        self.exchange(request, NLM_F_CREATE, |_| ())
    }

    /// Adds a filter like this one.
    pub(super) fn add(&mut self, ifindex: IfIndex, side: Side, filter: &Filter) -> io::Result<()> {
        let info = info(filter.priority, filter.protocol);
        let mut request = request(RTM_NEWTFILTER, ifindex, 0, side.parent(), info);
        request.add(TCA_KIND, format!("{}\0", filter.kind).as_bytes());
        if filter.chain != 0 {
            request.add(TCA_CHAIN, &filter.chain.to_ne_bytes());
        }
        request.add(TCA_OPTIONS | NESTED, &filter.options);
        self.exchange(request, NLM_F_CREATE | NLM_F_EXCL, |_| ())
    }

    /// Removes a filter; a missing filter is not an error.
    pub(super) fn remove(
        &mut self,
        ifindex: IfIndex,
        side: Side,
        filter: &Filter,
    ) -> io::Result<()> {
        let info = info(filter.priority, filter.protocol);
        let parent = side.parent();
        let mut request = request(RTM_DELTFILTER, ifindex, filter.handle, parent, info);
        request.add(TCA_KIND, format!("{}\0", filter.kind).as_bytes());
        match self.exchange(request, 0, |_| ()) {
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)
                ) && !self.filters(ifindex, side)?.contains(filter) =>
            {
                Ok(())
            }
            done => done,
        }
    }

    fn exchange(
        &mut self,
        request: Request,
        flags: u16,
        reply: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        self.netlink.exchange(request, flags, reply).map(drop)
    }
}

/// A request about an interface's qdisc or filter.
fn request(kind: u16, ifindex: IfIndex, handle: u32, parent: u32, info: u32) -> Request {
    // tcm_family and padding.
    let mut header = vec![0; 4];
    for field in [ifindex.get(), handle, parent, info] {
        header.extend(field.to_ne_bytes());
    }
    Request::new(kind, &header)
}

fn read(body: &[u8]) -> Option<Filter> {
    let header = body.get(..TC_HEADER)?;
    let info = number(&header[16..20]);
    let mut filter = Filter {
        priority: (info >> 16) as u16,
        protocol: info as u16,
        chain: 0,
        handle: number(&header[8..12]),
        kind: String::new(),
        options: Vec::new(),
    };
    for (kind, value) in attributes(&body[TC_HEADER..]) {
        match kind {
            TCA_KIND => filter.kind = text(value),
            TCA_OPTIONS => value.clone_into(&mut filter.options),
            TCA_CHAIN => filter.chain = value.get(..4).map_or(0, number),
            _ => {}
        }
    }
    Some(filter)
}

const fn info(priority: u16, protocol: u16) -> u32 {
    ((priority as u32) << 16) | protocol as u32
}
