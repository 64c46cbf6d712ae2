//! The policy objects of pods, as `cluster.json` stores them: each object once, however many pods it selects, and
//! only the sets that entries use.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use egress_policy::objects::{NamespacePolicy, Objects, TierPolicy};
use serde::{Deserialize, Serialize};

use crate::{
    control::digest,
    pods::{Pod, PolicyKind},
};

/// The objects of several pods.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct SavedObjects {
    namespace: Vec<Arc<NamespacePolicy>>,
    tiers: Vec<Arc<TierPolicy>>,
    sets: Arc<BTreeMap<String, Vec<String>>>,
    /// For each pod, in the order of the file's pods, the indexes of its objects in the lists above.
    selected: Vec<Selected>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Selected {
    namespace: Vec<usize>,
    tiers: Vec<usize>,
}

impl SavedObjects {
    /// Collects the objects of pods.
    pub(super) fn of<'a>(pods: impl Iterator<Item = &'a Pod>) -> Self {
        let mut saved = Self::default();
        let (mut namespace, mut tiers, mut sets) =
            <(BTreeMap<_, _>, BTreeMap<_, _>, BTreeMap<_, _>)>::default();
        for pod in pods {
            let objects = &pod.objects;
            sets.extend(digest::used_sets_of(pod));
            let selected = Selected {
                namespace: indexes(&objects.namespace, &mut namespace, &mut saved.namespace),
                tiers: indexes(&objects.tiers, &mut tiers, &mut saved.tiers),
            };
            saved.selected.push(selected);
        }
        let sets = sets.into_iter();
        let sets = sets.map(|(name, destinations)| (name.clone(), destinations.clone()));
        saved.sets = Arc::new(sets.collect());
        saved
    }

    /// The kinds of these objects.
    pub(super) fn kinds(&self) -> BTreeSet<PolicyKind> {
        let namespace = self.namespace.iter().map(|policy| policy.name.kind);
        let tiers = self.tiers.iter().map(|policy| policy.name.kind);
        let sets = (!self.sets.is_empty()).then_some(PolicyKind::Set);
        let policies = namespace.chain(tiers).map(PolicyKind::Policy);
        policies.chain(sets).collect()
    }

    /// The objects of the pod with this index, or `None` if the file contradicts itself.
    pub(super) fn of_pod(&self, index: usize) -> Option<Objects> {
        let nothing = Selected::default();
        // An agent that knew no objects saved none.
        let selected = self.selected.get(index).unwrap_or(&nothing);
        Some(Objects {
            namespace: pick(&self.namespace, &selected.namespace)?,
            tiers: pick(&self.tiers, &selected.tiers)?,
            sets: Arc::clone(&self.sets),
        })
    }
}

/// The indexes of objects in `all`, after those that are not there have been added. `known` has the index of each
/// object by its address: pods share objects.
fn indexes<T>(
    of: &[Arc<T>],
    known: &mut BTreeMap<*const T, usize>,
    all: &mut Vec<Arc<T>>,
) -> Vec<usize> {
    let index = |object: &Arc<T>| {
        *known.entry(Arc::as_ptr(object)).or_insert_with(|| {
            all.push(Arc::clone(object));
            all.len() - 1
        })
    };
    of.iter().map(index).collect()
}

fn pick<T>(all: &[Arc<T>], indexes: &[usize]) -> Option<Vec<Arc<T>>> {
    let picked = indexes.iter().map(|index| all.get(*index).cloned());
    picked.collect()
}

#[cfg(test)]
mod tests {
    use egress_policy::objects::{ObjectKind, ObjectName};

    use super::*;
    use crate::control::plan::scene::pod;

    fn policy(name: &str) -> Arc<NamespacePolicy> {
        Arc::new(NamespacePolicy {
            name: Arc::new(ObjectName {
                kind: ObjectKind::EgressPolicy,
                namespace: Some("shop".into()),
                name: name.into(),
            }),
            mode: None,
            allow: Some(vec!["a.test".into()]),
            deny: None,
            resolve: None,
        })
    }

    #[test]
    fn each_object_is_saved_once_and_every_pod_gets_its_own_back() {
        let set = |name: &str| (name.to_owned(), vec!["b.test".to_owned()]);
        let used = Arc::new(BTreeMap::from([set("web")]));
        let sets = Arc::new(BTreeMap::from([set("web"), set("unused")]));
        let (a, b) = (policy("a"), policy("b"));
        let of = |namespace: &[&Arc<NamespacePolicy>]| Objects {
            namespace: namespace.iter().map(|one| Arc::clone(one)).collect(),
            tiers: Vec::new(),
            sets: Arc::clone(&sets),
        };
        let all = [of(&[&a]), of(&[]), of(&[&b, &a])];
        let mut pods = all.clone().map(|objects| {
            let mut pod = pod("cart");
            pod.objects = objects;
            pod
        });
        let allow = "egress-agent.dev/allow".to_owned();
        pods[1].annotations.insert(allow, "a.test @web:443".into());
        let saved = SavedObjects::of(pods.iter());
        assert_eq!(saved.namespace.len(), 2);
        let text = serde_json::to_string(&saved).expect("JSON");
        let read: SavedObjects = serde_json::from_str(&text).expect("the same");
        for (index, mut objects) in all.into_iter().enumerate() {
            objects.sets = Arc::clone(&used);
            assert_eq!(read.of_pod(index), Some(objects), "{index}");
        }
        let kinds = [
            PolicyKind::Policy(ObjectKind::EgressPolicy),
            PolicyKind::Set,
        ];
        assert_eq!(read.kinds(), kinds.into());
    }

    #[test]
    fn a_pod_whose_objects_are_not_known_does_not_hide_the_sets_of_others() {
        let sets = Arc::new(BTreeMap::from([("web".to_owned(), vec!["b.test".into()])]));
        let mut known = pod("cart");
        known.objects.sets = Arc::clone(&sets);
        let allow = "egress-agent.dev/allow".to_owned();
        known.annotations.insert(allow, "@web:443".into());
        let saved = SavedObjects::of([known, pod("till")].iter());
        assert_eq!(saved.of_pod(0).expect("the first pod").sets, sets);
    }

    #[test]
    fn an_index_of_no_object_is_an_error() {
        let text =
            r#"{"namespace":[],"tiers":[],"sets":{},"selected":[{"namespace":[0],"tiers":[]}]}"#;
        let read: SavedObjects = serde_json::from_str(text).expect("an object");
        assert_eq!(read.of_pod(0), None);
    }
}
