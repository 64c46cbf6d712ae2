//! Raw frames: sends any bytes on an interface, and captures the frames that pass it.

use std::{
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::Range,
    time::{Duration, Instant},
};

use etherparse::{
    IpFragOffset, IpNumber, Ipv4Header, Ipv6FragmentHeader, Ipv6Header, PacketBuilder,
    PacketBuilderStep, SlicedPacket, ip_number,
};
use nix::{libc, net::if_::if_nametoindex};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::{
    Namespace, Pod,
    raw::{ETHERNET, ether},
};

/// A packet socket on one interface. It sends frames, and receives the frames that pass in either direction
/// after it was opened.
#[derive(Debug)]
pub struct Tap {
    socket: Socket,
}

/// `PACKET_VNET_HDR`, `include/uapi/linux/if_packet.h`.
const PACKET_VNET_HDR: libc::c_int = 15;
/// `PACKET_IGNORE_OUTGOING`, in the same file.
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`, `include/uapi/linux/virtio_net.h`.
const VIRTIO_NEEDS_CSUM: u8 = 1;

/// The longest packet, with all headers before it.
const LONGEST: usize = 65_535 + 64;

impl Tap {
    /// Opens a packet socket on `interface` of `namespace`.
    #[track_caller]
    pub fn open(namespace: &Namespace, interface: &str) -> Self {
        let opened = namespace.run(|| -> io::Result<Socket> {
            let every = u16::try_from(libc::ETH_P_ALL)
                .expect("an EtherType has 16 bits")
                .to_be();
            let socket = Socket::new(
                Domain::PACKET,
                Type::RAW,
                Some(Protocol::from(i32::from(every))),
            )?;
            socket.bind(&packet_address(if_nametoindex(interface)?, every)?)?;
            Ok(socket)
        });
        let socket = opened.unwrap_or_else(|e| panic!("open a packet socket on {interface}: {e}"));
        Self { socket }
    }

    /// From now on, each frame is sent with a header that says where the kernel writes its checksum
    /// (`PACKET_VNET_HDR`, packet(7)); see [`Self::send_with_checksum_at`].
    #[track_caller]
    pub fn expect_offsets(&self) {
        self.switch_on(PACKET_VNET_HDR);
    }

    /// From now on, frames that leave through the interface are not received.
    #[track_caller]
    pub(crate) fn ignore_outgoing(&self) {
        self.switch_on(PACKET_IGNORE_OUTGOING);
    }

    #[track_caller]
    fn switch_on(&self, option: libc::c_int) {
        let on: libc::c_int = 1;
        // SAFETY: the option takes an int, which pointer and length describe.
        let failed = unsafe {
            libc::setsockopt(
                std::os::fd::AsRawFd::as_raw_fd(&self.socket),
                libc::SOL_PACKET,
                option,
                (&raw const on).cast(),
                size_of_val(&on).try_into().unwrap_or_default(),
            )
        };
        assert_eq!(failed, 0, "{}", io::Error::last_os_error());
    }

    /// Sends a frame whose checksum the kernel computes from `start` on, and writes `offset` bytes after
    /// `start`.
    #[track_caller]
    pub fn send_with_checksum_at(&self, frame: &[u8], start: u16, offset: u16) {
        // struct virtio_net_hdr, include/uapi/linux/virtio_net.h.
        let mut bytes = vec![VIRTIO_NEEDS_CSUM, 0, 0, 0, 0, 0];
        bytes.extend(start.to_ne_bytes());
        bytes.extend(offset.to_ne_bytes());
        bytes.extend(frame);
        self.send(&bytes);
    }

    /// Sends a frame, from its Ethernet header on.
    #[track_caller]
    pub fn send(&self, frame: &[u8]) {
        let sent = self.socket.send(frame).expect("send a frame");
        assert_eq!(sent, frame.len(), "a frame was sent in part");
    }

    /// Sends a frame that a program on the same interface may take or drop, in which case the kernel reports
    /// ENOBUFS.
    #[track_caller]
    pub fn offer(&self, frame: &[u8]) {
        match self.socket.send(frame) {
            Ok(sent) => assert_eq!(sent, frame.len(), "a frame was sent in part"),
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENOBUFS), "send a frame: {e}"),
        }
    }

    /// The next frame that satisfies `is`; `None` when none passes in time.
    pub fn receive(&self, timeout: Duration, is: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let deadline = Instant::now() + timeout;
        let mut buffer = vec![0; LONGEST];
        loop {
            let left = deadline
                .checked_duration_since(Instant::now())
                .filter(|d| !d.is_zero())?;
            self.socket
                .set_read_timeout(Some(left))
                .expect("a time-out that is not zero");
            match (&self.socket).read(&mut buffer) {
                Ok(length) if is(&buffer[..length]) => {
                    buffer.truncate(length);
                    return Some(buffer);
                }
                Ok(_) => (),
                Err(_) => return None,
            }
        }
    }
}

/// An address for bind(2); `protocol` in network byte order.
fn packet_address(interface: u32, protocol: u16) -> io::Result<SockAddr> {
    // SAFETY: the storage is zeroed, large and aligned enough for every address family, and all
    // of a sockaddr_ll that bind(2) reads is written before the length says that it is there.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let link = storage.cast::<libc::sockaddr_ll>();
            (*link).sll_family = u16::try_from(libc::AF_PACKET).unwrap_or_default();
            (*link).sll_protocol = protocol;
            (*link).sll_ifindex = interface.cast_signed();
            *length = size_of::<libc::sockaddr_ll>()
                .try_into()
                .unwrap_or_default();
            Ok(())
        })
    }?;
    Ok(address)
}

/// Starts a frame from the pod to the node, with these addresses.
#[track_caller]
pub fn from_pod(pod: &Pod, src: IpAddr, dst: IpAddr) -> PacketBuilderStep<etherparse::IpHeaders> {
    let ethernet = PacketBuilder::ethernet2(pod.hardware(), pod.gateway_hardware());
    ip(ethernet, src, dst)
}

#[track_caller]
fn ip(
    ethernet: PacketBuilderStep<etherparse::Ethernet2Header>,
    src: IpAddr,
    dst: IpAddr,
) -> PacketBuilderStep<etherparse::IpHeaders> {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => ethernet.ip(etherparse::IpHeaders::Ipv4(
            ipv4_header(src, dst),
            etherparse::Ipv4Extensions::default(),
        )),
        (IpAddr::V6(src), IpAddr::V6(dst)) => ethernet.ip(etherparse::IpHeaders::Ipv6(
            ipv6_header(src, dst),
            etherparse::Ipv6Extensions::default(),
        )),
        _ => panic!("{src} and {dst} are not of one family"),
    }
}

const HOPS: u8 = 64;

/// An IPv4 header; the builder of a frame fills in lengths and checksum.
pub fn ipv4_header(src: Ipv4Addr, dst: Ipv4Addr) -> etherparse::Ipv4Header {
    etherparse::Ipv4Header {
        time_to_live: HOPS,
        source: src.octets(),
        destination: dst.octets(),
        ..etherparse::Ipv4Header::default()
    }
}

/// An IPv6 header; the builder of a frame fills in the lengths.
pub fn ipv6_header(src: Ipv6Addr, dst: Ipv6Addr) -> etherparse::Ipv6Header {
    etherparse::Ipv6Header {
        hop_limit: HOPS,
        source: src.octets(),
        destination: dst.octets(),
        ..etherparse::Ipv6Header::default()
    }
}

/// A UDP datagram from the pod, unfragmented.
#[track_caller]
pub fn udp(pod: &Pod, src: (IpAddr, u16), dst: (IpAddr, u16), payload: &[u8]) -> Vec<u8> {
    build(from_pod(pod, src.0, dst.0).udp(src.1, dst.1), payload)
}

/// A UDP datagram to the pod, unfragmented, as the node's end of its interface sends it.
#[track_caller]
pub fn udp_to(pod: &Pod, src: (IpAddr, u16), dst: (IpAddr, u16), payload: &[u8]) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(pod.gateway_hardware(), pod.hardware());
    build(ip(ethernet, src.0, dst.0).udp(src.1, dst.1), payload)
}

/// A TCP SYN from the pod.
#[track_caller]
pub fn syn(pod: &Pod, src: (IpAddr, u16), dst: (IpAddr, u16)) -> Vec<u8> {
    let builder = from_pod(pod, src.0, dst.0)
        .tcp(src.1, dst.1, 1, 64_240)
        .syn();
    let mut frame = Vec::new();
    builder
        .write(&mut frame, &[])
        .expect("a frame can be built");
    frame
}

#[track_caller]
fn build(builder: PacketBuilderStep<etherparse::UdpHeader>, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    builder
        .write(&mut frame, payload)
        .expect("a frame can be built");
    frame
}

/// A fragment of a frame with an unfragmented IP packet: these bytes of the data after its IP header. The
/// last fragment ends where the packet does.
#[track_caller]
pub fn fragment(frame: &[u8], id: u16, bytes: Range<usize>) -> Vec<u8> {
    let (ethernet, packet) = frame.split_at(ETHERNET);
    let offset = u16::try_from(bytes.start / 8).expect("an offset of 13 bits");
    let offset = IpFragOffset::try_new(offset).expect("an offset of 13 bits");
    let mut fragment = ethernet.to_vec();
    let written = if let Ok((mut header, payload)) = Ipv4Header::from_slice(packet) {
        let content = &payload[bytes.clone()];
        header.identification = id;
        header.dont_fragment = false;
        header.more_fragments = bytes.end < payload.len();
        header.fragment_offset = offset;
        header
            .set_payload_len(content.len())
            .expect("a part is shorter than the whole");
        header.header_checksum = header.calc_header_checksum();
        header
            .write_raw(&mut fragment)
            .map(|()| fragment.extend(content))
    } else {
        let (mut header, payload) = Ipv6Header::from_slice(packet).expect("an IP packet");
        let content = &payload[bytes.clone()];
        let more = bytes.end < payload.len();
        let next = header.next_header;
        header.next_header = ip_number::IPV6_FRAGMENTATION_HEADER;
        header
            .set_payload_length(8 + content.len())
            .expect("a part is shorter than the whole");
        header
            .write(&mut fragment)
            .and_then(|()| {
                Ipv6FragmentHeader::new(next, offset, more, id.into()).write(&mut fragment)
            })
            .map(|()| fragment.extend(content))
    };
    written.expect("writing to memory");
    fragment
}

/// All fragments of a frame with an unfragmented IP packet, of this many bytes each.
#[track_caller]
pub fn fragments(frame: &[u8], id: u16, bytes: usize) -> Vec<Vec<u8>> {
    let header = if frame[12..14] == ether::IPV4.to_be_bytes() {
        20
    } else {
        40
    };
    let end = frame.len() - ETHERNET - header;
    (0..end)
        .step_by(bytes)
        .map(|start| fragment(frame, id, start..end.min(start + bytes)))
        .collect()
}

/// An SCTP INIT chunk from the pod (RFC 9260, section 3.3.2), with a zero checksum.
#[track_caller]
pub fn sctp_init(pod: &Pod, dst: (IpAddr, u16), src_port: u16) -> Vec<u8> {
    let mut chunk = Vec::new();
    chunk.extend(src_port.to_be_bytes());
    chunk.extend(dst.1.to_be_bytes());
    chunk.extend([0; 8]); // verification tag, checksum
    chunk.extend([1, 0, 0, 20]); // INIT, no flags, length
    chunk.extend([0, 0, 0, 1, 0, 0, 0xff, 0xff, 0, 1, 0, 1, 0, 0, 0, 1]);
    let mut frame = Vec::new();
    from_pod(pod, pod.address_for(dst.0), dst.0)
        .write(&mut frame, ip_number::SCTP, &chunk)
        .expect("a frame can be built");
    frame
}

/// True if the frame is an IP packet between these addresses, of this protocol.
pub fn is(frame: &[u8], src: IpAddr, dst: IpAddr, protocol: IpNumber) -> bool {
    let Ok(packet) = SlicedPacket::from_ethernet(frame) else {
        return false;
    };
    match packet.net {
        Some(etherparse::NetSlice::Ipv4(ip)) => {
            let header = ip.header();
            IpAddr::V4(header.source_addr()) == src
                && IpAddr::V4(header.destination_addr()) == dst
                && header.protocol() == protocol
        }
        Some(etherparse::NetSlice::Ipv6(ip)) => {
            let header = ip.header();
            IpAddr::V6(header.source_addr()) == src
                && IpAddr::V6(header.destination_addr()) == dst
                && ip.payload().ip_number == protocol
        }
        _ => false,
    }
}
