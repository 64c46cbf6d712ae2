//! Beginning to enforce a pod, changing its policy, and moving it to other interfaces.

use std::{sync::Arc, time::SystemTime};

use anyhow::{Context as _, Result, bail};
use egress_common::ids::{IfIndex, PodId, PolicyId};

use super::{Applier, Outcome, enforced::Enforced, prepare::Version};
use crate::{
    control::{
        observe::machine::Machine,
        plan::{Before, wanted::Wanted},
    },
    datapath::{AllowMap, Unused},
    gate::{Enforcement, Judged, Left},
    report::{PodIdentity, Subject},
};

impl Applier {
    /// Begins to enforce a pod that is new, or that an earlier agent or a failed attempt left in the kernel.
    ///
    /// # Errors
    ///
    /// When the kernel refuses. State that was created is recorded as left in the kernel, and the next attempt
    /// continues from there.
    pub(super) async fn begin(
        &mut self,
        subject: &Subject,
        wanted: &Arc<Wanted>,
        version: Option<Result<Version>>,
        before: Before,
        machine: &mut Machine,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let (namespace, name) = subject.fields();
        let Version { pod, policy, allow } =
            version.context("nothing was prepared for the pod")??;
        let identity = PodIdentity::new(self.node.as_str(), namespace, name, wanted.uid.as_str());
        let identity = Arc::new(identity.counted_in(self.published.denials_of(namespace)));
        let entry = wanted.entry(pod, policy);
        let pins = self.datapath.pins_of(namespace, name);
        self.datapath.pin_allow(policy, &pins)?;
        let left = self.left_under(pod, policy, &allow, wanted)?;
        let mut flows = self.flows_of(pod)?;
        self.take_from_earlier(pod, wanted, &mut flows)?;
        let is_judged = |ifindex: &IfIndex| self.is_anothers(pod, *ifindex);
        let settles = before == Before::Settle && !wanted.interfaces.iter().any(is_judged);
        let entry = if settles {
            self.datapath.note_unjudged(pod)?;
            Judged::Sources.in_entry(entry)
        } else {
            entry
        };
        if before != Before::Judged && !settles {
            self.datapath.note_unjudged(pod)?;
            self.seed(subject, wanted, &mut flows, policy, machine)
                .await;
        }
        self.gate
            .forget(self.left_on(pod, &wanted.interfaces))
            .await?;
        self.gate
            .apply(Enforcement {
                identity: Arc::clone(&identity),
                compiled: Arc::clone(&wanted.compiled),
                own: wanted.own().to_vec(),
                entry,
                interfaces: wanted.interfaces.clone(),
                allow,
                names: self.datapath.names(&pins)?,
                left,
                flows: self.flows_of(pod)?,
                pending: self.datapath.pending_map(pod)?,
            })
            .await?;
        self.note_from_earlier(pod, wanted, &mut flows)?;
        // The denial reader must know the pod before its first packet can be denied.
        let enforced = Enforced {
            wanted: Arc::clone(wanted),
            identity,
            pod,
            policy,
            version: 1,
            since: SystemTime::now(),
            pins,
            flows,
        };
        self.published.add(pod, &Arc::new(enforced.record(subject)));
        for &ifindex in &wanted.interfaces {
            self.datapath.attach(ifindex)?;
        }
        if self.require_stamps(&wanted.interfaces, wanted.compiled.mode) {
            self.distrust_inbound(subject, pod)?;
        }
        outcome.judged.extend(&wanted.interfaces);
        let left = self.left.remove(&pod);
        if settles {
            self.settling.push(subject.clone());
        } else {
            log_enforcing(subject, wanted);
        }
        self.enforced.insert(subject.clone(), enforced);
        for (ifindex, entry) in left.map_or_else(Vec::new, |left| left.interfaces) {
            self.detach(pod, ifindex)?;
            if entry.policy() != policy {
                self.unused.push(Unused::Policy(entry.policy()));
            }
        }
        Ok(())
    }

    /// Puts an enforced pod under a new version of its policy.
    ///
    /// # Errors
    ///
    /// When the kernel refuses. The earlier version stays in force then, unless the error says otherwise.
    pub(super) async fn change(
        &mut self,
        subject: &Subject,
        wanted: &Wanted,
        version: Option<Result<Version>>,
    ) -> Result<()> {
        let Version { pod, policy, allow } =
            version.context("nothing was prepared for the pod")??;
        let flows = self.flows_of(pod)?;
        let Some(enforced) = self.enforced.get_mut(subject) else {
            bail!("the pod is not enforced");
        };
        // Another action moves it to other interfaces.
        let wanted = wanted.clone().on_interfaces_of(&enforced.wanted);
        let names = self.datapath.names(&enforced.pins)?;
        let pending = self.datapath.pending_map(pod)?;
        let applied = self
            .gate
            .apply(Enforcement {
                identity: Arc::clone(&enforced.identity),
                compiled: Arc::clone(&wanted.compiled),
                own: wanted.own().to_vec(),
                entry: wanted.entry(enforced.pod, policy),
                interfaces: wanted.interfaces.clone(),
                allow,
                names,
                left: Vec::new(),
                flows,
                pending,
            })
            .await;
        if let Err(error) = applied {
            self.unused.push(Unused::Policy(policy));
            return Err(error).context("the earlier policy stays");
        }
        // The new version is in force. Nothing may fail before this is noted.
        let before = std::mem::replace(&mut enforced.policy, policy);
        self.unused.push(Unused::Policy(before));
        enforced.wanted = Arc::new(wanted);
        enforced.version += 1;
        enforced.since = SystemTime::now();
        let record = Arc::new(enforced.record(subject));
        self.published.add(enforced.pod, &record);
        let (mode, version) = (enforced.wanted.compiled.mode, enforced.version);
        let interfaces = enforced.wanted.interfaces.clone();
        let pod = enforced.pod;
        let pinned = self.datapath.pin_allow(policy, &enforced.pins);
        if self.require_stamps(&interfaces, mode) {
            self.distrust_inbound(subject, pod)?;
        }
        tracing::info!(
            pod = %subject,
            version,
            mode = %mode.as_str(),
            "policy applied"
        );
        pinned
    }

    /// The other policies under which an earlier agent left this pod's interfaces, except those that share this
    /// policy's allow map.
    fn left_under(
        &self,
        pod: PodId,
        policy: PolicyId,
        of_policy: &AllowMap,
        wanted: &Wanted,
    ) -> Result<Vec<Left>> {
        let mut policies: Vec<PolicyId> = self
            .datapath
            .interfaces()?
            .entries()?
            .into_iter()
            .filter(|(_, entry)| entry.pod() == pod && entry.policy() != policy)
            .map(|(_, entry)| entry.policy())
            .collect();
        policies.sort_unstable();
        policies.dedup();
        let mut left = Vec::new();
        for policy in policies {
            if let (Some(record), Some(allow)) = (
                self.datapath.policy(policy)?,
                self.datapath.allow_of(policy)?,
            ) && !allow.is_same(of_policy)
            {
                let alike = record.names_alike(&wanted.record);
                left.push(Left { allow, alike });
            }
        }
        Ok(left)
    }

    /// Enforces a pod on other interfaces: they were replaced, or there are more or fewer of them.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(super) async fn move_to(
        &mut self,
        subject: &Subject,
        wanted: &Wanted,
        has_unjudged: bool,
        machine: &mut Machine,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let Some(enforced) = self.enforced.get(subject) else {
            bail!("the pod is not enforced");
        };
        let (pod, policy) = (enforced.pod, enforced.policy);
        let mode = enforced.wanted.compiled.mode;
        let interfaces = wanted.interfaces.clone();
        let mut flows = self.flows_of(pod)?;
        let new = enforced.wanted.only_new(&interfaces, &wanted.networks);
        let on_new = enforced.wanted.on_new(&interfaces, &wanted.networks);
        self.take_from_earlier(pod, &on_new, &mut flows)?;
        // Nothing leaves by a new interface that has no entry, but earlier frames may still be on their way.
        for &ifindex in &interfaces {
            self.datapath.attach(ifindex)?;
        }
        if has_unjudged {
            self.datapath.note_unjudged(pod)?;
            match new {
                Some(new) => self.seed(subject, &new, &mut flows, policy, machine).await,
                // The connections in a known network were read when it was new, or have been judged since.
                None => {
                    self.note_called(subject, &on_new, &mut flows, machine)
                        .await;
                }
            }
        }
        self.gate.forget(self.left_on(pod, &interfaces)).await?;
        self.gate.move_to(pod, interfaces.clone()).await?;
        self.note_from_earlier(pod, &on_new, &mut flows)?;
        let _ = self.require_stamps(&interfaces, mode);
        outcome.judged.extend(&interfaces);
        tracing::info!(pod = %subject, ?interfaces, "enforcing on other interfaces");
        let Some(enforced) = self.enforced.get_mut(subject) else {
            bail!("the pod is not enforced");
        };
        let in_force = Arc::make_mut(&mut enforced.wanted);
        in_force.networks.clone_from(&wanted.networks);
        let before = std::mem::replace(&mut in_force.interfaces, interfaces);
        for ifindex in before {
            self.detach(pod, ifindex)?;
        }
        Ok(())
    }
}

/// Logs that a pod is enforced from now on.
pub(super) fn log_enforcing(subject: &Subject, wanted: &Wanted) {
    tracing::info!(
        pod = %subject,
        interfaces = ?wanted.interfaces,
        mode = %wanted.compiled.mode.as_str(),
        "enforcing"
    );
}
