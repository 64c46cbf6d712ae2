//! Putting frames back: the only place that sends.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    ptr,
    sync::Arc,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};

use super::Stats;
use crate::datapath::Marks;

/// Most frames that one system call sends.
const BATCH: usize = 32;

/// Packet sockets on no interface, one for each way, and what waits to go out on them.
///
/// Frames are sent together: each one sent alone wakes its receiver, which on a busy CPU takes the
/// gate's place before the next message is decided.
pub(super) struct Wire {
    deliver: Way,
    bounce: Way,
    again: Way,
    probe: OwnedFd,
    stats: Arc<Stats>,
}

impl Wire {
    pub(super) fn open(marks: Marks, stats: Arc<Stats>) -> Result<Self> {
        Ok(Self {
            stats,
            deliver: Way::new(packet_socket(marks.deliver)?),
            bounce: Way::new(packet_socket(marks.bounce)?),
            again: Way::new(packet_socket(marks.again)?),
            probe: packet_socket(marks.probe)?,
        })
    }

    /// A frame to be sent on to the pod. What is returned is what will be sent.
    pub(super) fn deliver(&mut self, ifindex: u32, frame: &[u8]) -> &mut [u8] {
        self.deliver.add(ifindex, frame)
    }

    /// A frame to be sent on as if the pod had just sent it: `to_pod` turns it round. What is
    /// returned is what will be sent.
    pub(super) fn bounce(&mut self, ifindex: u32, frame: &[u8]) -> &mut [u8] {
        self.bounce.add(ifindex, frame)
    }

    /// A frame that the pod sent and that is to be judged now, as if it had just sent it.
    pub(super) fn again(&mut self, ifindex: u32, frame: &[u8]) {
        self.again.add(ifindex, frame);
    }

    /// Sends a frame that is to be counted, at once.
    ///
    /// # Errors
    ///
    /// When it cannot be sent: the interface has gone, or is down.
    pub(super) fn probe(&self, ifindex: u32, frame: &[u8]) -> io::Result<()> {
        send_some(&self.probe, &[(ifindex, frame)]).map(drop)
    }

    /// How many decided frames wait to go out.
    pub(super) fn frames(&self) -> usize {
        self.deliver.frames.len() + self.bounce.frames.len()
    }

    /// Sends everything.
    pub(super) fn send(&mut self) {
        let unsent = self.bounce.send() + self.deliver.send() + self.again.send();
        if unsent > 0 {
            self.stats.unsent.add(unsent);
        }
    }
}

/// A socket and the frames that wait to go out on it, one behind the other.
struct Way {
    socket: OwnedFd,
    bytes: Vec<u8>,
    frames: Vec<Waiting>,
}

struct Waiting {
    ifindex: u32,
    ends_at: usize,
}

impl Way {
    fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            bytes: Vec::new(),
            frames: Vec::new(),
        }
    }

    fn add(&mut self, ifindex: u32, frame: &[u8]) -> &mut [u8] {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(frame);
        self.frames.push(Waiting {
            ifindex,
            ends_at: self.bytes.len(),
        });
        &mut self.bytes[start..]
    }

    /// Returns how many frames could not be sent.
    fn send(&mut self) -> u64 {
        let Self {
            socket,
            bytes,
            frames,
        } = self;
        let mut start = 0;
        let mut waiting: Vec<(u32, &[u8])> = Vec::with_capacity(frames.len());
        for frame in &*frames {
            waiting.push((frame.ifindex, &bytes[start..frame.ends_at]));
            start = frame.ends_at;
        }
        let mut unsent = 0;
        let mut rest = waiting.as_slice();
        while let Some(((ifindex, _), behind)) = rest.split_first() {
            match send_some(socket, rest) {
                Ok(sent) => rest = &rest[sent..],
                Err(error) => {
                    // The interface has gone, or the kernel has no memory: to the pod the message
                    // is lost as any datagram may be, and it asks again.
                    tracing::warn!(ifindex, %error, "frame could not be put back");
                    unsent += 1;
                    rest = behind;
                }
            }
        }
        bytes.clear();
        frames.clear();
        unsent
    }
}

/// A packet socket with a mark; with protocol 0 it receives nothing (packet(7)).
fn packet_socket(mark: u32) -> Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )
    .context("cannot open a packet socket; the agent needs CAP_NET_RAW")?;
    setsockopt(&socket, sockopt::Mark, &mark)
        .context("cannot mark a packet socket; the agent needs CAP_NET_ADMIN")?;
    Ok(socket)
}

/// Sends frames, each on its interface, until one fails; returns how many went out, at least one.
///
/// # Errors
///
/// When the first one fails.
#[expect(unsafe_code, reason = "no safe wrapper takes a sockaddr_ll")]
fn send_some(socket: &OwnedFd, frames: &[(u32, &[u8])]) -> io::Result<usize> {
    let frames = frames.get(..BATCH).unwrap_or(frames);
    let mut parts: Vec<(libc::sockaddr_ll, libc::iovec)> = frames
        .iter()
        .map(|&(ifindex, frame)| {
            let part = libc::iovec {
                iov_base: frame.as_ptr().cast_mut().cast(),
                iov_len: frame.len(),
            };
            (address(ifindex, frame), part)
        })
        .collect();
    let mut messages: Vec<libc::mmsghdr> = parts
        .iter_mut()
        .map(|(to, part)| {
            // SAFETY: all bytes zero is a valid `mmsghdr`.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            message.msg_hdr.msg_name = ptr::from_mut(to).cast();
            message.msg_hdr.msg_namelen = ADDRESS_LEN;
            message.msg_hdr.msg_iov = part;
            message.msg_hdr.msg_iovlen = 1;
            message
        })
        .collect();
    // SAFETY: each message points to an address and a part that live until the call returns, and
    // each part to a frame, which the kernel only reads.
    let sent = unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            messages.len() as u32,
            0,
        )
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

const ADDRESS_LEN: u32 = size_of::<libc::sockaddr_ll>() as u32;

/// Where a frame goes, with its `EtherType`.
#[expect(unsafe_code, reason = "no safe wrapper makes a sockaddr_ll")]
fn address(ifindex: u32, frame: &[u8]) -> libc::sockaddr_ll {
    // SAFETY: all bytes zero is a valid `sockaddr_ll`.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = frame
        .get(12..14)
        .map_or(0, |bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
    // What does not fit is no interface's, and the kernel says so.
    to.sll_ifindex = ifindex.cast_signed();
    to
}
