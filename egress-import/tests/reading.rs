//! Which inputs are read, and the messages about the rest.

use egress_import::{Imported, Input, Options, Severity, import};

fn imported(text: &str) -> Imported {
    imported_with(text, &Options::default())
}

fn imported_with(text: &str, options: &Options) -> Imported {
    let input = Input {
        name: "a.yaml".to_owned(),
        text: text.to_owned(),
    };
    import(&[input], options)
}

const POLICY: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web}
spec: {podSelector: {}, policyTypes: [Egress]}
";

#[test]
fn lists_are_read() {
    let lines: Vec<&str> = POLICY.lines().collect();
    let item = format!("- {}\n", lines.join("\n  "));
    let list = format!("apiVersion: v1\nkind: List\nitems:\n{item}{item}");
    let Imported {
        yaml,
        objects,
        problems,
        ..
    } = imported(&list);
    assert!(problems.is_empty(), "{problems:?}");
    assert_eq!(objects, 2);
    // Objects of one kind have different names.
    assert!(
        yaml.contains("  name: web\n") && yaml.contains("  name: web-2\n"),
        "{yaml}"
    );
    assert!(
        yaml.contains("# from a.yaml:1, item 0: NetworkPolicy web\n"),
        "{yaml}"
    );
}

#[test]
fn json_is_read() {
    let json = r#"{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "web"},
        "spec": {"podSelector": {}, "policyTypes": ["Egress"]}}"#;
    assert_eq!(imported(json).objects, 1);
}

#[test]
fn an_object_has_the_line_where_it_begins() {
    let imported = imported(&format!("# a comment\n{POLICY}---\n\n{POLICY}"));
    for line in ["# from a.yaml:2: ", "# from a.yaml:8: "] {
        assert!(imported.yaml.contains(line), "{line}: {}", imported.yaml);
    }
}

#[test]
fn the_namespace_is_that_of_the_object_or_of_the_caller() {
    let options = Options {
        namespace: Some("shop".to_owned()),
        ..Options::default()
    };
    assert!(
        imported_with(POLICY, &options)
            .yaml
            .contains("  namespace: shop\n")
    );
    assert!(!imported(POLICY).yaml.contains("namespace:"));
    let own = POLICY.replace("{name: web}", "{name: web, namespace: books}");
    assert!(
        imported_with(&own, &options)
            .yaml
            .contains("  namespace: books\n")
    );
}

#[test]
fn a_policy_of_an_unknown_kind_is_refused_and_other_kinds_are_no_matter() {
    let policy = "apiVersion: example.com/v1\nkind: TrafficPolicy\nmetadata: {name: a}\n";
    let findings = imported(policy).findings;
    assert_eq!(findings.len(), 1);
    assert_eq!(findings[0].severity, Severity::Refused);
    assert_eq!(findings[0].origin, "a.yaml:1");
    let other = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n";
    assert!(imported(other).findings.is_empty());
}

#[test]
fn what_is_no_object_is_a_problem_with_its_place() {
    for (text, place) in [
        ("a: [", "a.yaml:"),
        ("kind: NetworkPolicy\n", "a.yaml:1"),
        ("- a\n- b\n", "a.yaml:1"),
    ] {
        let problems = imported(text).problems;
        assert_eq!(problems.len(), 1, "{text}");
        assert!(
            problems[0].origin.starts_with(place),
            "{}",
            problems[0].origin
        );
    }
    assert!(imported("").problems.is_empty());
    // Such as a Kustomization.
    let tool = imported("apiVersion: v1\nkind: Pod\n");
    assert!(tool.problems.is_empty() && tool.findings.is_empty());
    let unnamed = imported(&POLICY.replace("{name: web}", "{}"));
    assert_eq!((unnamed.objects, unnamed.findings.len()), (0, 1));
}

#[test]
fn a_value_of_another_type_refuses_the_object() {
    for wrong in [
        "{podSelector: {}, policyTypes: [Egress], egress: {to: []}}",
        "{podSelector: [], policyTypes: [Egress]}",
        "{podSelector: {}, policyTypes: [Egress], egres: []}",
        "{podSelector: {matchExpressions: [{key: a, operator: Is, values: [b]}]}, policyTypes: [Egress]}",
    ] {
        let text = POLICY.replace("{podSelector: {}, policyTypes: [Egress]}", wrong);
        let Imported {
            objects, findings, ..
        } = imported(&text);
        assert_eq!(objects, 0, "{wrong}");
        assert_eq!(findings.len(), 1, "{wrong}");
        assert_eq!(findings[0].severity, Severity::Refused);
    }
}

#[test]
fn a_text_of_the_original_cannot_end_a_comment_or_a_value() {
    let text = "apiVersion: networking.gke.io/v1\nkind: FQDNNetworkPolicy\nmetadata: {name: \"a\\nb: c\"}\n\
         spec: {podSelector: {matchLabels: {a: \"b\\nc\"}}, egress: [{matches: [{name: \"x.example\\n- y.example\"}]}]}\n";
    let Imported {
        yaml,
        problems,
        findings,
        ..
    } = imported(text);
    assert!(problems.is_empty(), "{problems:?}");
    assert_eq!(findings.len(), 1);
    assert!(yaml.contains("  name: \"a\\nb: c\"\n"), "{yaml}");
    assert!(yaml.contains("  allow: []\n"), "{yaml}");
    assert!(
        !yaml
            .lines()
            .any(|line| line.trim_start().starts_with("- y.example")),
        "{yaml}"
    );
}

#[test]
fn every_port_but_every_port_is_none() {
    let rule = |action: &str, protocol: &str, ports: &str| {
        imported(&format!(
            "apiVersion: projectcalico.org/v3\nkind: NetworkPolicy\nmetadata: {{name: a, namespace: n}}\nspec:\n  \
             types: [Egress]\n  egress:\n  - action: {action}\n    protocol: {protocol}\n    destination: {{nets: \
             [192.0.2.0/24], {ports}, selector: ''}}\n"
        ))
    };
    let none = rule("Allow", "TCP", "notPorts: ['1:65535']");
    assert!(none.yaml.contains("  allow: []\n"), "{}", none.yaml);
    assert_eq!(none.findings.len(), 1);
    // A protocol whose ports no entry expresses.
    let allowed = rule("Allow", "UDPLite", "ports: [53]");
    assert!(allowed.yaml.contains("  allow: []\n"), "{}", allowed.yaml);
    assert_eq!(allowed.findings.len(), 1);
    let denied = rule("Deny", "UDPLite", "ports: [53]");
    assert!(
        denied.yaml.contains("    - 192.0.2.0/24/ip-136\n"),
        "{}",
        denied.yaml
    );
    assert!(denied.findings.is_empty(), "{:?}", denied.findings);
}

#[test]
fn policies_of_two_products_for_one_namespace_are_refused_because_they_add_up() {
    let policy = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: np, namespace: n}\n\
                  spec: {podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 2.0.0.0/8}}]}]}\n";
    let firewall = |namespace: &str| {
        format!(
            "---\napiVersion: k8s.ovn.org/v1\nkind: EgressFirewall\nmetadata: {{name: default, namespace: {namespace}}}\n\
             spec: {{egress: [{{type: Allow, to: {{dnsName: github.com}}}}, {{type: Deny, to: {{cidrSelector: 0.0.0.0/0}}}}]}}\n"
        )
    };
    let of_two = |namespace: &str| {
        let imported = imported(&format!("{policy}{}", firewall(namespace)));
        let refused = imported.findings.into_iter();
        refused
            .filter(|finding| finding.text.contains("may restrict the same pods"))
            .map(|finding| finding.severity)
            .collect::<Vec<_>>()
    };
    assert_eq!(of_two("n"), [Severity::Refused; 2]);
    assert_eq!(of_two("other"), []);
}

#[test]
fn a_rule_with_too_many_pairs_of_destination_and_port_is_left_out() {
    let rule = |count: usize| {
        let blocks =
            (0..count).map(|n| format!("{{ipBlock: {{cidr: 2.{}.{}.0/24}}}}", n / 256, n % 256));
        let ports = (1..=count).map(|port| format!("{{port: {port}}}"));
        let join = |all: Vec<String>| all.join(", ");
        imported(&format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: np, namespace: n}}\n\
             spec: {{podSelector: {{}}, policyTypes: [Egress], egress: [{{to: [{}], ports: [{}]}}]}}\n",
            join(blocks.collect()),
            join(ports.collect())
        ))
    };
    let many = rule(1500);
    assert_eq!(many.findings.len(), 1);
    assert_eq!(many.findings[0].severity, Severity::LeftOut);
    assert!(many.yaml.contains("  allow: []\n"), "{}", many.yaml);
    assert_eq!(rule(10).yaml.matches("- 2.").count(), 100);
}
