//! Queries that a pod has sent and no resolver has answered yet.

use std::time::Duration;

use egress_common::address::Address;
use lru::LruCache;

use egress_dns::{Answer, Name, Question};

/// Most open queries of one pod. Beyond that the oldest is forgotten, and its response will not be delivered.
/// Stub resolvers keep a handful open, busy proxies hundreds.
const QUESTIONS: usize = 2048;

/// How long a response may take. Stub resolvers give up after 5 seconds (resolv.conf(5), `timeout`), or after
/// 30 at most.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// The ends of a query and its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Exchange {
    pub(super) pod_addr: Address,
    pub(super) resolver: Address,
    pub(super) resolver_port: u16,
    pub(super) pod_port: u16,
    pub(super) id: u16,
}

/// Most different open queries of one exchange. Old versions of musl send the queries for A and for AAAA from
/// one port with one id.
const QUESTIONS_OF_EXCHANGE: usize = 4;

pub(super) struct Asked {
    name: Name,
    pub(super) name_as_sent: Box<[u8]>,
    pub(super) qtype: u16,
    pub(super) qclass: u16,
    /// How often it was sent without a response: a repeated query gets more than one response.
    outstanding: u32,
    /// How many more responses are delivered whose name has other upper and lower case than the query. Such a
    /// response does not close the query: a client that compares the case continues to wait for the right
    /// one.
    in_other_case: u32,
    pub(super) time_ns: u64,
}

impl Asked {
    fn is_for(&self, name: &Name, qtype: u16, qclass: u16) -> bool {
        self.qtype == qtype && self.qclass == qclass && self.name == *name
    }

    fn is_open(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.time_ns) <= RESPONSE_TIMEOUT.as_nanos() as u64
    }
}

/// The open queries of one pod over UDP, or of one connection over TCP: a response must come over the same
/// transport as its query.
pub(super) struct Pending {
    asked: LruCache<Exchange, Vec<Asked>>,
    len: usize,
    room: usize,
}

impl Pending {
    pub(super) fn new() -> Self {
        Self::with_room(QUESTIONS)
    }

    /// With room for this many queries.
    pub(super) fn with_room(room: usize) -> Self {
        Self {
            // Unbounded, because the bounded cache allocates all of its memory at once.
            asked: LruCache::unbounded(),
            len: 0,
            room,
        }
    }

    /// The number of open queries.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The open queries, beginning with the most recently used exchange.
    pub(super) fn open(&self, now_ns: u64) -> impl Iterator<Item = (&Exchange, &Asked)> {
        let all = self.asked.iter();
        all.flat_map(|(exchange, asked)| asked.iter().map(move |asked| (exchange, asked)))
            .filter(move |(_, asked)| asked.is_open(now_ns))
    }

    /// Records a query that goes out.
    pub(super) fn ask(&mut self, exchange: Exchange, question: &Question, now_ns: u64) {
        while self.len >= self.room {
            self.pop_oldest();
        }
        let asked = self.asked.get_or_insert_mut(exchange, Vec::new);
        let again = asked.iter_mut().find(|asked| {
            asked.is_for(&question.name, question.qtype, question.qclass)
                && asked.name_as_sent == question.name_as_sent
        });
        if let Some(again) = again {
            again.outstanding = again.outstanding.saturating_add(1);
            again.in_other_case = again.in_other_case.saturating_add(1);
            again.time_ns = now_ns;
            return;
        }
        if asked.len() < QUESTIONS_OF_EXCHANGE {
            self.len += 1;
        } else {
            asked.remove(0);
        }
        asked.push(Asked {
            name: question.name.clone(),
            name_as_sent: question.name_as_sent.clone(),
            qtype: question.qtype,
            qclass: question.qclass,
            outstanding: 1,
            in_other_case: 1,
            time_ns: now_ns,
        });
    }

    /// Whether the response is one to an open query.
    pub(super) fn expects(&self, exchange: &Exchange, answer: &Answer, now_ns: u64) -> bool {
        let asked = self.asked.peek(exchange);
        asked.into_iter().flatten().any(|asked| {
            asked.is_for(&answer.name, answer.qtype, answer.qclass)
                && asked.is_open(now_ns)
                && (asked.in_other_case > 0 || asked.name_as_sent == answer.name_as_sent)
        })
    }

    /// Whether the response is one to an open query. If so, one response fewer is expected.
    pub(super) fn answer(&mut self, exchange: Exchange, answer: &Answer, now_ns: u64) -> bool {
        let Some(asked) = self.asked.get_mut(&exchange) else {
            return false;
        };
        let of_question = |asked: &Asked| asked.is_for(&answer.name, answer.qtype, answer.qclass);
        let exact = asked
            .iter()
            .position(|asked| of_question(asked) && asked.name_as_sent == answer.name_as_sent);
        if let Some(index) = exact {
            return self.close(exchange, index, now_ns);
        }
        let other = asked
            .iter_mut()
            .find(|asked| of_question(asked) && asked.in_other_case > 0);
        other.is_some_and(|asked| {
            asked.in_other_case -= 1;
            asked.is_open(now_ns)
        })
    }

    /// Whether a query of the exchange is open, so that a response without a question section may answer it.
    /// If so, one response fewer is expected.
    pub(super) fn reject(&mut self, exchange: Exchange, now_ns: u64) -> bool {
        self.asked.get_mut(&exchange).is_some() && self.close(exchange, 0, now_ns)
    }

    /// Expects one response fewer for a query. Returns whether the response came in time.
    fn close(&mut self, exchange: Exchange, index: usize, now_ns: u64) -> bool {
        let Some(asked) = self.asked.get_mut(&exchange) else {
            return false;
        };
        let Some(closed) = asked.get_mut(index) else {
            return false;
        };
        let in_time = closed.is_open(now_ns);
        closed.outstanding -= 1;
        if closed.outstanding == 0 {
            asked.remove(index);
            self.len -= 1;
            if asked.is_empty() {
                self.asked.pop(&exchange);
                self.free_if_empty();
            }
        }
        in_time
    }

    /// Forgets queries for which no client waits any more.
    pub(super) fn sweep(&mut self, now_ns: u64) {
        while let Some((_, asked)) = self.asked.peek_lru() {
            if asked.iter().any(|asked| asked.is_open(now_ns)) {
                break;
            }
            self.pop_oldest();
        }
    }

    fn pop_oldest(&mut self) {
        if let Some((_, asked)) = self.asked.pop_lru() {
            self.len -= asked.len();
            self.free_if_empty();
        }
    }

    /// A cache keeps the memory of the most entries that it ever had.
    fn free_if_empty(&mut self) {
        if self.len == 0 && self.room < QUESTIONS {
            self.asked = LruCache::unbounded();
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use egress_dns::{
        packets::{Packet, wire_name},
        read_answer, read_question,
    };

    pub(in super::super) const EXCHANGE: Exchange = Exchange {
        pod_addr: [1; 16],
        resolver: [2; 16],
        resolver_port: 53,
        pod_port: 40_000,
        id: Packet::ID,
    };
    pub(in super::super) const A: u16 = 1;
    const AAAA: u16 = 28;

    fn question(name: &str, qtype: u16) -> Question {
        read_question(&Packet::query_of_wire(&wire_name(name), qtype).bytes()).unwrap()
    }

    pub(in super::super) fn answer(name: &str, qtype: u16) -> Answer {
        let message = Packet::query_of_wire(&wire_name(name), qtype).flags(0x8180);
        read_answer(&message.bytes()).unwrap()
    }

    #[test]
    fn each_query_accepts_one_response() {
        let mut pending = Pending::new();
        pending.ask(EXCHANGE, &question("a.test", A), 0);
        pending.ask(EXCHANGE, &question("a.test", A), 1);
        assert_eq!(pending.len(), 1);
        assert!(pending.answer(EXCHANGE, &answer("a.test", A), 2));
        assert!(pending.answer(EXCHANGE, &answer("a.test", A), 2));
        assert!(!pending.answer(EXCHANGE, &answer("a.test", A), 2));
        assert_eq!(pending.len(), 0);
    }

    #[test]
    fn two_types_of_one_name_may_have_one_id() {
        let mut pending = Pending::new();
        pending.ask(EXCHANGE, &question("a.test", A), 0);
        pending.ask(EXCHANGE, &question("a.test", AAAA), 0);
        assert!(pending.answer(EXCHANGE, &answer("a.test", A), 1));
        assert!(pending.answer(EXCHANGE, &answer("a.test", AAAA), 1));
        assert!(!pending.answer(EXCHANGE, &answer("b.test", A), 1));
    }

    #[test]
    fn a_response_in_other_case_is_delivered_once_and_leaves_the_query_open() {
        let mut pending = Pending::new();
        pending.ask(EXCHANGE, &question("ShOp.test", A), 0);
        assert!(pending.answer(EXCHANGE, &answer("shop.test", A), 1));
        assert!(!pending.answer(EXCHANGE, &answer("SHOP.test", A), 1));
        assert!(pending.answer(EXCHANGE, &answer("ShOp.test", A), 1));
        assert!(!pending.answer(EXCHANGE, &answer("ShOp.test", A), 1));
    }

    #[test]
    fn an_exchange_has_room_for_a_few_queries() {
        let mut pending = Pending::with_room(3);
        for name in ["a", "b", "c", "d", "e"] {
            pending.ask(EXCHANGE, &question(name, A), 0);
            assert!(pending.len() <= 3);
        }
        let mut pending = Pending::new();
        for name in ["a", "b", "c", "d", "e"] {
            pending.ask(EXCHANGE, &question(name, A), 0);
        }
        assert_eq!(pending.len(), QUESTIONS_OF_EXCHANGE);
        assert!(!pending.answer(EXCHANGE, &answer("a", A), 0));
        assert!(pending.answer(EXCHANGE, &answer("e", A), 0));
    }

    #[test]
    fn a_late_response_is_not_accepted() {
        let late = RESPONSE_TIMEOUT.as_nanos() as u64 + 1;
        let mut pending = Pending::new();
        pending.ask(EXCHANGE, &question("a.test", A), 0);
        assert!(!pending.answer(EXCHANGE, &answer("A.test", A), late));
        assert!(!pending.answer(EXCHANGE, &answer("a.test", A), late));
        pending.ask(EXCHANGE, &question("a.test", A), 0);
        pending.sweep(late);
        assert_eq!(pending.len(), 0);
    }

    #[test]
    fn a_rejection_closes_the_oldest_query_of_its_exchange() {
        let mut pending = Pending::new();
        pending.ask(EXCHANGE, &question("a.test", A), 0);
        assert!(pending.reject(EXCHANGE, 1));
        assert!(!pending.reject(EXCHANGE, 1));
        assert_eq!(pending.len(), 0);
    }
}
