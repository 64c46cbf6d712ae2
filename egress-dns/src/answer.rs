//! Reads a response on its way from a resolver to a pod, and collects the addresses that it gives for the
//! queried name.

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

/// Most aliases that are followed from the queried name. Resolvers follow fewer (BIND and unbound stop at
/// 11), so no honest resolver sends a longer chain, and following it would cost the gate time.
pub const ALIASES_MAX: usize = 16;

/// RCODE: the server could not read the query.
const FORMAT_ERROR: u8 = 1;
/// RCODE: the server does not support this kind of query.
const NOT_IMPLEMENTED: u8 = 4;

const TYPE_A: u16 = 1;
const TYPE_CNAME: u16 = 5;
const TYPE_AAAA: u16 = 28;
const TYPE_SVCB: u16 = 64;
const TYPE_HTTPS: u16 = 65;

/// The contents of a response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Transaction id, host byte order.
    pub id: u16,
    /// The name in the question section.
    pub name: Name,
    /// The name's bytes in the message, including the root's zero byte.
    pub name_as_sent: Box<[u8]>,
    /// The QTYPE in the question section, host byte order.
    pub qtype: u16,
    /// The QCLASS in the question section, host byte order.
    pub qclass: u16,
    /// TC: the client has to repeat the query over TCP.
    pub truncated: bool,
    /// RCODE, without the upper bits that EDNS adds.
    pub response_code: u8,
    /// The aliases in the chains from the queried name, in the order in which they were reached.
    pub aliases: Vec<Alias>,
    /// The addresses for the queried name, in the order of the message; a repeated address is repeated here.
    /// Empty unless the class is IN and the RCODE is NOERROR.
    pub addresses: Vec<Learned>,
}

/// The target of an alias record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alias {
    /// The target name.
    pub name: Name,
    /// The index of the alias that owns the alias record; `None` if the queried name owns it.
    pub of: Option<usize>,
}

impl Answer {
    /// The names of the chain, from the owner of the address back to the queried name.
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

/// An address in a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Learned {
    /// The address.
    pub address: Address,
    /// The index of the alias that owns the address; `None` if the queried name owns it.
    pub at: Option<usize>,
    /// The lowest TTL of the chain from the queried name to the address, in seconds and as in the message. A
    /// TTL with its highest bit set counts as zero (RFC 2181, section 8).
    pub ttl: u32,
}

/// Why a message is no response that the agent can judge.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The message ends before the end of its last record.
    #[error("the message is too short")]
    TooShort,
    /// Over 65,535 bytes.
    #[error("the message is longer than {MESSAGE_MAX} bytes")]
    TooLong,
    /// QR is not set.
    #[error("the message is a query")]
    Question,
    /// OPCODE is not QUERY.
    #[error("the opcode is {0}, not a query")]
    Opcode(u8),
    /// QDCOUNT is not 1.
    #[error("the message has {0} questions instead of one")]
    Questions(u16),
    /// The name in the question section cannot be read.
    #[error("{0}")]
    Name(PlainNameError),
    /// The header announces more records than the message has room for.
    #[error("the message has no room for the {0} records it announces")]
    Counts(usize),
    /// A record that could add an address cannot be read.
    #[error("a record at offset {offset} cannot be read: {error}")]
    Record {
        /// The offset of the record in the message.
        offset: usize,
        /// The decoder's error.
        error: DecodeError,
    },
    /// The chains from the queried name have more than [`ALIASES_MAX`] aliases.
    #[error("the name has more than {ALIASES_MAX} aliases")]
    Aliases,
}

/// Reads a response.
///
/// Follows aliases from the queried name, in any order of the answer section: CNAME records, and SVCB and
/// HTTPS records in alias mode (RFC 9460, section 2.4.2). Collects the addresses of A and AAAA records and
/// the hints of SVCB and HTTPS records at the names in these chains, whatever type was queried. All other
/// records are ignored. A DNAME record is ignored, too: the resolver sends the CNAME records that it stands
/// for along with it (RFC 6672, section 3.1). Of the authority and additional sections only the outline is
/// read.
///
/// A truncated response may end in the middle of a record. The records before that count: some programs use
/// them.
///
/// # Errors
///
/// When the message is no response, or could have a meaning that this function does not understand; see
/// [`AnswerError`].
pub fn read_answer(message: &[u8]) -> Result<Answer, AnswerError> {
    if message.len() > MESSAGE_MAX {
        return Err(AnswerError::TooLong);
    }
    let mut reader = Reader::new(message);
    let (header, mut answer) = read_question_section(&mut reader)?;
    let adds_addresses = header.response_code() == 0 && answer.qclass == CLASS_IN;
    let facts = read_records(message, &mut reader, header, adds_addresses)?;
    if !facts.is_empty() {
        (answer.aliases, answer.addresses) = follow(asked_name(message)?, &facts)?;
    }
    Ok(answer)
}

/// Reads a response that only says that the server did not understand the query, and does not repeat it (RFC
/// 1035, section 4.1.1, RCODE 1 and 4). Returns its id; `None` for every other message.
///
/// It has no records in the answer and authority sections, so it adds no address.
pub fn read_rejection(message: &[u8]) -> Option<u16> {
    let header = Reader::new(message).header().ok()?;
    let is_rejection = message.len() <= MESSAGE_MAX
        && header.is_response()
        && header.opcode() == 0
        && matches!(header.response_code(), FORMAT_ERROR | NOT_IMPLEMENTED)
        && (header.questions, header.answers, header.authorities) == (0, 0, 0);
    is_rejection.then_some(header.id)
}

/// Reads the beginning of a response: everything except the addresses. `None` when it ends before the end of
/// the question section.
///
/// # Errors
///
/// When no response begins like this; see [`AnswerError`].
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

/// A record that may add an address.
struct Fact {
    owner: OwnerName,
    /// Seconds.
    ttl: u32,
    meaning: Meaning,
}

enum Meaning {
    Alias(OwnerName),
    Address(Address),
    Hints(SVCB),
}

/// Reads the outline of every record, and decodes those of the answer section that may add an address.
fn read_records(
    message: &[u8],
    reader: &mut Reader<'_>,
    header: Header,
    adds_addresses: bool,
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
        if i < answers && adds_addresses {
            facts.extend(read_fact(message, &outline, reader.at())?);
        }
    }
    // Stub resolvers ignore bytes after the last record. They are delivered with the message, and add no
    // address.
    Ok(facts)
}

/// Decodes a record that ends at `end`, unless it is of a type or class that is ignored.
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
    // The decoder may follow pointers back to earlier names, but never read beyond this record.
    let upto = message.get(..end).ok_or(AnswerError::TooShort)?;
    let start = u16::try_from(outline.start).map_err(|_| AnswerError::TooLong)?;
    let mut decoder = BinDecoder::new(upto).clone(start);
    let record = Record::read(&mut decoder).map_err(unreadable)?;
    let meaning = match record.data {
        RData::A(a) => Meaning::Address(from_v4(a.0)),
        RData::AAAA(aaaa) => Meaning::Address(from_v6(aaaa.0)),
        RData::CNAME(cname) => Meaning::Alias(cname.0),
        RData::SVCB(svcb) => svcb_meaning(svcb),
        RData::HTTPS(https) => svcb_meaning(https.0),
        // A record without data means nothing (RFC 2136 gives it a meaning in updates only).
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
        meaning,
    }))
}

fn svcb_meaning(svcb: SVCB) -> Meaning {
    if svcb.svc_priority == 0 {
        Meaning::Alias(svcb.target_name)
    } else {
        Meaning::Hints(svcb)
    }
}

/// The queried name in the decoder's type, to compare it with the decoded names.
fn asked_name(message: &[u8]) -> Result<OwnerName, AnswerError> {
    let mut decoder = BinDecoder::new(message).clone(HEADER_BYTES as u16);
    OwnerName::read(&mut decoder).map_err(|error| AnswerError::Record {
        offset: HEADER_BYTES,
        error,
    })
}

/// Collects the addresses at the queried name and at every name in the chains of its aliases.
///
/// Several aliases of one name violate RFC 2181, section 10.1, but a program may follow any of them, so all
/// are followed. A loop leads to known names, and so ends.
fn follow(asked: OwnerName, facts: &[Fact]) -> Result<(Vec<Alias>, Vec<Learned>), AnswerError> {
    // An index by name: otherwise thousands of records would be compared with each of sixteen aliases.
    let mut by_owner: HashMap<&OwnerName, Vec<&Fact>> = HashMap::new();
    for fact in facts {
        by_owner.entry(&fact.owner).or_default().push(fact);
    }
    let mut reached = vec![(asked, u32::MAX)];
    let mut aliases = Vec::new();
    let mut addresses = Vec::with_capacity(facts.len());
    let mut next = 0;
    while let Some((name, ttl_so_far)) = reached.get(next).cloned() {
        // The queried name comes first and is no alias.
        let at = next.checked_sub(1);
        next += 1;
        let here = by_owner.get(&name).map(Vec::as_slice).unwrap_or_default();
        // The records of a set should have one TTL; if they differ, the lowest counts (RFC 2181, section
        // 5.2).
        let alias_ttl = here
            .iter()
            .filter(|fact| matches!(fact.meaning, Meaning::Alias(_)))
            .fold(ttl_so_far, |lowest, fact| lowest.min(fact.ttl));
        for fact in here {
            let ttl = ttl_so_far.min(fact.ttl);
            match &fact.meaning {
                Meaning::Alias(target) => {
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
                Meaning::Address(address) => addresses.push(Learned {
                    address: *address,
                    at,
                    ttl,
                }),
                Meaning::Hints(svcb) => {
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
