//! Assertions that many tests share.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpStream},
    thread,
};

use crate::{
    Agent, DEADLINE, Denial, Pod, SHORT,
    addresses::server,
    dns::{Answer, RecordType, ResponseCode},
    echo_on, eventually, exchange,
};

impl Agent {
    /// Asserts that the pod cannot connect to this destination, gets no answer, and that the agent reports
    /// the reason.
    #[track_caller]
    pub fn denies_tcp(&self, pod: &Pod, to: (IpAddr, u16), reason: &str) -> Denial {
        let from = self.mark();
        match pod.connect_tcp(to, SHORT) {
            Ok(_) => panic!("{} reached {}:{}, which is denied", pod.name(), to.0, to.1),
            Err(e) => {
                assert_eq!(
                    e.kind(),
                    io::ErrorKind::TimedOut,
                    "a dropped SYN is not answered: {e}"
                );
            }
        }
        self.wait_denial_from(from, &format!("{reason} of tcp {}:{}", to.0, to.1), |d| {
            d.is(pod, reason, to.0, to.1) && d.protocol.as_deref() == Some("tcp")
        })
    }

    /// As [`Self::denies_tcp`], for several destinations at once.
    #[track_caller]
    pub fn denies_each_tcp(&self, pod: &Pod, denied: &[((IpAddr, u16), &str)]) {
        thread::scope(|scope| {
            for (to, reason) in denied {
                scope.spawn(|| self.denies_tcp(pod, *to, reason));
            }
        });
    }

    /// Asserts that a UDP datagram of the pod gets no echo, and that the agent reports the reason.
    #[track_caller]
    pub fn denies_udp(&self, pod: &Pod, to: (IpAddr, u16), reason: &str) -> Denial {
        let from = self.mark();
        assert!(
            !pod.echo_udp(to, b"may this pass?", SHORT),
            "{} reached udp {}:{}, which is denied",
            pod.name(),
            to.0,
            to.1
        );
        self.wait_denial_from(from, &format!("{reason} of udp {}:{}", to.0, to.1), |d| {
            d.is(pod, reason, to.0, to.1) && d.protocol.as_deref() == Some("udp")
        })
    }

    /// Asserts that the pod's query is answered with NXDOMAIN and that the agent reports it.
    #[track_caller]
    pub fn denies_name(&self, pod: &Pod, name: &str) -> (Answer, Denial) {
        let answer = pod.resolve(name, RecordType::A);
        assert_eq!(answer.code, ResponseCode::NXDomain, "{name} is not allowed");
        assert!(answer.message.answers.is_empty(), "{name} is not allowed");
        let denial = self.wait_denial(&format!("query for {name}"), |d| {
            d.is_question(pod, name) && d.reason == "dns_name"
        });
        (answer, denial)
    }
}

impl Pod {
    /// Connects to an echo server and exchanges data with it.
    #[track_caller]
    pub fn talks_tcp(&self, to: impl Into<SocketAddr>) -> TcpStream {
        let to = to.into();
        let mut stream = self.reach_tcp(to);
        assert!(
            exchange(&mut stream, b"hello", DEADLINE),
            "{}: no echo from {to}",
            self.name()
        );
        stream
    }

    /// Resolves a name and connects to its address, and exchanges data. Both are repeated until the connection is
    /// made within the TTL of a response.
    #[track_caller]
    pub fn talks_tcp_within_ttl(&self, name: &str, to: (IpAddr, u16)) -> TcpStream {
        let mut stream = eventually(&format!("a connection to {name}"), || {
            assert_eq!(self.lookup(name), [to.0]);
            self.connect_tcp(to, SHORT).ok()
        });
        assert!(
            exchange(&mut stream, b"hello", DEADLINE),
            "{}: no echo from {name}",
            self.name()
        );
        stream
    }

    /// Exchanges a datagram with an echo server.
    #[track_caller]
    pub fn talks_udp(&self, to: impl Into<SocketAddr>) {
        let to = to.into();
        let socket = self.udp_socket(to);
        assert!(
            echo_on(&socket, b"hello", DEADLINE),
            "{}: no echo from udp {to}",
            self.name()
        );
    }

    /// Asserts that the pod reaches `shop.test`, and no other name or address.
    #[track_caller]
    pub fn reaches_only_shop(&self) {
        assert_eq!(self.lookup("shop.test"), [server(10)]);
        self.talks_tcp((server(10), 443));
        assert!(!self.reaches(server(99)), "{} is open", self.name());
        let refused = self.resolve("evil.test", RecordType::A);
        assert_eq!(refused.code, ResponseCode::NXDomain);
    }
}
