//! Putting frames back: the only place that sends.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};

use crate::datapath::Marks;

/// Two packet sockets on no interface: one for each way.
pub(super) struct Wire {
    deliver: OwnedFd,
    bounce: OwnedFd,
}

impl Wire {
    pub(super) fn open(marks: Marks) -> Result<Self> {
        Ok(Self {
            deliver: packet_socket(marks.deliver)?,
            bounce: packet_socket(marks.bounce)?,
        })
    }

    /// Sends a frame on to the pod.
    ///
    /// # Errors
    ///
    /// When the interface is gone or down, or the kernel has no memory.
    pub(super) fn deliver(&self, ifindex: u32, frame: &[u8]) -> io::Result<()> {
        send(&self.deliver, ifindex, frame)
    }

    /// Sends a frame on as if the pod had just sent it: `to_pod` turns it round.
    ///
    /// # Errors
    ///
    /// As for [`Wire::deliver`].
    pub(super) fn bounce(&self, ifindex: u32, frame: &[u8]) -> io::Result<()> {
        send(&self.bounce, ifindex, frame)
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

#[expect(unsafe_code, reason = "no safe wrapper makes a sockaddr_ll")]
fn send(socket: &OwnedFd, ifindex: u32, frame: &[u8]) -> io::Result<()> {
    let ether_type = frame
        .get(12..14)
        .map_or(0, |bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
    // SAFETY: all bytes zero is a valid `sockaddr_ll`.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = ether_type;
    to.sll_ifindex =
        i32::try_from(ifindex).map_err(|_| io::Error::from_raw_os_error(libc::ENODEV))?;
    // SAFETY: the buffer and the address are valid for as long as the lengths say.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
