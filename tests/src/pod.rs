//! A pod, and methods of programs in it.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::{DEADLINE, Namespace, Running, SHORT};

/// A pod: a network namespace with one interface.
#[derive(Debug)]
pub struct Pod {
    namespace: String,
    name: String,
    netns: Namespace,
    interface: String,
    ipv4: Ipv4Addr,
    ipv6: Ipv6Addr,
}

impl Pod {
    pub(crate) fn new(
        namespace: &str,
        name: &str,
        netns: Namespace,
        interface: String,
        ipv4: Ipv4Addr,
        ipv6: Ipv6Addr,
    ) -> Self {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        Self {
            namespace,
            name,
            netns,
            interface,
            ipv4,
            ipv6,
        }
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The pod's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `metadata.uid`.
    pub fn uid(&self) -> String {
        let number = self.ipv4.octets()[2];
        format!("00000000-0000-4000-8000-{number:012}")
    }

    /// The network namespace.
    pub fn netns(&self) -> &Namespace {
        &self.netns
    }

    /// The name of the interface's host end.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// The IPv4 address.
    pub fn ipv4(&self) -> Ipv4Addr {
        self.ipv4
    }

    /// The IPv6 address.
    pub fn ipv6(&self) -> Ipv6Addr {
        self.ipv6
    }

    /// The address of the same family as `peer`.
    pub fn address_for(&self, peer: IpAddr) -> IpAddr {
        match peer {
            IpAddr::V4(_) => self.ipv4.into(),
            IpAddr::V6(_) => self.ipv6.into(),
        }
    }

    /// The hardware address of the pod's end of its interface.
    pub fn hardware(&self) -> [u8; 6] {
        [2, 0, 0, 0, self.ipv4.octets()[2], 2]
    }

    /// The hardware address of the node's end.
    pub fn gateway_hardware(&self) -> [u8; 6] {
        [2, 0, 0, 0, self.ipv4.octets()[2], 1]
    }

    /// Connects. The kind of the error shows the cause: `TimedOut` when no answer arrived.
    pub fn connect_tcp(
        &self,
        to: impl Into<SocketAddr>,
        timeout: Duration,
    ) -> io::Result<TcpStream> {
        let to = to.into();
        self.netns.run(|| {
            let stream = TcpStream::connect_timeout(&to, timeout)?;
            stream.set_read_timeout(Some(timeout))?;
            Ok(stream)
        })
    }

    /// True if the pod connects to port 443 of this address within a short time, which a busy machine may exceed:
    /// for connections that are expected to fail, and for [`eventually`](crate::eventually).
    pub fn reaches(&self, to: IpAddr) -> bool {
        self.connect_tcp((to, 443), SHORT).is_ok()
    }

    /// Connects; panics if that fails.
    #[track_caller]
    pub fn reach_tcp(&self, to: impl Into<SocketAddr>) -> TcpStream {
        let to = to.into();
        self.connect_tcp(to, DEADLINE)
            .unwrap_or_else(|e| panic!("{} cannot connect to {to}: {e}", self.name))
    }

    /// Sends a datagram and waits for its echo.
    pub fn echo_udp(&self, to: impl Into<SocketAddr>, payload: &[u8], timeout: Duration) -> bool {
        let to = to.into();
        let socket = self.udp_socket(to);
        echo_on(&socket, payload, timeout)
    }

    /// A UDP socket connected to `to`.
    #[track_caller]
    pub fn udp_socket(&self, to: impl Into<SocketAddr>) -> UdpSocket {
        let to = to.into();
        let own = self.address_for(to.ip());
        self.netns.run(|| {
            let socket = UdpSocket::bind((own, 0)).expect("bind a UDP socket in a pod");
            socket
                .connect(to)
                .unwrap_or_else(|e| panic!("connect a UDP socket to {to}: {e}"));
            socket
        })
    }

    /// Sends an ICMP echo request and waits for the reply.
    #[track_caller]
    pub fn ping(&self, to: IpAddr, timeout: Duration) -> bool {
        const ECHO_REQUEST: u8 = 8;
        const ECHO_REQUEST_V6: u8 = 128;
        const ECHO_REPLY: u8 = 0;
        const ECHO_REPLY_V6: u8 = 129;
        let (domain, protocol, request, reply) = match to {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, ECHO_REQUEST, ECHO_REPLY),
            IpAddr::V6(_) => (
                Domain::IPV6,
                Protocol::ICMPV6,
                ECHO_REQUEST_V6,
                ECHO_REPLY_V6,
            ),
        };
        let mut socket = self
            .netns
            .run(|| Socket::new(domain, Type::DGRAM, Some(protocol)))
            .expect("an ICMP echo socket");
        socket
            .connect(&SocketAddr::new(to, 0).into())
            .expect("connect an ICMP echo socket");
        socket
            .set_read_timeout(Some(timeout))
            .expect("a time-out that is not zero");
        // The kernel fills in the checksum and the identifier.
        let message = [request, 0, 0, 0, 0, 0, 0, 1, b'e', b'g'];
        if socket.write_all(&message).is_err() {
            return false;
        }
        let mut answer = [0; 64];
        matches!(socket.read(&mut answer), Ok(length) if length == message.len())
            && answer[0] == reply
    }

    /// The number of SYN packets that the pod's kernel has retransmitted.
    #[track_caller]
    pub fn syn_retransmissions(&self) -> u64 {
        self.netns.counter("TcpExt:", "TCPSynRetrans")
    }

    /// Listens on a TCP port of the pod.
    #[track_caller]
    pub fn listen_tcp(&self, port: u16) -> TcpListener {
        self.netns
            .run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)))
            .unwrap_or_else(|e| panic!("listen on port {port} of a pod: {e}"))
    }

    /// Runs a program in the pod's network until it is dropped.
    #[track_caller]
    pub fn start(&self, command: &mut Command) -> Running {
        Running::start(&self.netns, command)
    }
}

/// Sends `payload` through a stream to an echo server; true if it came back.
pub fn exchange(stream: &mut TcpStream, payload: &[u8], timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    if stream.write_all(payload).is_err() {
        return false;
    }
    let mut received = Vec::new();
    let mut buffer = [0; 4096];
    while received.len() < payload.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || stream.set_read_timeout(Some(left)).is_err() {
            return false;
        }
        match stream.read(&mut buffer) {
            Ok(length @ 1..) => received.extend_from_slice(&buffer[..length]),
            _ => return false,
        }
    }
    received == payload
}

/// Sends `payload` through a connected socket to an echo server; true if it came back.
pub fn echo_on(socket: &UdpSocket, payload: &[u8], timeout: Duration) -> bool {
    socket
        .set_read_timeout(Some(timeout))
        .expect("a time-out that is not zero");
    if socket.send(payload).is_err() {
        return false;
    }
    let mut buffer = vec![0; 65_535];
    matches!(socket.recv(&mut buffer), Ok(length) if buffer[..length] == *payload)
}
