//! The main job with resolvers that nobody here wrote.

use std::{fs, net::IpAddr, process::Command};

use egress_tests::{
    Lab, Pod, SHORT,
    addresses::{RESOLVER, RESOLVER6, server, server6},
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

fn unbound(lab: &Lab) -> Command {
    fs::write(lab.directory().join("test.zone"), ZONE).expect("write a zone");
    resolvers::unbound(lab, "test.zone")
}

fn dnsmasq(lab: &Lab) -> Command {
    let mut command = Command::new("/usr/sbin/dnsmasq");
    command
        .args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
        ])
        .args([
            "--user=root",
            "--bind-interfaces",
            "--log-facility=-",
            "--local=/test/",
        ])
        .arg(format!(
            "--pid-file={}",
            lab.directory().join("dnsmasq.pid").display()
        ))
        .arg(format!("--listen-address={RESOLVER}"))
        .arg(format!("--listen-address={RESOLVER6}"))
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
fn the_main_job(resolver: impl FnOnce(&Lab) -> Command) {
    let lab = Lab::builder().without_dns().build();
    let _web = lab.serve_tcp(443);
    let mut command = resolver(&lab);
    let _resolver = lab.run_resolver(&mut command);
    let (direct, chained) = (lab.pod("shop", "direct"), lab.pod("shop", "chained"));
    lab.write_pod(&direct, &[("allow", "shop.test:443")]);
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
    over_tcp(&lab, &direct, &chained);
    assert_eq!(direct.syn_retransmissions(), 0);
}

/// The same over TCP, one question after the other on one connection, and refused on the node.
#[track_caller]
fn over_tcp(lab: &Lab, direct: &Pod, chained: &Pod) {
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
fn a_pod_behind_unbound_reaches_what_it_may() {
    the_main_job(unbound);
}

#[test]
fn a_pod_behind_dnsmasq_reaches_what_it_may() {
    the_main_job(dnsmasq);
}

#[test]
fn the_c_library_resolves_and_connects() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("shop.test", &[server(10), server6(10)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    // In a mount namespace of its own the program has the pod's /etc/resolv.conf.
    let settings = lab.directory().join("resolv.conf");
    fs::write(
        &settings,
        format!("nameserver {RESOLVER}\nsearch a.test b.test\noptions ndots:5\n"),
    )
    .expect("write resolv.conf");
    let script = format!(
        "mount --bind {} /etc/resolv.conf && getent ahosts shop.test",
        settings.display()
    );
    let output = pod.netns().run(|| {
        Command::new("unshare")
            .args(["--mount", "sh", "-c", &script])
            .output()
    });
    let output = output.expect("unshare, of the package util-linux");
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{printed}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        printed.contains("203.0.113.10") && printed.contains("2001:db8::a"),
        "{printed}"
    );
    // The search list was gone through, and none of it left the node.
    assert_eq!(lab.dns().asked("shop.test.a.test"), 0);
    agent.wait_denial("a name of the search list", |d| {
        d.is_question(&pod, "shop.test.a.test")
    });
    pod.talks_tcp((server(10), 443));
    pod.talks_tcp((server6(10), 443));
}
