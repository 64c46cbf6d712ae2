use egress_policy::objects::{NamespacePolicy, ObjectKind, ObjectName, Tier, TierPolicy};

use super::*;
use crate::control::plan::scene::pod;

const NAMESPACED: PolicyKind = PolicyKind::Policy(ObjectKind::EgressPolicy);
const ORDERED: PolicyKind = PolicyKind::Policy(ObjectKind::ClusterEgressPolicy);
const UPSTREAM: PolicyKind = PolicyKind::Policy(ObjectKind::ClusterNetworkPolicy);

fn name(kind: ObjectKind, name: &str) -> Arc<ObjectName> {
    let namespace = (kind == ObjectKind::EgressPolicy).then(|| "shop".to_owned());
    Arc::new(ObjectName {
        kind,
        namespace,
        name: name.to_owned(),
    })
}

fn ordered(kind: ObjectKind) -> Arc<TierPolicy> {
    Arc::new(TierPolicy {
        name: name(kind, "guard"),
        tier: Tier::Admin,
        priority: 1,
        rules: Vec::new(),
    })
}

/// Objects of every kind.
fn all() -> Objects {
    let policy = NamespacePolicy {
        name: name(ObjectKind::EgressPolicy, "guard"),
        mode: None,
        allow: Some(Vec::new()),
        deny: None,
        resolve: None,
    };
    let kinds = [
        ObjectKind::ClusterEgressPolicy,
        ObjectKind::ClusterNetworkPolicy,
    ];
    Objects {
        namespace: vec![Arc::new(policy)],
        tiers: kinds.map(ordered).to_vec(),
        sets: Arc::new([("web".to_owned(), vec!["a.test".to_owned()])].into()),
    }
}

/// The same without those of these kinds.
fn without(kinds: &[PolicyKind]) -> Objects {
    let mut objects = all();
    let is_kept = |kind| !kinds.contains(&PolicyKind::Policy(kind));
    objects.namespace.retain(|policy| is_kept(policy.name.kind));
    objects.tiers.retain(|policy| is_kept(policy.name.kind));
    if kinds.contains(&PolicyKind::Set) {
        objects.sets = Arc::default();
    }
    objects
}

fn having(objects: Objects) -> Pod {
    Pod {
        objects,
        ..pod("cart")
    }
}

/// The pod as an earlier agent left it, under this policy.
fn left(policy: [u8; 32]) -> LeftPod {
    let pod = pod("cart");
    LeftPod {
        name: pod.key(),
        uid: pod.uid,
        digests: vec![policy],
        is_judged: true,
    }
}

/// What the source says of the pod.
fn snapshot(pod: &Pod, unlisted: &[PolicyKind]) -> Arc<Snapshot> {
    let mut snapshot = Snapshot::default();
    snapshot.pods.insert(pod.key(), pod.clone());
    snapshot.kinds.unlisted = unlisted.iter().copied().collect();
    Arc::new(snapshot)
}

/// The pod after the snapshot was completed.
fn completed(withheld: &mut Withheld, pod: &Pod, unlisted: &[PolicyKind]) -> Pod {
    let snapshot = withheld.complete(snapshot(pod, unlisted));
    snapshot.pods[&pod.key()].clone()
}

#[test]
fn a_pod_gets_the_saved_objects_of_each_kind_that_is_not_listed() {
    let saved = having(all());
    for unlisted in [
        &[NAMESPACED][..],
        &[ORDERED],
        &[UPSTREAM],
        &[PolicyKind::Set],
        &PolicyKind::ALL,
    ] {
        let left = vec![left(digest::of_pod(&saved))];
        let kinds = Some(PolicyKind::ALL.into());
        let mut withheld = Withheld::new(kinds, left, [&saved].into_iter());
        let now = having(without(unlisted));
        let completed = completed(&mut withheld, &now, unlisted);
        assert_eq!(completed, saved, "{unlisted:?}");
        assert_eq!(digest::of_pod(&completed), digest::of_pod(&saved));
    }
}

#[test]
fn a_kind_counts_as_the_source_says_once_it_is_listed() {
    let saved = having(all());
    let kinds = Some([ORDERED, UPSTREAM].into());
    let mut withheld = Withheld::new(kinds, Vec::new(), [&saved].into_iter());
    let now = having(without(&[ORDERED, UPSTREAM]));
    assert_eq!(
        completed(&mut withheld, &now, &[ORDERED]),
        having(without(&[UPSTREAM]))
    );
    assert_eq!(completed(&mut withheld, &now, &[]), now);
    // That its definition comes back later is no reason to wait.
    assert_eq!(completed(&mut withheld, &now, &[ORDERED]), now);
}

#[test]
fn a_kind_that_no_agent_has_listed_is_not_waited_for() {
    let now = pod("cart");
    let mut withheld = Withheld::new(Some([UPSTREAM].into()), Vec::new(), [].into_iter());
    let result = withheld.complete(snapshot(&now, &[ORDERED]));
    assert_eq!(result.pods[&now.key()], now);
    assert!(result.problems.is_empty() && result.kinds.withheld.is_empty());
}

#[test]
fn a_pod_of_which_nothing_is_saved_is_not_known() {
    let now = pod("cart");
    let mut another = having(all());
    another.uid = "another".into();
    let mut withheld = Withheld::new(Some([ORDERED].into()), Vec::new(), [&another].into_iter());
    let result = withheld.complete(snapshot(&now, &[ORDERED]));
    assert_eq!(result.pods[&now.key()].objects_of, ObjectsOf::Unknown);
    assert_eq!(result.problems.len(), 1);
    assert_eq!(result.kinds.withheld, [ORDERED].into());
}

#[test]
fn a_pod_that_is_enforced_with_unknown_objects_stays_as_it_is() {
    let now = pod("cart");
    let unknown = left(digest::of_pod(&having(all())));
    let mut withheld = Withheld::new(Some([ORDERED].into()), vec![unknown], [].into_iter());
    assert_eq!(
        completed(&mut withheld, &now, &[ORDERED]).objects_of,
        ObjectsOf::UnknownButEnforced
    );
    // Where only sources are judged, closing it is better.
    let mut unjudged = left(digest::of_pod(&having(all())));
    unjudged.is_judged = false;
    let mut withheld = Withheld::new(Some([ORDERED].into()), vec![unjudged], [].into_iter());
    assert_eq!(
        completed(&mut withheld, &now, &[ORDERED]).objects_of,
        ObjectsOf::Unknown
    );
}

#[test]
fn a_pod_that_is_enforced_without_objects_has_none() {
    let now = pod("cart");
    let mut withheld = Withheld::new(
        Some([ORDERED].into()),
        vec![left(digest::of_pod(&now))],
        [].into_iter(),
    );
    assert_eq!(completed(&mut withheld, &now, &[ORDERED]), now);
    // Its annotations may change.
    let mut edited = now;
    let key = "egress-agent.dev/allow".to_owned();
    edited.annotations.insert(key, "b.test".to_owned());
    assert_eq!(completed(&mut withheld, &edited, &[ORDERED]), edited);
}

#[test]
fn without_saved_state_the_kernel_tells_whether_there_were_objects() {
    let now = pod("cart");
    for (policy, is_known) in [
        (digest::of_pod(&now), true),
        // Nothing of it could be read.
        ([0; 32], true),
        (digest::of_pod(&having(all())), false),
    ] {
        let mut withheld = Withheld::new(None, vec![left(policy)], [].into_iter());
        let completed = completed(&mut withheld, &now, &[ORDERED]);
        assert_eq!(completed.is_known(), is_known);
    }
}

#[test]
fn while_only_sets_are_not_listed_a_pod_without_a_set_is_known() {
    let kinds = || Some([PolicyKind::Set].into());
    let mut withheld = Withheld::new(kinds(), Vec::new(), [].into_iter());
    let mut now = pod("cart");
    assert_eq!(completed(&mut withheld, &now, &[PolicyKind::Set]), now);
    let key = "egress-agent.dev/deny".to_owned();
    now.annotations.insert(key, "@web".to_owned());
    let completed = completed(&mut withheld, &now, &[PolicyKind::Set]);
    assert!(!completed.is_known());
}
