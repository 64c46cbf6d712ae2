//! Machines that lack something, and agents that are terminated while they are busy.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    process::{Command, Output, Stdio},
};

use egress_tests::{Agent, Lab, Pod, SHORT, addresses::server, bpf::bpftool, eventually, holds};
use nix::mount::{MntFlags, umount2};
use serde_json::json;

/// Runs the agent without these capabilities, with pods from `source`, until it exits.
#[track_caller]
fn run_without(lab: &Lab, capabilities: &str, source: [&OsStr; 2]) -> Output {
    let mut command = Command::new("setpriv");
    command
        .arg("--bounding-set")
        .arg(capabilities)
        .arg("--inh-caps")
        .arg(capabilities)
        .arg(Agent::program())
        .args(["run", "--config"])
        .arg(lab.config_file())
        .args(source)
        .env("NO_COLOR", "1")
        .stdin(Stdio::null());
    lab.node()
        .run(|| command.output())
        .expect("setpriv, of the package util-linux")
}

#[test]
fn missing_privileges_are_named() {
    let lab = Lab::builder().without_dns().build();
    let pods = lab.pods_dir();
    let directory: [&OsStr; 2] = ["--pods-dir".as_ref(), pods.as_os_str()];
    // The agent exits before it reads this file.
    let cluster: [&OsStr; 2] = ["--kubeconfig".as_ref(), "none.yaml".as_ref()];
    for (without, source, named) in [
        ("-bpf,-sys_admin", directory, "CAP_BPF"),
        ("-sys_admin", directory, "CAP_SYS_ADMIN"),
        ("-net_admin", directory, "CAP_NET_ADMIN"),
        ("-net_raw", directory, "CAP_NET_RAW"),
        ("-sys_ptrace", cluster, "CAP_SYS_PTRACE"),
    ] {
        let output = run_without(&lab, without, source);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{without}: {text}");
        assert!(
            text.contains(named) && text.contains("missing privileges"),
            "{without}: {text}"
        );
    }
    assert!(lab.all_pins().is_empty(), "{:?}", lab.all_pins());
}

#[test]
fn a_missing_bpffs_is_mounted() {
    let lab = Lab::new();
    umount2(&lab.bpffs(), MntFlags::MNT_DETACH).expect("umount(2) of the laboratory's bpffs");
    let _web = lab.serve_tcp(443);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "203.0.113.10:443")]);
    let mut agent = lab.start_agent(&[&pod]);
    assert!(agent.stderr().contains("mounted"), "{}", agent.stderr());
    pod.talks_tcp((server(10), 443));
    assert!(lab.allow_pin(&pod).exists());
    assert!(agent.stop().success());
}

#[test]
fn a_second_agent_on_the_same_pins_is_refused_and_harms_nothing() {
    let lab = Lab::new();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let _agent = lab.start_agent(&[&pod]);
    pod.lookup("shop.test");

    let mut second = lab.spawn_agent(&[]);
    assert_eq!(second.wait_end().code(), Some(1));
    let text = second.stderr();
    assert!(text.contains("another egress-agent is running"), "{text}");

    let output = lab
        .node()
        .run(|| lab.agent_command("cleanup").output())
        .expect("the agent's program runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("another egress-agent is running"), "{text}");

    pod.lookup("shop.test");
    pod.talks_tcp((server(10), 443));
    assert!(pod.connect_tcp((server(99), 443), SHORT).is_err());
}

/// The number of pods besides the one that the test uses.
const CROWD: usize = 100;

/// Interfaces and manifests of many pods in the namespace `shop`, in one file.
#[track_caller]
fn crowd(lab: &Lab) {
    let script = (0..CROWD).fold(String::new(), |mut script, n| {
        let _ = writeln!(
            script,
            "link add crowd{n} up type veth peer name crowded{n}"
        );
        script
    });
    let file = lab.directory().join("links");
    std::fs::write(&file, script).expect("write a file");
    let mut command = Command::new("ip");
    command.arg("-batch").arg(file);
    let status = lab.node().run(|| command.status()).expect("ip runs");
    assert!(status.success());
    let pods: Vec<_> = (0..CROWD)
        .map(|n| {
            json!({
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "namespace": "shop",
                    "name": format!("crowd-{n}"),
                    "annotations": { "egress-agent.dev/interface": format!("crowd{n}") },
                },
                "status": { "podIPs": [{ "ip": format!("10.2.0.{n}") }] },
            })
        })
        .collect();
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": pods });
    lab.write_file("crowd.json", list.to_string().as_bytes());
}

/// The number of pods of the crowd that have a log line with this text.
fn logged_pods_of_crowd(agent: &Agent, what: &str, from: usize) -> usize {
    let text = agent.stderr();
    let of = |line: &str| {
        let at = line.find("pod=shop/crowd-")?;
        line[at..].split_whitespace().next().map(str::to_owned)
    };
    let pods: std::collections::BTreeSet<String> = text
        .lines()
        .skip(from)
        .filter(|line| line.contains(what))
        .filter_map(of)
        .collect();
    pods.len()
}

fn lines(agent: &Agent) -> usize {
    agent.stderr().lines().count()
}

#[track_caller]
fn scene_with_crowd() -> (Lab, Pod, Agent) {
    let lab = Lab::new();
    lab.dns().addresses("shop.test", &[server(10)]);
    lab.dns().addresses("later.test", &[server(20)]);
    let pod = lab.pod("shop", "cart");
    crowd(&lab);
    lab.write_namespace("shop", &[("allow", "shop.test:443")]);
    lab.write_pod(&pod, &[]);
    let agent = lab.start_agent(&[&pod]);
    assert_eq!(logged_pods_of_crowd(&agent, "enforcing", 0), CROWD);
    (lab, pod, agent)
}

#[test]
fn an_edit_of_a_namespace_applies_to_every_pod_in_it() {
    let (lab, pod, mut agent) = scene_with_crowd();
    let _web = lab.serve_tcp(443);
    pod.lookup("shop.test");
    let from = lines(&agent);
    lab.write_namespace("shop", &[("allow", "later.test:443 203.0.113.99")]);
    eventually("every pod has the new policy", || {
        holds(logged_pods_of_crowd(&agent, "policy applied", from) == CROWD)
    });
    agent.wait_log("that the test's pod has it too", |line| {
        line.contains("policy applied") && line.contains("pod=shop/cart")
    });
    pod.lookup("later.test");
    pod.talks_tcp((server(20), 443));
    pod.talks_tcp((server(99), 443));
    assert!(pod.connect_tcp((server(10), 443), SHORT).is_err());
    assert!(agent.stop().success());
    assert!(!lab.pins().exists());
}

#[test]
fn an_agent_terminated_while_it_is_busy_leaves_nothing_behind() {
    let (lab, pod, mut agent) = scene_with_crowd();
    let _web = lab.serve_tcp(443);
    let from = lines(&agent);
    // Attaching takes time, and without a policy there is nothing to attach.
    lab.remove_namespace("shop");
    eventually("every pod is removed", || {
        holds(logged_pods_of_crowd(&agent, "removed", from) == CROWD)
    });
    eventually("it ends before it has attached to all pods", || {
        let from = lines(&agent);
        lab.write_namespace("shop", &[("allow", "later.test:443")]);
        eventually("the agent is busy", || {
            holds(logged_pods_of_crowd(&agent, "enforcing", from) > 0)
        });
        assert!(agent.stop().success());
        assert!(!lab.pins().exists());
        let enforced = logged_pods_of_crowd(&agent, "enforcing", from);
        if enforced == CROWD {
            // It was faster than this test.
            lab.remove_namespace("shop");
            agent = lab.start_agent(&[]);
        }
        holds(enforced < CROWD)
    });
    pod.talks_tcp((server(99), 443));
}

#[test]
fn a_pod_that_cannot_be_enforced_neither_delays_others_nor_leaves_anything_behind() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("shop.test", &[server(10)]);
    let [first, bad, last] = ["a", "bad", "z"].map(|name| lab.pod("shop", name));
    for pod in [&first, &bad, &last] {
        lab.write_pod(pod, &[]);
    }
    let agent = lab.start_agent(&[]);
    // An obstacle at the path where the pod's maps are pinned.
    let obstacle = lab.pins().join("pods/shop_bad");
    let [pin, at] = [&lab.pins().join("interfaces"), &obstacle]
        .map(|path| path.to_str().expect("a path in UTF-8").to_owned());
    bpftool(&["map", "pin", "pinned", &pin, &at]);
    lab.write_namespace("shop", &[("allow", "shop.test:443 192.0.2.0/24")]);
    for pod in [&first, &last] {
        agent.wait_enforcing(pod);
        assert_eq!(pod.lookup("shop.test"), [server(10)]);
        pod.talks_tcp((server(10), 443));
        assert!(pod.connect_tcp((server(99), 443), SHORT).is_err());
    }
    agent.wait_log("why the other is not enforced", |line| {
        line.contains("about=shop/bad") && line.contains("cannot remove")
    });
    bad.talks_tcp((server(99), 443));
    // Each reconciliation is an attempt.
    for n in 0..10 {
        lab.write_file(&format!("note{n}.yaml"), b"# nothing\n");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    for map in ["policies", "allow", "cidrs", "flows"] {
        eventually(&format!("attempts leave nothing in {map}"), || {
            holds(lab.shared_entries(map).len() == 2)
        });
    }

    std::fs::remove_file(&obstacle).expect("the obstacle is still there");
    agent.wait_enforcing(&bad);
    assert!(bad.connect_tcp((server(99), 443), SHORT).is_err());
    assert_eq!(bad.lookup("shop.test"), [server(10)]);
    lab.remove_namespace("shop");
    for map in ["policies", "allow", "cidrs", "flows", "identities"] {
        eventually(&format!("nothing is left in {map}"), || {
            holds(lab.shared_entries(map).is_empty())
        });
    }
    bad.talks_tcp((server(99), 443));
}
