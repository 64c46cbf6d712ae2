//! Netlink exchanges with the kernel: one request and its replies.

use std::io;

use rtnetlink::{
    packet_core::{
        NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NlasIterator,
    },
    sys::{Socket, SocketAddr},
};

/// Set in a reply if the list changed during the dump.
const NLM_F_DUMP_INTR: u16 = 0x10;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// The kernel fills at most this much at a time (`netlink_dump`, `net/netlink/af_netlink.c`).
const BUFFER: usize = 32 * 1024;

/// A socket of the network namespace of the thread that opened it.
pub(super) struct Transport {
    protocol: isize,
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Transport {
    /// Opens a socket of a netlink protocol (`NETLINK_ROUTE` and others).
    ///
    /// # Errors
    ///
    /// When the kernel does not know the protocol.
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            protocol,
            socket,
            sequence: 0,
            buffer: Vec::with_capacity(BUFFER),
        })
    }

    /// Has the kernel reject requests that it does not understand in full.
    ///
    /// # Errors
    ///
    /// When the kernel does not know the option (before 4.20).
    pub(super) fn be_strict(&mut self) -> io::Result<()> {
        self.socket.set_netlink_get_strict_chk(true)
    }

    /// Abandons a dump that has not ended. The kernel starts no other dump on the same socket before, so this
    /// opens a new socket.
    ///
    /// # Errors
    ///
    /// When a new socket cannot be opened.
    pub(super) fn reopen(&mut self) -> io::Result<()> {
        *self = Self::open(self.protocol)?;
        Ok(())
    }

    /// Sends a request of this type and passes the body of each reply to `reply`. Returns whether a list is
    /// complete: it is not if it changed during the dump.
    ///
    /// # Errors
    ///
    /// Those of the kernel, of `reply`, and of replies that cannot be read.
    pub(super) fn exchange(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut reply: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = Vec::with_capacity(HEADER + body.len());
        request.extend(((HEADER + body.len()) as u32).to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        request.extend(self.sequence.to_ne_bytes());
        request.extend([0; 4]);
        request.extend(body);
        self.socket.send(&request, 0)?;
        let mut whole = true;
        loop {
            self.buffer.clear();
            let length = self.socket.recv(&mut self.buffer, libc::MSG_TRUNC)?;
            let Some(mut rest) = self.buffer.get(..length) else {
                return Err(malformed("a message longer than any should be"));
            };
            while !rest.is_empty() {
                let message = NetlinkBuffer::new_checked(rest)
                    .map_err(|_| malformed("a message cut short"))?;
                let next = (message.length() as usize).next_multiple_of(4);
                rest = rest.get(next..).unwrap_or_default();
                if message.sequence_number() != self.sequence {
                    // A reply of an exchange that was abandoned.
                    continue;
                }
                whole &= message.flags() & NLM_F_DUMP_INTR == 0;
                match message.message_type() {
                    NLMSG_DONE | NLMSG_ERROR => {
                        let code = message.payload().get(..4).unwrap_or_default();
                        return match i32::from_ne_bytes(four(code)?) {
                            0 => Ok(whole),
                            code => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
                        };
                    }
                    _ => reply(message.payload())?,
                }
                if flags & NLM_F_DUMP == 0 {
                    return Ok(true);
                }
            }
        }
    }
}

/// Kind and value of each attribute after the header.
pub(super) fn attributes(body: &[u8], header: usize) -> io::Result<Vec<(u16, &[u8])>> {
    let body = body
        .get(header..)
        .ok_or_else(|| malformed("a message without a header"))?;
    let mut found = Vec::new();
    let mut at = 0;
    for attribute in NlasIterator::new(body) {
        let attribute = attribute.map_err(|_| malformed("an attribute cut short"))?;
        let length = attribute.length() as usize;
        found.push((attribute.kind(), &body[at + 4..at + length]));
        at += length.next_multiple_of(4);
    }
    Ok(found)
}

pub(super) fn four(value: &[u8]) -> io::Result<[u8; 4]> {
    value
        .try_into()
        .map_err(|_| malformed("a number of another size"))
}

pub(super) fn malformed(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the kernel's netlink reply contains {what}"),
    )
}
