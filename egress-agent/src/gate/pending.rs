//! Questions that a pod has asked and no resolver has answered yet.

use std::time::Duration;

use egress_common::address::Address;
use lru::LruCache;

use crate::dns::{Answer, Question};

/// Most questions of one pod that may wait at once; beyond it the oldest is forgotten, and its
/// answer will not be delivered. Stub resolvers keep a handful open, busy proxies hundreds.
const QUESTIONS: usize = 2048;

/// How long an answer may take. Stub resolvers give up after 5 seconds (resolv.conf(5), `timeout`),
/// at most 30.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where a question came from and where it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Exchange {
    pub(super) pod_addr: Address,
    pub(super) resolver: Address,
    pub(super) resolver_port: u16,
    pub(super) pod_port: u16,
    pub(super) id: u16,
}

struct Asked {
    name_as_sent: Box<[u8]>,
    qtype: u16,
    qclass: u16,
    /// How often it was asked and not answered: a repeated question has more than one answer.
    outstanding: u32,
    time_ns: u64,
}

/// The open questions of one pod over UDP, or of one connection over TCP: an answer answers what was
/// asked the same way.
pub(super) struct Pending {
    asked: LruCache<Exchange, Asked>,
    room: usize,
}

impl Pending {
    pub(super) fn new() -> Self {
        Self::with_room(QUESTIONS)
    }

    /// For at most this many questions.
    pub(super) fn with_room(room: usize) -> Self {
        Self {
            // Unbounded because the bounded one allots all of its memory at once.
            asked: LruCache::unbounded(),
            room,
        }
    }

    /// How many questions are open.
    pub(super) fn len(&self) -> usize {
        self.asked.len()
    }

    /// Notes that a question goes out.
    pub(super) fn ask(&mut self, exchange: Exchange, question: &Question, now_ns: u64) {
        if let Some(asked) = self.asked.get_mut(&exchange)
            && asked.name_as_sent == question.name_as_sent
            && asked.qtype == question.qtype
            && asked.qclass == question.qclass
        {
            asked.outstanding = asked.outstanding.saturating_add(1);
            asked.time_ns = now_ns;
            return;
        }
        if self.asked.len() >= self.room {
            self.asked.pop_lru();
        }
        let asked = Asked {
            name_as_sent: question.name_as_sent.clone(),
            qtype: question.qtype,
            qclass: question.qclass,
            outstanding: 1,
            time_ns: now_ns,
        };
        self.asked.put(exchange, asked);
    }

    /// Whether the answer is one to an open question.
    pub(super) fn expects(&self, exchange: &Exchange, answer: &Answer) -> bool {
        self.asked.peek(exchange).is_some_and(|asked| {
            asked.name_as_sent == answer.name_as_sent
                && asked.qtype == answer.qtype
                && asked.qclass == answer.qclass
        })
    }

    /// Whether the answer is one to an open question, which is then open once less.
    pub(super) fn answer(&mut self, exchange: Exchange, answer: &Answer, now_ns: u64) -> bool {
        if !self.expects(&exchange, answer) {
            return false;
        }
        let Some(asked) = self.asked.get_mut(&exchange) else {
            return false;
        };
        let in_time = now_ns.saturating_sub(asked.time_ns) <= PATIENCE.as_nanos() as u64;
        asked.outstanding -= 1;
        if asked.outstanding == 0 {
            self.asked.pop(&exchange);
        }
        in_time
    }

    /// Forgets questions that nobody waits for any more.
    pub(super) fn sweep(&mut self, now_ns: u64) {
        while let Some((_, asked)) = self.asked.peek_lru() {
            if now_ns.saturating_sub(asked.time_ns) <= PATIENCE.as_nanos() as u64 {
                break;
            }
            self.asked.pop_lru();
        }
    }
}
