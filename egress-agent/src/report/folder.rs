//! Folds equal denials into one line, and limits each pod to its share of lines.
//!
//! Nothing here reads a clock or writes: callers pass the time to [`Folder`], and it returns the
//! lines that are due.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    mem,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use egress_common::{address::Address, reason::Reason};

use super::{Denied, Line, PodIdentity, Verdict, flows::Flows};

/// How long after the first packet of a series its line is due. With the reporter's tick, lines come within
/// the promised second.
pub const FIRST_LINE_AFTER: Duration = Duration::from_millis(800);
/// Interval of further lines of a series that continues.
pub const SERIES_EVERY: Duration = Duration::from_secs(10);
/// Most open series of one pod.
pub const SERIES_PER_POD: usize = 256;
/// Lines one pod may have in a burst.
pub const LINE_BURST: u32 = 256;
/// Lines per second of one pod in the long run.
pub const LINES_PER_SECOND: u32 = 100;

/// Why denials have no line of their own: the pod has [`SERIES_PER_POD`] other series open.
pub const TOO_MANY_DESTINATIONS: &str = "too_many_destinations";
/// Why denials have no line of their own: the pod has used up its lines.
pub const TOO_MANY_LINES: &str = "too_many_lines";

/// The fields by which denials of a pod are folded.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Series {
    dst: Option<(Address, Option<u16>)>,
    protocol: Option<u8>,
    verdict: Verdict,
    reason: Reason,
    icmp: Option<(u8, u8)>,
    dns: Option<(String, String)>,
}

impl Series {
    fn of(denied: &Denied) -> Self {
        Self {
            dst: denied.dst.map(|dst| (dst.address, dst.port)),
            protocol: denied.protocol,
            verdict: denied.verdict,
            reason: denied.reason,
            icmp: denied.icmp,
            dns: denied.dns.clone(),
        }
    }
}

#[derive(Debug)]
enum Fold {
    /// Packets that have no line yet.
    Open {
        first: Box<Denied>,
        count: u64,
        connections: u64,
        last: SystemTime,
        due: Instant,
    },
    /// No packets since the last line. The next line comes at `until` at the earliest.
    Quiet { until: Instant },
}

/// Lost denials of a pod with one cause that are not reported yet.
#[derive(Debug)]
struct Loss {
    count: u64,
    time: SystemTime,
    due: Instant,
}

#[derive(Debug)]
struct PodFolds {
    series: HashMap<Series, Fold>,
    losses: BTreeMap<&'static str, Loss>,
    /// Flows that lines have counted, or will count.
    flows: Flows,
    /// The token bucket of lines.
    lines_left: u32,
    refilled: Instant,
}

/// Folds denials.
#[derive(Debug, Default)]
pub struct Folder {
    pods: HashMap<Arc<PodIdentity>, PodFolds>,
}

impl Folder {
    /// Adds a denial.
    pub fn add(&mut self, now: Instant, denied: Denied) {
        self.pod(now, &denied.pod).add(now, denied);
    }

    /// Adds `count` denials of a pod whose details were lost.
    pub fn add_lost(
        &mut self,
        now: Instant,
        time: SystemTime,
        pod: &Arc<PodIdentity>,
        count: u64,
        why: &'static str,
    ) {
        self.pod(now, pod).add_loss(now, time, count, why);
    }

    /// Returns the lines that are due. Call this often: a line comes no earlier than the next call.
    pub fn due(&mut self, now: Instant) -> Vec<Line> {
        let mut lines = Vec::new();
        self.pods.retain(|pod, folds| {
            folds.refill(now);
            folds.due(now, &mut lines);
            folds.losses_due(Some(now), pod, &mut lines);
            !folds.is_idle()
        });
        lines
    }

    /// Returns lines for everything that has none yet, due or not, and forgets all series.
    pub fn flush(&mut self) -> Vec<Line> {
        let mut lines = Vec::new();
        for (pod, mut folds) in self.pods.drain() {
            for (_, fold) in folds.series.drain() {
                if let Fold::Open {
                    first,
                    count,
                    connections,
                    last,
                    ..
                } = fold
                {
                    lines.push(Line::Denied {
                        first: *first,
                        count,
                        connections,
                        last,
                    });
                }
            }
            folds.losses_due(None, &pod, &mut lines);
        }
        lines
    }

    /// Whether no lines are pending.
    pub fn is_empty(&self) -> bool {
        self.pods.is_empty()
    }

    fn pod(&mut self, now: Instant, pod: &Arc<PodIdentity>) -> &mut PodFolds {
        self.pods
            .entry(Arc::clone(pod))
            .or_insert_with(|| PodFolds {
                series: HashMap::new(),
                losses: BTreeMap::new(),
                flows: Flows::default(),
                lines_left: LINE_BURST,
                refilled: now,
            })
    }
}

impl PodFolds {
    fn add(&mut self, now: Instant, denied: Denied) {
        let series = Series::of(&denied);
        if self.series.len() >= SERIES_PER_POD && !self.series.contains_key(&series) {
            // Forget series whose packets all have a line.
            self.series
                .retain(|_, fold| matches!(fold, Fold::Open { .. }));
            if self.series.len() >= SERIES_PER_POD {
                self.add_loss(now, denied.time, denied.count, TOO_MANY_DESTINATIONS);
                return;
            }
        }
        let new = u64::from(self.flows.is_new(&denied));
        let open = |due, denied: Denied| Fold::Open {
            count: denied.count,
            connections: new,
            last: denied.time,
            due,
            first: Box::new(denied),
        };
        match self.series.entry(series) {
            Entry::Vacant(vacant) => {
                vacant.insert(open(now + FIRST_LINE_AFTER, denied));
            }
            Entry::Occupied(mut occupied) => match occupied.get_mut() {
                Fold::Open {
                    count,
                    connections,
                    last,
                    ..
                } => {
                    *count = count.saturating_add(denied.count);
                    *connections = connections.saturating_add(new);
                    *last = denied.time.max(*last);
                }
                Fold::Quiet { until } => {
                    let due = if *until > now {
                        *until
                    } else {
                        now + FIRST_LINE_AFTER
                    };
                    occupied.insert(open(due, denied));
                }
            },
        }
    }

    fn add_loss(&mut self, now: Instant, time: SystemTime, count: u64, why: &'static str) {
        let due = now + FIRST_LINE_AFTER;
        let loss = self.losses.entry(why).or_insert(Loss {
            count: 0,
            time,
            due,
        });
        loss.count = loss.count.saturating_add(count);
    }

    fn due(&mut self, now: Instant, lines: &mut Vec<Line>) {
        let mut unprinted: Option<(SystemTime, u64)> = None;
        for fold in self.series.values_mut() {
            if !matches!(fold, Fold::Open { due, .. } if *due <= now) {
                continue;
            }
            let quiet = Fold::Quiet {
                until: now + SERIES_EVERY,
            };
            let Fold::Open {
                first,
                count,
                connections,
                last,
                ..
            } = mem::replace(fold, quiet)
            else {
                continue;
            };
            if let Some(left) = self.lines_left.checked_sub(1) {
                self.lines_left = left;
                lines.push(Line::Denied {
                    first: *first,
                    count,
                    connections,
                    last,
                });
            } else {
                let (time, lost) = unprinted.unwrap_or((first.time, 0));
                unprinted = Some((time.min(first.time), lost.saturating_add(count)));
            }
        }
        if let Some((time, count)) = unprinted {
            self.add_loss(now, time, count, TOO_MANY_LINES);
        }
        self.series
            .retain(|_, fold| !matches!(fold, Fold::Quiet { until } if *until <= now));
    }

    /// Moves the losses that are due, or all of them, to `lines`. They do not use up the pod's lines: there
    /// are few causes, and each has one line at a time.
    fn losses_due(&mut self, now: Option<Instant>, pod: &Arc<PodIdentity>, lines: &mut Vec<Line>) {
        self.losses.retain(|&why, loss| {
            if now.is_some_and(|now| loss.due > now) {
                return true;
            }
            lines.push(Line::Lost {
                pod: Some(Arc::clone(pod)),
                count: loss.count,
                why,
                time: loss.time,
            });
            false
        });
    }

    fn refill(&mut self, now: Instant) {
        let per_line = Duration::from_secs(1) / LINES_PER_SECOND;
        let elapsed = now.saturating_duration_since(self.refilled);
        let lines = u32::try_from(elapsed.as_nanos() / per_line.as_nanos()).unwrap_or(u32::MAX);
        self.lines_left = self.lines_left.saturating_add(lines).min(LINE_BURST);
        if self.lines_left == LINE_BURST {
            self.refilled = now;
        } else {
            self.refilled += per_line * lines;
        }
    }

    /// Whether the pod can be forgotten without effect on later lines.
    fn is_idle(&self) -> bool {
        self.series.is_empty() && self.losses.is_empty() && self.lines_left == LINE_BURST
    }
}

#[cfg(test)]
#[path = "folder_tests.rs"]
mod tests;
