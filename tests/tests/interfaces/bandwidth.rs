//! The real CNI plugin `bandwidth` beside the agent: both work, whichever comes first.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use egress_tests::{
    Agent, Cluster, ClusterPod, Pod, SHORT, addresses::server, cluster::allow, eventually, holds,
    observed::HTTP,
};
use serde_json::{Value, json};

/// The path in distributions' packages.
const PLUGIN: &str = "/usr/lib/cni/bandwidth";

/// Adds the plugin's limits to a pod's interface, as a container runtime does. Returns the plugin's output
/// when it fails.
fn limit(cluster: &Cluster, net: &Pod) -> Result<(), String> {
    let limits = json!({
        "cniVersion": "0.4.0",
        "name": "laboratory",
        "type": "bandwidth",
        "ingressRate": 100_000_000,
        "ingressBurst": 80_000_000,
        "egressRate": 100_000_000,
        "egressBurst": 80_000_000,
        "prevResult": {
            "cniVersion": "0.4.0",
            "interfaces": [
                { "name": net.interface() },
                { "name": "eth0", "sandbox": sandbox(net) },
            ],
            "ips": [],
        },
    });
    let mut command = Command::new(PLUGIN);
    command
        .env("CNI_COMMAND", "ADD")
        .env("CNI_CONTAINERID", net.netns().name())
        .env("CNI_NETNS", sandbox(net))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", Path::new(PLUGIN).parent().expect("a directory"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = cluster.lab.node().run(|| command.spawn());
    let mut child = child.expect("the CNI plugin, of the package containernetworking-plugins");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    stdin
        .write_all(limits.to_string().as_bytes())
        .expect("the plugin reads its configuration");
    drop(stdin);
    let output = child.wait_with_output().expect("the plugin ends");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    output.status.success().then_some(()).ok_or(text)
}

fn sandbox(net: &Pod) -> String {
    format!("/run/netns/{}", net.netns().name())
}

/// The number of packets that the plugin's ifb device has sent on: it carries all that the pod sends.
#[track_caller]
fn limited_packets(cluster: &Cluster) -> u64 {
    let mut command = Command::new("ip");
    command.args(["-json", "-statistics", "link", "show", "type", "ifb"]);
    let output = cluster
        .lab
        .node()
        .run(|| command.output())
        .expect("ip runs");
    let shown: Value = serde_json::from_slice(&output.stdout).expect("ip prints JSON");
    let devices = shown.as_array().into_iter().flatten();
    devices
        .filter_map(|device| device["stats64"]["tx"]["packets"].as_u64())
        .sum()
}

#[track_caller]
fn cluster() -> (Cluster, String) {
    let lab = egress_tests::Lab::builder().config("http", HTTP);
    let cluster = Cluster::on(egress_tests::ApiServer::shared(), lab);
    cluster.lab.dns().addresses("shop.test", &[server(10)]);
    let shop = cluster.namespace("shop", &Value::Null);
    (cluster, shop)
}

#[track_caller]
fn start_agent(cluster: &Cluster, attach: &str) -> Agent {
    cluster.start_agent_with(&["--attach", attach])
}

#[track_caller]
fn run(cluster: &Cluster, shop: &str, net: Pod, annotations: &Value) -> ClusterPod {
    let (object, uid) = cluster.create(shop, net.name(), annotations);
    let mut pod = cluster.pod_without_processes(object, &uid, net);
    pod.running().start_container();
    pod
}

/// Waits for two complete reconciliations.
#[track_caller]
fn wait_reconciled_twice(cluster: &Cluster) {
    let looks = || {
        cluster
            .lab
            .metrics()
            .find("egress_agent_reconcile_seconds_count")
    };
    let before = looks();
    eventually("the agent has reconciled twice", || {
        holds(looks() >= before + 2.0)
    });
}

#[track_caller]
fn assert_enforced_and_limited(cluster: &Cluster, agent: &Agent, pod: &ClusterPod) {
    let net = pod.net();
    agent.wait_enforcing(net);
    cluster.set_addresses(pod);
    eventually("the allowed address is reached", || {
        holds(
            net.connect_tcp((server(10), 443), SHORT).is_ok() || {
                net.lookup("shop.test");
                false
            },
        )
    });
    let before = limited_packets(cluster);
    net.talks_tcp((server(10), 443));
    assert!(limited_packets(cluster) > before, "the limit is gone");
    assert!(net.connect_tcp((server(99), 443), SHORT).is_err());
    agent.wait_denial("the address", |denial| {
        denial.is(net, "address_not_learned", server(99), 443)
    });
    agent.denies_name(net, "evil.test");
    assert!(limited_packets(cluster) > before);
}

#[test]
fn a_pod_with_a_limit_starts_and_is_enforced_and_limited() {
    for attach in ["tcx", "clsact"] {
        check_limited_pod(attach);
    }
}

#[track_caller]
fn check_limited_pod(attach: &str) {
    let (cluster, shop) = cluster();
    let _web = cluster.lab.serve_tcp(443);
    let agent = start_agent(&cluster, attach);
    for (name, annotations) in [("cart", allow("shop.test:443")), ("free", Value::Null)] {
        let net = cluster.lab.pod(&shop, name);
        // The interface exists, and the remaining plugins of the chain have not run yet.
        wait_reconciled_twice(&cluster);
        if let Err(text) = limit(&cluster, &net) {
            panic!("the pod does not start: {text}");
        }
        let pod = run(&cluster, &shop, net, &annotations);
        if annotations.is_null() {
            let before = limited_packets(&cluster);
            eventually("the pod is not enforced", || {
                holds(pod.net().connect_tcp((server(99), 443), SHORT).is_ok())
            });
            assert!(limited_packets(&cluster) > before, "the limit is gone");
        } else {
            assert_enforced_and_limited(&cluster, &agent, &pod);
            // The kernel removes the limit with the interface.
            cluster.delete(pod);
        }
    }
}

#[test]
fn programs_that_plugins_run_in_the_namespace_do_not_count_as_the_pods() {
    let (cluster, shop) = cluster();
    let _web = cluster.lab.serve_tcp(443);
    let agent = start_agent(&cluster, "clsact");
    let net = cluster.lab.pod(&shop, "cart");
    // At every moment, so at each reconciliation, one such program runs.
    for _ in 0..60 {
        let mut program = Command::new("sleep");
        program.arg("0.02");
        let status = net.netns().run(|| program.status());
        assert!(status.expect("sleep runs").success());
    }
    limit(&cluster, &net).expect("the interface was left alone");
    let pod = run(&cluster, &shop, net, &allow("shop.test:443"));
    assert_enforced_and_limited(&cluster, &agent, &pod);
}

#[test]
fn a_pod_with_a_limit_older_than_the_agent_is_enforced_and_limited() {
    let (cluster, shop) = cluster();
    let _web = cluster.lab.serve_tcp(443);
    let net = cluster.lab.pod(&shop, "cart");
    limit(&cluster, &net).expect("the plugin adds its qdisc");
    let pod = run(&cluster, &shop, net, &allow("shop.test:443"));
    let mut agent = start_agent(&cluster, "clsact");
    assert_enforced_and_limited(&cluster, &agent, &pod);
    // The next agent finds the same state.
    agent.kill();
    let agent = start_agent(&cluster, "clsact");
    assert_enforced_and_limited(&cluster, &agent, &pod);
}

#[test]
fn an_interface_with_a_process_but_no_known_pod_is_closed() {
    let (cluster, shop) = cluster();
    let _web = cluster.lab.serve_tcp(443);
    let agent = start_agent(&cluster, "clsact");
    let net = cluster.lab.pod(&shop, "nobody");
    let _program = net.start(&mut egress_tests::node::pause());
    agent.wait_quarantined(net.interface());
    assert!(net.connect_tcp((server(99), 443), SHORT).is_err());
    agent.wait_denial("pod_unknown", |denial| {
        denial.reason == "pod_unknown" && denial.pod == net.interface()
    });
}
