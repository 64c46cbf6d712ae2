//! A restarted agent knows the names for which a pod's addresses are allowed. So a change after the restart,
//! or while no agent ran, ends only connections that the new policy does not allow.

use std::net::TcpStream;

use egress_tests::{
    DEADLINE, Lab, Pod, SHORT, Shop, UdpEcho,
    addresses::{RESOLVER, RESOLVER6, STRANGER, numbered, server},
    dns::{RecordType, ResponseCode, address},
    echo_on, eventually, exchange, holds,
    observed::HTTP,
};

/// A pod that has resolved `shop.test` and has a connection open; its agent runs with `--keep-enforcing`.
struct Scene {
    open: TcpStream,
    shop: Shop,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::new();
        lab.dns().addresses("other.test", &[server(20)]);
        let shop = Shop::start(lab, "shop.test:443", &["--keep-enforcing"]);
        assert_eq!(shop.pod.lookup("shop.test"), [server(10)]);
        wait_names_kept(&shop.lab, &shop.pod, 1);
        let open = shop.pod.talks_tcp((server(10), 443));
        Self { open, shop }
    }

    /// Ends the agent, calls `meanwhile`, and starts another agent.
    #[track_caller]
    fn restart(&mut self, meanwhile: impl FnOnce(&Lab, &Pod)) {
        assert!(self.shop.agent.stop().success());
        meanwhile(&self.shop.lab, &self.shop.pod);
        self.shop.agent = self
            .shop
            .lab
            .start_agent_with(&["--keep-enforcing"], &[&self.shop.pod]);
    }

    #[track_caller]
    fn edit(&self, allow: &str) {
        self.shop.agent.applies_policy_after(&self.shop.pod, || {
            self.shop.lab.write_pod(&self.shop.pod, &[("allow", allow)]);
        });
    }

    /// Asserts that the open connection goes on, and that the pod opens another one without a new query.
    #[track_caller]
    fn assert_unaffected(&mut self) {
        assert!(
            exchange(&mut self.open, b"still here", DEADLINE),
            "the open connection was cut"
        );
        self.shop.pod.talks_tcp((server(10), 443));
        assert_eq!(self.shop.lab.dns().queries_for("shop.test"), 1);
        let denied = self.shop.agent.denials();
        assert!(denied.is_empty(), "{denied:?}");
    }

    #[track_caller]
    fn assert_cut(&mut self) {
        assert!(
            !exchange(&mut self.open, b"after", SHORT),
            "the open connection goes on"
        );
        self.shop
            .agent
            .denies_tcp(&self.shop.pod, (server(10), 443), "address_not_learned");
    }

    /// The id of the policy of the pod's interface.
    #[track_caller]
    fn policy(&self) -> u64 {
        policy_of(&self.shop.lab, &self.shop.pod)
    }
}

#[track_caller]
fn policy_of(lab: &Lab, pod: &Pod) -> u64 {
    let ifindex = lab.ifindex(pod.interface());
    let entries = lab.shared_entries("interfaces");
    let entry = entries.iter().find(|entry| entry["key"] == ifindex.get());
    let entry = entry.expect("the pod's interface has an entry");
    let policy = entry["value"]["policy"].as_u64();
    policy.expect("bpftool shows the field `policy`")
}

/// The number of entries in the pod's map of names.
#[track_caller]
fn names_kept(lab: &Lab, pod: &Pod) -> usize {
    lab.pod_entries(pod, "names").len()
}

/// Waits for the number of entries in the pod's map of names: the agent writes the names of addresses that the programs
/// have learned after the pod has the response.
#[track_caller]
fn wait_names_kept(lab: &Lab, pod: &Pod, count: usize) {
    eventually(&format!("{count} names are kept"), || {
        holds(names_kept(lab, pod) == count)
    });
}

#[test]
fn after_a_restart_an_edit_that_still_allows_the_name_cuts_nothing() {
    let mut scene = Scene::new();
    scene.restart(|_, _| ());
    scene.edit("shop.test:443 other.test:443");
    scene.assert_unaffected();
    // State that was carried over once survives the next restart, too.
    scene.restart(|_, _| ());
    scene.edit("*.test shop.test:443");
    scene.assert_unaffected();
}

#[test]
fn an_edit_while_no_agent_runs_that_still_allows_the_name_cuts_nothing() {
    let mut scene = Scene::new();
    scene.restart(|lab, pod| lab.write_pod(pod, &[("allow", "other.test:80 shop.test:443")]));
    scene.assert_unaffected();
    scene.restart(|lab, pod| lab.write_pod(pod, &[("allow", "*.test:80 shop.test")]));
    scene.assert_unaffected();
}

#[test]
fn the_names_of_a_killed_agent_are_kept() {
    let mut scene = Scene::new();
    scene.shop.agent.kill();
    let wide = [("allow", "shop.test:443 other.test:443")];
    scene.shop.lab.write_pod(&scene.shop.pod, &wide);
    scene.shop.agent = scene
        .shop
        .lab
        .start_agent_with(&["--keep-enforcing"], &[&scene.shop.pod]);
    scene.assert_unaffected();
}

#[test]
fn after_a_restart_a_change_of_resolvers_cuts_nothing() {
    let mut scene = Scene::new();
    scene.restart(|_, _| ());
    scene.shop.lab.edit_config(
        "dns.resolvers",
        [STRANGER, RESOLVER6].map(|ip| ip.to_string()).to_vec(),
    );
    scene.shop.agent.reload();
    scene.edit("shop.test:443 other.test:443");
    scene.assert_unaffected();
}

#[test]
fn after_a_restart_an_edit_that_removes_the_name_cuts_its_connections() {
    let mut scene = Scene::new();
    scene.restart(|_, _| ());
    scene.edit("other.test:443");
    scene.assert_cut();
    wait_names_kept(&scene.shop.lab, &scene.shop.pod, 0);
}

#[test]
fn an_edit_while_no_agent_runs_that_removes_the_name_cuts_its_connections() {
    let mut scene = Scene::new();
    scene.restart(|lab, pod| lab.write_pod(pod, &[("allow", "other.test:443")]));
    scene.assert_cut();
    wait_names_kept(&scene.shop.lab, &scene.shop.pod, 0);
}

#[test]
fn a_smaller_or_larger_allow_map_after_a_restart_cuts_nothing() {
    let mut scene = Scene::new();
    for limit in [64, 8192] {
        scene.restart(|lab, _| lab.edit_config("limits.addressesPerPod", limit));
        scene.assert_unaffected();
        scene.edit(&format!("shop.test:443 n{limit}.test"));
        scene.assert_unaffected();
    }
}

#[test]
fn a_udp_flow_to_a_name_goes_on_after_a_restart_and_an_edit() {
    let lab = Lab::new();
    let _echo: UdpEcho = lab.serve_udp(4000);
    lab.dns().addresses("shop.test", &[server(10)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:4000/udp")]);
    let mut agent = lab.start_agent_with(&["--keep-enforcing"], &[&pod]);
    pod.lookup("shop.test");
    let socket = pod.udp_socket((server(10), 4000));
    assert!(echo_on(&socket, b"before", DEADLINE));
    assert!(agent.stop().success());

    let agent = lab.start_agent_with(&["--keep-enforcing"], &[&pod]);
    agent.applies_policy_after(&pod, || {
        lab.write_pod(&pod, &[("allow", "shop.test:4000/udp other.test")]);
    });
    assert!(
        echo_on(&socket, b"after", DEADLINE),
        "the open flow was cut"
    );
    assert!(pod.echo_udp((server(10), 4000), b"new", DEADLINE));
}

#[test]
fn a_name_that_expired_meanwhile_opens_nothing_and_keeps_open_connections() {
    let lab = Lab::builder().exact_lifetimes().build();
    let _web = lab.serve_tcp(443);
    lab.dns().answer("shop.test", [address(server(10)).ttl(1)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let mut agent = lab.start_agent_with(&["--keep-enforcing"], &[&pod]);
    let mut open = pod.talks_tcp_within_ttl("shop.test", (server(10), 443));
    assert!(agent.stop().success());
    eventually("the address has expired", || {
        holds(pod.connect_tcp((server(10), 443), SHORT).is_err())
    });

    lab.write_pod(&pod, &[("allow", "shop.test:443 other.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    let denied = agent.denies_tcp(&pod, (server(10), 443), "expired");
    assert_eq!(denied.dst_names, ["shop.test"]);
    agent.applies_policy_after(&pod, || {
        lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    });
    agent.denies_tcp(&pod, (server(10), 443), "expired");
    assert!(
        exchange(&mut open, b"still here", DEADLINE),
        "the open connection was cut"
    );
}

#[test]
fn after_a_restart_a_port_of_an_expired_name_is_closed_on_a_shared_address() {
    let lab = Lab::builder().exact_lifetimes().build();
    let _web = [443, 444].map(|port| lab.serve_tcp(port));
    lab.dns().answer("brief.test", [address(server(10)).ttl(1)]);
    lab.dns()
        .answer("long.test", [address(server(10)).ttl(900)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "brief.test:443 long.test:444")]);
    let mut agent = lab.start_agent_with(&["--keep-enforcing"], &[&pod]);
    pod.lookup("brief.test");
    pod.lookup("long.test");
    pod.talks_tcp((server(10), 444));
    // The kernel knows no names, so it would keep the port open for the lifetime of the other name.
    agent.kill();

    let agent = lab.start_agent(&[&pod]);
    eventually("the port of the expired name is closed", || {
        holds(pod.connect_tcp((server(10), 443), SHORT).is_err())
    });
    agent.denies_tcp(&pod, (server(10), 443), "port_not_allowed");
    pod.talks_tcp((server(10), 444));
}

#[test]
fn a_restarted_agent_shows_the_names_that_an_earlier_one_learned() {
    let mut scene = Scene::new();
    scene.restart(|_, _| ());
    let status = scene.shop.lab.status_of(&scene.shop.pod);
    assert_eq!(status["resolved"][0]["name"], "shop.test", "{status}");
    let (code, explained) = scene.shop.lab.explain(&scene.shop.pod, "203.0.113.10:443");
    assert_eq!(code, 0, "{explained}");
    assert_eq!(explained["addresses"][0]["names"][0], "shop.test");
    let (code, explained) = scene.shop.lab.explain(&scene.shop.pod, "shop.test:443");
    assert_eq!(code, 0, "{explained}");
    assert_eq!(explained["addresses"][0]["address"], "203.0.113.10");
}

#[test]
fn only_names_beyond_the_limit_are_lost_at_a_restart() {
    let lab = Lab::builder()
        .config("limits.addressesPerPod", 4)
        .config("http", HTTP)
        .build();
    let _web = lab.serve_tcp(443);
    let names: Vec<String> = (0..8).map(|n| format!("n{n}.first.test")).collect();
    for name in &names {
        lab.dns().addresses(name, &[server(10)]);
    }
    lab.dns().addresses("late.test", &[server(20)]);
    let pod = lab.pod("shop", "cart");
    let allow = "*.first.test:443 late.test:443";
    lab.write_pod(&pod, &[("allow", allow)]);
    let mut agent = lab.start_agent_with(&["--keep-enforcing"], &[&pod]);
    for name in &names {
        assert_eq!(pod.lookup(name), [server(10)]);
    }
    wait_names_kept(&lab, &pod, 8);
    // The response is delivered, and its address is allowed.
    assert_eq!(pod.lookup("late.test"), [server(20)]);
    let mut opens = [10, 20].map(|host| pod.talks_tcp((server(host), 443)));
    agent.wait_log("that a name is not kept", |line| {
        line.contains("shop/cart") && line.contains("map of names is full")
    });
    eventually("the name is counted", || {
        holds(lab.metrics().get("egress_agent_names_not_kept_total") >= 1.0)
    });
    assert!(agent.stop().success());

    // Addresses without known names stay allowed as long as the names in the policy mean the same.
    let agent = lab.start_agent_with(&["--keep-enforcing"], &[&pod]);
    agent.applies_policy_after(&pod, || {
        let wide = format!("{allow} {}:443", numbered(1));
        lab.write_pod(&pod, &[("allow", &wide)]);
    });
    for open in &mut opens {
        assert!(
            exchange(open, b"still here", DEADLINE),
            "the connection was cut"
        );
    }
    // Otherwise the agent cannot tell whether the address is allowed.
    agent.applies_policy_after(&pod, || {
        let more = format!("{allow} more.test:443");
        lab.write_pod(&pod, &[("allow", &more)]);
    });
    let [first, late] = &mut opens;
    assert!(
        exchange(first, b"still here", DEADLINE),
        "the connection was cut"
    );
    assert!(
        !exchange(late, b"after", SHORT),
        "an address without a known name is still allowed"
    );
    agent.wait_log("that the address was not carried over", |line| {
        line.contains("shop/cart") && line.contains("addresses=1")
    });
}

#[test]
fn addresses_without_kept_names_stay_allowed_until_the_names_in_the_policy_change() {
    let mut scene = Scene::new();
    scene.restart(|lab, pod| {
        let names = lab.allow_pin(pod).with_file_name("names");
        std::fs::remove_file(names).expect("remove the pin");
    });
    scene.assert_unaffected();
    let wide = format!("shop.test:443 {}:443", numbered(1));
    scene.edit(&wide);
    scene.assert_unaffected();
    let more = format!("{wide} more.test:443");
    scene.restart(|lab, pod| lab.write_pod(pod, &[("allow", &more)]));
    scene.assert_cut();
    scene
        .shop
        .agent
        .wait_log("that the address was not carried over", |line| {
            line.contains("shop/cart") && line.contains("addresses=1")
        });
    assert_eq!(scene.shop.pod.lookup("shop.test"), [server(10)]);
    scene.shop.pod.talks_tcp((server(10), 443));
    wait_names_kept(&scene.shop.lab, &scene.shop.pod, 1);
}

#[test]
fn a_change_that_affects_no_verdict_of_a_pod_keeps_its_policy() {
    let mut scene = Scene::new();
    let policy = scene.policy();
    scene.restart(|_, _| ());
    scene.shop.lab.edit_config(
        "dns.resolvers",
        [RESOLVER, RESOLVER6, STRANGER]
            .map(|ip| ip.to_string())
            .to_vec(),
    );
    scene.shop.agent.reload();
    // When this pod is enforced, the new resolvers are in use.
    let another = scene.shop.lab.pod("shop", "another");
    scene
        .shop
        .lab
        .write_pod(&another, &[("allow", "shop.test")]);
    scene.shop.agent.wait_enforcing(&another);
    assert_eq!(scene.policy(), policy, "the pod has another policy");
    scene.assert_unaffected();
    // Messages to the new resolver are held and judged.
    let asked = scene
        .shop
        .pod
        .resolve_at(STRANGER, "other.test", RecordType::A);
    assert_eq!(asked.code, ResponseCode::NXDomain);
    assert_eq!(scene.shop.lab.dns().queries_for("other.test"), 0);
}
