//! The sockets that frames are sent on.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    thread,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};

/// The most kernel memory, in bytes, of one interface's frames in flight; the kernel doubles the number
/// (socket(7), `SO_SNDBUF`). An ordinary receiver takes a frame before the next is sent, so this is room for
/// the queue of a busy CPU.
const SEND_BUFFER: usize = 128 << 10;

/// The number of threads that close sockets. Each waits for an RCU grace period for each of its sockets
/// (`packet_release` in the kernel); threads that wait at the same time wait for the same period.
const CLOSERS: usize = 64;

/// A packet socket that is bound to no interface; with protocol 0 it receives nothing (packet(7)).
pub(super) struct Socket(OwnedFd);

impl Socket {
    /// # Errors
    ///
    /// When it cannot be opened; the error names the necessary capabilities.
    pub(super) fn open() -> Result<Self> {
        Self::open_quietly()
            .context("cannot open a packet socket; the agent needs CAP_NET_RAW and CAP_NET_ADMIN")
    }

    /// The same without the advice in the error.
    pub(super) fn open_quietly() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        // Independent of the node's defaults (net.core.wmem_default, wmem_max).
        setsockopt(&socket, sockopt::SndBufForce, &SEND_BUFFER)?;
        Ok(Self(socket))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Closes sockets, and returns when they are closed.
pub(super) fn close_all(sockets: impl Iterator<Item = Socket>) {
    let mut shares: Vec<Vec<Socket>> = Vec::new();
    for (i, socket) in sockets.enumerate() {
        match shares.get_mut(i % CLOSERS) {
            Some(share) => share.push(socket),
            None => shares.push(vec![socket]),
        }
    }
    thread::scope(|scope| {
        for share in shares {
            // If no thread can be started, this thread closes the sockets.
            let _ = thread::Builder::new()
                .name("closer".into())
                .spawn_scoped(scope, move || drop(share));
        }
    });
}
