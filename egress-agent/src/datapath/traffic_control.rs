//! Questions and requests to the kernel about qdiscs and filters (rtnetlink, `net/sched`).
//!
//! An interface is named by its index: a name can belong to another interface by the time the
//! kernel reads it. Replies are read attribute by attribute, as in [`crate::host`].

use std::io;

use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST},
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

/// The kernel fills at most this much at a time (`netlink_dump`, `net/netlink/af_netlink.c`).
const BUFFER: usize = 32 * 1024;
/// Length of `struct nlmsghdr`, `include/uapi/linux/netlink.h`.
const HEADER: usize = 16;
/// Length of `struct tcmsg`, `include/uapi/linux/rtnetlink.h`.
const TC_HEADER: usize = 20;

/// Kinds of messages, of the same two files.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
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
/// What the program returns is what happens to the packet.
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;

/// `TC_H_CLSACT`, which is `TC_H_INGRESS`: where such a qdisc hangs.
const CLSACT: u32 = 0xffff_fff1;
/// The handle that the kernel gives it.
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// `ETH_P_ALL`, in network byte order as the kernel wants it.
const EVERY_PROTOCOL: u16 = 3u16.to_be();
/// Of an attribute's kind, the bits that are not flags (`NLA_TYPE_MASK`).
const KIND_MASK: u16 = 0x3fff;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

/// A side of an interface that filters hang on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// What the interface receives.
    Ingress,
    /// What it sends.
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
    /// 0 for the entry that stands for all filters of a priority.
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

    /// Whether BPF filters for every protocol can be added under the same priority: all filters of a
    /// priority are of one kind and one protocol (`tcf_chain_tp_find`, `net/sched/cls_api.c`).
    pub(super) fn has_room_for_ours(&self) -> bool {
        self.kind == "bpf" && self.protocol == EVERY_PROTOCOL
    }
}

/// A BPF filter to be added.
pub(super) struct BpfFilter<'a> {
    pub(super) priority: u16,
    pub(super) handle: u32,
    pub(super) name: &'a str,
    pub(super) program: i32,
}

/// A socket of the network namespace of the thread that opened it.
pub(super) struct TrafficControl {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl TrafficControl {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: Vec::with_capacity(BUFFER),
        })
    }

    /// Adds a clsact qdisc. Returns whether there is none yet of another kind in its place.
    pub(super) fn add_clsact(&mut self, ifindex: u32) -> io::Result<bool> {
        let mut request = Request::new(RTM_NEWQDISC, ifindex, CLSACT_HANDLE, CLSACT, 0);
        request.add(TCA_KIND, b"clsact\0");
        match self.exchange(request, NLM_F_CREATE | NLM_F_EXCL, |_| ()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Ok(self.hook_qdisc(ifindex)?.as_deref() == Some("clsact"))
            }
            Err(error) => Err(error),
        }
    }

    /// The kind of the qdisc on which an interface's filters hang: `clsact` or `ingress`. All qdiscs
    /// are listed for it: a question about one is told to everybody who listens for changes
    /// (`tc_get_qdisc`, `net/sched/sch_api.c`), and we do.
    fn hook_qdisc(&mut self, ifindex: u32) -> io::Result<Option<String>> {
        let mut found = None;
        let request = Request::new(RTM_GETQDISC, 0, 0, 0, 0);
        self.exchange(request, NLM_F_DUMP, |body| {
            let Some(header) = body.get(..TC_HEADER) else {
                return;
            };
            if number(&header[4..8]) == ifindex && number(&header[12..16]) == CLSACT {
                found = attributes(&body[TC_HEADER..])
                    .find(|(kind, _)| *kind == TCA_KIND)
                    .map(|(_, value)| text(value));
            }
        })?;
        Ok(found)
    }

    /// Removes the qdisc on which an interface's filters hang, with all of them.
    pub(super) fn remove_hook_qdisc(&mut self, ifindex: u32) -> io::Result<()> {
        let request = Request::new(RTM_DELQDISC, ifindex, CLSACT_HANDLE, CLSACT, 0);
        self.exchange(request, 0, |_| ())
    }

    /// The filters of one side, in the order in which packets meet them. An interface that is not
    /// there has none.
    pub(super) fn filters(&mut self, ifindex: u32, side: Side) -> io::Result<Vec<Filter>> {
        let mut filters = Vec::new();
        let request = Request::new(RTM_GETTFILTER, ifindex, 0, side.parent(), 0);
        let listed = self.exchange(request, NLM_F_DUMP, |body| filters.extend(read(body)));
        match listed {
            Ok(()) => Ok(filters),
            // Without the qdisc there is nothing to list; kernels differ in how they say it.
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

    /// Adds a BPF filter, before those that its priority has. One with the same handle is replaced
    /// at its place.
    pub(super) fn put(
        &mut self,
        ifindex: u32,
        side: Side,
        filter: &BpfFilter<'_>,
    ) -> io::Result<()> {
        let info = info(filter.priority, EVERY_PROTOCOL);
        let parent = side.parent();
        let mut request = Request::new(RTM_NEWTFILTER, ifindex, filter.handle, parent, info);
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
    pub(super) fn add(&mut self, ifindex: u32, side: Side, filter: &Filter) -> io::Result<()> {
        let info = info(filter.priority, filter.protocol);
        let mut request = Request::new(RTM_NEWTFILTER, ifindex, 0, side.parent(), info);
        request.add(TCA_KIND, format!("{}\0", filter.kind).as_bytes());
        if filter.chain != 0 {
            request.add(TCA_CHAIN, &filter.chain.to_ne_bytes());
        }
        request.add(TCA_OPTIONS | NESTED, &filter.options);
        self.exchange(request, NLM_F_CREATE | NLM_F_EXCL, |_| ())
    }

    /// Removes a filter; one that is gone is no error.
    pub(super) fn remove(&mut self, ifindex: u32, side: Side, filter: &Filter) -> io::Result<()> {
        let info = info(filter.priority, filter.protocol);
        let parent = side.parent();
        let mut request = Request::new(RTM_DELTFILTER, ifindex, filter.handle, parent, info);
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

    /// Sends a request and hands on the body of each reply.
    fn exchange(
        &mut self,
        request: Request,
        flags: u16,
        mut reply: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        // One of its two bits means something else in a request that adds (`NLM_F_EXCL`).
        let dump = flags & NLM_F_DUMP == NLM_F_DUMP;
        let flags = flags | NLM_F_REQUEST | if dump { 0 } else { NLM_F_ACK };
        self.socket.send(&request.finish(flags, self.sequence), 0)?;
        loop {
            self.buffer.clear();
            let length = self.socket.recv(&mut self.buffer, libc::MSG_TRUNC)?;
            let mut rest = self
                .buffer
                .get(..length)
                .ok_or_else(|| malformed("a message longer than any should be"))?;
            while let Some((kind, sequence, body, next)) = message(rest)? {
                rest = next;
                if sequence != self.sequence {
                    // The rest of an exchange that was given up.
                    continue;
                }
                match kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        return match body.get(..4).map(number) {
                            Some(0) => Ok(()),
                            Some(code) => Err(io::Error::from_raw_os_error(
                                code.cast_signed().wrapping_neg(),
                            )),
                            None => Err(malformed("an end without a code")),
                        };
                    }
                    _ => reply(body),
                }
            }
        }
    }
}

/// A message that is being written.
struct Request(Vec<u8>);

impl Request {
    fn new(kind: u16, ifindex: u32, handle: u32, parent: u32, info: u32) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        // tcm_family and padding.
        bytes.extend([0; 4]);
        for field in [ifindex, handle, parent, info] {
            bytes.extend(field.to_ne_bytes());
        }
        Self(bytes)
    }

    fn add(&mut self, kind: u16, value: &[u8]) {
        add(&mut self.0, kind, value);
    }

    fn finish(mut self, flags: u16, sequence: u32) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// Appends an attribute.
pub(super) fn add(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend((4 + value.len() as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Kind and value of each attribute; what is cut short ends them.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & KIND_MASK, value))
    })
}

/// The first message of several: its kind, sequence number and body, and what follows it.
#[expect(clippy::type_complexity, reason = "taken apart at once")]
fn message(bytes: &[u8]) -> io::Result<Option<(u16, u32, &[u8], &[u8])>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let header = bytes
        .get(..HEADER)
        .ok_or_else(|| malformed("a message without a header"))?;
    let length = number(&header[..4]) as usize;
    let body = bytes
        .get(HEADER..length)
        .ok_or_else(|| malformed("a message cut short"))?;
    let rest = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    let kind = u16::from_ne_bytes([header[4], header[5]]);
    Ok(Some((kind, number(&header[8..12]), body, rest)))
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

/// The number in the first four bytes.
fn number(bytes: &[u8]) -> u32 {
    bytes
        .first_chunk()
        .map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

fn text(value: &[u8]) -> String {
    let end = value.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(&value[..end.unwrap_or(value.len())]).into_owned()
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the kernel's answer over netlink holds {what}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_they_were_written() {
        let mut bytes = Vec::new();
        add(&mut bytes, TCA_KIND, b"bpf\0");
        add(&mut bytes, TCA_OPTIONS | NESTED, &[1]);
        add(&mut bytes, TCA_CHAIN, &7u32.to_ne_bytes());
        let read: Vec<_> = attributes(&bytes).collect();
        assert_eq!(
            read,
            [
                (TCA_KIND, &b"bpf\0"[..]),
                (TCA_OPTIONS, &[1]),
                (TCA_CHAIN, &7u32.to_ne_bytes()),
            ]
        );
    }

    #[test]
    fn attributes_that_are_cut_short_or_too_short_end_the_list() {
        for bytes in [&[8, 0, 1, 0, 1][..], &[3, 0, 1, 0], &[0, 0, 0, 0], &[4]] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
    }
}
