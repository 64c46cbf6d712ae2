//! The sockets that are open in a pod, from the tables of its network namespace.

use std::{
    collections::HashSet,
    io::{self, BufRead, BufReader, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use super::process::Process;

/// Lines of one table that are read.
const LINES: usize = 65_536;
/// Bytes of one table that are read; a line has about 150.
const BYTES: u64 = 256 * LINES as u64;

/// States of a TCP socket, `include/net/tcp_states.h`. UDP has two of them: a connected socket is
/// established, one that is not is closed.
const ESTABLISHED: u8 = 1;
const SYN_RECV: u8 = 3;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const CLOSE: u8 = 7;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const LISTEN: u8 = 10;
const CLOSING: u8 = 11;
const NEW_SYN_RECV: u8 = 12;

/// The protocol of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SocketProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Who began a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// The other side, as far as can be told: something in the pod listens on the local port.
    Inbound,
    /// The pod.
    Outbound,
}

/// A socket in a conversation with another machine, in which the pod may have something to send.
///
/// That is a connected UDP socket, and a TCP socket in any state but these: in LISTEN and CLOSE there
/// is no other side; in SYN-SENT nobody has agreed yet, and the rules judge its next SYN; in
/// TIME-WAIT both sides have had the last word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OpenSocket {
    /// Its protocol.
    pub protocol: SocketProtocol,
    /// The pod's end. An IPv4 address is one, whichever family the socket has.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// Who began.
    pub direction: Direction,
}

/// The open sockets of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenSockets {
    /// Those that were read.
    pub sockets: Vec<OpenSocket>,
    /// Whether there are more: a table has more lines than are read (65,536).
    pub cut_short: bool,
}

/// One line of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Line {
    local: SocketAddr,
    remote: SocketAddr,
    state: u8,
}

/// Reads the four tables that a process shows.
pub(super) fn of(process: &Process) -> io::Result<OpenSockets> {
    let mut open = OpenSockets::default();
    for (protocol, tables) in [
        (SocketProtocol::Tcp, ["net/tcp", "net/tcp6"]),
        (SocketProtocol::Udp, ["net/udp", "net/udp6"]),
    ] {
        let mut lines = Vec::new();
        for table in tables {
            let file = match process.file(table) {
                Ok(file) => file,
                // No IPv6 in this kernel.
                Err(error) if table.ends_with('6') && super::process::has_ended(&error) => continue,
                Err(error) => return Err(error),
            };
            open.cut_short |= !read(file, &mut lines)?;
        }
        open.sockets.extend(conversations(protocol, &lines));
    }
    Ok(open)
}

/// Adds the lines of a table. Returns whether that is all of them.
fn read(table: impl Read, lines: &mut Vec<Line>) -> io::Result<bool> {
    let table = BufReader::new(table.take(BYTES));
    for (count, line) in table.lines().skip(1).enumerate() {
        if count == LINES {
            return Ok(false);
        }
        let line = line?;
        lines.extend(parse(&line));
    }
    Ok(true)
}

/// The sockets that are in a conversation across the pod's interface.
fn conversations(protocol: SocketProtocol, lines: &[Line]) -> Vec<OpenSocket> {
    let waiting = match protocol {
        SocketProtocol::Tcp => LISTEN,
        SocketProtocol::Udp => CLOSE,
    };
    let listened: HashSet<SocketAddr> = lines
        .iter()
        .filter(|line| line.state == waiting)
        .map(|line| line.local)
        .collect();
    let is_listened = |local: SocketAddr| {
        let any4 = (!local.is_ipv6()).then_some(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        // A socket of `::` hears IPv4 too, unless told not to, which the table does not say.
        let places = [Some(local.ip()), Some(Ipv6Addr::UNSPECIFIED.into()), any4];
        let mut places = places.into_iter().flatten();
        places.any(|place| listened.contains(&SocketAddr::new(place, local.port())))
    };
    lines
        .iter()
        .filter(|line| match protocol {
            SocketProtocol::Tcp => matches!(
                line.state,
                ESTABLISHED
                    | SYN_RECV
                    | FIN_WAIT1
                    | FIN_WAIT2
                    | CLOSE_WAIT
                    | LAST_ACK
                    | CLOSING
                    | NEW_SYN_RECV
            ),
            SocketProtocol::Udp => line.state == ESTABLISHED,
        })
        // What a pod says to itself never crosses its interface.
        .filter(|line| !line.remote.ip().is_loopback() && line.remote.ip() != line.local.ip())
        .map(|line| OpenSocket {
            protocol,
            local: line.local,
            remote: line.remote,
            direction: if matches!(line.state, SYN_RECV | NEW_SYN_RECV) || is_listened(line.local) {
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

/// An address is one or four words of 32 bits, each printed as this machine reads it from memory,
/// where it is in network byte order. A port is printed as its number.
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
    use std::{
        net::{TcpListener, TcpStream, UdpSocket},
        path::Path,
    };

    use super::*;

    /// Both tables of a protocol in this process's network.
    fn tables(names: [&str; 2]) -> Vec<Line> {
        let process = Process::open(Path::new("/proc"), std::process::id()).unwrap();
        let mut lines = Vec::new();
        for name in names {
            assert!(read(process.file(name).unwrap(), &mut lines).unwrap());
        }
        lines
    }

    #[test]
    fn addresses_are_those_that_the_sockets_have() {
        for at in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(at).unwrap();
            let local = listener.local_addr().unwrap();
            let stream = TcpStream::connect(local).unwrap();
            let lines = tables(["net/tcp", "net/tcp6"]);
            assert!(
                lines
                    .iter()
                    .any(|line| line.local == local && line.state == LISTEN)
            );
            let expected = Line {
                local: stream.local_addr().unwrap(),
                remote: local,
                state: ESTABLISHED,
            };
            assert!(lines.contains(&expected), "{expected:?}");

            let socket = UdpSocket::bind(at).unwrap();
            socket.connect(local).unwrap();
            let expected = Line {
                local: socket.local_addr().unwrap(),
                remote: local,
                state: ESTABLISHED,
            };
            assert!(tables(["net/udp", "net/udp6"]).contains(&expected));
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

    fn directions(protocol: SocketProtocol, lines: &[Line]) -> Vec<Direction> {
        conversations(protocol, lines)
            .into_iter()
            .map(|socket| socket.direction)
            .collect()
    }

    #[test]
    fn a_socket_on_a_port_that_is_listened_on_is_inbound() {
        for (listener, local, expected) in [
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
            for (protocol, waiting) in [(SocketProtocol::Tcp, LISTEN), (SocketProtocol::Udp, CLOSE)]
            {
                let lines = [
                    line(local, remote, ESTABLISHED),
                    line(listener, "0.0.0.0:0", waiting),
                ];
                assert_eq!(
                    directions(protocol, &lines),
                    [expected],
                    "{listener} {local}"
                );
            }
        }
    }

    #[test]
    fn only_states_in_which_something_may_be_sent_count() {
        let of = |protocol, state| {
            conversations(protocol, &[line("10.1.1.2:5", "192.0.2.1:9", state)]).len()
        };
        let tcp: Vec<u8> = (0..=20)
            .filter(|&s| of(SocketProtocol::Tcp, s) == 1)
            .collect();
        assert_eq!(tcp, [1, 3, 4, 5, 8, 9, 11, 12]);
        let udp: Vec<u8> = (0..=20)
            .filter(|&s| of(SocketProtocol::Udp, s) == 1)
            .collect();
        assert_eq!(udp, [1]);
        // A connection that is being opened towards the pod, whose listener has gone.
        let opening = [line("10.1.1.2:5", "192.0.2.1:9", SYN_RECV)];
        assert_eq!(
            directions(SocketProtocol::Tcp, &opening),
            [Direction::Inbound]
        );
    }

    #[test]
    fn what_stays_within_the_pod_does_not_count() {
        let lines = [
            line("127.0.0.1:5", "127.0.0.1:9", ESTABLISHED),
            line("[::1]:5", "[::1]:9", ESTABLISHED),
            line("10.1.1.2:5", "10.1.1.2:9", ESTABLISHED),
        ];
        assert_eq!(conversations(SocketProtocol::Tcp, &lines), []);
    }

    #[test]
    fn a_line_that_is_no_socket_is_passed_over() {
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
    fn a_long_table_is_cut_and_says_so() {
        let one = "0: 0100007F:0016 0200007F:0017 01\n";
        let table = |count: usize| format!("heading\n{}", one.repeat(count));
        let mut lines = Vec::new();
        assert!(read(table(LINES).as_bytes(), &mut lines).unwrap());
        assert_eq!(lines.len(), LINES);
        lines.clear();
        assert!(!read(table(LINES + 1).as_bytes(), &mut lines).unwrap());
        assert_eq!(lines.len(), LINES);
    }
}
