//! The work of each reconcile that does not depend on the plan.

use anyhow::Result;

use super::{
    Applier,
    hardware::{self, Hardware},
    hooks::Hooks,
    node_addresses,
    stamps::Stamps,
};
use crate::{
    control::{
        observe::{Observed, machine::Machine},
        plan::Plan,
        publish::problems::{About, Problems},
        settings::Settings,
    },
    datapath::{Datapath, NodeAddressMap},
    pods::Facts,
    report::{Reporter, Subject},
};

/// The state of the work that each reconcile does, whatever is planned.
pub(super) struct Upkeep {
    pub(super) hardware: Hardware,
    pub(super) node_addresses: NodeAddressMap,
    pub(super) hooks: Hooks,
    pub(super) stamps: Stamps,
}

impl Upkeep {
    /// # Errors
    ///
    /// When the kernel's maps cannot be opened or read.
    pub(super) fn open(datapath: &Datapath, reporter: Reporter) -> Result<Self> {
        Ok(Self {
            hardware: Hardware::open(datapath)?,
            node_addresses: datapath.node_addresses()?,
            hooks: Hooks::new(datapath.probes()?),
            stamps: Stamps::new(reporter),
        })
    }
}

impl Applier {
    /// Does what comes before a plan's actions: protects the addresses of the node and of neighbours from pods.
    pub(in crate::control) fn protect_neighbours(
        &mut self,
        machine: &mut Machine,
        observed: &Observed<'_>,
    ) -> Problems {
        let mut problems = Problems::default();
        let mut note = |about: &str, done: Result<()>, what: &str| {
            if let Err(error) = done {
                problems.set(About::node(about), format!("{what}: {error:#}"));
            }
        };
        note(
            "link-local addresses",
            node_addresses::protect_link_locals(&self.datapath),
            "pods could take link-local addresses that are not theirs",
        );
        note(
            "the node's addresses",
            node_addresses::protect(&mut self.upkeep.node_addresses, machine),
            "tunnels to some of the node's own addresses may leave pods",
        );
        let running = hardware::running(observed);
        note(
            "hardware addresses",
            self.upkeep.hardware.bind(machine, &running),
            "pods on bridges could send from hardware addresses of others",
        );
        problems
    }

    /// Does what comes after a plan's actions: keeps the programs in front on their hooks, and removes what nobody
    /// uses any more.
    pub(in crate::control) async fn clean_up(
        &mut self,
        plan: &Plan,
        settings: &Settings,
        in_cluster: bool,
    ) -> Problems {
        let mut problems = Problems::default();
        // Without the cluster's addresses, flows to them would be denied.
        let is_known =
            !in_cluster || settings.facts != Facts::default() || !settings.inherited.is_empty();
        if is_known && let Err(error) = self.judge_left_again(&plan.kept, settings.ranges) {
            let about = About::node("connections of an earlier agent's pods");
            let what = format!("cannot judge all of them by the changed `ranges` yet: {error:#}");
            problems.set(about, what);
        }
        self.check_hooks().await;
        self.check_stamps();
        if let Some(unsupported) = self.upkeep.stamps.unsupported() {
            problems.set(About::node("stamp check"), unsupported);
        }
        if let Err(error) = self.remove_unused() {
            let about = About::node("maps that nobody uses any more");
            problems.set(about, format!("cannot remove all of them yet: {error:#}"));
        }
        problems
    }

    /// Why what an enforced pod sends or receives may not be judged.
    pub(in crate::control) fn bypassed(&self, subject: &Subject) -> Option<String> {
        let interfaces = &self.enforced.get(subject)?.wanted.interfaces;
        let problem = self.upkeep.hooks.problem(interfaces).map(str::to_owned);
        problem.or_else(|| self.upkeep.stamps.problem())
    }

    /// Why an enforced pod may not send from its hardware address.
    pub(in crate::control) fn hardware_problem(&self, subject: &Subject) -> Option<String> {
        let enforced = self.enforced.get(subject)?;
        self.upkeep.hardware.problem(&enforced.wanted.interfaces)
    }
}
