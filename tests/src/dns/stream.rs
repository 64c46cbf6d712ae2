//! DNS over TCP: messages with their length prefix, and a client for hand-made messages.

use std::{
    collections::HashMap,
    io::{self, ErrorKind, Read, Write as _},
    net::{IpAddr, TcpStream},
};

use hickory_proto::{op::ResponseCode, rr::RecordType};

use super::{Answer, question};
use crate::Pod;

/// A message with its length prefix (RFC 1035, section 4.2.2).
#[track_caller]
pub fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).expect("a message has at most 65,535 bytes");
    [&length.to_be_bytes(), message].concat()
}

/// A query for the A records of a name, with its length prefix.
#[track_caller]
pub fn framed_query(id: u16, name: &str) -> Vec<u8> {
    framed(&question(id, name, RecordType::A))
}

/// Reads one message, without its length prefix.
///
/// # Errors
///
/// When the stream ends before the message does, or cannot be read.
pub fn read_message(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message)?;
    Ok(message)
}

/// A connection of a pod to a resolver.
#[derive(Debug)]
pub struct DnsStream {
    /// The connection itself.
    pub tcp: TcpStream,
}

impl DnsStream {
    /// Connects to port 53 of this resolver.
    #[track_caller]
    pub fn open(pod: &Pod, resolver: IpAddr) -> Self {
        let tcp = pod.reach_tcp((resolver, 53));
        Self { tcp }
    }

    /// As [`Self::open`]; each write is a segment.
    #[track_caller]
    pub fn open_without_delay(pod: &Pod, resolver: IpAddr) -> Self {
        let stream = Self::open(pod, resolver);
        stream.tcp.set_nodelay(true).expect("TCP_NODELAY");
        stream
    }

    /// Sends a query for the A records of a name.
    #[track_caller]
    pub fn ask(&mut self, id: u16, name: &str) {
        self.write(&framed_query(id, name));
    }

    /// Sends these bytes, which include the length prefix of a message.
    #[track_caller]
    pub fn write(&mut self, bytes: &[u8]) {
        self.tcp.write_all(bytes).expect("write to a connection");
    }

    /// The next message; `None` when the connection has ended.
    #[track_caller]
    pub fn receive(&mut self) -> Option<Answer> {
        let message = read_message(&mut self.tcp).ok()?;
        Some(Answer::read(&message))
    }

    /// The next message, which must have this id.
    #[track_caller]
    pub fn expect(&mut self, id: u16) -> Answer {
        let answer = self.receive();
        let answer = answer.unwrap_or_else(|| panic!("no response {id}"));
        assert_eq!(answer.message.metadata.id, id);
        answer
    }

    /// Asserts that the next message is the refusal of this query.
    #[track_caller]
    pub fn expect_refusal(&mut self, id: u16) {
        assert_eq!(self.expect(id).code, ResponseCode::NXDomain);
    }

    /// The next `count` responses, by their id. Each comes once.
    #[track_caller]
    pub fn expect_all(&mut self, count: usize) -> HashMap<u16, Answer> {
        let mut answers = HashMap::new();
        for _ in 0..count {
            let answer = self.receive().expect("a response");
            let known = answers.insert(answer.message.metadata.id, answer);
            assert!(known.is_none(), "answered twice");
        }
        answers
    }

    /// Asserts that the connection ends without another message.
    #[track_caller]
    pub fn assert_ends(&mut self) {
        // (Unlike `read`, `read_exact` continues after a signal.)
        match self.tcp.read_exact(&mut [0]) {
            Ok(()) => panic!("something was delivered"),
            Err(e) => assert!(
                [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset].contains(&e.kind()),
                "{e}"
            ),
        }
    }
}
