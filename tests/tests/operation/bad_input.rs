//! Bad input gets a clear error, and harms no other pod.

use std::{fs, net::IpAddr, process::Command};

use egress_tests::{
    Agent, Lab, Pod, SHORT, TcpEcho,
    addresses::server,
    dns::{RecordType, ResponseCode},
};

/// A laboratory with a pod that may reach `shop.test`; the tests check that it stays so.
struct Scene {
    pod: Pod,
    _web: TcpEcho,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::new();
        let web = lab.serve_tcp(443);
        lab.dns().addresses("shop.test", &[server(10)]);
        lab.dns().addresses("evil.test", &[server(66)]);
        let pod = lab.pod("shop", "fine");
        lab.write_pod(&pod, &[("allow", "shop.test:443")]);
        Self {
            lab,
            pod,
            _web: web,
        }
    }
}

/// Runs `egress-agent check` on these files; returns its exit status and its output.
#[track_caller]
fn check(lab: &Lab, files: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(Agent::program());
    command
        .arg("check")
        .args(files.iter().map(|file| lab.pods_dir().join(file)));
    let output = command.output().expect("the agent's program runs");
    let printed = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&printed).into_owned(),
    )
}

#[test]
fn a_file_that_is_not_yaml_harms_no_pod() {
    let scene = Scene::new();
    scene
        .lab
        .write_file("broken.yaml", b"apiVersion: v1\nkind: [Pod\n");
    scene
        .lab
        .write_file("binary.yaml", &[0xff, 0xfe, 0x00, 0x80]);
    let agent = scene.lab.start_agent(&[&scene.pod]);
    agent.wait_log("which file cannot be read", |line| {
        line.contains("broken.yaml")
    });
    agent.wait_log("which file cannot be read", |line| {
        line.contains("binary.yaml")
    });
    scene.pod.reaches_only_shop();
}

#[test]
fn a_pod_whose_file_is_damaged_keeps_its_last_good_policy() {
    let scene = Scene::new();
    let agent = scene.lab.start_agent(&[&scene.pod]);
    let file = scene.lab.pod_file(&scene.pod);
    agent.logs_after(
        "which file cannot be read",
        || scene.lab.write_file(&file, b"{{{ not YAML"),
        |line| line.contains(&file),
    );
    scene.pod.reaches_only_shop();
    agent.applies_policy_after(&scene.pod, || {
        scene
            .lab
            .write_pod(&scene.pod, &[("allow", "shop.test:443 evil.test:443")]);
    });
    assert_eq!(
        scene.pod.lookup("evil.test"),
        [server(66)],
        "the repaired file is not applied"
    );
}

#[test]
fn a_pod_without_an_interface_is_named_and_harms_no_other() {
    let scene = Scene::new();
    let homeless = scene.lab.pod("shop", "homeless");
    scene
        .lab
        .write_pod_on(&homeless, None, &[("allow", "shop.test:443")]);
    let agent = scene.lab.start_agent(&[&scene.pod]);
    agent.wait_log("which pod has no interface", |line| {
        line.contains("shop/homeless") && line.contains("interface")
    });
    scene.pod.reaches_only_shop();
}

#[test]
fn an_interface_that_appears_later_is_enforced() {
    let scene = Scene::new();
    let late = scene.lab.pod_without_interface("shop", "late");
    scene.lab.write_pod(&late, &[("allow", "shop.test:443")]);
    let agent = scene.lab.start_agent(&[&scene.pod]);
    agent.wait_log("which interface is missing", |line| {
        line.contains(late.interface())
    });
    scene.pod.reaches_only_shop();

    scene.lab.add_interface(&late);
    agent.wait_enforcing(&late);
    agent.denies_tcp(&late, (server(99), 443), "address_not_learned");
    assert_eq!(late.lookup("shop.test"), [server(10)]);
    late.talks_tcp((server(10), 443));
}

#[test]
fn a_pod_cannot_claim_another_pods_interface() {
    let scene = Scene::new();
    let agent = scene.lab.start_agent(&[&scene.pod]);
    let thief = scene.lab.pod("shop", "thief");
    let interface = scene.pod.interface();
    agent.logs_after(
        "which pods name one interface",
        || {
            scene
                .lab
                .write_pod_on(&thief, Some(interface), &[("allow", "*")]);
        },
        |line| line.contains(interface) && line.contains("shop/thief"),
    );
    scene.pod.reaches_only_shop();
}

#[test]
fn a_new_pod_with_an_unreadable_annotation_is_closed() {
    let scene = Scene::new();
    let broken = scene.lab.pod("shop", "broken");
    scene
        .lab
        .write_pod(&broken, &[("allow", "shop.test:443\nshop.test:99999")]);
    let agent = scene.lab.start_agent(&[&scene.pod, &broken]);
    let printed = agent.wait_log("what cannot be read, and where", |line| {
        line.contains("shop/broken") && line.contains("egress-agent.dev/allow")
    });
    assert!(
        printed.contains("99999"),
        "the line does not name the value: {printed}"
    );
    let denial = agent.denies_tcp(&broken, (server(10), 443), "policy_unreadable");
    let policy = &denial.line["policy"];
    assert_eq!(
        (&policy["kind"], &policy["name"]),
        (&"Pod".into(), &"broken".into()),
        "{}",
        denial.text
    );
    assert_ne!(
        broken.resolve("shop.test", RecordType::A).code,
        ResponseCode::NoError
    );
    scene.pod.reaches_only_shop();

    // The repaired policy applies at once.
    agent.applies_policy_after(&broken, || {
        scene.lab.write_pod(&broken, &[("allow", "shop.test:443")]);
    });
    assert_eq!(broken.lookup("shop.test"), [server(10)]);
    broken.talks_tcp((server(10), 443));
}

#[test]
fn a_running_pod_whose_annotation_becomes_unreadable_keeps_its_last_good_policy() {
    let scene = Scene::new();
    let agent = scene.lab.start_agent(&[&scene.pod]);
    scene.pod.reaches_only_shop();
    agent.logs_after(
        "what cannot be read, and where",
        || {
            scene
                .lab
                .write_pod(&scene.pod, &[("allow", "evil.test:443 300.1.2.3/99")]);
        },
        |line| line.contains("shop/fine") && line.contains("egress-agent.dev/allow"),
    );
    scene.pod.reaches_only_shop();
}

#[test]
fn an_unreadable_mode_is_an_error_too() {
    let scene = Scene::new();
    let agent = scene.lab.start_agent(&[&scene.pod]);
    let printed = agent.logs_after(
        "what cannot be read",
        || {
            scene
                .lab
                .write_pod(&scene.pod, &[("allow", "shop.test:443"), ("mode", "offf")]);
        },
        |line| line.contains("shop/fine") && line.contains("egress-agent.dev/mode"),
    );
    assert!(printed.contains("offf"), "{printed}");
    scene.pod.reaches_only_shop();
}

#[test]
fn a_policy_over_a_limit_is_an_error_and_is_not_truncated() {
    let scene = Scene::new();
    let large = scene.lab.pod("shop", "large");
    let entries: Vec<_> = (0..129)
        .map(|n| format!("shop.test:{}", 400 + n * 2))
        .collect();
    scene
        .lab
        .write_pod(&large, &[("allow", &entries.join("\n"))]);
    let agent = scene.lab.start_agent(&[&scene.pod, &large]);
    let printed = agent.wait_log("which limit", |line| {
        line.contains("shop/large") && line.contains("the limit is 128")
    });
    assert!(!printed.is_empty());
    agent.denies_tcp(&large, (server(10), 400), "policy_unreadable");
    scene.pod.reaches_only_shop();
}

#[test]
fn an_invalid_configuration_is_refused_with_the_key() {
    for (key, value, expected) in [
        ("dns.resolvers", "10.0.0.300", "10.0.0.300"),
        ("dns.minTtl", "soon", "minTtl"),
        ("defaultMode", "enforced", "defaultMode"),
        ("dns.resolverz", "10.99.0.53", "resolverz"),
        ("onDeny", "shout", "onDeny"),
    ] {
        let value = match key {
            "dns.resolvers" => serde_json::json!([value]),
            _ => serde_json::json!(value),
        };
        let lab = Lab::builder().without_dns().config(key, value).build();
        let mut agent = lab.spawn_agent(&[]);
        assert!(!agent.wait_end().success(), "{key}");
        let printed = agent.stderr();
        assert!(
            printed.contains(expected),
            "{key}: it does not name {expected}: {printed}"
        );
        assert!(
            printed.contains("config.yaml"),
            "{key}: it does not name the file: {printed}"
        );
    }
}

#[test]
fn a_configuration_without_resolvers_is_refused() {
    let lab = Lab::new();
    fs::write(lab.config_file(), "node: n1\n").expect("write a configuration");
    let mut agent = lab.spawn_agent(&[]);
    assert!(!agent.wait_end().success());
    assert!(agent.stderr().contains("resolvers"), "{}", agent.stderr());
}

#[test]
fn check_explains_a_manifest_or_locates_its_error() {
    let lab = Lab::builder().without_dns().build();
    let (good, bad) = (lab.pod("shop", "good"), lab.pod("shop", "bad"));
    lab.write_pod(&good, &[("allow", "shop.test:443 203.0.113.0/24:22/tcp")]);
    lab.write_pod(&bad, &[("allow", "shop.test:443\nshop.test:none")]);
    let (code, printed) = check(&lab, &[&lab.pod_file(&good)]);
    assert_eq!(code, Some(0), "{printed}");
    for expected in ["shop/good", "shop.test", "203.0.113.0/24", "443", "22"] {
        assert!(
            printed.contains(expected),
            "{expected} is missing: {printed}"
        );
    }
    let (code, printed) = check(&lab, &[&lab.pod_file(&good), &lab.pod_file(&bad)]);
    assert_eq!(code, Some(1), "{printed}");
    for expected in ["shop/bad", "egress-agent.dev/allow", "none"] {
        assert!(
            printed.contains(expected),
            "{expected} is missing: {printed}"
        );
    }
    let (code, printed) = check(&lab, &["missing.yaml"]);
    assert_eq!(code, Some(1), "{printed}");
    assert!(printed.contains("missing.yaml"), "{printed}");
}

#[test]
fn each_problem_of_a_checked_manifest_has_its_line_and_carets_under_it() {
    let lab = Lab::builder().without_dns().build();
    let bad = lab.pod("shop", "bad");
    let allow = "shop.test:443\n\tshop.test:none # a comment\nbücher.test:443, 日本.test:0";
    lab.write_pod(&bad, &[("allow", allow), ("mode", "offf")]);
    let file = lab.pod_file(&bad);
    let (code, printed) = check(&lab, &[&file]);
    assert_eq!(code, Some(1), "{printed}");
    let about = format!("{}:1: shop/bad", lab.pods_dir().join(file).display());
    let expected = format!(
        "\
{about}: pod annotation egress-agent.dev/allow, line 2, column 12: `none` is not a port: expected a number \
from 1 to 65535, or a range such as 8000-8100
  2 |     shop.test:none # a comment
    |               ^^^^
{about}: pod annotation egress-agent.dev/allow, line 3, column 26: `0` is not a port: expected a number from 1 \
to 65535, or a range such as 8000-8100
  3 | bücher.test:443, 日本.test:0
    |                            ^
{about}: pod annotation egress-agent.dev/mode, line 1, column 1: `offf` is not a mode: expected enforce, audit or off
  1 | offf
    | ^^^^
"
    );
    assert_eq!(printed, expected);
}

#[test]
fn a_pod_with_long_names_and_no_uid_is_enforced() {
    let scene = Scene::new();
    let long = scene.lab.pod("shop", "long");
    let name = "a".repeat(60) + "." + &"b".repeat(60);
    write_manifest(&scene.lab, &long, &name, &[long.ipv4().into()]);
    let agent = scene.lab.start_agent(&[&scene.pod]);
    agent.wait_log("that the pod is enforced", |line| {
        line.contains("enforcing") && line.contains(&name)
    });
    assert!(
        long.connect_tcp((server(99), 443), SHORT).is_err(),
        "the pod is open"
    );
    scene.pod.reaches_only_shop();
}

#[test]
fn a_new_pod_with_more_addresses_than_are_supported_is_closed() {
    let scene = Scene::new();
    let many = scene.lab.pod("shop", "many");
    let addresses: Vec<IpAddr> = (1..=9).map(|n| IpAddr::from([10, 3, 0, n])).collect();
    write_manifest(&scene.lab, &many, "many", &addresses);
    let agent = scene.lab.start_agent(&[&scene.pod, &many]);
    agent.wait_log("how many there may be", |line| {
        line.contains("shop/many") && line.contains("at most 8")
    });
    assert!(
        many.connect_tcp((server(10), 443), SHORT).is_err(),
        "the pod is open"
    );
    scene.pod.reaches_only_shop();
}

/// Writes the manifest of a pod without a UID, under another name and with other addresses.
fn write_manifest(lab: &Lab, pod: &Pod, name: &str, addresses: &[IpAddr]) {
    let ips: Vec<_> = addresses
        .iter()
        .map(|ip| serde_json::json!({ "ip": ip }))
        .collect();
    let manifest = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "namespace": pod.namespace(),
            "name": name,
            "annotations": {
                "egress-agent.dev/interface": pod.interface(),
                "egress-agent.dev/allow": "shop.test:443",
            },
        },
        "status": { "podIPs": ips },
    });
    lab.write_file("other.json", manifest.to_string().as_bytes());
}

#[test]
fn no_text_of_a_policy_ends_the_agent() {
    let scene = Scene::new();
    let texts = ["[::/0!::fffe:0:0/96]", "10.0.0.0/8!€€:1/bad"];
    let pods: Vec<Pod> = texts
        .iter()
        .zip(["mapped", "cut"])
        .map(|(text, name)| {
            let pod = scene.lab.pod("shop", name);
            scene.lab.write_pod(&pod, &[("allow", text)]);
            pod
        })
        .collect();
    let agent = scene.lab.start_agent(&[&scene.pod, &pods[0], &pods[1]]);
    agent.denies_tcp(&pods[0], (server(10), 443), "no_rule");
    agent.denies_tcp(&pods[1], (server(10), 443), "policy_unreadable");
    assert_eq!(scene.pod.lookup("shop.test"), [server(10)]);
}

#[test]
fn short_texts_that_stand_for_many_entries_take_no_memory() {
    let scene = Scene::new();
    let names: Vec<String> = (0..400).map(|n| format!("n{n}.test")).collect();
    scene.lab.write_policy(&serde_json::json!({
        "apiVersion": "egress-agent.dev/v1alpha1",
        "kind": "EgressSet",
        "metadata": { "name": "s" },
        "spec": { "destinations": names },
    }));
    let list = |entry: &str| {
        let entries = (1..=20_000).map(|port| format!("{entry}:{port}"));
        entries.collect::<Vec<_>>().join(",")
    };
    let (sets, holes) = (list("@s"), list("[::/0!::1]"));
    let pods = [("sets", &sets), ("holes", &holes)].map(|(name, text)| {
        let pod = scene.lab.pod("shop", name);
        scene.lab.write_pod(&pod, &[("allow", text)]);
        pod
    });
    let agent = scene.lab.start_agent(&[&scene.pod, &pods[0], &pods[1]]);
    for (pod, name) in pods.iter().zip(["shop/sets", "shop/holes"]) {
        agent.wait_log("the limit", |line| {
            line.contains("more than 30000 entries") && line.contains(name)
        });
        agent.denies_tcp(pod, (server(10), 443), "policy_unreadable");
    }
    let highest = agent.memory_kib("VmHWM");
    assert!(highest < 300 * 1024, "the agent took {highest} KiB");
    assert_eq!(scene.pod.lookup("shop.test"), [server(10)]);
}
