//! The agent's threads.

use std::{sync::Arc, thread::JoinHandle};

use anyhow::Result;

use crate::{
    control::publish::denials::DenialReader,
    datapath::{CounterMap, DenialRing},
    gate::{Gate, OpenQuestion},
    report::{Reporter, ReporterThread},
    serve::Published,
};

/// The parts that the denial reader's thread needs.
pub(super) struct DenialThread {
    pub(super) ring: DenialRing,
    pub(super) counters: CounterMap,
    pub(super) gate: Gate,
    pub(super) reporter: Reporter,
    pub(super) published: Arc<Published>,
}

/// The threads that run beside the loop of reconciles.
pub(in crate::control) struct Threads {
    gate: JoinHandle<Vec<OpenQuestion>>,
    /// The parts of the denial reader, before it has been started.
    unread: Option<DenialThread>,
    denials: Option<DenialReader>,
    reporter: ReporterThread,
}

impl Threads {
    pub(super) fn new(
        gate: JoinHandle<Vec<OpenQuestion>>,
        denials: DenialThread,
        reporter: ReporterThread,
    ) -> Self {
        Self {
            gate,
            unread: Some(denials),
            denials: None,
            reporter,
        }
    }

    /// Starts the denial reader. Returns whether it was not running yet.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started.
    pub(in crate::control) fn read_denials(&mut self) -> Result<bool> {
        let Some(unread) = self.unread.take() else {
            return Ok(false);
        };
        let DenialThread {
            ring,
            counters,
            gate,
            reporter,
            published,
        } = unread;
        self.denials = Some(DenialReader::start(
            ring, counters, gate, reporter, published,
        )?);
        Ok(true)
    }

    /// A thread that has ended though it should run.
    pub(in crate::control) fn ended(&self) -> Option<&'static str> {
        if self.gate.is_finished() {
            return Some("the gate's thread has ended");
        }
        let denials = self.denials.as_ref();
        denials
            .is_some_and(DenialReader::is_finished)
            .then_some("the denial reader's thread has ended")
    }

    /// Waits for the threads; the gate's has been told to end. Returns the queries that pods have open at the gate.
    ///
    /// # Errors
    ///
    /// When the gate's thread has panicked.
    pub(in crate::control) fn join(self) -> std::thread::Result<Vec<OpenQuestion>> {
        let open_questions = self.gate.join();
        if let Some(denials) = self.denials {
            denials.stop();
        }
        self.reporter.close();
        open_questions
    }
}
