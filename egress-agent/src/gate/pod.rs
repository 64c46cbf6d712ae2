//! One pod at the gate: what becomes of its questions and its answers.

use std::{sync::Arc, time::SystemTime};

use anyhow::{Context as _, Result};
use egress_common::{
    packet::{Packet, Walked, walk},
    reason::Reason,
    records::{HELD_ANSWER, HELD_QUESTION, HELD_REJECT, MODE_AUDIT},
};

use super::{
    DnsSettings, Enforcement,
    checksum::complete_udp,
    learned::{Table, Taught},
    pending::{Exchange, Pending},
    reply,
    wire::Wire,
};
use crate::{
    datapath::{AllowError, HeldFrame, InterfaceMap, boottime_ns},
    dns::{Answer, Question, Refusal, read_answer, read_question, refuse, type_name},
    policy::QuestionRule,
    report::{Denied, Endpoint, PodIdentity, Reporter, Verdict},
};

/// What all pods at the gate use.
pub(super) struct Shared {
    pub(super) wire: Wire,
    pub(super) dns: DnsSettings,
    pub(super) reporter: Reporter,
}

/// One enforced pod.
pub(super) struct Pod {
    enforcement: Enforcement,
    pending: Pending,
    learned: Table,
}

impl Pod {
    /// A pod that is new at the gate. What an earlier agent left in its allow map stays there.
    pub(super) fn new(enforcement: Enforcement) -> Result<Self, AllowError> {
        let mut learned = Table::new();
        learned.adopt(&enforcement.allow)?;
        Ok(Self {
            enforcement,
            pending: Pending::new(),
            learned,
        })
    }

    /// From the next packet on, the pod's interfaces are under its policy.
    pub(super) fn write_interfaces(&self, interfaces: &mut InterfaceMap) -> Result<()> {
        self.enforcement.write_interfaces(interfaces)
    }

    /// Moves the pod to a new version of its policy.
    ///
    /// # Errors
    ///
    /// When a map cannot be written; the pod then stays under its earlier version.
    pub(super) fn apply(
        &mut self,
        mut next: Enforcement,
        interfaces: &mut InterfaceMap,
    ) -> Result<()> {
        // The same version again is an earlier attempt that failed further on.
        let learned = (next.entry.policy != self.enforcement.entry.policy)
            .then(|| {
                let compiled = Arc::clone(&next.compiled);
                self.learned
                    .carry_over(&compiled.names, &mut next, boottime_ns())
            })
            .transpose()
            .context("cannot fill the allow map of the new policy")?;
        next.write_interfaces(interfaces)?;
        if let Some(learned) = learned {
            self.learned = learned;
        }
        for ifindex in &self.enforcement.interfaces {
            if !next.interfaces.contains(ifindex) {
                interfaces.remove(*ifindex, next.entry.pod)?;
            }
        }
        self.enforcement = next;
        Ok(())
    }

    /// Puts the pod's policy on other interfaces.
    pub(super) fn move_to(&mut self, to: Vec<u32>, interfaces: &mut InterfaceMap) -> Result<()> {
        let from = std::mem::replace(&mut self.enforcement.interfaces, to);
        self.enforcement.write_interfaces(interfaces)?;
        for ifindex in from {
            if !self.enforcement.interfaces.contains(&ifindex) {
                interfaces.remove(ifindex, self.enforcement.entry.pod)?;
            }
        }
        Ok(())
    }

    /// Forgets the interfaces' entries.
    pub(super) fn remove(self, interfaces: &mut InterfaceMap) -> Result<()> {
        for ifindex in self.enforcement.interfaces {
            interfaces.remove(ifindex, self.enforcement.entry.pod)?;
        }
        Ok(())
    }

    /// What has to be done from time to time.
    pub(super) fn tick(&mut self, now_ns: u64) -> Result<(), AllowError> {
        self.pending.sweep(now_ns);
        self.learned.expire(&mut self.enforcement, now_ns)
    }

    /// See [`super::Gate::sweep`].
    pub(super) fn sweep(
        &mut self,
        open: &std::collections::HashSet<egress_common::address::Address>,
    ) -> Result<(), AllowError> {
        self.learned
            .sweep(&mut self.enforcement, open, boottime_ns())
    }

    /// Names that led to the address.
    pub(super) fn names_of(&self, address: &egress_common::address::Address) -> Vec<String> {
        self.learned.names_of(address)
    }

    /// Decides a frame from the ring. What is to be sent waits at the wire.
    pub(super) fn decide(&mut self, held: &HeldFrame<'_>, shared: &mut Shared) {
        let mut packet = Packet::EMPTY;
        if walk(&held.frame, &mut packet) != Walked::Ip {
            // A rejected packet was cut in the ring, and the walk may want all of it.
            if held.head.kind == HELD_REJECT {
                self.reject_cut(held, shared);
            }
            return;
        }
        match held.head.kind {
            HELD_QUESTION => self.question(held, &packet, shared),
            HELD_ANSWER => self.answer(held, &packet, shared),
            HELD_REJECT => reject(held, &packet, shared),
            _ => {}
        }
    }

    fn question(&mut self, held: &HeldFrame<'_>, packet: &Packet, shared: &mut Shared) {
        let Some(message) = udp_payload(held.frame, packet) else {
            return;
        };
        let question = match read_question(message) {
            Ok(question) => question,
            Err(error) => {
                tracing::debug!(pod = %self.name(), %error, "unreadable question");
                let denied = self.denied(packet, Reason::DnsMalformed, None);
                shared.reporter.report(denied);
                return;
            }
        };
        let rules = &self.enforcement.compiled.names;
        if rules.question(&question.name) != QuestionRule::Allowed {
            let mut denied = self.denied(packet, Reason::DnsName, Some(&question));
            denied.rule = rules.explain_denied(&question.name).map(Into::into);
            shared.reporter.report(denied);
            if held.head.taken != 0 {
                refuse_question(held, packet, &question, shared);
                return;
            }
        }
        let exchange = Exchange {
            pod_addr: packet.src,
            resolver: packet.dst,
            pod_port: packet.src_port,
            id: question.id,
        };
        self.pending.ask(exchange, &question, held.head.time_ns);
        if held.head.taken != 0 {
            complete_udp(shared.wire.bounce(held.head.ifindex, held.frame), packet);
        }
    }

    fn answer(&mut self, held: &HeldFrame<'_>, packet: &Packet, shared: &mut Shared) {
        let Some(message) = udp_payload(held.frame, packet) else {
            return;
        };
        let answer = match read_answer(message) {
            Ok(answer) => answer,
            Err(error) => {
                tracing::debug!(pod = %self.name(), %error, "unreadable answer");
                shared
                    .reporter
                    .report(self.denied(packet, Reason::DnsMalformed, None));
                return;
            }
        };
        let exchange = Exchange {
            pod_addr: packet.dst,
            resolver: packet.src,
            pod_port: packet.dst_port,
            id: answer.id,
        };
        if !self.pending.answer(exchange, &answer, held.head.time_ns) {
            let mut denied = self.denied(packet, Reason::DnsUnsolicited, None);
            denied.dns = Some((
                answer.name.to_string(),
                type_name(answer.qtype).into_owned(),
            ));
            shared.reporter.report(denied);
            return;
        }
        if let Err(error) = self.learn(&answer, &shared.dns) {
            let full = matches!(error, AllowError::Full);
            if !full {
                tracing::error!(pod = %self.name(), name = %answer.name, %error, "answer not delivered");
            }
            let mut denied = self.denied(packet, Reason::AllowMapFull, None);
            denied.dns = Some((
                answer.name.to_string(),
                type_name(answer.qtype).into_owned(),
            ));
            shared.reporter.report(denied);
            return;
        }
        if held.head.taken != 0 {
            complete_udp(shared.wire.deliver(held.head.ifindex, held.frame), packet);
        }
    }

    /// Inserts what the answer teaches.
    fn learn(&mut self, answer: &Answer, dns: &DnsSettings) -> Result<(), AllowError> {
        if answer.addresses.is_empty() {
            return Ok(());
        }
        let now_ns = boottime_ns();
        let lifetime_ns = |ttl: u32| {
            let ttl = std::time::Duration::from_secs(u64::from(ttl));
            (ttl.clamp(dns.min_ttl, dns.max_ttl) + dns.grace).as_nanos() as u64
        };
        let taught: Vec<Taught> = answer
            .addresses
            .iter()
            .filter(|learned| {
                !dns.protected
                    .iter()
                    .any(|prefix| prefix.contains(&learned.address))
            })
            .map(|learned| Taught {
                address: learned.address,
                expires_ns: now_ns + lifetime_ns(learned.ttl),
            })
            .collect();
        let classes = self.enforcement.compiled.names.classes(&answer.name);
        self.learned.learn(
            &mut self.enforcement,
            &answer.name,
            classes,
            &taught,
            now_ns,
        )
    }

    fn denied(&self, packet: &Packet, reason: Reason, question: Option<&Question>) -> Denied {
        let end = |address, port| {
            Some(Endpoint {
                address,
                port: Some(port),
            })
        };
        Denied {
            pod: Arc::clone(&self.enforcement.identity),
            verdict: match self.enforcement.entry.mode {
                MODE_AUDIT => Verdict::Audited,
                _ => Verdict::Dropped,
            },
            reason,
            protocol: Some(packet.protocol),
            src: end(packet.src, packet.src_port),
            dst: end(packet.dst, packet.dst_port),
            icmp: None,
            dns: question.map(|question| {
                (
                    question.name.to_string(),
                    type_name(question.qtype).into_owned(),
                )
            }),
            dst_names: Vec::new(),
            rule: None,
            time: SystemTime::now(),
            count: 1,
        }
    }

    /// A denied packet was longer than what the ring keeps of it: only its headers are there, and
    /// its length fields point beyond them.
    fn reject_cut(&self, held: &HeldFrame<'_>, shared: &mut Shared) {
        let mut whole = held.frame.to_vec();
        whole.resize(egress_common::limits::HELD_FRAME_BYTES.max(65_550), 0);
        let mut packet = Packet::EMPTY;
        if walk(&whole.as_slice(), &mut packet) == Walked::Ip {
            reject(held, &packet, shared);
        } else {
            tracing::debug!(pod = %self.name(), "a denied packet could not be rejected");
        }
    }

    fn name(&self) -> impl std::fmt::Display {
        let PodIdentity {
            namespace, name, ..
        } = &*self.enforcement.identity;
        format!("{namespace}/{name}")
    }
}

impl Enforcement {
    /// From the next packet on, the interfaces are under this version of the policy.
    fn write_interfaces(&self, interfaces: &mut InterfaceMap) -> Result<()> {
        for &ifindex in &self.interfaces {
            interfaces.set(ifindex, self.entry)?;
        }
        Ok(())
    }
}

fn refuse_question(
    held: &HeldFrame<'_>,
    packet: &Packet,
    question: &Question,
    shared: &mut Shared,
) {
    let how: Refusal = shared.dns.refusal;
    let Some(frame) = reply::udp(held.frame, packet, &refuse(question, how)) else {
        return;
    };
    shared.wire.deliver(held.head.ifindex, &frame);
}

fn reject(held: &HeldFrame<'_>, packet: &Packet, shared: &mut Shared) {
    let Some(frame) = reply::rejection(held.frame, packet) else {
        return;
    };
    shared.wire.deliver(held.head.ifindex, &frame);
}

/// The payload of a UDP datagram, by its own length field.
pub(super) fn udp_payload<'a>(frame: &'a [u8], packet: &Packet) -> Option<&'a [u8]> {
    let at = packet.l4_offset as usize;
    let len = frame.get(at + 4..at + 6)?;
    let len = usize::from(u16::from_be_bytes([len[0], len[1]]));
    frame.get(at + 8..at + len)
}
