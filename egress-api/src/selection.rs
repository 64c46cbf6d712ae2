//! The policy objects of each pod, kept up to date at a cost that fits the change.
//!
//! An edit of a pod's labels evaluates, for that pod, the selectors of the policies that require one of its labels, its
//! namespace or no label at all ([`index`]). An edit of a policy evaluates its selectors for all pods. Everything else
//! costs comparisons of pointers.

mod index;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use egress_policy::objects::{NamespacePolicy, ObjectName, Objects, TierPolicy};

use crate::{
    policy::{PolicySubject, SelectedPod},
    selector::Labels,
    tiers::only_takes_away,
};
use index::Index;

/// A policy in force: the pods that it is about, and its rules.
#[derive(Clone, Debug)]
pub struct Applied {
    /// The pods.
    pub subject: Arc<PolicySubject>,
    /// The rules.
    pub rules: Rules,
}

/// The rules of a policy in force.
#[derive(Clone, Debug)]
pub enum Rules {
    /// Of an `EgressPolicy`.
    Namespace(Arc<NamespacePolicy>),
    /// Of the other kinds.
    Tier(Arc<TierPolicy>),
}

impl Applied {
    /// Whether both have the same rules for the same pods, perhaps in different objects in memory.
    pub fn says_the_same(&self, other: &Self) -> bool {
        let has_same_rules = match (&self.rules, &other.rules) {
            (Rules::Namespace(a), Rules::Namespace(b)) => a == b,
            (Rules::Tier(a), Rules::Tier(b)) => a == b,
            _ => false,
        };
        has_same_rules && self.subject == other.subject
    }

    /// Whether both are the same objects in memory.
    fn is_same(&self, other: &Self) -> bool {
        let has_same_rules = match (&self.rules, &other.rules) {
            (Rules::Namespace(a), Rules::Namespace(b)) => Arc::ptr_eq(a, b),
            (Rules::Tier(a), Rules::Tier(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        has_same_rules && Arc::ptr_eq(&self.subject, &other.subject)
    }
}

/// The policies that select each pod. `K` names a pod.
#[derive(Debug)]
pub struct Selection<K> {
    policies: BTreeMap<Arc<ObjectName>, Applied>,
    index: Index,
    sets: Arc<BTreeMap<String, Vec<String>>>,
    pods: BTreeMap<K, Known>,
    /// Counts the updates of policies.
    revision: u64,
    /// See [`Self::of_unknown`], and the revision of that.
    of_unknown: (u64, Arc<Objects>),
    /// The policies that the last update changed.
    changed: Vec<Arc<ObjectName>>,
}

#[derive(Debug)]
struct Known {
    namespace: String,
    labels: Arc<Labels>,
    namespace_labels: Arc<Labels>,
    host_network: bool,
    selected: BTreeSet<Arc<ObjectName>>,
    objects: Objects,
    revision: u64,
}

impl<K> Default for Selection<K> {
    fn default() -> Self {
        Self {
            policies: BTreeMap::new(),
            index: Index::default(),
            sets: Arc::default(),
            pods: BTreeMap::new(),
            revision: 0,
            of_unknown: (0, Arc::default()),
            changed: Vec::new(),
        }
    }
}

impl<K: Ord> Selection<K> {
    /// Replaces the policies and sets. The next calls of [`Self::of`] must name every pod.
    pub fn update(
        &mut self,
        policies: BTreeMap<Arc<ObjectName>, Applied>,
        sets: &Arc<BTreeMap<String, Vec<String>>>,
    ) {
        let mut changed: Vec<Arc<ObjectName>> = Vec::new();
        for (name, policy) in &policies {
            let former = self.policies.get(name);
            if former.is_none_or(|former| !former.is_same(policy)) {
                changed.push(Arc::clone(name));
            }
        }
        let gone = self.policies.keys();
        changed.extend(gone.filter(|name| !policies.contains_key(*name)).cloned());
        if changed.is_empty() && self.sets == *sets {
            return;
        }
        for name in &changed {
            if let Some(former) = self.policies.get(name) {
                self.index.remove(name, &former.subject);
            }
            if let Some(policy) = policies.get(name) {
                self.index.add(name, &policy.subject);
            }
        }
        self.policies = policies;
        if self.sets != *sets {
            self.sets = Arc::clone(sets);
        }
        self.changed = changed;
        self.revision += 1;
    }

    /// The objects of a pod.
    pub fn of(
        &mut self,
        key: K,
        namespace: &str,
        labels: &Arc<Labels>,
        namespace_labels: &Arc<Labels>,
        host_network: bool,
    ) -> &Objects {
        let pod = SelectedPod {
            namespace,
            labels,
            namespace_labels,
            host_network,
        };
        let (policies, sets, revision) = (&self.policies, &self.sets, self.revision);
        let known = self.pods.entry(key).or_insert_with(|| Known {
            namespace: namespace.to_owned(),
            labels: Arc::clone(labels),
            namespace_labels: Arc::clone(namespace_labels),
            host_network,
            selected: BTreeSet::new(),
            objects: Objects::default(),
            // No revision has this number, so that every policy is looked at.
            revision: u64::MAX,
        });
        let is_same_pod = known.host_network == host_network
            && known.namespace == namespace
            && known.labels == *labels
            && known.namespace_labels == *namespace_labels;
        if is_same_pod && known.revision == revision {
            return &known.objects;
        }
        if is_same_pod && known.revision.wrapping_add(1) == revision && known.revision != u64::MAX {
            for name in &self.changed {
                let is_selected = policies
                    .get(name)
                    .is_some_and(|policy| policy.subject.selects(pod));
                if is_selected {
                    known.selected.insert(Arc::clone(name));
                } else {
                    known.selected.remove(name);
                }
            }
        } else {
            let is_selected = |name: &&Arc<ObjectName>| {
                let policy = policies.get(*name);
                policy.is_some_and(|policy| policy.subject.selects(pod))
            };
            let selected = self.index.candidates(pod).filter(is_selected);
            known.selected = selected.cloned().collect();
        }
        known.namespace.clear();
        known.namespace.push_str(namespace);
        known.labels = Arc::clone(labels);
        known.namespace_labels = Arc::clone(namespace_labels);
        known.host_network = host_network;
        known.revision = revision;
        known.objects = objects(&known.selected, policies, sets);
        &known.objects
    }

    /// The objects that count for a pod of which nothing is known: with all of their rules those that are about every
    /// pod, and of all other ordered rules what takes away.
    pub fn of_unknown(&mut self) -> &Arc<Objects> {
        let (revision, known) = &mut self.of_unknown;
        if *revision != self.revision {
            *revision = self.revision;
            let tiers = self.policies.values().filter_map(|policy| {
                let Rules::Tier(rules) = &policy.rules else {
                    return None;
                };
                if policy.subject.selects_every_pod() {
                    return Some(Arc::clone(rules));
                }
                only_takes_away(rules).map(Arc::new)
            });
            let objects = Objects {
                namespace: Vec::new(),
                tiers: tiers.collect(),
                sets: Arc::clone(&self.sets),
            };
            // The same object in memory, if nothing has changed.
            if **known != objects {
                *known = Arc::new(objects);
            }
        }
        known
    }

    /// Forgets pods that are gone.
    pub fn retain(&mut self, mut is_there: impl FnMut(&K) -> bool) {
        self.pods.retain(|key, _| is_there(key));
    }
}

fn objects(
    selected: &BTreeSet<Arc<ObjectName>>,
    policies: &BTreeMap<Arc<ObjectName>, Applied>,
    sets: &Arc<BTreeMap<String, Vec<String>>>,
) -> Objects {
    let mut objects = Objects {
        sets: Arc::clone(sets),
        ..Objects::default()
    };
    for policy in selected.iter().filter_map(|name| policies.get(name)) {
        match &policy.rules {
            Rules::Namespace(rules) => objects.namespace.push(Arc::clone(rules)),
            Rules::Tier(rules) => objects.tiers.push(Arc::clone(rules)),
        }
    }
    objects
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use egress_policy::objects::{ObjectKind, TierAction};
    use serde_json::{Value, json};

    use super::*;
    use crate::{Body, Policy};

    type Policies = BTreeMap<Arc<ObjectName>, Applied>;

    fn add(policies: &mut Policies, name: &str, selector: &Value) {
        let spec = json!({"podSelector": selector});
        let policy = Policy::read(ObjectKind::EgressPolicy, Some("shop"), name, &spec);
        let Body::Namespace(rules) = policy.body else {
            panic!("not an EgressPolicy");
        };
        let applied = Applied {
            subject: policy.subject,
            rules: Rules::Namespace(rules),
        };
        policies.insert(policy.name, applied);
    }

    fn labelled(app: &str) -> Arc<Labels> {
        Arc::new(Labels::from([("app".to_owned(), app.to_owned())]))
    }

    fn selecting(app: &str) -> Value {
        json!({"matchLabels": {"app": app}})
    }

    /// The names of the policies that select each of two pods, `web` and `db`.
    fn selected(selection: &mut Selection<&'static str>, web: &Arc<Labels>) -> [Vec<String>; 2] {
        let namespace = Arc::default();
        [("web", web.clone()), ("db", labelled("db"))].map(|(pod, labels)| {
            let objects = selection.of(pod, "shop", &labels, &namespace, false);
            let policies = objects.namespace.iter();
            policies.map(|policy| policy.name.name.clone()).collect()
        })
    }

    #[test]
    fn pods_follow_edits_of_policies_and_labels() {
        let sets = Arc::default();
        let mut selection = Selection::default();
        let mut policies = Policies::new();
        let mut web = labelled("web");
        assert_eq!(
            selected(&mut selection, &web),
            [vec![], Vec::<String>::new()]
        );
        add(&mut policies, "all", &json!({}));
        add(&mut policies, "web", &selecting("web"));
        selection.update(policies.clone(), &sets);
        assert_eq!(
            selected(&mut selection, &web),
            [vec!["all", "web"], vec!["all"]]
        );
        web = labelled("db");
        assert_eq!(selected(&mut selection, &web), [vec!["all"], vec!["all"]]);
        add(&mut policies, "web", &selecting("db"));
        selection.update(policies.clone(), &sets);
        assert_eq!(
            selected(&mut selection, &web),
            [vec!["all", "web"], vec!["all", "web"]]
        );
        policies.retain(|name, _| name.name == "web");
        selection.update(policies.clone(), &sets);
        assert_eq!(selected(&mut selection, &web), [vec!["web"], vec!["web"]]);
        // A pod that misses updates is selected anew.
        selection.update(Policies::new(), &sets);
        selection.update(policies, &sets);
        assert_eq!(selected(&mut selection, &web), [vec!["web"], vec!["web"]]);
    }

    #[test]
    fn a_pod_that_comes_again_is_a_new_pod() {
        let mut selection = Selection::default();
        let mut policies = Policies::new();
        add(&mut policies, "web", &selecting("web"));
        selection.update(policies, &Arc::default());
        let web = labelled("web");
        assert_eq!(selected(&mut selection, &web), [vec!["web"], vec![]]);
        selection.retain(|_| false);
        assert!(selection.pods.is_empty());
        assert_eq!(selected(&mut selection, &web), [vec!["web"], vec![]]);
    }

    #[test]
    fn pods_share_sets_and_get_their_changes() {
        let mut selection = Selection::<&str>::default();
        let sets = Arc::new(BTreeMap::from([(
            "web".to_owned(),
            vec!["a.test".to_owned()],
        )]));
        selection.update(Policies::new(), &sets);
        let (labels, namespace) = (labelled("web"), Arc::default());
        let first = selection
            .of("a", "shop", &labels, &namespace, false)
            .clone();
        let second = selection
            .of("b", "shop", &labels, &namespace, false)
            .clone();
        assert!(Arc::ptr_eq(&first.sets, &second.sets));
        assert_eq!(first.sets, sets);
        selection.update(Policies::new(), &Arc::default());
        let none = selection.of("a", "shop", &labels, &namespace, false);
        assert!(none.sets.is_empty());
    }

    #[test]
    fn a_label_edit_looks_at_no_policy_that_requires_another_label() {
        let mut selection = Selection::<&str>::default();
        let mut policies = Policies::new();
        add(&mut policies, "all", &json!({}));
        for number in 0..1000 {
            let app = format!("a{number}");
            add(&mut policies, &format!("p{number}"), &selecting(&app));
        }
        selection.update(policies, &Arc::default());
        let pod = SelectedPod {
            namespace: "shop",
            labels: &labelled("a7"),
            namespace_labels: &Labels::new(),
            host_network: false,
        };
        let names = selection.index.candidates(pod);
        let names: Vec<&str> = names.map(|name| name.name.as_str()).collect();
        assert_eq!(names, ["p7", "all"]);
    }

    #[test]
    fn for_a_pod_that_is_not_known_only_rules_about_every_pod_allow() {
        let mut selection = Selection::<&str>::default();
        assert_eq!(**selection.of_unknown(), Objects::default());
        let mut policies = Policies::new();
        add(&mut policies, "team", &json!({}));
        let rules = json!([
            {"action": "Allow", "entries": ["10.0.0.1"]},
            {"action": "Pass", "entries": ["10.0.0.2"]},
            {"action": "Deny", "entries": ["10.0.0.3"]},
        ]);
        let mut add_rules = |name: &str, selector: Option<&str>, rules: &Value| {
            let mut spec = json!({"tier": "Admin", "priority": 1, "rules": rules});
            if let Some(selector) = selector {
                spec[selector] = selecting("web");
            }
            let policy = Policy::read(ObjectKind::ClusterEgressPolicy, None, name, &spec);
            let Body::Tier(tier) = policy.body else {
                panic!("not a ClusterEgressPolicy");
            };
            let applied = Applied {
                subject: policy.subject,
                rules: Rules::Tier(tier),
            };
            policies.insert(policy.name, applied);
        };
        add_rules("every", None, &rules);
        add_rules("namespaces", Some("namespaceSelector"), &rules);
        add_rules("open", Some("podSelector"), &json!([rules[0]]));
        add_rules("pods", Some("podSelector"), &rules);
        selection.update(policies.clone(), &Arc::default());
        let actions = |objects: &Objects| -> Vec<(String, Vec<TierAction>)> {
            assert!(objects.namespace.is_empty());
            let tiers = objects.tiers.iter();
            tiers
                .map(|policy| {
                    let actions = policy.rules.iter().map(|rule| rule.action);
                    (policy.name.name.clone(), actions.collect())
                })
                .collect()
        };
        let first = Arc::clone(selection.of_unknown());
        let [allow, pass, deny] = [TierAction::Allow, TierAction::Pass, TierAction::Deny];
        assert_eq!(
            actions(&first),
            [
                ("every".to_owned(), vec![allow, pass, deny]),
                ("namespaces".to_owned(), vec![deny, deny]),
                ("pods".to_owned(), vec![deny, deny]),
            ]
        );
        // Other changes leave the same object in memory.
        add(&mut policies, "another", &json!({}));
        selection.update(policies, &Arc::default());
        assert!(Arc::ptr_eq(&first, selection.of_unknown()));
    }

    #[test]
    fn a_label_edit_looks_at_no_other_pod() {
        let mut selection = Selection::<usize>::default();
        let mut policies = Policies::new();
        for number in 0..1000 {
            add(
                &mut policies,
                &format!("p{number}"),
                &selecting(&format!("a{number}")),
            );
        }
        selection.update(policies, &Arc::default());
        let namespace = Arc::default();
        let labels: Vec<_> = (0..250).map(|pod| labelled(&format!("a{pod}"))).collect();
        for (pod, labels) in labels.iter().enumerate() {
            let objects = selection.of(pod, "shop", labels, &namespace, false);
            assert_eq!(objects.namespace.len(), 1);
        }
        let before: Vec<_> = labels
            .iter()
            .enumerate()
            .map(|(pod, labels)| {
                let objects = selection.of(pod, "shop", labels, &namespace, false);
                objects.namespace.as_ptr()
            })
            .collect();
        selection.of(0, "shop", &labelled("a999"), &namespace, false);
        for (pod, labels) in labels.iter().enumerate().skip(1) {
            let objects = selection.of(pod, "shop", labels, &namespace, false);
            assert_eq!(objects.namespace.as_ptr(), before[pod], "computed again");
        }
    }
}
