//! Decisions about one pod: whether it is enforced, under which policy, and from which addresses it may send.

use std::{net::IpAddr, sync::Arc};

use egress_common::{
    limits::OWN_ADDRESSES,
    records::{MODE_AUDIT, MODE_ENFORCE},
};

use super::{
    Action,
    scene::{Scene, behind, subject, summary},
    wanted::{Wanted, mapped},
};
use crate::{
    control::observe::{first_addresses::FirstAddresses, locations::Location, unlocated::Absence},
    host::{Exit, Exits, LeadsTo},
    pods::ObjectsOf,
};

/// The wanted enforcement of the pod.
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

#[test]
fn a_pod_keeps_its_last_good_policy_while_its_namespace_is_not_known() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.reconcile();
    let closed = Arc::new(egress_policy::unidentified(
        &egress_policy::Objects::default(),
        &scene.policy_settings,
    ));
    let cart = scene.get("cart");
    (cart.pod.namespace_known, cart.policy) = (false, closed);
    assert!(summary(&scene.plan()).is_empty());
    assert_eq!(
        scene.problem("cart"),
        "its namespace is not known; the last good policy stays"
    );
}

#[test]
fn a_pod_whose_objects_are_not_known_stays_as_an_earlier_agent_left_it() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.reconcile();
    scene.restart();
    let closed = Arc::new(egress_policy::unidentified(
        &egress_policy::Objects::default(),
        &scene.policy_settings,
    ));
    let cart = scene.get("cart");
    cart.pod.objects_of = ObjectsOf::UnknownButEnforced;
    cart.policy = Arc::clone(&closed);
    let plan = scene.plan();
    assert!(summary(&plan).is_empty());
    assert_eq!(plan.kept.len(), 1);
    assert!(
        scene
            .problem("cart")
            .ends_with("enforced as an earlier agent left it, without DNS")
    );
    // On another interface it would be open.
    scene.get("cart").location = behind(&[1, 2]);
    assert_eq!(wanted(&scene, "cart").compiled, closed);
    // Its location may not be known for a moment.
    scene.get("cart").location = Location::NotYet("later".into());
    let plan = scene.plan();
    assert!(summary(&plan).is_empty());
    assert_eq!(plan.kept.len(), 1);
}

#[test]
fn a_new_pod_whose_objects_are_not_known_is_closed_and_follows_its_addresses() {
    let mut scene = Scene::new();
    let closed = Arc::new(egress_policy::unidentified(
        &egress_policy::Objects::default(),
        &scene.policy_settings,
    ));
    let cart = scene.add("cart", 1);
    cart.pod.objects_of = ObjectsOf::Unknown;
    cart.policy = Arc::clone(&closed);
    assert_eq!(wanted(&scene, "cart").compiled, closed);
    scene.reconcile();
    assert!(summary(&scene.plan()).is_empty());
    let address = IpAddr::from([10, 0, 0, 9]);
    scene.get("cart").pod.addresses = vec![address];
    assert_eq!(summary(&scene.plan()), ["prepare", "change cart"]);
}

#[test]
fn a_pod_keeps_its_last_good_policy_while_its_objects_are_not_known() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.reconcile();
    let closed = Arc::new(egress_policy::unidentified(
        &egress_policy::Objects::default(),
        &scene.policy_settings,
    ));
    let cart = scene.get("cart");
    (cart.pod.objects_of, cart.policy) = (ObjectsOf::Unknown, closed);
    assert!(summary(&scene.plan()).is_empty());
    assert!(
        scene
            .problem("cart")
            .ends_with("the last good policy stays")
    );
}

#[test]
fn a_new_pod_whose_namespace_is_not_known_is_put_under_the_closed_policy_that_was_read() {
    let mut scene = Scene::new();
    let closed = Arc::new(egress_policy::unidentified(
        &egress_policy::Objects::default(),
        &scene.policy_settings,
    ));
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
        assert!(summary(&plan).is_empty());
        let why = &plan.unlocated[&subject("cart")].why;
        assert!(why.ends_with("enforced on its earlier interfaces"), "{why}");
    }
}

#[test]
fn a_pod_that_hides_its_interfaces_keeps_no_edit_from_them() {
    for location in [
        Location::NotYet("has no interface".to_owned()),
        Location::Nowhere("has no host end".to_owned()),
    ] {
        let mut scene = Scene::new();
        scene.add("cart", 1);
        scene.reconcile();
        let edited = scene.policy(&[("deny", "203.0.113.9")]);
        let cart = scene.get("cart");
        (cart.location, cart.policy) = (location, edited);
        assert_eq!(summary(&scene.reconcile()), ["prepare", "change cart"]);
        let plan = scene.plan();
        assert!(summary(&plan).is_empty());
        assert!(plan.unlocated.contains_key(&subject("cart")));
    }
}

#[test]
fn a_pod_whose_new_interface_another_pod_has_keeps_no_edit_from_its_earlier_one() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.add("zoo", 2);
    scene.reconcile();
    let edited = scene.policy(&[("deny", "203.0.113.9")]);
    let cart = scene.get("cart");
    (cart.location, cart.policy) = (behind(&[2]), edited);
    assert_eq!(summary(&scene.reconcile()), ["prepare", "change cart"]);
    assert!(summary(&scene.plan()).is_empty());
    assert!(
        scene
            .problem("cart")
            .ends_with("enforced on its earlier interface")
    );
}

#[test]
fn a_pod_that_is_refused_stays_refused_while_it_is_not_found() {
    let exits = Exits {
        named: vec![Exit {
            name: "net1".to_owned(),
            kind: "macvlan".to_owned(),
            to: LeadsTo::Hardware,
        }],
        ..Exits::default()
    };
    let mut scene = Scene::configured("unenforcedInterfaces: refuse\n");
    scene.add("cart", 1).exits = Some((Arc::new(exits), None));
    scene.reconcile();
    let cart = scene.get("cart");
    (cart.location, cart.exits) = (Location::NotYet("has no interface".to_owned()), None);
    assert!(summary(&scene.plan()).is_empty());
}

/// The location of a pod whose control group is empty.
fn nobody() -> Location {
    Location::Nobody {
        why: "no process".to_owned(),
        has_group: true,
    }
}

#[test]
fn a_pod_of_which_nothing_runs_any_more_stays_enforced_and_nobody_waits_for_it() {
    let mut scene = Scene::new();
    scene.add("cart", 1);
    scene.reconcile();
    scene.get("cart").location = nobody();
    let plan = scene.plan();
    assert!(summary(&plan).is_empty() && plan.unlocated.is_empty() && plan.problems.is_empty());
}

#[test]
fn a_pod_that_is_not_there_yet_is_waited_for() {
    let mut scene = Scene::new();
    scene.add("cart", 1).location = nobody();
    let plan = scene.plan();
    assert!(summary(&plan).is_empty());
    assert_eq!(
        plan.unlocated[&subject("cart")],
        Absence {
            why: "not enforced yet: no process".to_owned(),
            is_empty: true
        }
    );
}

#[test]
fn a_manifests_pod_whose_interface_is_gone_is_not_enforced_any_more() {
    let mut scene = Scene::new();
    scene.in_cluster = false;
    scene.add("cart", 1).pod.cgroup_uid = None;
    scene.reconcile();
    scene.get("cart").location = Location::Nowhere("there is no interface veth1".to_owned());
    assert_eq!(summary(&scene.plan()), ["release cart", "remove cart"]);
    assert_eq!(scene.problem("cart"), "there is no interface veth1");
}

#[test]
fn a_pod_in_the_hosts_network_is_not_enforced_and_only_who_asked_for_it_is_told() {
    let mut scene = Scene::new();
    let cart = scene.add("cart", 1);
    cart.pod.host_network = true;
    cart.location = Location::Nowhere("the pod is in the host's network".to_owned());
    assert!(summary(&scene.plan()).is_empty());
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
    assert!(summary(&scene.plan()).is_empty());
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
    assert_eq!(summary(&scene.plan()), ["prepare", "begin cart"]);
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
