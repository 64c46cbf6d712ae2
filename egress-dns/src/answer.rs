//! Reading an answer on its way from a resolver to a pod: which addresses it gives for the name
//! that was asked.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use egress_common::address::{self, Address};
use hickory_proto::{
    rr::{Name as OwnerName, RData, Record, rdata::SVCB, rdata::svcb::SvcParamValue},
    serialize::binary::{BinDecodable, BinDecoder, DecodeError},
};

use super::{
    Name, PlainNameError,
    wire::{CLASS_IN, HEADER_BYTES, Header, MESSAGE_MAX, Outline, RECORD_MIN, Reader, Truncated},
};

/// Most aliases followed from the asked name. Resolvers follow fewer (BIND and unbound stop at 11),
/// so a longer chain comes from nobody honest; following it is work for the gate.
pub const ALIASES_MAX: usize = 16;

/// RCODE: the server could not read the question.
const FORMAT_ERROR: u8 = 1;
/// RCODE: the server does not do what was asked.
const NOT_IMPLEMENTED: u8 = 4;

const TYPE_A: u16 = 1;
const TYPE_CNAME: u16 = 5;
const TYPE_AAAA: u16 = 28;
const TYPE_SVCB: u16 = 64;
const TYPE_HTTPS: u16 = 65;

/// What an answer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Transaction id, host byte order.
    pub id: u16,
    /// The name of the question it answers.
    pub name: Name,
    /// The name's bytes as they stand in the message, the root's zero byte included.
    pub name_as_sent: Box<[u8]>,
    /// QTYPE of the question, host byte order.
    pub qtype: u16,
    /// QCLASS of the question, host byte order.
    pub qclass: u16,
    /// TC: the rest is to be fetched over TCP.
    pub truncated: bool,
    /// RCODE, without the upper bits that EDNS adds.
    pub response_code: u8,
    /// The aliases that hang together from the asked name, in the order in which they were reached.
    pub aliases: Vec<Alias>,
    /// The addresses it gives for the asked name, in the order of the message; an address that is
    /// given twice is here twice. Empty unless the class is IN and the RCODE is NOERROR.
    pub addresses: Vec<Learned>,
}

/// A name that an alias led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alias {
    /// The name.
    pub name: Name,
    /// The alias whose name it is the alias of; `None` for one of the asked name.
    pub of: Option<usize>,
}

impl Answer {
    /// The names from the one that has the address back to the asked one.
    pub fn way_to<'a>(&'a self, learned: &Learned) -> impl Iterator<Item = &'a Name> {
        let mut next = Some(learned.at);
        std::iter::from_fn(move || {
            let at = next.take()?;
            let Some(alias) = at.and_then(|index| self.aliases.get(index)) else {
                return Some(&self.name);
            };
            next = Some(alias.of);
            Some(&alias.name)
        })
    }
}

/// An address that an answer gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Learned {
    /// The address.
    pub address: Address,
    /// The alias whose name has it; `None` for the asked name.
    pub at: Option<usize>,
    /// The lowest TTL of the chain from the asked name to the address, in seconds, as it stands in
    /// the message; one with its highest bit set counts as zero (RFC 2181, section 8).
    pub ttl: u32,
}

/// Why a message is no answer that can be judged.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The message ends before its last record does.
    #[error("the message is too short")]
    TooShort,
    /// Over 65,535 bytes.
    #[error("the message is longer than {MESSAGE_MAX} bytes")]
    TooLong,
    /// QR is not set.
    #[error("the message is a question")]
    Question,
    /// OPCODE is not QUERY.
    #[error("the opcode is {0}, not a query")]
    Opcode(u8),
    /// QDCOUNT is not 1.
    #[error("the message has {0} questions instead of one")]
    Questions(u16),
    /// The question's name cannot be read.
    #[error("{0}")]
    Name(PlainNameError),
    /// The header promises more records than there is room for.
    #[error("the message has no room for the {0} records it announces")]
    Counts(usize),
    /// A record that would be learned from cannot be read.
    #[error("a record at offset {offset} cannot be read: {error}")]
    Record {
        /// Bytes from the start of the message.
        offset: usize,
        /// What is wrong with it.
        error: DecodeError,
    },
    /// More than [`ALIASES_MAX`] aliases hang together from the asked name.
    #[error("the name has more than {ALIASES_MAX} aliases")]
    Aliases,
}

/// Reads an answer.
///
/// From the asked name on, aliases are followed in whatever order the answer section has them:
/// CNAME records, and SVCB and HTTPS records in alias mode (RFC 9460, section 2.4.2). The addresses
/// of A and AAAA records and the hints of SVCB and HTTPS records at the names so reached count,
/// whatever type was asked for; every other record is ignored. A DNAME record is one of those: the
/// resolver sends the CNAME records it stands for along with it (RFC 6672, section 3.1). So is
/// everything in the authority and additional sections, whose outline only is walked.
///
/// A truncated answer may end in the middle of a record. What stands before that counts: some
/// programs use it.
///
/// # Errors
///
/// When the message is no answer, or could say something that has not been understood; see
/// [`AnswerError`].
pub fn read_answer(message: &[u8]) -> Result<Answer, AnswerError> {
    if message.len() > MESSAGE_MAX {
        return Err(AnswerError::TooLong);
    }
    let mut reader = Reader::new(message);
    let (header, mut answer) = read_question_section(&mut reader)?;
    let teaches = header.response_code() == 0 && answer.qclass == CLASS_IN;
    let facts = read_records(message, &mut reader, header, teaches)?;
    if !facts.is_empty() {
        (answer.aliases, answer.addresses) = follow(asked_name(message)?, &facts)?;
    }
    Ok(answer)
}

/// Reads a response that says no more than that the question was not understood, and does not repeat it
/// (RFC 1035, section 4.1.1, RCODE 1 and 4). Returns its id, or `None` for every other message.
///
/// It has no answer and no authority record, and so teaches nothing.
pub fn read_rejection(message: &[u8]) -> Option<u16> {
    let header = Reader::new(message).header().ok()?;
    let is_rejection = message.len() <= MESSAGE_MAX
        && header.is_response()
        && header.opcode() == 0
        && matches!(header.response_code(), FORMAT_ERROR | NOT_IMPLEMENTED)
        && (header.questions, header.answers, header.authorities) == (0, 0, 0);
    is_rejection.then_some(header.id)
}

/// Reads what the beginning of an answer says: all but the addresses. `None` when it ends before the
/// question does.
///
/// # Errors
///
/// When no answer begins so; see [`AnswerError`].
pub fn read_beginning(message: &[u8]) -> Result<Option<Answer>, AnswerError> {
    match read_question_section(&mut Reader::new(message)) {
        Ok((_, answer)) => Ok(Some(answer)),
        Err(AnswerError::TooShort | AnswerError::Name(PlainNameError::Truncated)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn read_question_section(reader: &mut Reader<'_>) -> Result<(Header, Answer), AnswerError> {
    let header = reader.header()?;
    if !header.is_response() {
        return Err(AnswerError::Question);
    }
    if header.opcode() != 0 {
        return Err(AnswerError::Opcode(header.opcode()));
    }
    if header.questions != 1 {
        return Err(AnswerError::Questions(header.questions));
    }
    let (wire, name) = reader.plain_name().map_err(AnswerError::Name)?;
    let qtype = reader.u16()?;
    let qclass = reader.u16()?;
    let answer = Answer {
        id: header.id,
        name,
        name_as_sent: wire.into(),
        qtype,
        qclass,
        truncated: header.truncated(),
        response_code: header.response_code(),
        aliases: Vec::new(),
        addresses: Vec::new(),
    };
    Ok((header, answer))
}

/// A record that may teach something.
struct Fact {
    owner: OwnerName,
    /// Seconds.
    ttl: u32,
    says: Says,
}

enum Says {
    Alias(OwnerName),
    Address(Address),
    Hints(SVCB),
}

/// Walks the outline of every record, and decodes those of the answer section that may teach
/// something.
fn read_records(
    message: &[u8],
    reader: &mut Reader<'_>,
    header: Header,
    teaches: bool,
) -> Result<Vec<Fact>, AnswerError> {
    let answers = usize::from(header.answers);
    let records = answers + usize::from(header.authorities) + usize::from(header.additionals);
    if !header.truncated() && records * RECORD_MIN > reader.remaining() {
        return Err(AnswerError::Counts(records));
    }
    let mut facts = Vec::new();
    for i in 0..records {
        let outline = match reader.outline() {
            Ok(outline) => outline,
            Err(Truncated) if header.truncated() => return Ok(facts),
            Err(Truncated) => return Err(AnswerError::TooShort),
        };
        if i < answers && teaches {
            facts.extend(read_fact(message, &outline, reader.at())?);
        }
    }
    // What follows the last record belongs to nothing that a stub reads; it is delivered with the
    // rest and teaches nothing.
    Ok(facts)
}

/// Decodes a record that ends at `end`, unless it is of no interest.
fn read_fact(
    message: &[u8],
    outline: &Outline<'_>,
    end: usize,
) -> Result<Option<Fact>, AnswerError> {
    let interesting = matches!(
        outline.record_type,
        TYPE_A | TYPE_CNAME | TYPE_AAAA | TYPE_SVCB | TYPE_HTTPS
    );
    if !interesting || outline.class != CLASS_IN {
        return Ok(None);
    }
    let unreadable = |error| AnswerError::Record {
        offset: outline.start,
        error,
    };
    // The decoder may look back at names it is pointed to, never past this record.
    let upto = message.get(..end).ok_or(AnswerError::TooShort)?;
    let start = u16::try_from(outline.start).map_err(|_| AnswerError::TooLong)?;
    let mut decoder = BinDecoder::new(upto).clone(start);
    let record = Record::read(&mut decoder).map_err(unreadable)?;
    let says = match record.data {
        RData::A(a) => Says::Address(from_v4(a.0)),
        RData::AAAA(aaaa) => Says::Address(from_v6(aaaa.0)),
        RData::CNAME(cname) => Says::Alias(cname.0),
        RData::SVCB(svcb) => svcb_says(svcb),
        RData::HTTPS(https) => svcb_says(https.0),
        // Without data a record says nothing (RFC 2136 gives it a meaning in updates only).
        _ => return Err(unreadable(DecodeError::InvalidEmptyRecord)),
    };
    let ttl = if outline.ttl > i32::MAX as u32 {
        0
    } else {
        outline.ttl
    };
    Ok(Some(Fact {
        owner: record.name,
        ttl,
        says,
    }))
}

fn svcb_says(svcb: SVCB) -> Says {
    if svcb.svc_priority == 0 {
        Says::Alias(svcb.target_name)
    } else {
        Says::Hints(svcb)
    }
}

/// The question's name as the decoder writes it, to compare with its others.
fn asked_name(message: &[u8]) -> Result<OwnerName, AnswerError> {
    let mut decoder = BinDecoder::new(message).clone(HEADER_BYTES as u16);
    OwnerName::read(&mut decoder).map_err(|error| AnswerError::Record {
        offset: HEADER_BYTES,
        error,
    })
}

/// Collects the addresses at the asked name and at every name its aliases lead to.
///
/// Several aliases at one name are against RFC 2181, section 10.1, but a program may follow any of
/// them, so all are followed. A loop leads to names that are known already and so ends by itself.
fn follow(asked: OwnerName, facts: &[Fact]) -> Result<(Vec<Alias>, Vec<Learned>), AnswerError> {
    // Looked up by name: thousands of records at the end of sixteen aliases would be compared with each.
    let mut by_owner: HashMap<&OwnerName, Vec<&Fact>> = HashMap::new();
    for fact in facts {
        by_owner.entry(&fact.owner).or_default().push(fact);
    }
    let mut reached = vec![(asked, u32::MAX)];
    let mut aliases = Vec::new();
    let mut addresses = Vec::with_capacity(facts.len());
    let mut next = 0;
    while let Some((name, ttl_so_far)) = reached.get(next).cloned() {
        // The asked name comes first and is no alias.
        let at = next.checked_sub(1);
        next += 1;
        let here = by_owner.get(&name).map(Vec::as_slice).unwrap_or_default();
        // Records of one set have one TTL; where they differ, the lowest counts (RFC 2181,
        // section 5.2).
        let alias_ttl = here
            .iter()
            .filter(|fact| matches!(fact.says, Says::Alias(_)))
            .fold(ttl_so_far, |lowest, fact| lowest.min(fact.ttl));
        for fact in here {
            let ttl = ttl_so_far.min(fact.ttl);
            match &fact.says {
                Says::Alias(target) => {
                    if reached.iter().any(|(known, _)| known == target) {
                        continue;
                    }
                    if reached.len() > ALIASES_MAX {
                        return Err(AnswerError::Aliases);
                    }
                    reached.push((target.clone(), alias_ttl));
                    aliases.push(Alias {
                        name: Name::from_labels(target.iter()).map_err(|_| AnswerError::Aliases)?,
                        of: at,
                    });
                }
                Says::Address(address) => addresses.push(Learned {
                    address: *address,
                    at,
                    ttl,
                }),
                Says::Hints(svcb) => {
                    addresses.extend(hints(svcb).map(|address| Learned { address, at, ttl }));
                }
            }
        }
    }
    Ok((aliases, addresses))
}

/// The addresses in `ipv4hint` and `ipv6hint` (RFC 9460, section 7.3).
fn hints(svcb: &SVCB) -> impl Iterator<Item = Address> {
    svcb.svc_params.iter().flat_map(|(_, value)| {
        let (v4, v6) = match value {
            SvcParamValue::Ipv4Hint(hint) => (hint.0.as_slice(), [].as_slice()),
            SvcParamValue::Ipv6Hint(hint) => ([].as_slice(), hint.0.as_slice()),
            _ => ([].as_slice(), [].as_slice()),
        };
        let v4 = v4.iter().map(|a| from_v4(a.0));
        v4.chain(v6.iter().map(|aaaa| from_v6(aaaa.0)))
    })
}

fn from_v4(v4: Ipv4Addr) -> Address {
    address::from_v4(v4.octets())
}

fn from_v6(v6: Ipv6Addr) -> Address {
    v6.octets()
}

impl From<Truncated> for AnswerError {
    fn from(Truncated: Truncated) -> Self {
        Self::TooShort
    }
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
