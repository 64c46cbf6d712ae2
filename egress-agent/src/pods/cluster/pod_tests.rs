use serde_json::{Value, json};

use super::*;

fn read(pod: Value) -> ClusterPod {
    ClusterPod::read(serde_json::from_value(pod).unwrap()).unwrap()
}

/// A pod `shop/cart` with more metadata.
fn cart(metadata: Value, spec: Value) -> Value {
    let mut pod = json!({
        "metadata": { "namespace": "shop", "name": "cart", "uid": "11111111-2222" },
        "spec": { "nodeName": "node-1", "containers": [{ "name": "main" }] },
        "status": { "phase": "Running", "podIPs": [{ "ip": "10.1.0.7" }, { "ip": "fd00:1::7" }] },
    });
    for (key, more) in [("metadata", metadata), ("spec", spec)] {
        for (name, value) in more.as_object().unwrap() {
            pod[key][name] = value.clone();
        }
    }
    pod
}

fn with_annotation(key: &str, value: &str) -> ClusterPod {
    read(cart(json!({ "annotations": { key: value } }), json!({})))
}

fn addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn only_the_fields_that_the_agent_uses_are_kept() {
    let annotations = json!({ "egress-agent.dev/allow": "example.com", "other": "long" });
    let read = read(cart(json!({ "annotations": annotations }), json!({})));
    let pod = &read.pod;
    assert_eq!(
        (&*pod.namespace, &*pod.name, &*pod.uid),
        ("shop", "cart", "11111111-2222")
    );
    assert_eq!(pod.cgroup_uid.as_deref(), Some("11111111-2222"));
    assert_eq!(pod.addresses, addresses(&["10.1.0.7", "fd00:1::7"]));
    assert_eq!(
        pod.annotations.keys().collect::<Vec<_>>(),
        ["egress-agent.dev/allow"]
    );
    assert_eq!(pod.node_name.as_deref(), Some("node-1"));
    assert_eq!(pod.origin, "pod shop/cart");
    assert_eq!(pod.interface, None);
    assert!(read.messages.is_empty(), "{:?}", read.messages);
}

#[test]
fn a_pod_counts_until_it_has_ended() {
    for (phase, counts) in [
        ("Pending", true),
        ("Running", true),
        ("Unknown", true),
        ("Succeeded", false),
        ("Failed", false),
    ] {
        let mut pod = cart(
            json!({ "deletionTimestamp": "2026-01-01T00:00:00Z" }),
            json!({}),
        );
        pod["status"]["phase"] = phase.into();
        let read = ClusterPod::read(serde_json::from_value(pod).unwrap());
        assert_eq!(read.is_some(), counts, "{phase}");
    }
}

#[test]
fn a_pod_that_was_just_bound_has_no_address() {
    let mut pod = cart(json!({}), json!({}));
    pod.as_object_mut().unwrap().remove("status");
    assert!(read(pod).pod.addresses.is_empty());
}

#[test]
fn an_annotation_cannot_choose_the_interface() {
    let read = with_annotation("egress-agent.dev/interface", "veth0");
    assert_eq!(read.pod.interface, None);
    assert!(read.pod.annotations.is_empty());
    assert_eq!(read.messages.len(), 1);
    assert!(read.messages[0].contains("does not count"));
}

#[test]
fn addresses_of_further_networks_are_read_once_each() {
    let read = with_annotation(
        NETWORKS_ANNOTATION,
        r#"[{"name": "cni0", "default": true, "ips": ["10.1.0.7"]},
            {"name": "a", "interface": "net1", "ips": ["192.0.2.7", "2001:db8::7"]},
            {"name": "b", "interface": "net2", "ips": ["192.0.2.7"]},
            {"name": "c", "interface": "net3"}]"#,
    );
    assert_eq!(read.further, addresses(&["192.0.2.7", "2001:db8::7"]));
    assert!(read.messages.is_empty());
}

#[test]
fn a_network_status_that_cannot_be_read_adds_nothing() {
    for text in [
        "{",
        "[]x",
        r#"[{"ips": ["0.0.0.0"]}]"#,
        r#"[{"ips": ["127.0.0.1"]}]"#,
        r#"[{"ips": ["224.0.0.1"]}]"#,
        r#"[{"ips": ["192.0.2.0/24"]}]"#,
    ] {
        let read = with_annotation(NETWORKS_ANNOTATION, text);
        assert!(read.further.is_empty(), "{text}");
        assert_eq!(read.messages.len(), 1, "{text}");
    }
    let many: Vec<_> = (0..17).map(|n| format!("192.0.2.{n}")).collect();
    let read = with_annotation(NETWORKS_ANNOTATION, &json!([{ "ips": many }]).to_string());
    assert!(read.further.is_empty());
    assert!(read.messages[0].contains("the limit is 16"));
}

const STATIC_UID: &str = "0123456789abcdef0123456789abcdef";

fn mirror(uid: &str, owner: &Value) -> ClusterPod {
    read(cart(
        json!({
            "annotations": { MIRROR_ANNOTATION: uid, "kubernetes.io/config.hash": uid },
            "ownerReferences": [owner],
        }),
        json!({}),
    ))
}

fn node(uid: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": uid, "controller": true })
}

#[test]
fn a_static_pod_gets_the_uid_of_its_mirror() {
    let read = mirror(STATIC_UID, &node("node-uid"));
    assert_eq!(read.pod.cgroup_uid, None);
    let mirror = read.mirror.unwrap();
    assert_eq!(mirror.confirmed(Some("node-uid")), Ok(STATIC_UID));
    assert!(mirror.confirmed(None).is_err(), "the node is not known");
}

#[test]
fn a_pod_cannot_claim_to_be_a_mirror() {
    let owned_by_another = mirror(STATIC_UID, &node("guessed"));
    let owned_by_a_set = mirror(
        STATIC_UID,
        &json!({ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "cart", "uid": "node-uid" }),
    );
    let victim = mirror("11111111-2222-3333-4444-555555555555", &node("node-uid"));
    for read in [owned_by_another, owned_by_a_set, victim] {
        assert_eq!(read.pod.cgroup_uid, None);
        assert!(read.mirror.unwrap().confirmed(Some("node-uid")).is_err());
    }
}

#[test]
fn the_addresses_of_a_node_local_cache_are_in_its_arguments() {
    for (command, arguments, expected) in [
        (
            json!(null),
            json!(["-localip", "169.254.20.10,10.96.0.10"]),
            &["169.254.20.10", "10.96.0.10"][..],
        ),
        (
            json!(["/node-cache"]),
            json!(["--localip=fd00::a", "-conf", "x"]),
            &["fd00::a"],
        ),
        (
            json!(["/node-cache", "-localip", "169.254.20.10"]),
            json!(null),
            &["169.254.20.10"],
        ),
        (json!(null), json!(["-localip"]), &[]),
        (json!(null), json!(["-localips", "169.254.20.10"]), &[]),
        (
            json!(null),
            json!(["-localip", "0.0.0.0,__PILLAR__LOCAL__DNS__"]),
            &[],
        ),
    ] {
        let containers = json!([{ "name": "a", "command": command, "args": arguments }]);
        let labels = json!({ "labels": { "k8s-app": "node-local-dns" } });
        let labelled = read(cart(labels, json!({ "containers": containers })));
        assert_eq!(labelled.local_dns, addresses(expected), "{arguments}");
        let other = read(cart(json!({}), json!({ "containers": containers })));
        assert!(other.local_dns.is_empty(), "without the label");
    }
}
