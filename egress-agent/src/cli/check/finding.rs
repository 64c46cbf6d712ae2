//! What `check` finds: problems and warnings with their places.

use std::fmt::Write as _;

use egress_policy::Excerpt;

use crate::pods::Place;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Severity {
    /// `check` fails.
    Error,
    /// `check` fails if it is strict.
    Warning,
    /// `check` does not fail.
    Note,
}

impl Severity {
    /// The word in reports.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Note => "note",
        }
    }
}

/// The topic of a finding. The names are stable: reports have them, and people filter by them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Topic {
    /// A file cannot be read.
    File,
    /// A manifest or an object in it cannot be read, or there are two of one object.
    Manifest,
    /// Annotations or a policy object cannot be read, or exceed a limit.
    Policy,
    /// A policy may not mean what its author thinks.
    Meaning,
    /// A policy depends on what only the cluster knows.
    Cluster,
    /// There is nothing to check.
    Nothing,
}

impl Topic {
    pub(super) const ALL: [Self; 6] = [
        Self::File,
        Self::Manifest,
        Self::Policy,
        Self::Meaning,
        Self::Cluster,
        Self::Nothing,
    ];

    /// Its name.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Manifest => "manifest",
            Self::Policy => "policy",
            Self::Meaning => "meaning",
            Self::Cluster => "cluster",
            Self::Nothing => "nothing",
        }
    }

    /// Its description, in a sentence.
    pub(super) const fn description(self) -> &'static str {
        match self {
            Self::File => "A file cannot be read.",
            Self::Manifest => "A manifest or an object in it cannot be read, or is there twice.",
            Self::Policy => "A policy cannot be read, or exceeds a limit.",
            Self::Meaning => "A policy may not mean what its author thinks.",
            Self::Cluster => "A policy depends on what only the cluster knows.",
            Self::Nothing => "There is nothing to check.",
        }
    }

    /// The severity of its findings.
    pub(super) const fn severity(self) -> Severity {
        match self {
            Self::File | Self::Manifest | Self::Policy | Self::Nothing => Severity::Error,
            Self::Meaning => Severity::Warning,
            Self::Cluster => Severity::Note,
        }
    }
}

/// A problem, a warning or a note.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    pub(super) topic: Topic,
    /// Where it is. A message about nothing in particular has none.
    pub(super) place: Option<Place>,
    /// Where its workload or object begins, as `file:line`.
    pub(super) origin: String,
    /// The workload, `namespace/name`, if it is about one.
    pub(super) workload: Option<String>,
    pub(super) message: String,
    /// The line of the annotation.
    pub(super) excerpt: Option<Excerpt>,
    /// For how many further workloads the same was found.
    pub(super) further: usize,
}

impl Finding {
    /// The message, with the workloads that it is about.
    pub(super) fn whole_message(&self) -> String {
        let mut message = match &self.workload {
            Some(workload) => format!("{workload}: {}", self.message),
            None => self.message.clone(),
        };
        match self.further {
            0 => {}
            1 => message.push_str(" (and 1 more workload)"),
            further => {
                let _ = write!(message, " (and {further} more workloads)");
            }
        }
        message
    }
}
