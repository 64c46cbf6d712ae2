//! Both ends of DNS: a server that says what a test wants, and a client without habits.

mod client;
mod message;
mod server;

pub use client::{Answer, DnsSocket};
pub use hickory_proto::{
    op::ResponseCode,
    rr::{RData, RecordType},
};
pub use message::{Record, Send, address, cname, hints, https_alias, question, raw_record, text};
pub use server::{DnsServer, Question};
