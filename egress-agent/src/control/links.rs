//! Noticing interfaces that come and go.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use anyhow::{Context as _, Result};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::unix::AsyncFd;

/// `RTMGRP_LINK`, `include/uapi/linux/rtnetlink.h`.
const LINK_GROUP: u32 = 1;

/// Notices that some interface of this network namespace has changed. What changed is not read:
/// the message is a hint, and a lost one (the socket's buffer was full) is one too.
pub(super) struct LinkEvents(AsyncFd<OwnedFd>);

impl LinkEvents {
    pub(super) fn open() -> Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkRoute,
        )
        .context("cannot open a netlink socket")?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, LINK_GROUP))
            .context("cannot listen for interfaces")?;
        // SAFETY: the `OwnedFd` keeps the descriptor open, and the same, for as long as it is
        // registered.
        #[expect(unsafe_code, reason = "registering a descriptor with the runtime")]
        let socket = unsafe { AsyncFd::register(socket) }.context("cannot wait for netlink")?;
        Ok(Self(socket))
    }

    /// Waits until an interface has changed.
    pub(super) async fn changed(&mut self) {
        let Ok(mut ready) = self.0.readable().await else {
            return std::future::pending().await;
        };
        let socket: RawFd = ready.get_inner().as_fd().as_raw_fd();
        let mut buffer = [0; 8192];
        // An overrun is an event too; the next error is that there is no more to read.
        while !matches!(
            recv(socket, &mut buffer, MsgFlags::empty()),
            Err(nix::errno::Errno::EAGAIN)
        ) {}
        ready.clear_ready();
    }
}
