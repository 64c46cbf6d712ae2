//! Reads a query on its way from a pod to a resolver.

use super::{
    Name, PlainNameError,
    wire::{MESSAGE_MAX, Outline, Reader, TYPE_OPT, Truncated},
};

/// The bit DNSSEC OK of an OPT record's TTL (RFC 3225, section 3).
const DNSSEC_OK: u32 = 1 << 15;

/// The fields of a query that the agent's decision depends on, and those that the response must repeat.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one bit of the message"
)]
pub struct Question {
    /// Transaction id, host byte order.
    pub id: u16,
    /// The queried name.
    pub name: Name,
    /// The name's bytes as they were sent, including the root's zero byte. A response must repeat them with
    /// the same case: both the resolver and the stub resolver may rely on it against forged responses
    /// (draft-vixie-dnsext-dns0x20).
    pub name_as_sent: Box<[u8]>,
    /// QTYPE, host byte order.
    pub qtype: u16,
    /// QCLASS, host byte order.
    pub qclass: u16,
    /// Whether the query has an OPT record (EDNS, RFC 6891).
    pub edns: bool,
    /// DO, from the OPT record.
    pub dnssec_ok: bool,
    /// RD.
    pub recursion_desired: bool,
    /// CD (RFC 4035, section 3.2.2).
    pub checking_disabled: bool,
}

/// Why a message is no query that the agent can judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuestionError {
    /// The message ends before its question section.
    #[error("the message is too short")]
    TooShort,
    /// Over 65,535 bytes.
    #[error("the message is longer than {MESSAGE_MAX} bytes")]
    TooLong,
    /// QR is set.
    #[error("the message is a response")]
    Response,
    /// OPCODE is not QUERY.
    #[error("the opcode is {0}, not a query")]
    Opcode(u8),
    /// QDCOUNT is not 1. RFC 9619 forbids more.
    #[error("the message has {0} questions instead of one")]
    Questions(u16),
    /// Records in the answer or authority section, which a query does not have.
    #[error("the query has records in its answer or authority section")]
    Records,
    /// The name cannot be read.
    #[error("{0}")]
    Name(PlainNameError),
    /// More additional records than the one OPT record.
    #[error("the query has {0} additional records; at most one OPT record is accepted")]
    Additionals(u16),
    /// An additional record other than OPT: a TSIG or SIG(0) signature, or anything else.
    #[error("the query has an additional record of type {0}; at most one OPT record is accepted")]
    AdditionalType(u16),
    /// The OPT record's name is not the root, or its options are longer than the record.
    #[error("the OPT record is malformed")]
    Opt,
    /// Bytes after the last record, which could carry data out of the pod.
    #[error("{0} bytes follow the last record")]
    Trailing(usize),
}

/// Reads a query.
///
/// Accepts only what a stub resolver sends: a query with exactly one uncompressed name and at most one OPT
/// record. Anything else could only serve to carry data past the decision on the name.
///
/// # Errors
///
/// When the message is something else; see [`QuestionError`].
pub fn read_question(message: &[u8]) -> Result<Question, QuestionError> {
    if message.len() > MESSAGE_MAX {
        return Err(QuestionError::TooLong);
    }
    let mut reader = Reader::new(message);
    let header = reader.header()?;
    if header.is_response() {
        return Err(QuestionError::Response);
    }
    if header.opcode() != 0 {
        return Err(QuestionError::Opcode(header.opcode()));
    }
    if header.questions != 1 {
        return Err(QuestionError::Questions(header.questions));
    }
    if header.answers != 0 || header.authorities != 0 {
        return Err(QuestionError::Records);
    }
    let (wire, name) = reader.plain_name().map_err(QuestionError::Name)?;
    let qtype = reader.u16()?;
    let qclass = reader.u16()?;
    let opt = match header.additionals {
        0 => None,
        1 => Some(read_opt(reader.outline()?)?),
        more => return Err(QuestionError::Additionals(more)),
    };
    if reader.remaining() > 0 {
        return Err(QuestionError::Trailing(reader.remaining()));
    }
    Ok(Question {
        id: header.id,
        name,
        name_as_sent: wire.into(),
        qtype,
        qclass,
        edns: opt.is_some(),
        dnssec_ok: opt.is_some_and(|Opt { dnssec_ok }| dnssec_ok),
        recursion_desired: header.recursion_desired(),
        checking_disabled: header.checking_disabled(),
    })
}

struct Opt {
    dnssec_ok: bool,
}

fn read_opt(record: Outline<'_>) -> Result<Opt, QuestionError> {
    if record.record_type != TYPE_OPT {
        return Err(QuestionError::AdditionalType(record.record_type));
    }
    if !record.at_root {
        return Err(QuestionError::Opt);
    }
    let mut options = record.data;
    while !options.is_empty() {
        let [_, _, len_high, len_low, rest @ ..] = options else {
            return Err(QuestionError::Opt);
        };
        let len = usize::from(u16::from_be_bytes([*len_high, *len_low]));
        options = rest.get(len..).ok_or(QuestionError::Opt)?;
    }
    Ok(Opt {
        dnssec_ok: record.ttl & DNSSEC_OK != 0,
    })
}

impl From<Truncated> for QuestionError {
    fn from(Truncated: Truncated) -> Self {
        Self::TooShort
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packets::{Packet, record, wire_name};

    fn query(name: &str) -> Packet {
        Packet::query(name, 1)
    }

    #[test]
    fn a_plain_query_is_read() {
        let question = read_question(&query("GitHub.com").bytes()).unwrap();
        assert_eq!(question.id, Packet::ID);
        assert_eq!(question.name.to_string(), "github.com");
        assert_eq!(&*question.name_as_sent, b"\x06GitHub\x03com\0");
        assert_eq!((question.qtype, question.qclass), (1, 1));
        assert!(question.recursion_desired);
        assert!(!question.edns && !question.dnssec_ok && !question.checking_disabled);
    }

    #[test]
    fn a_query_for_the_root_is_read() {
        let question = read_question(&query("").bytes()).unwrap();
        assert_eq!(question.name.as_wire(), b"");
        assert_eq!(&*question.name_as_sent, b"\0");
    }

    #[test]
    fn edns_and_its_do_bit_are_read() {
        let mut opt = record(b"\0", TYPE_OPT, 1232, DNSSEC_OK, b"\0\x0a\0\x02hi");
        let question = read_question(&query("a.b").additional(&opt).bytes()).unwrap();
        assert!(question.edns && question.dnssec_ok);

        opt = record(b"\0", TYPE_OPT, 1232, 0, b"");
        let question = read_question(&query("a.b").additional(&opt).bytes()).unwrap();
        assert!(question.edns && !question.dnssec_ok);
    }

    #[test]
    fn options_that_overrun_their_record_are_refused() {
        for data in [&b"\0\x0a\0\x03hi"[..], b"\0", b"\0\x0a\0"] {
            let opt = record(b"\0", TYPE_OPT, 1232, 0, data);
            let error = read_question(&query("a.b").additional(&opt).bytes()).unwrap_err();
            assert_eq!(error, QuestionError::Opt, "{data:?}");
        }
        let opt = record(&wire_name("x"), TYPE_OPT, 1232, 0, b"");
        let error = read_question(&query("a.b").additional(&opt).bytes()).unwrap_err();
        assert_eq!(error, QuestionError::Opt);
    }

    #[test]
    fn other_additional_records_are_refused() {
        const TSIG: u16 = 250;
        let tsig = record(&wire_name("key"), TSIG, 255, 0, b"signature");
        let error = read_question(&query("a.b").additional(&tsig).bytes()).unwrap_err();
        assert_eq!(error, QuestionError::AdditionalType(TSIG));

        let opt = record(b"\0", TYPE_OPT, 1232, 0, b"");
        let twice = query("a.b").additional(&opt).additional(&opt).bytes();
        assert_eq!(read_question(&twice), Err(QuestionError::Additionals(2)));
    }

    #[test]
    fn a_response_or_another_opcode_is_no_query() {
        let response = query("a.b").flags(0x8180).bytes();
        assert_eq!(read_question(&response), Err(QuestionError::Response));
        let notify = query("a.b").flags(4 << 11).bytes();
        assert_eq!(read_question(&notify), Err(QuestionError::Opcode(4)));
    }

    #[test]
    fn exactly_one_question_is_accepted() {
        for count in [0, 2, 65_535] {
            let message = query("a.b").questions(count).bytes();
            assert_eq!(
                read_question(&message),
                Err(QuestionError::Questions(count))
            );
        }
    }

    #[test]
    fn records_in_the_answer_and_authority_sections_are_refused() {
        let answer = record(&wire_name("a.b"), 1, 1, 60, &[192, 0, 2, 1]);
        let message = query("a.b").answer(&answer).bytes();
        assert_eq!(read_question(&message), Err(QuestionError::Records));
        let message = query("a.b").authority(&answer).bytes();
        assert_eq!(read_question(&message), Err(QuestionError::Records));
    }

    #[test]
    fn bytes_after_the_question_are_refused() {
        let mut message = query("a.b").bytes();
        message.extend(b"secret");
        assert_eq!(read_question(&message), Err(QuestionError::Trailing(6)));
    }

    #[test]
    fn hostile_names_are_refused() {
        let name = |wire: &[u8]| {
            read_question(&Packet::query_of_wire(wire, 1).bytes()).map(|question| question.name)
        };
        assert_eq!(
            name(b"\xc0\x0c"),
            Err(QuestionError::Name(PlainNameError::Compressed))
        );
        assert_eq!(
            name(b"\x01a\xc0\x0c"),
            Err(QuestionError::Name(PlainNameError::Compressed))
        );
        assert_eq!(
            name(b"\x40aa\0"),
            Err(QuestionError::Name(PlainNameError::Label(0x40)))
        );
        assert_eq!(
            name(b"\x3faa\0"),
            Err(QuestionError::Name(PlainNameError::Truncated))
        );

        let label = [&[63][..], &[b'a'; 63]].concat();
        let almost = [&label.repeat(3)[..], &[61], &[b'a'; 61], &[0]].concat();
        assert_eq!(almost.len(), 255);
        assert!(name(&almost).is_ok());
        let over = [&label.repeat(3)[..], &[62], &[b'a'; 62], &[0]].concat();
        assert_eq!(
            name(&over),
            Err(QuestionError::Name(PlainNameError::TooLong))
        );
        let endless = b"\x01a".repeat(2000);
        assert_eq!(
            name(&endless),
            Err(QuestionError::Name(PlainNameError::TooLong))
        );
    }

    #[test]
    fn a_message_over_65535_bytes_is_refused() {
        let mut message = query("a.b").bytes();
        message.resize(65_536, 0);
        assert_eq!(read_question(&message), Err(QuestionError::TooLong));
    }

    #[test]
    fn a_query_cut_at_any_byte_is_an_error() {
        let opt = record(b"\0", TYPE_OPT, 1232, 0, b"\0\x0a\0\x02hi");
        let message = query("www.example.com").additional(&opt).bytes();
        for len in 0..message.len() {
            assert!(read_question(&message[..len]).is_err(), "cut at {len}");
        }
        assert!(read_question(&message).is_ok());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(message in prop::collection::vec(any::<u8>(), 0..600)) {
            _ = read_question(&message);
        }

        #[test]
        fn arbitrary_bytes_after_a_good_header_never_panic(
            rest in prop::collection::vec(any::<u8>(), 0..600),
        ) {
            let mut message = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
            message.extend(rest);
            if let Ok(question) = read_question(&message) {
                prop_assert!(question.name_as_sent.len() <= 255);
                prop_assert_eq!(question.name.as_wire().len() + 1, question.name_as_sent.len());
            }
        }

        #[test]
        fn an_encoded_message_is_read_back(
            labels in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..20), 0..8),
            qtype in any::<u16>(),
        ) {
            let mut wire = Vec::new();
            for label in &labels {
                wire.push(u8::try_from(label.len()).unwrap());
                wire.extend(label);
            }
            wire.push(0);
            let question = read_question(&Packet::query_of_wire(&wire, qtype).bytes()).unwrap();
            prop_assert_eq!(&*question.name_as_sent, &wire[..]);
            prop_assert_eq!(question.name, Name::from_labels(labels.iter().map(Vec::as_slice)).unwrap());
            prop_assert_eq!(question.qtype, qtype);
        }
    }
}
