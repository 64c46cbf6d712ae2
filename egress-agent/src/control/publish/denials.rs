//! Writing denial lines from the kernel's denial records.

use std::{
    collections::HashMap,
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result};
use egress_common::{
    address::Address,
    ids::PodId,
    protocol,
    reason::Reason,
    records::{Counters, Denial, FROM_POD, Meter, NO_CLASS},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
    datapath::{CounterMap, DenialRing, boottime_ns},
    gate::Gate,
    report::{Denied, Endpoint, PodIdentity, Reporter, Verdict},
    serve::{PodRecord, PodsById, Published},
};

/// Most records that are handled together.
const BATCH: usize = 256;

/// How often meters and counters are read.
const METERS_EVERY: Duration = Duration::from_secs(1);

/// How often, at most, a line counts denials of pods that are gone.
const GONE_EVERY: Duration = Duration::from_secs(60);

/// How long the reader sleeps at most, so that it notices when it is to stop; in milliseconds.
const PATIENCE_MS: u8 = 250;

/// The thread that reads the `denials` ring.
pub(in crate::control) struct DenialReader {
    thread: JoinHandle<()>,
    stop: Arc<AtomicBool>,
}

impl DenialReader {
    pub(in crate::control) fn start(
        ring: DenialRing,
        counters: CounterMap,
        gate: Gate,
        reporter: Reporter,
        published: Arc<Published>,
    ) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut reader = Reader {
            ring,
            losses: Losses::new(counters),
            gate,
            reporter,
            published,
            of_gone_pods: GonePods::default(),
        };
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("denials".into())
            .spawn(move || reader.run(&stopped))
            .context("cannot start the denial reader's thread")?;
        Ok(Self { thread, stop })
    }

    pub(in crate::control) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Reads the remaining records and ends the thread.
    pub(in crate::control) fn stop(self) {
        self.stop.store(true, Ordering::Release);
        if self.thread.join().is_err() {
            tracing::error!("the denial reader's thread has panicked");
        }
    }
}

struct Reader {
    ring: DenialRing,
    losses: Losses,
    gate: Gate,
    reporter: Reporter,
    published: Arc<Published>,
    of_gone_pods: GonePods,
}

/// Denials of pods that are not known.
#[derive(Debug, Default)]
struct GonePods {
    /// How many since the last line.
    denials: u64,
    logged: Option<Instant>,
}

impl GonePods {
    /// The number of denials to log now, if it is time: the first at once, later ones once in [`GONE_EVERY`].
    fn due(&mut self, now: Instant) -> Option<u64> {
        let waits = |logged: Instant| now.duration_since(logged) < GONE_EVERY;
        if self.denials == 0 || self.logged.is_some_and(waits) {
            return None;
        }
        self.logged = Some(now);
        Some(std::mem::take(&mut self.denials))
    }
}

impl Reader {
    fn run(&mut self, stop: &AtomicBool) {
        let mut batch = Vec::with_capacity(BATCH);
        let mut next_meters = Instant::now() + METERS_EVERY;
        loop {
            let stopping = stop.load(Ordering::Acquire);
            self.published.denials_are_read();
            while batch.len() < BATCH {
                let Some(denial) = self.ring.take() else {
                    break;
                };
                batch.push(denial);
            }
            let more = batch.len() == BATCH;
            self.losses.meet(&self.published.pods());
            self.report(&batch);
            batch.clear();
            let now = Instant::now();
            if stopping || now >= next_meters {
                self.losses.report(&self.published.pods(), &self.reporter);
                if stopping {
                    // There is no later line.
                    self.of_gone_pods.logged = None;
                }
                let due = self.of_gone_pods.due(now);
                if let Some(denials) = due {
                    tracing::warn!(denials, "denials without a line: their pods are gone");
                }
                next_meters = now + METERS_EVERY;
            }
            if more {
                continue;
            }
            if stopping {
                return;
            }
            let mut fds = [PollFd::new(self.ring.as_fd(), PollFlags::POLLIN)];
            // An interrupted wait counts as one that has ended.
            let _ = poll(&mut fds, PollTimeout::from(PATIENCE_MS));
        }
    }

    fn report(&mut self, batch: &[Denial]) {
        if batch.is_empty() {
            return;
        }
        // Only packets that pods send have destinations that were resolved.
        let asked: Vec<(PodId, Address)> = batch
            .iter()
            .filter(|denial| denial.direction == FROM_POD)
            .map(|denial| (denial.pod, denial.dst))
            .collect();
        let mut names = self.gate.names(asked).into_iter();
        let (now, now_ns) = (SystemTime::now(), boottime_ns());
        for denial in batch {
            let dst_names = if denial.direction == FROM_POD {
                names.next().unwrap_or_default()
            } else {
                Vec::new()
            };
            let pod = self.losses.pods.get(&denial.pod).map(|(pod, _)| pod);
            let pod = pod.and_then(|pod| Some((pod, pod.identity.as_ref()?)));
            let Some((pod, identity)) = pod else {
                self.of_gone_pods.denials += 1;
                continue;
            };
            let ago = Duration::from_nanos(now_ns.saturating_sub(denial.time_ns));
            let time = now.checked_sub(ago).unwrap_or(now);
            self.reporter
                .report(denied(denial, pod, identity, dst_names, time));
        }
    }
}

fn denied(
    denial: &Denial,
    pod: &PodRecord,
    identity: &Arc<PodIdentity>,
    dst_names: Vec<String>,
    time: SystemTime,
) -> Denied {
    let walked = denial.walked != 0;
    let has_ports = matches!(
        denial.protocol,
        protocol::TCP | protocol::UDP | protocol::SCTP
    );
    let end = |address: Address, port: u16| {
        walked.then_some(Endpoint {
            address,
            port: has_ports.then_some(port),
        })
    };
    let is_icmp = walked && matches!(denial.protocol, protocol::ICMP | protocol::ICMPV6);
    // A class number belongs to one version of a policy.
    let attached = pod.attached.as_ref();
    let compiled = attached
        .filter(|attached| denial.policy == attached.policy)
        .and(pod.compiled.as_ref());
    let rule = compiled
        .filter(|_| denial.class != NO_CLASS)
        .and_then(|compiled| compiled.deciding_entry(&denial.dst, denial.class))
        .cloned();
    let closed_by = compiled.map(|compiled| Arc::clone(&compiled.closed_by));
    Denied {
        pod: Arc::clone(identity),
        verdict: Verdict::from_u8(denial.verdict).unwrap_or(Verdict::Dropped),
        reason: Reason::from_u8(denial.reason).unwrap_or(Reason::NoRule),
        protocol: walked.then_some(denial.protocol),
        src: end(denial.src, denial.src_port),
        dst: end(denial.dst, denial.dst_port),
        icmp: is_icmp.then_some((denial.icmp_type, denial.icmp_code)),
        dns: None,
        dst_names,
        rule,
        closed_by: closed_by.unwrap_or_default(),
        time,
        count: 1,
    }
}

/// The losses that the kernel counts, and how many of them were logged.
struct Losses {
    map: CounterMap,
    /// The pods, and their meters when they were last read. A pod that is gone stays until its
    /// meter was read once more.
    pods: HashMap<PodId, (Arc<PodRecord>, Meter)>,
    counters: Counters,
}

impl Losses {
    fn new(map: CounterMap) -> Self {
        let counters = map.counters().unwrap_or_default();
        Self {
            map,
            pods: HashMap::new(),
            counters,
        }
    }

    /// Adds new pods in the kernel. An adopted pod begins with the losses that an earlier agent did not log.
    fn meet(&mut self, known: &PodsById) {
        for (&id, pod) in known {
            self.pods
                .entry(id)
                .and_modify(|(known, _)| known.clone_from(pod))
                .or_insert_with(|| (Arc::clone(pod), Meter::default()));
        }
    }

    fn report(&mut self, known: &PodsById, reporter: &Reporter) {
        for (&id, (pod, meter)) in &mut self.pods {
            let Some(identity) = &pod.identity else {
                continue;
            };
            let now = self.map.meter(id);
            let before = std::mem::replace(meter, now);
            let unreported = now
                .denials_unreported
                .saturating_sub(before.denials_unreported);
            if unreported > 0 {
                reporter.unreported(identity, unreported, "over_pod_share");
            }
            let flows_full = now.flows_full.saturating_sub(before.flows_full);
            if flows_full > 0 {
                tracing::warn!(
                    pod = %identity.subject(),
                    flows = flows_full,
                    "flows or destinations not remembered: the pod connects to more addresses and ports \
                     than there is room for (raise limits.flowsPerPod), too many came at the same time, \
                     or the kernel had no memory"
                );
            }
            let openings = now.openings_evicted.saturating_sub(before.openings_evicted);
            if openings > 0 {
                tracing::warn!(
                    pod = %identity.subject(),
                    flows = openings,
                    "newer flows of the pod have evicted flows that were not established: it is \
                     flooded, or floods"
                );
            }
            let flows = now.flows_evicted.saturating_sub(before.flows_evicted);
            if flows > 0 {
                tracing::warn!(
                    pod = %identity.subject(),
                    flows,
                    "newer flows of the pod have evicted established ones: raise limits.flowsPerPod"
                );
            }
        }
        let gone: Vec<PodId> = self
            .pods
            .keys()
            .filter(|id| !known.contains_key(id))
            .copied()
            .collect();
        for id in gone {
            self.pods.remove(&id);
            if let Err(error) = self.map.forget(id) {
                tracing::warn!(pod = id.get(), error = %format!("{error:#}"), "cannot remove a meter");
            }
        }
        let Ok(now) = self.map.counters() else {
            return;
        };
        let before = std::mem::replace(&mut self.counters, now);
        let lost = [
            ("held_lost", now.held_lost, before.held_lost),
            ("held_limited", now.held_limited, before.held_limited),
            ("held_too_long", now.held_too_long, before.held_too_long),
            ("rejects_lost", now.rejects_lost, before.rejects_lost),
            ("denials_lost", now.denials_lost, before.denials_lost),
            ("no_policy", now.no_policy, before.no_policy),
        ];
        for (counter, now, before) in lost {
            if now > before {
                tracing::warn!(counter, lost = now - before, total = now, "packets lost");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn denials_of_gone_pods_are_logged_at_once_and_then_once_a_minute() {
        let start = Instant::now();
        let mut gone = GonePods::default();
        assert_eq!(gone.due(start), None);
        gone.denials = 2;
        assert_eq!(gone.due(start), Some(2));
        for second in 1..60 {
            gone.denials += 1;
            assert_eq!(gone.due(start + Duration::from_secs(second)), None);
        }
        assert_eq!(gone.due(start + GONE_EVERY), Some(59));
        assert_eq!(gone.due(start + 2 * GONE_EVERY), None);
        gone.denials = 1;
        assert_eq!(gone.due(start + 3 * GONE_EVERY), Some(1));
    }
}
