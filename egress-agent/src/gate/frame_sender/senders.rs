//! The threads that send to slow pods.

use std::{
    collections::HashMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use egress_common::ids::{IfIndex, PodId};

use super::{
    Frame,
    delay::RunDelay,
    lanes::{Lanes, Lost, Next},
    sending::send_some,
    socket::Socket,
};
use crate::datapath::boottime_ns;

/// The number of threads. Only one of them at a time serves pods that are slow repeatedly.
const THREADS: usize = 4;

/// A frame in a lane.
struct Ready {
    socket: Arc<Socket>,
    mark: u32,
    bytes: Box<[u8]>,
}

/// The threads, and the lanes whose frames they send.
pub(super) struct Senders {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    /// Signals that a lane has a frame, or that the threads must end.
    wake: Condvar,
}

struct State {
    lanes: Lanes<Ready>,
    is_ending: bool,
}

impl Senders {
    /// # Errors
    ///
    /// When no thread can be started.
    pub(super) fn start() -> Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                lanes: Lanes::new(),
                is_ending: false,
            }),
            wake: Condvar::new(),
        });
        let threads = (0..THREADS)
            .map(|_| {
                let shared = Arc::clone(&shared);
                thread::Builder::new()
                    .name("sender".into())
                    .spawn(move || shared.run())
                    .context("cannot start a thread that sends to slow pods")
            })
            .collect::<Result<_>>()?;
        Ok(Self { shared, threads })
    }

    /// Whether a thread has ended: the pods that it served get no more frames.
    pub(super) fn have_lost_one(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    /// See [`Lanes::open`].
    pub(super) fn open(&self, pod: PodId) {
        self.shared.lock().lanes.open(pod, boottime_ns());
    }

    /// Adds a frame for a slow pod at the end of its lane. It may wait for `for_ns`.
    pub(super) fn push(
        &self,
        pod: PodId,
        socket: &Arc<Socket>,
        (frame, bytes): (&Frame, &[u8]),
        for_ns: u64,
    ) {
        let bytes = bytes
            .get(frame.starts_at..frame.ends_at)
            .unwrap_or_default();
        let ready = Ready {
            socket: Arc::clone(socket),
            mark: frame.mark,
            bytes: bytes.into(),
        };
        let mut state = self.shared.lock();
        let until_ns = boottime_ns().saturating_add(for_ns);
        let len = ready.bytes.len();
        state.lanes.push((pod, frame.ifindex), len, ready, until_ns);
        self.shared.wake.notify_one();
    }

    /// See [`Lanes::drop_frames_of`]. Returns the lost frames.
    pub(super) fn drop_frames_of(&self, pod: PodId, ifindex: IfIndex) -> HashMap<IfIndex, Lost> {
        let mut state = self.shared.lock();
        state.lanes.drop_frames_of(pod, ifindex);
        state.lanes.take_lost(pod)
    }

    /// See [`Lanes::forget`].
    pub(super) fn forget(&self, pod: PodId) {
        self.shared.lock().lanes.forget(pod);
    }

    /// See [`Lanes::take_lost`].
    pub(super) fn take_lost(&self, pod: PodId) -> HashMap<IfIndex, Lost> {
        self.shared.lock().lanes.take_lost(pod)
    }

    /// See [`Lanes::close_if_quiet`].
    pub(super) fn close_if_quiet(&self, pod: PodId, quiet: Duration) -> bool {
        let quiet_ns = quiet.as_nanos() as u64;
        let mut state = self.shared.lock();
        state.lanes.close_if_quiet(pod, quiet_ns, boottime_ns())
    }

    /// Ends the threads. Waits for the frames that they are sending: the process could not end before that,
    /// either.
    pub(super) fn stop(&mut self) {
        let mut state = self.shared.lock();
        state.is_ending = true;
        state.lanes.clear();
        drop(state);
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// The state is consistent even after a panic in another thread: no statement leaves it half-changed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut delay = RunDelay::default();
        let mut state = self.lock();
        while !state.is_ending {
            let job = match state.lanes.next(boottime_ns()) {
                Next::Send(job) => job,
                Next::Wait(until_ns) => {
                    state = self.wait(state, until_ns);
                    continue;
                }
            };
            if state.lanes.has_more() {
                self.wake.notify_one();
            }
            drop(state);
            delay.since_last();
            let began = Instant::now();
            let sent = send_one(&job.frame, job.ifindex);
            let took_ns = began.elapsed().as_nanos() as u64;
            let took_ns = took_ns.saturating_sub(delay.since_last());
            state = self.lock();
            state.lanes.end(&job, took_ns, sent.err(), boottime_ns());
            // The lock is not held while the socket is closed, if this was its last frame.
            drop(state);
            drop(job);
            state = self.lock();
        }
    }

    fn wait<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        until_ns: Option<u64>,
    ) -> MutexGuard<'a, State> {
        let Some(until_ns) = until_ns else {
            return self
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        };
        let left = Duration::from_nanos(until_ns.saturating_sub(boottime_ns()));
        let waited = self.wake.wait_timeout(state, left);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

fn send_one(ready: &Ready, ifindex: IfIndex) -> std::io::Result<()> {
    let frame = Frame {
        ifindex,
        pod: None,
        mark: ready.mark,
        starts_at: 0,
        ends_at: ready.bytes.len(),
    };
    send_some(&ready.socket, &[frame], &ready.bytes).map(drop)
}
