use std::{fmt::Write, net::IpAddr};

use super::*;

fn read(text: &str) -> Manifests {
    Manifests::read("pods.yaml", text)
}

fn only_pod(text: &str) -> PodObject {
    let manifests = read(text);
    let [Object::Pod(pod)] = &manifests.objects[..] else {
        panic!("{manifests:?}")
    };
    PodObject::clone(pod)
}

fn problems(manifests: &Manifests) -> Vec<String> {
    manifests.problems.iter().map(ToString::to_string).collect()
}

const CART: &str = "\
apiVersion: v1
kind: Pod
metadata:
  name: cart
  namespace: shop
  uid: 7d9f
  labels: {app: cart}
  annotations:
    egress-agent.dev/interface: veth-cart
    egress-agent.dev/allow: |
      github.com:443
    egress-agent.dev/mode: off
    example.com/other: x
spec:
  nodeName: n1
  containers:
  - name: cart
    image: cart:1
status:
  podIPs:
  - ip: 10.1.2.3
  - ip: 2001:db8::3
";

#[test]
fn an_ordinary_pod_is_read() {
    let object = only_pod(CART);
    assert!(!object.incomplete);
    let pod = object.pod;
    assert_eq!(
        (&*pod.namespace, &*pod.name, &*pod.uid),
        ("shop", "cart", "7d9f")
    );
    assert_eq!(pod.interface.as_deref(), Some("veth-cart"));
    assert_eq!(
        pod.addresses,
        ["10.1.2.3", "2001:db8::3"].map(|ip| ip.parse::<IpAddr>().unwrap())
    );
    assert_eq!(pod.node_name.as_deref(), Some("n1"));
    assert!(!pod.host_network);
    let annotations: Vec<_> = pod.annotations.iter().map(|(k, v)| (&**k, &**v)).collect();
    assert_eq!(
        annotations,
        [
            ("egress-agent.dev/allow", "github.com:443\n"),
            ("egress-agent.dev/mode", "off")
        ]
    );
    assert_eq!(pod.origin, "pods.yaml:1");
    assert_eq!(problems(&read(CART)), Vec::<String>::new());
}

#[test]
fn a_json_manifest_gets_defaults_for_missing_fields() {
    let pod = only_pod(
        r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a.b"},
            "spec": {"hostNetwork": true, "containers": []}, "status": {"podIP": "10.0.0.1"}}"#,
    )
    .pod;
    assert_eq!((&*pod.namespace, &*pod.uid), ("default", "default/a.b"));
    assert!(pod.host_network);
    assert_eq!(pod.addresses, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
}

#[test]
fn the_items_of_a_list_are_read() {
    for kind in ["List", "PodList"] {
        let manifests = read(&format!(
            "apiVersion: v1\nkind: {kind}\nitems:\n\
             - {{apiVersion: v1, kind: Pod, metadata: {{name: one, annotations: \
                {{egress-agent.dev/interface: veth1, egress-agent.dev/mode: off}}}}}}\n\
             - {{apiVersion: v1, kind: Pod, metadata: {{name: 5}}}}\n\
             - {{apiVersion: v1, kind: Namespace, metadata: {{name: shop}}}}\n"
        ));
        let names: Vec<_> = manifests.objects.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["pod default/one", "namespace shop"]);
        let Object::Pod(one) = &manifests.objects[0] else {
            panic!()
        };
        assert_eq!(one.pod.annotations["egress-agent.dev/mode"], "off");
        assert_eq!(one.pod.origin, "pods.yaml:4");
        assert!(manifests.unreadable);
        let problems = problems(&manifests);
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].starts_with("pods.yaml:5: "), "{problems:?}");
    }
}

#[test]
fn the_items_of_a_pod_list_need_no_kind() {
    let manifests = read("apiVersion: v1\nkind: PodList\nitems:\n- metadata: {name: one}\n");
    assert_eq!(manifests.objects[0].to_string(), "pod default/one");
}

#[test]
fn an_error_names_its_place_and_leaves_the_other_documents_intact() {
    let text = format!("{CART}---\nkind: Pod\napiVersion: v1\nmetadata:\n  name: [\n---\n{CART}");
    let manifests = read(&text);
    assert_eq!(manifests.objects.len(), 2);
    assert!(manifests.unreadable);
    let lines = CART.lines().count();
    let problems = problems(&manifests);
    assert_eq!(problems.len(), 1, "{problems:?}");
    let line: usize = problems[0].split(':').nth(1).unwrap().parse().unwrap();
    assert!((lines + 5..=lines + 6).contains(&line), "{problems:?}");
    assert!(!problems[0].contains(" at line "), "{problems:?}");
    assert_eq!(
        manifests.objects[1].origin(),
        format!("pods.yaml:{}", lines + 7)
    );
}

#[test]
fn a_field_of_the_wrong_type_names_line_and_column() {
    let manifests = read("apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n  labels: [x]\n");
    assert!(manifests.unreadable && manifests.objects.is_empty());
    let problems = problems(&manifests);
    assert!(problems[0].starts_with("pods.yaml:5:"), "{problems:?}");
}

#[test]
fn text_that_is_not_a_mapping_in_yaml_is_an_error() {
    for text in [
        "\tx: {",
        "plain text",
        "[1, 2",
        "a: 1\na: 2\n",
        "- x\n",
        "\u{0}",
    ] {
        let manifests = read(text);
        assert!(manifests.unreadable, "{text:?}");
        assert_eq!(manifests.problems.len(), 1, "{text:?}");
        assert!(manifests.objects.is_empty());
    }
}

#[test]
fn other_kinds_are_ignored_and_reported() {
    let manifests = read("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n");
    assert!(!manifests.unreadable);
    assert_eq!(
        problems(&manifests),
        [
            "pods.yaml:1: ignored: kind apps/v1 Deployment; only v1 Pod, Namespace, List, \
             EgressPolicy, ClusterEgressPolicy, ClusterNetworkPolicy, EgressSet are read"
        ]
    );
}

#[test]
fn a_kind_that_is_missing_or_misspelt_is_an_error() {
    for text in [
        "apiVersion: v1\nmetadata: {name: x}\n",
        "kind: Pod\nmetadata: {name: x}\n",
        "apiVersion: v1\nkind: pod\nmetadata: {name: x}\n",
    ] {
        assert!(read(text).unreadable, "{text:?}");
    }
}

#[test]
fn names_are_checked() {
    for name in [
        "../../x",
        "Cart",
        "-a",
        "a-",
        "a..b",
        "''",
        "a_b",
        &"a".repeat(254),
    ] {
        let text = format!("apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n");
        assert!(read(&text).unreadable, "{name}");
        let text =
            format!("apiVersion: v1\nkind: Pod\nmetadata:\n  name: x\n  namespace: {name}\n");
        assert!(read(&text).unreadable, "{name}");
    }
    assert!(read("apiVersion: v1\nkind: Namespace\nmetadata: {name: a.b}\n").unreadable);
    assert!(read("apiVersion: v1\nkind: Pod\nmetadata: {}\n").unreadable);
}

#[test]
fn a_pod_without_an_interface_is_kept_and_reported() {
    let manifests = read("apiVersion: v1\nkind: Pod\nmetadata: {name: x}\n");
    assert_eq!(manifests.objects.len(), 1);
    assert!(!manifests.unreadable);
    assert!(problems(&manifests)[0].contains("there is nothing to enforce on; set the annotation"));
}

#[test]
fn an_invalid_address_or_interface_leaves_the_pod_incomplete() {
    let object = only_pod(&CART.replace("10.1.2.3", "10.1.2.300"));
    assert!(object.incomplete);
    assert_eq!(object.pod.addresses.len(), 1);
    for name in ["a/b", "sixteen-bytes-xx", "'a b'", "''", ".."] {
        let object = only_pod(&CART.replace("veth-cart", name));
        assert!(
            object.incomplete && object.pod.interface.is_none(),
            "{name}"
        );
    }
}

#[test]
fn aliases_that_expand_without_bound_are_refused() {
    let mut text = String::from("apiVersion: v1\nkind: List\nx0: &x0 [a, a, a, a, a, a, a, a]\n");
    for i in 1..9 {
        let aliases = vec![format!("*x{}", i - 1); 8].join(", ");
        writeln!(text, "x{i}: &x{i} [{aliases}]").unwrap();
    }
    text.push_str("items:\n- *x8\n");
    let manifests = read(&text);
    assert!(manifests.unreadable);
    assert_eq!(manifests.problems.len(), 1);
}

#[test]
fn hundreds_of_pods_in_one_file_are_read() {
    let mut text = String::new();
    for i in 0..500 {
        let pod = CART.replace("name: cart\n", &format!("name: cart-{i}\n"));
        writeln!(text, "---\n{pod}").unwrap();
    }
    let manifests = read(&text);
    assert_eq!(manifests.objects.len(), 500);
    assert_eq!(problems(&manifests), Vec::<String>::new());
}

#[test]
fn the_error_for_an_annotation_that_is_not_a_string_says_what_to_do() {
    for (value, hint) in [
        (
            "*.github.com",
            "put the value of egress-agent.dev/allow in quotes",
        ),
        (
            "[2001:db8::7]:443",
            "in quotes if it begins with an IPv6 address",
        ),
        ("\n      - a.com", "egress-agent.dev/allow is a list"),
    ] {
        let text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n  annotations:\n    \
             egress-agent.dev/allow: {value}\n"
        );
        let read = Manifests::read("a.yaml", &text);
        let [problem] = &read.problems[..] else {
            panic!("{value}: {:?}", read.problems);
        };
        assert!(
            problem.message.contains(hint),
            "{value}: {}",
            problem.message
        );
    }
}

const POLICIES: &str = "\
apiVersion: egress-agent.dev/v1alpha1
kind: EgressPolicy
metadata: {name: web, namespace: shop}
spec:
  mode: off
  allow: [\"github.com:443\"]
---
apiVersion: v1
kind: List
items:
- apiVersion: egress-agent.dev/v1alpha1
  kind: ClusterEgressPolicy
  metadata: {name: guardrails}
  spec:
    tier: Admin
    priority: 1
    rules: [{action: Deny, entries: [a.test]}]
- apiVersion: policy.networking.k8s.io/v1alpha2
  kind: ClusterNetworkPolicy
  metadata: {name: upstream}
  spec:
    tier: Baseline
    priority: 1
    subject: {namespaces: {}}
---
apiVersion: egress-agent.dev/v1alpha1
kind: EgressSetList
items:
- metadata: {name: github}
  spec: {destinations: [github.com]}
";

#[test]
fn policy_objects_are_read() {
    let manifests = read(POLICIES);
    assert_eq!(problems(&manifests), [""; 0]);
    let titles: Vec<_> = manifests.objects.iter().map(ToString::to_string).collect();
    assert_eq!(
        titles,
        [
            "EgressPolicy shop/web",
            "ClusterEgressPolicy guardrails",
            "ClusterNetworkPolicy upstream",
            "EgressSet github"
        ]
    );
    assert!(
        manifests
            .objects
            .iter()
            .all(|object| !object.is_incomplete())
    );
}

#[test]
fn a_mistake_in_a_policy_object_has_its_place() {
    let with = |from: &str, to: &str| {
        let manifests = read(&POLICIES.replace(from, to));
        assert!(!manifests.problems.is_empty(), "{to}");
        problems(&manifests).remove(0)
    };
    for (from, to, problem) in [
        (
            "name: web",
            "name: Web",
            "pods.yaml:1: \"Web\" is not a name",
        ),
        (
            "egress-agent.dev/v1alpha1\nkind: EgressPolicy",
            "egress-agent.dev/v2\nkind: EgressPolicy",
            "pods.yaml:1: the EgressPolicy has the apiVersion \"egress-agent.dev/v2\": expected \
             \"egress-agent.dev/v1alpha1\"",
        ),
        (
            "kind: EgressPolicy",
            "kind: Egresspolicy",
            "pods.yaml:1: kind Egresspolicy must be written EgressPolicy",
        ),
        (
            "mode: off",
            "mode: of",
            "pods.yaml:1: EgressPolicy shop/web: spec.mode cannot be read: unknown variant `of`",
        ),
        (
            "tier: Admin",
            "tier: Middle",
            "pods.yaml:11: ClusterEgressPolicy guardrails: spec.tier cannot be read",
        ),
        (
            "destinations:",
            "destination:",
            "pods.yaml:29: EgressSet github: spec.destination is not known",
        ),
        ("mode: off", "mode: [", "pods.yaml:"),
    ] {
        let found = with(from, to);
        assert!(found.starts_with(problem), "{found}");
    }
}
