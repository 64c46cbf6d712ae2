//! Starting, ending, being killed and coming back.

use std::process::ExitStatus;

use egress_tests::{
    Agent, DEADLINE, Lab, Pod, SHORT, TcpEcho,
    addresses::{RESOLVER, server},
    bpf::bpftool,
    dns::RecordType,
    eventually, exchange, holds,
};

/// A pod that has resolved what it may reach.
struct Scene {
    agent: Agent,
    _web: TcpEcho,
    pod: Pod,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new(arguments: &[&str]) -> Self {
        let lab = Lab::new();
        lab.dns().addresses("later.test", &[server(20)]);
        let (web, pod) = lab.shop_and_cart("shop.test:443 later.test:443");
        let agent = lab.start_agent_with(arguments, &[&pod]);
        assert_eq!(pod.lookup("shop.test"), [server(10)]);
        Self {
            agent,
            _web: web,
            pod,
            lab,
        }
    }

    /// Without the agent's help, what was decided still holds.
    #[track_caller]
    fn is_still_enforced(&self) {
        self.pod.talks_tcp((server(10), 443));
        assert!(
            self.pod.connect_tcp((server(99), 443), SHORT).is_err(),
            "the pod is open"
        );
        assert!(
            self.pod.connect_tcp((server(10), 22), SHORT).is_err(),
            "the pod is open"
        );
    }

    /// As if no agent had ever been there.
    #[track_caller]
    fn is_free(&self) {
        self.pod.talks_tcp((server(99), 443));
        self.pod.resolve("evil.test", RecordType::A);
        assert_eq!(self.lab.dns().asked("evil.test"), 1);
        let pins = self.lab.all_pins();
        assert!(!pins.iter().any(|pin| pin.is_file()), "left: {pins:?}");
        assert!(!self.lab.pins().exists(), "left: {pins:?}");
    }
}

#[track_caller]
fn ended_well(status: ExitStatus) {
    assert!(status.success(), "the agent ended with {status}");
}

#[test]
fn an_agent_that_is_asked_to_end_takes_everything_with_it() {
    let mut scene = Scene::new(&[]);
    let objects = scene.agent.kernel_objects();
    assert!(
        !objects.programs.is_empty() && !objects.maps.is_empty(),
        "{objects:?}"
    );
    assert_eq!(objects.still_there(), objects);
    ended_well(scene.agent.stop());
    scene.is_free();
    // The kernel frees what nobody holds a moment later.
    eventually("programs and maps are gone", || {
        holds(objects.still_there().is_empty())
    });
}

#[test]
fn an_agent_that_keeps_enforcing_leaves_it_to_the_kernel_and_a_restart_adopts_it() {
    let mut scene = Scene::new(&["--keep-enforcing"]);
    let mut open = scene.pod.talks_tcp((server(10), 443));
    ended_well(scene.agent.stop());
    scene.is_still_enforced();
    assert!(
        exchange(&mut open, b"meanwhile", DEADLINE),
        "an open connection was cut"
    );

    let agent = scene.lab.start_agent(&[&scene.pod]);
    assert!(
        exchange(&mut open, b"after", DEADLINE),
        "an open connection was cut"
    );
    scene.is_still_enforced();
    assert_eq!(
        scene.lab.dns().asked("shop.test"),
        1,
        "what was learned is kept"
    );
    agent.denies_tcp(&scene.pod, (server(98), 443), "address_not_learned");
    assert_eq!(scene.pod.lookup("later.test"), [server(20)]);
    scene.pod.talks_tcp((server(20), 443));
}

#[test]
fn an_agent_that_attaches_another_way_takes_over_from_its_predecessor() {
    let Scene {
        mut agent,
        _web,
        pod,
        lab,
    } = Scene::new(&["--keep-enforcing", "--attach", "tcx"]);
    for way in ["clsact", "tcx"] {
        ended_well(agent.stop());
        agent = lab.start_agent_with(&["--keep-enforcing", "--attach", way], &[&pod]);
        assert_eq!(pod.lookup("later.test"), [server(20)], "{way}");
        pod.talks_tcp((server(10), 443));
        assert!(pod.connect_tcp((server(99), 443), SHORT).is_err(), "{way}");
    }
    ended_well(agent.stop());
    lab.cleanup();
    assert!(lab.all_pins().is_empty(), "{:?}", lab.all_pins());
    pod.talks_tcp((server(99), 443));
}

#[test]
fn a_killed_agent_leaves_its_pods_enforced_until_cleanup() {
    let mut scene = Scene::new(&[]);
    let mut open = scene.pod.talks_tcp((server(10), 443));
    let objects = scene.agent.kernel_objects();
    scene.agent.kill();

    scene.is_still_enforced();
    assert!(
        exchange(&mut open, b"after", DEADLINE),
        "an open connection was cut"
    );
    // What is undecided stays so: there is nobody to decide it.
    let answer = scene
        .pod
        .try_resolve(RESOLVER, "later.test", RecordType::A, SHORT);
    assert!(
        answer.is_none(),
        "an answer that nobody decided was delivered: {answer:?}"
    );

    scene.lab.cleanup();
    scene.is_free();
    eventually("programs and maps are gone", || {
        holds(objects.still_there().is_empty())
    });
    // There may be nothing to clean.
    scene.lab.cleanup();
}

#[test]
fn an_agent_that_comes_back_after_being_killed_goes_on() {
    let mut scene = Scene::new(&[]);
    scene.agent.kill();
    // While nobody watches, one pod goes and another comes.
    let other = scene.lab.pod("shop", "mail");
    scene.lab.write_pod(&other, &[("allow", "shop.test:443")]);
    let mut agent = scene.lab.start_agent(&[&scene.pod, &other]);
    scene.is_still_enforced();
    assert_eq!(
        scene.lab.dns().asked("shop.test"),
        1,
        "what was learned is kept"
    );
    assert_eq!(scene.pod.lookup("later.test"), [server(20)]);
    agent.denies_tcp(&other, (server(10), 443), "address_not_learned");
    ended_well(agent.stop());
    scene.is_free();
}

#[test]
fn a_pod_removed_while_the_agent_was_away_is_forgotten() {
    let mut scene = Scene::new(&["--keep-enforcing"]);
    let pin = scene.lab.allow_pin(&scene.pod);
    assert!(pin.exists());
    ended_well(scene.agent.stop());
    assert!(pin.exists());
    scene.lab.remove_pod(&scene.pod);
    let agent = scene.lab.start_agent(&[]);
    eventually("the pod's pins are gone", || holds(!pin.exists()));
    eventually("its interface is free", || {
        holds(scene.pod.connect_tcp((server(99), 443), SHORT).is_ok())
    });
    drop(agent);
}

#[test]
fn pods_come_and_go_while_the_agent_runs() {
    let scene = Scene::new(&[]);
    let late = scene.lab.pod("shop", "late");
    scene.lab.write_pod(&late, &[("allow", "shop.test:443")]);
    scene.agent.wait_enforcing(&late);
    scene
        .agent
        .denies_tcp(&late, (server(10), 443), "address_not_learned");
    late.lookup("shop.test");
    late.talks_tcp((server(10), 443));
    // Its interface goes with its namespace, its manifest a moment later.
    let pin = scene.lab.allow_pin(&late);
    assert!(pin.exists());
    scene.lab.remove_pod(&late);
    drop(late);
    eventually("the pod's pins are gone", || holds(!pin.exists()));
    scene.is_still_enforced();
}

#[test]
fn an_operator_sees_named_fields_with_bpftool_alone() {
    let scene = Scene::new(&[]);
    let pin = scene
        .lab
        .bpffs()
        .join("egress-agent/v1/pods/shop_cart/allow");
    let pin = pin.to_str().expect("a path in UTF-8");
    let dump = bpftool(&["map", "dump", "pinned", pin]);
    let entry = &dump[0]["formatted"];
    assert!(entry["key"]["addr"].is_array(), "{dump}");
    assert!(entry["value"]["classes"].is_u64(), "{dump}");
    assert!(entry["value"]["expires_ns"].is_u64(), "{dump}");
    let map = bpftool(&["map", "show", "pinned", pin]);
    assert_eq!(map["type"], "hash", "{map}");
    assert!(
        map["name"].as_str().is_some_and(|name| !name.is_empty()),
        "{map}"
    );
    assert!(scene.lab.allowed(&scene.pod).contains_key(&server(10)));
}
