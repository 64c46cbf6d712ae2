//! The decision on one message, however it came.

use std::{sync::Arc, time::SystemTime};

use egress_common::{packet::Packet, protocol::bits, reason::Reason, records::MODE_AUDIT};

use super::{
    Direction, DnsSettings, Enforcement, Outcome, Stats, Transport,
    learned::{AnswerAddress, Table},
    pending::{Exchange, Pending},
    stream,
};
use crate::{
    datapath::{AllowError, boottime_ns},
    report::{Denied, Endpoint, PodIdentity, Reporter, Verdict},
};
use egress_dns::{
    Answer, Name, Question, read_answer, read_beginning, read_question, read_rejection, refuse,
    type_name,
};
use egress_policy::{Autopath, QuestionRule};

/// What every decision needs besides the pod.
pub(super) struct DecisionContext {
    pub(super) dns: DnsSettings,
    pub(super) reporter: Reporter,
    pub(super) stats: Arc<Stats>,
}

impl DecisionContext {
    pub(super) fn new(dns: DnsSettings, reporter: Reporter, stats: Arc<Stats>) -> Self {
        let mut context = Self {
            dns: dns.clone(),
            reporter,
            stats,
        };
        context.configure(dns);
        context
    }

    /// Treats DNS in another way from now on. What was noticed of the resolvers stays.
    pub(super) fn configure(&mut self, dns: DnsSettings) {
        match dns.autopath {
            Autopath::Auto => {}
            Autopath::On => self.stats.walks_search_lists.set(1),
            Autopath::Off => self.stats.walks_search_lists.set(0),
        }
        self.dns = dns;
    }

    fn walks_search_lists(&self) -> bool {
        self.stats.walks_search_lists.get() != 0
    }
}

/// Decides on a pod's messages and reports what does not pass.
pub(super) struct Judge<'a> {
    enforcement: &'a mut Enforcement,
    learned: &'a mut Table,
    context: &'a DecisionContext,
    /// When the message was taken.
    time_ns: u64,
}

impl<'a> Judge<'a> {
    /// Decides on a message that was taken then.
    pub(super) fn new(
        enforcement: &'a mut Enforcement,
        learned: &'a mut Table,
        context: &'a DecisionContext,
        time_ns: u64,
    ) -> Self {
        Self {
            enforcement,
            learned,
            context,
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
                self.context
                    .reporter
                    .report(self.denied(packet, Reason::DnsMalformed, None));
                return None;
            }
        };
        let rules = &self.enforcement.compiled.names;
        let walks = self.context.walks_search_lists();
        let rule = rules.question(&question.name, walks);
        let is_allowed = rule == QuestionRule::Allowed;
        if !is_allowed {
            self.report_name(rule, packet, (&question.name, question.qtype));
            if !self.is_audit() {
                self.count(packet, Direction::Question, Outcome::Refused);
            }
        }
        Some((question, is_allowed))
    }

    /// Reports that a name may not be asked for.
    fn report_name(&self, rule: QuestionRule, packet: &Packet, (name, qtype): (&Name, u16)) {
        let asked = Some((name.to_string(), qtype));
        let mut denied = self.denied(packet, Reason::DnsName, asked);
        if rule == QuestionRule::Denied {
            let rules = &self.enforcement.compiled.names;
            denied.rule = rules.explain_denied(name).map(Into::into);
        }
        self.context.reporter.report(denied);
    }

    /// Reports a question that is dropped because nobody knows yet whose it is.
    pub(super) fn unknown(&self, message: &[u8], packet: &Packet) {
        let question = read_question(message).ok();
        let asked = question.map(|question| (question.name.to_string(), question.qtype));
        self.count(packet, Direction::Question, Outcome::Undeliverable);
        self.context
            .reporter
            .report(self.denied(packet, Reason::PodUnknown, asked));
    }

    /// Reports a question that is dropped because it does not go from the pod to a resolver.
    pub(super) fn astray(&self, packet: &Packet, reason: Reason) {
        self.count(packet, Direction::Question, Outcome::Undeliverable);
        self.context
            .reporter
            .report(self.denied(packet, reason, None));
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
        if let Some(id) = read_rejection(message) {
            let is_delivered = pending.reject(answered(id, packet), self.time_ns);
            if !is_delivered {
                self.context
                    .reporter
                    .report(self.denied(packet, Reason::DnsUnsolicited, None));
            }
            return is_delivered;
        }
        let answer = match read_answer(message) {
            Ok(answer) => answer,
            Err(error) => {
                tracing::debug!(pod = %self.name(), %error, "unreadable answer");
                self.context
                    .reporter
                    .report(self.denied(packet, Reason::DnsMalformed, None));
                return false;
            }
        };
        let asked = || Some((answer.name.to_string(), answer.qtype));
        if !pending.answer(answered(answer.id, packet), &answer, self.time_ns) {
            self.context
                .reporter
                .report(self.denied(packet, Reason::DnsUnsolicited, asked()));
            return false;
        }
        let found = self.found_by_search(&answer).cloned();
        if found.is_some() {
            self.notice_search_lists(&answer);
            // Nobody knew of it when this was asked.
            let rule = self.enforcement.compiled.names.question(&answer.name, true);
            if rule != QuestionRule::Allowed {
                self.report_name(rule, packet, (&answer.name, answer.qtype));
                return false;
            }
        }
        if let Err(error) = self.learn(&answer, found.as_ref()) {
            if !matches!(error, AllowError::Full) {
                self.learned.failures.add(error);
            }
            self.context
                .reporter
                .report(self.denied(packet, Reason::AllowMapFull, asked()));
            return false;
        }
        true
    }

    /// Reports a message that could not wait for the pod's turn.
    pub(super) fn not_held(&self, packet: &Packet) {
        self.context
            .reporter
            .report(self.denied(packet, Reason::DnsNotHeld, None));
    }

    /// The name that the resolver has found in place of the asked one, by walking a search list.
    fn found_by_search<'b>(&self, answer: &'b Answer) -> Option<&'b Name> {
        if self.context.dns.autopath == Autopath::Off {
            return None;
        }
        let mut of_asked = answer.aliases.iter().filter(|alias| alias.of.is_none());
        let (Some(alias), None) = (of_asked.next(), of_asked.next()) else {
            return None;
        };
        let rules = &self.enforcement.compiled.names;
        rules.without_search_suffix(&answer.name, &alias.name)
    }

    /// Notes that resolvers walk search lists.
    fn notice_search_lists(&self, answer: &Answer) {
        if !self.context.walks_search_lists() {
            self.context.stats.walks_search_lists.set(1);
            tracing::info!(
                asked = %answer.name,
                "the resolver walks the search list (CoreDNS's autopath): names below the cluster \
                 domain are judged by what it may ask upstream"
            );
        }
    }

    /// Whether this may be the beginning of an answer to an open question.
    fn begins(&self, message: &[u8], packet: &Packet, pending: &Pending) -> bool {
        let (reason, asked) = match read_beginning(message) {
            Ok(None) => return true,
            Ok(Some(answer)) if pending.expects(&answered(answer.id, packet), &answer) => {
                return true;
            }
            Ok(Some(answer)) => {
                let asked = (answer.name.to_string(), answer.qtype);
                (Reason::DnsUnsolicited, Some(asked))
            }
            Err(_) => (Reason::DnsMalformed, None),
        };
        self.count(packet, Direction::Answer, Outcome::Undeliverable);
        self.context
            .reporter
            .report(self.denied(packet, reason, asked));
        false
    }

    /// Reports fragments that are not put back.
    pub(super) fn lost_fragments(&self, packet: &Packet, why: &'static str) {
        tracing::debug!(pod = %self.name(), why, "fragments from a resolver's address were dropped");
        self.count(packet, Direction::Answer, Outcome::Undeliverable);
        self.context
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

    /// Inserts what the answer teaches, of the asked name and of the one that was `found` in its place.
    fn learn(&mut self, answer: &Answer, found: Option<&Name>) -> Result<(), AllowError> {
        if answer.addresses.is_empty() {
            return Ok(());
        }
        let dns = &self.context.dns;
        let compiled = Arc::clone(&self.enforcement.compiled);
        let names = &compiled.names;
        let now_ns = boottime_ns();
        let lifetime_ns = |ttl: u32| {
            let ttl = std::time::Duration::from_secs(u64::from(ttl));
            (ttl.clamp(dns.min_ttl, dns.max_ttl) + dns.grace).as_nanos() as u64
        };
        for learned in &answer.addresses {
            if dns.is_protected(&learned.address) {
                self.learned.withhold(learned.address, &answer.name);
            }
        }
        let answered: Vec<AnswerAddress> = answer
            .addresses
            .iter()
            .filter(|learned| !dns.is_protected(&learned.address))
            .map(|learned| AnswerAddress {
                address: learned.address,
                by_stranger: answer.way_to(learned).any(|name| names.is_strangers(name)),
                expires_ns: now_ns + lifetime_ns(learned.ttl),
            })
            .collect();
        if let Some(found) = found {
            let grant = names.grant(found);
            self.learned
                .learn(self.enforcement, found, grant, &answered, now_ns)?;
        }
        let grant = names.grant(&answer.name);
        if found.is_some() && grant.classes == 0 {
            return Ok(());
        }
        self.learned
            .learn(self.enforcement, &answer.name, grant, &answered, now_ns)
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
        self.context.stats.count(transport, direction, outcome);
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

/// The exchange that an answer with this id belongs to.
fn answered(id: u16, packet: &Packet) -> Exchange {
    Exchange {
        pod_addr: packet.dst,
        resolver: packet.src,
        resolver_port: packet.src_port,
        pod_port: packet.dst_port,
        id,
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
                stream::Asked::Refused(refuse(&question, self.context.dns.refusal))
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

    fn is_resolver(&self, packet: &Packet) -> bool {
        self.context.dns.is_to_resolver(packet)
    }

    fn lost(&mut self, packet: &Packet, why: &'static str) {
        tracing::debug!(pod = %self.name(), why, "a connection with a resolver was reset");
        self.context.stats.connections_lost.add(1);
        self.context
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
