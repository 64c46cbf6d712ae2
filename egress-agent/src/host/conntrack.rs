//! The records of the node's connection tracking about pods' connections: evidence of who opened them, and where the node
//! translates them.
//!
//! It is evidence from outside the pod. The first packet of a connection that the node sees creates the entry,
//! and its sender defines the entry's original direction. A program in the pod can change that only with
//! frames in the peer's name that the node sends back to the pod.
//!
//! An entry can also be created in the middle of a connection (`nf_conntrack_tcp_loose`), by whichever side
//! sends next. The flag `IP_CT_TCP_FLAG_BE_LIBERAL` marks such an entry: `tcp_new`
//! (`net/netfilter/nf_conntrack_proto_tcp.c`) sets it for both directions, and clears all flags for an
//! entry that a SYN created. The setting `nf_conntrack_tcp_be_liberal` does not set the flag.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_DUMP},
    sys::protocols::NETLINK_NETFILTER,
};

use super::{
    netlink::ip,
    transport::{Transport, attributes, four, malformed},
};

/// `NFNL_SUBSYS_CTNETLINK` with `IPCTNL_MSG_CT_GET` and `IPCTNL_MSG_CT_DELETE`, `include/uapi/linux/netfilter`.
const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;
/// Length of `struct nfgenmsg`.
const HEADER: usize = 4;
/// Address families, `include/linux/socket.h`, and the protocol's number.
const IPV4: u8 = 2;
const IPV6: u8 = 10;
const TCP: u8 = 6;

/// Attributes, `include/uapi/linux/netfilter/nfnetlink_conntrack.h`.
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOINFO: u16 = 4;
const ID: u16 = 12;
const ZONE: u16 = 18;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const IP_V4_SRC: u16 = 1;
const IP_V4_DST: u16 = 2;
const IP_V6_SRC: u16 = 3;
const IP_V6_DST: u16 = 4;
const PROTO_NUMBER: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;
const PROTOINFO_TCP: u16 = 1;
const TCP_FLAGS_ORIGINAL: u16 = 4;
const TCP_FLAGS_REPLY: u16 = 5;
/// `NLA_F_NESTED`, `include/uapi/linux/netlink.h`.
const NESTED: u16 = 1 << 15;

/// Bits of the status, `include/uapi/linux/netfilter/nf_conntrack_common.h`: the other side has replied, and
/// the first packet has left the node's stack.
const SEEN_REPLY: u32 = 1 << 1;
const CONFIRMED: u32 = 1 << 3;
/// `IP_CT_TCP_FLAG_BE_LIBERAL`, `include/uapi/linux/netfilter/nf_conntrack_tcp.h`.
const BE_LIBERAL: u8 = 8;

/// How often the list is read again when it changed meanwhile, so that something may be missing.
const ATTEMPTS: usize = 4;
/// Exists in a network namespace whose connections the kernel tracks, or could track.
const LIMIT: &str = "/proc/sys/net/netfilter/nf_conntrack_max";

/// Source and destination of a connection's packets in one direction.
type Tuple = (SocketAddr, SocketAddr);

/// A socket of the network namespace of the thread that opened it.
pub(super) struct Conntrack(Transport);

/// One entry.
#[derive(Debug, Default)]
struct Entry {
    /// The tuple of packets towards the side that opened the connection.
    reply: Option<Tuple>,
    status: u32,
    /// TCP flags of both directions together.
    flags: Option<u8>,
}

impl Conntrack {
    /// # Errors
    ///
    /// When the kernel has no netfilter.
    pub(super) fn open() -> io::Result<Self> {
        Transport::open(NETLINK_NETFILTER).map(Self)
    }

    /// Whether the node saw that `peer` opened this TCP connection towards `pod`. False if the node tracks no
    /// connections, or has no entry for this one.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer: it has no `CONFIG_NF_CT_NETLINK`, or `CAP_NET_ADMIN` is missing.
    pub(super) fn is_opened_by(&mut self, peer: SocketAddr, pod: SocketAddr) -> io::Result<bool> {
        let mut entry = Entry::default();
        // The kernel finds an entry by the tuple of either direction.
        let asked = self.0.exchange(GET, 0, &request(pod, peer), |body| {
            entry = Entry::read(body)?;
            Ok(())
        });
        match asked {
            Ok(_) => Ok(entry.is_opened_by(peer, pod)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Connections whose destination the node translates alike. They differ in the source's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Translated {
    /// The protocol's number.
    pub protocol: u8,
    /// The source of the packets from the side that opened the connection.
    pub from: IpAddr,
    /// Their destination before the translation.
    pub to: SocketAddr,
    /// Their destination after it.
    pub endpoint: SocketAddr,
}

/// The connections from `chosen` sources whose destination the node translates. Works on the network namespace of the
/// thread, and takes as long as the kernel needs to list all connections.
///
/// # Errors
///
/// When the kernel does not answer: it has no `CONFIG_NF_CT_NETLINK`, or `CAP_NET_ADMIN` is missing.
pub fn translated(chosen: impl Fn(IpAddr) -> bool) -> io::Result<BTreeSet<Translated>> {
    let mut found = BTreeSet::new();
    list_translated(|translated, _| {
        if chosen(translated.from) {
            found.insert(translated);
        }
        Ok(())
    })?;
    Ok(found)
}

/// Makes the node forget these connections: their next packets are translated as those of new ones are. Returns how many
/// there were.
///
/// # Errors
///
/// As for [`translated`].
pub fn forget_translated(denied: &BTreeSet<Translated>) -> io::Result<usize> {
    let mut requests = Vec::new();
    list_translated(|translated, entry| {
        if denied.contains(&translated) {
            requests.push(deletion(entry)?);
        }
        Ok(())
    })?;
    let mut kernel = Transport::open(NETLINK_NETFILTER)?;
    for request in &requests {
        match kernel.exchange(DELETE, NLM_F_ACK, request, |_| Ok(())) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            done => drop(done?),
        }
    }
    Ok(requests.len())
}

/// Calls `each` for every connection whose destination the node translates, at least once, with its entry.
fn list_translated(mut each: impl FnMut(Translated, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let listed = Transport::open(NETLINK_NETFILTER).and_then(|mut kernel| {
        for _ in 0..ATTEMPTS {
            let is_whole = kernel.exchange(GET, NLM_F_DUMP, &[0; HEADER], |body| {
                read_translated(body)?.map_or(Ok(()), |translated| each(translated, body))
            })?;
            if is_whole {
                break;
            }
        }
        Ok(())
    });
    match listed {
        // Without connection tracking the node translates nothing in this way.
        Err(_) if !Path::new(LIMIT).exists() => Ok(()),
        listed => listed,
    }
}

/// The connection of this entry, if the node translates its destination.
fn read_translated(body: &[u8]) -> io::Result<Option<Translated>> {
    let (mut original, mut reply, mut protocol) = (None, None, 0);
    for (kind, value) in attributes(body, HEADER)? {
        match kind {
            TUPLE_ORIGINAL => {
                original = Some(read_tuple(value)?);
                protocol = read_protocol(value)?;
            }
            TUPLE_REPLY => reply = Some(read_tuple(value)?),
            _ => {}
        }
    }
    let (Some((from, to)), Some((endpoint, _))) = (original, reply) else {
        return Ok(None);
    };
    Ok((endpoint != to).then_some(Translated {
        protocol,
        from: from.ip(),
        to,
        endpoint,
    }))
}

/// The request to delete the connection of this entry.
fn deletion(entry: &[u8]) -> io::Result<Vec<u8>> {
    // The family is that of the entry.
    let mut request = entry.get(..HEADER).unwrap_or_default().to_vec();
    for (kind, value) in attributes(entry, HEADER)? {
        match kind {
            TUPLE_ORIGINAL => attribute(&mut request, kind | NESTED, value),
            // Another connection may have the same addresses and ports meanwhile, or in another zone.
            ID | ZONE => attribute(&mut request, kind, value),
            _ => {}
        }
    }
    Ok(request)
}

fn read_protocol(tuple: &[u8]) -> io::Result<u8> {
    for (kind, value) in attributes(tuple, 0)? {
        if kind == TUPLE_PROTO {
            for (kind, value) in attributes(value, 0)? {
                if let (PROTO_NUMBER, [number]) = (kind, value) {
                    return Ok(*number);
                }
            }
        }
    }
    Ok(0)
}

impl Entry {
    fn read(body: &[u8]) -> io::Result<Self> {
        let mut entry = Self::default();
        for (kind, value) in attributes(body, HEADER)? {
            match kind {
                TUPLE_REPLY => entry.reply = Some(read_tuple(value)?),
                STATUS => entry.status = u32::from_be_bytes(four(value)?),
                PROTOINFO => entry.flags = read_flags(value)?,
                _ => {}
            }
        }
        Ok(entry)
    }

    fn is_opened_by(&self, peer: SocketAddr, pod: SocketAddr) -> bool {
        const SEEN: u32 = SEEN_REPLY | CONFIRMED;
        self.reply == Some((pod, peer))
            && self.status & SEEN == SEEN
            && self.flags.is_some_and(|flags| flags & BE_LIBERAL == 0)
    }
}

fn request(src: SocketAddr, dst: SocketAddr) -> Vec<u8> {
    let family = if src.is_ipv4() { IPV4 } else { IPV6 };
    let mut request = vec![family, 0, 0, 0];
    attribute(&mut request, TUPLE_ORIGINAL | NESTED, &tuple(src, dst));
    request
}

fn tuple(src: SocketAddr, dst: SocketAddr) -> Vec<u8> {
    let mut addresses = Vec::new();
    match (src.ip(), dst.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            attribute(&mut addresses, IP_V4_SRC, &src.octets());
            attribute(&mut addresses, IP_V4_DST, &dst.octets());
        }
        (src, dst) => {
            for (kind, ip) in [(IP_V6_SRC, src), (IP_V6_DST, dst)] {
                let octets = match ip {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                    IpAddr::V6(ip) => ip.octets(),
                };
                attribute(&mut addresses, kind, &octets);
            }
        }
    }
    let mut transport = Vec::new();
    attribute(&mut transport, PROTO_NUMBER, &[TCP]);
    attribute(&mut transport, PROTO_SRC_PORT, &src.port().to_be_bytes());
    attribute(&mut transport, PROTO_DST_PORT, &dst.port().to_be_bytes());
    let mut tuple = Vec::new();
    attribute(&mut tuple, TUPLE_IP | NESTED, &addresses);
    attribute(&mut tuple, TUPLE_PROTO | NESTED, &transport);
    tuple
}

fn attribute(into: &mut Vec<u8>, kind: u16, value: &[u8]) {
    into.extend(((4 + value.len()) as u16).to_ne_bytes());
    into.extend(kind.to_ne_bytes());
    into.extend(value);
    into.resize(into.len().next_multiple_of(4), 0);
}

fn read_tuple(body: &[u8]) -> io::Result<Tuple> {
    let (mut src, mut dst, mut src_port, mut dst_port) = (None, None, 0, 0);
    for (kind, value) in attributes(body, 0)? {
        match kind {
            TUPLE_IP => {
                for (kind, value) in attributes(value, 0)? {
                    match kind {
                        IP_V4_SRC | IP_V6_SRC => src = Some(ip(value)?),
                        IP_V4_DST | IP_V6_DST => dst = Some(ip(value)?),
                        _ => {}
                    }
                }
            }
            TUPLE_PROTO => {
                for (kind, value) in attributes(value, 0)? {
                    match kind {
                        PROTO_SRC_PORT => src_port = port(value)?,
                        PROTO_DST_PORT => dst_port = port(value)?,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    match (src, dst) {
        (Some(src), Some(dst)) => Ok((
            SocketAddr::new(src, src_port),
            SocketAddr::new(dst, dst_port),
        )),
        _ => Err(malformed("a tuple without addresses")),
    }
}

fn port(value: &[u8]) -> io::Result<u16> {
    let bytes = value.try_into();
    bytes
        .map(u16::from_be_bytes)
        .map_err(|_| malformed("a port of another size"))
}

/// The TCP flags of both directions; `None` when either is missing. Each is a byte of flags and a byte of
/// mask (`struct nf_ct_tcp_flags`).
fn read_flags(body: &[u8]) -> io::Result<Option<u8>> {
    let (mut original, mut reply) = (None, None);
    for (kind, value) in attributes(body, 0)? {
        if kind != PROTOINFO_TCP {
            continue;
        }
        for (kind, value) in attributes(value, 0)? {
            match kind {
                TCP_FLAGS_ORIGINAL => original = value.first().copied(),
                TCP_FLAGS_REPLY => reply = value.first().copied(),
                _ => {}
            }
        }
    }
    Ok(original
        .zip(reply)
        .map(|(original, reply)| original | reply))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(reply: Tuple) -> Entry {
        Entry {
            reply: Some(reply),
            status: SEEN_REPLY | CONFIRMED,
            flags: Some(3),
        }
    }

    #[test]
    fn a_peer_opened_a_connection_only_if_it_sent_the_first_packet_and_the_pod_replied() {
        let pod: SocketAddr = "10.1.1.2:8080".parse().unwrap();
        let peer: SocketAddr = "203.0.113.9:40000".parse().unwrap();
        assert!(entry((pod, peer)).is_opened_by(peer, pod));
        // The pod opened it, towards this address or towards a Service's.
        assert!(!entry((peer, pod)).is_opened_by(peer, pod));
        let unanswered = Entry {
            status: CONFIRMED,
            ..entry((pod, peer))
        };
        assert!(!unanswered.is_opened_by(peer, pod));
        let picked_up = Entry {
            flags: Some(2 | BE_LIBERAL),
            ..entry((pod, peer))
        };
        assert!(!picked_up.is_opened_by(peer, pod));
        let of_no_tcp = Entry {
            flags: None,
            ..entry((pod, peer))
        };
        assert!(!of_no_tcp.is_opened_by(peer, pod));
        assert!(!Entry::default().is_opened_by(peer, pod));
    }

    #[test]
    fn a_written_tuple_is_read_back() {
        for (src, dst) in [
            ("10.1.1.2:8080", "203.0.113.9:40000"),
            ("[fd01:1::2]:8080", "[2001:db8::9]:40000"),
        ] {
            let tuple: Tuple = (src.parse().unwrap(), dst.parse().unwrap());
            let request = request(tuple.0, tuple.1);
            let found = attributes(&request, HEADER).unwrap();
            assert_eq!(found.len(), 1);
            assert_eq!(found[0].0, TUPLE_ORIGINAL);
            assert_eq!(read_tuple(found[0].1).unwrap(), tuple);
        }
    }

    /// An entry as the kernel lists it.
    fn listed(original: Tuple, reply: Tuple) -> Vec<u8> {
        let mut entry = request(original.0, original.1);
        attribute(&mut entry, TUPLE_REPLY | NESTED, &tuple(reply.0, reply.1));
        attribute(&mut entry, STATUS, &CONFIRMED.to_be_bytes());
        attribute(&mut entry, ID, &[1, 2, 3, 4]);
        attribute(&mut entry, ZONE, &[0, 7]);
        entry
    }

    #[test]
    fn a_connection_is_translated_if_another_address_or_port_replies() {
        let [pod, service, endpoint]: [SocketAddr; 3] =
            ["10.1.1.2:40000", "10.96.0.7:80", "203.0.113.9:80"].map(|text| text.parse().unwrap());
        let read = |replies| read_translated(&listed((pod, service), (replies, pod))).unwrap();
        assert_eq!(read(service), None);
        let other_port = SocketAddr::new(service.ip(), 8080);
        for endpoint in [endpoint, other_port] {
            let translated = Translated {
                protocol: TCP,
                from: pod.ip(),
                to: service,
                endpoint,
            };
            assert_eq!(read(endpoint), Some(translated));
        }
    }

    #[test]
    fn an_entry_is_deleted_by_its_tuple_zone_and_id() {
        for (pod, service, endpoint) in [
            ("10.1.1.2:40000", "10.96.0.7:80", "203.0.113.9:80"),
            ("[fd01:1::2]:40000", "[fd96::7]:80", "[2001:db8::9]:80"),
        ] {
            let [pod, service, endpoint]: [SocketAddr; 3] =
                [pod, service, endpoint].map(|text| text.parse().unwrap());
            let deletion = deletion(&listed((pod, service), (endpoint, pod))).unwrap();
            let found = attributes(&deletion, HEADER).unwrap();
            let kinds: Vec<u16> = found.iter().map(|(kind, _)| *kind).collect();
            assert_eq!(kinds, [TUPLE_ORIGINAL, ID, ZONE]);
            assert_eq!(read_tuple(found[0].1).unwrap(), (pod, service));
            assert_eq!(deletion[0], if pod.is_ipv4() { IPV4 } else { IPV6 });
        }
    }
}
