//! Services that need more rules than a policy may have.

use super::*;

/// A pod with a name and an address of its own, which may not reach 10.1.0.2.
fn base(settings: &Settings) -> Compiled {
    let rules = [(TierAction::Deny, "10.1.0.2")];
    compiled(Some("api.test:443 198.51.100.9:80"), &rules, settings)
}

fn of(namespace: &str, service: &Arc<Service>) -> Arc<Service> {
    let mut service = Service::clone(service);
    service.name = Arc::new(ServiceName {
        namespace: namespace.into(),
        name: service.name.name.clone(),
    });
    Arc::new(service)
}

/// The policy with its rules, and the problem with these.
fn closed(base: &Compiled, known: &Known, settings: &Settings) -> (Compiled, String) {
    let added = needed(&known.judge_all(base));
    let (policy, problem) = base.with_services(settings, &added, known.services());
    (policy, problem.expect("a problem"))
}

fn passes(policy: &Compiled, to: &str) -> bool {
    verdict(policy, to, Transport::Tcp) == Verdict::Pass
}

#[test]
fn a_namespace_with_too_many_ports_is_closed_alone() {
    let settings = settings();
    // Every second port is denied.
    let ports = (0..300_u16).map(|number| {
        let endpoint = if number % 2 == 0 {
            "10.1.0.2:1"
        } else {
            "10.1.0.3:1"
        };
        port(100 + 2 * number, &[endpoint])
    });
    let ports: Vec<ServicePort> = ports.collect();
    let many = of("team", &service("many", CLUSTER_IP, &ports));
    let two = [port(80, &["10.1.0.2:80"]), port(81, &["10.1.0.3:81"])];
    let others = service("web", "10.96.0.9", &two);
    let known = known(&[many, others]);
    let (policy, problem) = closed(&base(&settings), &known, &settings);
    assert!(problem.contains("classes"), "{problem}");
    assert!(
        problem.contains("Services of namespace team with"),
        "{problem}"
    );
    assert!(!passes(&policy, "10.96.0.7:100"));
    assert!(!passes(&policy, "10.96.0.7:102"));
    // The others are as ever.
    assert!(!passes(&policy, "10.96.0.9:80"));
    for to in ["10.96.0.9:81", "10.96.0.8:100", "198.51.100.9:80"] {
        assert!(passes(&policy, to), "{to}");
    }
}

#[test]
fn many_node_ports_of_a_namespace_close_node_ports_alone() {
    let settings = settings();
    let ports = (0..200_u16).map(|number| ServicePort {
        node_port: Some(30_000 + 10 * number),
        ..port(100 + number, &["10.1.0.2:80"])
    });
    let ports: Vec<ServicePort> = ports.collect();
    let mut other = Service::clone(&service(
        "other",
        "10.96.0.9",
        &[port(80, &["10.1.0.3:80"])],
    ));
    other.ports[0].node_port = Some(31_015);
    let known = known(&[
        of("team", &service("many", CLUSTER_IP, &ports)),
        Arc::new(other),
    ]);
    let (policy, problem) = closed(&base(&settings), &known, &settings);
    assert!(problem.contains("namespace team"), "{problem}");
    for to in ["10.9.0.1:30000", "10.9.0.1:31990", "10.1.0.3:30010"] {
        assert!(!passes(&policy, to), "{to}");
    }
    for to in [
        "10.9.0.1:31015",
        "10.9.0.1:443",
        "10.1.0.3:8080",
        "198.51.100.9:80",
        "10.96.0.8:80",
    ] {
        assert!(passes(&policy, to), "{to}");
    }
}

#[test]
fn many_external_addresses_of_a_namespace_close_what_is_near_them() {
    let settings = settings();
    let mut many = Service::clone(&web(&["10.1.0.2:80"]));
    let external =
        (0..5_000_u32).map(|number| IpAddr::from((0xc633_0000 | number << 3).to_be_bytes()));
    many.external = external.collect();
    let many = of("team", &Arc::new(many));
    let mut other = Service::clone(&service(
        "other",
        "10.96.0.9",
        &[port(80, &["10.1.0.2:80"])],
    ));
    other.external = vec!["203.0.113.80".parse().unwrap()];
    let known = known(&[Arc::clone(&many), Arc::new(other)]);
    let base = compiled(
        Some("api.test:443 198.51.0.0/16:80 192.0.2.9:80 203.0.113.0/24:80"),
        &[(TierAction::Deny, "10.1.0.2")],
        &settings,
    );
    let (policy, problem) = closed(&base, &known, &settings);
    assert!(problem.contains("namespace team"), "{problem}");
    for ip in &many.external {
        assert!(!passes(&policy, &format!("{ip}:80")), "{ip}");
    }
    assert!(!passes(&policy, "203.0.113.80:80"));
    for to in [
        "192.0.2.9:80",
        "203.0.113.9:80",
        "10.96.0.8:80",
        "10.1.0.3:80",
    ] {
        assert!(passes(&policy, to), "{to}");
    }
}

#[test]
fn many_namespaces_are_closed_together() {
    let settings = settings();
    let services = (0..20_u16).map(|namespace| {
        let ports = (0..16_u16).map(|number| {
            let endpoint = if number % 2 == 0 {
                "10.1.0.2:1"
            } else {
                "10.1.0.3:1"
            };
            port(100 + 16 * namespace + number, &[endpoint])
        });
        let ports: Vec<ServicePort> = ports.collect();
        let ip = format!("10.96.1.{namespace}");
        of(&format!("n{namespace}"), &service("many", &ip, &ports))
    });
    let services: Vec<_> = services.collect();
    let (policy, problem) = closed(&base(&settings), &known(&services), &settings);
    assert!(
        problem.contains("; Services with an endpoint that is denied"),
        "{problem}"
    );
    assert!(!passes(&policy, "10.96.1.0:100"));
    assert!(!passes(&policy, "10.96.1.19:101"));
    assert!(passes(&policy, "10.96.2.1:100"));
}

#[test]
fn no_namespace_takes_the_opened_ports_of_another() {
    let settings = Settings {
        allow_internal: false,
        ..settings()
    };
    let base = compiled(Some("10.1.0.3"), &[], &settings);
    // Each odd port is that of many Services.
    let many = (0..100_u16).map(|number| {
        let ip = format!("10.96.1.{number}");
        let name = format!("s{number}");
        of(
            "team",
            &service(&name, &ip, &[port(1 + number % 20, &["10.1.0.3:80"])]),
        )
    });
    let mut services: Vec<_> = many.collect();
    services.push(web(&["10.1.0.3:80"]));
    let policy = with(&base, &known(&services), &settings);
    assert!(passes(&policy, "10.96.0.7:80"));
    let opened =
        (0..20).filter(|number| passes(&policy, &format!("10.96.1.{number}:{}", 1 + number)));
    assert_eq!(opened.count(), 15);
}

/// A Service of another namespace for each address that the namespace `many` does not have, in every 50th place.
fn among_others(count: u32) -> (Vec<Arc<Service>>, Vec<String>) {
    let own = |number: u32| (u64::from(number) * 2_654_435_761 % 65_536) as u16;
    let address = |at: u16| format!("10.96.{}.{}", at >> 8, at & 255);
    let many = (0..count).map(|number| {
        // One port of two is denied, and it is another one of each Service.
        let ports = [
            port(1_000 + number as u16, &["10.1.0.2:80"]),
            port(80, &["10.1.0.3:80"]),
        ];
        let name = format!("s{number}");
        of("many", &service(&name, &address(own(number)), &ports))
    });
    let taken: std::collections::BTreeSet<u16> = (0..count).map(own).collect();
    let others = (0..u16::MAX).step_by(50);
    let others: Vec<String> = others
        .filter(|at| !taken.contains(at))
        .map(address)
        .collect();
    let services = others.iter().zip(0..).map(|(ip, number)| {
        let name = format!("o{number}");
        service(&name, ip, &[port(80, &["10.1.0.3:80"])])
    });
    (many.chain(services).collect(), others)
}

#[test]
fn many_services_of_a_namespace_close_none_of_others() {
    let settings = settings();
    for count in [300, 600, 6_000] {
        let (services, others) = among_others(count);
        let (policy, problem) = closed(&base(&settings), &known(&services), &settings);
        assert!(problem.contains("namespace many with"), "{problem}");
        let cidrs = places::Trie::<egress_common::classes::ClassSet>::of_cidrs(&policy.cidrs);
        let is_closed = |ip: &IpAddr| {
            let classes = cidrs.get(&to_mapped(*ip));
            classes.meets(policy.record.deny)
        };
        for service in services.iter().filter(|one| &*one.name.namespace == "many") {
            assert!(is_closed(&service.cluster[0]), "{count}: {}", service.name);
        }
        for ip in &others {
            assert!(!is_closed(&ip.parse().unwrap()), "{count}: {ip}");
        }
        assert!(passes(&policy, &format!("{}:80", others[0])));
    }
}

#[test]
fn namespaces_that_exceed_the_room_share_it() {
    let settings = settings();
    let (mut services, _) = among_others(6_000);
    let few = (0..300_u16).map(|number| {
        let ports = [
            port(10_000 + number, &["10.1.0.2:80"]),
            port(80, &["10.1.0.3:80"]),
        ];
        let ip = format!("10.97.{}.{}", number / 128, 2 * (number % 128));
        of("few", &service(&format!("f{number}"), &ip, &ports))
    });
    services.extend(few);
    let (policy, problem) = closed(&base(&settings), &known(&services), &settings);
    assert!(problem.contains("namespace few, many with"), "{problem}");
    // The smaller namespace keeps its addresses.
    let cidrs = places::Trie::<egress_common::classes::ClassSet>::of_cidrs(&policy.cidrs);
    let is_closed = |ip: &str| {
        let classes = cidrs.get(&to_mapped(ip.parse().unwrap()));
        classes.meets(policy.record.deny)
    };
    for number in 0..128 {
        assert!(is_closed(&format!("10.97.0.{}", 2 * number)));
        assert!(!is_closed(&format!("10.97.0.{}", 2 * number + 1)));
    }
}
