//! The gate's side of what the programs learn: their notes, and the settings by which they learn.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use egress_common::{
    ids::PodId,
    limits::LEARNED_RING_BYTES,
    records::{DnsTimes, LearnedNote},
};

use super::{
    super::{judge::DecisionContext, pod::Pod, tally::Tally},
    Runner,
};
use crate::datapath::{DnsTimesMap, NoteRing, boottime_ns};

/// Most notes that the ring has room for.
const NOTES_MAX: usize = LEARNED_RING_BYTES as usize / size_of::<LearnedNote>();

/// How long the gate waits for programs that are writing a note. That takes less than a microsecond, unless the
/// hypervisor takes the CPU away meanwhile.
const WRITING: Duration = Duration::from_millis(10);
/// The pause between two looks at the ring meanwhile.
const PAUSE: Duration = Duration::from_micros(20);

/// How long a tick removes entries of pods that the programs no longer need, apart from the last pod's.
const CLEANING_NS: u64 = 1_000_000;

/// The programs' notes and settings.
pub(in super::super) struct Notes {
    ring: NoteRing,
    times: DnsTimesMap,
    /// The settings as they were last written.
    written: DnsTimes,
    /// Times at which they could not be written, for the log.
    failures: Tally,
    /// Whether the resolvers were known to walk search lists when the settings were last written.
    walks: bool,
    /// Notes of pods that an earlier agent left and that are not at the gate yet. At most as many as the ring has room
    /// for.
    early: Vec<LearnedNote>,
}

impl Notes {
    /// Opens them. Decisions of an earlier agent do not count any more.
    ///
    /// # Errors
    ///
    /// When the settings cannot be read or written.
    pub(in super::super) fn open(
        ring: NoteRing,
        times: DnsTimesMap,
        context: &mut DecisionContext,
    ) -> Result<Self> {
        context.generation = times.get()?.generation;
        let mut notes = Self {
            ring,
            times,
            written: DnsTimes::default(),
            failures: Tally::default(),
            walks: false,
            early: Vec::new(),
        };
        notes.configure(context)?;
        Ok(notes)
    }

    /// Tells the programs the settings. Decisions under other settings do not count any more.
    ///
    /// # Errors
    ///
    /// When the settings cannot be written.
    pub(in super::super) fn configure(&mut self, context: &mut DecisionContext) -> Result<()> {
        self.walks = context.walks_search_lists();
        context.generation = context.generation.wrapping_add(1);
        let dns = &context.dns;
        self.written = DnsTimes {
            min_ttl_ns: dns.min_ttl.as_nanos() as u64,
            max_ttl_ns: dns.max_ttl.as_nanos() as u64,
            grace_ns: dns.grace.as_nanos() as u64,
            beat_ns: boottime_ns(),
            resolve_for_ns: dns.resolve_for.as_nanos() as u64,
            generation: context.generation,
            delivers_undecided: u32::from(dns.delivers_undecided),
        };
        self.times.set(self.written)
    }

    /// Shows the programs that the agent runs.
    pub(in super::super) fn beat(&mut self, now_ns: u64) {
        self.written.beat_ns = now_ns;
        if self.times.set(self.written).is_err() {
            self.failures.add(1);
        }
        if let Some(times) = self.failures.due(now_ns) {
            tracing::error!(
                times,
                "cannot show the programs that the agent runs: they treat DNS as if no agent ran"
            );
        }
    }

    /// Whether a response has shown since that the resolvers walk search lists.
    fn is_outdated(&self, context: &DecisionContext) -> bool {
        self.walks != context.walks_search_lists()
    }
}

impl Runner {
    /// Learns from notes for about as long as this; returns from how many. Pods can write notes faster than the gate reads
    /// them.
    pub(in super::super) fn take_notes_for(&mut self, most_ns: u64) -> usize {
        self.take_notes(NOTES_MAX, most_ns)
    }

    /// Learns from at most `most` notes, for about `most_ns`.
    fn take_notes(&mut self, most: usize, most_ns: u64) -> usize {
        if self.notes.is_outdated(&self.shared.context)
            && let Err(error) = self.notes.configure(&mut self.shared.context)
        {
            tracing::error!(%error, "the programs keep outdated decisions about names");
        }
        self.turns.begin();
        let began_ns = self.turns.now_ns();
        let mut taken = 0;
        while taken < most
            && self.reads_notes()
            && self.turns.now_ns().saturating_sub(began_ns) <= most_ns
        {
            let Some(note) = self.notes.ring.take() else {
                break;
            };
            taken += 1;
            if let Some(pod) = self.pods.get_mut(&note.pod) {
                pod.note_learned(&note, &self.shared);
                pod.spend(&mut self.turns);
            } else if self.reading_since_ns.is_none() {
                self.notes.early.push(note);
            }
        }
        taken
    }

    /// Stops the programs from learning for a pod, and adds the addresses that they have learned to the table.
    ///
    /// # Errors
    ///
    /// When the map of interfaces cannot be written, or not all notes can be read. The programs learn again from the next
    /// tick on.
    pub(in super::super) fn stop_learning(&mut self, id: PodId) -> Result<()> {
        let Some(pod) = self.pods.get_mut(&id) else {
            return Ok(());
        };
        pod.stop_learning(&mut self.interfaces)?;
        self.take_all_notes()
    }

    /// Learns from all notes that are there now. Other pods may write further ones all the time.
    ///
    /// # Errors
    ///
    /// When a program takes too long to write a note: there may be notes behind it.
    fn take_all_notes(&mut self) -> Result<()> {
        read_all(
            self,
            |runner, most| runner.take_notes(most, u64::MAX),
            |runner| Ok(runner.reads_notes() && runner.notes.ring.has_unread()?),
        )
    }

    /// Whether there is room for further notes: until the gate reads the ring of messages, pods may be missing for which
    /// an earlier agent's programs have left some.
    fn reads_notes(&self) -> bool {
        self.reading_since_ns.is_some() || self.notes.early.len() < NOTES_MAX
    }

    /// Adds to the table of a pod that is new at the gate what programs have learned while no agent ran. The programs do
    /// not learn for the pod before it is at the gate: decisions of an earlier agent do not count.
    ///
    /// # Errors
    ///
    /// When not all notes can be read.
    pub(in super::super) fn take_early_notes(&mut self, id: PodId, pod: &mut Pod) -> Result<()> {
        self.take_all_notes()?;
        // They stay until the pod is at the gate: an attempt to add it may fail.
        for note in self.notes.early.iter().filter(|note| note.pod == id) {
            pod.note_learned(note, &self.shared);
        }
        Ok(())
    }

    /// Forgets the notes of a pod that is at the gate now.
    pub(in super::super) fn forget_early_notes(&mut self, id: PodId) {
        self.notes.early.retain(|note| note.pod != id);
    }

    /// Forgets the notes of pods that are not at the gate: all that an earlier agent left are.
    pub(in super::super) fn forget_all_early_notes(&mut self) {
        self.notes.early = Vec::new();
    }

    /// Removes entries that the programs no longer need, for pods that are due. Many pods become due together, because they
    /// came to the gate together, and each takes as long as some messages.
    pub(in super::super) fn clean_learned(&mut self, now_ns: u64) {
        let due: Vec<(u64, PodId)> = self
            .pods
            .iter()
            .filter_map(|(&id, pod)| Some((pod.needs_cleaning(now_ns)?, id)))
            .collect();
        for_a_while(due, boottime_ns, |id| {
            if let Err(error) = self.clean(id, now_ns) {
                tracing::error!(pod = %id, %error, "cannot remove expired addresses that the programs have learned");
            }
        });
        for pod in self
            .pods
            .values_mut()
            .filter(|pod| pod.has_stopped_learning())
        {
            let sender = &mut self.shared.frame_sender;
            if let Err(error) = pod.start_learning(&mut self.interfaces, sender) {
                tracing::error!(%error, "the programs do not learn for a pod");
            }
        }
    }

    fn clean(&mut self, id: PodId, now_ns: u64) -> Result<()> {
        // Also if it fails, so that other pods have their turns.
        if let Some(pod) = self.pods.get_mut(&id) {
            pod.set_cleaned(now_ns);
        }
        self.stop_learning(id)?;
        let Some(pod) = self.pods.get_mut(&id) else {
            return Ok(());
        };
        let cleaned = pod.clean_learned(now_ns);
        pod.start_learning(&mut self.interfaces, &mut self.shared.frame_sender)?;
        cleaned
    }
}

/// Reads all records that are in a ring now. `take` reads at most so many, ends at one that is still being written, and
/// returns how many it has read. `has_unread` says whether there are more.
fn read_all<R>(
    ring: &mut R,
    mut take: impl FnMut(&mut R, usize) -> usize,
    has_unread: impl Fn(&R) -> Result<bool>,
) -> Result<()> {
    let mut left = NOTES_MAX;
    let mut waits_since = None;
    loop {
        let taken = take(ring, left);
        // The ring has room for no more, so all others have come later.
        left = left.saturating_sub(taken);
        if left == 0 || !has_unread(ring)? {
            return Ok(());
        }
        if taken > 0 {
            waits_since = None;
            continue;
        }
        let since = *waits_since.get_or_insert_with(Instant::now);
        ensure!(
            since.elapsed() < WRITING,
            "a program has not finished a note on learned addresses for {WRITING:?}"
        );
        thread::sleep(PAUSE);
    }
}

/// Does the work for the pods that are due, those first that were done the longest time ago, until it has taken
/// [`CLEANING_NS`]. The next tick goes on with the others.
fn for_a_while(mut due: Vec<(u64, PodId)>, clock: impl Fn() -> u64, mut work: impl FnMut(PodId)) {
    due.sort_unstable();
    let began_ns = clock();
    for (_, id) in due {
        work(id);
        if clock().saturating_sub(began_ns) > CLEANING_NS {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, collections::BTreeMap};

    use super::*;

    /// A ring whose first records take some looks until they are written.
    struct Ring {
        /// For each record, how many looks it takes.
        records: Vec<usize>,
        read: usize,
    }

    impl Ring {
        fn take(&mut self, most: usize) -> usize {
            let mut taken = 0;
            while taken < most
                && let Some(looks) = self.records.get_mut(self.read)
            {
                if *looks > 0 {
                    *looks -= 1;
                    break;
                }
                self.read += 1;
                taken += 1;
            }
            taken
        }

        fn read_all(&mut self) -> Result<()> {
            read_all(self, Self::take, |ring| Ok(ring.read < ring.records.len()))
        }
    }

    #[test]
    fn notes_behind_one_that_is_being_written_are_read() {
        let records = vec![0, 3, 0, 0, 1, 0];
        let mut ring = Ring { records, read: 0 };
        ring.read_all().expect("all are written in time");
        assert_eq!(ring.read, 6);
    }

    #[test]
    fn a_note_that_is_never_written_is_an_error() {
        let records = vec![0, usize::MAX, 0];
        let mut ring = Ring { records, read: 0 };
        ring.read_all().expect_err("the last one is not read");
        assert_eq!(ring.read, 1);
    }

    #[test]
    fn notes_that_are_written_all_the_time_do_not_keep_the_reader() {
        let records = vec![0; 10 * NOTES_MAX];
        let mut ring = Ring { records, read: 0 };
        ring.read_all().expect("as many as the ring can have had");
        assert_eq!(ring.read, NOTES_MAX);
    }

    #[test]
    fn pods_that_are_due_together_are_cleaned_in_several_ticks() {
        const PODS: u32 = 60;
        const WORK_NS: u64 = CLEANING_NS * 2 / 3;
        let mut cleaned: BTreeMap<PodId, u64> = (0..PODS).map(|n| (PodId::new(n), 0)).collect();
        for tick in 1..=PODS.into() {
            let now_ns = Cell::new(0);
            let due = cleaned.iter().map(|(&id, &at)| (at, id)).collect();
            for_a_while(
                due,
                || now_ns.get(),
                |id| {
                    now_ns.set(now_ns.get() + WORK_NS);
                    cleaned.insert(id, tick);
                },
            );
            assert_eq!(now_ns.get(), 2 * WORK_NS, "the gate stands still");
        }
        // Each had two turns.
        let first = u64::from(PODS / 2);
        assert!(cleaned.values().all(|&tick| tick > first), "{cleaned:?}");
    }
}
