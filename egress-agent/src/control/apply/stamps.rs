//! Reporting frames that skipped the programs, and keeping the tables in place that find them.
//!
//! See [`crate::datapath`]'s stamp check. It only counts frames by interface, so a denial line names the pod and the
//! number of frames.

use std::time::{Duration, Instant, SystemTime};

use egress_common::{
    ids::{IfIndex, PodId},
    reason::Reason,
};

use anyhow::Result;

use super::{Applier, enforced::Enforced};
use crate::{
    datapath::{Looked, WithoutStamp},
    report::{Denied, Reporter, Subject, Verdict},
};

/// How often the tables are checked: a little less than a second, so that each round finds it due.
const EVERY: Duration = Duration::from_millis(900);
/// How often, at most, a line says that tables were put back.
const LOG_EVERY: Duration = Duration::from_secs(20);

/// The state of the stamp check.
pub(in crate::control) struct Stamps {
    reporter: Reporter,
    looked: Option<Instant>,
    /// Why the check is not in force any more.
    problem: Option<String>,
    /// The tables that the kernel does not support.
    unsupported: Option<String>,
    /// Tables that were put back since the last line about it.
    restored: u64,
    logged: Option<Instant>,
}

impl Stamps {
    pub(in crate::control) fn new(reporter: Reporter) -> Self {
        Self {
            reporter,
            looked: None,
            problem: None,
            unsupported: None,
            restored: 0,
            logged: None,
        }
    }

    /// Marks the tables to be checked next, because one has changed.
    pub(in crate::control) fn hurry(&mut self) {
        self.looked = None;
    }

    /// Why frames that skip the programs may leave.
    pub(in crate::control) fn problem(&self) -> Option<String> {
        self.problem.as_ref().map(|why| {
            format!(
                "not enforced for certain: frames that skip the agent's programs may leave, because its table \
                 of nf_tables cannot be put back: {why}"
            )
        })
    }

    /// The problem with tables that the kernel does not support.
    pub(in crate::control) fn unsupported(&self) -> Option<String> {
        self.unsupported.as_ref().map(|why| {
            format!(
                "frames that skip the agent's programs are not dropped where the kernel takes no table of \
                 nf_tables: {why}"
            )
        })
    }

    /// Logs that tables were put back, at most once in [`LOG_EVERY`].
    fn log_restored(&mut self) {
        let recently = self.logged.is_some_and(|at| at.elapsed() < LOG_EVERY);
        if self.restored > 0 && !recently {
            tracing::warn!(
                tables = self.restored,
                "somebody removed or changed the agent's tables of nf_tables (`egress-agent`); they are back, \
                 and what they had counted since the last look is not known"
            );
            self.restored = 0;
            self.logged = Some(Instant::now());
        }
    }
}

impl Applier {
    /// Drops frames of a pod's interfaces that skip `from_pod` from now on, or counts them in audit mode. To be called
    /// when `from_pod` is attached.
    ///
    /// Returns whether frames have left that no program has judged.
    pub(in crate::control) fn require_stamps(
        &mut self,
        interfaces: &[IfIndex],
        mode: egress_policy::Mode,
    ) -> bool {
        let what = match mode {
            egress_policy::Mode::Audit => WithoutStamp::Count,
            egress_policy::Mode::Enforce | egress_policy::Mode::Off => WithoutStamp::Drop,
        };
        let ends_audit =
            what == WithoutStamp::Drop && self.datapath.lets_unstamped_pass(interfaces);
        if ends_audit {
            self.upkeep.stamps.hurry();
            self.check_stamps();
        }
        let have_left = ends_audit && self.datapath.has_passed_unstamped(interfaces);
        self.datapath.require_stamps(interfaces, what);
        have_left
    }

    /// Removes the flows that others have opened towards a pod. The pod may have sent their first packets itself, in
    /// others' names, by frames that no program has judged.
    pub(in crate::control) fn distrust_inbound(
        &mut self,
        subject: &Subject,
        pod: PodId,
    ) -> Result<()> {
        self.datapath.note_forged(pod)?;
        let forgotten = self.flows_of(pod)?.forget_inbound()?;
        tracing::warn!(
            pod = %subject,
            forgotten,
            "frames that no program has judged left in audit mode, so the pod may have opened connections to \
             itself in others' names: those that others have opened end"
        );
        Ok(())
    }

    /// Looks for frames without a stamp, if it is time to.
    pub(in crate::control) fn check_stamps(&mut self) {
        let stamps = &mut self.upkeep.stamps;
        if stamps.looked.is_some_and(|at| at.elapsed() < EVERY) {
            return;
        }
        stamps.looked = Some(Instant::now());
        let Looked {
            unstamped,
            restored,
            problem,
            unsupported,
        } = self.datapath.look_for_unstamped();
        stamps.problem = problem;
        stamps.unsupported = unsupported;
        stamps.restored += restored.len() as u64;
        stamps.log_restored();
        self.published
            .stamp_tables_restored
            .add(restored.len() as u64);
        for frames in unstamped {
            let is_there = |pod: &&Enforced| pod.wanted.interfaces.contains(&frames.ifindex);
            let Some(pod) = self.enforced.values().find(is_there) else {
                tracing::warn!(
                    ifindex = frames.ifindex.get(),
                    frames = frames.packets,
                    "frames without a stamp were received on an interface whose pod is not known yet"
                );
                continue;
            };
            self.upkeep.stamps.reporter.report(Denied {
                pod: std::sync::Arc::clone(&pod.identity),
                verdict: match frames.what {
                    WithoutStamp::Drop => Verdict::Dropped,
                    WithoutStamp::Count => Verdict::Audited,
                },
                reason: Reason::NotJudged,
                protocol: None,
                src: None,
                dst: None,
                icmp: None,
                dns: None,
                dst_names: Vec::new(),
                rule: None,
                closed_by: std::sync::Arc::default(),
                time: SystemTime::now(),
                count: frames.packets,
            });
        }
    }
}
