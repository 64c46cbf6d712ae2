//! The agent's response to a query for a name that the rules do not allow.

use super::{
    Question,
    wire::{HEADER_BYTES, TYPE_OPT},
};

/// QR and RA; RD and CD are copied from the query.
const RESPONSE: u16 = 1 << 15 | 1 << 7;
const RECURSION_DESIRED: u16 = 1 << 8;
const CHECKING_DISABLED: u16 = 1 << 4;
/// DO, in the lower half of an OPT record's TTL.
const DNSSEC_OK: u16 = 1 << 15;

/// The UDP payload size to announce, in bytes: it fits an Ethernet frame over IPv6 with any tunnel on the way
/// (DNS Flag Day 2020). Nothing is sent to the agent because of it.
const PAYLOAD_BYTES: u16 = 1232;

/// Option code "Extended DNS Error" (RFC 8914, section 2).
const EXTENDED_ERROR: u16 = 15;
/// Info code "Prohibited" (RFC 8914, section 4.19).
const PROHIBITED: u16 = 18;
const EXTRA_TEXT: &str = "the pod's egress policy does not allow this name";

/// The kind of response to a query for a name that the rules do not allow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Refusal {
    /// The name does not exist. Every libc continues with the next name of its search list.
    #[default]
    NxDomain,
    /// The server refuses. Some libcs give up; others query the next server.
    Refused,
}

impl Refusal {
    /// The RCODE (RFC 1035, section 4.1.1).
    pub fn response_code(self) -> u8 {
        match self {
            Self::NxDomain => 3,
            Self::Refused => 5,
        }
    }
}

/// The response that refuses a query: a complete DNS message.
///
/// It has no SOA record, so that a cache between the program and the agent must not keep it (RFC 2308,
/// section 5): an edited policy takes effect at once. If the query has EDNS, the response has the extended
/// error "Prohibited" (RFC 8914).
pub fn refuse(question: &Question, how: Refusal) -> Vec<u8> {
    let mut flags = RESPONSE | u16::from(how.response_code());
    if question.recursion_desired {
        flags |= RECURSION_DESIRED;
    }
    if question.checking_disabled {
        flags |= CHECKING_DISABLED;
    }
    let mut message = Vec::with_capacity(HEADER_BYTES + question.name_as_sent.len() + 80);
    for field in [question.id, flags, 1, 0, 0, u16::from(question.edns)] {
        message.extend(field.to_be_bytes());
    }
    message.extend(&*question.name_as_sent);
    message.extend(question.qtype.to_be_bytes());
    message.extend(question.qclass.to_be_bytes());
    if question.edns {
        let option_len = 2 + EXTRA_TEXT.len() as u16;
        let opt_flags = if question.dnssec_ok { DNSSEC_OK } else { 0 };
        message.push(0);
        // The TTL of an OPT record: the RCODE's upper bits and the version, both zero, then flags.
        for field in [TYPE_OPT, PAYLOAD_BYTES, 0, opt_flags, 4 + option_len] {
            message.extend(field.to_be_bytes());
        }
        for field in [EXTENDED_ERROR, option_len, PROHIBITED] {
            message.extend(field.to_be_bytes());
        }
        message.extend(EXTRA_TEXT.as_bytes());
    }
    message
}

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::{Message, MessageType, ResponseCode},
        rr::rdata::opt::{EdnsCode, EdnsOption},
    };

    use super::*;
    use crate::{
        packets::{Packet, record},
        read_answer, read_question,
    };

    fn question(packet: &Packet) -> Question {
        read_question(&packet.bytes()).unwrap()
    }

    #[test]
    fn a_refusal_echoes_the_question() {
        let question = question(&Packet::query("ExAmple.com", 28));
        let bytes = refuse(&question, Refusal::NxDomain);

        let answer = read_answer(&bytes).unwrap();
        assert_eq!(answer.id, question.id);
        assert_eq!(answer.name_as_sent, question.name_as_sent);
        assert_eq!((answer.qtype, answer.qclass), (28, 1));
        assert_eq!(answer.response_code, 3);

        let message = Message::from_vec(&bytes).unwrap();
        assert_eq!(message.metadata.message_type, MessageType::Response);
        assert_eq!(message.metadata.response_code, ResponseCode::NXDomain);
        assert!(message.metadata.recursion_desired && message.metadata.recursion_available);
        assert!(message.answers.is_empty() && message.authorities.is_empty());
        assert!(message.edns.is_none());
    }

    #[test]
    fn the_refusal_refused_has_the_response_code_refused() {
        let bytes = refuse(
            &question(&Packet::query("a.b", 1).flags(0x0010)),
            Refusal::Refused,
        );
        let message = Message::from_vec(&bytes).unwrap();
        assert_eq!(message.metadata.response_code, ResponseCode::Refused);
        assert!(message.metadata.checking_disabled && !message.metadata.recursion_desired);
    }

    #[test]
    fn a_refusal_of_a_query_with_edns_has_an_extended_error() {
        let opt = record(b"\0", TYPE_OPT, 1232, 0x8000, b"");
        let bytes = refuse(
            &question(&Packet::query("a.b", 1).additional(&opt)),
            Refusal::NxDomain,
        );
        let message = Message::from_vec(&bytes).unwrap();
        let edns = message.edns.unwrap();
        assert!(edns.flags().dnssec_ok);
        let option = edns.option(EdnsCode::Unknown(EXTENDED_ERROR)).unwrap();
        let EdnsOption::Unknown(_, data) = option else {
            panic!("{option:?}")
        };
        let (code, text) = data.split_at(2);
        assert_eq!(code, PROHIBITED.to_be_bytes());
        assert_eq!(text, EXTRA_TEXT.as_bytes());
    }
}
