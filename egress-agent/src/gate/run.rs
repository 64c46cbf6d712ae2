//! The event loop of the gate's thread.

mod notes;

use std::{
    collections::{HashMap, VecDeque},
    os::fd::AsFd as _,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use egress_common::{
    ids::{IfIndex, PodId},
    records::Held,
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::EventFd,
};

pub(super) use notes::Notes;

use super::{
    Command, Enforcement, OpenQuestion, RESOLUTIONS_MAX,
    pod::{Done, Pod, Shared},
    quarantine::{Quarantine, QuarantinedQuery},
    stats,
    tally::Tally,
    turns::Turns,
};
use crate::datapath::{HeldRing, InterfaceMap, boottime_ns};

/// The interval of the periodic work: lifetimes, timeouts, tallies.
const TICK: Duration = Duration::from_millis(250);

/// How long the thread polls the ring before it sleeps. Waking it takes about as long, and the response to a
/// query that has just gone out often arrives within this time. The thread yields the CPU meanwhile: on a
/// busy machine the resolver needs it.
const STAY_AWAKE: Duration = Duration::from_micros(50);

/// Most messages that are decided before frames are sent and commands are read.
const BATCH: usize = 64;

/// The greatest age of a message that was held before the gate read the ring: a stub resolver waits five
/// seconds before it repeats a query.
const STILL_WAITED_NS: u64 = 4_000_000_000;
/// How long the gate works on the backlogs of pods over their shares before it sends frames. It reads the ring after each
/// message.
const BACKLOGS_NS: u64 = 100_000;

/// How long the gate works on the notes of the programs before it reads the ring again.
const NOTES_NS: u64 = 20_000;

/// How long the gate works on changes of policies before it reads the ring again: a fifth of the time that a batch of
/// messages takes. As long it reads notes for somebody who asks for names.
const CHANGES_NS: u64 = 500_000;

pub(super) struct Runner {
    ring: HeldRing,
    commands: mpsc::Receiver<Command>,
    wake: Arc<EventFd>,
    interfaces: InterfaceMap,
    notes: Notes,
    shared: Shared,
    pods: HashMap<PodId, Pod>,
    turns: Turns,
    /// The pods whose policies are changing.
    changing: VecDeque<PodId>,
    /// Messages of pods that are not at the gate.
    unclaimed: Tally,
    /// Queries that were open when the earlier agent ended, until their pods are at the gate.
    taken_over: Vec<OpenQuestion>,
    /// When the gate began to read the ring: the pods that an earlier agent left enforced are at the gate
    /// since then.
    reading_since_ns: Option<u64>,
    /// Messages that were held while no agent ran, and for which no client waits any more.
    stale: Tally,
    /// When the messages were held that the next send puts back.
    waiting: stats::PutBackTimes,
}

impl Runner {
    pub(super) fn new(
        ring: HeldRing,
        commands: mpsc::Receiver<Command>,
        wake: Arc<EventFd>,
        interfaces: InterfaceMap,
        notes: Notes,
        shared: Shared,
        taken_over: Vec<OpenQuestion>,
    ) -> Self {
        Self {
            ring,
            commands,
            wake,
            interfaces,
            notes,
            shared,
            pods: HashMap::new(),
            turns: Turns::new(),
            changing: VecDeque::new(),
            unclaimed: Tally::default(),
            taken_over,
            reading_since_ns: None,
            stale: Tally::default(),
            waiting: stats::PutBackTimes::new(),
        }
    }

    /// Runs until the command to stop. Returns the queries that are open at that time.
    pub(super) fn run(mut self) -> Vec<OpenQuestion> {
        self.work();
        let now_ns = boottime_ns();
        let pods = self.pods.iter();
        pods.flat_map(|(&id, pod)| pod.open_questions(id, now_ns))
            .collect()
    }

    fn work(&mut self) {
        let mut next_tick = Instant::now() + TICK;
        let mut awake_until = Instant::now();
        loop {
            loop {
                match self.commands.try_recv() {
                    Ok(Command::Stop) | Err(mpsc::TryRecvError::Disconnected) => {
                        return self.reset_split_streams();
                    }
                    Ok(command) => self.handle(command),
                    Err(mpsc::TryRecvError::Empty) => break,
                }
            }
            self.turns.begin();
            let mut decided = 0;
            while decided < BATCH && self.take_next() {
                decided += 1;
            }
            // Before the backlogs: a pod within its share waits for no other pod.
            self.send();
            decided += self.continue_changes();
            decided += self.work_on_backlogs();
            self.send();
            decided += self.take_notes_for(NOTES_NS);
            let now = Instant::now();
            if now >= next_tick {
                self.tick();
                next_tick = now + TICK;
                if self.shared.frame_sender.is_broken() {
                    // The agent ends with an error when the gate's thread ends.
                    tracing::error!(
                        "a thread that sends frames to pods has ended; the gate ends, too"
                    );
                    return;
                }
            }
            if decided > 0 || !self.turns.is_empty() {
                awake_until = now + STAY_AWAKE;
            } else if now < awake_until {
                std::thread::yield_now();
            } else {
                self.sleep(next_tick);
            }
        }
    }

    /// Waits for a message or a command. While the thread is awake, new messages do not wake it.
    fn sleep(&mut self, until: Instant) {
        let mut until = until;
        if let Err(error) = self.ring.enable_wakeups() {
            tracing::error!(%error, "cannot ask the programs to wake the gate; it polls the ring");
            until = Instant::now();
        }
        // A message that came before the programs saw that the gate sleeps does not wake it.
        if !self.take_next() {
            self.wait(until);
        }
        if let Err(error) = self.ring.disable_wakeups() {
            tracing::warn!(%error, "cannot tell the programs that the gate is awake; each message wakes it");
        }
    }

    /// Takes the next message from the ring, if there is one. Decides it, or puts it into its pod's backlog.
    fn take_next(&mut self) -> bool {
        let Self {
            ring,
            interfaces,
            pods,
            turns,
            shared,
            unclaimed,
            reading_since_ns,
            stale,
            waiting,
            ..
        } = self;
        let Some(reading_since_ns) = *reading_since_ns else {
            return false;
        };
        ring.next(|held| {
            if is_stale(&held.head, reading_since_ns) {
                shared.context.stats.stale.add(1);
                stale.add(1);
                return;
            }
            let id = held.head.pod;
            let Some(pod) = pods.get_mut(&id) else {
                // The pod was removed meanwhile, or an earlier agent left it.
                shared.context.stats.unclaimed.add(1);
                unclaimed.add(1);
                return;
            };
            if pod.may_decide_now(turns.now_ns()) {
                if pod.process_first(&held, interfaces, shared, waiting) {
                    turns.add(id);
                }
            } else if pod.push_backlog(&held, shared) {
                turns.add(id);
            }
            pod.spend(turns);
        })
    }

    /// Decides messages of the backlogs for a short while, and takes a new message after each. Ends when frames of another
    /// pod wait to be sent. Returns how many messages it has taken or decided.
    fn work_on_backlogs(&mut self) -> usize {
        let began_ns = self.turns.now_ns();
        let mut decided = 0;
        let mut most_frames = BATCH;
        while decided < BATCH && self.shared.frame_sender.frames() < most_frames {
            let others_wait = self.turns.has_others();
            let Some(pod) = self.turns.next(&mut self.pods) else {
                break;
            };
            let is_last = pod.take_turn(&self.interfaces, &mut self.shared, &mut self.waiting);
            // Sending frames takes longer than queueing them, so those of one pod's messages are sent together. They wait
            // for nothing else: no turn of another pod, and no eviction.
            let more_follow = pod.has_waiting() && !others_wait;
            most_frames = if more_follow { BATCH } else { 1 };
            pod.spend(&mut self.turns);
            self.turns.end(is_last);
            decided += 1;
            let frames = self.shared.frame_sender.frames();
            if self.take_next() {
                decided += 1;
                // A pod within its share waits for no other pod.
                if self.shared.frame_sender.frames() > frames {
                    break;
                }
            }
            if self.turns.now_ns().saturating_sub(began_ns) > BACKLOGS_NS {
                break;
            }
        }
        decided
    }

    /// Sends the frames of the decided messages. The time counts against the shares of the receiving pods.
    fn send(&mut self) {
        let Self {
            shared,
            pods,
            turns,
            waiting,
            ..
        } = self;
        shared.frame_sender.send(|spent| {
            if let Some(pod) = pods.get_mut(&spent.pod) {
                pod.spend_ns(spent.ns, turns.now_ns());
            }
        });
        waiting.sent(&shared.context.stats);
        turns.begin();
    }

    fn wait(&mut self, until: Instant) {
        let timeout = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        let fds = &mut [
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.ring.as_fd(), PollFlags::POLLIN),
        ];
        let looked_at = if self.reading_since_ns.is_some() {
            2
        } else {
            1
        };
        // If a signal interrupts the wait, the loop goes on as after a timeout.
        let _ = poll(&mut fds[..looked_at], timeout);
        if fds[0].any().unwrap_or(false) {
            let _ = self.wake.read();
        }
    }

    fn tick(&mut self) {
        let now_ns = boottime_ns();
        self.notes.beat(now_ns);
        if let Some(messages) = self.unclaimed.due(now_ns) {
            tracing::warn!(
                messages,
                "DNS messages dropped: their pods are not at the gate"
            );
        }
        if let Some(messages) = self.stale.due(now_ns) {
            tracing::warn!(
                messages,
                "DNS messages dropped: no agent ran for so long that their senders no longer wait"
            );
        }
        self.drop_quarantined(|quarantine| quarantine.overdue(now_ns));
        self.turns.begin();
        for (&id, pod) in &mut self.pods {
            pod.tick(&mut self.shared, now_ns);
            pod.spend(&mut self.turns);
            if pod.needs_turns() {
                self.turns.add(id);
            }
        }
        self.clean_learned(now_ns);
        self.shared.frame_sender.tick(now_ns);
        let addresses = self.pods.values().map(Pod::addresses).sum();
        let in_use = self.pods.values().map(Pod::addresses_in_use);
        self.shared.context.stats.addresses.set(addresses);
        self.shared
            .context
            .stats
            .fullest
            .set(in_use.max().unwrap_or(0));
        self.shared.context.stats.ticked_ns.set(now_ns);
        self.send();
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Apply { enforcement, done } => self.apply(*enforcement, done),
            Command::Move {
                pod,
                interfaces,
                done,
            } => {
                let result = match self.pods.get_mut(&pod) {
                    Some(pod) => pod.move_to(interfaces, &mut self.interfaces, &mut self.shared),
                    None => Err(anyhow!("pod {pod} is not at the gate")),
                };
                if result.is_ok()
                    && let Some(pod) = self.pods.get(&pod)
                {
                    pod.end_quarantine(&mut self.shared);
                }
                let _ = done.send(result);
            }
            Command::Judge { pod, judged, done } => {
                let result = match self.pods.get_mut(&pod) {
                    Some(pod) => {
                        pod.judge_more(judged, &mut self.interfaces, &mut self.shared.frame_sender)
                    }
                    None => Err(anyhow!("pod {pod} is not at the gate")),
                };
                let _ = done.send(result);
            }
            Command::Release { pods, done } => {
                let _ = done.send(self.release(&pods));
            }
            Command::Forget { pods, done } => {
                for pod in pods {
                    if self.pods.get(&pod).is_some_and(Pod::is_known) {
                        self.forget(pod);
                    }
                }
                let _ = done.send(Ok(()));
            }
            Command::Remove { pod, done } => {
                self.drop_quarantined(|quarantine| quarantine.of_pod(pod));
                let interfaces = self.forget(pod);
                let mut interfaces = interfaces.into_iter();
                let result = interfaces.try_for_each(|at| self.interfaces.remove(at, pod));
                let _ = done.send(result);
            }
            Command::Sweep { pod, open } => {
                if let Some(pod) = self.pods.get_mut(&pod) {
                    pod.sweep(&open);
                }
            }
            Command::Names { asked, answer } => {
                self.take_notes_for(CHANGES_NS);
                let names = asked
                    .iter()
                    .map(|(pod, address)| {
                        self.pods
                            .get(pod)
                            .map(|pod| pod.names_of(address))
                            .unwrap_or_default()
                    })
                    .collect();
                let _ = answer.send(names);
            }
            Command::Resolutions { pod, about, answer } => {
                self.take_notes_for(CHANGES_NS);
                let pod = self.pods.get(&pod);
                let _ = answer.send(pod.map(|pod| pod.resolutions(&about, RESOLUTIONS_MAX)));
            }
            Command::Configure { dns, done } => {
                self.shared
                    .frame_sender
                    .set_shortest_life(dns.shortest_life());
                self.shared.context.configure(dns);
                for pod in self.pods.values_mut() {
                    pod.forget_claimed(&mut self.shared);
                }
                let _ = done.send(self.notes.configure(&mut self.shared.context));
            }
            Command::Probe { probes, sent } => {
                let frame_sender = &self.shared.frame_sender;
                let went_out = probes
                    .iter()
                    .map(|probe| probe.send(frame_sender))
                    .collect();
                let _ = sent.send(went_out);
            }
            Command::Read => {
                self.reading_since_ns = Some(boottime_ns());
                self.taken_over = Vec::new();
                self.forget_all_early_notes();
            }
            // The loop handles it.
            Command::Stop => {}
        }
    }

    /// Forgets a pod. Returns its interfaces, whose entries stay.
    fn forget(&mut self, id: PodId) -> Vec<IfIndex> {
        self.turns.forget(id);
        let Some(mut pod) = self.pods.remove(&id) else {
            return Vec::new();
        };
        pod.end_split_streams(&mut self.shared);
        self.send();
        let (waited, interfaces) = pod.leave(&mut self.shared);
        self.note_unclaimed(waited);
        interfaces
    }

    fn apply(&mut self, enforcement: Enforcement, done: Done) {
        let id = enforcement.entry.pod();
        if let Err(error) = self.stop_learning(id) {
            let _ = done.send(Err(error));
            return;
        }
        let Some(pod) = self.pods.get_mut(&id) else {
            let _ = done.send(self.add(enforcement));
            return;
        };
        self.turns.begin();
        pod.change(enforcement, done);
        // Most pods have learned so little that this is all.
        pod.continue_change(&mut self.interfaces, &mut self.shared);
        pod.spend(&mut self.turns);
        if pod.is_changing() {
            self.changing.push_back(id);
        } else if pod.needs_turns() {
            self.turns.add(id);
        }
    }

    /// Continues changes of policies for a short while, in the order in which they began; returns the number of
    /// parts. They do not count against the share of a pod: otherwise a pod could delay the change of its own policy.
    fn continue_changes(&mut self) -> usize {
        let began_ns = self.turns.now_ns();
        let mut parts = 0;
        while let Some(&id) = self.changing.front() {
            let Some(pod) = self.pods.get_mut(&id).filter(|pod| pod.is_changing()) else {
                self.changing.pop_front();
                continue;
            };
            pod.continue_change(&mut self.interfaces, &mut self.shared);
            pod.spend(&mut self.turns);
            parts += 1;
            if pod.needs_turns() {
                self.turns.add(id);
            }
            if self.turns.now_ns().saturating_sub(began_ns) > CHANGES_NS {
                break;
            }
        }
        parts
    }

    /// Adds a pod that is new at the gate.
    fn add(&mut self, enforcement: Enforcement) -> Result<()> {
        let id = enforcement.entry.pod();
        let mut pod = Pod::new(enforcement, self.turns.now_ns())?;
        // Before the pod is under its policy, which otherwise cuts its connections to these addresses.
        self.take_early_notes(id, &mut pod)?;
        pod.start_learning(&mut self.interfaces, &mut self.shared.frame_sender)?;
        pod.forget_stale_names();
        for open in self.taken_over.extract_if(.., |open| open.pod() == id) {
            pod.take_over(&open);
        }
        pod.end_quarantine(&mut self.shared);
        self.pods.insert(id, pod);
        self.forget_early_notes(id);
        Ok(())
    }

    fn release(&mut self, pods: &[PodId]) -> Result<()> {
        let mut result = Ok(());
        for id in pods {
            let Some(pod) = self.pods.get_mut(id) else {
                continue;
            };
            pod.cancel_change();
            pod.end_learning();
            for &ifindex in pod.interfaces() {
                match self.interfaces.release(ifindex, *id) {
                    Ok(()) => self.shared.judge_again(ifindex),
                    Err(error) => result = Err(error),
                }
            }
        }
        // The frames must go out before the programs that turn them round are detached.
        self.send();
        result
    }

    /// Drops quarantined queries and reports them.
    fn drop_quarantined(&mut self, which: impl FnOnce(&mut Quarantine) -> Vec<QuarantinedQuery>) {
        for waiting in which(&mut self.shared.quarantine) {
            match self.pods.get_mut(&waiting.pod) {
                Some(pod) => pod.report_dropped_query(&waiting.frame, &self.shared),
                None => self.note_unclaimed(1),
            }
        }
    }

    /// Resets split connections: the next agent does not know the segments that this agent sent in the name
    /// of their ends.
    fn reset_split_streams(&mut self) {
        for pod in self.pods.values_mut() {
            pod.end_split_streams(&mut self.shared);
        }
        self.send();
    }

    fn note_unclaimed(&mut self, messages: u64) {
        self.shared.context.stats.unclaimed.add(messages);
        self.unclaimed.add(messages);
    }
}

/// Whether the sender of a message that was held before the gate read the ring no longer waits.
fn is_stale(held: &Held, reading_since_ns: u64) -> bool {
    reading_since_ns.saturating_sub(held.time_ns) > STILL_WAITED_NS
}
