//! A link that loses, repeats and reorders packets.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::{Namespace, frames::Tap};

/// The length of the header that a packet socket puts before each frame (`struct virtio_net_hdr`,
/// `include/uapi/linux/virtio_net.h`). The line passes it on unchanged, so offloads stay as they are.
const OFFLOADS: usize = 10;
/// The offset of the IP header.
const IP: usize = OFFLOADS + 14;
const DNS: [u8; 2] = [0, 53];

/// The time for which a delayed frame waits for another to overtake it.
const PATIENCE: Duration = Duration::from_millis(20);

/// A namespace with two interfaces, and a thread for each direction that forwards all frames except some DNS
/// packets.
pub(crate) struct Line {
    _namespace: Namespace,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line").finish_non_exhaustive()
    }
}

impl Line {
    /// A line between the interfaces `near` and `far` of this namespace.
    #[track_caller]
    pub(crate) fn start(namespace: Namespace) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let open = |interface: &str| {
            let tap = Tap::open(&namespace, interface);
            tap.expect_offsets();
            tap.ignore_outgoing();
            Arc::new(tap)
        };
        let (near, far) = (open("near"), open("far"));
        let pass = |from: &Arc<Tap>, to: &Arc<Tap>, seed: u64| {
            let (from, to, stop) = (Arc::clone(from), Arc::clone(to), Arc::clone(&stop));
            thread::spawn(move || pass(&from, &to, &stop, seed))
        };
        let threads = vec![pass(&near, &far, 1), pass(&far, &near, 2)];
        Self {
            _namespace: namespace,
            stop,
            threads,
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            if !thread::panicking() {
                ended.expect("the line passes every frame");
            }
        }
    }
}

/// Of ten DNS frames one is lost, one is repeated, and two are overtaken by the next.
fn pass(from: &Tap, to: &Tap, stop: &AtomicBool, seed: u64) {
    let mut random = seed;
    let mut behind: Option<Vec<u8>> = None;
    while !stop.load(Ordering::Relaxed) {
        let Some(frame) = from.receive(PATIENCE, |_| true) else {
            if let Some(frame) = behind.take() {
                to.offer(&frame);
            }
            continue;
        };
        // Knuth's linear congruential generator: the upper bits are random.
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let chance = if is_dns(&frame) {
            (random >> 33) % 10
        } else {
            9
        };
        match chance {
            0 => continue,
            1 | 2 if behind.is_none() => {
                behind = Some(frame);
                continue;
            }
            3 => to.offer(&frame),
            _ => {}
        }
        to.offer(&frame);
        if let Some(frame) = behind.take() {
            to.offer(&frame);
        }
    }
}

/// True if a frame without IP options is from or to port 53.
fn is_dns(frame: &[u8]) -> bool {
    let ports = match frame.get(IP).map(|first| first >> 4) {
        Some(4) => IP + 20,
        Some(6) => IP + 40,
        _ => return false,
    };
    let port = |at: usize| frame.get(at..at + 2) == Some(&DNS);
    port(ports) || port(ports + 2)
}
