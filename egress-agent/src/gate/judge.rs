//! The decision on one message, however it came.

use std::{sync::Arc, time::SystemTime};

use egress_common::{packet::Packet, protocol::bits, reason::Reason, records::MODE_AUDIT};

use super::{
    Direction, DnsSettings, Enforcement, Outcome, Stats, Transport,
    learned::{Table, Taught},
    pending::{Exchange, Pending},
    stream,
};
use crate::{
    datapath::{AllowError, boottime_ns},
    dns::{Answer, Question, read_answer, read_beginning, read_question, refuse, type_name},
    policy::QuestionRule,
    report::{Denied, Endpoint, PodIdentity, Reporter, Verdict},
};

/// What every decision needs besides the pod.
pub(super) struct Means {
    pub(super) dns: DnsSettings,
    pub(super) reporter: Reporter,
    pub(super) stats: Arc<Stats>,
}

/// Decides on a pod's messages and reports what does not pass.
pub(super) struct Judge<'a> {
    enforcement: &'a mut Enforcement,
    learned: &'a mut Table,
    means: &'a Means,
    /// When the message was taken.
    time_ns: u64,
}

impl<'a> Judge<'a> {
    /// Decides on a message that was taken then.
    pub(super) fn new(
        enforcement: &'a mut Enforcement,
        learned: &'a mut Table,
        means: &'a Means,
        time_ns: u64,
    ) -> Self {
        Self {
            enforcement,
            learned,
            means,
            time_ns,
        }
    }

    /// The question that a message is, and whether it may be asked. `None` when it is none.
    pub(super) fn question(&self, message: &[u8], packet: &Packet) -> Option<(Question, bool)> {
        let question = match read_question(message) {
            Ok(question) => question,
            Err(error) => {
                tracing::debug!(pod = %self.name(), %error, "unreadable question");
                self.count(packet, Direction::Question, Outcome::Undeliverable);
                self.means
                    .reporter
                    .report(self.denied(packet, Reason::DnsMalformed, None));
                return None;
            }
        };
        let rules = &self.enforcement.compiled.names;
        let is_allowed = rules.question(&question.name) == QuestionRule::Allowed;
        if !is_allowed {
            let asked = Some((question.name.to_string(), question.qtype));
            let mut denied = self.denied(packet, Reason::DnsName, asked);
            denied.rule = rules.explain_denied(&question.name).map(Into::into);
            self.means.reporter.report(denied);
            if !self.is_audit() {
                self.count(packet, Direction::Question, Outcome::Refused);
            }
        }
        Some((question, is_allowed))
    }

    /// Reports a question that is dropped because nobody knows yet whose it is.
    pub(super) fn unknown(&self, message: &[u8], packet: &Packet) {
        let question = read_question(message).ok();
        let asked = question.map(|question| (question.name.to_string(), question.qtype));
        self.count(packet, Direction::Question, Outcome::Undeliverable);
        self.means
            .reporter
            .report(self.denied(packet, Reason::PodUnknown, asked));
    }

    /// Whether a message is the answer to an open question and may be delivered: what it teaches is
    /// in the allow map then.
    pub(super) fn answer(
        &mut self,
        message: &[u8],
        packet: &Packet,
        pending: &mut Pending,
    ) -> bool {
        let is_delivered = self.take_in(message, packet, pending);
        let outcome = if is_delivered {
            Outcome::Delivered
        } else {
            Outcome::Undeliverable
        };
        self.count(packet, Direction::Answer, outcome);
        is_delivered
    }

    fn take_in(&mut self, message: &[u8], packet: &Packet, pending: &mut Pending) -> bool {
        let answer = match read_answer(message) {
            Ok(answer) => answer,
            Err(error) => {
                tracing::debug!(pod = %self.name(), %error, "unreadable answer");
                self.means
                    .reporter
                    .report(self.denied(packet, Reason::DnsMalformed, None));
                return false;
            }
        };
        let asked = || Some((answer.name.to_string(), answer.qtype));
        if !pending.answer(answered(&answer, packet), &answer, self.time_ns) {
            self.means
                .reporter
                .report(self.denied(packet, Reason::DnsUnsolicited, asked()));
            return false;
        }
        if let Err(error) = self.learn(&answer) {
            if !matches!(error, AllowError::Full) {
                self.learned.failures.add(error);
            }
            self.means
                .reporter
                .report(self.denied(packet, Reason::AllowMapFull, asked()));
            return false;
        }
        true
    }

    /// Reports a message that could not wait for the pod's turn.
    pub(super) fn not_held(&self, packet: &Packet) {
        self.means
            .reporter
            .report(self.denied(packet, Reason::DnsNotHeld, None));
    }

    /// Whether this may be the beginning of an answer to an open question.
    fn begins(&self, message: &[u8], packet: &Packet, pending: &Pending) -> bool {
        let (reason, asked) = match read_beginning(message) {
            Ok(None) => return true,
            Ok(Some(answer)) if pending.expects(&answered(&answer, packet), &answer) => {
                return true;
            }
            Ok(Some(answer)) => {
                let asked = (answer.name.to_string(), answer.qtype);
                (Reason::DnsUnsolicited, Some(asked))
            }
            Err(_) => (Reason::DnsMalformed, None),
        };
        self.count(packet, Direction::Answer, Outcome::Undeliverable);
        self.means
            .reporter
            .report(self.denied(packet, reason, asked));
        false
    }

    /// Reports fragments that are not put back.
    pub(super) fn lost_fragments(&self, packet: &Packet, why: &'static str) {
        tracing::debug!(pod = %self.name(), why, "fragments from a resolver's address were dropped");
        self.count(packet, Direction::Answer, Outcome::Undeliverable);
        self.means
            .reporter
            .report(self.denied(packet, Reason::DnsFragmented, None));
    }

    /// Notes that a question goes out.
    pub(super) fn ask(&self, question: &Question, packet: &Packet, pending: &mut Pending) {
        let exchange = Exchange {
            pod_addr: packet.src,
            resolver: packet.dst,
            resolver_port: packet.dst_port,
            pod_port: packet.src_port,
            id: question.id,
        };
        self.count(packet, Direction::Question, Outcome::Delivered);
        pending.ask(exchange, question, self.time_ns);
    }

    /// Inserts what the answer teaches.
    fn learn(&mut self, answer: &Answer) -> Result<(), AllowError> {
        if answer.addresses.is_empty() {
            return Ok(());
        }
        let dns = &self.means.dns;
        let compiled = Arc::clone(&self.enforcement.compiled);
        let names = &compiled.names;
        let now_ns = boottime_ns();
        let lifetime_ns = |ttl: u32| {
            let ttl = std::time::Duration::from_secs(u64::from(ttl));
            (ttl.clamp(dns.min_ttl, dns.max_ttl) + dns.grace).as_nanos() as u64
        };
        let taught: Vec<Taught> = answer
            .addresses
            .iter()
            .filter(|learned| !dns.is_protected(&learned.address))
            .map(|learned| Taught {
                address: learned.address,
                by_stranger: answer.way_to(learned).any(|name| names.is_strangers(name)),
                expires_ns: now_ns + lifetime_ns(learned.ttl),
            })
            .collect();
        let grant = names.grant(&answer.name);
        self.learned
            .learn(self.enforcement, &answer.name, grant, &taught, now_ns)
    }

    /// Whether everything goes on, whatever is decided.
    fn is_audit(&self) -> bool {
        self.enforcement.entry.mode == MODE_AUDIT
    }

    /// Counts a message by what became of it. In audit mode everything goes on.
    fn count(&self, packet: &Packet, direction: Direction, outcome: Outcome) {
        let transport = match packet.bit {
            bits::TCP => Transport::Tcp,
            _ => Transport::Udp,
        };
        let outcome = if self.is_audit() {
            Outcome::Delivered
        } else {
            outcome
        };
        self.means.stats.count(transport, direction, outcome);
    }

    fn denied(&self, packet: &Packet, reason: Reason, asked: Option<(String, u16)>) -> Denied {
        // A later fragment, and what a fragment of ICMP is of, have none.
        let has_ports = packet.bit & (bits::TCP | bits::UDP | bits::SCTP) != 0;
        let end = |address, port| {
            Some(Endpoint {
                address,
                port: has_ports.then_some(port),
            })
        };
        Denied {
            pod: Arc::clone(&self.enforcement.identity),
            verdict: if self.is_audit() {
                Verdict::Audited
            } else {
                Verdict::Dropped
            },
            reason,
            protocol: Some(packet.protocol),
            src: end(packet.src, packet.src_port),
            dst: end(packet.dst, packet.dst_port),
            icmp: None,
            dns: asked.map(|(name, qtype)| (name, type_name(qtype).into_owned())),
            dst_names: Vec::new(),
            rule: None,
            time: SystemTime::now(),
            count: 1,
        }
    }

    fn name(&self) -> impl std::fmt::Display {
        self.enforcement.name()
    }
}

/// The exchange that an answer belongs to.
fn answered(answer: &Answer, packet: &Packet) -> Exchange {
    Exchange {
        pod_addr: packet.dst,
        resolver: packet.src,
        resolver_port: packet.src_port,
        pod_port: packet.dst_port,
        id: answer.id,
    }
}

impl stream::Decide for Judge<'_> {
    fn question(&mut self, message: &[u8], packet: &Packet) -> stream::Asked {
        match Judge::question(self, message, packet) {
            None => stream::Asked::Unreadable,
            Some((question, is_allowed))
                if is_allowed || self.enforcement.entry.mode == MODE_AUDIT =>
            {
                stream::Asked::Allowed(question)
            }
            Some((question, _)) => {
                stream::Asked::Refused(refuse(&question, self.means.dns.refusal))
            }
        }
    }

    fn ask(&mut self, question: &Question, packet: &Packet, pending: &mut Pending) {
        Judge::ask(self, question, packet, pending);
    }

    fn answer(&mut self, message: &[u8], packet: &Packet, pending: &mut Pending) -> bool {
        Judge::answer(self, message, packet, pending)
    }

    fn begins(&mut self, message: &[u8], packet: &Packet, pending: &Pending) -> bool {
        Judge::begins(self, message, packet, pending)
    }

    fn lost(&mut self, packet: &Packet, why: &'static str) {
        tracing::debug!(pod = %self.name(), why, "a connection with a resolver was reset");
        self.means.stats.connections_lost.add(1);
        self.means
            .reporter
            .report(self.denied(packet, Reason::DnsOverTcp, None));
    }
}

impl Enforcement {
    /// The pod, as logs name it.
    pub(super) fn name(&self) -> impl std::fmt::Display + use<> {
        let PodIdentity {
            namespace, name, ..
        } = &*self.identity;
        format!("{namespace}/{name}")
    }
}
