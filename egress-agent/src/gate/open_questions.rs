//! Queries that are open when an agent ends, and that the next agent takes over.

use egress_common::{address::Address, ids::PodId};
use serde::{Deserialize, Serialize};

use super::pending::{Exchange, Pending};
use egress_dns::read_question;

/// Most queries of one pod that are handed over; the newest ones.
const QUESTIONS: usize = 256;

/// A query over UDP that has gone out and has no response yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenQuestion {
    /// The number of its [`PodId`].
    pod: u32,
    pod_addr: Address,
    resolver: Address,
    resolver_port: u16,
    pod_port: u16,
    /// A DNS message with the id and the question section, in wire format.
    message: Vec<u8>,
    /// When it went out, in nanoseconds of `CLOCK_BOOTTIME`.
    time_ns: u64,
}

impl OpenQuestion {
    /// The newest open queries of a pod.
    pub(super) fn of(pod: PodId, pending: &Pending, now_ns: u64) -> impl Iterator<Item = Self> {
        let open = pending.open(now_ns).take(QUESTIONS);
        open.map(move |(exchange, asked)| Self {
            pod: pod.get(),
            pod_addr: exchange.pod_addr,
            resolver: exchange.resolver,
            resolver_port: exchange.resolver_port,
            pod_port: exchange.pod_port,
            message: [
                &exchange.id.to_be_bytes()[..],
                // RD; one question and no other records.
                &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0],
                &asked.name_as_sent,
                &asked.qtype.to_be_bytes(),
                &asked.qclass.to_be_bytes(),
            ]
            .concat(),
            time_ns: asked.time_ns,
        })
    }

    /// The pod that asked it.
    pub(super) fn pod(&self) -> PodId {
        PodId::new(self.pod)
    }

    /// Records it as open. A query that cannot be read is left out: its response is not delivered.
    pub(super) fn ask(&self, pending: &mut Pending) {
        if let Ok(question) = read_question(&self.message) {
            let exchange = Exchange {
                pod_addr: self.pod_addr,
                resolver: self.resolver,
                resolver_port: self.resolver_port,
                pod_port: self.pod_port,
                id: question.id,
            };
            pending.ask(exchange, &question, self.time_ns);
        }
    }
}
