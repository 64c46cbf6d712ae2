//! The TCP sockets of a network namespace, as the kernel's socket diagnosis lists them, and which side
//! opened each connection.
//!
//! A listener on the port proves nothing: a program can listen on the port of a connection
//! that it has opened itself (`SO_REUSEADDR`). The kernel's byte counters show which side opened it. A SYN
//! takes one place in the sequence, and the socket that sent it sees it acknowledged
//! (`tcp_snd_una_update`, `net/ipv4/tcp_input.c`): `tcpi_bytes_acked` is one more than the data that was
//! sent. The sequence of a socket that a listener created begins after its SYN-ACK
//! (`tcp_create_openreq_child`, `net/ipv4/tcp_minisocks.c`), so it counts data only. With a FIN taken into
//! account:
//!
//! ```text
//! SYNs of this side = acknowledged + in flight + sent again - sent - FIN
//! ```
//!
//! These counters are from the pod's own kernel, and a program in the pod can falsify them: with a segment
//! that the kernel counts as sent and cannot send (an IPv6 routing header that is too long, a source route
//! that leads nowhere), with a SYN that the pod sends to itself in the peer's name, or with `TCP_REPAIR`. So
//! the node must confirm a connection that looks inbound here ([`super::conntrack`]).

use std::{io, net::SocketAddr, thread, time::Duration};

use rtnetlink::{packet_core::NLM_F_DUMP, sys::protocols::NETLINK_SOCK_DIAG};

use super::{
    netlink::ip,
    sockets::{Bounds, Direction, OpenSocket, SocketProtocol},
    transport::{Transport, attributes, four, malformed},
};

/// Address families, `include/linux/socket.h`, and the protocol's number.
const IPV4: u8 = 2;
const IPV6: u8 = 10;
const TCP: u8 = 6;
/// `SOCK_DIAG_BY_FAMILY`, `include/uapi/linux/sock_diag.h`.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// `INET_DIAG_INFO`, `include/uapi/linux/inet_diag.h`: attribute, and bit of a request.
const INFO: u16 = 2;
const ASK_FOR_INFO: u8 = 1 << (INFO - 1);
/// Lengths of `struct inet_diag_sockid`, `inet_diag_req_v2` and `inet_diag_msg`.
const ID: usize = 48;
const REQUEST: usize = 8 + ID;
const MESSAGE: usize = 24 + ID;
/// Bytes of `struct tcp_info` up to `tcpi_bytes_retrans` (kernel 4.19).
const TCP_INFO: usize = 216;

/// How often one busy socket is looked at, how often all busy sockets together, and the pause between two looks.
const LOOKS: usize = 32;
const LOOKS_IN_ALL: usize = 16_384;
const PAUSE: Duration = Duration::from_micros(300);

/// States of a TCP socket, `include/net/tcp_states.h`.
const ESTABLISHED: u8 = 1;
const SYN_RECV: u8 = 3;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;

/// States in which there is a peer and the pod may still send. In LISTEN and CLOSE there is no peer. In
/// SYN-SENT no peer has replied yet, and the rules judge the next SYN. In TIME-WAIT both sides have closed.
/// SYN-RECEIVED includes connection requests that have no socket yet.
const STATES: [u8; 7] = [
    ESTABLISHED,
    SYN_RECV,
    FIN_WAIT1,
    FIN_WAIT2,
    CLOSE_WAIT,
    LAST_ACK,
    CLOSING,
];

/// The progress of a connection at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Progress {
    state: u8,
    /// Sequence numbers from the first unacknowledged on, sent or not.
    queued: u32,
    /// Packets in flight.
    unacked: u32,
    /// Of `queued`, the numbers that were not sent.
    unsent: u32,
    acked: u64,
    sent: u64,
    resent: u64,
}

/// One socket in the kernel's reply.
#[derive(Clone, Copy, Debug)]
struct Entry {
    family: u8,
    /// `struct inet_diag_sockid`, which identifies this socket and no later one.
    id: [u8; ID],
    local: SocketAddr,
    remote: SocketAddr,
    state: u8,
    /// `None` for a connection request without a socket, and for a socket that is already closed.
    progress: Option<Progress>,
}

/// What another look at a busy socket shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// Which side opened the connection.
    Opened(Direction),
    /// It was not at rest.
    Busy,
    /// The socket is closed.
    Gone,
}

/// The connections of the network namespace that the calling thread is in.
#[derive(Debug, Default)]
pub(super) struct Connections {
    pub(super) sockets: Vec<OpenSocket>,
    /// Whether there are more sockets than were read.
    pub(super) cut_short: bool,
    /// How many connections were never read at rest; they count as opened by the pod.
    pub(super) unclear: usize,
}

impl Progress {
    fn read(state: u8, queued: u32, info: &[u8]) -> io::Result<Self> {
        if info.len() < TCP_INFO {
            return Err(malformed("a tcp_info without counters of bytes"));
        }
        let word = |at: usize| four(&info[at..at + 4]).map(u32::from_ne_bytes);
        let long = |at: usize| -> io::Result<u64> {
            let (low, high) = (four(&info[at..at + 4])?, four(&info[at + 4..at + 8])?);
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&low);
            bytes[4..].copy_from_slice(&high);
            Ok(u64::from_ne_bytes(bytes))
        };
        Ok(Self {
            state,
            queued,
            unacked: word(24)?,
            unsent: word(144)?,
            acked: long(120)?,
            sent: long(200)?,
            resent: long(208)?,
        })
    }

    /// How many SYNs this side has sent, provided that these counters belong to one moment. They do while
    /// nothing is in flight, because the kernel reads all but `queued` under the socket's lock.
    fn syns(&self) -> i128 {
        let in_flight = if self.unacked == 0 {
            0
        } else {
            i128::from(self.queued) - i128::from(self.unsent)
        };
        let sent_fin = match self.state {
            FIN_WAIT2 => true,
            FIN_WAIT1 | CLOSING | LAST_ACK => self.unsent == 0,
            _ => false,
        };
        i128::from(self.acked) + in_flight + i128::from(self.resent)
            - i128::from(self.sent)
            - i128::from(sent_fin)
    }

    /// Which side opened the connection; `None` if it is not at rest. `before` is an earlier reading: if no
    /// counter has changed, nothing happened in between.
    fn direction(&self, before: Option<&Self>) -> Option<Direction> {
        (self.unacked == 0 || before == Some(self)).then(|| {
            if self.syns() == 0 {
                Direction::Inbound
            } else {
                Direction::Outbound
            }
        })
    }
}

/// Lists the connections of the calling thread's network namespace, within these limits.
pub(super) fn connections(bounds: &Bounds) -> io::Result<Connections> {
    let mut diagnosis = Diagnosis::open()?;
    let mut found = Connections::default();
    let mut busy: Vec<Entry> = Vec::new();
    let mut left = bounds.tcp;
    for family in [IPV4, IPV6] {
        // On a kernel without IPv6 the list is empty.
        let (entries, whole) = diagnosis.list(family, left)?;
        found.cut_short |= !whole;
        left -= entries.len();
        for entry in entries {
            // Packets between the pod's own sockets never cross its interface.
            if entry.remote.ip().is_loopback() || entry.remote.ip() == entry.local.ip() {
                continue;
            }
            match entry.progress {
                // A listener has received a SYN, and the handshake is not complete.
                None if entry.state == SYN_RECV => {
                    found.sockets.push(entry.opened(Direction::Inbound));
                }
                // This socket is closed; only the peer may still send.
                None => {}
                Some(progress) => match progress.direction(None) {
                    Some(direction) => found.sockets.push(entry.opened(direction)),
                    None => busy.push(entry),
                },
            }
        }
    }
    let mut looks = 0;
    for _ in 0..LOOKS {
        if busy.is_empty() || looks + busy.len() > LOOKS_IN_ALL || bounds.is_over() {
            break;
        }
        looks += busy.len();
        thread::sleep(PAUSE);
        let mut still = Vec::new();
        for mut entry in busy {
            if bounds.is_over() {
                still.push(entry);
                continue;
            }
            match diagnosis.look_again(&mut entry)? {
                Look::Opened(direction) => found.sockets.push(entry.opened(direction)),
                Look::Busy => still.push(entry),
                Look::Gone => {}
            }
        }
        busy = still;
    }
    found.unclear = busy.len();
    let unclear = busy.iter().map(|entry| entry.opened(Direction::Outbound));
    found.sockets.extend(unclear);
    Ok(found)
}

impl Entry {
    fn read(message: &[u8]) -> io::Result<Self> {
        let body = message
            .get(..MESSAGE)
            .ok_or_else(|| malformed("a socket cut short"))?;
        let (family, state) = (body[0], body[1]);
        let mut id = [0; ID];
        id.copy_from_slice(&body[4..4 + ID]);
        let length = if family == IPV4 { 4 } else { 16 };
        let address = |port: usize, at: usize| -> io::Result<SocketAddr> {
            let port = u16::from_be_bytes([id[port], id[port + 1]]);
            Ok(SocketAddr::new(
                ip(&id[at..at + length])?.to_canonical(),
                port,
            ))
        };
        let (local, remote) = (address(0, 4)?, address(2, 20)?);
        let queued = u32::from_ne_bytes(four(&body[8 + ID + 4..8 + ID + 8])?);
        let mut progress = None;
        for (kind, value) in attributes(message, MESSAGE)? {
            if kind == INFO {
                progress = Some(Progress::read(state, queued, value)?);
            }
        }
        Ok(Self {
            family,
            id,
            local,
            remote,
            state,
            progress,
        })
    }

    fn opened(&self, direction: Direction) -> OpenSocket {
        OpenSocket {
            protocol: SocketProtocol::Tcp,
            local: self.local,
            remote: self.remote,
            direction,
        }
    }
}

/// A socket to ask the kernel about other sockets.
struct Diagnosis(Transport);

impl Diagnosis {
    fn open() -> io::Result<Self> {
        Transport::open(NETLINK_SOCK_DIAG).map(Self)
    }

    /// Up to `most` connections of one address family, and whether those are all.
    fn list(&mut self, family: u8, most: usize) -> io::Result<(Vec<Entry>, bool)> {
        let mut entries = Vec::new();
        let mut is_over = false;
        let listed = self.ask(family, &[0; ID], NLM_F_DUMP, |entry| {
            is_over = entries.len() == most;
            if is_over {
                return Err(malformed("too many sockets"));
            }
            entries.push(entry);
            Ok(())
        });
        if is_over {
            self.0.reopen()?;
        } else {
            listed?;
        }
        Ok((entries, !is_over))
    }

    /// Reads a busy socket twice. There is no pause between the readings, so that a server that sends all the time is
    /// found at rest between two of its segments.
    fn look_again(&mut self, entry: &mut Entry) -> io::Result<Look> {
        for _ in 0..2 {
            let Some(now) = self.progress(entry)? else {
                return Ok(Look::Gone);
            };
            let before = entry.progress.replace(now);
            if let Some(direction) = now.direction(before.as_ref()) {
                return Ok(Look::Opened(direction));
            }
        }
        Ok(Look::Busy)
    }

    /// The progress of a socket now; `None` if it is gone.
    fn progress(&mut self, entry: &Entry) -> io::Result<Option<Progress>> {
        let mut progress = None;
        let asked = self.ask(entry.family, &entry.id, 0, |entry| {
            progress = entry.progress;
            Ok(())
        });
        match asked {
            Ok(()) => Ok(progress),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn ask(
        &mut self,
        family: u8,
        id: &[u8; ID],
        flags: u16,
        mut each: impl FnMut(Entry) -> io::Result<()>,
    ) -> io::Result<()> {
        let states = STATES.iter().fold(0u32, |mask, state| mask | 1 << state);
        let mut request = Vec::with_capacity(REQUEST);
        request.extend([family, TCP, ASK_FOR_INFO, 0]);
        request.extend(states.to_ne_bytes());
        request.extend(id);
        let each = |body: &[u8]| each(Entry::read(body)?);
        self.0
            .exchange(SOCK_DIAG_BY_FAMILY, flags, &request, each)
            .map(|_| ())
    }
}

/// Whether this error means that the socket is gone: there is none, or another one
/// (`sock_diag_check_cookie`, `net/core/sock_diag.c`).
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{Shutdown, TcpListener, TcpStream},
    };

    use super::*;

    fn progress(state: u8, unacked: u32, queued: u32, unsent: u32, bytes: [u64; 3]) -> Progress {
        let [acked, sent, resent] = bytes;
        Progress {
            state,
            queued,
            unacked,
            unsent,
            acked,
            sent,
            resent,
        }
    }

    #[test]
    fn a_syn_of_this_side_shows_in_the_acknowledged_bytes() {
        use Direction::{Inbound, Outbound};
        for (progress, expected) in [
            (progress(ESTABLISHED, 0, 0, 0, [1, 0, 0]), Outbound),
            (progress(ESTABLISHED, 0, 0, 0, [0, 0, 0]), Inbound),
            (progress(ESTABLISHED, 0, 0, 0, [1001, 1500, 500]), Outbound),
            (progress(ESTABLISHED, 0, 0, 0, [1000, 1500, 500]), Inbound),
            // The window is closed: data is queued, and none was sent.
            (progress(ESTABLISHED, 0, 700, 700, [1000, 1000, 0]), Inbound),
            // A FIN that was acknowledged, or was not sent yet.
            (progress(FIN_WAIT2, 0, 0, 0, [1002, 1000, 0]), Outbound),
            (progress(FIN_WAIT2, 0, 0, 0, [1001, 1000, 0]), Inbound),
            (progress(FIN_WAIT1, 0, 701, 701, [1001, 1000, 0]), Outbound),
            (progress(LAST_ACK, 0, 701, 701, [1000, 1000, 0]), Inbound),
            // Counters that no kernel's TCP produces count as the pod's.
            (progress(ESTABLISHED, 0, 0, 0, [5, 9, 0]), Outbound),
        ] {
            assert_eq!(progress.direction(None), Some(expected), "{progress:?}");
        }
    }

    #[test]
    fn data_in_flight_counts_if_nothing_changed_between_two_readings() {
        let first = progress(ESTABLISHED, 2, 900, 400, [1501, 2000, 0]);
        assert_eq!(first.direction(None), None);
        assert_eq!(first.direction(Some(&first)), Some(Direction::Outbound));
        let moved = Progress {
            sent: 2001,
            unacked: 3,
            ..first
        };
        assert_eq!(moved.direction(Some(&first)), None);
        let other = progress(LAST_ACK, 1, 501, 0, [1500, 2000, 0]);
        assert_eq!(other.direction(Some(&other)), Some(Direction::Inbound));
    }

    /// The directions that the kernel's counters give for both ends: first the connecting end, then the other.
    fn ends(near: &TcpStream) -> [Option<Direction>; 2] {
        let (local, peer) = (near.local_addr().unwrap(), near.peer_addr().unwrap());
        let mut diagnosis = Diagnosis::open().unwrap();
        let (all, _) = diagnosis.list(IPV4, usize::MAX).unwrap();
        [(local, peer), (peer, local)].map(|(local, remote)| {
            let mut all = all.iter();
            let mut entry = *all.find(|entry| (entry.local, entry.remote) == (local, remote))?;
            if let Some(direction) = entry.progress?.direction(None) {
                return Some(direction);
            }
            for _ in 0..LOOKS {
                match diagnosis.look_again(&mut entry).unwrap() {
                    Look::Opened(direction) => return Some(direction),
                    Look::Busy => {}
                    Look::Gone => return None,
                }
            }
            None
        })
    }

    #[test]
    fn the_side_that_opened_a_connection_is_known_in_every_state() {
        let expected = [Some(Direction::Outbound), Some(Direction::Inbound)];
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        // Also while the connection is in the listener's queue.
        assert_eq!(ends(&near), expected);
        let (mut far, _) = listener.accept().unwrap();
        assert_eq!(ends(&near), expected);
        near.write_all(&[1; 3000]).unwrap();
        far.read_exact(&mut [0; 3000]).unwrap();
        far.write_all(&[1; 500]).unwrap();
        near.read_exact(&mut [0; 500]).unwrap();
        assert_eq!(ends(&near), expected);
        // Nobody reads: the window closes.
        for stream in [&mut near, &mut far] {
            stream.set_nonblocking(true).unwrap();
            while stream.write(&[1; 8192]).is_ok() {}
        }
        assert_eq!(ends(&near), expected);
        near.shutdown(Shutdown::Write).unwrap();
        assert_eq!(ends(&near), expected);
        far.shutdown(Shutdown::Write).unwrap();
        assert_eq!(ends(&near), expected);
        // A connection whose listener is gone.
        drop(listener);
        assert_eq!(ends(&near), expected);
    }
}
