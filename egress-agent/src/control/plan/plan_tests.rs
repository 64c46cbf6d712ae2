//! Whole plans: which pod gets an interface, which action comes first, and what happens to connections from before.

use std::time::Duration;

use egress_common::{
    ids::{IfIndex, PodId},
    records::INTERFACE_REJECT,
};

use super::{
    Action, plan,
    scene::{Scene, behind, subject, summary},
};
use crate::{
    control::{observe::unlocated::PATIENCE, publish::problems::About},
    report::Subject,
};
use egress_policy::Mode;

fn off(scene: &mut Scene, name: &str) {
    let policy = scene.policy(&[("mode", "off")]);
    assert_eq!(policy.mode, Mode::Off);
    scene.get(name).policy = policy;
}

#[test]
fn a_new_pod_is_enforced_and_then_left_as_it_is() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    assert_eq!(summary(&scene.reconcile()), ["prepare", "begin cart"]);
    assert!(summary(&scene.plan()).is_empty());
}

#[test]
fn of_two_pods_on_one_interface_the_one_that_has_it_keeps_it() {
    let mut scene = Scene::new();
    scene.add("zoo", 1);
    scene.reconcile();
    scene.add("cart", 1);
    assert!(summary(&scene.plan()).is_empty());
    assert_eq!(
        scene.problem("cart"),
        "not enforced: interface veth1 is already that of pod shop/zoo"
    );
    assert_eq!(scene.problem("zoo"), "");
}

#[test]
fn of_two_new_pods_on_one_interface_one_gets_it() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.add("zoo", 1);
    assert_eq!(summary(&scene.plan()), ["prepare", "begin cart"]);
    assert!(
        scene
            .problem("zoo")
            .contains("already that of pod shop/cart")
    );
}

#[test]
fn two_pods_that_swap_interfaces_in_one_edit_stay_where_they_are() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.add("zoo", 2);
    scene.reconcile();
    scene.get("cart").location = behind(&[2]);
    scene.get("zoo").location = behind(&[1]);
    assert!(summary(&scene.plan()).is_empty());
    assert_eq!(
        scene.problem("cart"),
        "interface veth2 is already that of pod shop/zoo; enforced on its earlier interface"
    );
    assert!(
        scene
            .problem("zoo")
            .contains("veth1 is already that of pod shop/cart")
    );
}

#[test]
fn a_pod_takes_its_interface_over_from_quarantine_before_the_interface_leaves_it() {
    let mut scene = Scene::new();
    scene.add_unknown("veth1", 1);
    assert_eq!(summary(&scene.reconcile()), ["prepare", "begin veth1"]);
    scene.pods.clear();
    scene.add("cart", 1);
    assert_eq!(
        summary(&scene.plan()),
        [
            "prepare",
            "begin cart",
            "remove veth1, if [1] are taken over"
        ]
    );
}

#[test]
fn an_interface_stays_in_quarantine_while_its_pod_cannot_be_enforced_on_it() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.add_unknown("veth2", 2);
    scene.reconcile();
    // The pod is found on both, and keeps its last good policy where it is.
    scene.pods.remove(&Subject::interface("veth2"));
    scene.get("cart").location = behind(&[1, 2]);
    scene.get("cart").pod.namespace_known = false;
    assert!(summary(&scene.plan()).is_empty());
}

#[test]
fn an_interface_whose_pod_is_not_to_be_enforced_leaves_quarantine_at_once() {
    let mut scene = Scene::new();
    scene.add_unknown("veth1", 1);
    scene.reconcile();
    scene.pods.clear();
    scene.add("cart", 1);
    off(&mut scene, "cart");
    assert_eq!(summary(&scene.plan()), ["release veth1", "remove veth1"]);
}

#[test]
fn a_quarantined_interface_drops_even_where_pods_reject() {
    let mut scene = Scene::configured("onDeny: reject\n");
    scene.add_unknown("veth1", 1);
    scene.add("cart", 2);
    let flags = |plan: &super::Plan| -> Vec<u32> {
        let actions = plan.actions.iter();
        actions
            .filter_map(|action| match action {
                Action::Begin { wanted, .. } => Some(wanted.flags),
                _ => None,
            })
            .collect()
    };
    assert_eq!(flags(&scene.plan()), [0, INTERFACE_REJECT]);
}

#[test]
fn a_pod_that_is_to_be_free_is_released_before_anything_is_detached() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.add("gone", 2);
    scene.reconcile();
    scene.pods.remove(&subject("gone"));
    off(&mut scene, "cart");
    assert_eq!(
        summary(&scene.plan()),
        ["release cart", "remove gone", "remove cart"]
    );
    assert_eq!(scene.plan().left_alone, [IfIndex::new(1)]);
}

#[test]
fn everything_at_once_is_done_in_the_order_that_frees_and_protects_soonest() {
    let mut scene = Scene::new();
    scene.add("adopted", 1);
    scene.add("unclaimed", 2);
    scene.reconcile();
    scene.restart();
    scene.pods.clear();
    for (name, ifindex) in [("changed", 3), ("freed", 4), ("gone", 5), ("moved", 6)] {
        scene.add(name, ifindex);
    }
    // As if these had been enforced meanwhile.
    let left = std::mem::take(&mut scene.left);
    scene.reconcile();
    scene.left = left;
    scene.pods.remove(&subject("gone"));
    off(&mut scene, "freed");
    let policy = scene.policy(&[("allow", "b.test")]);
    scene.get("changed").policy = policy;
    scene.get("moved").location = behind(&[7]);
    scene.add("adopted", 1);
    scene.add("begun", 8);
    assert_eq!(
        summary(&scene.plan()),
        [
            "release freed",
            "remove gone",
            "prepare",
            "change changed",
            "move moved to [7]",
            "adopt adopted",
            "begin begun",
            "remove freed",
            "remove the leftovers of 2",
        ]
    );
}

#[test]
fn a_pod_that_is_made_anew_takes_its_interface_over_from_the_one_that_is_gone() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.reconcile();
    scene.get("cart").pod.uid = "another".to_owned();
    assert_eq!(
        summary(&scene.reconcile()),
        [
            "retire cart",
            "prepare",
            "begin cart",
            "remove the leftovers of 1, if [1] are taken over"
        ]
    );
    assert!(summary(&scene.plan()).is_empty());
}

#[test]
fn quarantine_takes_over_the_interface_of_a_pod_that_is_gone() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.reconcile();
    scene.pods.clear();
    scene.add_unknown("veth1", 1);
    assert_eq!(
        summary(&scene.reconcile()),
        [
            "retire cart",
            "prepare",
            "begin veth1",
            "remove the leftovers of 1, if [1] are taken over"
        ]
    );
    assert!(summary(&scene.plan()).is_empty());
}

#[test]
fn an_interface_of_a_pod_that_is_gone_stays_judged_while_nobody_can_take_it_over() {
    let mut scene = Scene::new();
    scene.add("gone", 1);
    scene.add("cart", 2);
    scene.reconcile();
    // The other pod is found there, and keeps its last good policy where it is.
    scene.pods.remove(&subject("gone"));
    scene.get("cart").location = behind(&[1, 2]);
    scene.get("cart").pod.namespace_known = false;
    assert_eq!(summary(&scene.reconcile()), ["retire gone"]);
    let later = scene.plan();
    assert!(summary(&later).is_empty());
    assert_eq!(later.kept, [PodId::new(2)]);
    scene.get("cart").pod.namespace_known = true;
    assert_eq!(
        summary(&scene.plan()),
        [
            "prepare",
            "move cart to [1, 2]",
            "remove the leftovers of 2, if [1] are taken over"
        ]
    );
}

#[test]
fn connections_are_noted_at_once_where_a_pod_follows_one_that_is_gone() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.reconcile();
    scene.get("cart").pod.uid = "another".to_owned();
    scene.unjudged.leave(&[IfIndex::new(1)]);
    assert_eq!(summary(&scene.plan())[2], "begin cart, note");
}

#[test]
fn a_pod_is_enforced_on_those_of_its_interfaces_that_no_other_pod_has() {
    let mut scene = Scene::new();
    scene.add("zoo", 2);
    scene.add_unknown("veth1", 1);
    scene.reconcile();
    scene.pods.remove(&Subject::interface("veth1"));
    scene.add("cart", 1).location = behind(&[1, 2]);
    assert_eq!(
        summary(&scene.reconcile()),
        [
            "prepare",
            "begin cart",
            "remove veth1, if [1] are taken over"
        ]
    );
    assert_eq!(
        scene.problem("cart"),
        "interface veth2 is already that of pod shop/zoo; enforced on its other interfaces"
    );
    assert_eq!(scene.problem("zoo"), "");
    // It gets the other interface when its pod is gone.
    scene.pods.remove(&subject("zoo"));
    assert_eq!(
        summary(&scene.plan()),
        [
            "retire zoo",
            "prepare",
            "move cart to [1, 2]",
            "remove the leftovers of 2, if [2] are taken over"
        ]
    );
}

#[test]
fn an_enforced_pod_moves_to_those_of_its_interfaces_that_no_other_pod_has() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.add("zoo", 2);
    scene.reconcile();
    scene.get("cart").location = behind(&[1, 2, 3]);
    assert_eq!(
        summary(&scene.reconcile()),
        ["prepare", "move cart to [1, 3]"]
    );
    assert!(summary(&scene.plan()).is_empty());
}

#[test]
fn an_interface_that_a_pod_leaves_stays_closed_until_another_one_is_enforced_there() {
    let another_pod = |scene: &mut Scene| {
        scene.add("zoo", 1);
    };
    let unknown_pod = |scene: &mut Scene| scene.add_unknown("veth1", 1);
    for (next, come) in [
        ("zoo", another_pod as fn(&mut Scene)),
        ("veth1", unknown_pod),
    ] {
        let mut scene = Scene::new();
        scene.add("cart", 1);
        scene.reconcile();
        scene.get("cart").location = behind(&[2]);
        come(&mut scene);
        assert_eq!(summary(&scene.reconcile()), ["prepare", "move cart to [2]"]);
        let at = IfIndex::new(1);
        assert!(scene.attached.contains(&at), "{next} is open");
        assert_eq!(
            summary(&scene.reconcile()),
            ["prepare".to_owned(), format!("begin {next}")]
        );
        assert!(scene.attached.contains(&at));
        // Where nobody comes, the programs go.
        scene.pods.clear();
        scene.reconcile();
        assert!(!scene.attached.contains(&at));
    }
}

#[test]
fn an_interface_stays_in_quarantine_if_the_pod_behind_it_is_refused() {
    let mut scene = Scene::new();
    scene.add_unknown("veth1", 1);
    scene.reconcile();
    // It cannot be told at the moment whose interface it is.
    scene.add("cart", 1);
    assert!(summary(&scene.plan()).is_empty());
    assert_eq!(
        scene.problem("cart"),
        "not enforced: interface veth1 is in quarantine"
    );
}

#[test]
fn what_an_earlier_agent_left_is_adopted_before_new_pods_begin() {
    let mut scene = Scene::new();
    scene.add("zoo", 1);
    scene.reconcile();
    scene.restart();
    scene.add("cart", 2);
    assert_eq!(
        summary(&scene.reconcile()),
        ["prepare", "adopt zoo", "begin cart"]
    );
    assert!(summary(&scene.plan()).is_empty());
}

#[test]
fn what_an_earlier_agent_left_is_kept_while_the_source_cannot_be_read_in_full() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.reconcile();
    scene.restart();
    scene.pods.clear();
    scene.incomplete = true;
    let early = scene.plan();
    assert!(summary(&early).is_empty());
    assert_eq!(early.kept, [PodId::new(1)]);
    assert_eq!(early.other_problems.iter().count(), 0);
    let late = plan(&scene.observed(), &scene.settings, scene.began + PATIENCE);
    let (about, what) = late.other_problems.iter().next().expect("a problem");
    assert_eq!(*about, About::node("pods of an earlier agent"));
    assert!(
        what.starts_with("1 pods are enforced as an earlier agent left them"),
        "{what}"
    );
    // A directory's manifest that cannot be read may be this pod's.
    scene.in_cluster = false;
    let of_directory = scene.plan();
    assert!(of_directory.other_problems.of(&subject("cart")).is_some());
    scene.incomplete = false;
    assert_eq!(summary(&scene.plan()), ["remove the leftovers of 1"]);
}

#[test]
fn a_pod_that_ran_before_begins_with_its_sources_and_settles_last() {
    let mut scene = Scene::new();
    scene.unjudged.look(&[IfIndex::new(1)].into());
    scene.add("zoo", 1);
    scene.add("cart", 2);
    assert_eq!(
        summary(&scene.reconcile()),
        ["prepare", "begin cart", "begin zoo, settle", "settle"]
    );
}

#[test]
fn connections_are_noted_at_once_on_an_interface_that_is_judged_for_another_pod() {
    let mut scene = Scene::new();
    scene.unjudged.look(&[IfIndex::new(1)].into());
    scene.add_unknown("veth1", 1);
    scene.reconcile();
    scene.pods.clear();
    scene.add("cart", 1);
    scene.unjudged.leave(&[IfIndex::new(1)]);
    assert_eq!(summary(&scene.plan())[1], "begin cart, note");
}

#[test]
fn an_interface_that_was_in_quarantine_from_its_beginning_has_nothing_from_before() {
    let mut scene = Scene::new();
    scene.unjudged.look(&[].into());
    scene.add_unknown("veth1", 1);
    assert_eq!(summary(&scene.reconcile())[1], "begin veth1");
    scene.pods.clear();
    scene.add("cart", 1);
    assert_eq!(summary(&scene.plan())[1], "begin cart");
}

#[test]
fn a_pod_that_was_switched_off_has_connections_from_before_when_it_is_switched_on() {
    let mut scene = Scene::new();
    scene.unjudged.look(&[].into());
    scene.add("cart", 1);
    off(&mut scene, "cart");
    scene.reconcile();
    let policy = scene.policy(&[("allow", "a.test")]);
    scene.get("cart").policy = policy;
    assert_eq!(
        summary(&scene.plan()),
        ["prepare", "begin cart, settle", "settle"]
    );
}

#[test]
fn connections_are_noted_on_the_new_interfaces_of_a_pod_alone() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.reconcile();
    scene.unjudged.leave(&[IfIndex::new(1)]);
    scene.get("cart").location = behind(&[1, 2]);
    assert_eq!(summary(&scene.plan()), ["prepare", "move cart to [1, 2]"]);
    scene.unjudged.leave(&[IfIndex::new(2)]);
    assert_eq!(
        summary(&scene.plan()),
        ["prepare", "move cart to [1, 2], note"]
    );
}

#[test]
fn a_pod_that_changes_its_policy_and_its_interfaces_does_both() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.reconcile();
    let policy = scene.policy(&[("allow", "b.test")]);
    let cart = scene.get("cart");
    (cart.policy, cart.location) = (policy, behind(&[2]));
    assert_eq!(
        summary(&scene.reconcile()),
        ["prepare", "change cart", "move cart to [2]"]
    );
    assert!(summary(&scene.plan()).is_empty());
}

#[test]
fn quarantine_is_a_problem_only_when_it_lasts() {
    let mut scene = Scene::new();
    scene.add_unknown("veth1", 1);
    let plan = scene.plan();
    assert!(plan.problems.is_empty());
    assert!(
        plan.unlocated[&Subject::interface("veth1")]
            .why
            .contains("quarantine.exclude")
    );
    assert!(PATIENCE > Duration::ZERO);
}
