//! The result of applying a plan.

use std::collections::BTreeMap;

use anyhow::Result;
use egress_common::ids::IfIndex;

use crate::{
    control::{plan::wanted::Wanted, publish::problems::Problems},
    host::interface_name,
    report::Subject,
};

/// The result of applying a plan.
#[derive(Default)]
pub(in crate::control) struct Outcome {
    /// The pods whose actions failed. They keep the state that they had, and are planned again in the next reconcile.
    /// All others are as planned.
    pub(in crate::control) failed: BTreeMap<Subject, Failure>,
    /// What is wrong with something else, and with pods that are not in the source.
    pub(in crate::control) problems: Problems,
    /// The interfaces on which everything is judged from now on.
    pub(in crate::control) judged: Vec<IfIndex>,
    /// The interfaces of pods that began to be enforced and were detached from again.
    pub(in crate::control) unjudged: Vec<IfIndex>,
}

/// A pod whose action failed.
pub(in crate::control) struct Failure {
    uid: String,
    /// Why; `None` if its interface is gone, because a pod may end like this. If the pod has not ended, the next
    /// reconcile reports that the interface is missing.
    pub(in crate::control) problem: Option<String>,
}

impl Outcome {
    /// Records the result of an action for a pod.
    pub(super) fn note(&mut self, subject: &Subject, wanted: &Wanted, done: Result<()>) {
        let Err(error) = done else {
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

    /// Records a pod that is not as planned.
    pub(super) fn fail(&mut self, subject: &Subject, uid: &str, problem: Option<String>) {
        let uid = uid.to_owned();
        self.failed
            .insert(subject.clone(), Failure { uid, problem });
    }

    /// Whether an action for this pod has failed.
    pub(super) fn has_failed(&self, subject: &Subject, uid: &str) -> bool {
        let failure = self.failed.get(subject);
        failure.is_some_and(|failure| failure.uid == uid)
    }
}
