//! The gate holds every DNS message between an enforced pod and its resolvers. It delivers a response only
//! after the pod's allow map has the addresses of the response that the rules allow.
//!
//! ```text
//!  pod ── query ──▶ from_pod ──▶ ring ──▶ do the rules allow the name?
//!                                           ├─ no:  refusal ──────────────────────────▶ pod
//!                                           └─ yes: pending; put back ─▶ to_pod ─▶ resolver
//!  pod ◀── put back ◀── every allowed address is in the allow map ◀── response ◀── ring ◀── to_pod
//!                         └─ an insertion fails: the response is dropped and reported
//! ```
//!
//! One thread does all of it. It alone writes allow maps and moves interfaces from one version of a policy to
//! the next, so no response can slip between an old map and its successor. It waits only for its ring and its
//! commands. It takes no lock that the control side holds. Its only input and output is to update maps and to
//! send frames. Other threads send to the pods that take frames slowly ([`frame_sender`]).

mod addresses;
mod backlog;
mod budget;
mod carry_over;
mod checksum;
mod eviction;
mod expired_addresses;
mod fragments;
mod frame_sender;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod insertion;
mod judge;
mod learned;
mod learned_address;
mod names_kept;
mod open_questions;

mod pending;
mod pod;
mod probe;
mod quarantine;
mod reply;
mod resolutions;
mod run;
mod share;
mod stats;
mod stream;
mod tally;
mod turns;

use std::{
    collections::HashSet,
    os::fd::AsFd as _,
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use egress_common::{
    address::Address,
    ids::{IfIndex, PodId},
    packet::Packet,
    records::{INTERFACE_SETTLING, INTERFACE_SOURCES, Interface},
};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::oneshot;

use crate::{
    datapath::{
        AllowMap, DnsTimesMap, FlowMap, HeldRing, InterfaceMap, Marks, NameMap, NoteRing,
        PendingMap,
    },
    report::{PodIdentity, Reporter},
};
use egress_dns::Refusal;
use egress_policy::{Autopath, Compiled, Prefix, Translators};

use budget::Budget;
pub use open_questions::OpenQuestion;
pub use probe::Probe;
pub use resolutions::{About, Resolutions, Resolved};
pub use stats::{Direction, Outcome, Stats, Transport};

/// Most addresses that one call of [`Gate::resolutions`] reads: DNS waits meanwhile.
const RESOLUTIONS_MAX: usize = 4096;

/// How the gate treats DNS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsSettings {
    /// The shortest lifetime of an address.
    pub min_ttl: Duration,
    /// The longest lifetime of an address.
    pub max_ttl: Duration,
    /// Added to each lifetime.
    pub grace: Duration,
    /// How the gate answers a query for a name that the rules do not allow.
    pub refusal: Refusal,
    /// Addresses that no response opens.
    pub protected: Vec<Prefix>,
    /// Prefixes of translators: an address in one of them that leads to a protected address is protected, too.
    pub translators: Translators,
    /// Addresses and ports of the resolvers that are trusted.
    pub resolvers: HashSet<(Address, u16)>,
    /// Those of the resolvers whose queries a node sends elsewhere: they are asked nothing, and their responses are not
    /// delivered.
    pub claimed: HashSet<(Address, u16)>,
    /// Whether resolvers walk search lists.
    pub autopath: Autopath,
    /// How long names that are decided resolve while no agent runs.
    pub resolve_for: Duration,
    /// Whether all other DNS messages pass unread while no agent runs.
    pub delivers_undecided: bool,
}

impl DnsSettings {
    /// These settings, with the resolvers of other settings added.
    #[must_use]
    pub fn with_resolvers_of(mut self, other: &Self) -> Self {
        self.resolvers.extend(&other.resolvers);
        self
    }

    /// How long an address stays allowed at least after a response contained it.
    fn shortest_life(&self) -> Duration {
        self.min_ttl.saturating_add(self.grace)
    }

    /// Whether a packet comes from a resolver.
    fn is_from_resolver(&self, packet: &Packet) -> bool {
        self.resolvers.contains(&(packet.src, packet.src_port))
    }

    /// Whether a packet comes from a resolver whose queries a node sends elsewhere.
    fn is_from_claimed(&self, packet: &Packet) -> bool {
        self.claimed.contains(&(packet.src, packet.src_port))
    }

    /// Whether a packet goes to a resolver that is trusted.
    fn is_to_resolver(&self, packet: &Packet) -> bool {
        self.resolvers.contains(&(packet.dst, packet.dst_port))
    }

    /// Whether the address is protected: no response opens it.
    fn is_protected(&self, address: &Address) -> bool {
        let contains =
            |address: &Address| self.protected.iter().any(|prefix| prefix.contains(address));
        contains(address)
            || self
                .translators
                .v4_behind(address)
                .is_some_and(|v4| contains(&v4))
    }
}

/// One pod under one version of its policy.
pub struct Enforcement {
    /// The pod's name and namespace.
    pub identity: Arc<PodIdentity>,
    /// The pod's compiled annotations.
    pub compiled: Arc<Compiled>,
    /// The pod's own addresses, as in the kernel's policy record.
    pub own: Vec<Address>,
    /// The entry that each of its interfaces gets in the map of interfaces.
    pub entry: Interface,
    /// The indexes of its interfaces.
    pub interfaces: Vec<IfIndex>,
    /// The allow map of this version. It is that of the version before if all entries have the same classes under both.
    pub allow: AllowMap,
    /// The pod's open queries that the programs have let pass; `None` if they let none pass.
    pub pending: Option<PendingMap>,
    /// The names by which the pod's addresses are allowed. The next agent reads this map.
    pub names: NameMap,
    /// Other versions of its policy under which an earlier agent left the pod. The gate reads this only when
    /// the pod is new at the gate.
    pub left: Vec<Left>,
    /// The pod's flows: an address with an open flow is not evicted.
    pub flows: FlowMap,
}

/// A version of a pod's policy that was in force when an earlier agent ended.
pub struct Left {
    /// Its allow map.
    pub allow: AllowMap,
    /// Whether names mean the same under the new version, so that its entries stay valid; see
    /// [`egress_common::records::Policy::names_alike`].
    pub alike: bool,
}

/// How much of a pod's traffic is judged. A pod that ran before it was enforced passes through these stages
/// in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judged {
    /// Only the source addresses of the packets from the pod.
    Sources,
    /// The source addresses; in addition, flows that others open towards the pod are recorded.
    SourcesAndInbound,
    /// Everything.
    Everything,
}

impl Judged {
    /// The interface entry for this stage.
    #[must_use]
    pub fn in_entry(self, mut entry: Interface) -> Interface {
        let flags = match self {
            Self::Sources => INTERFACE_SOURCES | INTERFACE_SETTLING,
            Self::SourcesAndInbound => INTERFACE_SOURCES,
            Self::Everything => 0,
        };
        entry.flags = entry.flags & !(INTERFACE_SOURCES | INTERFACE_SETTLING) | flags;
        entry
    }
}

/// A command from the control side.
enum Command {
    /// Move a pod to a new version of its policy, or add a new pod.
    Apply {
        enforcement: Box<Enforcement>,
        done: oneshot::Sender<Result<()>>,
    },
    /// Put a pod's policy on other interfaces.
    Move {
        pod: PodId,
        interfaces: Vec<IfIndex>,
        done: oneshot::Sender<Result<()>>,
    },
    /// Forget these pods. Their interfaces' entries stay.
    Forget {
        pods: Vec<PodId>,
        done: oneshot::Sender<Result<()>>,
    },
    /// Forget a pod and remove its interfaces' entries.
    Remove {
        pod: PodId,
        done: oneshot::Sender<Result<()>>,
    },
    /// Move a pod to a later stage of [`Judged`].
    Judge {
        pod: PodId,
        judged: Judged,
        done: oneshot::Sender<Result<()>>,
    },
    /// Stop judging on these pods' interfaces at once; the programs are detached afterwards.
    Release {
        pods: Vec<PodId>,
        done: oneshot::Sender<Result<()>>,
    },
    /// Forget addresses whose lifetime has ended and that have no open flow.
    Sweep { pod: PodId, open: HashSet<Address> },
    /// Which names of these pods resolved to these addresses?
    Names {
        asked: Vec<(PodId, Address)>,
        answer: mpsc::SyncSender<Vec<Vec<String>>>,
    },
    /// Which names and addresses has this pod resolved?
    Resolutions {
        pod: PodId,
        about: About,
        answer: oneshot::Sender<Option<Resolutions>>,
    },
    /// Replace the DNS settings.
    Configure {
        dns: DnsSettings,
        done: oneshot::Sender<Result<()>>,
    },
    /// Send probes on interfaces.
    Probe {
        probes: Vec<Probe>,
        sent: oneshot::Sender<Vec<bool>>,
    },
    /// Start reading the ring.
    Read,
    /// End the thread.
    Stop,
}

/// A handle to the gate's thread.
#[derive(Clone)]
pub struct Gate {
    commands: mpsc::Sender<Command>,
    wake: Arc<EventFd>,
    stats: Arc<Stats>,
}

impl Gate {
    /// Starts the thread. It reads no message before [`Self::read`] is called. `open` are the queries that an
    /// earlier agent put back shortly before it ended. The thread returns the queries that are open when it
    /// ends.
    ///
    /// # Errors
    ///
    /// When the sockets cannot be opened or the threads cannot be started.
    pub fn start(
        ring: HeldRing,
        interfaces: InterfaceMap,
        marks: Marks,
        dns: DnsSettings,
        reporter: Reporter,
        open: Vec<OpenQuestion>,
        (notes, times): (NoteRing, DnsTimesMap),
    ) -> Result<(Self, JoinHandle<Vec<OpenQuestion>>)> {
        let (commands, receiver) = mpsc::channel();
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wake =
            Arc::new(EventFd::from_value_and_flags(0, flags).context("cannot make an eventfd")?);
        let stats = Arc::<Stats>::default();
        let mut frame_sender = frame_sender::FrameSender::open(marks, Arc::clone(&stats))?;
        frame_sender.set_shortest_life(dns.shortest_life());
        let mut context = judge::DecisionContext::new(dns, reporter, Arc::clone(&stats));
        let notes = run::Notes::open(notes, times, &mut context)?;
        let runner = run::Runner::new(
            ring,
            receiver,
            Arc::clone(&wake),
            interfaces,
            notes,
            pod::Shared {
                frame_sender,
                context,
                streams: Budget::new(stream::LIMITS),
                fragments: Budget::new(fragments::LIMITS),
                backlog: Budget::new(backlog::LIMITS),
                quarantine: quarantine::Quarantine::new(),
            },
            open,
        );
        let thread = std::thread::Builder::new()
            .name("gate".into())
            .spawn(move || runner.run())
            .context("cannot start the gate's thread")?;
        let gate = Self {
            commands,
            wake,
            stats,
        };
        Ok((gate, thread))
    }

    /// The gate's counters and gauges.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// The names and addresses that a pod has resolved, up to the number that one call may read. `None` when
    /// the pod is not at the gate.
    ///
    /// # Errors
    ///
    /// When the gate's thread has ended.
    pub async fn resolutions(&self, pod: PodId, about: About) -> Result<Option<Resolutions>> {
        let (answer, resolutions) = oneshot::channel();
        self.send(Command::Resolutions { pod, about, answer })?;
        resolutions
            .await
            .map_err(|_| anyhow!("the gate's thread is gone"))
    }

    /// Moves a pod to a new version of its policy, or adds a new pod. After this returns without an error,
    /// the new version judges every packet of the pod, and the allow map has the addresses of allowed names
    /// that the pod resolved before.
    ///
    /// # Errors
    ///
    /// When a map cannot be written; the pod then stays under its earlier version.
    pub async fn apply(&self, enforcement: Enforcement) -> Result<()> {
        let enforcement = Box::new(enforcement);
        self.ask(|done| Command::Apply { enforcement, done }).await
    }

    /// Puts a pod's policy on other interfaces.
    ///
    /// # Errors
    ///
    /// When the map of interfaces cannot be written.
    pub async fn move_to(&self, pod: PodId, interfaces: Vec<IfIndex>) -> Result<()> {
        self.ask(|done| Command::Move {
            pod,
            interfaces,
            done,
        })
        .await
    }

    /// Moves a pod to a later stage of [`Judged`], from the next packet on.
    ///
    /// # Errors
    ///
    /// When the map of interfaces cannot be written.
    pub async fn judge(&self, pod: PodId, judged: Judged) -> Result<()> {
        self.ask(|done| Command::Judge { pod, judged, done }).await
    }

    /// Stops judging on these pods' interfaces at once, and puts back their quarantined queries. The caller
    /// detaches the programs afterwards, which takes much longer.
    ///
    /// # Errors
    ///
    /// When the map of interfaces cannot be written.
    pub async fn release(&self, pods: Vec<PodId>) -> Result<()> {
        self.ask(|done| Command::Release { pods, done }).await
    }

    /// Forgets pods that are gone, before others are put on their interfaces. What a pod resolved must not be delivered
    /// to its successor, whose allow map does not have it. The interfaces stay under the policies of these pods, and
    /// their DNS messages are dropped. Pods in quarantine stay: their queries are judged again for their successors.
    ///
    /// # Errors
    ///
    /// When the gate's thread has ended.
    pub async fn forget(&self, pods: Vec<PodId>) -> Result<()> {
        if pods.is_empty() {
            return Ok(());
        }
        self.ask(|done| Command::Forget { pods, done }).await
    }

    /// Forgets a pod. The programs must be detached from its interfaces already.
    ///
    /// # Errors
    ///
    /// When the map of interfaces cannot be written.
    pub async fn remove(&self, pod: PodId) -> Result<()> {
        self.ask(|done| Command::Remove { pod, done }).await
    }

    /// Replaces the DNS settings, from the next message on.
    ///
    /// # Errors
    ///
    /// When the gate's thread has ended.
    pub async fn configure(&self, dns: DnsSettings) -> Result<()> {
        self.ask(|done| Command::Configure { dns, done }).await
    }

    /// Sends probe frames. Returns for each probe whether all its frames went out.
    ///
    /// # Errors
    ///
    /// When the gate's thread has ended.
    pub async fn probe(&self, probes: Vec<Probe>) -> Result<Vec<bool>> {
        let (sent, result) = oneshot::channel();
        self.send(Command::Probe { probes, sent })?;
        result
            .await
            .map_err(|_| anyhow!("the gate's thread is gone"))
    }

    /// Forgets a pod's addresses whose lifetime has ended, except those in `open`.
    pub fn sweep(&self, pod: PodId, open: HashSet<Address>) {
        // The caller that waits for the gate's thread notices its end.
        let _ = self.send(Command::Sweep { pod, open });
    }

    /// The names that resolved to these addresses, in the order of `asked`. Empty when the gate's thread has
    /// ended.
    pub fn names(&self, asked: Vec<(PodId, Address)>) -> Vec<Vec<String>> {
        let (answer, names) = mpsc::sync_channel(1);
        if self.send(Command::Names { asked, answer }).is_err() {
            return Vec::new();
        }
        names.recv().unwrap_or_default()
    }

    /// Starts reading the ring. The caller first adds the pods that an earlier agent left enforced, because a
    /// message is dropped if its pod is not at the gate.
    pub fn read(&self) {
        // The caller that waits for the gate's thread notices its end.
        let _ = self.send(Command::Read);
    }

    /// Ends the thread. Messages that are still in the ring are left to the next agent.
    pub fn stop(&self) {
        let _ = self.send(Command::Stop);
    }

    async fn ask(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<()>>) -> Command,
    ) -> Result<()> {
        let (done, result) = oneshot::channel();
        self.send(command(done))?;
        result
            .await
            .map_err(|_| anyhow!("the gate's thread is gone"))?
    }

    fn send(&self, command: Command) -> Result<()> {
        self.commands
            .send(command)
            .map_err(|_| anyhow!("the gate's thread is gone"))?;
        // The counter cannot overflow: the gate resets it each time it wakes.
        nix::unistd::write(self.wake.as_fd(), &1u64.to_ne_bytes())
            .context("cannot wake the gate's thread")?;
        Ok(())
    }
}
