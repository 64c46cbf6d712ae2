//! Which generations count as in force, without a kernel.

use std::collections::BTreeMap;

use egress_policy::objects::{NamespacePolicy, ObjectKind, Tier, TierPolicy};

use super::*;
use crate::{config::Config, pods::PolicyFacts};

fn name(of: &str) -> Arc<ObjectName> {
    Arc::new(ObjectName {
        kind: ObjectKind::EgressPolicy,
        namespace: Some("shop".to_owned()),
        name: of.to_owned(),
    })
}

fn version(generation: i64) -> Arc<ObjectVersion> {
    Arc::new(ObjectVersion {
        uid: Some("u".to_owned()),
        generation: Some(generation),
    })
}

/// Policies with the generations that were read last and that are used.
fn policies(all: &[(&str, i64, i64)]) -> Arc<PolicyObjects> {
    let facts = all.iter().map(|&(of, read, used)| {
        let facts = PolicyFacts {
            read: version(read),
            used: version(used),
        };
        (name(of), facts)
    });
    Arc::new(facts.collect())
}

fn objects(selecting: &[&str]) -> Objects {
    let policies = selecting.iter().map(|of| {
        Arc::new(NamespacePolicy {
            name: name(of),
            mode: None,
            allow: None,
            deny: None,
            resolve: None,
        })
    });
    Objects {
        namespace: policies.collect(),
        ..Objects::default()
    }
}

/// A policy that differs from those with other numbers.
fn compiled(number: u8) -> Arc<Compiled> {
    let config =
        Config::from_yaml("dns: {resolvers: [10.0.0.53]}\nnode: n1\n").expect("a configuration");
    let mut compiled = egress_policy::unidentified(
        &egress_policy::Objects::default(),
        &config.policy_settings(),
    );
    compiled.record.annotations = [number; 32];
    Arc::new(compiled)
}

struct Pod {
    objects: Objects,
    policy: Arc<Compiled>,
    in_kernel: Option<Arc<Compiled>>,
    present: Present,
    is_whole: bool,
}

impl Pod {
    /// A pod under the policy that it should be under.
    fn enforced(selecting: &[&str], number: u8) -> Self {
        let policy = compiled(number);
        Self {
            objects: objects(selecting),
            in_kernel: Some(Arc::clone(&policy)),
            policy,
            present: Present::WHOLE,
            is_whole: true,
        }
    }
}

fn note(applied: &mut AppliedPolicies, policies: &Arc<PolicyObjects>, pods: &[(&str, &Pod)]) {
    let subjects: Vec<Subject> = pods
        .iter()
        .map(|(of, _)| Subject::pod("shop", of))
        .collect();
    let in_force = pods.iter().map(|(_, pod)| PodInForce {
        uid: "pod",
        objects: &pod.objects,
        policy: &pod.policy,
        present: pod.present,
        in_kernel: pod.in_kernel.as_ref(),
        is_whole: pod.is_whole,
        is_wanted: true,
    });
    let pods: BTreeMap<_, _> = subjects.iter().zip(in_force).collect();
    applied.note(policies, &pods);
}

/// Generation, applied generation, pods selected and enforced of the only policy.
fn only(applied: &AppliedPolicies) -> (Option<i64>, Option<i64>, u32, u32) {
    let [state] = applied.states() else {
        panic!("not one policy");
    };
    (
        state.generation,
        state.applied,
        state.selected,
        state.enforced,
    )
}

#[test]
fn a_generation_counts_once_the_kernel_has_the_policy_that_is_made_from_it() {
    let mut applied = AppliedPolicies::default();
    let mut pod = Pod::enforced(&["web"], 1);
    pod.in_kernel = None;
    note(&mut applied, &policies(&[("web", 1, 1)]), &[("a", &pod)]);
    assert_eq!(only(&applied), (Some(1), None, 1, 0));
    pod.in_kernel = Some(compiled(1));
    note(&mut applied, &policies(&[("web", 1, 1)]), &[("a", &pod)]);
    assert_eq!(only(&applied), (Some(1), Some(1), 1, 1));

    // An edit that the kernel refuses.
    pod.policy = compiled(2);
    let edited = policies(&[("web", 2, 2)]);
    note(&mut applied, &edited, &[("a", &pod)]);
    assert_eq!(only(&applied), (Some(2), Some(1), 1, 0));
    pod.in_kernel = Some(compiled(2));
    note(&mut applied, &edited, &[("a", &pod)]);
    assert_eq!(only(&applied), (Some(2), Some(2), 1, 1));
}

#[test]
fn an_edit_that_changes_no_rule_counts_at_once() {
    let mut applied = AppliedPolicies::default();
    let pod = Pod::enforced(&["web"], 1);
    note(&mut applied, &policies(&[("web", 1, 1)]), &[("a", &pod)]);
    note(&mut applied, &policies(&[("web", 2, 2)]), &[("a", &pod)]);
    assert_eq!(only(&applied), (Some(2), Some(2), 1, 1));
}

#[test]
fn an_object_that_cannot_be_read_is_in_force_with_its_last_readable_generation() {
    let mut applied = AppliedPolicies::default();
    let pod = Pod::enforced(&["web"], 1);
    note(&mut applied, &policies(&[("web", 7, 6)]), &[("a", &pod)]);
    assert_eq!(only(&applied), (Some(7), Some(6), 1, 0));
}

#[test]
fn a_pod_whose_policies_do_not_compile_keeps_the_generations_that_it_had() {
    let mut applied = AppliedPolicies::default();
    let mut pod = Pod::enforced(&["web"], 1);
    note(&mut applied, &policies(&[("web", 1, 1)]), &[("a", &pod)]);
    pod.present = Present::default();
    note(&mut applied, &policies(&[("web", 2, 2)]), &[("a", &pod)]);
    assert_eq!(only(&applied), (Some(2), Some(1), 1, 0));
}

/// An object with ordered rules.
fn guardrail() -> Arc<TierPolicy> {
    Arc::new(TierPolicy {
        name: Arc::new(ObjectName {
            kind: ObjectKind::ClusterEgressPolicy,
            namespace: None,
            name: "guardrail".to_owned(),
        }),
        tier: Tier::Admin,
        priority: 1,
        rules: Vec::new(),
    })
}

#[test]
fn ordered_rules_count_while_the_lists_of_the_namespace_cannot_be_read() {
    let all = |web: i64, guardrail_generation: Option<i64>| {
        let mut all = PolicyObjects::clone(&policies(&[("web", web, web)]));
        if let Some(generation) = guardrail_generation {
            let facts = PolicyFacts {
                read: version(generation),
                used: version(generation),
            };
            all.insert(Arc::clone(&guardrail().name), facts);
        }
        Arc::new(all)
    };
    let states = |applied: &AppliedPolicies| -> Vec<_> {
        let states = applied.states().iter();
        states
            .map(|state| (state.name.name.clone(), state.applied, state.enforced))
            .collect()
    };
    let mut applied = AppliedPolicies::default();
    let mut pod = Pod::enforced(&["web"], 1);
    note(&mut applied, &all(1, None), &[("a", &pod)]);

    // The new rules are in the kernel, with the lists that could be read last.
    pod.present = Present {
        own: true,
        shared: false,
        tiers: true,
    };
    pod.objects.tiers = vec![guardrail()];
    pod.policy = compiled(2);
    pod.in_kernel = Some(compiled(2));
    note(&mut applied, &all(2, Some(1)), &[("a", &pod)]);
    let expected = [("web", Some(1), 0), ("guardrail", Some(1), 1)];
    let mut expected = expected.map(|(name, at, pods)| (name.to_owned(), at, pods));
    expected.sort();
    let mut found = states(&applied);
    found.sort();
    assert_eq!(found, expected);

    // The rules go: only the lists are left in force.
    pod.objects.tiers.clear();
    pod.policy = compiled(1);
    pod.in_kernel = Some(compiled(1));
    note(&mut applied, &all(2, Some(1)), &[("a", &pod)]);
    let mut found = states(&applied);
    found.sort();
    assert_eq!(
        found,
        [
            ("guardrail".to_owned(), None, 0),
            ("web".to_owned(), Some(1), 0)
        ]
    );
}

#[test]
fn a_policy_that_no_longer_selects_a_pod_is_in_force_until_the_kernel_has_the_next_one() {
    let mut applied = AppliedPolicies::default();
    let mut pod = Pod::enforced(&["web"], 1);
    note(&mut applied, &policies(&[("web", 1, 1)]), &[("a", &pod)]);
    let edited = policies(&[("web", 2, 2)]);
    pod.objects = objects(&[]);
    pod.policy = compiled(2);
    note(&mut applied, &edited, &[("a", &pod)]);
    assert_eq!(only(&applied), (Some(2), Some(1), 0, 0));
    pod.in_kernel = Some(compiled(2));
    note(&mut applied, &edited, &[("a", &pod)]);
    assert_eq!(only(&applied), (Some(2), None, 0, 0));
}

#[test]
fn pods_that_are_not_judged_in_full_are_counted_and_not_as_enforced() {
    let mut applied = AppliedPolicies::default();
    let whole = Pod::enforced(&["web"], 1);
    let mut bypassed = Pod::enforced(&["web"], 1);
    bypassed.is_whole = false;
    let mut waiting = Pod::enforced(&["web"], 1);
    waiting.in_kernel = None;
    let pods = [("a", &whole), ("b", &bypassed), ("c", &waiting)];
    note(&mut applied, &policies(&[("web", 1, 1)]), &pods);
    assert_eq!(only(&applied), (Some(1), Some(1), 3, 1));
    let counts = applied.pods();
    assert_eq!(
        (counts.selected, counts.enforced, counts.audited),
        (3, 1, 0)
    );
}
