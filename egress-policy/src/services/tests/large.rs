//! Very large Services.

use super::*;

/// A Service with a cluster IP of its own, these ports, and as many external addresses.
fn wide(ports: &[ServicePort], external: u32) -> Arc<Service> {
    let mut wide = Service::clone(&service("wide", "10.96.1.1", ports));
    let external = (0..external).map(|number| IpAddr::from((0xc612_0000 | number).to_be_bytes()));
    wide.external = external.collect();
    Arc::new(wide)
}

fn ports(count: u16, endpoint: &str) -> Vec<ServicePort> {
    (1..=count)
        .map(|number| port(number, &[endpoint]))
        .collect()
}

/// How many addresses the rules of a closed pod for these Services have.
fn addresses(known: &Known) -> usize {
    let policy = compiled(Some(""), &[], &settings());
    let rules = needed(&known.judge_all(&policy));
    rules.iter().map(|rule| rule.to.len()).sum()
}

#[test]
fn many_ports_at_many_external_addresses_take_few_rules() {
    let wide = wide(&ports(1_000, "10.1.0.2:53"), 1_000);
    let known = known(&[wide, web(&["10.1.0.3:8080"])]);
    assert!(addresses(&known) < 10_000);
    let settings = settings();
    let policy = with(&compiled(Some(""), &[], &settings), &known, &settings);
    let passes = |to: &str| verdict(&policy, to, Transport::Tcp) == Verdict::Pass;
    for to in ["10.96.1.1:7", "198.18.0.9:999"] {
        assert!(!passes(to), "{to}");
    }
    assert!(passes(&format!("{CLUSTER_IP}:80")));
}

#[test]
fn many_external_addresses_of_one_port_need_no_rule_each() {
    let wide = wide(&ports(1, "10.1.0.2:53"), 1_000);
    let policy = compiled(Some(""), &[], &settings());
    assert_eq!(needed(&known(&[wide]).judge_all(&policy)).len(), 2);
}

#[test]
fn a_connection_through_one_of_many_external_addresses_is_judged() {
    for to in ["198.18.0.9:999", "198.18.0.9:1001", "198.17.0.1:9"] {
        let known = known(&[wide(&ports(1_000, "10.1.0.2:80"), 1_000)]);
        let policy = compiled(None, &[(TierAction::Deny, "10.1.0.2")], &settings());
        let led = Led {
            from: "10.1.0.5".parse().unwrap(),
            transport: Transport::Tcp,
            to: to.parse().unwrap(),
            endpoint: "10.1.0.2:80".parse().unwrap(),
        };
        let connections = Connections::new(&known, &Through::default(), [led].into_iter());
        let judged = [(led, Learned::default())];
        let denied = connections.denied(&policy, judged.into_iter());
        assert_eq!(denied.len(), usize::from(to == "198.18.0.9:999"), "{to}");
    }
}

#[test]
fn a_service_with_more_endpoints_than_are_known_is_closed() {
    let mut large = Service::clone(&web(&[]));
    large.external = vec!["10.9.0.7".parse().unwrap()];
    large.ports[0].node_port = Some(30_080);
    large.has_more = true;
    let known = known(&[Arc::new(large)]);
    let settings = settings();
    let base = compiled(Some("10.96.0.7:80 10.9.0.7:80"), &[], &settings);
    let policy = with(&base, &known, &settings);
    let passes = |to: &str| verdict(&policy, to, Transport::Tcp) == Verdict::Pass;
    for to in ["10.96.0.7:80", "10.9.0.7:80", "10.9.0.1:30080"] {
        assert!(!passes(to), "{to}");
    }
    assert!(passes("10.9.0.1:30081"));
}
