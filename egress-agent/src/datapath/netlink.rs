//! Netlink exchanges with the kernel: requests are written, and replies are read, attribute by attribute.

use std::{io, time::Duration};

use nix::sys::{
    socket::{setsockopt, sockopt::ReceiveTimeout},
    time::TimeVal,
};
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST},
    sys::{Socket, SocketAddr},
};

/// The kernel fills at most this much at a time (`netlink_dump`, `net/netlink/af_netlink.c`).
const BUFFER: usize = 32 * 1024;
/// Length of `struct nlmsghdr`, `include/uapi/linux/netlink.h`.
const HEADER: usize = 16;
/// Kinds of messages, of the same file.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// The bits of an attribute's kind that are not flags (`NLA_TYPE_MASK`).
const KIND_MASK: u16 = 0x3fff;
/// `NLA_F_NESTED`.
pub(super) const NESTED: u16 = 0x8000;

/// A socket of the network namespace of the thread that opened it.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: Vec::with_capacity(BUFFER),
        })
    }

    /// Limits how long to wait for a reply.
    pub(super) fn set_patience(&mut self, patience: Duration) -> io::Result<()> {
        let patience = TimeVal::new(patience.as_secs().cast_signed(), 0);
        Ok(setsockopt(&self.socket, ReceiveTimeout, &patience)?)
    }

    /// Sends a request and passes the body of each reply to `reply`. Returns whether a list is complete: it
    /// is not if it changed during the dump.
    pub(super) fn exchange(
        &mut self,
        request: Request,
        flags: u16,
        reply: impl FnMut(&[u8]),
    ) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        // In a request that adds an object, one of the two bits has another meaning (`NLM_F_EXCL`).
        let dump = flags & NLM_F_DUMP == NLM_F_DUMP;
        let flags = flags | NLM_F_REQUEST | if dump { 0 } else { NLM_F_ACK };
        self.socket.send(&request.finish(flags, self.sequence), 0)?;
        self.receive(self.sequence, reply)
    }

    /// Sends requests, each with its flags, that the kernel executes together or not at all. The kernel
    /// acknowledges the last of `requests`; `end` follows it.
    pub(super) fn transact(
        &mut self,
        requests: Vec<(Request, u16)>,
        end: Request,
    ) -> io::Result<()> {
        let first = self.sequence.wrapping_add(1);
        let count = requests.len();
        let mut bytes = Vec::new();
        for (i, (request, flags)) in requests.into_iter().enumerate() {
            self.sequence = self.sequence.wrapping_add(1);
            let ack = if i + 1 == count { NLM_F_ACK } else { 0 };
            bytes.extend(request.finish(NLM_F_REQUEST | flags | ack, self.sequence));
        }
        let last = self.sequence;
        self.sequence = self.sequence.wrapping_add(1);
        bytes.extend(end.finish(NLM_F_REQUEST, self.sequence));
        self.socket.send(&bytes, 0)?;
        self.receive_between(first, last, |_| ()).map(drop)
    }

    fn receive(&mut self, sequence: u32, reply: impl FnMut(&[u8])) -> io::Result<bool> {
        self.receive_between(sequence, sequence, reply)
    }

    /// Receives the replies to the requests with these numbers, until one has failed or the last one is
    /// acknowledged.
    fn receive_between(
        &mut self,
        first: u32,
        last: u32,
        mut reply: impl FnMut(&[u8]),
    ) -> io::Result<bool> {
        let mut whole = true;
        loop {
            self.buffer.clear();
            let length = self.socket.recv(&mut self.buffer, libc::MSG_TRUNC)?;
            let mut rest = self
                .buffer
                .get(..length)
                .ok_or_else(|| malformed("a message longer than any should be"))?;
            while let Some(message) = Message::first(rest)? {
                rest = message.rest;
                if message.sequence.wrapping_sub(first) > last.wrapping_sub(first) {
                    // A reply of an exchange that was abandoned.
                    continue;
                }
                whole &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_DONE | NLMSG_ERROR => match message.body.get(..4).map(number) {
                        Some(0) if message.sequence != last => {}
                        Some(0) => return Ok(whole),
                        Some(code) => {
                            let code = code.cast_signed().wrapping_neg();
                            return Err(io::Error::from_raw_os_error(code));
                        }
                        None => return Err(malformed("an end without a code")),
                    },
                    _ => reply(message.body),
                }
            }
        }
    }
}

/// A message under construction.
pub(super) struct Request(Vec<u8>);

impl Request {
    /// A message of this kind; `header` is its fixed part before the attributes.
    pub(super) fn new(kind: u16, header: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes.extend(header);
        Self(bytes)
    }

    pub(super) fn add(&mut self, kind: u16, value: &[u8]) {
        add(&mut self.0, kind, value);
    }

    /// Appends attributes that are encoded already.
    pub(super) fn add_all(&mut self, attributes: &[u8]) {
        self.0.extend(attributes);
    }

    fn finish(mut self, flags: u16, sequence: u32) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// Appends an attribute.
pub(super) fn add(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    bytes.extend((4 + value.len() as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Kind and value of each attribute; a truncated attribute ends the list.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    flagged_attributes(bytes).map(|(kind, value)| (kind & KIND_MASK, value))
}

/// The same with the flags of each kind.
pub(super) fn flagged_attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A message that was received.
struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
    /// The bytes after it.
    rest: &'a [u8],
}

impl<'a> Message<'a> {
    /// The first message of several.
    fn first(bytes: &'a [u8]) -> io::Result<Option<Self>> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let header = bytes
            .get(..HEADER)
            .ok_or_else(|| malformed("a message without a header"))?;
        let length = number(&header[..4]) as usize;
        let body = bytes
            .get(HEADER..length)
            .ok_or_else(|| malformed("a message cut short"))?;
        Ok(Some(Self {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            sequence: number(&header[8..12]),
            body,
            rest: bytes.get(length.next_multiple_of(4)..).unwrap_or_default(),
        }))
    }
}

/// The number in the first four bytes.
pub(super) fn number(bytes: &[u8]) -> u32 {
    bytes
        .first_chunk()
        .map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

/// The text before the first zero byte.
pub(super) fn text(value: &[u8]) -> String {
    let end = value.iter().position(|&byte| byte == 0);
    String::from_utf8_lossy(&value[..end.unwrap_or(value.len())]).into_owned()
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the kernel's netlink reply contains {what}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_attributes_are_read_back() {
        let mut bytes = Vec::new();
        add(&mut bytes, 1, b"bpf\0");
        add(&mut bytes, 2 | NESTED, &[1]);
        add(&mut bytes, 11, &7u32.to_ne_bytes());
        let read: Vec<_> = attributes(&bytes).collect();
        assert_eq!(
            read,
            [(1, &b"bpf\0"[..]), (2, &[1]), (11, &7u32.to_ne_bytes()),]
        );
    }

    #[test]
    fn truncated_attributes_end_the_list() {
        for bytes in [&[8, 0, 1, 0, 1][..], &[3, 0, 1, 0], &[0, 0, 0, 0], &[4]] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
    }
}
