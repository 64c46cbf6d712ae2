//! Moving one pod from what it is under to what it should be under.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail};

use super::{
    enforced::{Enforced, PodKey, Wanted},
    reconcile::{Reconciler, title},
};
use crate::{
    datapath::{Adoptable, AllowMap, PodPins},
    gate::Enforcement,
    report::PodIdentity,
};

impl Reconciler {
    /// Makes a pod's enforcement what it should be.
    ///
    /// # Errors
    ///
    /// When the kernel refuses; what held before holds on, and what was begun is finished by the
    /// next attempt.
    pub(super) async fn enforce(&mut self, key: &PodKey, wanted: Wanted) -> Result<()> {
        let Some(enforced) = self.enforced.get(key) else {
            return self.begin(key, wanted).await;
        };
        let (ifindex, before) = (wanted.ifindex, enforced.wanted.ifindex);
        if !enforced.wanted.same_policy(&wanted) {
            self.change(key, wanted.on(before)).await?;
        }
        if ifindex != before {
            self.move_to(key, ifindex).await?;
        }
        Ok(())
    }

    /// A pod that is not enforced yet: new, left by an earlier agent, or begun and not finished.
    async fn begin(&mut self, key: &PodKey, wanted: Wanted) -> Result<()> {
        let (namespace, name) = key;
        let identity = Arc::new(PodIdentity::new(
            self.config.node.as_str(),
            namespace.as_str(),
            name.as_str(),
            wanted.uid.as_str(),
        ));
        let left = self.adoptable.iter().find(|(_, left)| {
            (&left.namespace, &left.name, &left.uid) == (namespace, name, &wanted.uid)
        });
        let pod = match left {
            Some((&pod, _)) => pod,
            None => self.create(key, &wanted.uid)?,
        };
        let flows = self.datapath.flow_map(pod)?;
        let pins = self.datapath.pins_of(namespace, name);
        let policy = self.begin_policy(&identity, pod, &wanted, &pins).await?;
        let left = self.adoptable.remove(&pod);
        tracing::info!(
            pod = %title(key),
            interface = wanted.ifindex,
            mode = %wanted.compiled.mode.as_str(),
            "enforcing"
        );
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
                self.datapath.drop_policy(entry.policy)?;
            }
        }
        Ok(())
    }

    /// Makes a new pod's own maps. Until it is enforced it counts as left behind: the next attempt
    /// goes on from there, and if there is none, it is removed like everything else that is.
    fn create(&mut self, (namespace, name): &PodKey, uid: &str) -> Result<u32> {
        let pod = self.next_pod;
        self.next_pod += 1;
        let left = Adoptable {
            namespace: namespace.clone(),
            name: name.clone(),
            uid: uid.to_owned(),
            interfaces: Vec::new(),
        };
        if let Err(error) = self.datapath.create_pod(pod, namespace, name, uid) {
            let _ = self.datapath.remove_pod_maps(pod);
            return Err(error);
        }
        self.adoptable.insert(pod, left);
        Ok(pod)
    }

    /// Gives a new or adopted pod its policy and attaches it. Returns the policy's id.
    async fn begin_policy(
        &mut self,
        identity: &Arc<PodIdentity>,
        pod: u32,
        wanted: &Wanted,
        pins: &PodPins,
    ) -> Result<u32> {
        let before = self
            .adoptable
            .get(&pod)
            .map_or_else(Vec::new, |left| left.interfaces.clone());
        let mut adopted = None;
        for (_, entry) in &before {
            if let Some(allow) =
                self.datapath
                    .adopt_policy(entry.policy, &wanted.record, wanted.cidrs())?
            {
                adopted = Some((entry.policy, allow));
                break;
            }
        }
        let (policy, allow) = match adopted {
            Some(adopted) => adopted,
            None => self.create_policy(wanted)?,
        };
        let entry = wanted.entry(pod, policy);
        if let Some(left) = self.adoptable.get_mut(&pod) {
            // Whatever fails from here on, the policy is known to the next attempt.
            left.interfaces.retain(|at| *at != (wanted.ifindex, entry));
            left.interfaces.push((wanted.ifindex, entry));
        }
        self.datapath.pin_allow(policy, pins)?;
        self.gate
            .apply(Enforcement {
                identity: Arc::clone(identity),
                compiled: Arc::clone(&wanted.compiled),
                entry,
                interfaces: vec![wanted.ifindex],
                allow,
                flows: self.datapath.flow_map(pod)?,
            })
            .await?;
        // Known before the first packet can be denied.
        self.announce(pod, identity, &wanted.compiled, policy);
        self.datapath.attach(wanted.ifindex)?;
        Ok(policy)
    }

    /// A new version of an enforced pod's policy.
    async fn change(&mut self, key: &PodKey, wanted: Wanted) -> Result<()> {
        let Some(enforced) = self.enforced.get(key) else {
            bail!("the pod is not enforced");
        };
        let flows = self.datapath.flow_map(enforced.pod)?;
        let (policy, allow) = self.create_policy(&wanted)?;
        let Some(enforced) = self.enforced.get_mut(key) else {
            bail!("the pod is not enforced");
        };
        let applied = self
            .gate
            .apply(Enforcement {
                identity: Arc::clone(&enforced.identity),
                compiled: Arc::clone(&wanted.compiled),
                entry: wanted.entry(enforced.pod, policy),
                interfaces: vec![wanted.ifindex],
                allow,
                flows,
            })
            .await;
        if let Err(error) = applied {
            self.datapath.drop_policy(policy)?;
            return Err(error).context("the earlier policy stays");
        }
        // It is in force: from here on nothing may fail before this is noted.
        let before = std::mem::replace(&mut enforced.policy, policy);
        enforced.wanted = wanted;
        enforced.version += 1;
        tracing::info!(
            pod = %title(key),
            version = enforced.version,
            mode = %enforced.wanted.compiled.mode.as_str(),
            "policy applied"
        );
        let pinned = self.datapath.pin_allow(policy, &enforced.pins);
        self.datapath.drop_policy(before)?;
        pinned
    }

    /// Makes the maps of a new policy; nothing of it is left when that fails.
    fn create_policy(&mut self, wanted: &Wanted) -> Result<(u32, AllowMap)> {
        let policy = self.next_policy;
        self.next_policy += 1;
        match self
            .datapath
            .create_policy(policy, &wanted.record, wanted.cidrs())
        {
            Ok(allow) => Ok((policy, allow)),
            Err(error) => {
                let _ = self.datapath.drop_policy(policy);
                Err(error)
            }
        }
    }

    /// The pod's interface was replaced by one with the same name, or its annotation names another.
    async fn move_to(&mut self, key: &PodKey, ifindex: u32) -> Result<()> {
        let Some(enforced) = self.enforced.get_mut(key) else {
            bail!("the pod is not enforced");
        };
        let pod = enforced.pod;
        self.gate.move_to(pod, vec![ifindex]).await?;
        self.datapath.attach(ifindex)?;
        let before = std::mem::replace(&mut enforced.wanted.ifindex, ifindex);
        tracing::info!(pod = %title(key), interface = ifindex, "enforcing on another interface");
        self.let_go(pod, before)
    }

    /// Stops enforcing a pod. What cannot be removed now is left behind, and tried again.
    pub(super) async fn remove(&mut self, key: &PodKey) {
        let Some(enforced) = self.enforced.remove(key) else {
            return;
        };
        let left = Adoptable {
            namespace: key.0.clone(),
            name: key.1.clone(),
            uid: enforced.wanted.uid.clone(),
            interfaces: vec![(
                enforced.wanted.ifindex,
                enforced.wanted.entry(enforced.pod, enforced.policy),
            )],
        };
        match self.drop_leftover(enforced.pod, &left).await {
            Ok(()) => tracing::info!(pod = %title(key), "released"),
            Err(error) => {
                tracing::error!(
                    pod = %title(key),
                    error = %format!("{error:#}"),
                    "cannot remove all of a pod yet"
                );
                self.adoptable.insert(enforced.pod, left);
            }
        }
    }

    /// Removes everything of a pod that is not enforced.
    pub(super) async fn drop_leftover(&mut self, pod: u32, left: &Adoptable) -> Result<()> {
        for &(ifindex, entry) in &left.interfaces {
            self.let_go(pod, ifindex)?;
            self.datapath.drop_policy(entry.policy)?;
        }
        self.gate.remove(pod).await?;
        let namesake = |namespace: &str, name: &str| {
            (namespace, name) == (left.namespace.as_str(), left.name.as_str())
        };
        if self.enforced.keys().any(|key| namesake(&key.0, &key.1))
            || self
                .adoptable
                .iter()
                .any(|(&id, other)| id != pod && namesake(&other.namespace, &other.name))
        {
            // The pins are those of a newer pod with the same name by now.
            return self.datapath.remove_pod_maps(pod);
        }
        let pins = self.datapath.pins_of(&left.namespace, &left.name);
        self.datapath.remove_pod(pod, &pins)
    }

    /// Detaches from an interface that a pod is on no more, unless it is another pod's by now.
    fn let_go(&mut self, pod: u32, ifindex: u32) -> Result<()> {
        let is_enforced = self
            .enforced
            .values()
            .any(|enforced| enforced.wanted.ifindex == ifindex);
        let is_left = self.adoptable.iter().any(|(&id, left)| {
            id != pod && left.interfaces.iter().any(|&(other, _)| other == ifindex)
        });
        if is_enforced || is_left {
            return Ok(());
        }
        self.datapath.detach(ifindex)?;
        self.datapath.interfaces()?.remove(ifindex, pod)
    }
}
