//! A DNS server whose responses a test defines, to the byte.

use std::{
    collections::HashMap,
    fmt,
    io::{self, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd as _,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{RData, RecordType},
};
use nix::poll::{PollFd, PollFlags, poll};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Record, Send, address, framed, read_message};
use crate::{Namespace, addresses};

const PORT: u16 = 53;
/// An idle connection is closed after this time.
const STREAM_PATIENCE: Duration = Duration::from_secs(15);
/// The same as for the standard library's listeners.
const BACKLOG: i32 = 128;
const STOP_POLL_MILLISECONDS: u16 = 50;

/// A query as the server received it.
#[derive(Clone, Debug)]
pub struct Question {
    /// The queried name, without a trailing dot; letters keep their case.
    pub name: String,
    /// The record type.
    pub qtype: RecordType,
    /// Transaction id.
    pub id: u16,
    /// The client.
    pub from: SocketAddr,
    /// The server address to which the query was sent.
    pub to: SocketAddr,
    /// True if it came over TCP.
    pub tcp: bool,
    /// The longest response over UDP that the client accepts (RFC 6891, section 6.2.3).
    pub payload: u16,
}

type Handler = Arc<dyn Fn(&Question) -> Vec<Send> + std::marker::Send + Sync>;

#[derive(Default)]
struct Zone {
    /// By name in lower case; the key `*.suffix` covers every name below the suffix.
    handlers: Mutex<HashMap<String, Handler>>,
    seen: Mutex<Vec<Question>>,
    stop: AtomicBool,
}

impl Zone {
    fn handlers(&self) -> MutexGuard<'_, HashMap<String, Handler>> {
        self.handlers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seen(&self) -> MutexGuard<'_, Vec<Question>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handler(&self, name: &str) -> Option<Handler> {
        let handlers = self.handlers();
        let name = name.to_ascii_lowercase();
        if let Some(handler) = handlers.get(&name) {
            return Some(Arc::clone(handler));
        }
        let mut rest = name.as_str();
        while let Some((_, parent)) = rest.split_once('.') {
            if let Some(handler) = handlers.get(&format!("*.{parent}")) {
                return Some(Arc::clone(handler));
            }
            rest = parent;
        }
        None
    }

    fn replies(&self, bytes: &[u8], from: SocketAddr, to: SocketAddr, tcp: bool) -> Vec<Send> {
        let Ok(message) = Message::from_vec(bytes) else {
            return Vec::new();
        };
        let Some(query) = message.queries.first() else {
            return Vec::new();
        };
        let question = Question {
            name: query.name().to_ascii().trim_end_matches('.').to_owned(),
            qtype: query.query_type(),
            id: message.metadata.id,
            from,
            to,
            tcp,
            payload: message.max_payload(),
        };
        self.seen().push(question.clone());
        match self.handler(&question.name) {
            Some(handler) => handler(&question),
            None => vec![Send::code(&question, ResponseCode::NXDomain)],
        }
    }
}

/// A DNS server on UDP and TCP ports of some addresses, stopped when dropped. It responds with NXDOMAIN to
/// names without a handler.
pub struct DnsServer {
    zone: Arc<Zone>,
    sockets: Arc<Vec<(SocketAddr, UdpSocket)>>,
    threads: Vec<JoinHandle<()>>,
}

impl fmt::Debug for DnsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DnsServer")
            .field("sockets", &self.sockets)
            .finish_non_exhaustive()
    }
}

impl DnsServer {
    #[track_caller]
    pub(crate) fn start(namespace: &Namespace, on: &[IpAddr]) -> Self {
        let on: Vec<SocketAddr> = on.iter().map(|&ip| SocketAddr::new(ip, PORT)).collect();
        Self::start_at(namespace, &on)
    }

    #[track_caller]
    pub(crate) fn start_at(namespace: &Namespace, on: &[SocketAddr]) -> Self {
        let zone = Arc::<Zone>::default();
        let (sockets, threads) = namespace.run(|| {
            let bound = on.iter().map(|&address| {
                let udp = UdpSocket::bind(address).expect("a UDP port of the resolver");
                let tcp = listener(address).expect("a TCP port of the resolver");
                tcp.set_nonblocking(true).expect("a non-blocking listener");
                ((address, udp), tcp)
            });
            let (sockets, listeners): (Vec<_>, Vec<_>) = bound.unzip();
            let sockets = Arc::new(sockets);
            // A thread inherits the namespace of the thread that started it.
            let udp = {
                let (zone, sockets) = (Arc::clone(&zone), Arc::clone(&sockets));
                thread::spawn(move || serve_udp(&zone, &sockets))
            };
            let tcp = {
                let zone = Arc::clone(&zone);
                thread::spawn(move || serve_tcp(&zone, &listeners))
            };
            (sockets, vec![udp, tcp])
        });
        Self {
            zone,
            sockets,
            threads,
        }
    }

    /// Responds to queries for a name (or `*.suffix`, every name below it) with those of these records that
    /// have the queried type, and with the CNAMEs among them.
    pub fn answer(&self, name: &str, records: impl Into<Vec<Record>>) {
        let records = records.into();
        self.on(name, move |asked| {
            let wanted: Vec<Record> = records
                .iter()
                .filter(|r| {
                    matches!(r.data, RData::CNAME(_)) || r.data.record_type() == asked.qtype
                })
                .cloned()
                .collect();
            vec![Send::answer(asked, &wanted)]
        });
    }

    /// Responds to queries for a name with these addresses.
    pub fn addresses(&self, name: &str, addresses: &[IpAddr]) {
        self.answer(
            name,
            addresses.iter().copied().map(address).collect::<Vec<_>>(),
        );
    }

    /// Responds to queries for `n<number>.<suffix>` with [`addresses::numbered`].
    pub fn numbered(&self, suffix: &str) {
        self.on(&format!("*.{suffix}"), |asked| {
            let number = asked
                .name
                .split('.')
                .next()
                .and_then(|l| l.strip_prefix('n')?.parse().ok());
            match number {
                Some(n) if asked.qtype == RecordType::A => {
                    vec![Send::answer(asked, &[address(addresses::numbered(n))])]
                }
                Some(_) => vec![Send::answer(asked, &[])],
                None => vec![Send::code(asked, ResponseCode::NXDomain)],
            }
        });
    }

    /// Responds to queries for a name (or `*.suffix`) with the messages that `handler` returns. Over TCP
    /// their sources and delays are ignored.
    pub fn on(
        &self,
        name: &str,
        handler: impl Fn(&Question) -> Vec<Send> + std::marker::Send + Sync + 'static,
    ) {
        self.zone
            .handlers()
            .insert(name.to_ascii_lowercase(), Arc::new(handler));
    }

    /// Sends an unsolicited datagram from port 53 of one of the server's addresses.
    #[track_caller]
    pub fn send(&self, from: IpAddr, to: SocketAddr, bytes: &[u8]) {
        let (_, socket) = self
            .sockets
            .iter()
            .find(|(address, _)| address.ip() == from)
            .expect("an address of this server");
        socket.send_to(bytes, to).expect("send a datagram");
    }

    /// All queries so far.
    pub fn questions(&self) -> Vec<Question> {
        self.zone.seen().clone()
    }

    /// The number of queries for a name, in any letter case.
    pub fn queries_for(&self, name: &str) -> usize {
        self.zone
            .seen()
            .iter()
            .filter(|q| q.name.eq_ignore_ascii_case(name))
            .count()
    }
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        self.zone.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            if !thread::panicking() {
                ended.expect("no handler of the DNS server panics");
            }
        }
    }
}

/// A listener with multipath TCP if the kernel supports it, as Go programs have by default.
fn listener(address: SocketAddr) -> io::Result<TcpListener> {
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::MPTCP))
        .or_else(|_| Socket::new(domain, Type::STREAM, Some(Protocol::TCP)))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn serve_udp(zone: &Zone, sockets: &Arc<Vec<(SocketAddr, UdpSocket)>>) {
    let mut buffer = vec![0; 65_535];
    while !zone.stop.load(Ordering::Relaxed) {
        let mut polled: Vec<_> = sockets
            .iter()
            .map(|(_, s)| PollFd::new(s.as_fd(), PollFlags::POLLIN))
            .collect();
        poll(&mut polled, STOP_POLL_MILLISECONDS).expect("poll(2)");
        let readable: Vec<_> = polled.iter().map(|p| p.any() == Some(true)).collect();
        for ((to, socket), _) in sockets
            .iter()
            .zip(readable)
            .filter(|(_, readable)| *readable)
        {
            let Ok((length, from)) = socket.recv_from(&mut buffer) else {
                continue;
            };
            for reply in zone.replies(&buffer[..length], from, *to, false) {
                if reply.after.is_zero() {
                    transmit(sockets, &reply, *to, from);
                } else {
                    let (sockets, to) = (Arc::clone(sockets), *to);
                    thread::spawn(move || {
                        thread::sleep(reply.after);
                        transmit(&sockets, &reply, to, from);
                    });
                }
            }
        }
    }
}

fn transmit(sockets: &[(SocketAddr, UdpSocket)], reply: &Send, asked: SocketAddr, to: SocketAddr) {
    let source = reply.from.unwrap_or(asked);
    let sent = match sockets.iter().find(|(address, _)| *address == source) {
        Some((_, socket)) => socket.send_to(&reply.bytes, to),
        None => UdpSocket::bind(source).and_then(|socket| socket.send_to(&reply.bytes, to)),
    };
    sent.unwrap_or_else(|e| panic!("send a response from {source} to {to}: {e}"));
}

fn serve_tcp(zone: &Arc<Zone>, listeners: &[TcpListener]) {
    while !zone.stop.load(Ordering::Relaxed) {
        let mut polled: Vec<_> = listeners
            .iter()
            .map(|l| PollFd::new(l.as_fd(), PollFlags::POLLIN))
            .collect();
        poll(&mut polled, STOP_POLL_MILLISECONDS).expect("poll(2)");
        for listener in listeners {
            if let Ok((stream, from)) = listener.accept() {
                let zone = Arc::clone(zone);
                thread::spawn(move || serve_stream(&zone, stream, from));
            }
        }
    }
}

fn serve_stream(zone: &Zone, mut stream: TcpStream, from: SocketAddr) -> Option<()> {
    stream.set_nonblocking(false).ok()?;
    // Each write is a segment.
    stream.set_nodelay(true).ok()?;
    stream.set_read_timeout(Some(STREAM_PATIENCE)).ok()?;
    let to = stream.local_addr().ok()?;
    while let Ok(message) = read_message(&mut stream) {
        for reply in zone.replies(&message, from, to, true) {
            let bytes = framed(&reply.bytes);
            for piece in bytes.chunks(reply.piece_bytes.unwrap_or(bytes.len())) {
                stream.write_all(piece).ok()?;
            }
        }
    }
    Some(())
}
