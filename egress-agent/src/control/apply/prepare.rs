//! Creating the maps that pods need before they can be put under their policies.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use egress_common::ids::{IfIndex, PodId, PolicyId};

use super::Applier;
use crate::{
    control::plan::{Action, wanted::Wanted},
    datapath::{Adoptable, AllowMap, NewMaps, NewPod, NewPolicy, Unused},
    report::Subject,
};

/// A version of a pod's policy that is complete in the kernel. No interface is under it yet, unless it was adopted.
pub(super) struct Version {
    /// The pod's id.
    pub(super) pod: PodId,
    /// The policy's id.
    pub(super) policy: PolicyId,
    pub(super) allow: AllowMap,
}

/// A version that is being created, or was found.
struct Draft {
    pod: PodId,
    /// Whether the pod's own maps have to be made too.
    new_pod: bool,
    policy: PolicyId,
    /// The allow map of a policy that an earlier agent, or an earlier attempt, has made.
    adopted: Option<AllowMap>,
    /// The version in force, if the new one takes its allow map.
    allow_of: Option<PolicyId>,
}

impl Applier {
    /// Creates the maps that these actions need, all together: the kernel takes as long for one as for many. Returns
    /// each pod's new version.
    ///
    /// On failure, partially created maps are recorded: as left in the kernel with the pod, or as unused.
    pub(super) fn prepare(&mut self, actions: &[Action]) -> BTreeMap<Subject, Result<Version>> {
        let all: Vec<(&Subject, &Wanted)> = actions
            .iter()
            .filter_map(|action| match action {
                Action::Change { subject, wanted }
                | Action::Begin {
                    subject, wanted, ..
                } => Some((subject, &**wanted)),
                _ => None,
            })
            .collect();
        let drafts: Vec<Result<Draft>> = all
            .iter()
            .map(|(subject, wanted)| self.draft(subject, wanted))
            .collect();
        let needed: Vec<NewMaps<'_>> = all
            .iter()
            .zip(&drafts)
            .map(|((subject, wanted), draft)| match draft {
                Ok(draft) => draft.needs(subject, wanted),
                Err(_) => NewMaps::default(),
            })
            .collect();
        let new = all
            .iter()
            .filter(|(subject, _)| !self.enforced.contains_key(subject));
        let interfaces: Vec<IfIndex> = new
            .flat_map(|(_, wanted)| wanted.interfaces.iter().copied())
            .collect();
        let made = self.datapath.make(&needed, &interfaces);
        let mut versions = BTreeMap::new();
        for (((subject, _), draft), made) in all.into_iter().zip(drafts).zip(made) {
            let version = draft.and_then(|draft| self.finish(draft, made));
            versions.insert(subject.clone(), version);
        }
        versions
    }

    /// What the pod's new version needs.
    fn draft(&mut self, subject: &Subject, wanted: &Wanted) -> Result<Draft> {
        if let Some(enforced) = self.enforced.get(subject) {
            return Ok(Draft {
                pod: enforced.pod,
                new_pod: false,
                policy: self.ids.next_policy(),
                adopted: None,
                allow_of: wanted
                    .has_allow_map_of(&enforced.wanted)
                    .then_some(enforced.policy),
            });
        }
        let pod = self.find_or_add(subject, &wanted.uid);
        let new_pod = self.datapath.flow_map(pod)?.is_none();
        let (policy, adopted) = match self.adopt(pod, wanted)? {
            Some((policy, allow)) => (policy, Some(allow)),
            None => (self.ids.next_policy(), None),
        };
        if let Some(left) = self.left.get_mut(&pod) {
            // If something fails from here on, the next attempt knows the policy and the interface.
            let entry = wanted.entry(pod, policy);
            for &ifindex in &wanted.interfaces {
                let at = (ifindex, entry);
                left.interfaces.retain(|other| *other != at);
                left.interfaces.push(at);
            }
        }
        Ok(Draft {
            pod,
            new_pod,
            policy,
            adopted,
            allow_of: None,
        })
    }

    /// The id of a pod that is not enforced yet. Until it is, it is recorded as left in the kernel. The next attempt
    /// continues from there; if there is none, the pod is removed like everything else that is left.
    fn find_or_add(&mut self, subject: &Subject, uid: &str) -> PodId {
        let (namespace, name) = subject.fields();
        let left = self.left.iter().find(|(_, left)| {
            (&*left.namespace, &*left.name, &*left.uid) == (namespace, name, uid)
        });
        if let Some((&pod, _)) = left {
            return pod;
        }
        let pod = self.ids.next_pod();
        let left = Adoptable {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: uid.to_owned(),
            interfaces: Vec::new(),
        };
        self.left.insert(pod, left);
        pod
    }

    /// The policy that the pod was left under, if it is the wanted one.
    fn adopt(&self, pod: PodId, wanted: &Wanted) -> Result<Option<(PolicyId, AllowMap)>> {
        let left = self.left.get(&pod);
        for (_, entry) in left.map_or(&[][..], |left| &left.interfaces) {
            let adopted =
                self.datapath
                    .adopt_policy(entry.policy(), &wanted.record, wanted.cidrs())?;
            if let Some(allow) = adopted {
                return Ok(Some((entry.policy(), allow)));
            }
        }
        Ok(None)
    }

    fn finish(&mut self, draft: Draft, made: Result<Option<AllowMap>>) -> Result<Version> {
        let Draft {
            pod,
            policy,
            adopted,
            ..
        } = draft;
        let made = match made {
            Ok(made) => made,
            Err(error) => {
                if adopted.is_none() {
                    self.unused.push(Unused::Policy(policy));
                    self.remove_record_of(pod, policy);
                }
                return Err(error);
            }
        };
        let allow = adopted.or(made).context("no allow map was made")?;
        Ok(Version { pod, policy, allow })
    }

    /// Removes a policy that could not be made from the record of what is left. The last entry of an interface stays,
    /// so that the interface is detached from. Many failures record no more than one.
    fn remove_record_of(&mut self, pod: PodId, policy: PolicyId) {
        if let Some(left) = self.left.get_mut(&pod) {
            let interfaces = left.interfaces.clone();
            let stays = |ifindex: IfIndex| {
                let mut entries = interfaces.iter();
                entries.any(|&(other, entry)| other == ifindex && entry.policy() != policy)
            };
            left.interfaces
                .retain(|&(ifindex, entry)| entry.policy() != policy || !stays(ifindex));
        }
    }
}

impl Draft {
    fn needs<'a>(&self, subject: &'a Subject, wanted: &'a Wanted) -> NewMaps<'a> {
        let (namespace, name) = subject.fields();
        NewMaps {
            pod: self.new_pod.then_some(NewPod {
                id: self.pod,
                namespace,
                name,
                uid: &wanted.uid,
            }),
            policy: self.adopted.is_none().then(|| NewPolicy {
                id: self.policy,
                record: &wanted.record,
                cidrs: wanted.cidrs().collect(),
                allow_of: self.allow_of,
            }),
        }
    }
}
