//! A minimal DNS client: it sends one query and returns everything that arrives.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{
        RData, RecordType,
        rdata::{A, AAAA, opt::EdnsCode},
    },
};

use super::question;
use crate::{
    DEADLINE, Pod,
    addresses::{RESOLVER, RESOLVER6},
};

/// The response to a query.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Response code.
    pub code: ResponseCode,
    /// Every address in the answer section, in order.
    pub addresses: Vec<IpAddr>,
    /// The whole message.
    pub message: Message,
    /// The message's length.
    pub bytes: usize,
}

impl Answer {
    /// Reads a message.
    #[track_caller]
    pub fn read(bytes: &[u8]) -> Self {
        let message = Message::from_vec(bytes)
            .unwrap_or_else(|e| panic!("a pod received a malformed response: {e}"));
        let addresses = message
            .answers
            .iter()
            .filter_map(|record| match record.data {
                RData::A(A(v4)) => Some(v4.into()),
                RData::AAAA(AAAA(v6)) => Some(v6.into()),
                _ => None,
            })
            .collect();
        Self {
            code: message.metadata.response_code,
            addresses,
            message,
            bytes: bytes.len(),
        }
    }

    /// The extended error code (RFC 8914), if there is one.
    pub fn extended_error(&self) -> Option<u16> {
        const EXTENDED_DNS_ERROR: u16 = 15;
        let options = self.message.edns.as_ref()?.options();
        match options.get(EdnsCode::from(EXTENDED_DNS_ERROR))? {
            hickory_proto::rr::rdata::opt::EdnsOption::Unknown(_, data) => {
                Some(u16::from_be_bytes([*data.first()?, *data.get(1)?]))
            }
            _ => None,
        }
    }
}

/// A UDP socket in a pod. It is not connected, so it also receives responses from wrong sources.
#[derive(Debug)]
pub struct DnsSocket {
    socket: UdpSocket,
}

impl DnsSocket {
    /// Its own address and port.
    pub fn address(&self) -> SocketAddr {
        self.socket
            .local_addr()
            .expect("a bound socket has an address")
    }

    /// Sends these bytes to port 53 of `server`.
    #[track_caller]
    pub fn send(&self, server: IpAddr, bytes: &[u8]) {
        self.send_to((server, 53).into(), bytes);
    }

    /// Sends these bytes to `server`.
    #[track_caller]
    pub fn send_to(&self, server: SocketAddr, bytes: &[u8]) {
        self.socket.send_to(bytes, server).expect("send a datagram");
    }

    /// Sends a query; [`Self::receive`] returns the response.
    #[track_caller]
    pub fn ask(&self, server: IpAddr, id: u16, name: &str, qtype: RecordType) {
        self.send(server, &question(id, name, qtype));
    }

    /// The next datagram, and its source.
    pub fn receive(&self, timeout: Duration) -> Option<(Vec<u8>, SocketAddr)> {
        let deadline = Instant::now() + timeout;
        let mut buffer = vec![0; 65_535];
        loop {
            let left = deadline
                .checked_duration_since(Instant::now())
                .filter(|d| !d.is_zero())?;
            self.socket
                .set_read_timeout(Some(left))
                .expect("a time-out that is not zero");
            match self.socket.recv_from(&mut buffer) {
                Ok((length, from)) => {
                    buffer.truncate(length);
                    return Some((buffer, from));
                }
                // An ICMP error about an earlier datagram: the response may still arrive.
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => (),
                // A socket with a time-out does not go on by itself after a signal (signal(7)).
                Err(e) if e.kind() == io::ErrorKind::Interrupted => (),
                Err(_) => return None,
            }
        }
    }

    /// The next datagram, which must arrive and be a DNS message.
    #[track_caller]
    pub fn expect(&self, what: &str) -> Answer {
        let (bytes, _) = self
            .receive(DEADLINE)
            .unwrap_or_else(|| panic!("no response within {DEADLINE:?}: {what}"));
        Answer::read(&bytes)
    }
}

impl Pod {
    /// A UDP socket for DNS in this pod, on its IPv4 address.
    pub fn dns_socket(&self) -> DnsSocket {
        self.dns_socket_from(self.ipv4().into())
    }

    /// A UDP socket for DNS on its IPv6 address.
    pub fn dns_socket6(&self) -> DnsSocket {
        self.dns_socket_from(self.ipv6().into())
    }

    fn dns_socket_from(&self, address: IpAddr) -> DnsSocket {
        let socket = self.netns().run(|| UdpSocket::bind((address, 0)));
        DnsSocket {
            socket: socket.expect("bind a UDP socket in a pod"),
        }
    }

    /// Sends one query to the resolver, and waits for the response.
    #[track_caller]
    pub fn resolve(&self, name: &str, qtype: RecordType) -> Answer {
        self.resolve_at(RESOLVER, name, qtype)
    }

    /// Queries the resolver once for the name's A records; returns the addresses in the response.
    #[track_caller]
    pub fn lookup(&self, name: &str) -> Vec<IpAddr> {
        self.resolve(name, RecordType::A).addresses
    }

    /// Queries the resolver once over IPv6 for the name's AAAA records.
    #[track_caller]
    pub fn lookup6(&self, name: &str) -> Vec<IpAddr> {
        self.resolve_at(RESOLVER6, name, RecordType::AAAA).addresses
    }

    /// Sends one query to `server`, and waits for the response.
    #[track_caller]
    pub fn resolve_at(&self, server: IpAddr, name: &str, qtype: RecordType) -> Answer {
        self.try_resolve(server, name, qtype, DEADLINE)
            .unwrap_or_else(|| panic!("no response from {server} for {name} within {DEADLINE:?}"))
    }

    /// Sends one query to `server`; `None` when no response arrives in time.
    #[track_caller]
    pub fn try_resolve(
        &self,
        server: IpAddr,
        name: &str,
        qtype: RecordType,
        timeout: Duration,
    ) -> Option<Answer> {
        self.try_resolve_at((server, 53).into(), name, qtype, timeout)
    }

    /// Sends one query to this address and port; `None` when no response arrives in time.
    #[track_caller]
    pub fn try_resolve_at(
        &self,
        server: SocketAddr,
        name: &str,
        qtype: RecordType,
        timeout: Duration,
    ) -> Option<Answer> {
        static NEXT_ID: AtomicU16 = AtomicU16::new(1);
        let socket = self.dns_socket_from(self.address_for(server.ip()));
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        socket.send_to(server, &question(id, name, qtype));
        let (bytes, from) = socket.receive(timeout)?;
        assert_eq!(from, server, "the response for {name} came from elsewhere");
        let answer = Answer::read(&bytes);
        assert_eq!(
            answer.message.metadata.id, id,
            "the response for {name} has another id"
        );
        Some(answer)
    }
}
