//! Both ends of DNS: a server whose responses a test defines, and a minimal client.

mod client;
mod message;
mod server;
mod stream;

pub use client::{Answer, DnsSocket};
pub use hickory_proto::{
    op::ResponseCode,
    rr::{RData, RecordType},
};
pub use message::{Record, Send, address, cname, hints, https_alias, question, raw_record, text};
pub use server::{DnsServer, Question};
pub use stream::{DnsStream, framed, framed_query, read_message};
