//! The effect of an edit of a policy on the addresses that the pod has learned.

use egress_tests::{
    Agent, DEADLINE, Lab, Pod, TcpEcho, addresses::server, eventually, exchange, holds,
};

/// A pod that has resolved `shop.test` (`server(10)`), under a policy with a prefix.
struct Scene {
    agent: Agent,
    pod: Pod,
    _web: TcpEcho,
    lab: Lab,
}

const BEFORE: &str = "shop.test:443 late.test:443 203.0.113.20:443";
/// The same with another prefix.
const AFTER: &str = "shop.test:443 late.test:443 203.0.113.30:443 203.0.113.40:443";

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::new();
        let web = lab.serve_tcp(443);
        lab.dns().addresses("shop.test", &[server(10)]);
        lab.dns().addresses("late.test", &[server(11)]);
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("allow", BEFORE)]);
        let agent = lab.start_agent(&[&pod]);
        assert_eq!(pod.lookup("shop.test"), [server(10)]);
        Self {
            agent,
            pod,
            _web: web,
            lab,
        }
    }

    #[track_caller]
    fn edit(&self, allow: &str) {
        self.agent.applies_policy_after(&self.pod, || {
            self.lab.write_pod(&self.pod, &[("allow", allow)]);
        });
    }

    #[track_caller]
    fn allow_map(&self) -> u64 {
        self.lab.allow_map(&self.pod)
    }

    #[track_caller]
    fn wait_one_version(&self) {
        eventually("the earlier version is removed", || {
            let versions = self.lab.allow_maps();
            holds(versions.into_values().eq([self.allow_map()]))
        });
    }
}

#[test]
fn an_edit_of_prefixes_copies_no_learned_address() {
    let scene = Scene::new();
    let pod = &scene.pod;
    let mut open = pod.talks_tcp((server(10), 443));
    let mut to_prefix = pod.talks_tcp((server(20), 443));
    let before = scene.allow_map();

    scene.edit(AFTER);
    assert_eq!(scene.allow_map(), before, "the addresses were copied");
    assert!(exchange(&mut open, b"still here", DEADLINE), "it was cut");
    pod.talks_tcp((server(10), 443));
    pod.talks_tcp((server(40), 443));
    // Connections that are no longer allowed end at once.
    scene
        .agent
        .denies_tcp(pod, (server(20), 443), "address_not_learned");
    assert!(
        !exchange(&mut to_prefix, b"gone", egress_tests::SHORT),
        "a connection that the edit denies goes on"
    );
    // Names that are resolved later open their addresses under the new version.
    scene.wait_one_version();
    assert_eq!(pod.lookup("late.test"), [server(11)]);
    pod.talks_tcp((server(11), 443));
}

#[test]
fn an_edit_of_names_after_an_edit_of_prefixes_closes_the_removed_names() {
    let scene = Scene::new();
    let pod = &scene.pod;
    assert_eq!(pod.lookup("late.test"), [server(11)]);
    let before = scene.allow_map();
    scene.edit(AFTER);
    assert_eq!(scene.allow_map(), before, "the addresses were copied");

    scene.edit("shop.test:443 203.0.113.30:443 203.0.113.40:443");
    assert_ne!(
        scene.allow_map(),
        before,
        "both versions write to the same map"
    );
    assert!(!pod.reaches(server(11)), "its name is not allowed any more");
    pod.talks_tcp((server(10), 443));
    scene.wait_one_version();
    assert!(scene.lab.allowed(pod).contains_key(&server(10)));
    assert!(!scene.lab.allowed(pod).contains_key(&server(11)));
}

#[test]
fn an_edit_that_gives_names_other_ports_applies_to_learned_addresses() {
    let scene = Scene::new();
    let pod = &scene.pod;
    let _other = scene.lab.serve_tcp(8443);
    pod.talks_tcp((server(10), 443));
    // The prefix has the class that the names had before.
    scene.edit("shop.test:8443 late.test:8443 203.0.113.20:443");
    assert!(!pod.reaches(server(10)), "port 443 is not allowed any more");
    pod.talks_tcp((server(10), 8443));
    pod.talks_tcp((server(20), 443));
}

#[test]
fn an_agent_that_is_killed_after_an_edit_of_prefixes_loses_no_learned_address() {
    let mut scene = Scene::new();
    let mut open = scene.pod.talks_tcp((server(10), 443));
    let before = scene.allow_map();
    scene.edit(AFTER);
    scene.agent.kill();
    assert!(exchange(&mut open, b"no agent", DEADLINE), "it was cut");
    scene.pod.talks_tcp((server(40), 443));

    scene.agent = scene.lab.start_agent(&[&scene.pod]);
    assert_eq!(scene.allow_map(), before, "the addresses were copied");
    scene.wait_one_version();
    let pod = &scene.pod;
    assert!(exchange(&mut open, b"another", DEADLINE), "it was cut");
    pod.talks_tcp((server(10), 443));
    scene.edit(BEFORE);
    pod.talks_tcp((server(10), 443));
    pod.talks_tcp((server(20), 443));
    assert!(!pod.reaches(server(40)), "the edit does not allow it");
}

#[test]
fn an_agent_that_is_killed_amid_edits_of_prefixes_keeps_destinations_open_that_both_allow() {
    let mut scene = Scene::new();
    let mut open = scene.pod.talks_tcp((server(10), 443));
    for round in 0..6 {
        scene.lab.write_pod(&scene.pod, &[("allow", AFTER)]);
        // At another point of the edit in each round.
        std::thread::sleep(std::time::Duration::from_millis(7 * round));
        scene.agent.kill();
        assert!(exchange(&mut open, b"no agent", DEADLINE), "it was cut");
        scene.pod.talks_tcp((server(10), 443));
        scene.agent = scene.lab.start_agent(&[&scene.pod]);
        assert!(exchange(&mut open, b"another", DEADLINE), "it was cut");
        scene.pod.talks_tcp((server(10), 443));
        eventually("the edit is in force", || {
            holds(scene.pod.reaches(server(40)) && !scene.pod.reaches(server(20)))
        });
        scene.wait_one_version();
        scene.edit(BEFORE);
    }
}
