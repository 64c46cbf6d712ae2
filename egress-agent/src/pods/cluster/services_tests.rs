//! Services and endpoints as the API server sends them.

use egress_policy::services::{Losses, Overflown, Places};
use k8s_openapi::api::{core::v1, discovery::v1 as discovery};
use kube::runtime::watcher::Event;
use serde_json::{Value, json};

use super::*;

fn service(spec: &Value, status: &Value) -> Option<ServiceFacts> {
    let object = json!({
        "metadata": { "namespace": "shop", "name": "web" },
        "spec": spec,
        "status": status,
    });
    ServiceFacts::read(serde_json::from_value(object).expect("a Service"))
}

fn slice(kind: &str, addresses: &[&str], ports: &Value) -> EndpointFacts {
    let object = json!({
        "metadata": { "namespace": "shop", "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": kind,
        "endpoints": [{ "addresses": addresses, "conditions": { "ready": false } }],
        "ports": ports,
    });
    let read = serde_json::from_value(object).expect("a slice");
    EndpointFacts::of_slice(read).expect("a slice of a Service")
}

fn texts(port: &ServicePort) -> Vec<String> {
    port.endpoints.iter().map(ToString::to_string).collect()
}

#[test]
fn a_service_has_the_endpoints_of_its_slices_by_the_names_of_ports() {
    let spec = json!({
        "clusterIP": "10.96.0.7",
        "clusterIPs": ["10.96.0.7", "fd96::7"],
        "externalIPs": ["198.51.100.7"],
        "ports": [
            { "name": "web", "port": 80, "targetPort": "http", "nodePort": 30080 },
            { "name": "dns", "port": 53, "protocol": "UDP" },
        ],
    });
    let status = json!({ "loadBalancer": { "ingress": [{ "ip": "198.51.100.8" }, { "hostname": "a.test" }] } });
    let facts = service(&spec, &status).expect("a Service");
    let ports = json!([{ "name": "web", "port": 8080 }, { "name": "other", "port": 9 }]);
    let v4 = slice("IPv4", &["10.1.0.3", "10.1.0.2"], &ports);
    let v6 = slice(
        "IPv6",
        &["fd01::2"],
        &json!([{ "name": "web", "port": 8081 }, { "name": "dns" }]),
    );
    let names = slice("FQDN", &["a.test"], &ports);
    let made = facts.with(&[&v4, &v6, &names], false);
    assert_eq!(made.cluster.len(), 2);
    assert_eq!(made.external.len(), 2);
    let web = &made.ports[0];
    assert_eq!((web.port, web.node_port), (80, Some(30080)));
    assert_eq!(
        texts(web),
        ["10.1.0.2:8080", "10.1.0.3:8080", "[fd01::2]:8081"]
    );
    let dns = &made.ports[1];
    assert_eq!(dns.transport, Transport::Udp);
    // A port without a number is that of the Service.
    assert_eq!(texts(dns), ["[fd01::2]:53"]);
}

#[test]
fn a_service_that_no_node_translates_is_left_out() {
    let ports = json!([{ "port": 80 }]);
    for spec in [
        json!({ "clusterIP": "None", "clusterIPs": ["None"], "ports": ports }),
        json!({ "type": "ExternalName", "externalName": "a.test", "ports": ports }),
    ] {
        assert_eq!(service(&spec, &Value::Null), None, "{spec}");
    }
}

#[test]
fn endpoints_objects_count_where_there_are_no_slices() {
    let object = json!({
        "metadata": { "namespace": "shop", "name": "web" },
        "subsets": [
            { "addresses": [{ "ip": "10.1.0.2" }], "ports": [{ "port": 8080 }] },
            { "notReadyAddresses": [{ "ip": "10.1.0.3" }], "ports": [{ "port": 8081 }] },
        ],
    });
    let read = serde_json::from_value(object).expect("an Endpoints object");
    let endpoints = EndpointFacts::of_endpoints(read).expect("endpoints of a Service");
    let spec = json!({ "clusterIP": "10.96.0.7", "ports": [{ "port": 80 }] });
    let facts = service(&spec, &Value::Null).expect("a Service");
    let made = facts.with(&[&endpoints], false);
    assert_eq!(texts(&made.ports[0]), ["10.1.0.2:8080", "10.1.0.3:8081"]);
}

#[test]
fn what_a_service_had_between_two_snapshots_is_noted() {
    let web: v1::Service = serde_json::from_value(json!({
        "metadata": { "namespace": "shop", "name": "web" },
        "spec": { "clusterIP": "10.96.0.7", "ports": [{ "port": 80 }] },
    }))
    .expect("a Service");
    let slice = |address: &str| -> discovery::EndpointSlice {
        serde_json::from_value(json!({
            "metadata": {
                "namespace": "shop", "name": "web-1",
                "labels": { "kubernetes.io/service-name": "web" },
            },
            "addressType": "IPv4",
            "endpoints": [{ "addresses": [address] }],
            "ports": [{ "port": 8080 }],
        }))
        .expect("a slice")
    };
    let mut tables = ServiceTables::default();
    for event in [Event::Init, Event::InitApply(web), Event::InitDone] {
        tables
            .services
            .apply(event, |read, _| ServiceFacts::read(read));
    }
    for event in [
        Event::Init,
        Event::InitApply(slice("10.1.0.3")),
        Event::InitDone,
        Event::Apply(slice("10.1.0.2")),
        Event::Apply(slice("10.1.0.3")),
    ] {
        tables
            .endpoints
            .apply(event, |read, _| EndpointFacts::of_slice(read));
    }
    let made = tables.make(&Table::default());
    let endpoints = |service: &Service| texts(&service.ports[0]);
    let [service] = &made.all().collect::<Vec<_>>()[..] else {
        panic!("one Service");
    };
    assert_eq!(endpoints(service), ["10.1.0.3:8080"]);
    let mut expected = Services::new([Arc::clone(service)], Vec::new());
    let passed = Service {
        ports: vec![ServicePort {
            endpoints: ["10.1.0.2:8080", "10.1.0.3:8080"]
                .map(|at| at.parse().expect("an endpoint"))
                .into(),
            ..service.ports[0].clone()
        }],
        ..Service::clone(service)
    };
    expected.note_passed(vec![Arc::new(passed).into()]);
    assert_eq!(made, expected);
}

/// A Service with these ports, and a slice of them with these addresses.
struct Edited {
    tables: ServiceTables,
    losses: Losses,
    ports: u16,
}

impl Edited {
    fn new(ports: u16, addresses: u16) -> Self {
        let slice = serde_json::from_value(json!({
            "metadata": {
                "namespace": "shop", "name": "web-1",
                "labels": { "kubernetes.io/service-name": "web" },
            },
            "addressType": "IPv4",
            "endpoints": (0..addresses)
                .map(|n| json!({ "addresses": [format!("10.1.{}.{}", n / 250, 1 + n % 250)] }))
                .collect::<Value>(),
            "ports": (0..ports)
                .map(|n| json!({ "name": format!("p{n}"), "port": 8080 }))
                .collect::<Value>(),
        }));
        let slice: discovery::EndpointSlice = slice.expect("a slice");
        let mut tables = ServiceTables::default();
        for event in [Event::Init, Event::InitDone, Event::Apply(slice)] {
            tables
                .endpoints
                .apply(event, |read, _| EndpointFacts::of_slice(read));
        }
        let mut edited = Self {
            tables,
            losses: Losses::new(Arc::default()),
            ports,
        };
        for event in [Event::Init, Event::InitDone] {
            edited.apply(event);
        }
        edited.edit(0);
        edited.take();
        edited
    }

    fn apply(&mut self, event: Event<v1::Service>) {
        let services = &mut self.tables.services;
        services.apply(event, |read, _| ServiceFacts::read(read));
    }

    /// Gives the Service other ports.
    fn edit(&mut self, edit: u16) {
        let number = |n: u16| 1 + (u32::from(n) + u32::from(edit) * u32::from(self.ports)) % 65_000;
        let ports = (0..self.ports).map(|n| json!({ "name": format!("p{n}"), "port": number(n) }));
        let service = serde_json::from_value(json!({
            "metadata": { "namespace": "shop", "name": "web" },
            "spec": { "clusterIP": "10.96.0.7", "ports": ports.collect::<Value>() },
        }));
        self.apply(Event::Apply(service.expect("a Service")));
    }

    /// Takes a snapshot. Returns how many endpoints of ports it has as those of a moment.
    fn take(&mut self) -> usize {
        self.tables.renew();
        let services = self.tables.current(&Table::default());
        self.losses
            .take(&services, &Places::default(), Instant::now());
        let passed = services.passed().iter();
        let ports = passed.flat_map(|passed| &passed.service.ports);
        ports.map(|port| port.endpoints.len()).sum()
    }
}

#[test]
fn many_edits_of_one_service_between_two_snapshots_close_it_alone() {
    let mut edited = Edited::new(200, 50);
    let other = serde_json::from_value(json!({
        "metadata": { "namespace": "shop", "name": "other" },
        "spec": { "clusterIP": "10.96.0.8", "ports": [{ "name": "p0", "port": 80 }] },
    }));
    let other: v1::Service = other.expect("a Service");
    edited.apply(Event::Apply(other.clone()));
    for edit in 1..=80 {
        edited.edit(edit);
    }
    edited.apply(Event::Delete(other));
    assert_eq!(edited.take(), 0);
    let closed = edited.losses.overflown().closed;
    let closed: Vec<String> = closed.iter().map(ToString::to_string).collect();
    assert_eq!(closed, ["shop/web"]);
}

#[test]
fn few_edits_of_one_service_are_noted_in_full() {
    let mut edited = Edited::new(2, 10);
    for edit in 1..=20 {
        edited.edit(edit);
    }
    // All but the ports that it has now.
    assert_eq!(edited.take(), 20 * 2 * 10);
    assert_eq!(edited.losses.overflown(), Overflown::default());
}

#[test]
fn edits_of_others_push_out_no_moment_of_a_service() {
    let service = |namespace: &str, name: &str, port: u32| -> v1::Service {
        serde_json::from_value(json!({
            "metadata": { "namespace": namespace, "name": name },
            "spec": {
                "clusterIP": "10.96.0.7", "externalIPs": ["10.0.0.53"], "ports": [{ "port": port }],
            },
        }))
        .expect("a Service")
    };
    for namespace in ["shop", "other"] {
        let mut edited = Edited::new(1, 1);
        edited.apply(Event::Apply(service("shop", "claim", 53)));
        edited.apply(Event::Delete(service("shop", "claim", 53)));
        for port in 1..=1_100 {
            edited.apply(Event::Apply(service(namespace, "noise", port)));
        }
        edited.take();
        let services = edited.losses.present();
        let mut passed = services.passed().iter();
        let claim = passed.find(|passed| &*passed.service.name.name == "claim");
        assert_eq!(claim.expect("noted").service.ports[0].port, 53);
    }
}

/// The Services of the present snapshot that have more endpoints than it has.
fn too_large(edited: &Edited) -> Vec<String> {
    let services = edited.losses.present();
    let large = services.all().filter(|service| service.has_more);
    large.map(|service| service.name.to_string()).collect()
}

#[test]
fn a_service_with_more_endpoints_than_are_joined_has_none() {
    for (ports, addresses, large) in [(600, 100, &[][..]), (4_000, 1_000, &["shop/web"])] {
        let edited = Edited::new(ports, addresses);
        assert_eq!(too_large(&edited), large);
        let services = edited.losses.present();
        let web = services.all().next().expect("a Service");
        assert_eq!(web.ports.len(), usize::from(ports));
        let has_endpoints = web.ports.iter().any(|port| !port.endpoints.is_empty());
        assert_eq!(has_endpoints, large.is_empty());
    }
}

#[test]
fn the_largest_services_of_a_namespace_give_way_and_none_of_another() {
    let mut edited = Edited::new(1, 1);
    for (namespace, addresses) in [("team", 500), ("other", 100)] {
        for number in 0..6_u16 {
            let name = format!("s{number}");
            let ports = |number: u16| -> Value {
                let ports = (1..=100)
                    .map(|port| json!({ "name": format!("p{port}"), "port": number + port }));
                ports.collect()
            };
            let service = serde_json::from_value(json!({
                "metadata": { "namespace": namespace, "name": name },
                "spec": { "clusterIP": "10.96.0.8", "ports": ports(0) },
            }));
            edited.apply(Event::Apply(service.expect("a Service")));
            let slice: discovery::EndpointSlice = serde_json::from_value(json!({
                "metadata": {
                    "namespace": namespace, "name": name,
                    "labels": { "kubernetes.io/service-name": name },
                },
                "addressType": "IPv4",
                "endpoints": (0..addresses + number)
                    .map(|n| json!({ "addresses": [format!("10.2.{}.{}", n / 250, 1 + n % 250)] }))
                    .collect::<Value>(),
                "ports": ports(8_000),
            }))
            .expect("a slice");
            let endpoints = &mut edited.tables.endpoints;
            endpoints.apply(Event::Apply(slice), |read, _| EndpointFacts::of_slice(read));
        }
    }
    edited.take();
    assert_eq!(too_large(&edited), ["team/s5"]);
}

#[test]
fn services_with_very_many_ports_are_too_large_and_those_with_few_are_not() {
    for (count, ports, large) in [(1, 4_096, 0), (1, 4_097, 1), (5, 4_096, 1), (1_500, 16, 0)] {
        let mut edited = Edited::new(1, 1);
        for number in 0..count {
            let ports = (1..=ports).map(|port| json!({ "name": format!("p{port}"), "port": port }));
            let service = serde_json::from_value(json!({
                "metadata": { "namespace": "team", "name": format!("s{number}") },
                "spec": { "clusterIP": "10.96.0.8", "ports": ports.collect::<Value>() },
            }));
            edited.apply(Event::Apply(service.expect("a Service")));
        }
        edited.take();
        assert_eq!(
            too_large(&edited).len(),
            large,
            "{count} with {ports} ports"
        );
    }
}
