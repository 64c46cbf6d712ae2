//! Netlink requests about interfaces, network namespaces and addresses.
//!
//! Requests are built with the library's types. Replies are read attribute by attribute: on a kernel newer
//! than the library, an attribute that the library cannot read must not hide an interface.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, AsRawFd as _},
};

use egress_common::ids::IfIndex;
use rtnetlink::{
    packet_core::{DefaultNla, NLM_F_ACK, NLM_F_DUMP, NetlinkBuffer, NetlinkSerializable as _},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressMessage},
        link::{LinkAttribute, LinkExtentMask, LinkMessage},
        neighbour::NeighbourMessage,
        nsid::{NsidAttribute, NsidMessage},
        route::RouteMessage,
    },
    sys::protocols::NETLINK_ROUTE,
};

use super::{
    HardwareAddress,
    transport::{Transport, attributes, four, malformed},
};

/// How often a list is requested again after the kernel reports that it changed during the dump.
const ATTEMPTS: usize = 4;

/// Length of `struct ifinfomsg` and of `struct ifaddrmsg`, `include/uapi/linux`.
const LINK_HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;
const NSID_HEADER: usize = 4;
const NEIGHBOUR_HEADER: usize = 12;
const ROUTE_HEADER: usize = 12;

/// Attributes of links, `include/uapi/linux/if_link.h`.
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_PROTINFO: u16 = 12;
const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_ATTACHED: u16 = 2;
const IFLA_XDP_PROG_ID: u16 = 4;
const IFLA_TARGET_NETNSID: u16 = 46;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_BR_MULTI_BOOLOPT: u16 = 46;
const IFLA_BRPORT_GUARD: u16 = 5;
/// `BR_BOOLOPT_NO_LL_LEARN`, as a bit, `include/uapi/linux/if_bridge.h`.
const NO_LINK_LOCAL_LEARN: u32 = 1;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

/// Attributes of addresses, `include/uapi/linux/if_addr.h`.
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_TARGET_NETNSID: u16 = 10;

/// Attributes of neighbours, `include/uapi/linux/neighbour.h`.
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;

/// Attribute of routes, and the route types whose packets the node delivers to itself,
/// `include/uapi/linux/rtnetlink.h`.
const RTA_DST: u16 = 1;
const TO_NODE: [u8; 3] = [libc::RTN_LOCAL, libc::RTN_BROADCAST, libc::RTN_ANYCAST];

/// Attribute of namespaces, `include/uapi/linux/net_namespace.h`.
const NETNSA_NSID: u16 = 1;

/// The kernel's description of one interface.
#[derive(Clone, Debug, Default)]
pub(super) struct RawLink {
    pub(super) index: u32,
    pub(super) up: bool,
    pub(super) loopback: bool,
    pub(super) name: String,
    pub(super) kind: String,
    pub(super) master: Option<u32>,
    pub(super) lower: Option<u32>,
    pub(super) nsid: Option<i32>,
    /// Its hardware address, if that is one of Ethernet.
    pub(super) hardware: Option<HardwareAddress>,
    /// The namespace of the request, if it is not our own.
    pub(super) target: Option<i32>,
    /// Id of its XDP program; 0 when it has several.
    pub(super) xdp: Option<u32>,
}

impl RawLink {
    /// Whether this is one end of a pair, whose ends may be in two namespaces.
    pub(super) fn has_host_end(&self) -> bool {
        matches!(self.kind.as_str(), "veth" | "netkit")
    }
}

/// A socket of the network namespace of the thread that opened it.
pub(super) struct Netlink(Transport);

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        let mut transport = Transport::open(NETLINK_ROUTE)?;
        // Without strict checking the kernel ignores IFA_TARGET_NETNSID and answers for our own namespace.
        transport.be_strict()?;
        Ok(Self(transport))
    }

    /// Every interface of this namespace.
    pub(super) fn links(&mut self) -> io::Result<Vec<RawLink>> {
        let mut links = Vec::new();
        for _ in 0..ATTEMPTS {
            links.clear();
            let mut request = LinkMessage::default();
            let mask = LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]);
            request.attributes.push(mask);
            let whole =
                self.exchange(&RouteNetlinkMessage::GetLink(request), NLM_F_DUMP, |body| {
                    links.push(read_link(body)?);
                    Ok(())
                })?;
            if whole {
                break;
            }
        }
        // A list that changed during each attempt may lack an interface that is changing. Each change causes
        // another event, after which the list is requested again.
        Ok(links)
    }

    /// One interface of this namespace, if it exists.
    pub(super) fn link(&mut self, ifindex: IfIndex) -> io::Result<Option<RawLink>> {
        let mut link = None;
        let answer = self.exchange(&get_link(ifindex.get()), 0, |body| {
            link = Some(read_link(body)?);
            Ok(())
        });
        match answer {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            answer => answer.map(|_| link),
        }
    }

    /// One interface of the namespace with this number, if it exists.
    pub(super) fn link_in(&mut self, nsid: i32, index: u32) -> io::Result<Option<RawLink>> {
        let mut request = LinkMessage::default();
        request.header.index = index;
        let target = DefaultNla::new(IFLA_TARGET_NETNSID, nsid.to_ne_bytes().to_vec());
        request.attributes.push(LinkAttribute::Other(target));
        let mut link = None;
        let request = RouteNetlinkMessage::GetLink(request);
        let answer = self.exchange(&request, 0, |body| {
            link = Some(read_link(body)?).filter(|link| link.target == Some(nsid));
            Ok(())
        });
        match answer {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => self.ignore_if_removed(nsid, error).map(|()| None),
            Ok(_) => Ok(link),
        }
    }

    /// The neighbours of this namespace that have a hardware address.
    pub(super) fn neighbours(&mut self) -> io::Result<Vec<(IpAddr, HardwareAddress)>> {
        let mut neighbours = Vec::new();
        let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        self.exchange(&request, NLM_F_DUMP, |body| {
            let (mut address, mut hardware) = (None, None);
            for (kind, value) in attributes(body, NEIGHBOUR_HEADER)? {
                match kind {
                    NDA_DST => address = ip(value).ok(),
                    NDA_LLADDR => hardware = HardwareAddress::read(value),
                    _ => {}
                }
            }
            neighbours.extend(address.zip(hardware));
            Ok(())
        })?;
        Ok(neighbours)
    }

    /// Every interface of the namespace with this number; none if the namespace is being removed. `None` if there
    /// are more than `limit`.
    pub(super) fn links_in(&mut self, nsid: i32, limit: usize) -> io::Result<Option<Vec<RawLink>>> {
        let mut links: BTreeMap<u32, RawLink> = BTreeMap::new();
        for _ in 0..ATTEMPTS {
            let mut request = LinkMessage::default();
            let mask = LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]);
            request.attributes.push(mask);
            let target = DefaultNla::new(IFLA_TARGET_NETNSID, nsid.to_ne_bytes().to_vec());
            request.attributes.push(LinkAttribute::Other(target));
            let request = RouteNetlinkMessage::GetLink(request);
            let mut is_over = false;
            let whole = self.exchange(&request, NLM_F_DUMP, |body| {
                let link = read_link(body)?;
                if link.target != Some(nsid) {
                    // Never mistake our own interfaces for a pod's.
                    return Err(malformed("interfaces of another namespace"));
                }
                links.insert(link.index, link);
                is_over = links.len() > limit;
                if is_over {
                    return Err(malformed("too many interfaces"));
                }
                Ok(())
            });
            if is_over {
                // The kernel starts no other dump on this socket before this one has ended.
                *self = Self::open()?;
                return Ok(None);
            }
            match whole {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => {
                    self.ignore_if_removed(nsid, error)?;
                    return Ok(Some(Vec::new()));
                }
            }
            // A pod cannot hide an interface by constant changes: the results of all attempts count.
        }
        Ok(Some(links.into_values().collect()))
    }

    /// Ignores an error that a namespace gives because it is being removed.
    ///
    /// Such a namespace has no process any more. The kernel removes namespaces in batches (`cleanup_net`,
    /// `net/core/net_namespace.c`). Until then the namespace keeps its number and its interfaces, and each request
    /// about them fails with `EINVAL` (`rtnl_get_net_ns_capable`).
    fn ignore_if_removed(&mut self, nsid: i32, error: io::Error) -> io::Result<()> {
        if error.raw_os_error() != Some(libc::EINVAL) {
            return Err(error);
        }
        let mut request = NsidMessage::default();
        request.attributes.push(NsidAttribute::Id(nsid));
        let request = RouteNetlinkMessage::GetNsId(request);
        match self.exchange(&request, 0, |_| Ok(())) {
            Err(answer) if answer.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            _ => Err(error),
        }
    }

    /// The number of that namespace in this one. It has none before an interface connects the two.
    pub(super) fn nsid(&mut self, namespace: impl AsFd) -> io::Result<Option<i32>> {
        let mut request = NsidMessage::default();
        let descriptor = namespace.as_fd().as_raw_fd();
        let descriptor = u32::try_from(descriptor).map_err(|_| malformed("a descriptor"))?;
        request.attributes.push(NsidAttribute::Fd(descriptor));
        let mut nsid = None;
        self.exchange(&RouteNetlinkMessage::GetNsId(request), 0, |body| {
            for (kind, value) in attributes(body, NSID_HEADER)? {
                if kind == NETNSA_NSID {
                    nsid = Some(i32::from_ne_bytes(four(value)?)).filter(|nsid| *nsid >= 0);
                }
            }
            Ok(())
        })?;
        Ok(nsid)
    }

    /// The addresses of global scope on an interface of another namespace.
    pub(super) fn addresses(&mut self, nsid: i32, index: u32) -> io::Result<Vec<IpAddr>> {
        let mut addresses = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = AddressMessage::default();
            request.header.family = family;
            request.header.index = index;
            let target = DefaultNla::new(IFA_TARGET_NETNSID, nsid.to_ne_bytes().to_vec());
            request.attributes.push(AddressAttribute::Other(target));
            let request = RouteNetlinkMessage::GetAddress(request);
            self.exchange(&request, NLM_F_DUMP, |body| {
                addresses.extend(read_address(body, nsid)?);
                Ok(())
            })?;
        }
        Ok(addresses)
    }

    /// Every address of this namespace, of any scope.
    pub(super) fn own_addresses(&mut self) -> io::Result<Vec<IpAddr>> {
        let mut addresses = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = AddressMessage::default();
            request.header.family = family;
            let request = RouteNetlinkMessage::GetAddress(request);
            self.exchange(&request, NLM_F_DUMP, |body| {
                addresses.extend(read_any_address(body)?.address);
                Ok(())
            })?;
        }
        Ok(addresses)
    }

    /// The destinations, with their lengths in bits, whose packets this namespace delivers to itself: those in
    /// the kernel's local route table.
    pub(super) fn local_routes(&mut self) -> io::Result<Vec<(IpAddr, u8)>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            request.header.table = libc::RT_TABLE_LOCAL;
            let request = RouteNetlinkMessage::GetRoute(request);
            self.exchange(&request, NLM_F_DUMP, |body| {
                routes.extend(read_local_route(body)?);
                Ok(())
            })?;
        }
        Ok(routes)
    }

    /// Stops a bridge from learning from frames to link-local addresses.
    pub(super) fn learn_nothing_link_local(&mut self, bridge: IfIndex) -> io::Result<()> {
        let option = [
            NO_LINK_LOCAL_LEARN.to_ne_bytes(),
            NO_LINK_LOCAL_LEARN.to_ne_bytes(),
        ]
        .concat();
        let data = nested(IFLA_BR_MULTI_BOOLOPT, &option);
        let info = [
            nested(IFLA_INFO_KIND, b"bridge\0"),
            nested(IFLA_INFO_DATA | NESTED, &data),
        ];
        let mut request = LinkMessage::default();
        request.header.index = bridge.get();
        let info = DefaultNla::new(IFLA_LINKINFO | NESTED, info.concat());
        request.attributes.push(LinkAttribute::Other(info));
        self.change(&RouteNetlinkMessage::NewLink(request))
    }

    /// Has a bridge disable this port when a spanning tree message arrives on it.
    pub(super) fn guard_port(&mut self, port: IfIndex) -> io::Result<()> {
        let mut request = LinkMessage::default();
        request.header.interface_family = AddressFamily::Bridge;
        request.header.index = port.get();
        let guard = DefaultNla::new(IFLA_PROTINFO | NESTED, nested(IFLA_BRPORT_GUARD, &[1]));
        request.attributes.push(LinkAttribute::Other(guard));
        self.change(&RouteNetlinkMessage::SetLink(request))
    }

    fn change(&mut self, request: &RouteNetlinkMessage) -> io::Result<()> {
        self.exchange(request, NLM_F_ACK, |_| Ok(())).map(drop)
    }

    /// See [`Transport::exchange`].
    fn exchange(
        &mut self,
        request: &RouteNetlinkMessage,
        flags: u16,
        reply: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<bool> {
        let mut body = vec![0; request.buffer_len()];
        request.serialize(&mut body);
        self.0.exchange(request.message_type(), flags, &body, reply)
    }
}

/// The new or changed interfaces in the kernel's notifications.
pub(super) fn links_in_notices(mut notices: &[u8]) -> Vec<RawLink> {
    let mut links = Vec::new();
    while let Ok(notice) = NetlinkBuffer::new_checked(notices) {
        let next = (notice.length() as usize).next_multiple_of(4);
        if notice.message_type() == libc::RTM_NEWLINK {
            links.extend(read_link(notice.payload()).ok());
        }
        notices = notices.get(next..).unwrap_or_default();
    }
    links
}

/// Encodes an attribute that is nested in another one.
fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = (4 + value.len()) as u16;
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Requests one interface, or in a dump all of them (0).
fn get_link(index: u32) -> RouteNetlinkMessage {
    let mut request = LinkMessage::default();
    request.header.index = index;
    let mask = LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]);
    request.attributes.push(mask);
    RouteNetlinkMessage::GetLink(request)
}

fn read_link(body: &[u8]) -> io::Result<RawLink> {
    let header = body
        .get(..LINK_HEADER)
        .ok_or_else(|| malformed("a link without a header"))?;
    let flags = u32::from_ne_bytes(four(&header[8..12])?);
    let mut link = RawLink {
        index: u32::from_ne_bytes(four(&header[4..8])?),
        up: flags & libc::IFF_UP.cast_unsigned() != 0,
        loopback: flags & libc::IFF_LOOPBACK.cast_unsigned() != 0,
        ..RawLink::default()
    };
    for (kind, value) in attributes(body, LINK_HEADER)? {
        match kind {
            IFLA_ADDRESS => link.hardware = HardwareAddress::read(value),
            IFLA_IFNAME => link.name = text(value),
            IFLA_MASTER => link.master = Some(u32::from_ne_bytes(four(value)?)),
            IFLA_LINK => link.lower = Some(u32::from_ne_bytes(four(value)?)),
            IFLA_LINK_NETNSID => link.nsid = Some(i32::from_ne_bytes(four(value)?)),
            IFLA_TARGET_NETNSID => link.target = Some(i32::from_ne_bytes(four(value)?)),
            IFLA_XDP => link.xdp = read_xdp(value)?,
            IFLA_LINKINFO => {
                for (kind, value) in attributes(value, 0)? {
                    if kind == IFLA_INFO_KIND {
                        link.kind = text(value);
                    }
                }
            }
            _ => {}
        }
    }
    Ok(link)
}

/// The id of an interface's XDP program, if it has one (`rtnl_xdp_fill`, `net/core/rtnetlink.c`).
fn read_xdp(body: &[u8]) -> io::Result<Option<u32>> {
    let (mut attached, mut program) = (false, 0);
    for (kind, value) in attributes(body, 0)? {
        match kind {
            IFLA_XDP_ATTACHED => attached = value.first().is_some_and(|mode| *mode != 0),
            IFLA_XDP_PROG_ID => program = u32::from_ne_bytes(four(value)?),
            _ => {}
        }
    }
    Ok(attached.then_some(program))
}

/// The destination of a route, if the node delivers its packets to itself.
fn read_local_route(body: &[u8]) -> io::Result<Option<(IpAddr, u8)>> {
    let header = body
        .get(..ROUTE_HEADER)
        .ok_or_else(|| malformed("a route without a header"))?;
    let (family, length, table, kind) = (header[0], header[1], header[4], header[7]);
    if table != libc::RT_TABLE_LOCAL || !TO_NODE.contains(&kind) {
        return Ok(None);
    }
    // A default route has no attribute for its destination.
    let mut destination = if i32::from(family) == libc::AF_INET {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    } else {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    };
    for (kind, value) in attributes(body, ROUTE_HEADER)? {
        if kind == RTA_DST {
            destination = ip(value)?;
        }
    }
    Ok(Some((destination, length)))
}

/// The kernel's description of one address.
struct RawAddress {
    address: Option<IpAddr>,
    scope: u8,
    /// The namespace of the request, if it is not our own.
    target: Option<i32>,
}

fn read_any_address(body: &[u8]) -> io::Result<RawAddress> {
    let header = body
        .get(..ADDRESS_HEADER)
        .ok_or_else(|| malformed("an address without a header"))?;
    let (mut address, mut local, mut target) = (None, None, None);
    for (kind, value) in attributes(body, ADDRESS_HEADER)? {
        match kind {
            IFA_ADDRESS => address = Some(ip(value)?),
            IFA_LOCAL => local = Some(ip(value)?),
            IFA_TARGET_NETNSID => target = Some(i32::from_ne_bytes(four(value)?)),
            _ => {}
        }
    }
    Ok(RawAddress {
        // On a point-to-point link, IFA_ADDRESS is the other side's address.
        address: local.or(address),
        scope: header[3],
        target,
    })
}

/// An address of another namespace, if it is of global scope.
fn read_address(body: &[u8], nsid: i32) -> io::Result<Option<IpAddr>> {
    let read = read_any_address(body)?;
    if read.target != Some(nsid) {
        // Never mistake our own addresses for a pod's.
        return Err(malformed("addresses of another namespace"));
    }
    Ok(read
        .address
        .filter(|_| read.scope == libc::RT_SCOPE_UNIVERSE))
}

pub(super) fn ip(value: &[u8]) -> io::Result<IpAddr> {
    let v4 = <[u8; 4]>::try_from(value).map(|bytes| Ipv4Addr::from(bytes).into());
    let v6 = <[u8; 16]>::try_from(value).map(|bytes| Ipv6Addr::from(bytes).into());
    v4.or(v6)
        .map_err(|_| malformed("an address of another length"))
}

fn text(value: &[u8]) -> String {
    let end = value.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(&value[..end.unwrap_or(value.len())]).into_owned()
}
