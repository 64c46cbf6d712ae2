//! The sockets that frames are sent on.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    thread,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};

/// What one interface may have on its way, in bytes of the kernel's memory: the kernel takes twice the
/// number (socket(7), `SO_SNDBUF`). An ordinary receiver takes a frame before the next is sent, so this is
/// room for what waits in the queue of a busy CPU.
const SEND_BUFFER: usize = 128 << 10;

/// Threads that close sockets at the same time. Each waits for an RCU grace period for each of its
/// sockets (`packet_release` in the kernel); those who wait together wait for the same one.
const CLOSERS: usize = 64;

/// A packet socket on no interface; with protocol 0 it receives nothing (packet(7)).
pub(super) struct Socket(OwnedFd);

impl Socket {
    /// # Errors
    ///
    /// When it cannot be made; says which privilege that needs.
    pub(super) fn open() -> Result<Self> {
        Self::open_quietly()
            .context("cannot open a packet socket; the agent needs CAP_NET_RAW and CAP_NET_ADMIN")
    }

    /// The same without advice.
    pub(super) fn open_quietly() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        // Whatever the node's defaults are (net.core.wmem_default, wmem_max).
        setsockopt(&socket, sockopt::SndBufForce, &SEND_BUFFER)?;
        Ok(Self(socket))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Closes sockets, and waits until they are closed.
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
            // What no thread can be started for is closed here.
            let _ = thread::Builder::new()
                .name("closer".into())
                .spawn_scoped(scope, move || drop(share));
        }
    });
}
