//! Makes what is enforced equal to what should be.

use std::time::Instant;

use super::{
    apply::Applier,
    observe::{Observer, machine::Machine},
    plan::plan,
    publish::Publisher,
    settings::Settings,
};
use crate::pods::Snapshot;

/// Takes the four steps. Each part keeps what its step needs to remember.
pub(super) struct Reconciler {
    pub(super) settings: Settings,
    pub(super) machine: Machine,
    pub(super) observer: Observer,
    pub(super) applier: Applier,
    pub(super) publisher: Publisher,
}

impl Reconciler {
    /// Makes what is enforced equal to what the source says. A pod for which that fails does not hinder the others,
    /// and is planned again in the next reconcile.
    pub(super) async fn reconcile(&mut self, source: &Snapshot) {
        let began = Instant::now();
        self.learn_facts(source).await;

        // Observe.
        let Self {
            settings,
            machine,
            observer,
            applier,
            publisher,
        } = self;
        let observed = observer.observe(machine, source, settings, applier.in_kernel());

        // Plan.
        let mut plan = plan(&observed, settings, began);
        observer.note(&observed, &mut plan);

        // Apply.
        let neighbours = applier.protect_neighbours(machine, &observed);
        let outcome = Box::pin(applier.apply(&plan, machine)).await;
        let leftovers = applier.clean_up(&plan, settings, observed.in_cluster).await;
        let translations = applier
            .judge_translations(settings, &observer.policies)
            .await;
        observer.unjudged.judge(&outcome.judged);
        observer.unjudged.leave(&outcome.unjudged);
        if !source.unreadable {
            // Until the source has said which pods there are, none of them was dealt with.
            applier.end_start();
        }

        // Publish.
        let problems = Publisher::problems(&observed, &plan, &outcome, applier, observer);
        let problems = problems.and(neighbours).and(leftovers).and(translations);
        publisher.publish(&observed, problems, applier, observer, settings);
        publisher.reconciled(began.elapsed());
    }
}
