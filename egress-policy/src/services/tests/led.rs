//! Connections that a node translates are judged by where they lead.

use egress_common::{classes::ClassSet, records::PortClass};
use egress_dns::Name;

use super::*;

const POD: &str = "10.1.0.5";
const SERVICE: &str = "10.96.0.7:80";
const GOOD: &str = "10.1.0.3:80";
const BAD: &str = "10.1.0.2:80";
const OUTSIDE: &str = "203.0.113.9:80";

/// Whether the policy ends a connection to this address that the node leads to this endpoint.
fn ends_for(policy: &Compiled, (to, endpoint): (&str, &str), learned: Learned) -> bool {
    let mut service = Service::clone(&web(&[GOOD]));
    service.external = vec!["198.51.100.7".parse().unwrap()];
    service.ports[0].node_port = Some(30_080);
    let nodes = vec![Prefix::parse("192.0.2.1").unwrap()];
    let services = Services::new([Arc::new(service)], nodes);
    let mut known = Known::default();
    known.update(&Arc::new(services), &places());
    let led = Led {
        from: POD.parse().unwrap(),
        transport: Transport::Tcp,
        to: to.parse().unwrap(),
        endpoint: endpoint.parse().unwrap(),
    };
    let connections = Connections::new(&known, &Through::default(), [led].into_iter());
    let denied = connections.denied(policy, [(led, learned)].into_iter());
    !denied.is_empty()
}

fn ends(list: Option<&str>, rules: &[(TierAction, &str)], connection: (&str, &str)) -> bool {
    ends_for(
        &compiled(list, rules, &settings()),
        connection,
        Learned::default(),
    )
}

#[test]
fn a_connection_to_a_denied_endpoint_ends_whatever_the_service_has_now() {
    let deny: &[(TierAction, &str)] = &[(TierAction::Deny, "10.1.0.2")];
    // The last one is a node's address outside.
    for to in [
        SERVICE,
        "198.51.100.7:80",
        "10.9.0.1:30080",
        "192.0.2.1:30080",
    ] {
        assert!(ends(None, deny, (to, BAD)), "{to}");
        assert!(ends(Some(""), &[], (to, OUTSIDE)), "{to}");
        assert!(!ends(None, deny, (to, GOOD)), "{to}");
        assert!(!ends(None, &[], (to, BAD)), "{to}");
    }
}

#[test]
fn a_connection_ends_whose_endpoint_only_a_wide_rule_denies() {
    let rules: &[(TierAction, &str)] = &[
        (TierAction::Allow, "10.1.0.3"),
        (TierAction::Deny, "10.0.0.0/8"),
    ];
    assert!(ends(None, rules, (SERVICE, BAD)));
    assert!(!ends(None, rules, (SERVICE, GOOD)));
    let closed = Settings {
        allow_internal: false,
        ..settings()
    };
    let policy = compiled(Some("10.1.0.3"), &[], &closed);
    assert!(ends_for(&policy, (SERVICE, BAD), Learned::default()));
    assert!(!ends_for(&policy, (SERVICE, GOOD), Learned::default()));
}

#[test]
fn entries_and_names_for_the_service_keep_a_connection() {
    assert!(!ends(Some(SERVICE), &[], (SERVICE, OUTSIDE)));
    let rules: &[(TierAction, &str)] =
        &[(TierAction::Allow, SERVICE), (TierAction::Deny, "10.1.0.2")];
    assert!(!ends(None, rules, (SERVICE, BAD)));
    assert!(ends(
        None,
        &[(TierAction::Deny, "10.1.0.2")],
        (SERVICE, BAD)
    ));
    let policy = compiled(Some("web.shop.test:80"), &[], &settings());
    let named = of_name(&policy, true);
    assert!(!ends_for(&policy, (SERVICE, OUTSIDE), named));
    assert!(ends_for(&policy, (SERVICE, OUTSIDE), Learned::default()));
    // Who writes a Service chooses this address.
    assert!(ends_for(&policy, ("198.51.100.7:80", OUTSIDE), named));
}

/// What a pod has learned from a name, which may lead to internal addresses or not.
fn of_name(policy: &Compiled, may_be_internal: bool) -> Learned {
    let all = policy.record.named;
    Learned {
        all,
        internal: if may_be_internal {
            all
        } else {
            ClassSet::EMPTY
        },
    }
}

#[test]
fn a_name_that_may_not_lead_inside_counts_where_internal_addresses_need_no_entry() {
    for allow_internal in [true, false] {
        let settings = Settings {
            allow_internal,
            ..settings()
        };
        let policy = compiled(Some("partner.test:80"), &[], &settings);
        let ends = |may_be_internal| {
            let learned = of_name(&policy, may_be_internal);
            ends_for(&policy, (SERVICE, OUTSIDE), learned)
        };
        assert!(!ends(true));
        assert_eq!(ends(false), !allow_internal);
    }
}

#[test]
fn connections_to_no_service_stay() {
    let deny: &[(TierAction, &str)] = &[(TierAction::Deny, "10.1.0.2")];
    for to in [
        "10.9.0.1:8080",
        "192.0.2.1:80",
        "192.0.2.2:30080",
        "198.51.100.8:80",
        "198.51.100.7:81",
    ] {
        assert!(!ends(None, deny, (to, BAD)), "{to}");
    }
}

#[test]
fn names_keep_a_connection_also_beside_rules_for_other_services() {
    // Port 53 of a pod is a DNS server behind another port: a denial before the entry for all destinations.
    let dns = service("dns", "10.96.0.8", &[port(443, &["10.1.0.3:53"])]);
    let known = known(&[web(&[OUTSIDE]), dns]);
    let deny: &[(TierAction, &str)] = &[(TierAction::Deny, "10.1.0.9:9 *:25")];
    for (rules, others) in [(&[][..], "*:443"), (deny, "*:443 other.test:22")] {
        let settings = settings();
        let alone = Arc::new(compiled(
            Some(&format!("web.shop.test:80 {others}")),
            rules,
            &settings,
        ));
        let added = needed(&known.judge_all(&alone));
        let (policy, problem) = alone.completed(&settings, &added, known.services());
        assert_eq!(problem, None);
        let name = Name::from_labels(["web", "shop", "test"].map(str::as_bytes)).unwrap();
        let classes = |policy: &Compiled| policy.names.classes(&name);
        assert_ne!(classes(&policy), classes(&alone), "nothing has moved");
        assert_eq!(policy.without_services(), &*alone);
        assert_eq!(
            policy.classes_without_services(classes(&policy)),
            classes(&alone)
        );
        // Rules for Services have no counterpart.
        let all = policy.classes_without_services(ClassSet::ALL);
        let of_alone = alone.record.classes.iter().zip(0..);
        let number = of_alone.filter(|(class, _)| **class != PortClass::NONE);
        assert_eq!(all.iter().count(), number.count());
    }
}

#[test]
fn queries_to_a_resolver_are_led_to_resolvers_and_to_endpoints_of_its_own_service() {
    let dns = service("dns", "10.96.0.10", &[port(53, &["10.1.0.3:53"])]);
    let unready = service("unready", "10.96.0.11", &[port(53, &[])]);
    let known = known(&[dns, unready]);
    let resolvers = [
        "10.96.0.10",
        "10.96.0.11",
        "10.96.0.12",
        "192.0.2.53",
        "10.1.0.4",
    ];
    let resolvers = resolvers.map(|text| text.parse().unwrap());
    let connections = Connections::new(&known, &Through::default(), [].into_iter());
    let is_elsewhere = |transport, to: &str, endpoint: &str| {
        let led = Led {
            from: POD.parse().unwrap(),
            transport,
            to: to.parse().unwrap(),
            endpoint: endpoint.parse().unwrap(),
        };
        connections.leads_elsewhere(&led, &resolvers)
    };
    for to in ["10.96.0.10:53", "192.0.2.53:53"] {
        assert!(is_elsewhere(Transport::Tcp, to, "10.1.9.9:53"), "{to}");
        assert!(!is_elsewhere(Transport::Tcp, to, "10.1.0.4:53"), "{to}");
        assert!(!is_elsewhere(Transport::Sctp, to, "10.1.9.9:53"), "{to}");
    }
    assert!(is_elsewhere(Transport::Udp, "192.0.2.53:53", "10.1.9.9:53"));
    assert!(!is_elsewhere(
        Transport::Tcp,
        "10.96.0.10:53",
        "10.1.0.3:53"
    ));
    assert!(is_elsewhere(Transport::Tcp, "192.0.2.53:53", "10.1.0.3:53"));
    // Another port, another address, and Services whose endpoints are not known.
    for to in [
        "10.96.0.10:80",
        "192.0.2.54:53",
        "10.96.0.11:53",
        "10.96.0.12:53",
    ] {
        assert!(!is_elsewhere(Transport::Tcp, to, "10.1.9.9:53"), "{to}");
    }
}

#[test]
fn a_connection_through_an_address_that_a_service_has_lost_is_judged_until_it_ends() {
    let mut service = Service::clone(&web(&[BAD]));
    service.external = vec!["198.51.100.7".parse().unwrap()];
    let of_service = Led {
        from: POD.parse().unwrap(),
        transport: Transport::Tcp,
        to: "198.51.100.7:80".parse().unwrap(),
        endpoint: BAD.parse().unwrap(),
    };
    let of_none = Led {
        to: "198.51.100.8:80".parse().unwrap(),
        ..of_service
    };
    let present = [of_service, of_none];
    let with_service = known(&[Arc::new(service)]);
    let mut through = Connections::new(&with_service, &Through::default(), present.into_iter());
    let none = known(&[]);
    let policy = compiled(None, &[(TierAction::Deny, "10.1.0.2")], &settings());
    let denied = |connections: &Connections<'_>| {
        let judged = present.map(|led| (led, Learned::default()));
        connections.denied(&policy, judged.into_iter())
    };
    for _ in 0..2 {
        let before = through.into_through();
        through = Connections::new(&none, &before, present.into_iter());
        assert_eq!(denied(&through), [of_service]);
    }
    let mut before = through.into_through();
    before.forget(&of_service);
    assert!(before.is_empty());
    assert_eq!(
        denied(&Connections::new(&none, &before, present.into_iter())),
        []
    );
}
