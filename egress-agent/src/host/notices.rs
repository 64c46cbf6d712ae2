//! The kernel's notices (netlink multicast): interfaces and addresses that change, their filters, and tables of
//! nf_tables.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use anyhow::{Context as _, Result};
use egress_common::ids::IfIndex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::unix::AsyncFd;

use super::Link;

/// `RTMGRP_LINK`, `include/uapi/linux/rtnetlink.h`.
const LINK_GROUP: u32 = 1;

/// `RTMGRP_IPV4_IFADDR` and `RTMGRP_IPV6_IFADDR`, of the same file.
const ADDRESS_GROUPS: u32 = 0x10 | 0x100;

/// `RTNLGRP_TC`, as a bit of the groups that are bound to.
const TC_GROUP: u32 = 1 << 3;
/// `NFNLGRP_NFTABLES`, likewise.
const RULESET_GROUP: u32 = 1 << 6;
/// The kinds of messages that report a removed table, chain or rule (`include/uapi/linux/netfilter/nf_tables.h`).
const REMOVED: [u8; 3] = [2, 5, 8];
/// Length of `struct nlmsghdr`, and where `struct tcmsg` behind it has the interface's index.
const HEADER: usize = 16;
const TC_IFINDEX: usize = HEADER + 4;
/// Where a message about nf_tables has the table's name: behind `struct nfgenmsg`, as its first attribute.
const TABLE_NAME: usize = HEADER + 8;
/// Where it has the kind of the message; the other byte of two is the subsystem.
const KIND: usize = if cfg!(target_endian = "little") { 4 } else { 5 };

/// Notices that an interface of this network namespace, or an address, has changed. A message is only a hint to look,
/// and so is a lost one (the socket's buffer was full). Interfaces that lead to other namespaces are noted, in case
/// they are gone at the next look.
pub struct LinkEvents {
    socket: AsyncFd<OwnedFd>,
    seen: Vec<Link>,
}

/// Most interfaces that are noted between two looks.
const SEEN: usize = 256;

impl LinkEvents {
    /// Opens the socket.
    ///
    /// # Errors
    ///
    /// When netlink is not available.
    pub fn open() -> Result<Self> {
        let socket = listen(LINK_GROUP | ADDRESS_GROUPS);
        Ok(Self {
            socket: socket.context("cannot listen for interfaces")?,
            seen: Vec::new(),
        })
    }

    /// Waits until an interface has changed.
    pub async fn changed(&mut self) {
        let Self { socket, seen } = self;
        receive(socket, |received| {
            for link in Link::in_notices(received.unwrap_or_default()) {
                let is_new = !seen.iter().any(|known| known.ifindex == link.ifindex);
                if link.peer.is_some() && is_new && seen.len() < SEEN {
                    seen.push(link);
                }
            }
        })
        .await;
    }

    /// The interfaces that led to other namespaces since this was asked last.
    pub fn take_seen(&mut self) -> Vec<Link> {
        std::mem::take(&mut self.seen)
    }
}

/// Notices that qdiscs or filters of interfaces have changed. The kernel does not announce changes of tcx programs.
pub struct FilterEvents(AsyncFd<OwnedFd>);

impl FilterEvents {
    /// Opens the socket.
    ///
    /// # Errors
    ///
    /// When netlink is not available.
    pub fn open() -> Result<Self> {
        listen(TC_GROUP)
            .context("cannot listen for changes of filters")
            .map(Self)
    }

    /// Waits for changes. Returns the interfaces that have some; `None` when any may have, because
    /// there were too many.
    pub async fn changed(&mut self) -> Option<Vec<IfIndex>> {
        let mut changed = Some(Vec::new());
        receive(&self.0, |received| match received {
            Some(messages) => {
                if let Some(changed) = &mut changed {
                    changed.extend(interfaces(messages));
                }
            }
            None => changed = None,
        })
        .await;
        changed
    }
}

/// Notices that a table of nf_tables, or a part of it, is gone. Without nf_tables it waits for ever.
pub struct RulesetEvents {
    socket: Option<AsyncFd<OwnedFd>>,
    /// The table's name, as the kernel's messages have it: with a zero byte at its end.
    table: Vec<u8>,
}

impl RulesetEvents {
    /// Opens the socket, for the tables of this name in all families.
    pub fn open(table: &str) -> Self {
        Self {
            socket: listen_on(SockProtocol::NetlinkNetFilter, RULESET_GROUP).ok(),
            table: terminated(table),
        }
    }

    /// Waits until a part is gone.
    pub async fn changed(&mut self) {
        let Self { socket, table } = self;
        let Some(socket) = socket else {
            return std::future::pending().await;
        };
        let mut gone = false;
        while !gone {
            receive(socket, |received| {
                // An overrun may have lost such a message.
                gone |= received.is_none_or(|messages| report_removal(messages, table));
            })
            .await;
        }
    }
}

fn terminated(table: &str) -> Vec<u8> {
    format!("{table}\0").into_bytes()
}

/// Whether one of these messages says that a part of the table is gone. A message's kind has two bytes: its
/// subsystem and its number there.
fn report_removal(messages: &[u8], table: &[u8]) -> bool {
    let mut messages = each(messages);
    messages.any(|message| {
        let is_gone = message.get(KIND).is_some_and(|kind| REMOVED.contains(kind));
        let of = message.get(TABLE_NAME..).unwrap_or_default();
        is_gone && of.starts_with(table)
    })
}

/// The interfaces that messages about qdiscs and filters name.
fn interfaces(messages: &[u8]) -> Vec<IfIndex> {
    let named = each(messages).filter_map(|message| number(message, TC_IFINDEX));
    named.map(IfIndex::new).collect()
}

/// Each of several messages, and what follows it.
fn each(mut messages: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let message = messages;
        let length = (number(message, 0)? as usize).max(HEADER);
        messages = messages
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
        Some(message)
    })
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(u32::from_ne_bytes(bytes))
}

fn listen(groups: u32) -> Result<AsyncFd<OwnedFd>> {
    listen_on(SockProtocol::NetlinkRoute, groups)
}

fn listen_on(protocol: SockProtocol, groups: u32) -> Result<AsyncFd<OwnedFd>> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        protocol,
    )
    .context("cannot open a netlink socket")?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    // SAFETY: the `OwnedFd` keeps the descriptor open, and the same, for as long as it is
    // registered.
    #[expect(unsafe_code, reason = "registering a descriptor with the runtime")]
    let socket = unsafe { AsyncFd::register(socket) }.context("cannot wait for netlink")?;
    Ok(socket)
}

/// Waits for messages, and calls `each` with all of them; with `None` for an overrun.
async fn receive(socket: &AsyncFd<OwnedFd>, mut each: impl FnMut(Option<&[u8]>)) {
    let Ok(mut ready) = socket.readable().await else {
        return std::future::pending().await;
    };
    let socket: RawFd = ready.get_inner().as_fd().as_raw_fd();
    let mut buffer = [0; 8192];
    loop {
        match recv(socket, &mut buffer, MsgFlags::empty()) {
            Ok(length) => each(buffer.get(..length)),
            Err(nix::errno::Errno::EAGAIN) => break,
            // After an overrun the socket can be read again, until nothing is left.
            Err(_) => each(None),
        }
    }
    ready.clear_ready();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_about_filters_name_their_interfaces() {
        let message = |ifindex: u32| {
            let mut bytes = vec![0; 36];
            bytes[..4].copy_from_slice(&36u32.to_ne_bytes());
            bytes[TC_IFINDEX..TC_IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
            bytes
        };
        let two = [message(3), message(70)].concat();
        assert_eq!(interfaces(&two), [3, 70].map(IfIndex::new));
        assert_eq!(interfaces(&two[..40]), [IfIndex::new(3)]);
        assert!(interfaces(&[]).is_empty());
    }

    #[test]
    fn a_table_that_is_gone_is_noticed_among_other_messages() {
        const TABLE: &str = "egress-agent";
        let message = |kind: u16, table: &str| {
            let mut bytes = vec![0; TABLE_NAME];
            bytes.extend(table.as_bytes());
            bytes.resize(64, 0);
            bytes[..4].copy_from_slice(&64u32.to_ne_bytes());
            bytes[4..6].copy_from_slice(&(10 << 8 | kind).to_ne_bytes());
            bytes
        };
        let others = [message(6, TABLE), message(2, "kube-proxy")].concat();
        assert!(!report_removal(&others, &terminated(TABLE)));
        let with_ours = [others, message(2, TABLE)].concat();
        assert!(report_removal(&with_ours, &terminated(TABLE)));
    }
}
