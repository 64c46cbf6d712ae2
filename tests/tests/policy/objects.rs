//! Policies as objects: selectors, the order of tiers, sets, and how they are reported.

use std::net::IpAddr;

use egress_tests::{
    Agent, Builder, DEADLINE, Lab, Pod, SHORT, TcpEcho,
    addresses::server,
    dns::{RecordType, ResponseCode},
    eventually, exchange, holds,
};
use serde_json::{Value, json};

const GROUP: &str = "egress-agent.dev/v1alpha1";

fn egress_policy(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": GROUP,
        "kind": "EgressPolicy",
        "metadata": { "name": name, "namespace": "shop" },
        "spec": spec,
    })
}

pub(crate) fn cluster_policy(name: &str, tier: &str, priority: u32, rules: &Value) -> Value {
    json!({
        "apiVersion": GROUP,
        "kind": "ClusterEgressPolicy",
        "metadata": { "name": name },
        "spec": { "tier": tier, "priority": priority, "rules": rules },
    })
}

/// A pod `cart`, and servers for TCP port 443 and 25 at every address outside. Names `shop.test` (`server(10)`) and
/// `evil.test` (`server(66)`).
pub(crate) struct Scene {
    pub(crate) agent: Agent,
    pub(crate) pod: Pod,
    _servers: [TcpEcho; 2],
    pub(crate) lab: Lab,
}

impl Scene {
    /// The policies are there before the agent starts.
    #[track_caller]
    pub(crate) fn new(annotations: &[(&str, &str)], policies: &[Value]) -> Self {
        Self::on(Lab::builder(), annotations, policies, |_| {})
    }

    /// The same in another laboratory, with more that is there before the agent starts.
    #[track_caller]
    fn on(
        builder: Builder,
        annotations: &[(&str, &str)],
        policies: &[Value],
        more: impl FnOnce(&Lab),
    ) -> Self {
        let lab = builder.build();
        let servers = [lab.serve_tcp(443), lab.serve_tcp(25)];
        lab.dns().addresses("shop.test", &[server(10)]);
        lab.dns().addresses("evil.test", &[server(66)]);
        let pod = lab.pod("shop", "cart");
        lab.write_labelled_pod(&pod, &[("app", "cart")], annotations);
        for policy in policies {
            lab.write_policy(policy);
        }
        more(&lab);
        let agent = lab.start_agent(&[&pod]);
        Self {
            agent,
            pod,
            _servers: servers,
            lab,
        }
    }

    /// Asserts that a connection is denied by this policy. Returns the denial line's field `policy`.
    #[track_caller]
    pub(crate) fn denied_by(&self, to: (IpAddr, u16), kind: &str, name: &str) -> Value {
        let denial = self.agent.denies_tcp(&self.pod, to, "deny_rule");
        let policy = &denial.line["policy"];
        assert_eq!(policy["kind"], kind, "{}", denial.text);
        assert_eq!(policy["name"], name, "{}", denial.text);
        assert_eq!(policy["entry"], denial.line["rule"], "{}", denial.text);
        policy.clone()
    }

    /// Asserts that `explain` allows a target because of this entry of this rule, in its text too.
    #[track_caller]
    fn allowed_by(&self, target: &str, rule: &str, entry: &str) {
        let (code, explained) = self.lab.explain(&self.pod, target);
        assert_eq!(code, 0, "{explained}");
        assert_eq!(explained["decision"], "allowed", "{explained}");
        let decides = &explained["entries"][0];
        let expected = (&json!(rule), &json!(entry));
        assert_eq!((&decides["of"], &decides["entry"]), expected, "{explained}");
        let output = self.lab.ask(&["explain", "shop/cart", target]);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains(rule), "{text}");
    }
}

#[test]
fn an_egress_policy_applies_to_the_pods_that_it_selects() {
    let web = egress_policy(
        "web",
        &json!({
            "podSelector": { "matchLabels": { "app": "cart" } },
            "allow": ["shop.test:443"],
        }),
    );
    let scene = Scene::new(&[("allow", "203.0.113.20:443")], &[web]);
    let pod = &scene.pod;
    assert_eq!(pod.lookup("shop.test"), [server(10)]);
    pod.talks_tcp((server(10), 443));
    // Its entries and the annotation's add up, and both close the pod.
    pod.talks_tcp((server(20), 443));
    scene
        .agent
        .denies_tcp(pod, (server(99), 443), "address_not_learned");
    scene.agent.denies_name(pod, "evil.test");

    let (code, explained) = scene.lab.explain(pod, "shop.test:443");
    assert_eq!(code, 0, "{explained}");
    assert!(
        explained.to_string().contains("EgressPolicy shop/web"),
        "{explained}"
    );

    scene.agent.applies_policy_after(pod, || {
        let other = [("app", "till")];
        let allow = [("allow", "203.0.113.20:443")];
        scene.lab.write_labelled_pod(pod, &other, &allow);
    });
    assert!(!pod.reaches(server(10)), "the policy still selects the pod");
    pod.talks_tcp((server(20), 443));
}

#[test]
fn an_egress_policy_alone_closes_a_pod_until_it_is_removed() {
    let web = egress_policy("web", &json!({ "allow": ["203.0.113.10:443"] }));
    let scene = Scene::new(&[], std::slice::from_ref(&web));
    scene.pod.talks_tcp((server(10), 443));
    assert!(!scene.pod.reaches(server(99)));
    scene.lab.remove_policy(&web);
    eventually("the pod is free", || holds(scene.pod.reaches(server(99))));
}

#[test]
fn an_egress_policy_in_audit_mode_stops_nothing() {
    let web = json!({ "mode": "audit", "allow": ["203.0.113.10:443"] });
    let scene = Scene::new(&[], &[egress_policy("web", &web)]);
    let (pod, to) = (&scene.pod, server(99));
    pod.talks_tcp((to, 443));
    let denial = scene.agent.wait_denial("the audited connection", |denial| {
        denial.is(pod, "no_rule", to, 443)
    });
    assert_eq!(denial.event, "would_deny", "{}", denial.text);
    assert_eq!(denial.line["policy"]["name"], "web", "{}", denial.text);
    assert_eq!(scene.lab.status_of(pod)["mode"], "audit");
}

#[test]
fn names_under_resolve_of_an_egress_policy_are_looked_up_and_not_reached() {
    let web = json!({ "allow": ["shop.test:443"], "resolve": ["evil.test"] });
    let scene = Scene::new(&[], &[egress_policy("web", &web)]);
    let pod = &scene.pod;
    assert_eq!(pod.lookup("shop.test"), [server(10)]);
    pod.talks_tcp((server(10), 443));
    assert_eq!(pod.lookup("evil.test"), [server(66)]);
    assert!(!pod.reaches(server(66)), "resolve opens the name");
    scene.agent.denies_name(pod, "other.test");
}

#[test]
fn under_narrow_a_pods_list_counts_where_an_egress_policy_covers_it() {
    let web = json!({ "allow": ["shop.test:443"] });
    let builder = Lab::builder().config("podAnnotations", "narrow");
    let entries = "shop.test:443 203.0.113.20:443 203.0.113.30:443";
    let scene = Scene::on(
        builder,
        &[("allow", entries)],
        &[egress_policy("web", &web)],
        |lab| lab.write_namespace("shop", &[("allow", "203.0.113.20")]),
    );
    let pod = &scene.pod;
    assert_eq!(pod.lookup("shop.test"), [server(10)]);
    pod.talks_tcp((server(10), 443));
    pod.talks_tcp((server(20), 443));
    assert!(!pod.reaches(server(30)), "only the pod lists it");
}

#[test]
fn the_admin_tier_precedes_the_teams_lists_and_its_first_matching_rule_decides() {
    let guard = cluster_policy(
        "guard",
        "Admin",
        10,
        &json!([
            { "name": "exception", "action": "Allow", "entries": ["203.0.113.20:443"] },
            { "name": "range", "action": "Deny", "entries": ["203.0.113.0/27"] },
            { "action": "Pass", "entries": ["203.0.113.40"] },
            { "action": "Deny", "entries": ["203.0.113.40/29", "evil.test"] },
        ]),
    );
    let scene = Scene::new(&[("allow", "* evil.test")], &[guard]);
    let pod = &scene.pod;
    pod.talks_tcp((server(20), 443));
    let allowing = "ClusterEgressPolicy guard, rule 1 `exception`";
    scene.allowed_by("203.0.113.20:443", allowing, "203.0.113.20:443");
    let policy = scene.denied_by((server(10), 443), "ClusterEgressPolicy", "guard");
    assert_eq!(policy["rule"], "range");
    assert_eq!(policy["entry"], "203.0.113.0/27");
    // The exception is for its port alone.
    scene.denied_by((server(20), 25), "ClusterEgressPolicy", "guard");
    // Handed over to the pod's own list, which allows it; its neighbour is not.
    pod.talks_tcp((server(40), 443));
    let policy = scene.denied_by((server(41), 443), "ClusterEgressPolicy", "guard");
    assert_eq!(policy["rule"], "4");
    pod.talks_tcp((server(99), 443));

    let (_, denial) = scene.agent.denies_name(pod, "evil.test");
    assert_eq!(denial.line["policy"]["name"], "guard", "{}", denial.text);
    assert_eq!(pod.lookup("shop.test"), [server(10)]);

    let (code, explained) = scene.lab.explain(pod, "203.0.113.10:443");
    assert_eq!(code, 1, "{explained}");
    let because = explained["because"].as_str().unwrap_or_default();
    assert!(
        because.contains("ClusterEgressPolicy guard, rule 2 `range`"),
        "{explained}"
    );
}

#[test]
fn a_team_cannot_switch_off_the_admin_tier() {
    let guard = cluster_policy(
        "guard",
        "Admin",
        10,
        &json!([{ "action": "Deny", "entries": ["203.0.113.99"] }]),
    );
    for mode in ["off", "audit"] {
        let scene = Scene::new(
            &[("mode", mode), ("allow", "203.0.113.1")],
            std::slice::from_ref(&guard),
        );
        scene.denied_by((server(99), 443), "ClusterEgressPolicy", "guard");
        // The list of a mode that enforces nothing does not close the pod.
        scene.pod.talks_tcp((server(10), 443));
    }
}

#[test]
fn the_baseline_tier_decides_for_pods_about_which_no_team_says_anything() {
    let base = cluster_policy(
        "base",
        "Baseline",
        10,
        &json!([
            { "action": "Allow", "entries": ["shop.test:443"] },
            { "action": "Deny", "entries": ["*"] },
        ]),
    );
    let scene = Scene::new(&[], &[base]);
    let pod = &scene.pod;
    pod.reaches_only_shop();
    let allowing = "ClusterEgressPolicy base, rule 1";
    scene.allowed_by("203.0.113.10:443", allowing, "shop.test:443");
    scene.allowed_by("shop.test:443", allowing, "shop.test:443");
    let policy = scene.denied_by((server(99), 443), "ClusterEgressPolicy", "base");
    assert_eq!(policy["rule"], "2");
    let (_, denial) = scene.agent.denies_name(pod, "evil.test");
    assert_eq!(denial.line["policy"]["name"], "base", "{}", denial.text);

    // A list of the team's takes its place.
    scene.agent.applies_policy_after(pod, || {
        let allow = [("allow", "203.0.113.99:443")];
        scene
            .lab
            .write_labelled_pod(pod, &[("app", "cart")], &allow);
    });
    pod.talks_tcp((server(99), 443));
    scene.agent.denies_tcp(pod, (server(10), 443), "no_rule");
}

#[test]
fn an_edit_of_the_admin_tier_cuts_open_connections() {
    let guard = |entry: &str| {
        let rules = json!([{ "action": "Deny", "entries": [entry] }]);
        cluster_policy("guard", "Admin", 10, &rules)
    };
    let scene = Scene::new(&[("allow", "203.0.113.0/24:443")], &[guard("203.0.113.99")]);
    let mut kept = scene.pod.talks_tcp((server(20), 443));
    let mut cut = scene.pod.talks_tcp((server(10), 443));
    scene.agent.applies_policy_after(&scene.pod, || {
        scene.lab.write_policy(&guard("203.0.113.10"));
    });
    assert!(!exchange(&mut cut, b"after", SHORT));
    assert!(exchange(&mut kept, b"after", DEADLINE));
}

#[test]
fn a_cluster_network_policy_with_domain_names_is_enforced() {
    let upstream = json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": { "name": "names" },
        "spec": {
            "tier": "Admin",
            "priority": 55,
            "subject": { "pods": {
                "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": "shop" } },
                "podSelector": { "matchLabels": { "app": "cart" } },
            } },
            "egress": [
                {
                    "name": "web",
                    "action": "Accept",
                    "to": [{ "domainNames": ["shop.test"] }],
                    "protocols": [{ "tcp": { "destinationPort": { "number": 443 } } }],
                },
                {
                    "name": "else",
                    "action": "Deny",
                    "to": [{ "networks": ["0.0.0.0/0", "::/0"] }],
                },
            ],
        },
    });
    let scene = Scene::new(&[], &[upstream]);
    let pod = &scene.pod;
    assert_eq!(pod.lookup("shop.test"), [server(10)]);
    pod.talks_tcp((server(10), 443));
    let allowing = "ClusterNetworkPolicy names, rule 1 `web`";
    scene.allowed_by("203.0.113.10:443", allowing, "shop.test:443/tcp");
    scene.allowed_by("shop.test:443", allowing, "shop.test:443/tcp");
    let policy = scene.denied_by((server(10), 25), "ClusterNetworkPolicy", "names");
    assert_eq!(policy["rule"], "else");
    scene.denied_by((server(99), 443), "ClusterNetworkPolicy", "names");
    // Networks include ICMP.
    assert!(!pod.ping(server(99), SHORT));
    // A name that nothing could open is not looked up.
    let (_, denial) = scene.agent.denies_name(pod, "evil.test");
    assert_eq!(denial.line["policy"]["name"], "names", "{}", denial.text);
}

fn partners(destinations: &Value) -> Value {
    json!({
        "apiVersion": GROUP,
        "kind": "EgressSet",
        "metadata": { "name": "partners" },
        "spec": { "destinations": destinations },
    })
}

#[test]
fn entries_use_sets_and_follow_their_changes() {
    let first = partners(&json!(["shop.test", "203.0.113.40/31"]));
    let scene = Scene::new(&[("allow", "@partners:443")], &[first]);
    let pod = &scene.pod;
    assert_eq!(pod.lookup("shop.test"), [server(10)]);
    pod.talks_tcp((server(10), 443));
    pod.talks_tcp((server(41), 443));
    scene
        .agent
        .denies_tcp(pod, (server(41), 25), "port_not_allowed");

    scene.agent.applies_policy_after(pod, || {
        scene.lab.write_policy(&partners(&json!(["evil.test"])));
    });
    assert!(!pod.reaches(server(41)), "the set has it no more");
    assert_eq!(pod.lookup("evil.test"), [server(66)]);
    pod.talks_tcp((server(66), 443));
    let refused = pod.resolve("shop.test", RecordType::A);
    assert_eq!(refused.code, ResponseCode::NXDomain);
}

#[test]
fn rules_of_the_platform_use_sets_and_follow_their_changes() {
    let guard = cluster_policy(
        "guard",
        "Admin",
        10,
        &json!([
            { "action": "Allow", "entries": ["@partners:443"] },
            { "name": "rest", "action": "Deny", "entries": ["*"] },
        ]),
    );
    let first = partners(&json!(["shop.test", "203.0.113.40/31"]));
    let scene = Scene::new(&[("allow", "*")], &[first, guard]);
    let pod = &scene.pod;
    assert_eq!(pod.lookup("shop.test"), [server(10)]);
    let mut to_shop = pod.talks_tcp((server(10), 443));
    let mut to_prefix = pod.talks_tcp((server(40), 443));
    scene.denied_by((server(42), 443), "ClusterEgressPolicy", "guard");

    scene.agent.applies_policy_after(pod, || {
        scene.lab.write_policy(&partners(&json!([
            "evil.test",
            "203.0.113.40",
            "203.0.113.42"
        ])));
    });
    // What the set has no more ends, and what it still has goes on.
    assert!(!exchange(&mut to_shop, b"after", SHORT));
    assert!(exchange(&mut to_prefix, b"after", DEADLINE));
    for gone in [server(10), server(41)] {
        let policy = scene.denied_by((gone, 443), "ClusterEgressPolicy", "guard");
        assert_eq!(policy["rule"], "rest");
    }
    scene.agent.denies_name(pod, "shop.test");
    pod.talks_tcp((server(42), 443));
    assert_eq!(pod.lookup("evil.test"), [server(66)]);
    pod.talks_tcp((server(66), 443));
}

#[test]
fn status_shows_whether_each_policy_is_in_force() {
    let web = egress_policy("web", &json!({ "allow": ["shop.test:443"] }));
    let selector = json!({ "matchLabels": { "app": "other" } });
    let other = egress_policy("other", &json!({ "podSelector": selector, "allow": [] }));
    let scene = Scene::new(&[], &[web, other]);
    let (_, status) = scene.lab.ask_json(&["status"]);
    let in_force = |name: &str, count: u32| {
        json!({
            "kind": "EgressPolicy",
            "namespace": "shop",
            "name": name,
            // Manifests have none.
            "generation": null,
            "applied_generation": null,
            "selected": count,
            "enforced": count,
            "applied": true,
            "problem": null,
        })
    };
    let expected = json!([in_force("other", 0), in_force("web", 1)]);
    assert_eq!(status["policies"], expected);
    let text = String::from_utf8(scene.lab.ask(&["status"]).stdout).expect("UTF-8");
    let mut lines = text.lines().skip_while(|line| !line.starts_with("POLICY"));
    let _head = lines.next();
    let row: Vec<&str> = lines
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    assert_eq!(
        row,
        ["EgressPolicy", "shop/web", "-", "-", "1", "1"],
        "{text}"
    );
    assert_eq!(lines.next(), Some("1 policies select no pod of this node"));
}
