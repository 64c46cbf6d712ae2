//! Moving one pod from what it is under to what it should be under.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail};

use crate::control::{
    apply::prepare::Version,
    plan::wanted::{Enforced, Wanted},
    reconcile::Reconciler,
};
use crate::{
    datapath::{Adoptable, FlowMap, Unused},
    gate::{Enforcement, Judged, Left},
    host::Network,
    report::{PodIdentity, Subject},
};

impl Reconciler {
    /// Makes a pod's enforcement what it should be; `version` is what was prepared for it.
    ///
    /// # Errors
    ///
    /// When the kernel refuses; what held before holds on, and what was begun is finished by the
    /// next attempt.
    pub(in crate::control) async fn enforce(
        &mut self,
        key: &Subject,
        wanted: Wanted,
        version: Option<Version>,
    ) -> Result<()> {
        let Some(pod) = self.enforced.get(key) else {
            let version = version.context("nothing was prepared for the pod")?;
            return self.begin(key, wanted, version).await;
        };
        let before = pod.wanted.interfaces.clone();
        let (interfaces, networks) = (wanted.interfaces.clone(), wanted.networks.clone());
        if let Some(version) = version {
            self.change(key, wanted.on(before.clone()), version).await?;
        }
        if before != interfaces {
            self.move_to(key, interfaces, networks).await?;
        }
        Ok(())
    }

    /// A pod that is not enforced yet: new, left by an earlier agent, or begun and not finished.
    async fn begin(&mut self, key: &Subject, wanted: Wanted, version: Version) -> Result<()> {
        let (namespace, name) = key.fields();
        let Version { pod, policy, allow } = version;
        let identity = PodIdentity::new(
            self.config.node.as_str(),
            namespace,
            name,
            wanted.uid.as_str(),
        );
        let identity = Arc::new(identity.counted_in(self.board.denials_of(namespace)));
        let entry = wanted.entry(pod, policy);
        let pins = self.datapath.pins_of(namespace, name);
        self.datapath.pin_allow(policy, &pins)?;
        let left = self.left_under(pod, policy, &wanted)?;
        let mut flows = self.flows_of(pod)?;
        self.take_from_quarantine(&wanted, &mut flows)?;
        let has_unjudged = self.has_unjudged(key, &wanted);
        let is_judged = |ifindex: &u32| self.is_anothers(pod, *ifindex);
        let settles = has_unjudged && !wanted.interfaces.iter().any(is_judged);
        let entry = if settles {
            self.datapath.note_unjudged(pod)?;
            Judged::Sources.in_entry(entry)
        } else {
            entry
        };
        if has_unjudged && !settles {
            self.datapath.note_unjudged(pod)?;
            self.seed(key, &wanted, &mut flows, policy).await;
        }
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
            })
            .await?;
        // Known before the first packet can be denied.
        self.announce(pod, &identity, &wanted.compiled, policy);
        for &ifindex in &wanted.interfaces {
            self.datapath.attach(ifindex)?;
        }
        if self.require_stamps(&wanted.interfaces, wanted.compiled.mode) {
            self.distrust_inbound(key, pod)?;
        }
        self.unjudged.judge(&wanted.interfaces);
        let left = self.adoptable.remove(&pod);
        if settles {
            self.settling.push(key.clone());
        } else {
            say_enforcing(key, &wanted);
        }
        let enforced = Enforced {
            wanted,
            identity,
            pod,
            policy,
            version: 1,
            pins,
            flows,
        };
        self.enforced.insert(key.clone(), enforced);
        for (ifindex, entry) in left.map_or_else(Vec::new, |left| left.interfaces) {
            self.let_go(pod, ifindex)?;
            if entry.policy != policy {
                self.unused.push(Unused::Policy(entry.policy));
            }
        }
        Ok(())
    }

    /// A new version of an enforced pod's policy.
    async fn change(&mut self, key: &Subject, wanted: Wanted, version: Version) -> Result<()> {
        let Version { pod, policy, allow } = version;
        let flows = self.flows_of(pod)?;
        let Some(enforced) = self.enforced.get_mut(key) else {
            bail!("the pod is not enforced");
        };
        let names = self.datapath.names(&enforced.pins)?;
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
            })
            .await;
        if let Err(error) = applied {
            self.unused.push(Unused::Policy(policy));
            return Err(error).context("the earlier policy stays");
        }
        // It is in force: from here on nothing may fail before this is noted.
        let before = std::mem::replace(&mut enforced.policy, policy);
        self.unused.push(Unused::Policy(before));
        enforced.wanted = wanted;
        enforced.version += 1;
        let (mode, version) = (enforced.wanted.compiled.mode, enforced.version);
        let interfaces = enforced.wanted.interfaces.clone();
        let pod = enforced.pod;
        let pinned = self.datapath.pin_allow(policy, &enforced.pins);
        if self.require_stamps(&interfaces, mode) {
            self.distrust_inbound(key, pod)?;
        }
        tracing::info!(
            pod = %key,
            version,
            mode = %mode.as_str(),
            "policy applied"
        );
        pinned
    }

    /// What an earlier agent left a pod's interfaces under, where that is not this version of its policy.
    fn left_under(&self, pod: u32, policy: u32, wanted: &Wanted) -> Result<Vec<Left>> {
        let mut policies: Vec<u32> = self
            .datapath
            .interfaces()?
            .entries()?
            .into_iter()
            .filter(|(_, entry)| entry.pod == pod && entry.policy != policy)
            .map(|(_, entry)| entry.policy)
            .collect();
        policies.sort_unstable();
        policies.dedup();
        let mut left = Vec::new();
        for policy in policies {
            if let (Some(record), Some(allow)) = (
                self.datapath.policy(policy)?,
                self.datapath.allow_of(policy)?,
            ) {
                let alike = record.names_alike(&wanted.record);
                left.push(Left { allow, alike });
            }
        }
        Ok(left)
    }

    /// A handle on a pod's flows.
    pub(in crate::control) fn flows_of(&self, pod: u32) -> Result<FlowMap> {
        self.datapath
            .flow_map(pod)?
            .with_context(|| format!("pod {pod} has no flow map"))
    }

    /// The pod's interfaces were replaced, or there are more or fewer of them.
    async fn move_to(
        &mut self,
        key: &Subject,
        interfaces: Vec<u32>,
        networks: Vec<Network>,
    ) -> Result<()> {
        let Some(enforced) = self.enforced.get(key) else {
            bail!("the pod is not enforced");
        };
        let (pod, policy) = (enforced.pod, enforced.policy);
        let mode = enforced.wanted.compiled.mode;
        let mut flows = self.flows_of(pod)?;
        let new = enforced.wanted.only_new(&interfaces, &networks);
        if let Some(new) = &new {
            self.take_from_quarantine(new, &mut flows)?;
        }
        // Without an entry nothing leaves by a new interface, but frames from before may be on their way.
        for &ifindex in &interfaces {
            self.datapath.attach(ifindex)?;
        }
        if let Some(new) = new.filter(|new| self.has_unjudged(key, new)) {
            self.datapath.note_unjudged(pod)?;
            self.seed(key, &new, &mut flows, policy).await;
        }
        self.gate.move_to(pod, interfaces.clone()).await?;
        let _ = self.require_stamps(&interfaces, mode);
        self.unjudged.judge(&interfaces);
        tracing::info!(pod = %key, ?interfaces, "enforcing on other interfaces");
        let Some(enforced) = self.enforced.get_mut(key) else {
            bail!("the pod is not enforced");
        };
        enforced.wanted.networks = networks;
        let before = std::mem::replace(&mut enforced.wanted.interfaces, interfaces);
        for ifindex in before {
            self.let_go(pod, ifindex)?;
        }
        Ok(())
    }

    /// Stops enforcing a pod. What cannot be removed now is left behind, and tried again.
    pub(in crate::control) async fn remove(&mut self, key: &Subject) {
        let Some(enforced) = self.enforced.remove(key) else {
            return;
        };
        let left = Adoptable {
            namespace: key.fields().0.to_owned(),
            name: key.fields().1.to_owned(),
            uid: enforced.wanted.uid.clone(),
            interfaces: enforced.entries(),
        };
        match self.drop_leftover(enforced.pod, &left).await {
            Ok(()) => tracing::info!(pod = %key, "released"),
            Err(error) => {
                tracing::error!(
                    pod = %key,
                    error = %format!("{error:#}"),
                    "cannot remove all of a pod yet"
                );
                self.adoptable.insert(enforced.pod, left);
            }
        }
    }

    /// Removes everything of a pod that is not enforced. Its maps go with all others that are of no
    /// use any more.
    pub(in crate::control) async fn drop_leftover(
        &mut self,
        pod: u32,
        left: &Adoptable,
    ) -> Result<()> {
        for &(ifindex, _) in &left.interfaces {
            self.let_go(pod, ifindex)?;
        }
        self.gate.remove(pod).await?;
        let own = Subject::from_fields(&left.namespace, &left.name);
        // Otherwise the pins are those of a newer pod with the same name by now.
        if !self.enforced.contains_key(&own)
            && !self.adoptable.iter().any(|(&id, other)| {
                id != pod && Subject::from_fields(&other.namespace, &other.name) == own
            })
        {
            self.datapath
                .pins_of(&left.namespace, &left.name)
                .remove()?;
        }
        let policies = left.interfaces.iter().map(|(_, entry)| entry.policy);
        self.unused.extend(policies.map(Unused::Policy));
        self.unused.push(Unused::Pod(pod));
        Ok(())
    }

    /// Detaches from an interface that a pod is on no more, unless it is another pod's by now.
    fn let_go(&mut self, pod: u32, ifindex: u32) -> Result<()> {
        let is_on = |enforced: &Enforced| {
            enforced.pod == pod && enforced.wanted.interfaces.contains(&ifindex)
        };
        if self.enforced.values().any(is_on) || self.is_anothers(pod, ifindex) {
            return Ok(());
        }
        self.datapath.detach(ifindex)?;
        self.datapath.interfaces()?.remove(ifindex, pod)
    }

    /// Whether an interface is, or is to be, that of another pod than this one.
    pub(in crate::control) fn is_anothers(&self, pod: u32, ifindex: u32) -> bool {
        let is_left = self.adoptable.iter().any(|(&id, left)| {
            id != pod && left.interfaces.iter().any(|&(other, _)| other == ifindex)
        });
        is_left || self.is_taken_over(pod, ifindex)
    }

    /// Whether another pod than this one is enforced on an interface.
    pub(in crate::control) fn is_taken_over(&self, pod: u32, ifindex: u32) -> bool {
        self.enforced
            .values()
            .any(|other| other.pod != pod && other.wanted.interfaces.contains(&ifindex))
    }
}

/// Says that a pod is enforced from now on.
pub(in crate::control) fn say_enforcing(key: &Subject, wanted: &Wanted) {
    tracing::info!(
        pod = %key,
        interfaces = ?wanted.interfaces,
        mode = %wanted.compiled.mode.as_str(),
        "enforcing"
    );
}
