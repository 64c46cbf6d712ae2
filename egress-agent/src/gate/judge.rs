//! The decision on one DNS message, over UDP or TCP.

use std::{
    sync::Arc,
    task::{Poll, ready},
    time::SystemTime,
};

use egress_common::{packet::Packet, protocol::bits, reason::Reason, records::MODE_AUDIT};

use super::{
    Direction, DnsSettings, Enforcement, Outcome, Stats, Transport,
    insertion::Insertion,
    learned::{AnswerAddress, Table},
    pending::{Exchange, Pending},
    stream::{self, Answered},
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

/// The context of every decision, in addition to the pod.
pub(super) struct DecisionContext {
    pub(super) dns: DnsSettings,
    pub(super) reporter: Reporter,
    pub(super) stats: Arc<Stats>,
    /// Changes with everything on which it depends whether a name may be queried, besides the pod's policy.
    pub(super) generation: u32,
}

impl DecisionContext {
    pub(super) fn new(dns: DnsSettings, reporter: Reporter, stats: Arc<Stats>) -> Self {
        let mut context = Self {
            dns: dns.clone(),
            reporter,
            stats,
            generation: 0,
        };
        context.configure(dns);
        context
    }

    /// Replaces the DNS settings. Keeps whether the resolvers are known to walk search lists.
    pub(super) fn configure(&mut self, dns: DnsSettings) {
        match dns.autopath {
            Autopath::Auto => {}
            Autopath::On => self.stats.walks_search_lists.set(1),
            Autopath::Off => self.stats.walks_search_lists.set(0),
        }
        self.dns = dns;
    }

    pub(super) fn walks_search_lists(&self) -> bool {
        self.stats.walks_search_lists.get() != 0
    }
}

/// Decides on a pod's messages and reports those that do not pass.
pub(super) struct Judge<'a> {
    enforcement: &'a mut Enforcement,
    learned: &'a mut Table,
    context: &'a DecisionContext,
    /// When the message was held.
    time_ns: u64,
}

impl<'a> Judge<'a> {
    /// A judge for a message that was held at `time_ns`.
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

    /// Reads a query, and says whether the rules allow its name. `None` when the message is no readable
    /// query.
    pub(super) fn question(&self, message: &[u8], packet: &Packet) -> Option<(Question, bool)> {
        let question = match read_question(message) {
            Ok(question) => question,
            Err(error) => {
                tracing::debug!(pod = %self.name(), %error, "cannot read a query");
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

    /// Reports that the rules do not allow a name.
    fn report_name(&self, rule: QuestionRule, packet: &Packet, (name, qtype): (&Name, u16)) {
        let asked = Some((name.to_string(), qtype));
        let mut denied = self.denied(packet, Reason::DnsName, asked);
        let rules = &self.enforcement.compiled.names;
        let entry = match rule {
            QuestionRule::Denied => rules.explain_denied(name),
            QuestionRule::NotListed => rules.explain_unlisted(),
            QuestionRule::Allowed => None,
        };
        denied.rule = entry.cloned();
        self.context.reporter.report(denied);
    }

    /// Reports a query that is dropped because its pod is not known.
    pub(super) fn report_unknown_pod(&self, message: &[u8], packet: &Packet) {
        let question = read_question(message).ok();
        let asked = question.map(|question| (question.name.to_string(), question.qtype));
        self.count(packet, Direction::Question, Outcome::Undeliverable);
        self.context
            .reporter
            .report(self.denied(packet, Reason::PodUnknown, asked));
    }

    /// Reports a query that is dropped because it does not go from the pod to a resolver.
    pub(super) fn report_misdirected(&self, packet: &Packet, reason: Reason) {
        self.count(packet, Direction::Question, Outcome::Undeliverable);
        self.context
            .reporter
            .report(self.denied(packet, reason, None));
    }

    /// Decides on a response; see [`stream::Decide::answer`].
    pub(super) fn answer(
        &mut self,
        message: &[u8],
        packet: &Packet,
        pending: &mut Pending,
    ) -> Poll<Answered> {
        let answered = ready!(self.accept(message, packet, pending));
        let outcome = match answered {
            Answered::Delivered => Outcome::Delivered,
            Answered::Withheld => Outcome::Undeliverable,
        };
        self.count(packet, Direction::Answer, outcome);
        Poll::Ready(answered)
    }

    fn accept(&mut self, message: &[u8], packet: &Packet, pending: &mut Pending) -> Poll<Answered> {
        if self.context.dns.is_from_claimed(packet) {
            self.context
                .reporter
                .report(self.denied(packet, Reason::DnsElsewhere, None));
            return Poll::Ready(Answered::Withheld);
        }
        if let Some(id) = read_rejection(message) {
            let is_delivered = pending.reject(answered(id, packet), self.time_ns)
                || (self.take_query(id, packet, pending)
                    && pending.reject(answered(id, packet), self.time_ns));
            if !is_delivered {
                self.context
                    .reporter
                    .report(self.denied(packet, Reason::DnsUnsolicited, None));
                return Poll::Ready(Answered::Withheld);
            }
            return Poll::Ready(Answered::Delivered);
        }
        let insertion = self.begun(message, packet);
        let insertion = insertion.or_else(|| self.begin(message, packet, pending));
        insertion.map_or(Poll::Ready(Answered::Withheld), |insertion| {
            self.proceed(insertion, message, packet, pending)
        })
    }

    /// The insertion that an earlier turn has begun for this response.
    fn begun(&mut self, message: &[u8], packet: &Packet) -> Option<Box<Insertion>> {
        let id = message.first_chunk()?;
        let exchange = answered(u16::from_be_bytes(*id), packet);
        let settings = (boottime_ns(), self.context.generation);
        self.learned.begun(&exchange, message, settings)
    }

    /// Reads a response. Begins the insertion of its addresses if it answers an open query; reports it if not.
    fn begin(
        &mut self,
        message: &[u8],
        packet: &Packet,
        pending: &mut Pending,
    ) -> Option<Box<Insertion>> {
        let answer = match read_answer(message) {
            Ok(answer) => answer,
            Err(error) => {
                tracing::debug!(pod = %self.name(), %error, "cannot read a response");
                self.context
                    .reporter
                    .report(self.denied(packet, Reason::DnsMalformed, None));
                return None;
            }
        };
        let exchange = answered(answer.id, packet);
        let is_expected = pending.expects(&exchange, &answer, self.time_ns)
            || (self.take_query(answer.id, packet, pending)
                && pending.expects(&exchange, &answer, self.time_ns));
        if !is_expected {
            // A late response closes its query, too.
            pending.answer(exchange, &answer, self.time_ns);
            let asked = (answer.name.to_string(), answer.qtype);
            self.context
                .reporter
                .report(self.denied(packet, Reason::DnsUnsolicited, Some(asked)));
            return None;
        }
        let found = self.found_by_search(&answer).cloned();
        if found.is_some() {
            self.notice_search_lists(&answer);
            // When the query went out, the gate did not know that the resolver walks search lists.
            let rule = self.enforcement.compiled.names.question(&answer.name, true);
            if rule != QuestionRule::Allowed {
                pending.answer(exchange, &answer, self.time_ns);
                self.report_name(rule, packet, (&answer.name, answer.qtype));
                return None;
            }
        }
        Some(Box::new(self.insertion(exchange, answer, found)))
    }

    /// Inserts the next addresses of a response. When all are there, the response may be delivered.
    fn proceed(
        &mut self,
        mut insertion: Box<Insertion>,
        message: &[u8],
        packet: &Packet,
        pending: &mut Pending,
    ) -> Poll<Answered> {
        let now_ns = boottime_ns();
        let inserted = self
            .learned
            .proceed(self.enforcement, &mut insertion, now_ns);
        let reason = match inserted {
            Poll::Pending if !insertion.is_overdue(now_ns) => {
                self.learned.continue_later(insertion, message, now_ns);
                return Poll::Pending;
            }
            Poll::Pending => Some(Reason::DnsNotHeld),
            Poll::Ready(Ok(())) => None,
            Poll::Ready(Err(error)) => {
                if !matches!(error, AllowError::Full) {
                    self.learned.failures.add(error);
                }
                Some(Reason::AllowMapFull)
            }
        };
        let Insertion {
            exchange, answer, ..
        } = *insertion;
        let is_expected = pending.answer(exchange, &answer, self.time_ns);
        let reason = reason.or((!is_expected).then_some(Reason::DnsUnsolicited));
        if let Some(reason) = reason {
            let asked = (answer.name.to_string(), answer.qtype);
            self.context
                .reporter
                .report(self.denied(packet, reason, Some(asked)));
            return Poll::Ready(Answered::Withheld);
        }
        Poll::Ready(Answered::Delivered)
    }

    /// Takes over a query that the programs have let pass: the agent has to read its response. Returns whether there
    /// was one.
    fn take_query(&mut self, id: u16, packet: &Packet, pending: &mut Pending) -> bool {
        let exchange = answered(id, packet);
        let Some((question, time_ns)) = self.enforcement.take_query(&exchange, packet) else {
            return false;
        };
        pending.ask(exchange, &question, time_ns);
        true
    }

    /// Reports a message for which the pod's backlog has no room.
    pub(super) fn report_not_held(&self, packet: &Packet) {
        self.context
            .reporter
            .report(self.denied(packet, Reason::DnsNotHeld, None));
    }

    /// The name that the resolver found instead of the queried one by walking a search list.
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

    /// Records that the resolvers walk search lists.
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

    /// Whether a message may be the beginning of a response to an open query.
    fn may_begin(&self, message: &[u8], packet: &Packet, pending: &Pending) -> bool {
        let (reason, asked) = match read_beginning(message) {
            Ok(None) => return true,
            Ok(Some(answer))
                if pending.expects(&answered(answer.id, packet), &answer, self.time_ns) =>
            {
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

    /// Reports fragments that are dropped.
    pub(super) fn report_lost_fragments(&self, packet: &Packet, why: &'static str) {
        tracing::debug!(pod = %self.name(), why, "dropped fragments from a resolver's address");
        self.count(packet, Direction::Answer, Outcome::Undeliverable);
        self.context
            .reporter
            .report(self.denied(packet, Reason::DnsFragmented, None));
    }

    /// Records a query that goes out as open.
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

    /// The insertion of a response's addresses, for the queried name and for the name that the resolver `found`
    /// instead.
    fn insertion(&mut self, exchange: Exchange, answer: Answer, found: Option<Name>) -> Insertion {
        let dns = &self.context.dns;
        let names = &self.enforcement.compiled.names;
        let now_ns = boottime_ns();
        let lifetime_ns = |ttl: u32| {
            let ttl = std::time::Duration::from_secs(u64::from(ttl));
            (ttl.clamp(dns.min_ttl, dns.max_ttl) + dns.grace).as_nanos() as u64
        };
        let mut addresses = Vec::with_capacity(answer.addresses.len());
        for learned in &answer.addresses {
            if dns.is_protected(&learned.address) {
                self.learned
                    .remember_protected(learned.address, &answer.name);
                continue;
            }
            addresses.push(AnswerAddress {
                address: learned.address,
                by_stranger: answer.way_to(learned).any(|name| names.is_strangers(name)),
                expires_ns: now_ns + lifetime_ns(learned.ttl),
            });
        }
        let mut given = Vec::with_capacity(2);
        if !addresses.is_empty() {
            let is_found = found.is_some();
            if let Some(found) = found {
                let grant = names.grant(&found);
                given.push((Arc::new(found), grant));
            }
            let grant = names.grant(&answer.name);
            if !is_found || !grant.classes.is_empty() {
                given.push((Arc::new(answer.name.clone()), grant));
            }
        }
        let generation = self.context.generation;
        Insertion::new(exchange, answer, addresses, given, (now_ns, generation))
    }

    /// Whether the pod is in audit mode: every message goes on, whatever the decision.
    fn is_audit(&self) -> bool {
        self.enforcement.entry.mode == MODE_AUDIT
    }

    /// Counts a message by its outcome. In audit mode every message counts as delivered.
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
        // A later fragment has no ports, nor does a fragment of ICMP.
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
            closed_by: Arc::clone(&self.enforcement.compiled.closed_by),
            time: SystemTime::now(),
            count: 1,
        }
    }

    fn name(&self) -> impl std::fmt::Display {
        self.enforcement.name()
    }
}

/// The exchange to which a response with this id belongs.
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

    fn answer(&mut self, message: &[u8], packet: &Packet, pending: &mut Pending) -> Poll<Answered> {
        Judge::answer(self, message, packet, pending)
    }

    fn may_begin(&mut self, message: &[u8], packet: &Packet, pending: &Pending) -> bool {
        Judge::may_begin(self, message, packet, pending)
    }

    fn is_resolver(&self, packet: &Packet) -> bool {
        self.context.dns.is_to_resolver(packet)
    }

    fn lost(&mut self, packet: &Packet, why: &'static str) {
        tracing::debug!(pod = %self.name(), why, "reset a connection with a resolver");
        self.context.stats.connections_lost.add(1);
        self.context
            .reporter
            .report(self.denied(packet, Reason::DnsOverTcp, None));
    }
}

impl Enforcement {
    /// The pod's name in log lines.
    pub(super) fn name(&self) -> impl std::fmt::Display + use<> {
        let PodIdentity {
            namespace, name, ..
        } = &*self.identity;
        format!("{namespace}/{name}")
    }
}
