//! Name resolution and enforcement with widely used resolvers.

use std::{
    fs,
    net::IpAddr,
    process::{Command, Stdio},
};

use egress_tests::{
    Lab, Pod, SHORT,
    addresses::{RESOLVER, RESOLVER6, numbered, server, server6},
    dns::{RecordType, ResponseCode},
    eventually, resolvers,
};

const ZONE: &str = "\
$ORIGIN test.
$TTL 300
@ IN SOA ns.test. root.test. 1 3600 600 86400 300
@ IN NS ns.test.
ns IN A 10.99.0.53
shop IN A 203.0.113.10
shop IN AAAA 2001:db8::a
www IN CNAME shop
deep IN CNAME www
evil IN A 203.0.113.66
";

/// The number of addresses of `many.test`: more than fit into a datagram, and no more than BIND takes for one
/// name.
const MANY: u32 = 90;

/// Writes the zone into the laboratory's directory; returns the file's name.
fn zone(lab: &Lab) -> &'static str {
    let many = (0..MANY).map(|n| format!("many IN A {}\n", numbered(n)));
    let zone = ZONE.to_owned() + &many.collect::<String>();
    fs::write(lab.directory().join("test.zone"), zone).expect("write a zone");
    "test.zone"
}

fn unbound(lab: &Lab) -> Command {
    resolvers::unbound(lab, zone(lab))
}

fn dnsmasq(lab: &Lab) -> Command {
    let hosts = lab.directory().join("hosts");
    let many = (0..MANY).map(|n| format!("{} many.test\n", numbered(n)));
    fs::write(&hosts, many.collect::<String>()).expect("write hosts");
    let mut command = resolvers::dnsmasq(lab);
    command
        .arg("--local=/test/")
        .arg(format!("--addn-hosts={}", hosts.display()))
        .arg(format!(
            "--host-record=shop.test,{},{}",
            server(10),
            server6(10)
        ))
        .arg(format!("--host-record=evil.test,{}", server(66)))
        .args(["--cname=www.test,shop.test", "--cname=deep.test,www.test"]);
    command
}

#[track_caller]
fn check_resolver(resolver: impl FnOnce(&Lab) -> Command) {
    check_resolver_in(&Lab::builder().without_dns().build(), resolver);
}

#[track_caller]
fn check_resolver_in(lab: &Lab, resolver: impl FnOnce(&Lab) -> Command) {
    let _web = lab.serve_tcp(443);
    let mut command = resolver(lab);
    let _resolver = lab.run_resolver(&mut command);
    let (direct, chained) = (lab.pod("shop", "direct"), lab.pod("shop", "chained"));
    lab.write_pod(&direct, &[("allow", "shop.test:443 many.test:443")]);
    lab.write_pod(&chained, &[("allow", "deep.test:443")]);
    let agent = lab.start_agent(&[&direct, &chained]);

    assert_eq!(direct.lookup("shop.test"), [server(10)]);
    direct.talks_tcp((server(10), 443));
    assert_eq!(direct.lookup6("shop.test"), [server6(10)]);
    direct.talks_tcp((server6(10), 443));
    agent.denies_name(&direct, "evil.test");
    agent.denies_name(&direct, "deep.test");
    agent.denies_tcp(&direct, (server(66), 443), "address_not_learned");

    let answer = chained.resolve("deep.test", RecordType::A);
    assert_eq!(answer.message.answers.len(), 3, "two CNAMEs and an address");
    chained.talks_tcp((server(10), 443));
    agent.denies_tcp(&chained, (server(10), 22), "port_not_allowed");
    check_truncated_responses(lab, &direct);
    check_tcp(lab, &direct, &chained);
    assert_eq!(direct.syn_retransmissions(), 0);
}

/// A response that does not fit into a datagram is truncated, and the client repeats the query over TCP.
#[track_caller]
fn check_truncated_responses(lab: &Lab, pod: &Pod) {
    let before = lab.allowed(pod).len();
    let mut command = Command::new("dig");
    command.arg(format!("@{RESOLVER}")).arg("many.test");
    let output = pod.netns().run(|| command.output());
    let output = output.expect("dig, of the package bind9-dnsutils");
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(printed.contains("Truncated, retrying in TCP"), "{printed}");
    assert!(printed.contains(&format!("ANSWER: {MANY}")), "{printed}");
    assert_eq!(lab.allowed(pod).len(), before + MANY as usize);
    for n in [0, MANY - 1] {
        pod.talks_tcp((numbered(n), 443));
    }
}

/// The same over TCP: several queries on one connection, some of them refused on the node.
#[track_caller]
fn check_tcp(lab: &Lab, direct: &Pod, chained: &Pod) {
    let dig = |pod: &Pod, resolver: IpAddr, names: &[&str]| {
        let mut command = Command::new("dig");
        command
            .arg(format!("@{resolver}"))
            .args(["+tcp", "+keepopen"]);
        let output = pod.netns().run(|| command.args(names).output());
        let output = output.expect("dig, of the package bind9-dnsutils");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for resolver in [RESOLVER, RESOLVER6] {
        let printed = dig(chained, resolver, &["deep.test", "deep.test", "deep.test"]);
        assert_eq!(printed.matches("203.0.113.10").count(), 3, "{printed}");
        let printed = dig(direct, resolver, &["shop.test", "evil.test", "shop.test"]);
        assert_eq!(printed.matches("203.0.113.10").count(), 2, "{printed}");
        assert_eq!(printed.matches("EDE: 18").count(), 1, "{printed}");
        assert!(!printed.contains("203.0.113.66"), "{printed}");
    }
    let fresh = lab.pod("shop", "fresh");
    lab.write_pod(&fresh, &[("allow", "shop.test:443")]);
    eventually("the pod is enforced", || {
        let answer = fresh.try_resolve(RESOLVER, "evil.test", RecordType::A, SHORT)?;
        (answer.code == ResponseCode::NXDomain).then_some(())
    });
    dig(&fresh, RESOLVER, &["shop.test"]);
    fresh.talks_tcp((server(10), 443));
}

#[test]
fn a_pod_behind_unbound_reaches_exactly_its_allowed_names() {
    check_resolver(unbound);
}

#[test]
fn a_pod_behind_dnsmasq_reaches_exactly_its_allowed_names() {
    check_resolver(dnsmasq);
}

#[test]
fn a_pod_behind_bind_reaches_exactly_its_allowed_names() {
    check_resolver(|lab| resolvers::named(lab, &[RESOLVER, RESOLVER6], zone(lab)));
}

#[test]
fn a_pod_behind_knot_resolver_reaches_exactly_its_allowed_names() {
    let lab = Lab::builder().without_dns().build();
    // The Knot resolver is not authoritative, so it needs an upstream.
    let upstream = server(53);
    let mut command = resolvers::named(&lab, &[upstream], zone(&lab));
    let _upstream = lab.run_outside(command.stderr(Stdio::null()));
    check_resolver_in(&lab, |lab| resolvers::kresd(lab, upstream));
}
