//! `ClusterNetworkPolicy`.

use ::egress_policy::objects::Objects;

use super::*;

fn network_policy(egress: &Value) -> Value {
    json!({
        "tier": "Admin",
        "priority": 10,
        "subject": {"namespaces": {}},
        "egress": egress,
    })
}

#[test]
fn networks_and_names_become_entries() {
    let spec = network_policy(&json!([
        {"action": "Accept", "to": [{"networks": ["10.0.0.0/8", "fd00::/8"]}]},
        {
            "name": "web",
            "action": "Accept",
            "to": [{"networks": ["10.1.2.3/16"]}, {"domainNames": ["*.github.com", "kubernetes.io."]}],
            "protocols": [
                {"tcp": {"destinationPort": {"number": 443}}},
                {"udp": {"destinationPort": {"range": {"start": 8000, "end": 8100}}}},
            ],
        },
        {
            "action": "Deny",
            "to": [{"networks": ["2001:db8::/32", "0.0.0.0/0", "192.0.2.1/32"]}],
            "protocols": [{"sctp": {"destinationPort": {"number": 9}}}],
        },
        {"action": "Pass", "to": [{"networks": ["::/0"]}]},
    ]));
    let (policy, body) = tier_policy(ObjectKind::ClusterNetworkPolicy, &spec, &Unknown);
    assert!(
        policy.is_complete && policy.problems.is_empty(),
        "{:?}",
        policy.problems
    );
    assert!(matches!(policy.body, Body::Tier(_)));
    assert_eq!(
        body.rules[0],
        rule(0, TierAction::Allow, &["10.0.0.0/8/any", "[fd00::/8]/any"])
    );
    assert_eq!(body.rules[1].name.as_deref(), Some("web"));
    assert_eq!(
        body.rules[1].entries,
        [
            "10.1.0.0/16:443/tcp",
            "10.1.0.0/16:8000-8100/udp",
            "*.github.com:443/tcp",
            "*.github.com:8000-8100/udp",
            "kubernetes.io.:443/tcp",
            "kubernetes.io.:8000-8100/udp",
        ]
    );
    assert_eq!(
        body.rules[2],
        rule(
            2,
            TierAction::Deny,
            &[
                "[2001:db8::/32]:9/sctp",
                "0.0.0.0/0:9/sctp",
                "192.0.2.1:9/sctp"
            ]
        )
    );
    assert_eq!(body.rules[3], rule(3, TierAction::Pass, &["[::/0]/any"]));
    assert_readable(&body);
}

/// Checks that a pod with this policy alone gets one that can be read.
fn assert_readable(policy: &TierPolicy) {
    let settings = ::egress_policy::Settings {
        default_mode: ::egress_policy::Mode::Off,
        pod_annotations: ::egress_policy::PodAnnotations::Grant,
        cluster_domain: ::egress_policy::exact_name("cluster.local").expect("a name"),
        guard: true,
        allow_internal: true,
        internal_answers: Arc::new(::egress_policy::InternalAnswers::Names(Vec::new())),
        protected: Vec::new(),
        translators: ::egress_policy::Translators::well_known(),
    };
    let objects = Objects {
        tiers: vec![Arc::new(policy.clone())],
        ..Objects::default()
    };
    let none = ::egress_policy::Annotations::default();
    let inputs = ::egress_policy::Inputs {
        pod: &none,
        namespace: &none,
        objects: &objects,
    };
    let compiled = ::egress_policy::compile(inputs, &settings);
    compiled.unwrap_or_else(|error| panic!("{policy:?}: {error}"));
}

#[test]
fn nodes_and_pods_become_their_addresses() {
    let spec = network_policy(&json!([
        {"action": "Accept", "to": [{"nodes": {"matchLabels": {"zone": "a"}}}]},
        {"action": "Deny", "to": [{"nodes": {"matchLabels": {"zone": "b"}}}]},
        {
            "action": "Pass",
            "to": [{"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "web"}}}}],
            "protocols": [{"udp": {"destinationPort": {"number": 53}}}, {"destinationNamedPort": "http"}],
        },
        {"action": "Deny", "to": [{"namespaces": {"matchLabels": {"team": "shop"}}}]},
    ]));
    let (policy, body) = tier_policy(ObjectKind::ClusterNetworkPolicy, &spec, &Cluster);
    assert!(policy.problems.is_empty(), "{:?}", policy.problems);
    let Body::Network(network) = &policy.body else {
        panic!("{:?}", policy.body);
    };
    assert!(network.needs_nodes() && network.needs_pods());
    assert_eq!(
        body.rules,
        [
            rule(
                0,
                TierAction::Allow,
                &["192.168.7.6/31/any", "[fd01::1]/any"]
            ),
            rule(1, TierAction::Deny, &[]),
            rule(
                2,
                TierAction::Pass,
                &[
                    "10.1.0.6/31:53/udp",
                    "[fd00::7]:53/udp",
                    "10.1.0.7:8080/tcp",
                    "[fd00::7]:8080/tcp",
                ]
            ),
            rule(3, TierAction::Deny, &["10.1.0.6/31/any", "[fd00::7]/any"]),
        ]
    );
    assert_readable(&body);
    let (policy, body) = tier_policy(ObjectKind::ClusterNetworkPolicy, &spec, &Unknown);
    assert_eq!(policy.problems.len(), 4, "{:?}", policy.problems);
    assert_eq!(body.rules[0], rule(0, TierAction::Allow, &[]));
    for (index, of) in body.rules.iter().enumerate().skip(1) {
        assert_eq!(*of, rule(index, TierAction::Deny, &["*"]));
    }
}

#[test]
fn a_rule_that_entries_cannot_express_fails_closed_as_a_whole() {
    let good = json!({"networks": ["10.0.0.0/8"]});
    let cases = [
        json!({"to": []}),
        json!({"to": [good, {}]}),
        json!({"to": [good, {"services": {}}]}),
        json!({"to": [{"networks": ["10.0.0.0/8"], "nodes": {}}]}),
        json!({"to": [{"networks": ["10.0.0.1"]}]}),
        json!({"to": [{"networks": ["::ffff:10.0.0.0/104"]}]}),
        json!({"to": [{"nodes": {"matchLabels": {"a b": "c"}}}]}),
        json!({"to": [{"domainNames": ["1.2.3.4"]}]}),
        json!({"to": [{"domainNames": ["api-*.example.com"]}]}),
        json!({"to": [{"domainNames": ["localhost"]}]}),
        json!({"to": [{"domainNames": ["a.test:443"]}]}),
        json!({"to": [good], "protocols": []}),
        json!({"to": [good], "protocols": [{}]}),
        json!({"to": [good], "protocols": [{"icmp": {}}]}),
        json!({"to": [good], "protocols": [{"tcp": {}}]}),
        json!({"to": [good], "protocols": [{"tcp": {"destinationPort": {}}}]}),
        json!({"to": [good], "protocols": [{"tcp": {"destinationPort": {"number": 0}}}]}),
        json!({"to": [good], "protocols": [{"tcp": {"destinationPort": {"number": 70000}}}]}),
        json!({"to": [good], "protocols": [{"tcp": {"destinationPort": {"range": {"start": 9, "end": 8}}}}]}),
        json!({"to": [good], "protocols": [{"destinationNamedPort": "http"}]}),
        json!({"to": "everywhere"}),
    ];
    for case in cases {
        for (action, outcome) in [
            ("Accept", rule(0, TierAction::Allow, &[])),
            ("Deny", rule(0, TierAction::Deny, &["*"])),
            ("Pass", rule(0, TierAction::Deny, &["*"])),
        ] {
            let mut written = case.clone();
            written["action"] = json!(action);
            let spec = network_policy(&json!([written]));
            let (policy, body) = tier_policy(ObjectKind::ClusterNetworkPolicy, &spec, &Cluster);
            assert_eq!(body.rules, [outcome], "{action} {case}");
            assert_eq!(policy.problems.len(), 1, "{action} {case}");
            let problem = &policy.problems[0];
            assert!(problem.starts_with("spec.egress[0]"), "{problem}");
        }
    }
    for action in ["Deny", "Pass"] {
        let written = json!({"action": action, "to": [{"domainNames": ["a.test"]}]});
        let spec = network_policy(&json!([written]));
        let (_, body) = tier_policy(ObjectKind::ClusterNetworkPolicy, &spec, &Cluster);
        assert_eq!(body.rules, [rule(0, TierAction::Deny, &["*"])]);
    }
}

#[test]
fn pods_in_the_hosts_network_are_not_subject_to_a_network_policy() {
    let spec = network_policy(&json!([]));
    let (policy, _) = tier_policy(ObjectKind::ClusterNetworkPolicy, &spec, &Unknown);
    assert!(selects(&policy, "shop", &[], false));
    assert!(!selects(&policy, "shop", &[], true));
}

#[test]
fn the_subject_of_a_network_policy_is_namespaces_or_pods() {
    let with = |subject: Value| {
        let spec = json!({
            "tier": "Admin", "priority": 0, "subject": subject,
            "egress": [{"action": "Accept", "to": [{"networks": ["10.0.0.0/8"]}]}],
        });
        tier_policy(ObjectKind::ClusterNetworkPolicy, &spec, &Unknown)
    };
    let shop = json!({"matchLabels": {"kubernetes.io/metadata.name": "shop"}});
    let web = json!({"matchLabels": {"app": "web"}});
    let (policy, _) = with(json!({"pods": {"namespaceSelector": shop, "podSelector": web}}));
    assert!(selects(&policy, "shop", &[("app", "web")], false));
    assert!(!selects(&policy, "shop", &[], false));
    assert!(!selects(&policy, "other", &[("app", "web")], false));
    for subject in [
        json!({}),
        json!({"serviceAccounts": {}}),
        json!({"namespaces": shop, "pods": {}}),
    ] {
        let (policy, body) = with(subject.clone());
        assert!(!policy.is_complete, "{subject}");
        assert!(selects(&policy, "other", &[], false), "{subject}");
        assert_eq!(body.rules, [rule(0, TierAction::Allow, &[])], "{subject}");
    }
}

#[test]
fn rules_about_ingress_are_reported() {
    let mut spec = network_policy(&json!([]));
    spec["ingress"] = json!([{"action": "Deny", "from": []}, {"action": "Pass", "from": []}]);
    let (policy, body) = tier_policy(ObjectKind::ClusterNetworkPolicy, &spec, &Unknown);
    assert!(policy.is_complete);
    assert!(body.rules.is_empty());
    assert_eq!(policy.problems.len(), 1);
    assert!(
        policy.problems[0].starts_with("spec.ingress has 2 rules"),
        "{:?}",
        policy.problems
    );
}

#[test]
fn a_rule_with_too_many_destinations_fails_closed() {
    struct Many;
    impl Peers for Many {
        fn nodes(&self, _: &Selector) -> Result<Vec<IpAddr>, String> {
            // Every other address, so that none are merged.
            let addresses = (0..=4096u16).map(|n| {
                let [high, low] = (2 * n).to_be_bytes();
                IpAddr::from([10, 0, high, low])
            });
            Ok(addresses.collect())
        }

        fn pods(&self, _: &Selector, _: &Selector) -> Result<Vec<PeerPod>, String> {
            Ok(Vec::new())
        }
    }
    let spec = network_policy(&json!([{"action": "Pass", "to": [{"nodes": {}}]}]));
    let (policy, body) = tier_policy(ObjectKind::ClusterNetworkPolicy, &spec, &Many);
    assert_eq!(body.rules, [rule(0, TierAction::Deny, &["*"])]);
    assert!(
        policy.problems[0].contains("the limit is 4096"),
        "{:?}",
        policy.problems
    );
}

/// A cluster of these pods.
struct Pods(Vec<PeerPod>);

impl Peers for Pods {
    fn nodes(&self, _: &Selector) -> Result<Vec<IpAddr>, String> {
        Ok(Vec::new())
    }

    fn pods(&self, _: &Selector, _: &Selector) -> Result<Vec<PeerPod>, String> {
        Ok(self.0.clone())
    }
}

#[test]
fn peers_cannot_make_named_ports_need_too_many_classes_or_entries() {
    let named = |last: u8, ports: &[u16]| PeerPod {
        addresses: vec![address(&format!("10.1.0.{last}"))],
        ports: ports
            .iter()
            .map(|port| NamedPort {
                name: "web".into(),
                protocol: "tcp",
                port: *port,
            })
            .collect(),
    };
    let of = |action: &str, pods: Vec<PeerPod>| {
        let rule = json!([{
            "action": action,
            "to": [{"namespaces": {}}],
            "protocols": [{"destinationNamedPort": "web"}],
        }]);
        tier_policy(
            ObjectKind::ClusterNetworkPolicy,
            &network_policy(&rule),
            &Pods(pods),
        )
    };
    // Many ports with one name in one pod: the first one counts.
    let ports: Vec<u16> = (1..=2000).collect();
    for action in ["Accept", "Deny", "Pass"] {
        let (policy, tier) = of(action, vec![named(2, &ports), named(3, &[1])]);
        assert_eq!(policy.problems, [""; 0]);
        assert_readable(&tier);
        assert_eq!(tier.rules[0].entries, ["10.1.0.2/31:1/tcp"]);
    }
    // Many pods with a number each: the numbers that most pods have count.
    let pods = || {
        let others = (1..=9).map(|last| named(last, &[7000 + u16::from(last)]));
        let same = [named(20, &[8080]), named(21, &[8080])];
        others.chain(same).collect()
    };
    let (policy, accept) = of("Accept", pods());
    assert_eq!(policy.problems, [""; 0]);
    assert_readable(&accept);
    assert_eq!(accept.rules[0].entries.len(), 8);
    assert_eq!(accept.rules[0].entries[0], "10.1.0.20/31:8080/tcp");
    let (policy, deny) = of("Deny", pods());
    assert_eq!(policy.problems, [""; 0]);
    assert_readable(&deny);
    assert_eq!(
        deny.rules[0].entries[8..],
        ["10.1.0.8/31/any"],
        "every port of the pods with other numbers"
    );
    let (policy, pass) = of("Pass", pods());
    assert!(policy.problems[0].contains("more than 8 different numbers"));
    assert_eq!(pass.rules[0].action, TierAction::Deny);
}
