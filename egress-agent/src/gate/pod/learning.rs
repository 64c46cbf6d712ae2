//! The pod's part in learning by the programs: the decided names, and the addresses that the programs have learned.
//!
//! Before the agent changes anything that the programs rely on (the version of the policy, the maps of decisions and of
//! learned addresses), it stops them on the pod's interfaces ([`Pod::stop_learning`]) and reads all notes. A program
//! that is still running finds the interface's entry changed and leaves its message to the agent (`is_current` in
//! `egress-ebpf/src/message.rs`). So no address is delivered that the agent does not know.

use std::{
    collections::{HashMap, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::atomic::{Ordering, fence},
};

use anyhow::Result;
use egress_common::{
    address::Address,
    limits::RESPONSE_TIMEOUT_NS,
    packet::Packet,
    protocol::bits,
    records::{
        DECISION_ALIASES, Decision, INTERFACE_LEARNS, INTERFACE_SETTLING, INTERFACE_SOURCES,
        LearnedNote, MODE_ENFORCE, POLICY_UNIDENTIFIED, PendingKey,
    },
};

use super::{
    super::{
        Enforcement, frame_sender::FrameSender, learned::AnswerAddress, learned_address::given,
        pending::Exchange,
    },
    InterfaceMap, Pod, Shared, boottime_ns,
};
use crate::datapath::{AllowError, Decided};
use egress_dns::{Name, Question, read_question};

/// The shift of the number in an interface's flags that is another one each time when learning starts.
const EPOCH_SHIFT: u32 = 16;
/// The bits of an interface's flags without that number.
const FLAGS: u32 = (1 << EPOCH_SHIFT) - 1;

/// The names of one pod that the programs know as decided.
#[derive(Default)]
pub(super) struct DecidedNames {
    names: HashSet<Name>,
    /// The generation of the settings under which they were decided.
    generation: u32,
    /// The map of decisions had no room for another name.
    is_full: bool,
}

/// Ends of lifetimes that the programs have learned, by the address and the [`id_of`] the name. A note has the lifetime of
/// the first response, and later ones have no note.
#[derive(Default)]
pub(super) struct LeftLifetimes(HashMap<(Address, u64), u64>);

impl LeftLifetimes {
    pub(super) fn add(&mut self, lifetimes: &[(Address, (u64, u64))]) {
        for &(address, (expires_ns, id)) in lifetimes {
            let known = self.0.entry((address, id)).or_default();
            *known = expires_ns.max(*known);
        }
    }

    /// The end of a lifetime that a note says to end at `expires_ns`.
    fn extended(&self, address: Address, name: &Name, expires_ns: u64) -> u64 {
        if self.0.is_empty() {
            return expires_ns;
        }
        let left = self.0.get(&(address, id_of(name)));
        left.map_or(expires_ns, |&left| expires_ns.max(left))
    }
}

impl Enforcement {
    /// Lets the programs learn on the interfaces from the next write on, if they can for this pod.
    pub(in super::super) fn start_learning(&mut self) {
        self.entry.flags &= FLAGS & !INTERFACE_LEARNS;
        if self.can_learn() {
            let epoch = (boottime_ns() >> EPOCH_SHIFT) as u32;
            self.entry.flags |= INTERFACE_LEARNS | epoch << EPOCH_SHIFT;
        }
    }

    /// Whether the programs can learn for this pod.
    fn can_learn(&self) -> bool {
        let is_known = self.compiled.record.flags & POLICY_UNIDENTIFIED == 0;
        let is_judged = self.entry.flags & (INTERFACE_SOURCES | INTERFACE_SETTLING) == 0;
        is_known
            && is_judged
            && self.entry.mode == MODE_ENFORCE
            && self.pending.is_some()
            && self.allow.has_learning()
    }

    fn learns(&self) -> bool {
        self.entry.flags & INTERFACE_LEARNS != 0
    }

    /// Takes a query that a program has let pass out of the kernel's open ones.
    pub(in super::super) fn take_query(
        &mut self,
        exchange: &Exchange,
        packet: &Packet,
    ) -> Option<(Question, u64)> {
        if packet.bit != bits::UDP {
            return None;
        }
        let key = PendingKey {
            pod_addr: exchange.pod_addr,
            resolver: exchange.resolver,
            pod_port: exchange.pod_port,
            resolver_port: exchange.resolver_port,
            id: exchange.id,
            pad: 0,
        };
        let query = match self.pending.as_mut()?.take(&key) {
            Ok(query) => query?,
            Err(error) => {
                tracing::debug!(pod = %self.name(), %error, "cannot read an open query");
                return None;
            }
        };
        let mut message = exchange.id.to_be_bytes().to_vec();
        message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        let question = query.question.iter().flat_map(|word| word.to_le_bytes());
        message.extend(question.take(query.len as usize));
        let question = read_question(&message).ok()?;
        Some((question, query.time_ns))
    }

    /// When an address expires that the programs have learned, and the [`id_of`] the name by which they learned it.
    pub(in super::super) fn learned_until(&mut self, address: Address) -> Option<(u64, u64)> {
        let entry = self.allow.learning()?.learned(address).ok()??;
        Some((entry.expires_ns, entry.id))
    }
}

/// The id that stands for a name in the entries that the programs have learned.
pub(in super::super) fn id_of(name: &Name) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}

impl Pod {
    /// Stops the programs from learning on the pod's interfaces. The caller reads all notes afterwards.
    ///
    /// # Errors
    ///
    /// When the map of interfaces cannot be written.
    pub(in super::super) fn stop_learning(&mut self, interfaces: &mut InterfaceMap) -> Result<()> {
        if !self.enforcement.learns() {
            return Ok(());
        }
        let mut entry = self.enforcement.entry;
        entry.flags &= FLAGS & !INTERFACE_LEARNS;
        for &ifindex in &self.enforcement.interfaces {
            interfaces.set(ifindex, entry)?;
        }
        // Not before: after a failure, programs may go on learning on some of the interfaces.
        self.enforcement.entry = entry;
        // A program that does not see this write has written its note before the next read of the ring.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Ends learning for a pod that is about to be released: nothing writes the entries of its interfaces any more.
    pub(in super::super) fn end_learning(&mut self) {
        self.enforcement.entry.flags &= FLAGS & !INTERFACE_LEARNS;
        self.enforcement.pending = None;
    }

    /// Lets the programs learn again on the pod's interfaces.
    ///
    /// # Errors
    ///
    /// When the map of interfaces cannot be written.
    pub(in super::super) fn start_learning(
        &mut self,
        interfaces: &mut InterfaceMap,
        frame_sender: &mut FrameSender,
    ) -> Result<()> {
        self.enforcement.start_learning();
        self.enforcement.write_interfaces(interfaces, frame_sender)
    }

    /// Tells the programs that the pod may query a name, and what its addresses get. Returns whether they did not know
    /// it before: a query that they have held although they know its name is one for the agent.
    pub(super) fn decide_name(&mut self, name: &Name, shared: &Shared) -> bool {
        // The programs do not know which resolvers are claimed.
        if !self.enforcement.learns() || !shared.context.dns.claimed.is_empty() {
            return false;
        }
        let generation = shared.context.generation;
        if self.decided.generation != generation {
            self.decided = DecidedNames {
                generation,
                ..DecidedNames::default()
            };
        }
        if self.decided.is_full || self.decided.names.contains(name) {
            return false;
        }
        let Some(decision) = self.decision(name, generation) else {
            return false;
        };
        let Some(learning) = self.enforcement.allow.learning() else {
            return false;
        };
        match learning.decide(name, decision) {
            Ok(Decided::Written) => self.decided.names.insert(name.clone()),
            Ok(Decided::Full) => {
                self.decided.is_full = true;
                false
            }
            Err(error) => {
                tracing::debug!(pod = %self.enforcement.name(), %error, "cannot keep a decision");
                self.decided.is_full = true;
                false
            }
        }
    }

    /// What the pod's rules give to the addresses of a name that it may query; `None` if only the agent can tell.
    fn decision(&self, name: &Name, generation: u32) -> Option<Decision> {
        let record = &self.enforcement.compiled.record;
        let names = &self.enforcement.compiled.names;
        let grant = names.grant(name);
        if grant.classes.meets(record.deny.or(record.pass)) {
            return None;
        }
        let is_strangers = names.is_strangers(name);
        let (classes, internal_classes) = given(grant, is_strangers);
        Some(Decision {
            classes,
            internal_classes,
            id: id_of(name),
            generation,
            // Aliases of the cluster's names mean more than an address, and the agent judges them.
            flags: if is_strangers { DECISION_ALIASES } else { 0 },
        })
    }

    /// Adds to the table an address that the programs have learned.
    pub(in super::super) fn note_learned(&mut self, note: &LearnedNote, shared: &Shared) {
        // A program has found the entry of its interface changed after it wrote this, and left the response to the
        // agent.
        if self.is_changing() {
            return;
        }
        let bytes = note.name.bytes();
        let mut len = 0;
        while let Some(&label) = bytes.get(len)
            && label != 0
        {
            len += 1 + usize::from(label);
        }
        let Some(name) = bytes.get(..len).and_then(Name::from_wire) else {
            return;
        };
        if shared.context.dns.is_protected(&note.addr) {
            self.learned.remember_protected(note.addr, &name);
            return;
        }
        let compiled = std::sync::Arc::clone(&self.enforcement.compiled);
        let answered = AnswerAddress {
            address: note.addr,
            by_stranger: note.by_alias != 0 || compiled.names.is_strangers(&name),
            expires_ns: self
                .left_lifetimes
                .extended(note.addr, &name, note.expires_ns),
        };
        let grant = compiled.names.grant(&name);
        self.begin_decision(&shared.frame_sender);
        let learned = self.learned.learn(
            &mut self.enforcement,
            &name,
            grant,
            &[answered],
            boottime_ns(),
        );
        // The programs have the address until it expires. An edit of the policy before that closes it.
        match learned {
            Ok(()) => {}
            Err(AllowError::Full) => {
                shared.context.stats.notes_without_room.add(1);
                self.tallies.notes_without_room.add(1);
            }
            Err(error) => self.learned.failures.add(error),
        }
    }

    /// Extends the lifetimes of addresses to those that the programs have learned.
    pub(super) fn refresh_learned(&mut self) {
        let Some(learning) = self.enforcement.allow.learning() else {
            return;
        };
        match learning.lifetimes() {
            Ok(learned) => self.learned.refresh(learned),
            Err(error) => {
                let pod = self.enforcement.name();
                tracing::warn!(%pod, %error, "lifetimes of addresses may be shorter than learned");
            }
        }
    }

    /// Whether the programs were stopped from learning for a change that then did not happen.
    pub(in super::super) fn has_stopped_learning(&self) -> bool {
        !self.is_changing() && !self.enforcement.learns() && self.enforcement.can_learn()
    }

    /// When entries that the programs no longer need were last removed, if it is time to do it again; see
    /// [`Self::clean_learned`].
    pub(in super::super) fn needs_cleaning(&self, now_ns: u64) -> Option<u64> {
        let is_due =
            self.decided.is_full || now_ns.saturating_sub(self.cleaned_ns) > RESPONSE_TIMEOUT_NS;
        (is_due && !self.is_changing() && self.enforcement.learns()).then_some(self.cleaned_ns)
    }

    /// Notes that entries have been removed, or that it was tried.
    pub(in super::super) fn set_cleaned(&mut self, now_ns: u64) {
        self.cleaned_ns = now_ns;
    }

    /// Removes expired addresses and unanswered queries, and all decisions if there was no room for another one. The
    /// programs have been stopped from learning.
    ///
    /// # Errors
    ///
    /// When a map cannot be read or written.
    pub(in super::super) fn clean_learned(&mut self, now_ns: u64) -> Result<()> {
        // All notes from before have been read.
        self.left_lifetimes = LeftLifetimes::default();
        if let Some(pending) = &mut self.enforcement.pending {
            pending.forget_before(now_ns.saturating_sub(RESPONSE_TIMEOUT_NS))?;
        }
        let Some(learning) = self.enforcement.allow.learning() else {
            return Ok(());
        };
        learning.forget_expired(now_ns)?;
        if self.decided.is_full {
            learning.forget_decisions()?;
            self.decided = DecidedNames::default();
        }
        Ok(())
    }
}
