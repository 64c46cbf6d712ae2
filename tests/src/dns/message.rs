//! Builds DNS messages.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        Name, RData, RecordType,
        rdata::{
            A, AAAA, CNAME, HTTPS, NULL, SVCB, TXT,
            svcb::{IpHint, SvcParamKey, SvcParamValue},
        },
    },
};

use super::Question;

/// The TTL of records in tests where it does not matter.
const TTL_SECONDS: u32 = 300;

/// A record of a response. Its owner is the queried name, or the target of the CNAME before it, unless
/// [`Record::of`] sets another one.
#[derive(Clone, Debug)]
pub struct Record {
    pub(crate) owner: Option<String>,
    pub(crate) ttl_seconds: u32,
    pub(crate) data: RData,
}

impl Record {
    fn new(data: RData) -> Self {
        Self {
            owner: None,
            ttl_seconds: TTL_SECONDS,
            data,
        }
    }

    /// Sets another TTL.
    #[must_use]
    pub fn ttl(mut self, seconds: u32) -> Self {
        self.ttl_seconds = seconds;
        self
    }

    /// Sets another owner.
    #[must_use]
    pub fn of(mut self, owner: &str) -> Self {
        self.owner = Some(owner.to_owned());
        self
    }
}

/// An A or AAAA record.
pub fn address(address: IpAddr) -> Record {
    Record::new(match address {
        IpAddr::V4(v4) => RData::A(A(v4)),
        IpAddr::V6(v6) => RData::AAAA(AAAA(v6)),
    })
}

/// A CNAME record.
pub fn cname(target: &str) -> Record {
    Record::new(RData::CNAME(CNAME(name(target))))
}

/// An HTTPS record in alias mode (RFC 9460, section 2.4.2), which works like a CNAME.
pub fn https_alias(target: &str) -> Record {
    Record::new(RData::HTTPS(HTTPS(SVCB::new(0, name(target), Vec::new()))))
}

/// A record of any type with any data.
pub fn raw_record(record_type: u16, data: &[u8]) -> Record {
    Record::new(RData::Unknown {
        code: RecordType::Unknown(record_type),
        rdata: NULL::with(data.to_vec()),
    })
}

/// A TXT record.
pub fn text(content: &str) -> Record {
    Record::new(RData::TXT(TXT::new(vec![content.to_owned()])))
}

/// An HTTPS record for the queried name itself, with address hints (RFC 9460, section 7.3).
pub fn hints(addresses: &[IpAddr]) -> Record {
    let v4 = addresses.iter().filter_map(|a| {
        if let IpAddr::V4(v4) = a {
            Some(A(*v4))
        } else {
            None
        }
    });
    let v6 = addresses.iter().filter_map(|a| {
        if let IpAddr::V6(v6) = a {
            Some(AAAA(*v6))
        } else {
            None
        }
    });
    let (v4, v6): (Vec<_>, Vec<_>) = (v4.collect(), v6.collect());
    let mut parameters = Vec::new();
    if !v4.is_empty() {
        parameters.push((SvcParamKey::Ipv4Hint, SvcParamValue::Ipv4Hint(IpHint(v4))));
    }
    if !v6.is_empty() {
        parameters.push((SvcParamKey::Ipv6Hint, SvcParamValue::Ipv6Hint(IpHint(v6))));
    }
    Record::new(RData::HTTPS(HTTPS(SVCB::new(1, Name::root(), parameters))))
}

/// The bytes of a query, with EDNS and room for a response of 4,096 bytes.
#[track_caller]
pub fn question(id: u16, asked: &str, qtype: RecordType) -> Vec<u8> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name(asked), qtype));
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    message.edns = Some(edns);
    message.to_vec().expect("a query can be encoded")
}

/// Parses a name; letters keep their case.
#[track_caller]
pub(crate) fn name(text: &str) -> Name {
    let mut name = Name::from_ascii(text).unwrap_or_else(|e| panic!("not a name: {text:?}: {e}"));
    name.set_fqdn(true);
    name
}

/// One message that the server sends.
#[derive(Clone, Debug)]
pub struct Send {
    pub(crate) bytes: Vec<u8>,
    pub(crate) piece_bytes: Option<usize>,
    pub(crate) from: Option<SocketAddr>,
    pub(crate) after: Duration,
}

impl Send {
    /// Arbitrary bytes.
    pub fn raw(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            piece_bytes: None,
            from: None,
            after: Duration::ZERO,
        }
    }

    /// The response to `asked` with these records and no others.
    #[track_caller]
    pub fn answer(asked: &Question, records: &[Record]) -> Self {
        Self::reply(asked, ResponseCode::NoError, records)
    }

    /// A response without records and with this code.
    #[track_caller]
    pub fn code(asked: &Question, code: ResponseCode) -> Self {
        Self::reply(asked, code, &[])
    }

    #[track_caller]
    fn reply(asked: &Question, code: ResponseCode, records: &[Record]) -> Self {
        let mut message = Message::new(asked.id, MessageType::Response, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.metadata.recursion_available = true;
        message.metadata.response_code = code;
        message.add_query(Query::query(name(&asked.name), asked.qtype));
        let mut owner = name(&asked.name);
        for record in records {
            let of = record.owner.as_deref().map_or_else(|| owner.clone(), name);
            message.add_answer(hickory_proto::rr::Record::from_rdata(
                of,
                record.ttl_seconds,
                record.data.clone(),
            ));
            if let RData::CNAME(CNAME(target)) = &record.data {
                owner = target.clone();
            }
        }
        Self::raw(message.to_vec().expect("a response can be encoded"))
    }

    /// The bytes to send.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Sends it from another address or port than the queried one.
    #[must_use]
    pub fn from(mut self, source: SocketAddr) -> Self {
        self.from = Some(source);
        self
    }

    /// Over TCP: sends it in segments of this many bytes, including the length prefix.
    #[must_use]
    pub fn in_pieces(mut self, bytes: usize) -> Self {
        self.piece_bytes = Some(bytes);
        self
    }

    /// A truncated response: the flag TC, and no records.
    #[track_caller]
    pub fn truncated(asked: &Question) -> Self {
        Self::answer(asked, &[]).edited(|bytes| bytes[2] |= 2)
    }

    /// Sends it after a delay.
    #[must_use]
    pub fn after(mut self, delay: Duration) -> Self {
        self.after = delay;
        self
    }

    /// Changes the bytes.
    #[must_use]
    pub fn edited(mut self, edit: impl FnOnce(&mut Vec<u8>)) -> Self {
        edit(&mut self.bytes);
        self
    }

    /// Replaces the transaction id.
    #[must_use]
    pub fn with_id(self, id: u16) -> Self {
        self.edited(|bytes| bytes[..2].copy_from_slice(&id.to_be_bytes()))
    }
}
