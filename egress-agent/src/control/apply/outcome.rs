//! What came of a plan.

use std::collections::{BTreeMap, HashSet};

use anyhow::Result;

use crate::{
    control::{plan::wanted::Wanted, publish::problems::Problems},
    host::interface_name,
    report::Subject,
};

/// What came of a plan.
#[derive(Default)]
pub(in crate::control) struct Outcome {
    /// The pods whose actions all succeeded.
    pub(in crate::control) succeeded: HashSet<Subject>,
    /// The pods that are not as they should be. They are planned again.
    pub(in crate::control) failed: BTreeMap<Subject, Failure>,
    /// What is wrong with something else, and with pods that are not in the source.
    pub(in crate::control) problems: Problems,
    /// The interfaces on which everything is judged from now on.
    pub(in crate::control) judged: Vec<u32>,
    /// The interfaces of pods that began to be enforced and were detached from again.
    pub(in crate::control) unjudged: Vec<u32>,
}

/// A pod whose action failed.
pub(in crate::control) struct Failure {
    uid: String,
    /// Why; `None` if its interface has gone meanwhile: so a pod may end. If it does not, the next reconcile says
    /// what is missing.
    pub(in crate::control) problem: Option<String>,
}

impl Outcome {
    pub(super) fn note(&mut self, subject: &Subject, wanted: &Wanted, done: Result<()>) {
        let Err(error) = done else {
            self.succeeded.insert(subject.clone());
            return;
        };
        let mut interfaces = wanted.interfaces.iter();
        let are_there = interfaces.all(|&ifindex| interface_name(ifindex).is_some());
        self.fail(
            subject,
            &wanted.uid,
            are_there.then(|| format!("{error:#}")),
        );
    }

    pub(super) fn fail(&mut self, subject: &Subject, uid: &str, problem: Option<String>) {
        self.succeeded.remove(subject);
        let uid = uid.to_owned();
        self.failed
            .insert(subject.clone(), Failure { uid, problem });
    }

    pub(super) fn has_failed(&self, subject: &Subject, uid: &str) -> bool {
        let failure = self.failed.get(subject);
        failure.is_some_and(|failure| failure.uid == uid)
    }
}
