//! Reads manifests for `check`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use egress_api::Rules;
use egress_policy::objects::{ObjectName, Objects};

use super::{
    Problem, Snapshot,
    contents::Contents,
    documents::documents,
    manifest::Manifests,
    object::Object,
    policies::applied,
    snapshot::{NoCluster, assemble},
};

/// Most YAML documents that are read.
const DOCUMENTS: usize = 50_000;

/// The objects in manifests, and the rules that only a cluster can evaluate.
#[derive(Debug, Default)]
pub struct Checked {
    /// The pods. A workload stands for the pods of its template, under the name `<kind>/<name>`.
    pub snapshot: Snapshot,
    /// The places of the namespaces, by their names.
    pub namespaces: BTreeMap<String, String>,
    /// The places of the policies.
    pub policies: BTreeMap<ObjectName, String>,
    /// Each policy, as a pod has it that only this one selects.
    pub alone: Vec<(ObjectName, Objects)>,
    /// The destinations of each set, by its name, with its place.
    pub sets: BTreeMap<String, (String, Vec<String>)>,
    /// Rules that only a cluster can evaluate, so that here they match nothing or everything.
    pub of_cluster: Vec<Problem>,
    /// How many documents of each other kind there are.
    pub ignored: BTreeMap<String, usize>,
}

/// Reads the names of files with their texts.
pub fn read_for_check<'a>(texts: impl IntoIterator<Item = (&'a str, &'a str)>) -> Checked {
    let mut checked = Checked::default();
    let mut contents = Vec::new();
    let mut left = DOCUMENTS;
    let mut too_many = None;
    for (name, text) in texts {
        let Some(after) = left.checked_sub(documents(text).len()) else {
            too_many = Some(Problem {
                origin: name.to_owned(),
                message: format!(
                    "not read, like everything after it: there are more than {DOCUMENTS} YAML documents; check fewer \
                     files at a time"
                ),
            });
            break;
        };
        left = after;
        let manifests = Manifests::read_for_check(name, text);
        for kind in &manifests.ignored {
            *checked.ignored.entry(kind.clone()).or_default() += 1;
        }
        contents.push(Contents::of(manifests));
    }
    for object in contents.iter().flat_map(|of| &of.objects) {
        match object {
            Object::Namespace(namespace) => {
                let known = checked.namespaces.entry(namespace.name.clone());
                known.or_insert_with(|| namespace.origin.clone());
            }
            Object::Policy(policy) => {
                let (name, applied, problems) = applied(&policy.policy, &NoCluster);
                let mut alone = Objects::default();
                match applied.rules {
                    Rules::Namespace(rules) => alone.namespace.push(rules),
                    Rules::Tier(rules) => alone.tiers.push(rules),
                }
                checked.alone.push(((*name).clone(), alone));
                let known = checked.policies.entry((*name).clone());
                known.or_insert_with(|| policy.origin.clone());
                checked
                    .of_cluster
                    .extend(problems.into_iter().map(|message| Problem {
                        origin: policy.origin.clone(),
                        message: format!("{name}: {message}"),
                    }));
            }
            Object::Set(set) => {
                let Ok(destinations) = &set.set.destinations else {
                    continue;
                };
                let known = checked.sets.entry(set.set.name.clone());
                known.or_insert_with(|| (set.origin.clone(), destinations.clone()));
            }
            Object::Pod(_) => {}
        }
    }
    let sets = checked.sets.iter();
    let sets = sets.map(|(name, (_, destinations))| (name.clone(), destinations.clone()));
    let sets = Arc::new(sets.collect());
    for (_, alone) in &mut checked.alone {
        alone.sets = Arc::clone(&sets);
    }
    checked.snapshot = assemble(contents.iter());
    checked.snapshot.problems.extend(too_many);
    let of_cluster: BTreeSet<_> = checked
        .of_cluster
        .iter()
        .map(|problem| (&problem.origin, &problem.message))
        .collect();
    checked
        .snapshot
        .problems
        .retain(|problem| !of_cluster.contains(&(&problem.origin, &problem.message)));
    checked
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER_NETWORK_POLICY: &str = "\
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: nodes}
spec:
  tier: Admin
  priority: 1
  subject: {namespaces: {}}
  egress: [{action: Deny, to: [{nodes: {}}]}]
";

    #[test]
    fn what_only_a_cluster_knows_is_no_mistake() {
        let checked = read_for_check([("p.yaml", CLUSTER_NETWORK_POLICY)]);
        assert_eq!(checked.snapshot.problems, []);
        let [note] = &checked.of_cluster[..] else {
            panic!("{checked:?}");
        };
        assert_eq!(note.origin, "p.yaml:1");
        assert!(note.message.contains("nodes"), "{note}");
    }

    #[test]
    fn other_kinds_and_pods_without_an_interface_are_no_mistakes() {
        let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n";
        let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\n";
        let all = [("s.yaml", service), ("t.yaml", service), ("p.yaml", pod)];
        let checked = read_for_check(all);
        assert_eq!(checked.snapshot.problems, []);
        assert_eq!(checked.ignored["Service"], 2);
        assert_eq!(checked.snapshot.pods.len(), 1);
    }

    #[test]
    fn the_number_of_documents_is_bounded() {
        let many = "a: 1\n---\n".repeat(DOCUMENTS + 1);
        let checked = read_for_check([("many.yaml", &*many)]);
        let problem = checked.snapshot.problems[0].to_string();
        assert!(problem.starts_with("many.yaml: not read"), "{problem}");
    }
}
