//! The rules of plans, one by one.

use std::{net::IpAddr, sync::Arc, time::Duration};

use egress_common::{
    limits::OWN_ADDRESSES,
    records::{INTERFACE_REJECT, MODE_AUDIT, MODE_ENFORCE},
};

use super::{
    Action, plan,
    scene::{Scene, behind, subject, told},
    wanted::{Wanted, mapped},
};
use crate::{
    control::{
        observe::{first_addresses::FirstAddresses, locations::Location, unlocated::PATIENCE},
        publish::problems::About,
    },
    host::{Exit, Exits, LeadsTo},
    report::Subject,
};
use egress_policy::Mode;

/// What the pod is to be under.
fn wanted(scene: &Scene, name: &str) -> Arc<Wanted> {
    let plan = scene.plan();
    let mut actions = plan.actions.iter();
    let wanted = actions.find_map(|action| match action {
        Action::Begin {
            subject: of,
            wanted,
            ..
        }
        | Action::Change {
            subject: of,
            wanted,
        } if *of == subject(name) => Some(Arc::clone(wanted)),
        _ => None,
    });
    wanted.expect("an action for the pod")
}

fn off(scene: &mut Scene, name: &str) {
    let policy = scene.policy(&[("mode", "off")]);
    assert_eq!(policy.mode, Mode::Off);
    scene.get(name).policy = policy;
}

#[test]
fn a_new_pod_is_enforced_and_then_left_as_it_is() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    assert_eq!(told(&scene.reconcile()), ["prepare", "begin cart"]);
    assert!(told(&scene.plan()).is_empty());
}

#[test]
fn of_two_pods_on_one_interface_the_one_that_has_it_keeps_it() {
    let mut scene = Scene::new();
    scene.add("zoo", 1);
    scene.reconcile();
    scene.add("cart", 1);
    assert!(told(&scene.plan()).is_empty());
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
    assert_eq!(told(&scene.plan()), ["prepare", "begin cart"]);
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
    assert!(told(&scene.plan()).is_empty());
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
    assert_eq!(told(&scene.reconcile()), ["prepare", "begin veth1"]);
    scene.pods.clear();
    scene.add("cart", 1);
    assert_eq!(
        told(&scene.plan()),
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
    assert!(told(&scene.plan()).is_empty());
}

#[test]
fn an_interface_whose_pod_is_not_to_be_enforced_leaves_quarantine_at_once() {
    let mut scene = Scene::new();
    scene.add_unknown("veth1", 1);
    scene.reconcile();
    scene.pods.clear();
    scene.add("cart", 1);
    off(&mut scene, "cart");
    assert_eq!(told(&scene.plan()), ["release veth1", "remove veth1"]);
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
        told(&scene.plan()),
        ["release cart", "remove gone", "remove cart"]
    );
    assert_eq!(scene.plan().left_alone, [1]);
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
        told(&scene.plan()),
        [
            "release freed",
            "remove gone",
            "prepare",
            "change changed",
            "move moved to [7]",
            "adopt adopted",
            "begin begun",
            "remove freed",
            "remove what is left of 2",
        ]
    );
}

#[test]
fn a_pod_that_is_made_anew_under_its_name_is_removed_and_begun() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.reconcile();
    scene.get("cart").pod.uid = "another".to_owned();
    assert_eq!(
        told(&scene.plan()),
        ["remove cart", "prepare", "begin cart"]
    );
}

#[test]
fn a_pod_keeps_its_last_good_policy_while_its_namespace_is_not_known() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.reconcile();
    let closed = Arc::new(egress_policy::unidentified(&scene.policy_settings));
    let cart = scene.get("cart");
    (cart.pod.namespace_known, cart.policy) = (false, closed);
    assert!(told(&scene.plan()).is_empty());
    assert_eq!(
        scene.problem("cart"),
        "its namespace is not known; the last good policy stays"
    );
}

#[test]
fn a_new_pod_whose_namespace_is_not_known_is_put_under_the_closed_policy_that_was_read() {
    let mut scene = Scene::new();
    let closed = Arc::new(egress_policy::unidentified(&scene.policy_settings));
    let cart = scene.add("cart", 1);
    (cart.pod.namespace_known, cart.policy) = (false, Arc::clone(&closed));
    assert_eq!(wanted(&scene, "cart").compiled, closed);
}

#[test]
fn a_pod_that_is_not_found_any_more_stays_enforced_where_it_was() {
    for location in [
        Location::NotYet("cannot be read".to_owned()),
        Location::Nowhere("has no interface".to_owned()),
    ] {
        let mut scene = Scene::new();
        scene.add("cart", 1);
        scene.reconcile();
        scene.get("cart").location = location;
        let plan = scene.plan();
        assert!(told(&plan).is_empty());
        let why = &plan.unlocated[&subject("cart")];
        assert!(why.ends_with("enforced on its earlier interfaces"), "{why}");
    }
}

#[test]
fn a_pod_of_which_nothing_runs_any_more_stays_enforced_and_nobody_waits_for_it() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.reconcile();
    scene.get("cart").location = Location::Nobody("no process".to_owned());
    let plan = scene.plan();
    assert!(told(&plan).is_empty() && plan.unlocated.is_empty() && plan.problems.is_empty());
}

#[test]
fn a_pod_that_is_not_there_yet_is_waited_for() {
    let mut scene = Scene::new();
    scene.add("cart", 1).location = Location::Nobody("no process".to_owned());
    let plan = scene.plan();
    assert!(told(&plan).is_empty());
    assert_eq!(
        plan.unlocated[&subject("cart")],
        "not enforced yet: no process"
    );
}

#[test]
fn a_manifests_pod_whose_interface_is_gone_is_not_enforced_any_more() {
    let mut scene = Scene::new();
    scene.in_cluster = false;
    scene.add("cart", 1).pod.cgroup_uid = None;
    scene.reconcile();
    scene.get("cart").location = Location::Nowhere("there is no interface veth1".to_owned());
    assert_eq!(told(&scene.plan()), ["release cart", "remove cart"]);
    assert_eq!(scene.problem("cart"), "there is no interface veth1");
}

#[test]
fn what_an_earlier_agent_left_is_adopted_before_new_pods_begin() {
    let mut scene = Scene::new();
    scene.add("zoo", 1);
    scene.reconcile();
    scene.restart();
    scene.add("cart", 2);
    assert_eq!(
        told(&scene.reconcile()),
        ["prepare", "adopt zoo", "begin cart"]
    );
    assert!(told(&scene.plan()).is_empty());
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
    assert!(told(&early).is_empty());
    assert_eq!(early.kept, [1]);
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
    assert_eq!(told(&scene.plan()), ["remove what is left of 1"]);
}

#[test]
fn a_pod_that_ran_before_begins_with_its_sources_and_settles_last() {
    let mut scene = Scene::new();
    scene.unjudged.look(&[1].into());
    scene.add("zoo", 1);
    scene.add("cart", 2);
    assert_eq!(
        told(&scene.reconcile()),
        ["prepare", "begin cart", "begin zoo, settle", "settle"]
    );
}

#[test]
fn connections_are_noted_at_once_on_an_interface_that_is_judged_for_another_pod() {
    let mut scene = Scene::new();
    scene.unjudged.look(&[1].into());
    scene.add_unknown("veth1", 1);
    scene.reconcile();
    scene.pods.clear();
    scene.add("cart", 1);
    scene.unjudged.leave(&[1]);
    assert_eq!(told(&scene.plan())[1], "begin cart, note");
}

#[test]
fn an_interface_that_was_in_quarantine_from_its_beginning_has_nothing_from_before() {
    let mut scene = Scene::new();
    scene.unjudged.look(&[].into());
    scene.add_unknown("veth1", 1);
    assert_eq!(told(&scene.reconcile())[1], "begin veth1");
    scene.pods.clear();
    scene.add("cart", 1);
    assert_eq!(told(&scene.plan())[1], "begin cart");
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
        told(&scene.plan()),
        ["prepare", "begin cart, settle", "settle"]
    );
}

#[test]
fn connections_are_noted_on_the_new_interfaces_of_a_pod_alone() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.reconcile();
    scene.unjudged.leave(&[1]);
    scene.get("cart").location = behind(&[1, 2]);
    assert_eq!(told(&scene.plan()), ["prepare", "move cart to [1, 2]"]);
    scene.unjudged.leave(&[2]);
    assert_eq!(
        told(&scene.plan()),
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
        told(&scene.reconcile()),
        ["prepare", "change cart", "move cart to [2]"]
    );
    assert!(told(&scene.plan()).is_empty());
}

#[test]
fn a_pod_in_the_hosts_network_is_not_enforced_and_only_who_asked_for_it_is_told() {
    let mut scene = Scene::new();
    let cart = scene.add("cart", 1);
    cart.pod.host_network = true;
    cart.location = Location::Nowhere("the pod is in the host's network".to_owned());
    assert!(told(&scene.plan()).is_empty());
    assert_eq!(
        scene.problem("cart"),
        "not enforced: the pod is in the host's network (hostNetwork)"
    );
    scene.get("cart").pod.annotations.clear();
    assert_eq!(scene.problem("cart"), "");
}

#[test]
fn an_enforced_pod_with_too_many_addresses_keeps_its_policy_and_a_new_one_is_closed() {
    let many = (0..=OWN_ADDRESSES).map(|i| IpAddr::from([10, 1, 0, i as u8]));
    let many: Vec<IpAddr> = many.collect();
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.reconcile();
    scene.get("cart").pod.addresses.clone_from(&many);
    assert!(told(&scene.plan()).is_empty());
    assert!(
        scene
            .problem("cart")
            .ends_with("the last good policy stays")
    );
    let mut scene = Scene::new();
    scene.add("cart", 1).pod.addresses = many;
    let wanted = wanted(&scene, "cart");
    assert_eq!(wanted.mode, MODE_ENFORCE);
    assert!(wanted.compiled.cidrs.is_empty());
    assert!(
        scene
            .problem("cart")
            .ends_with("everything external is denied")
    );
}

#[test]
fn a_pod_without_an_address_is_enforced_and_told() {
    let mut scene = Scene::new();
    scene.add("cart", 1).pod.addresses.clear();
    assert_eq!(told(&scene.plan()), ["prepare", "begin cart"]);
    assert_eq!(scene.problem("cart"), crate::pods::NO_ADDRESS);
}

#[test]
fn addresses_of_an_interface_are_the_pods_own_unless_somebody_else_has_them() {
    let address = |last| IpAddr::from([10, 1, 0, last]);
    let mut scene = Scene::new();
    scene.owners.node.insert(address(3));
    scene.owners.gateways.insert(address(4));
    let others = vec![(subject("zoo"), true)];
    scene.owners.pods.insert(address(5), others);
    let cart = scene.add("cart", 1);
    cart.pod.addresses.clear();
    let Location::Found(location) = &mut cart.location else {
        panic!("the pod is found");
    };
    let resolver = IpAddr::from([10, 0, 0, 53]);
    let mut seen: Vec<IpAddr> = (2..6).map(address).collect();
    seen.push(resolver);
    location.first = FirstAddresses {
        seen,
        made: Vec::new(),
    };
    assert_eq!(wanted(&scene, "cart").own(), [mapped(address(2))]);
    let problem = scene.problem("cart");
    for whose in [
        "10.1.0.3 of its interface is the node's",
        "10.1.0.4 of its interface is that of a gateway",
        "10.1.0.5 of its interface is that of pod shop/zoo",
        "10.0.0.53 of its interface is a resolver's",
    ] {
        assert!(problem.contains(whose), "{whose}: {problem}");
    }
}

#[test]
fn interfaces_that_nobody_can_enforce_are_told_or_close_the_pod() {
    let exits = Exits {
        named: vec![Exit {
            name: "net1".to_owned(),
            kind: "macvlan".to_owned(),
            to: LeadsTo::Hardware,
        }],
        ..Exits::default()
    };
    let exits = Some((Arc::new(exits), None));
    let mut scene = Scene::configured("unenforcedInterfaces: report\n");
    scene.add("cart", 1).exits.clone_from(&exits);
    let reported = wanted(&scene, "cart");
    assert_eq!(reported.compiled, scene.get("cart").policy);
    assert!(
        scene
            .problem("cart")
            .ends_with("its other interfaces are enforced")
    );

    let mut scene = Scene::configured("unenforcedInterfaces: refuse\n");
    scene.add("cart", 1).exits.clone_from(&exits);
    let refused = egress_policy::refused(&scene.policy_settings);
    assert_eq!(*wanted(&scene, "cart").compiled, refused);
    assert!(
        scene
            .problem("cart")
            .contains("nothing else leaves the pod")
    );
    // In audit mode nothing is denied, so nothing is refused either.
    let audit = scene.policy(&[("allow", "a.test"), ("mode", "audit")]);
    scene.get("cart").policy = Arc::clone(&audit);
    let audited = wanted(&scene, "cart");
    assert_eq!((audited.mode, &audited.compiled), (MODE_AUDIT, &audit));
}

#[test]
fn quarantine_is_a_problem_only_when_it_lasts() {
    let mut scene = Scene::new();
    scene.add_unknown("veth1", 1);
    let plan = scene.plan();
    assert!(plan.problems.is_empty());
    assert!(plan.unlocated[&Subject::interface("veth1")].contains("quarantine.exclude"));
    assert!(PATIENCE > Duration::ZERO);
}
