//! Putting frames back: the only place that sends.
//!
//! Each interface has a packet socket of its own. A frame keeps its socket, and counts against that
//! socket's send buffer, until the receiver's IP layer has it (`skb_scrub_packet`, net/core/skbuff.c,
//! keeps the socket since Linux 4.19; `ip_rcv_core` drops it). A pod decides how long that takes: it can
//! redirect what arrives to a queue that never empties. So whoever fills a send buffer fills their own.
//!
//! Sending a frame to a pod runs the pod's own rules and packet sockets, in the thread that sends, and the
//! pod decides how long that takes. The gate's thread sends to pods that take a frame quickly. A pod that
//! did not is slow for minutes, and other threads send to it ([`lanes`]). A frame that `to_pod` turns round
//! never comes to the pod, so the gate's thread sends it, whoever's it is.

mod delay;
mod lanes;
mod pace;
mod port;
mod senders;
mod sending;
mod socket;

use std::{
    collections::HashMap,
    io,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{Stats, tally::Tally};
use crate::{datapath::Marks, report::PodIdentity};
use delay::RunDelay;
use lanes::{Lost, SLOW_NS};
use pace::Pace;
use port::Port;
use senders::Senders;
use sending::send_some;
use socket::{Socket, close_all};

/// How long a frame may wait to be sent to a slow pod: a stub resolver has asked again by then.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// The ports of all enforced interfaces, and what waits to go out on them.
///
/// Frames are sent together: each one sent alone wakes its receiver, which on a busy CPU takes the
/// gate's place before the next message is decided.
pub(super) struct FrameSender {
    marks: Marks,
    ports: HashMap<u32, Port>,
    /// Pods that are or were slow.
    paces: HashMap<u32, Pace>,
    senders: Senders,
    /// How long a frame may wait to be sent to a slow pod.
    wait_ns: u64,
    delay: RunDelay,
    /// The frames, one behind the other.
    bytes: Vec<u8>,
    frames: Vec<Frame>,
    /// Frames among them that were decided, and not only put back to be judged.
    decided: usize,
    closing: mpsc::Sender<Arc<Socket>>,
    /// For probes of all interfaces: a program of ours drops each of them.
    probe: Socket,
    stats: Arc<Stats>,
}

/// A frame that waits.
#[derive(Clone, Copy)]
struct Frame {
    ifindex: u32,
    mark: u32,
    starts_at: usize,
    ends_at: usize,
}

/// What sending took, for one pod.
pub(super) struct Spent {
    pub(super) pod: u32,
    pub(super) ns: u64,
}

impl FrameSender {
    /// # Errors
    ///
    /// When packet sockets cannot be made here at all, or no thread.
    pub(super) fn open(marks: Marks, stats: Arc<Stats>) -> Result<Self> {
        let probe = Socket::open()?;
        let (closing, to_close) = mpsc::channel();
        thread::Builder::new()
            .name("closer".into())
            .spawn(move || close_when_told(&to_close))
            .context("cannot start the thread that closes sockets")?;
        Ok(Self {
            marks,
            ports: HashMap::new(),
            paces: HashMap::new(),
            senders: Senders::start()?,
            wait_ns: 0,
            delay: RunDelay::default(),
            bytes: Vec::new(),
            frames: Vec::new(),
            decided: 0,
            closing,
            stats,
            probe,
        })
    }

    /// Addresses stay in an allow map for so long at least: a response that is sent later than that could
    /// tell the pod of one that is no longer there.
    pub(super) fn set_shortest_life(&mut self, life: Duration) {
        self.wait_ns = life.min(WAIT_MAX).as_nanos() as u64;
    }

    /// The interface is this pod's from now on.
    pub(super) fn attach(&mut self, ifindex: u32, pod: u32, identity: &Arc<PodIdentity>) {
        // What waits for another pod was decided by that one's rules.
        let before = self.ports.get(&ifindex).map(|port| port.pod);
        if let Some(before) = before.filter(|before| *before != pod && self.is_slow(*before)) {
            let lost = self.senders.detach(before, ifindex);
            note_lost(&mut self.ports, lost, &self.stats);
        }
        let port = self
            .ports
            .entry(ifindex)
            .or_insert_with(|| Port::new(pod, identity));
        port.pod = pod;
        port.identity = Arc::clone(identity);
    }

    /// The interface is not this pod's any more. Does nothing if it is another pod's by now.
    pub(super) fn detach(&mut self, ifindex: u32, pod: u32) {
        if self.ports.get(&ifindex).is_none_or(|port| port.pod != pod) {
            return;
        }
        let Some(mut port) = self.ports.remove(&ifindex) else {
            return;
        };
        if self.is_slow(pod) {
            let mut lost = self.senders.detach(pod, ifindex);
            port.note_lost(lost.remove(&ifindex), &self.stats);
            note_lost(&mut self.ports, lost, &self.stats);
        }
        port.tell(ifindex, Tally::rest);
        if let Some(socket) = port.socket {
            // Closing waits for an RCU grace period, and DNS cannot. If that thread is gone, the
            // agent is about to end.
            let _ = self.closing.send(socket);
        }
    }

    /// The pod has gone; its interfaces are detached.
    pub(super) fn forget(&mut self, pod: u32) {
        if self.paces.remove(&pod).is_some_and(|pace| pace.is_slow()) {
            self.senders.forget(pod);
            self.count_slow();
        }
    }

    /// Whether a thread that sends has ended.
    pub(super) fn is_broken(&self) -> bool {
        self.senders.have_lost_one()
    }

    /// A frame to be sent on to the pod. What is returned is what will be sent.
    pub(super) fn deliver(&mut self, ifindex: u32, frame: &[u8]) -> &mut [u8] {
        self.decided += 1;
        self.add(ifindex, self.marks.deliver, frame)
    }

    /// A frame to be sent on as if the pod had just sent it: `to_pod` turns it round. What is
    /// returned is what will be sent.
    pub(super) fn bounce(&mut self, ifindex: u32, frame: &[u8]) -> &mut [u8] {
        self.decided += 1;
        self.add(ifindex, self.marks.bounce, frame)
    }

    /// A frame that the pod sent and that is to be judged now, as if it had just sent it.
    pub(super) fn again(&mut self, ifindex: u32, frame: &[u8]) {
        self.add(ifindex, self.marks.again, frame);
    }

    /// Sends a frame that is to be counted, at once.
    ///
    /// # Errors
    ///
    /// When it cannot be sent: the interface has gone, or is down.
    pub(super) fn probe(&self, ifindex: u32, frame: &[u8]) -> io::Result<()> {
        let probe = Frame {
            ifindex,
            mark: self.marks.probe,
            starts_at: 0,
            ends_at: frame.len(),
        };
        send_some(&self.probe, &[probe], frame).map(drop)
    }

    /// How many decided frames wait to go out.
    pub(super) fn frames(&self) -> usize {
        self.decided
    }

    fn add(&mut self, ifindex: u32, mark: u32, frame: &[u8]) -> &mut [u8] {
        let starts_at = self.bytes.len();
        self.bytes.extend_from_slice(frame);
        self.frames.push(Frame {
            ifindex,
            mark,
            starts_at,
            ends_at: self.bytes.len(),
        });
        &mut self.bytes[starts_at..]
    }

    /// Sends everything, the frames of one interface in their order, and tells what that took. Frames for
    /// a slow pod are handed over.
    ///
    /// Much of it is the receiver's work: the kernel takes a frame through the pod's own hooks and
    /// rules before it comes back.
    pub(super) fn send(&mut self, mut spent: impl FnMut(Spent)) {
        if self.frames.is_empty() {
            return;
        }
        let mut frames = std::mem::take(&mut self.frames);
        frames.sort_by_key(|frame| frame.ifindex);
        let mut began = Instant::now();
        for frames in frames.chunk_by(|a, b| a.ifindex == b.ifindex) {
            let pod = self.send_on(frames, began);
            let ended = Instant::now();
            if let Some(pod) = pod {
                spent(Spent {
                    pod,
                    ns: (ended - began).as_nanos() as u64,
                });
            }
            began = ended;
        }
        frames.clear();
        self.frames = frames;
        self.bytes.clear();
        self.decided = 0;
    }

    /// Sends frames of one interface; returns whose it is.
    fn send_on(&mut self, frames: &[Frame], mut began: Instant) -> Option<u32> {
        let port = frames
            .first()
            .and_then(|frame| self.ports.get_mut(&frame.ifindex));
        let Some(port) = port else {
            // The pod has gone since.
            self.stats.unsent.add(frames.len() as u64);
            return None;
        };
        let pod = port.pod;
        let mut is_slow = self.paces.get(&pod).is_some_and(Pace::is_slow);
        let is_for_pod = |frame: &Frame| frame.mark == self.marks.deliver;
        for frames in frames.chunk_by(|a, b| is_for_pod(a) == is_for_pod(b)) {
            if !frames.first().is_some_and(is_for_pod) {
                port.send(frames, &self.bytes, &self.stats);
                began = Instant::now();
                continue;
            }
            // One at a time: what follows a slow one is not to be sent here.
            for frame in frames {
                if is_slow {
                    let frame = (frame, self.bytes.as_slice());
                    port.hand_over(&self.senders, frame, self.wait_ns, &self.stats);
                    continue;
                }
                port.send(std::slice::from_ref(frame), &self.bytes, &self.stats);
                let ended = Instant::now();
                let took_ns = (ended - began).as_nanos() as u64;
                began = ended;
                if took_ns > SLOW_NS
                    && let took_ns = took_ns.saturating_sub(self.delay.since_last())
                    && took_ns > SLOW_NS
                {
                    is_slow = true;
                    self.senders.open(pod);
                    self.paces.entry(pod).or_default().slow_down();
                    port.tell_slow(frame.ifindex, took_ns);
                }
            }
        }
        if is_slow {
            self.count_slow();
        }
        Some(pod)
    }

    fn is_slow(&self, pod: u32) -> bool {
        self.paces.get(&pod).is_some_and(Pace::is_slow)
    }

    fn count_slow(&self) {
        let slow = self.paces.values().filter(|pace| pace.is_slow()).count();
        self.stats.slow_pods.set(slow as u64);
    }

    /// Looks which pods are slow no more, and tells which interfaces frames could not be put back on.
    pub(super) fn tick(&mut self, now_ns: u64) {
        // What the thread has waited until now is no excuse for frames from now on.
        self.delay.since_last();
        for (&pod, pace) in &mut self.paces {
            if pace.is_slow() {
                let lost = self.senders.take_lost(pod);
                note_lost(&mut self.ports, lost, &self.stats);
                if self.senders.close_if_quiet(pod, pace.quiet_time()) {
                    pace.speed_up();
                }
            }
        }
        self.count_slow();
        for (&ifindex, port) in &mut self.ports {
            port.tell(ifindex, |unsent| unsent.due(now_ns));
        }
    }
}

impl Drop for FrameSender {
    fn drop(&mut self) {
        self.senders.stop();
        let sockets = self.ports.drain().filter_map(|(_, port)| port.socket);
        // Nobody else has them now, but for what waits to be closed.
        close_all(sockets.filter_map(Arc::into_inner));
    }
}

/// Frames of a pod were lost on these interfaces.
fn note_lost(ports: &mut HashMap<u32, Port>, lost: HashMap<u32, Lost>, stats: &Stats) {
    for (ifindex, lost) in lost {
        match ports.get_mut(&ifindex) {
            Some(port) => port.note_lost(Some(lost), stats),
            None => stats.unsent.add(lost.frames),
        }
    }
}

/// Closes sockets as they come, those that wait together. One that a frame is being sent on is closed by
/// the thread that sends it.
fn close_when_told(sockets: &mpsc::Receiver<Arc<Socket>>) {
    while let Ok(first) = sockets.recv() {
        let sockets = std::iter::once(first).chain(sockets.try_iter());
        close_all(sockets.filter_map(Arc::into_inner));
    }
}
