//! Moving one pod from what it is under to what it should be under.

use std::{collections::HashSet, sync::Arc};

use anyhow::{Context as _, Result, bail};
use egress_common::records::Interface;

use super::{
    denials::Known,
    enforced::{Enforced, PodKey, Wanted},
    reconcile::{Reconciler, title},
};
use crate::{datapath::PodPins, gate::Enforcement, report::PodIdentity};

impl Reconciler {
    /// Makes a pod's enforcement what it should be.
    ///
    /// # Errors
    ///
    /// When the kernel refuses; what held before holds on.
    pub(super) async fn enforce(&mut self, key: &PodKey, wanted: Wanted) -> Result<()> {
        let Some(enforced) = self.enforced.get(key) else {
            return self.begin(key, wanted).await;
        };
        if !enforced.wanted.same_policy(&wanted) {
            self.change(key, wanted).await?;
        } else if enforced.wanted.ifindex != wanted.ifindex {
            self.move_to(key, wanted.ifindex).await?;
        }
        Ok(())
    }

    /// A pod that is not enforced yet.
    async fn begin(&mut self, key: &PodKey, wanted: Wanted) -> Result<()> {
        let (namespace, name) = key;
        let identity = Arc::new(PodIdentity::new(
            self.node.as_str(),
            namespace.as_str(),
            name.as_str(),
            wanted.uid.as_str(),
        ));
        let left = self
            .adoptable
            .iter()
            .find(|(_, left)| {
                (&left.namespace, &left.name, &left.uid) == (namespace, name, &wanted.uid)
            })
            .map(|(&pod, left)| (pod, left.clone()));
        let (pod, before) = match &left {
            Some((pod, left)) => (*pod, left.interfaces.clone()),
            None => {
                let pod = self.next_pod;
                self.next_pod += 1;
                self.datapath
                    .create_pod(pod, namespace, name, &wanted.uid)?;
                (pod, Vec::new())
            }
        };
        let pins = self.datapath.pins_of(namespace, name);
        let begun = self
            .begin_policy(&identity, pod, &before, &wanted, &pins)
            .await;
        let policy = match begun {
            Ok(policy) => policy,
            Err(error) => {
                if left.is_none() {
                    // Nothing of it holds yet; the next attempt starts afresh.
                    let _ = self.gate.remove(pod).await;
                    let _ = self.datapath.remove_pod(pod, &pins);
                    let _ = self.datapath.counters().and_then(|mut map| map.forget(pod));
                }
                return Err(error);
            }
        };
        self.adoptable.remove(&pod);
        let flows = self.datapath.flow_map(pod)?;
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
        Ok(())
    }

    /// Gives a new or adopted pod its policy and attaches it. Returns the policy's id.
    async fn begin_policy(
        &mut self,
        identity: &Arc<PodIdentity>,
        pod: u32,
        before: &[(u32, Interface)],
        wanted: &Wanted,
        pins: &PodPins,
    ) -> Result<u32> {
        let earlier: HashSet<u32> = before.iter().map(|(_, entry)| entry.policy).collect();
        let mut adopted = None;
        for &policy in &earlier {
            if let Some(allow) =
                self.datapath
                    .adopt_policy(policy, &wanted.record, wanted.cidrs())?
            {
                adopted = Some((policy, allow));
                break;
            }
        }
        let (policy, allow) = match adopted {
            Some(adopted) => adopted,
            None => {
                let policy = self.new_policy_id();
                let allow = self
                    .datapath
                    .create_policy(policy, &wanted.record, wanted.cidrs())?;
                (policy, allow)
            }
        };
        self.datapath.pin_allow(policy, pins)?;
        self.gate
            .apply(Enforcement {
                identity: Arc::clone(identity),
                compiled: Arc::clone(&wanted.compiled),
                entry: wanted.entry(pod, policy),
                interfaces: vec![wanted.ifindex],
                allow,
            })
            .await?;
        // Before its first packet can be denied: the line needs its name.
        self.introduce(
            pod,
            Known {
                identity: Arc::clone(identity),
                compiled: Arc::clone(&wanted.compiled),
                policy,
            },
        );
        self.datapath.attach(wanted.ifindex)?;
        for &(ifindex, _) in before {
            if ifindex != wanted.ifindex {
                self.datapath.detach(ifindex)?;
                self.datapath.interfaces()?.remove(ifindex)?;
            }
        }
        for stale in earlier {
            if stale != policy {
                self.datapath.drop_policy(stale)?;
            }
        }
        Ok(policy)
    }

    /// A new version of an enforced pod's policy.
    async fn change(&mut self, key: &PodKey, wanted: Wanted) -> Result<()> {
        let policy = self.new_policy_id();
        let Some(enforced) = self.enforced.get_mut(key) else {
            bail!("the pod is not enforced");
        };
        let allow = self
            .datapath
            .create_policy(policy, &wanted.record, wanted.cidrs())?;
        let applied = self
            .gate
            .apply(Enforcement {
                identity: Arc::clone(&enforced.identity),
                compiled: Arc::clone(&wanted.compiled),
                entry: wanted.entry(enforced.pod, policy),
                interfaces: vec![wanted.ifindex],
                allow,
            })
            .await;
        if let Err(error) = applied {
            self.datapath.drop_policy(policy)?;
            return Err(error).context("the earlier policy stays");
        }
        self.datapath.pin_allow(policy, &enforced.pins)?;
        let before = std::mem::replace(&mut enforced.policy, policy);
        let moved_from = enforced.wanted.ifindex;
        enforced.wanted = wanted;
        enforced.version += 1;
        tracing::info!(
            pod = %title(key),
            version = enforced.version,
            mode = %enforced.wanted.compiled.mode.as_str(),
            "policy applied"
        );
        if moved_from != enforced.wanted.ifindex {
            self.datapath.attach(enforced.wanted.ifindex)?;
            self.datapath.detach(moved_from)?;
        }
        self.datapath.drop_policy(before)
    }

    /// The pod's interface was replaced by one with the same name, or its annotation names another.
    async fn move_to(&mut self, key: &PodKey, ifindex: u32) -> Result<()> {
        let Some(enforced) = self.enforced.get_mut(key) else {
            bail!("the pod is not enforced");
        };
        self.gate.move_to(enforced.pod, vec![ifindex]).await?;
        self.datapath.attach(ifindex)?;
        let before = std::mem::replace(&mut enforced.wanted.ifindex, ifindex);
        self.datapath.detach(before)?;
        tracing::info!(pod = %title(key), interface = ifindex, "enforcing on another interface");
        Ok(())
    }

    /// Stops enforcing a pod and removes all that is its own.
    pub(super) async fn remove(&mut self, key: &PodKey) {
        let Some(enforced) = self.enforced.remove(key) else {
            return;
        };
        let result = async {
            self.datapath.detach(enforced.wanted.ifindex)?;
            self.gate.remove(enforced.pod).await?;
            self.datapath.drop_policy(enforced.policy)?;
            self.datapath.remove_pod(enforced.pod, &enforced.pins)
        }
        .await;
        match result {
            Ok(()) => tracing::info!(pod = %title(key), "released"),
            Err(error) => {
                tracing::error!(
                    pod = %title(key),
                    error = %format!("{error:#}"),
                    "cannot remove all of a pod"
                );
            }
        }
    }

    fn new_policy_id(&mut self) -> u32 {
        let id = self.next_policy;
        self.next_policy += 1;
        id
    }
}
