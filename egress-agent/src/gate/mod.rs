//! The gate: every DNS message between an enforced pod and its resolvers waits here until what it
//! teaches is in the pod's allow map.
//!
//! ```text
//!  pod ── question ──▶ from_pod ──▶ ring ──▶ rules: may it be asked?
//!                                              ├─ no:  refusal ───────────────────────▶ pod
//!                                              └─ yes: pending; put back ─▶ to_pod ─▶ resolver
//!  pod ◀── put back ◀── every allowed address is in the allow map ◀── answer ◀── ring ◀── to_pod
//!                         └─ one is not: the answer is not delivered, and reported
//! ```
//!
//! One thread does all of it, and it alone writes allow maps and moves interfaces from one policy
//! to the next: so no answer can slip between an old map and its successor. It never waits for
//! anything but its ring and its commands, takes no lock that the control side holds, and does no
//! input or output but map updates and sending frames. To pods that take frames slowly others send ([`frame_sender`]).

mod backlog;
mod budget;
mod checksum;
mod eviction;
mod fragments;
mod frame_sender;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod judge;
mod learned;
mod learned_address;
mod names_kept;
mod open_questions;
mod past;
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
    packet::Packet,
    records::{INTERFACE_SETTLING, INTERFACE_SOURCES, Interface},
};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::oneshot;

use crate::{
    datapath::{AllowMap, FlowMap, HeldRing, InterfaceMap, Marks, NameMap},
    report::{PodIdentity, Reporter},
};
use egress_dns::Refusal;
use egress_policy::{Autopath, Compiled, Prefix, Translators};

use budget::Budget;
pub use open_questions::OpenQuestion;
pub use probe::Probe;
pub use resolutions::{About, Resolutions, Resolved};
pub use stats::{Direction, Outcome, Stats, Transport};

/// Most addresses that are looked at for one answer to [`Gate::resolutions`]: DNS waits meanwhile.
const LOOKED_AT: usize = 4096;

/// How the gate treats DNS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsSettings {
    /// An address lives at least this long.
    pub min_ttl: Duration,
    /// An address lives at most this long.
    pub max_ttl: Duration,
    /// And this long on top.
    pub grace: Duration,
    /// How a question that may not be asked is answered.
    pub refusal: Refusal,
    /// Addresses that no answer teaches.
    pub protected: Vec<Prefix>,
    /// Through these, no answer leads to them either.
    pub translators: Translators,
    /// Addresses and ports of the resolvers.
    pub resolvers: HashSet<(Address, u16)>,
    /// Whether resolvers walk search lists.
    pub autopath: Autopath,
}

impl DnsSettings {
    /// The same with the resolvers of other settings, too.
    #[must_use]
    pub fn with_resolvers_of(mut self, other: &Self) -> Self {
        self.resolvers.extend(&other.resolvers);
        self
    }

    /// An address that a response teaches stays allowed for so long at least.
    fn shortest_life(&self) -> Duration {
        self.min_ttl.saturating_add(self.grace)
    }

    /// Whether a packet comes from a resolver.
    fn is_from_resolver(&self, packet: &Packet) -> bool {
        self.resolvers.contains(&(packet.src, packet.src_port))
    }

    /// Whether a packet goes to a resolver.
    fn is_to_resolver(&self, packet: &Packet) -> bool {
        self.resolvers.contains(&(packet.dst, packet.dst_port))
    }

    /// Whether no answer teaches the address.
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
    /// Whose it is.
    pub identity: Arc<PodIdentity>,
    /// What its annotations say.
    pub compiled: Arc<Compiled>,
    /// The pod's own addresses, as in the kernel's record.
    pub own: Vec<Address>,
    /// What its interfaces' entries are to be.
    pub entry: Interface,
    /// Its interfaces.
    pub interfaces: Vec<u32>,
    /// The allow map of this version.
    pub allow: AllowMap,
    /// By which names the pod's addresses are allowed, for the next agent.
    pub names: NameMap,
    /// What an earlier agent left the pod under, if that was another version. Looked at when the pod is new
    /// at the gate.
    pub left: Vec<Left>,
    /// The pod's flows: an address with an open one does not give way to others.
    pub flows: FlowMap,
}

/// A version of a pod's policy under which an earlier agent left it.
pub struct Left {
    /// Its allow map.
    pub allow: AllowMap,
    /// Whether its entries hold under the new version, too; see
    /// [`egress_common::records::Policy::names_alike`].
    pub alike: bool,
}

/// How much of a pod is judged. A pod that ran before it was enforced goes through these in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judged {
    /// The sources of what it sends.
    Sources,
    /// These, and what others open towards the pod is noted.
    SourcesAndInbound,
    /// Everything.
    Everything,
}

impl Judged {
    /// An interface's entry for this.
    #[must_use]
    pub fn in_entry(self, entry: Interface) -> Interface {
        let flags = match self {
            Self::Sources => INTERFACE_SOURCES | INTERFACE_SETTLING,
            Self::SourcesAndInbound => INTERFACE_SOURCES,
            Self::Everything => 0,
        };
        Interface {
            flags: entry.flags & !(INTERFACE_SOURCES | INTERFACE_SETTLING) | flags,
            ..entry
        }
    }
}

/// What the control side asks of the gate.
enum Command {
    /// Move a pod to a new policy, or begin with a new pod.
    Apply {
        enforcement: Box<Enforcement>,
        done: oneshot::Sender<Result<()>>,
    },
    /// The same policy on other interfaces.
    Move {
        pod: u32,
        interfaces: Vec<u32>,
        done: oneshot::Sender<Result<()>>,
    },
    /// Forget a pod and its interfaces' entries.
    Remove {
        pod: u32,
        done: oneshot::Sender<Result<()>>,
    },
    /// Judge more of a pod that begins to be enforced.
    Judge {
        pod: u32,
        judged: Judged,
        done: oneshot::Sender<Result<()>>,
    },
    /// Let everything pass these pods' interfaces, which are about to be detached from.
    Release {
        pods: Vec<u32>,
        done: oneshot::Sender<Result<()>>,
    },
    /// Forget addresses whose lifetime has ended and that no flow is open to.
    Sweep { pod: u32, open: HashSet<Address> },
    /// Which names did these pods resolve to these addresses?
    Names {
        asked: Vec<(u32, Address)>,
        answer: mpsc::SyncSender<Vec<Vec<String>>>,
    },
    /// What has this pod learned?
    Resolutions {
        pod: u32,
        about: About,
        answer: oneshot::Sender<Option<Resolutions>>,
    },
    /// Treat DNS in another way from now on.
    Configure {
        dns: DnsSettings,
        done: oneshot::Sender<Result<()>>,
    },
    /// Send probes on interfaces.
    Probe {
        probes: Vec<Probe>,
        sent: oneshot::Sender<Vec<bool>>,
    },
    /// Read the ring from now on.
    Read,
    /// End the thread.
    Stop,
}

/// Handle on the gate's thread.
#[derive(Clone)]
pub struct Gate {
    commands: mpsc::Sender<Command>,
    wake: Arc<EventFd>,
    stats: Arc<Stats>,
}

impl Gate {
    /// Starts the thread. It reads no message before [`Self::read`]. `open` are the questions that an earlier agent
    /// let out shortly before; the thread returns those that are open at its end.
    ///
    /// # Errors
    ///
    /// When its sockets or the thread cannot be made.
    pub fn start(
        ring: HeldRing,
        interfaces: InterfaceMap,
        marks: Marks,
        dns: DnsSettings,
        reporter: Reporter,
        open: Vec<OpenQuestion>,
    ) -> Result<(Self, JoinHandle<Vec<OpenQuestion>>)> {
        let (commands, receiver) = mpsc::channel();
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wake =
            Arc::new(EventFd::from_value_and_flags(0, flags).context("cannot make an eventfd")?);
        let stats = Arc::<Stats>::default();
        let mut frame_sender = frame_sender::FrameSender::open(marks, Arc::clone(&stats))?;
        frame_sender.set_shortest_life(dns.shortest_life());
        let runner = run::Runner::new(
            ring,
            receiver,
            Arc::clone(&wake),
            interfaces,
            pod::Shared {
                frame_sender,
                context: judge::DecisionContext::new(dns, reporter, Arc::clone(&stats)),
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

    /// The gate's numbers.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// What a pod has learned, as far as it can be looked at in one go; `None` when the pod is not at
    /// the gate.
    ///
    /// # Errors
    ///
    /// When the gate is gone.
    pub async fn resolutions(&self, pod: u32, about: About) -> Result<Option<Resolutions>> {
        let (answer, resolutions) = oneshot::channel();
        self.send(Command::Resolutions { pod, about, answer })?;
        resolutions
            .await
            .map_err(|_| anyhow!("the gate's thread is gone"))
    }

    /// Moves a pod to a new policy, or begins with a new pod. When this returns, every packet of the
    /// pod is judged by it, and addresses of names that the pod has resolved before are in its
    /// allow map.
    ///
    /// # Errors
    ///
    /// When a map cannot be written; the pod then stays under its earlier policy.
    pub async fn apply(&self, enforcement: Enforcement) -> Result<()> {
        let enforcement = Box::new(enforcement);
        self.ask(|done| Command::Apply { enforcement, done }).await
    }

    /// Puts a pod's policy on other interfaces.
    ///
    /// # Errors
    ///
    /// When the map of interfaces cannot be written.
    pub async fn move_to(&self, pod: u32, interfaces: Vec<u32>) -> Result<()> {
        self.ask(|done| Command::Move {
            pod,
            interfaces,
            done,
        })
        .await
    }

    /// Judges more of a pod that begins to be enforced, from the next packet on.
    ///
    /// # Errors
    ///
    /// When the map of interfaces cannot be written.
    pub async fn judge(&self, pod: u32, judged: Judged) -> Result<()> {
        self.ask(|done| Command::Judge { pod, judged, done }).await
    }

    /// Lets everything pass these pods' interfaces from now on, and what they asked before anybody
    /// knew them goes out. What remains is to detach, which takes much longer.
    ///
    /// # Errors
    ///
    /// When the map of interfaces cannot be written.
    pub async fn release(&self, pods: Vec<u32>) -> Result<()> {
        self.ask(|done| Command::Release { pods, done }).await
    }

    /// Forgets a pod. Its interfaces must be detached.
    ///
    /// # Errors
    ///
    /// When the map of interfaces cannot be written.
    pub async fn remove(&self, pod: u32) -> Result<()> {
        self.ask(|done| Command::Remove { pod, done }).await
    }

    /// Treats DNS in another way, from the next message on.
    ///
    /// # Errors
    ///
    /// When the gate is gone.
    pub async fn configure(&self, dns: DnsSettings) -> Result<()> {
        self.ask(|done| Command::Configure { dns, done }).await
    }

    /// Sends probe frames. Returns of each whether it went out.
    ///
    /// # Errors
    ///
    /// When the gate is gone.
    pub async fn probe(&self, probes: Vec<Probe>) -> Result<Vec<bool>> {
        let (sent, result) = oneshot::channel();
        self.send(Command::Probe { probes, sent })?;
        result
            .await
            .map_err(|_| anyhow!("the gate's thread is gone"))
    }

    /// Forgets what a pod learned and whose lifetime has ended, but for addresses in `open`.
    pub fn sweep(&self, pod: u32, open: HashSet<Address>) {
        // A gate that is gone is noticed by whoever waits for its thread.
        let _ = self.send(Command::Sweep { pod, open });
    }

    /// Names that pods resolved to addresses, in the order asked. Empty when the gate is gone.
    pub fn names(&self, asked: Vec<(u32, Address)>) -> Vec<Vec<String>> {
        let (answer, names) = mpsc::sync_channel(1);
        if self.send(Command::Names { asked, answer }).is_err() {
            return Vec::new();
        }
        names.recv().unwrap_or_default()
    }

    /// Reads messages from now on. To be called when the pods that an earlier agent left enforced are at the
    /// gate: a message whose pod is not there is dropped.
    pub fn read(&self) {
        // A gate that is gone is noticed by whoever waits for its thread.
        let _ = self.send(Command::Read);
    }

    /// Ends the thread. What waits in the ring is left to the next agent.
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
        // The counter cannot overflow: the gate reads it whenever it is not zero.
        nix::unistd::write(self.wake.as_fd(), &1u64.to_ne_bytes())
            .context("cannot wake the gate's thread")?;
        Ok(())
    }
}
