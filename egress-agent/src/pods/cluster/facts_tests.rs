use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;

fn object<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn a_service_has_its_cluster_ips_of_both_families() {
    for (spec, expected) in [
        (
            json!({ "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd00::a"] }),
            &["10.96.0.10", "fd00::a"][..],
        ),
        (json!({ "clusterIP": "10.96.0.10" }), &["10.96.0.10"]),
        (json!({ "clusterIP": "None", "clusterIPs": ["None"] }), &[]),
        (json!({}), &[]),
    ] {
        assert_eq!(
            of_service(object(json!({ "spec": spec }))).addresses,
            addresses(expected)
        );
    }
    assert_eq!(of_service(object(json!({}))), Served::default());
}

#[test]
fn endpoints_count_whether_ready_or_not() {
    let slice = json!({ "addressType": "IPv4", "endpoints": [
        { "addresses": ["10.1.0.2"], "conditions": { "ready": true } },
        { "addresses": ["10.1.0.3"], "conditions": { "ready": false, "serving": true, "terminating": true } },
        { "addresses": ["10.1.0.2"] },
    ] });
    assert_eq!(
        of_slice(object(slice)).addresses,
        addresses(&["10.1.0.2", "10.1.0.3"])
    );
    let named = json!({ "addressType": "FQDN", "endpoints": [{ "addresses": ["10.1.0.2"] }] });
    assert_eq!(of_slice(object(named)), Served::default());

    let endpoints = json!({ "subsets": [
        { "addresses": [{ "ip": "10.1.0.2" }], "notReadyAddresses": [{ "ip": "10.1.0.3" }] },
        { "addresses": [{ "ip": "fd00:1::2" }] },
    ] });
    assert_eq!(
        of_endpoints(object(endpoints)).addresses,
        addresses(&["10.1.0.2", "10.1.0.3", "fd00:1::2"])
    );
    assert_eq!(of_endpoints(object(json!({}))), Served::default());
}

#[test]
fn an_address_that_no_machine_has_is_not_an_endpoint() {
    let endpoints = json!({ "subsets": [{ "addresses": [
        { "ip": "0.0.0.0" }, { "ip": "127.0.0.1" }, { "ip": "::1" }, { "ip": "ff02::1" }, { "ip": "x" },
    ] }] });
    assert!(of_endpoints(object(endpoints)).addresses.is_empty());
}

#[test]
fn a_node_has_ranges_of_pods_and_internal_addresses() {
    let node = json!({
        "metadata": { "name": "node-1", "uid": "u" },
        "spec": { "podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd00:1::/64"] },
        "status": { "addresses": [
            { "type": "Hostname", "address": "node-1" },
            { "type": "InternalIP", "address": "192.168.0.5" },
            { "type": "InternalIP", "address": "fd00::5" },
            { "type": "ExternalIP", "address": "203.0.113.5" },
        ] },
    });
    let facts = NodeFacts::read(object(node));
    assert_eq!(facts.uid, "u");
    assert_eq!(
        facts.pod_prefixes,
        ["10.1.0.0/24", "fd00:1::/64"].map(|text| Prefix::parse(text).unwrap())
    );
    assert_eq!(facts.addresses, addresses(&["192.168.0.5", "fd00::5"]));
    assert_eq!(NodeFacts::read(object(json!({}))), NodeFacts::default());
}

#[test]
fn a_service_range_of_a_whole_family_does_not_count() {
    let range = json!({ "spec": { "cidrs": ["10.96.0.0/12", "0.0.0.0/0", "::/0", "x"] } });
    assert_eq!(
        of_service_range(object(range)),
        [Prefix::parse("10.96.0.0/12").unwrap()]
    );
}

#[test]
fn the_dns_ports_of_endpoints_are_those_behind_port_53_of_the_service() {
    let service = of_service(object(json!({ "spec": { "ports": [
        { "name": "dns", "port": 53, "protocol": "UDP", "targetPort": "dns" },
        { "name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": "dns-tcp" },
        { "name": "dns-tls", "port": 853, "protocol": "TCP" },
        { "name": "metrics", "port": 9154 },
        { "name": "odd", "port": 53, "protocol": "SCTP" },
    ] } })));
    let names: BTreeSet<&str> = service.dns_port_names().collect();
    assert_eq!(names, BTreeSet::from(["dns", "dns-tcp"]));
    let slice = of_slice(object(
        json!({ "addressType": "IPv4", "endpoints": [], "ports": [
        { "name": "dns-tcp", "port": 5353, "protocol": "TCP" },
        { "name": "dns", "port": 5353, "protocol": "UDP" },
        { "name": "metrics", "port": 9154, "protocol": "TCP" },
        { "name": "dns-tls", "port": 5354, "protocol": "TCP" },
    ] }),
    ));
    assert_eq!(slice.dns_ports(&names), [5353]);
    // Without the Service.
    assert_eq!(slice.dns_ports(&BTreeSet::new()), [5353]);
    let unnamed = of_endpoints(object(
        json!({ "subsets": [{ "ports": [{ "port": 1053 }] }] }),
    ));
    assert_eq!(unnamed.dns_ports(&BTreeSet::from([""])), [1053]);
    assert_eq!(Served::default().dns_ports(&names), [53]);
}
