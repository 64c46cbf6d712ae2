//! Reads a socket buffer.
//!
//! A frame has a linear part in memory that the kernel owns. It may also have fragments: pages of other
//! owners. A program that has spliced a page into a socket (vmsplice(2)), or that maps the ring of its packet
//! socket (`PACKET_TX_RING`), can still write to such a page. The bytes there may change between the verdict
//! and the sending. So the verdict reads only the linear part, and has the headers copied into it.

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_ktime_get_boot_ns, bpf_ktime_get_coarse_ns},
    programs::TcContext,
};
use egress_common::{
    ids::{IfIndex, PolicyId},
    limits::{COPIED_HEADER_BYTES, HEADER_BYTES},
    packet::{ETHER_IPV4, ETHER_IPV6, ETHERNET_LEN, Frame, Packet, ether_type},
    protocol,
    records::Flow,
};

use crate::maps::COARSE_CLOCK;

/// `PACKET_LOOPBACK` of `include/uapi/linux/if_packet.h`.
const PACKET_LOOPBACK: u32 = 5;

/// The frame for which a program was called.
pub struct Skb<'a>(pub &'a TcContext);

impl Skb<'_> {
    /// `skb->mark`.
    #[inline(always)]
    pub fn mark(&self) -> u32 {
        // SAFETY: the context pointer is valid while the program runs.
        unsafe { (*self.0.skb.skb).mark }
    }

    /// Sets `skb->priority`. A veth sets it to 0 when a frame crosses it (`____dev_forward_skb`,
    /// include/linux/netdevice.h), so a pod cannot send a frame with the stamp.
    #[inline(always)]
    pub fn stamp(&self, stamp: u32) {
        // SAFETY: as above; the kernel lets programs of this type write the field.
        unsafe { (*self.0.skb.skb).priority = stamp };
    }

    /// Whether this is the copy of a multicast or broadcast frame that the node's own IP stack gives itself
    /// (`dev_loopback_xmit`, net/core/dev.c). Such a copy has no Ethernet header.
    ///
    /// A pod cannot make such a frame, whatever type its frame has in the pod. A veth and a netkit device reset
    /// the type (`skb_scrub_packet`, net/core/skbuff.c) and choose it anew by the destination's hardware address
    /// (`eth_skb_pkt_type`, include/linux/etherdevice.h). A tap device makes a new frame.
    #[inline(always)]
    pub fn is_looped_back(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).pkt_type == PACKET_LOOPBACK }
    }

    /// The index of the interface whose hook called the program.
    #[inline(always)]
    pub fn ifindex(&self) -> IfIndex {
        // SAFETY: as above.
        IfIndex::new(unsafe { (*self.0.skb.skb).ifindex })
    }

    /// The index of the interface on which the node received the frame; 0 if the node created it.
    #[inline(always)]
    pub fn ingress_ifindex(&self) -> IfIndex {
        // SAFETY: as above.
        IfIndex::new(unsafe { (*self.0.skb.skb).ingress_ifindex })
    }

    /// The frame's EtherType, in network byte order.
    #[inline(always)]
    pub fn protocol(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).protocol }
    }

    /// Makes the kernel's verifier forget by which path through the header walk the fields of a packet were
    /// set. Otherwise it would follow the code behind the walk once for each path; now it follows it once,
    /// with fields that may have any value.
    #[inline(always)]
    pub fn forget_path(&self, packet: &mut Packet) {
        let zero = self.zero();
        let (byte, half) = ((zero * 0xff) as u8, (zero * 0xffff) as u16);
        packet.src_port ^= half;
        packet.dst_port ^= half;
        packet.l4_offset ^= u32::from(half);
        packet.protocol ^= byte;
        packet.bit ^= byte;
        packet.tcp_flags ^= byte;
        packet.icmp_type ^= byte;
        packet.icmp_code ^= byte;
        packet.hop_limit ^= byte;
        packet.version ^= byte;
    }

    /// Makes the verifier forget what it knows about a flow, as [`Self::forget_path`] does for a packet.
    #[inline(always)]
    pub fn forget_flow(&self, flow: &mut Flow) {
        let zero = self.zero();
        let (byte, half) = ((zero * 0xff) as u8, (zero * 0xffff) as u16);
        flow.set_policy(PolicyId::new(flow.policy().get() ^ zero));
        flow.handshake ^= half;
        flow.state ^= byte;
        flow.seen ^= byte;
    }

    /// Makes the verifier forget the value of a number.
    #[inline(always)]
    pub fn forget_number(&self, number: u32) -> u32 {
        number ^ (self.zero() * 0xff)
    }

    /// Zero, because no frame is that long; the verifier only knows that a length has 32 bits.
    #[inline(always)]
    fn zero(&self) -> u32 {
        core::hint::black_box(Frame::len(self) >> 31)
    }

    /// Makes sure that the frame's headers are in its linear part; returns whether they may be read. Must be
    /// called before a header walk.
    ///
    /// The senders of aggregates put the headers there (TSO, `UDP_SEGMENT`, GRO). The headers of an aggregate
    /// are not copied: some kernels cannot segment an aggregate of which a part was moved (CVE-2024-49978).
    #[inline(always)]
    pub fn own_headers(&self) -> bool {
        let len = Frame::len(self);
        let wanted = if len < HEADER_BYTES {
            len
        } else {
            HEADER_BYTES
        };
        if self.linear_len() >= wanted || self.is_aggregate() || has_tcp_header(&Linear(self)) {
            return true;
        }
        let copied = if len < COPIED_HEADER_BYTES {
            len
        } else {
            COPIED_HEADER_BYTES
        };
        // `bpf_skb_pull_data` (net/core/filter.c) copies the bytes that it moves into the linear part.
        self.0.pull_data(copied).is_ok()
    }

    /// Makes sure that the whole frame is in its linear part. The frame is no aggregate.
    #[inline(always)]
    pub fn own_frame(&self) -> bool {
        let len = Frame::len(self);
        self.linear_len() >= len || self.0.pull_data(len).is_ok()
    }

    /// The length of the linear part.
    #[inline(always)]
    fn linear_len(&self) -> u32 {
        (self.0.data_end() - self.0.data()) as u32
    }

    /// The context as helpers expect it.
    #[inline(always)]
    pub fn as_ptr(&self) -> *mut core::ffi::c_void {
        self.0.as_ptr()
    }
}

impl Frame for Skb<'_> {
    #[inline(always)]
    fn len(&self) -> u32 {
        self.0.len()
    }

    /// Reads the linear part only; see [`Skb::own_headers`].
    #[inline(always)]
    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        // The offset becomes all ones if the linear part is too short: no helper reads there. A comparison
        // would add a path for the verifier at every read.
        let room = u64::from(core::hint::black_box(self.linear_len()));
        let lacks = room.wrapping_sub(u64::from(offset) + N as u64) >> 63;
        let beyond = (lacks as u32).wrapping_neg();
        let at = core::hint::black_box(offset | beyond);
        self.0.load::<[u8; N]>(at as usize).ok()
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).vlan_present != 0 }
    }

    #[inline(always)]
    fn is_aggregate(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).gso_size != 0 }
    }
}

/// Nanoseconds of `CLOCK_BOOTTIME`.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: the helper takes no arguments.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// The same frame, read in place instead of through a helper: only its linear part, and only at constant
/// offsets.
pub struct Linear<'a>(pub &'a Skb<'a>);

impl Frame for Linear<'_> {
    #[inline(always)]
    fn len(&self) -> u32 {
        self.0.len()
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let context = self.0.0;
        let start = context.data() + offset as usize;
        if start + N > context.data_end() {
            return None;
        }
        // SAFETY: the kernel keeps everything before `data_end` in place until a helper moves it, and its
        // verifier requires the comparison above.
        Some(unsafe { (start as *const [u8; N]).read_unaligned() })
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        self.0.is_tagged()
    }

    #[inline(always)]
    fn is_aggregate(&self) -> bool {
        self.0.is_aggregate()
    }
}

/// Whether the linear part has all bytes that a walk reads of a TCP segment without IP options or extension
/// headers. Most segments have their payload elsewhere; then no bytes have to be copied.
#[inline(always)]
fn has_tcp_header(frame: &Linear<'_>) -> bool {
    match ether_type(frame) {
        ETHER_IPV4 => {
            frame.read::<1>(ETHERNET_LEN) == Some([0x45])
                && frame.read::<1>(ETHERNET_LEN + 9) == Some([protocol::TCP])
                && frame.read::<20>(ETHERNET_LEN + 20).is_some()
        }
        ETHER_IPV6 => {
            frame.read::<1>(ETHERNET_LEN + 6) == Some([protocol::TCP])
                && frame.read::<20>(ETHERNET_LEN + 40).is_some()
        }
        _ => false,
    }
}

/// Nanoseconds of `CLOCK_MONOTONIC` at the last tick, at a tenth of the cost. They are behind [`now_ns`] by
/// the time for which the machine was suspended. Below kernel 5.11 the same as [`now_ns`].
#[inline(always)]
pub fn last_tick_ns() -> u64 {
    if COARSE_CLOCK.load() == 0 {
        return now_ns();
    }
    // SAFETY: the helper takes no arguments.
    unsafe { bpf_ktime_get_coarse_ns() }
}
