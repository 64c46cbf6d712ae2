//! The memory of what Services had is bounded for each Service and namespace.

use std::net::Ipv4Addr;

use egress_policy::services::Transport;

use super::*;

fn name(namespace: &str, name: &str) -> ServiceName {
    ServiceName {
        namespace: namespace.into(),
        name: name.into(),
    }
}

fn address(number: u32) -> IpAddr {
    Ipv4Addr::from(0x0a00_0000 + number).into()
}

fn endpoints(count: u32) -> impl Iterator<Item = Part> {
    (0..count).map(|number| Part::Endpoint("web".into(), Some(80), address(number)))
}

fn port(port: u16, node_port: Option<u16>) -> Part {
    Part::Port(PortFacts {
        name: "web".into(),
        transport: Transport::Tcp,
        port,
        node_port,
    })
}

fn parts(moments: &Moments, name: &ServiceName) -> usize {
    moments.get(name).map_or(0, |had| had.parts().count())
}

#[test]
fn the_same_part_is_noted_once() {
    let (web, now) = (name("shop", "web"), Instant::now());
    let mut moments = Moments::default();
    for _ in 0..10 {
        moments.note_parts(&web, endpoints(5_000), now);
    }
    assert_eq!(parts(&moments, &web), 5_000);
    moments.forget(now + REMEMBERED);
    assert_eq!(parts(&moments, &web), 5_000);
    moments.forget(now + 2 * REMEMBERED);
    assert_eq!(moments.names().count(), 0);
}

#[test]
fn a_service_that_had_too_much_keeps_only_its_node_ports() {
    let (web, now) = (name("shop", "web"), Instant::now());
    let mut moments = Moments::default();
    moments.note_parts(
        &web,
        [port(80, Some(30_080)), port(81, None)].into_iter(),
        now,
    );
    moments.note_parts(&web, endpoints(8_192), now);
    let had = moments.get(&web).expect("the Service");
    assert!(had.had_more());
    let left: Vec<_> = had.parts().collect();
    assert!(
        matches!(
            left[..],
            [Part::Port(PortFacts {
                node_port: Some(30_080),
                ..
            })]
        ),
        "{left:?}"
    );
}

#[test]
fn the_largest_service_of_a_namespace_uses_up_its_own_memory_first() {
    let now = Instant::now();
    let (small, elsewhere) = (name("shop", "small"), name("other", "small"));
    let mut moments = Moments::default();
    for name in [&small, &elsewhere] {
        moments.note_parts(name, endpoints(10), now);
    }
    for number in 0..20 {
        let large = name("shop", &format!("large{number}"));
        moments.note_parts(&large, endpoints(8_000), now);
    }
    let all: usize = moments.of.values().map(|had| had.parts.len()).sum();
    assert!(all <= OF_NAMESPACE + 10, "{all}");
    for name in [&small, &elsewhere] {
        assert_eq!(parts(&moments, name), 10);
        assert!(!moments.get(name).expect("noted").had_more());
    }
    let forgotten = moments.of.values().filter(|had| had.had_more()).count();
    assert_eq!(forgotten, 16);
}

#[test]
fn too_many_external_addresses_are_noted_as_such_and_cluster_ips_stay() {
    let (web, now) = (name("shop", "web"), Instant::now());
    let mut moments = Moments::default();
    let cluster = Address::Cluster(address(1));
    moments.note_addresses(&web, [cluster].into_iter(), now);
    let external = (0..5_000).map(|number| Address::External(address(number)));
    moments.note_addresses(&web, external, now);
    let had = moments.get(&web).expect("the Service");
    assert!(had.had_more_addresses() && !had.had_more());
    assert_eq!(had.addresses().count(), MOST_EXTERNAL + 1);
    assert!(had.addresses().any(|address| *address == cluster));
}
