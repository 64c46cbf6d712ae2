//! Sends frames: no other module does.
//!
//! Each interface has its own packet socket. A frame keeps its socket, and counts against that socket's send
//! buffer, until the receiver's IP layer has it (`skb_scrub_packet`, net/core/skbuff.c, keeps the socket
//! since Linux 4.19; `ip_rcv_core` drops it). The pod controls how long that takes: it can redirect what
//! arrives to a queue that never empties. A pod can thus fill only its own send buffer.
//!
//! The pod's own rules and packet sockets run in the thread that sends a frame to the pod, so the pod
//! controls how long that takes, too. The gate's thread sends to pods that take a frame quickly. A pod that
//! did not is slow for minutes, and other threads send to it ([`lanes`]). A frame that `to_pod` turns round
//! never reaches the pod, so the gate's thread always sends it.

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
use egress_common::ids::{IfIndex, PodId};

use super::{Stats, tally::Tally};
use crate::{datapath::Marks, report::PodIdentity};
use delay::RunDelay;
use lanes::{Lost, SLOW_NS};
use pace::Pace;
use port::Port;
use senders::Senders;
use sending::send_some;
use socket::{Socket, close_all};

/// The longest time that a frame may wait to be sent to a slow pod: a stub resolver has repeated its query by
/// then.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// The ports of all enforced interfaces, and the queue of frames.
///
/// Frames are sent in batches: a frame that is sent alone wakes its receiver, which on a busy CPU takes the
/// gate's place before the next message is decided.
pub(super) struct FrameSender {
    marks: Marks,
    ports: HashMap<IfIndex, Port>,
    /// Pods that are or were slow.
    paces: HashMap<PodId, Pace>,
    senders: Senders,
    /// How long a frame may wait to be sent to a slow pod.
    wait_ns: u64,
    delay: RunDelay,
    /// The bytes of the queued frames, concatenated.
    bytes: Vec<u8>,
    frames: Vec<Frame>,
    /// The number of queued frames that were decided; the others are sent again to be judged.
    decided: usize,
    closing: mpsc::Sender<Arc<Socket>>,
    /// Sends the probes of all interfaces: `from_pod` drops each of them.
    probe: Socket,
    stats: Arc<Stats>,
}

/// A queued frame.
#[derive(Clone, Copy)]
struct Frame {
    ifindex: IfIndex,
    /// The pod by whose rules the frame was decided; `None` if it was not decided.
    pod: Option<PodId>,
    mark: u32,
    starts_at: usize,
    ends_at: usize,
}

/// The time that sending took for one pod.
pub(super) struct Spent {
    pub(super) pod: PodId,
    pub(super) ns: u64,
}

impl FrameSender {
    /// # Errors
    ///
    /// When a packet socket cannot be opened or a thread cannot be started.
    pub(super) fn open(marks: Marks, stats: Arc<Stats>) -> Result<Self> {
        let probe = Socket::open()?;
        let (closing, to_close) = mpsc::channel();
        thread::Builder::new()
            .name("closer".into())
            .spawn(move || close_received(&to_close))
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

    /// Sets how long addresses stay in an allow map at least: a response that is sent later could have an
    /// address that is no longer there.
    pub(super) fn set_shortest_life(&mut self, life: Duration) {
        self.wait_ns = life.min(WAIT_MAX).as_nanos() as u64;
    }

    /// Assigns the interface to a pod.
    pub(super) fn assign(&mut self, ifindex: IfIndex, pod: PodId, identity: &Arc<PodIdentity>) {
        // The frames that wait for the earlier pod were decided by its rules.
        let before = self.ports.get(&ifindex).map(|port| port.pod);
        if let Some(before) = before.filter(|before| *before != pod && self.is_slow(*before)) {
            let lost = self.senders.drop_frames_of(before, ifindex);
            note_lost(&mut self.ports, lost, &self.stats);
        }
        let port = self
            .ports
            .entry(ifindex)
            .or_insert_with(|| Port::new(pod, identity));
        port.pod = pod;
        port.identity = Arc::clone(identity);
    }

    /// Removes the interface from the pod. Does nothing if it belongs to another pod by now.
    pub(super) fn unassign(&mut self, ifindex: IfIndex, pod: PodId) {
        if self.ports.get(&ifindex).is_none_or(|port| port.pod != pod) {
            return;
        }
        let Some(mut port) = self.ports.remove(&ifindex) else {
            return;
        };
        if self.is_slow(pod) {
            let mut lost = self.senders.drop_frames_of(pod, ifindex);
            port.note_lost(lost.remove(&ifindex), &self.stats);
            note_lost(&mut self.ports, lost, &self.stats);
        }
        port.log_unsent(ifindex, Tally::rest);
        if let Some(socket) = port.socket {
            // Closing the socket takes an RCU grace period, for which DNS must not wait. If the closing
            // thread has ended, the agent is about to end.
            let _ = self.closing.send(socket);
        }
    }

    /// Forgets a pod that is gone; its interfaces are no longer assigned to it.
    pub(super) fn forget(&mut self, pod: PodId) {
        if self.paces.remove(&pod).is_some_and(|pace| pace.is_slow()) {
            self.senders.forget(pod);
            self.count_slow();
        }
    }

    /// Whether a sending thread has ended.
    pub(super) fn is_broken(&self) -> bool {
        self.senders.have_lost_one()
    }

    /// Queues a frame for the pod on one of its interfaces. It is not sent if the interface is another pod's. The
    /// caller may change the returned bytes, which will be sent.
    pub(super) fn deliver(&mut self, (ifindex, pod): (IfIndex, PodId), frame: &[u8]) -> &mut [u8] {
        self.decided += 1;
        self.add(ifindex, Some(pod), self.marks.deliver, frame)
    }

    /// Queues a frame that `to_pod` turns round, so that it goes on as if the pod had just sent it. The
    /// caller may change the returned bytes, which will be sent.
    pub(super) fn bounce(&mut self, (ifindex, pod): (IfIndex, PodId), frame: &[u8]) -> &mut [u8] {
        self.decided += 1;
        self.add(ifindex, Some(pod), self.marks.bounce, frame)
    }

    /// Queues a frame that the pod sent, so that `from_pod` judges it now as if the pod had just sent it.
    pub(super) fn again(&mut self, ifindex: IfIndex, frame: &[u8]) {
        self.add(ifindex, None, self.marks.again, frame);
    }

    /// Queues a query of the pod whose name is decided now: `from_pod` judges it again and lets it pass. Returns the
    /// frame in the queue.
    pub(super) fn ask_again(
        &mut self,
        (ifindex, pod): (IfIndex, PodId),
        frame: &[u8],
    ) -> &mut [u8] {
        self.decided += 1;
        self.add(ifindex, Some(pod), self.marks.again, frame)
    }

    /// Sends a probe frame at once.
    ///
    /// # Errors
    ///
    /// When it cannot be sent: the interface is gone, or is down.
    pub(super) fn probe(&self, ifindex: IfIndex, frame: &[u8]) -> io::Result<()> {
        let probe = Frame {
            ifindex,
            pod: None,
            mark: self.marks.probe,
            starts_at: 0,
            ends_at: frame.len(),
        };
        send_some(&self.probe, &[probe], frame).map(drop)
    }

    /// The number of decided frames in the queue.
    pub(super) fn frames(&self) -> usize {
        self.decided
    }

    /// Whether frames for this pod are in the queue.
    pub(super) fn has_queued(&self, pod: PodId) -> bool {
        let mut frames = self.frames.iter();
        frames.any(|frame| frame.pod == Some(pod) && frame.mark == self.marks.deliver)
    }

    fn add(&mut self, ifindex: IfIndex, pod: Option<PodId>, mark: u32, frame: &[u8]) -> &mut [u8] {
        let starts_at = self.bytes.len();
        self.bytes.extend_from_slice(frame);
        self.frames.push(Frame {
            ifindex,
            pod,
            mark,
            starts_at,
            ends_at: self.bytes.len(),
        });
        &mut self.bytes[starts_at..]
    }

    /// Sends all queued frames, those of one interface in their order, and reports the time for each pod to
    /// `spent`. Frames for a slow pod go to other threads.
    ///
    /// Much of the time is the receiver's work: the kernel takes a frame through the pod's own hooks and
    /// rules before the call returns.
    pub(super) fn send(&mut self, mut spent: impl FnMut(Spent)) {
        if self.frames.is_empty() {
            return;
        }
        let mut frames = std::mem::take(&mut self.frames);
        let queued = frames.len();
        frames.retain(|frame| self.is_of_owner(frame));
        self.stats.unsent.add((queued - frames.len()) as u64);
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

    /// Whether the frame was decided for the pod that has the interface. The interface may have become another pod's
    /// since.
    fn is_of_owner(&self, frame: &Frame) -> bool {
        let port = self.ports.get(&frame.ifindex);
        port.zip(frame.pod)
            .is_none_or(|(port, pod)| port.pod == pod)
    }

    /// Sends the frames of one interface; returns its pod.
    fn send_on(&mut self, frames: &[Frame], mut began: Instant) -> Option<PodId> {
        let port = frames
            .first()
            .and_then(|frame| self.ports.get_mut(&frame.ifindex));
        let Some(port) = port else {
            // The pod has gone meanwhile.
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
            // One frame at a time: after a slow one, other threads send the rest.
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
                    port.log_slow(frame.ifindex, took_ns);
                }
            }
        }
        if is_slow {
            self.count_slow();
        }
        Some(pod)
    }

    fn is_slow(&self, pod: PodId) -> bool {
        self.paces.get(&pod).is_some_and(Pace::is_slow)
    }

    fn count_slow(&self) {
        let slow = self.paces.values().filter(|pace| pace.is_slow()).count();
        self.stats.slow_pods.set(slow as u64);
    }

    /// Finds pods that are no longer slow, and logs the interfaces on which frames were lost.
    pub(super) fn tick(&mut self, now_ns: u64) {
        // Delay before this tick is no excuse for the frames after it.
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
            port.log_unsent(ifindex, |unsent| unsent.due(now_ns));
        }
    }
}

impl Drop for FrameSender {
    fn drop(&mut self) {
        self.senders.stop();
        let sockets = self.ports.drain().filter_map(|(_, port)| port.socket);
        // No other thread has these sockets now; the closing thread has those that wait to be closed.
        close_all(sockets.filter_map(Arc::into_inner));
    }
}

/// Adds lost frames to the counts of their interfaces.
fn note_lost(ports: &mut HashMap<IfIndex, Port>, lost: HashMap<IfIndex, Lost>, stats: &Stats) {
    for (ifindex, lost) in lost {
        match ports.get_mut(&ifindex) {
            Some(port) => port.note_lost(Some(lost), stats),
            None => stats.unsent.add(lost.frames),
        }
    }
}

/// Closes sockets as they arrive, in batches. If a thread still sends on a socket, that thread closes it.
fn close_received(sockets: &mpsc::Receiver<Arc<Socket>>) {
    while let Ok(first) = sockets.recv() {
        let sockets = std::iter::once(first).chain(sockets.try_iter());
        close_all(sockets.filter_map(Arc::into_inner));
    }
}
