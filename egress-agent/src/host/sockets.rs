//! The sockets that are open in a pod, from the tables of its network namespace.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};

use super::tcp_table;

/// Directory of the tables of the calling thread's network namespace.
const TABLES: &str = "/proc/thread-self/net";
/// How many TCP sockets of one pod are read: as many as a pod's default limit of inbound flows.
const TCP_SOCKETS: usize = 16_384;
/// How many UDP sockets are read. The noted ones take places of the pod's outbound flows.
const UDP_SOCKETS: usize = 4_096;
/// CPU time for one pod's TCP sockets, and again for its UDP sockets. Time in which other processes use the
/// CPU does not count.
const TIME: Duration = Duration::from_millis(150);
/// Longest line of a table that is read; most are about 150 bytes long.
const LINE_BYTES: u64 = 256;
/// How many lines are read between two checks of the time.
const LINES_AT_ONCE: usize = 256;

/// States of a UDP socket, with the numbers of `include/net/tcp_states.h`: connected, and unconnected.
const CONNECTED: u8 = 1;
const OPEN: u8 = 7;

/// The protocol of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SocketProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Which side opened a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// The other side, as the node's connection tracking confirms. For UDP this cannot be known; it means that
    /// the pod has another, unconnected socket on the same port, as a server has.
    Inbound,
    /// The other side, according to the pod's own kernel, which a program in the pod can mislead. The node's
    /// connection tracking does not confirm it.
    Unconfirmed,
    /// The pod, or this cannot be known.
    Outbound,
}

/// A socket with a peer on another machine, on which the pod may still send: a connected UDP socket, or a TCP
/// socket with a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OpenSocket {
    /// Its protocol.
    pub protocol: SocketProtocol,
    /// The pod's end. An IPv4 address is never mapped to IPv6, whatever the socket's family.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// Which side opened the flow.
    pub direction: Direction,
}

/// The open sockets of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenSockets {
    /// The sockets that were read.
    pub sockets: Vec<OpenSocket>,
    /// Whether the pod has more sockets than are read (16,384 of TCP and 4,096 of UDP, with 150 ms of CPU time
    /// for each).
    pub cut_short: bool,
    /// TCP connections that were too busy to find out which side opened them. They count as opened by the
    /// pod.
    pub unclear: usize,
    /// The error of the node's connection tracking, if it could not be asked.
    pub conntrack_error: Option<String>,
}

/// Limits of the work for one pod.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// TCP sockets.
    pub(super) tcp: usize,
    /// UDP sockets.
    pub(super) udp: usize,
    /// When to stop, in CPU time of the thread.
    pub(super) until: Duration,
}

impl Bounds {
    /// The limits of every pod, for the calling thread from now on.
    pub(super) fn new() -> Self {
        Self {
            tcp: TCP_SOCKETS,
            udp: UDP_SOCKETS,
            until: used() + TIME,
        }
    }

    /// Whether the time has run out.
    pub(super) fn is_over(&self) -> bool {
        used() >= self.until
    }
}

/// CPU time of the calling thread.
fn used() -> Duration {
    let used = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    used.map_or(Duration::MAX, Duration::from)
}

/// One line of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Line {
    local: SocketAddr,
    remote: SocketAddr,
    state: u8,
}

/// The open sockets of the calling thread's network namespace. `confirm` asks which side opened the TCP
/// connections that look inbound; it runs before the UDP sockets take their time.
pub(super) fn read_current_namespace(
    confirm: impl FnOnce(&mut [OpenSocket], &Bounds) -> io::Result<()>,
) -> io::Result<OpenSockets> {
    let bounds = Bounds::new();
    let tcp = tcp_table::connections(&bounds)?;
    let mut open = OpenSockets {
        sockets: tcp.sockets,
        cut_short: tcp.cut_short,
        unclear: tcp.unclear,
        conntrack_error: None,
    };
    let confirmed = confirm(&mut open.sockets, &bounds);
    open.conntrack_error = confirmed.err().map(|error| error.to_string());
    let bounds = Bounds::new();
    let mut lines = Vec::new();
    for table in ["udp", "udp6"] {
        let file = match File::open(Path::new(TABLES).join(table)) {
            Ok(file) => file,
            // This kernel has no IPv6.
            Err(error) if table.ends_with('6') && error.kind() == io::ErrorKind::NotFound => {
                continue;
            }
            Err(error) => return Err(error),
        };
        open.cut_short |= !read(file, &mut lines, &bounds)?;
    }
    open.sockets.extend(conversations(&lines));
    Ok(open)
}

/// Adds the lines of a table, up to the limits. Returns whether all lines were read.
fn read(table: impl Read, lines: &mut Vec<Line>, bounds: &Bounds) -> io::Result<bool> {
    let table = BufReader::new(table.take(LINE_BYTES * (bounds.udp as u64 + 1)));
    for (count, line) in table.lines().skip(1).enumerate() {
        let is_over = count.is_multiple_of(LINES_AT_ONCE) && bounds.is_over();
        if lines.len() == bounds.udp || is_over {
            return Ok(false);
        }
        let line = line?;
        lines.extend(parse(&line));
    }
    Ok(true)
}

/// The UDP sockets whose peer is across the pod's interface.
fn conversations(lines: &[Line]) -> Vec<OpenSocket> {
    let heard: HashSet<SocketAddr> = lines
        .iter()
        .filter(|line| line.state == OPEN)
        .map(|line| line.local)
        .collect();
    let is_heard = |local: SocketAddr| {
        let any4 = (!local.is_ipv6()).then_some(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        // A socket bound to `::` receives IPv4 too unless IPV6_V6ONLY is set, which the table does not show.
        let places = [Some(local.ip()), Some(Ipv6Addr::UNSPECIFIED.into()), any4];
        let mut places = places.into_iter().flatten();
        places.any(|place| heard.contains(&SocketAddr::new(place, local.port())))
    };
    lines
        .iter()
        .filter(|line| line.state == CONNECTED)
        // Packets between the pod's own sockets never cross its interface.
        .filter(|line| !line.remote.ip().is_loopback() && line.remote.ip() != line.local.ip())
        .map(|line| OpenSocket {
            protocol: SocketProtocol::Udp,
            local: line.local,
            remote: line.remote,
            direction: if is_heard(line.local) {
                Direction::Inbound
            } else {
                Direction::Outbound
            },
        })
        .collect()
}

/// `  sl: local:port remote:port state …`; numbers are hexadecimal.
fn parse(line: &str) -> Option<Line> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    Some(Line {
        local: address(fields.next()?)?,
        remote: address(fields.next()?)?,
        state: u8::from_str_radix(fields.next()?, 16).ok()?,
    })
}

/// An address is one or four words of 32 bits in network byte order. Each is printed as a number in this
/// machine's byte order. A port is printed as its number.
fn address(text: &str) -> Option<SocketAddr> {
    let (words, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        let digits = words.get(8 * at..8 * at + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    let ip: IpAddr = match words.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let mut bytes = [0; 16];
            for (at, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(at)?);
            }
            Ipv6Addr::from(bytes).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn addresses_in_the_table_are_those_of_the_sockets() {
        for at in ["127.0.0.1:0", "[::1]:0"] {
            let other = UdpSocket::bind(at).unwrap();
            let socket = UdpSocket::bind(at).unwrap();
            socket.connect(other.local_addr().unwrap()).unwrap();
            let expected = Line {
                local: socket.local_addr().unwrap(),
                remote: other.local_addr().unwrap(),
                state: CONNECTED,
            };
            let mut lines = Vec::new();
            for name in ["udp", "udp6"] {
                let table = File::open(Path::new(TABLES).join(name)).unwrap();
                assert!(read(table, &mut lines, &Bounds::new()).unwrap());
            }
            assert!(lines.contains(&expected), "{expected:?}");
        }
    }

    fn line(local: &str, remote: &str, state: u8) -> Line {
        let (local, remote) = (local.parse().unwrap(), remote.parse().unwrap());
        Line {
            local,
            remote,
            state,
        }
    }

    #[test]
    fn a_socket_that_shares_a_port_with_an_unconnected_one_is_inbound() {
        for (open, local, expected) in [
            ("0.0.0.0:80", "10.1.1.2:80", Direction::Inbound),
            ("[::]:80", "10.1.1.2:80", Direction::Inbound),
            ("[::]:80", "[fd01::2]:80", Direction::Inbound),
            ("10.1.1.2:80", "10.1.1.2:80", Direction::Inbound),
            ("0.0.0.0:80", "[fd01::2]:80", Direction::Outbound),
            ("10.1.1.3:80", "10.1.1.2:80", Direction::Outbound),
            ("0.0.0.0:81", "10.1.1.2:80", Direction::Outbound),
        ] {
            let remote = if local.starts_with('[') {
                "[fd98::1]:9"
            } else {
                "192.0.2.1:9"
            };
            let lines = [
                line(local, remote, CONNECTED),
                line(open, "0.0.0.0:0", OPEN),
            ];
            let found: Vec<Direction> = conversations(&lines)
                .into_iter()
                .map(|socket| socket.direction)
                .collect();
            assert_eq!(found, [expected], "{open} {local}");
        }
    }

    #[test]
    fn sockets_between_processes_of_the_pod_do_not_count() {
        let lines = [
            line("127.0.0.1:5", "127.0.0.1:9", CONNECTED),
            line("[::1]:5", "[::1]:9", CONNECTED),
            line("10.1.1.2:5", "10.1.1.2:9", CONNECTED),
        ];
        assert_eq!(conversations(&lines), []);
    }

    #[test]
    fn a_line_that_is_not_a_socket_is_skipped() {
        for text in [
            "",
            "  sl  local_address rem_address   st",
            "0: 0100007F:0016",
            "0: 0100007F:0016 00000000:0000",
            "0: 0100007:0016 00000000:0000 0A",
            "0: 0100007F:10016 00000000:0000 0A",
            "0: 0100007é:0016 00000000:0000 0A",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_long_table_is_cut_and_reported_as_cut() {
        let one = "0: 0100007F:0016 0200007F:0017 01\n";
        let table = |count: usize| format!("heading\n{}", one.repeat(count));
        let bounds = Bounds::new();
        let mut lines = Vec::new();
        assert!(read(table(UDP_SOCKETS).as_bytes(), &mut lines, &bounds).unwrap());
        assert_eq!(lines.len(), UDP_SOCKETS);
        assert!(!read(table(1).as_bytes(), &mut lines, &bounds).unwrap());
        lines.clear();
        assert!(!read(table(UDP_SOCKETS + 1).as_bytes(), &mut lines, &bounds).unwrap());
        assert_eq!(lines.len(), UDP_SOCKETS);
    }

    #[test]
    fn a_table_that_takes_too_long_is_cut_and_reported_as_cut() {
        let bounds = Bounds {
            until: Duration::ZERO,
            ..Bounds::new()
        };
        let mut lines = Vec::new();
        let table = "heading\n0: 0100007F:0016 0200007F:0017 01\n";
        assert!(!read(table.as_bytes(), &mut lines, &bounds).unwrap());
        assert_eq!(lines, []);
    }
}
