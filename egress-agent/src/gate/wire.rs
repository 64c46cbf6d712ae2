//! Putting frames back: the only place that sends.
//!
//! Each interface has a packet socket of its own. A frame keeps its socket, and counts against that
//! socket's send buffer, until the receiver's IP layer has it (`skb_scrub_packet`, net/core/skbuff.c,
//! keeps the socket since Linux 4.19; `ip_rcv_core` drops it). A pod decides how long that takes: it can
//! redirect what arrives to a queue that never empties. So whoever fills a send buffer fills their own.

mod sending;
mod socket;

use std::{
    collections::HashMap,
    io,
    sync::{Arc, mpsc},
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result};

use super::{Stats, tally::Tally};
use crate::{datapath::Marks, report::PodIdentity};
use sending::send_some;
use socket::{Socket, close_all};

/// The ports of all enforced interfaces, and what waits to go out on them.
///
/// Frames are sent together: each one sent alone wakes its receiver, which on a busy CPU takes the
/// gate's place before the next message is decided.
pub(super) struct Wire {
    marks: Marks,
    ports: HashMap<u32, Port>,
    /// The frames, one behind the other.
    bytes: Vec<u8>,
    frames: Vec<Frame>,
    /// Frames among them that were decided, and not only put back to be judged.
    decided: usize,
    closing: mpsc::Sender<Socket>,
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

/// One interface.
struct Port {
    pod: u32,
    identity: Arc<PodIdentity>,
    /// None before the first frame: a pod that asks nothing needs none.
    socket: Option<Socket>,
    unsent: Tally,
    /// Why the last frame could not be sent.
    error: Option<io::Error>,
}

/// What sending took, for one pod.
pub(super) struct Spent {
    pub(super) pod: u32,
    pub(super) ns: u64,
}

impl Wire {
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
            bytes: Vec::new(),
            frames: Vec::new(),
            decided: 0,
            closing,
            stats,
            probe,
        })
    }

    /// The interface is this pod's from now on.
    pub(super) fn attach(&mut self, ifindex: u32, pod: u32, identity: &Arc<PodIdentity>) {
        let port = self.ports.entry(ifindex).or_insert_with(|| Port {
            pod,
            identity: Arc::clone(identity),
            socket: None,
            unsent: Tally::default(),
            error: None,
        });
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
        port.tell(ifindex, Tally::rest);
        if let Some(socket) = port.socket {
            // Closing waits for an RCU grace period, and DNS cannot. If that thread is gone, the
            // agent is about to end.
            let _ = self.closing.send(socket);
        }
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

    /// Sends everything, the frames of one interface in their order, and tells what that took.
    ///
    /// Much of it is the receiver's work: the kernel takes a frame through the pod's own hooks and
    /// rules before it comes back.
    pub(super) fn send(&mut self, mut spent: impl FnMut(Spent)) {
        if self.frames.is_empty() {
            return;
        }
        self.frames.sort_by_key(|frame| frame.ifindex);
        let mut began = Instant::now();
        for frames in self.frames.chunk_by(|a, b| a.ifindex == b.ifindex) {
            let Some(port) = frames
                .first()
                .and_then(|frame| self.ports.get_mut(&frame.ifindex))
            else {
                // The pod has gone since.
                self.stats.unsent.add(frames.len() as u64);
                continue;
            };
            port.send(frames, &self.bytes, &self.stats);
            let ended = Instant::now();
            spent(Spent {
                pod: port.pod,
                ns: (ended - began).as_nanos() as u64,
            });
            began = ended;
        }
        self.bytes.clear();
        self.frames.clear();
        self.decided = 0;
    }

    /// Tells which interfaces frames could not be put back on.
    pub(super) fn tick(&mut self, now_ns: u64) {
        for (&ifindex, port) in &mut self.ports {
            port.tell(ifindex, |unsent| unsent.due(now_ns));
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        close_all(self.ports.drain().filter_map(|(_, port)| port.socket));
    }
}

impl Port {
    fn send(&mut self, frames: &[Frame], bytes: &[u8], stats: &Stats) {
        let mut rest = frames;
        while let Some((_, behind)) = rest.split_first() {
            match self
                .socket()
                .and_then(|socket| send_some(socket, rest, bytes))
            {
                Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
                Err(error) => {
                    // To the pod the message is lost as any datagram may be, and it asks again. A
                    // full buffer, or a table without room for a socket, stays so for the others.
                    let is_lasting =
                        error.kind() == io::ErrorKind::WouldBlock || self.socket.is_none();
                    let lost = if is_lasting { rest.len() } else { 1 };
                    stats.unsent.add(lost as u64);
                    self.unsent.add(lost as u64);
                    self.error = Some(error);
                    rest = if is_lasting { &[] } else { behind };
                }
            }
        }
    }

    fn socket(&mut self) -> io::Result<&Socket> {
        match &mut self.socket {
            Some(socket) => Ok(socket),
            none => Ok(none.insert(Socket::open_quietly()?)),
        }
    }

    fn tell(&mut self, ifindex: u32, how_many: impl FnOnce(&mut Tally) -> Option<u64>) {
        let Some(frames) = how_many(&mut self.unsent) else {
            return;
        };
        let PodIdentity {
            namespace, name, ..
        } = &*self.identity;
        tracing::warn!(
            pod = %format_args!("{namespace}/{name}"),
            ifindex,
            frames,
            error = self.error.take().map(tracing::field::display),
            "DNS frames could not be put back and are lost"
        );
    }
}

/// Closes sockets as they come, those that wait together.
fn close_when_told(sockets: &mpsc::Receiver<Socket>) {
    while let Ok(first) = sockets.recv() {
        close_all(std::iter::once(first).chain(sockets.try_iter()));
    }
}
