//! The gate's loop.

use std::{
    collections::HashMap,
    os::fd::AsFd as _,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use egress_common::records::{Held, MODE_AUDIT};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::EventFd,
};

use super::{
    Command, Enforcement, LOOKED_AT, OpenQuestion,
    pod::{Pod, Shared},
    quarantine::{Quarantine, QuarantinedQuery},
    stats,
    tally::Tally,
    turns::Turns,
};
use crate::datapath::{HeldRing, InterfaceMap, boottime_ns};

/// How often lifetimes are looked at.
const TICK: Duration = Duration::from_millis(250);

/// How long the thread goes on looking at the ring before it sleeps: waking it takes about as long,
/// and the answer to a question that has just gone out is often back within it. Whoever else wants
/// the CPU gets it meanwhile; on a busy machine that is who the answer comes from.
const STAY_AWAKE: Duration = Duration::from_micros(50);

/// Messages decided before they are put back together and commands are looked at again.
const BATCH: usize = 64;

/// How old a message may be that was taken before the gate read the ring: a stub resolver waits five seconds
/// before it asks again.
const STILL_WAITED_NS: u64 = 4_000_000_000;
/// How long messages of pods over their shares are decided before the ring is looked at again.
const SLICE_NS: u64 = 100_000;

pub(super) struct Runner {
    ring: HeldRing,
    commands: mpsc::Receiver<Command>,
    wake: Arc<EventFd>,
    interfaces: InterfaceMap,
    shared: Shared,
    pods: HashMap<u32, Pod>,
    turns: Turns,
    /// Messages of pods that are not here.
    unclaimed: Tally,
    /// What pods had open when the earlier agent ended, until they are here.
    taken_over: Vec<OpenQuestion>,
    /// When the gate began to read the ring: what an earlier agent left enforced has its pods again.
    reading_since_ns: Option<u64>,
    /// Messages that were taken while no agent ran and that nobody waits for any more.
    stale: Tally,
    /// Messages that are about to be put back.
    waiting: stats::PutBackTimes,
}

impl Runner {
    pub(super) fn new(
        ring: HeldRing,
        commands: mpsc::Receiver<Command>,
        wake: Arc<EventFd>,
        interfaces: InterfaceMap,
        shared: Shared,
        taken_over: Vec<OpenQuestion>,
    ) -> Self {
        Self {
            ring,
            commands,
            wake,
            interfaces,
            shared,
            pods: HashMap::new(),
            turns: Turns::new(),
            unclaimed: Tally::default(),
            taken_over,
            reading_since_ns: None,
            stale: Tally::default(),
            waiting: stats::PutBackTimes::new(),
        }
    }

    /// Runs until it is told to stop. Returns the questions that are open then.
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
                        return self.leave();
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
            // Before those that have to wait: whoever is within their share waits for nobody else.
            self.send();
            decided += self.work_off();
            self.send();
            let now = Instant::now();
            if now >= next_tick {
                self.tick();
                next_tick = now + TICK;
                if self.shared.frame_sender.is_broken() {
                    // The agent ends with an error when its gate does.
                    tracing::error!("a thread that sends to pods has ended, and the gate with it");
                    return;
                }
            }
            if decided > 0 {
                awake_until = now + STAY_AWAKE;
            } else if now < awake_until {
                std::thread::yield_now();
            } else {
                self.sleep(next_tick);
            }
        }
    }

    /// Waits for a message or a command. While the thread is awake, messages do not wake it.
    fn sleep(&mut self, until: Instant) {
        let mut until = until;
        if let Err(error) = self.ring.enable_wakeups() {
            tracing::error!(%error, "the gate sleeps only briefly");
            until = Instant::now();
        }
        // What came before the programs knew.
        if !self.take_next() {
            self.wait(until);
        }
        if let Err(error) = self.ring.disable_wakeups() {
            tracing::warn!(%error, "each message wakes the gate");
        }
    }

    /// Takes the next message from the ring, if there is one. It is decided, or waits for its pod's turn.
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
                // It was removed meanwhile, or an earlier agent left it.
                shared.context.stats.unclaimed.add(1);
                unclaimed.add(1);
                return;
            };
            if pod.may_go(turns.now_ns()) {
                pod.go(&held, interfaces, shared, waiting);
            } else if pod.let_wait(&held, shared) {
                turns.add(id);
            }
            pod.spend(turns);
        })
    }

    /// Decides messages that wait for their pods' turns, for a short while; returns how many.
    fn work_off(&mut self) -> usize {
        let began_ns = self.turns.now_ns();
        let mut decided = 0;
        while decided < BATCH
            && let Some(pod) = self.turns.next(&mut self.pods)
        {
            let is_last = pod.go_on(&self.interfaces, &mut self.shared, &mut self.waiting);
            pod.spend(&mut self.turns);
            self.turns.end(is_last);
            decided += 1;
            if self.turns.now_ns().saturating_sub(began_ns) > SLICE_NS {
                break;
            }
        }
        decided
    }

    /// Sends what has been decided. What that takes is of the share of the pods it is sent to.
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
        // An interrupted wait is as good as one that ended.
        let _ = poll(&mut fds[..looked_at], timeout);
        if fds[0].any().unwrap_or(false) {
            let _ = self.wake.read();
        }
    }

    fn tick(&mut self) {
        let now_ns = boottime_ns();
        if let Some(messages) = self.unclaimed.due(now_ns) {
            tracing::warn!(
                messages,
                "DNS messages dropped: their pods are gone, or not taken over yet"
            );
        }
        if let Some(messages) = self.stale.due(now_ns) {
            tracing::warn!(
                messages,
                "DNS messages were held while no agent ran, for too long; they were not put back"
            );
        }
        self.give_up(|quarantine| quarantine.overdue(now_ns));
        self.turns.begin();
        for pod in self.pods.values_mut() {
            pod.tick(&mut self.shared, now_ns);
            pod.spend(&mut self.turns);
        }
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
            Command::Apply { enforcement, done } => {
                let result = self.apply(*enforcement);
                let _ = done.send(result);
            }
            Command::Move {
                pod,
                interfaces,
                done,
            } => {
                let result = match self.pods.get_mut(&pod) {
                    Some(pod) => pod.move_to(
                        interfaces,
                        &mut self.interfaces,
                        &mut self.shared.frame_sender,
                    ),
                    None => Err(anyhow!("pod {pod} is not at the gate")),
                };
                if result.is_ok() {
                    self.end_quarantine(pod);
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
            Command::Remove { pod, done } => {
                self.give_up(|quarantine| quarantine.of_pod(pod));
                self.turns.forget(pod);
                let result = match self.pods.remove(&pod) {
                    Some(mut pod) => {
                        pod.end_split_streams(&mut self.shared);
                        self.send();
                        let (waited, result) = pod.remove(&mut self.interfaces, &mut self.shared);
                        self.note_unclaimed(waited);
                        result
                    }
                    None => Ok(()),
                };
                let _ = done.send(result);
            }
            Command::Sweep { pod, open } => {
                if let Some(pod) = self.pods.get_mut(&pod) {
                    pod.sweep(&open);
                }
            }
            Command::Names { asked, answer } => {
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
                let pod = self.pods.get(&pod);
                let _ = answer.send(pod.map(|pod| pod.resolutions(&about, LOOKED_AT)));
            }
            Command::Configure { dns, done } => {
                self.shared
                    .frame_sender
                    .set_shortest_life(dns.shortest_life());
                self.shared.context.configure(dns);
                let _ = done.send(Ok(()));
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
            }
            // Handled by the loop.
            Command::Stop => {}
        }
    }

    fn apply(&mut self, enforcement: Enforcement) -> Result<()> {
        let id = enforcement.entry.pod;
        if let Some(pod) = self.pods.get_mut(&id) {
            if enforcement.entry.mode == MODE_AUDIT {
                pod.end_split_streams(&mut self.shared);
            }
            pod.apply(
                enforcement,
                &mut self.interfaces,
                &mut self.shared.frame_sender,
            )?;
        } else {
            let mut pod = Pod::new(enforcement, self.turns.now_ns())?;
            pod.write_interfaces(&mut self.interfaces, &mut self.shared.frame_sender)?;
            pod.forget_stale_names();
            for open in self.taken_over.extract_if(.., |open| open.pod == id) {
                pod.take_over(&open);
            }
            self.pods.insert(id, pod);
        }
        self.end_quarantine(id);
        Ok(())
    }

    /// What was asked on the interfaces of a pod before it was known is judged now, if it is.
    fn end_quarantine(&mut self, id: u32) {
        let Some(pod) = self.pods.get(&id) else {
            return;
        };
        for &ifindex in pod.interfaces() {
            if pod.is_known() {
                self.shared.judge_again(ifindex);
            } else {
                self.shared.quarantine.pass_on(ifindex, id);
            }
        }
    }

    fn release(&mut self, pods: &[u32]) -> Result<()> {
        let mut result = Ok(());
        for id in pods {
            let Some(pod) = self.pods.get(id) else {
                continue;
            };
            for &ifindex in pod.interfaces() {
                match self.interfaces.release(ifindex, *id) {
                    Ok(()) => self.shared.judge_again(ifindex),
                    Err(error) => result = Err(error),
                }
            }
        }
        // They must have gone out before the programs that turn them round are detached.
        self.send();
        result
    }

    /// What has waited in vain for its pod to be known.
    fn give_up(&mut self, which: impl FnOnce(&mut Quarantine) -> Vec<QuarantinedQuery>) {
        for waiting in which(&mut self.shared.quarantine) {
            match self.pods.get_mut(&waiting.pod) {
                Some(pod) => pod.give_up(&waiting.frame, &self.shared),
                None => self.note_unclaimed(1),
            }
        }
    }

    /// The next agent does not know what this one says in the names of others.
    fn leave(&mut self) {
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

/// Whether nobody waits any more for a message that was taken before the gate read the ring.
fn is_stale(held: &Held, reading_since_ns: u64) -> bool {
    reading_since_ns.saturating_sub(held.time_ns) > STILL_WAITED_NS
}
