//! `existingConnections: trust`: connections that pods opened before the agent's first start on a node go on.

use std::{fs, net::Ipv4Addr, path::Path};

use egress_tests::{
    ApiServer, Builder, Cluster, DEADLINE, SHORT, addresses::server, cluster::allow, echo_on,
    exchange,
};
use serde_json::{Value, json};

use super::existing::{assert_reset, reboot, rejecting, state_dir, wait_existing};

#[track_caller]
fn trusting(state: &Path) -> Builder {
    rejecting()
        .config("existingConnections", "trust")
        .config("stateDir", state.to_str().expect("a path in UTF-8"))
}

#[test]
fn outbound_connections_are_trusted_once_on_a_node() {
    let state = state_dir();
    let lab = trusting(&state.path().join("made")).build();
    let echo = lab.serve_udp(4433);
    let (_web, cart) = lab.shop_and_cart("shop.test:443");
    let mut out = cart.talks_tcp((server(20), 443));
    let datagrams = cart.udp_socket((server(21), 4433));
    assert!(echo_on(&datagrams, b"before", DEADLINE));

    let mut agent = lab.start_agent_with(&["--keep-enforcing"], &[&cart]);
    assert!(
        exchange(&mut out, b"after", DEADLINE),
        "the connection was cut"
    );
    assert!(
        echo_on(&datagrams, b"after", DEADLINE),
        "the connection was cut"
    );
    assert!(
        cart.connect_tcp((server(20), 443), SHORT).is_err(),
        "a new connection was not judged"
    );
    wait_existing(
        &lab,
        &[
            ("outbound", json!("trusted")),
            ("outbound_trusted", json!(2)),
        ],
    );
    assert!(agent.stop().success());

    // No pins are left, so the agent takes this for a first start; the file in `stateDir` shows that it is
    // not.
    reboot(&lab);
    let mut later = cart.talks_tcp((server(99), 443));
    let agent = lab.start_agent(&[&cart]);
    assert_reset(&mut later);
    agent.wait_log("that it was used", |line| {
        line.contains("used on this node before") && line.contains("judged")
    });
    let told = wait_existing(&lab, &[("outbound", json!("judged"))]);
    assert!(
        told["because"]
            .as_str()
            .is_some_and(|why| why.contains("used"))
    );
    drop(echo);
}

#[test]
fn in_a_cluster_outbound_connections_are_trusted_once() {
    let state = state_dir();
    let cluster = Cluster::on(ApiServer::shared(), trusting(state.path()));
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let cart = cluster.run(&shop, "cart", &allow("shop.test:443"));
    let mut later = cluster.run(&shop, "later", &Value::Null);
    let mut out = cart.net().talks_tcp((server(20), 443));
    let mut agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    assert!(
        exchange(&mut out, b"after", DEADLINE),
        "the connection was cut"
    );

    // A pod that is enforced later has no part in the first start.
    let mut of_later = later.net().talks_tcp((server(20), 443));
    cluster.annotate(&mut later, &allow("shop.test:443"));
    agent.wait_enforcing(later.net());
    assert_reset(&mut of_later);

    assert!(agent.stop().success());
    let mut again = cart.net().talks_tcp((server(20), 443));
    let agent = cluster.start_agent();
    agent.wait_enforcing(cart.net());
    assert_reset(&mut again);
}

#[test]
fn without_a_writable_state_directory_nothing_is_trusted() {
    let state = state_dir();
    let file = state.path().join("file");
    fs::write(&file, "").expect("write a file");
    let lab = trusting(&file).build();
    let (_web, cart) = lab.shop_and_cart("shop.test:443");
    let mut out = cart.talks_tcp((server(20), 443));
    let agent = lab.start_agent(&[&cart]);
    let text = agent.wait_log("that it is not trusted", |line| {
        line.contains("ERROR") && line.contains("existingConnections: trust is not used")
    });
    assert!(text.contains(file.to_str().unwrap()), "{text}");
    assert_reset(&mut out);
    wait_existing(&lab, &[("outbound", json!("judged"))]);
}

#[test]
fn trust_does_not_cover_tunnels_denied_or_protected_addresses() {
    let state = state_dir();
    let lab = trusting(state.path())
        .config("ranges.internal", json!(["10.99.0.0/24"]))
        .build();
    let _echo = lab.serve_udp(4789);
    let _web = lab.serve_tcp(443);
    let cart = lab.pod("shop", "cart");
    lab.write_pod(
        &cart,
        &[("allow", "shop.test:443"), ("deny", "203.0.113.30")],
    );
    let tunnel = cart.udp_socket(("10.99.0.7".parse::<Ipv4Addr>().unwrap(), 4789));
    let translated: std::net::Ipv6Addr = "64:ff9b::10.99.0.7".parse().unwrap();
    let translated = cart.udp_socket((translated, 4789));
    assert!(echo_on(&tunnel, b"before", DEADLINE) && echo_on(&translated, b"before", DEADLINE));
    let mut denied = cart.talks_tcp((server(30), 443));
    let metadata: Ipv4Addr = "169.254.169.254".parse().unwrap();
    let mut protected = cart.talks_tcp((metadata, 443));
    let mut other = cart.talks_tcp((server(20), 443));

    let agent = lab.start_agent(&[&cart]);
    assert!(
        exchange(&mut other, b"after", DEADLINE),
        "the connection was cut"
    );
    assert_reset(&mut denied);
    assert_reset(&mut protected);
    assert!(!echo_on(&tunnel, b"after", SHORT), "the tunnel is open");
    assert!(!echo_on(&translated, b"after", SHORT), "the tunnel is open");
    agent.wait_denial("the tunnel", |denial| {
        denial.is(&cart, "tunnel", "10.99.0.7".parse().unwrap(), 4789)
    });
    wait_existing(&lab, &[("outbound_trusted", json!(1))]);
}
