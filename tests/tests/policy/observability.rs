//! The agent's metrics, status, health endpoints and socket.
#![expect(
    clippy::cast_precision_loss,
    clippy::float_cmp,
    reason = "metrics are floating-point numbers, and counts among them are exact"
)]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, TcpStream},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    thread,
};

use egress_tests::{
    Lab, Pod,
    addresses::{RESOLVER, server},
    dns::DnsStream,
    eventually, holds,
    observed::{HTTP, Metrics},
};
use serde_json::Value;

#[track_caller]
fn served() -> Lab {
    Lab::builder().config("http", HTTP).build()
}

/// Waits until the metrics meet this condition.
#[track_caller]
fn metrics_when(lab: &Lab, what: &str, is: impl Fn(&Metrics) -> bool) -> Metrics {
    eventually(what, || Some(lab.metrics()).filter(|metrics| is(metrics)))
}

/// The denials of the audited pod of [`counts_verdicts_and_messages`].
const WOULD_DENY: &str = "egress_agent_denials_total\
    {event=\"would_deny\",namespace=\"other\",reason=\"address_not_learned\"}";

#[test]
fn metrics_count_verdicts_and_messages() {
    // The programs pass the query once its name is decided, and read the response.
    counts_verdicts_and_messages("kernel", [1.0, 0.0]);
}

#[test]
fn metrics_count_messages_that_the_agent_reads() {
    counts_verdicts_and_messages("agent", [0.0, 1.0]);
}

/// With this `dns.learn`, so many queries and as many responses pass without the agent, and through it.
#[track_caller]
fn counts_verdicts_and_messages(learn: &str, [by_kernel, by_agent]: [f64; 2]) {
    let lab = Lab::builder()
        .config("http", HTTP)
        .config("dns.learn", learn)
        .build();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let audited = lab.pod("other", "cart");
    lab.write_pod(&audited, &[("allow", "shop.test:443"), ("mode", "audit")]);
    let off = lab.pod("other", "off");
    lab.write_pod(&off, &[]);
    let mut agent = lab.start_agent(&[&pod, &audited]);
    pod.lookup("shop.test");
    pod.talks_tcp((server(10), 443));
    agent.denies_name(&pod, "evil.test");
    agent.denies_tcp(&pod, (server(10), 80), "port_not_allowed");
    agent.denies_tcp(&pod, (server(9), 80), "no_rule");
    audited.talks_tcp((server(9), 443));
    agent.wait_denial("the audited connection", |denial| denial.of(&audited));

    let dns = |direction: &str, outcome: &str| {
        format!(
            "egress_agent_dns_messages_total\
             {{direction=\"{direction}\",outcome=\"{outcome}\",transport=\"udp\"}}"
        )
    };
    let passed =
        |direction: &str| format!("egress_agent_dns_passed_total{{direction=\"{direction}\"}}");
    let mode = |mode: &str| format!("egress_agent_pods{{mode=\"{mode}\"}}");
    let metrics = metrics_when(&lab, "everything is counted", |metrics| {
        metrics.find("egress_agent_allow_map_entries") == 1.0
            && metrics.find("egress_agent_flows") > 0.0
            && metrics.find(&mode("enforce")) == 1.0
            && metrics.find(WOULD_DENY) >= 1.0
            && metrics.find(WOULD_DENY) == metrics.get("egress_agent_audited_packets_total")
    });
    for (series, value) in [
        (mode("enforce"), 1.0),
        (mode("audit"), 1.0),
        (mode("off"), 1.0),
        (mode("missing"), 0.0),
        (passed("question"), by_kernel),
        (passed("answer"), by_kernel),
        (dns("question", "delivered"), by_agent),
        (dns("question", "refused"), 1.0),
        (dns("answer", "delivered"), by_agent),
        (dns("question", "undeliverable"), 0.0),
        (dns("answer", "undeliverable"), 0.0),
        (
            "egress_agent_allow_map_fill_ratios".to_owned(),
            1.0 / 4096.0,
        ),
        ("egress_agent_pods_unreadable".to_owned(), 0.0),
        ("egress_agent_frames_unsent_total".to_owned(), 0.0),
        ("egress_agent_flows_lost_total".to_owned(), 0.0),
    ] {
        assert_eq!(metrics.get(&series), value, "{series}");
    }
    // The queries were held to be decided, and the response if the agent reads it. Their time is counted.
    assert_eq!(
        metrics.get("egress_agent_dns_hold_seconds_count"),
        2.0 + by_agent
    );
    assert!(metrics.get("egress_agent_dns_hold_seconds_sum") > 0.0);
    assert!(metrics.get("egress_agent_reconcile_seconds_count") >= 1.0);
    assert!(metrics.get("egress_agent_last_reconcile_timestamp_seconds") > 1e9);
    assert!(metrics.get("egress_agent_passed_packets_total") >= 3.0);
    assert!(metrics.get("process_resident_memory_bytes") > 1e6);
    assert!(metrics.get("process_cpu_seconds_total") > 0.0);
    assert!(metrics.get("process_open_fds") > 3.0);
    let build = metrics
        .series()
        .any(|series| series.starts_with("egress_agent_build_info{"));
    assert!(build);
    assert!(
        !metrics.series().any(|series| series.contains("cart")),
        "no pod is named in a label"
    );
    // The denial lines and the counters must agree in the end. No denial comes between, except for a
    // retransmitted SYN: each was waited for.
    let counted = lab.metrics();
    assert!(agent.stop().success());
    for (reason, at_least) in [
        ("dns_name", 1.0),
        ("port_not_allowed", 1.0),
        ("no_rule", 1.0),
    ] {
        let series = format!(
            "egress_agent_denials_total\
             {{event=\"denied\",namespace=\"shop\",reason=\"{reason}\"}}"
        );
        let of = agent
            .denials()
            .into_iter()
            .filter(|denial| denial.reason == reason);
        let told: u64 = of.map(|denial| denial.count).sum();
        let counted = counted.get(&series);
        assert!(
            counted >= at_least && counted <= told as f64,
            "{series}: {counted}, {told} told"
        );
    }
}

#[test]
fn dns_over_tcp_is_counted_separately() {
    let lab = served();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let _agent = lab.start_agent(&[&pod]);
    let mut stream = DnsStream::open(&pod, RESOLVER);
    stream.ask(7, "shop.test");
    stream.expect(7);
    let of = |direction: &str| {
        format!(
            "egress_agent_dns_messages_total\
             {{direction=\"{direction}\",outcome=\"delivered\",transport=\"tcp\"}}"
        )
    };
    let metrics = metrics_when(&lab, "the response is counted", |metrics| {
        metrics.find(&of("answer")) > 0.0
    });
    assert_eq!(metrics.get(&of("question")), 1.0);
    assert_eq!(metrics.get(&of("answer")), 1.0);
}

#[test]
fn every_metric_is_documented() {
    let lab = served();
    let _agent = lab.start_agent(&[]);
    let documented = include_str!("../../../docs/metrics.md");
    for (family, kind) in &lab.metrics().types {
        let ending = match kind.as_str() {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        let name = format!("`{family}{ending}`");
        assert!(documented.contains(&name), "docs/metrics.md has no {name}");
    }
}

#[test]
fn the_agent_is_ready_when_it_is_attached_to_every_pod() {
    let lab = served();
    let pod = lab.pod_without_interface("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[]);
    let (status, missing) = eventually("the pod has been looked at", || {
        let (status, missing) = lab.http("/readyz");
        missing.contains("shop/cart").then_some((status, missing))
    });
    assert_eq!(status, 503);
    assert!(missing.contains("there is no interface"), "{missing}");
    let metrics = lab.metrics();
    assert_eq!(metrics.get("egress_agent_pods{mode=\"missing\"}"), 1.0);
    let (code, explanation) = lab.explain(&pod, "shop.test:443");
    assert_eq!((code, &explanation["decision"]), (2, &"unknown".into()));
    assert_eq!(lab.http("/healthz"), (200, "ok\n".to_owned()));

    lab.add_interface(&pod);
    agent.wait_enforcing(&pod);
    eventually("the agent is ready", || {
        holds(lab.http("/readyz") == (200, "ok\n".to_owned()))
    });
    assert_eq!(lab.http("/elsewhere").0, 404);
}

#[test]
fn status_shows_resolved_names_and_denials() {
    let lab = Lab::new();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let agent = lab.start_agent(&[&pod]);
    pod.lookup("shop.test");
    agent.denies_tcp(&pod, (server(9), 80), "no_rule");
    let status = eventually("the denial's line and its count", || {
        Some(lab.status_of(&pod)).filter(|status| {
            status["last_denial"].is_object() && status["denied"]["no_rule"].as_u64() >= Some(1)
        })
    });
    assert_eq!(status["mode"], "enforce");
    assert_eq!(status["enforced"], true);
    assert_eq!(
        status["interfaces"][0]["index"].as_u64(),
        interface_of(&lab, &pod)
    );
    assert_eq!(status["policy_version"], 1);
    assert_eq!(
        (&status["names"], &status["addresses"]),
        (&1.into(), &1.into())
    );
    assert_eq!(status["last_denial"]["reason"], "no_rule");
    assert_eq!(status["problem"], Value::Null);
    let resolved = &status["resolved"][0];
    assert_eq!(resolved["name"], "shop.test");
    assert_eq!(resolved["listed"], true);
    let known = &resolved["addresses"][0];
    assert_eq!(known["address"], server(10).to_string());
    assert!((1..=24 * 3600 + 30).contains(&known["remaining_seconds"].as_u64().unwrap_or(0)));

    let output = lab.ask(&["status"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    for expected in [
        "node n1",
        "configuration (dns.resolvers)",
        "shop/cart",
        "enforce",
        "losses:",
    ] {
        assert!(text.contains(expected), "no {expected:?} in\n{text}");
    }
    let output = lab.ask(&["status", "shop/cart"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("shop.test") && text.contains("203.0.113.10"),
        "{text}"
    );

    let output = lab.ask(&["status", "shop/none"]);
    assert_eq!(output.status.code(), Some(1));
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(printed.contains("no pod shop/none"), "{printed}");
}

/// The index of the pod's interface on the node.
fn interface_of(lab: &Lab, pod: &Pod) -> Option<u64> {
    let mut command = std::process::Command::new("ip");
    command.args(["-o", "link", "show", "dev", pod.interface()]);
    let output = lab.node().run(|| command.output()).expect("ip runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let index = text
        .split(':')
        .next()
        .and_then(|index| index.trim().parse().ok());
    assert!(index.is_some(), "{text}");
    index
}

#[test]
fn status_shows_an_edit_and_the_place_of_an_error() {
    let lab = served();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let agent = lab.start_agent(&[&pod]);
    agent.applies_policy_after(&pod, || {
        lab.write_pod(&pod, &[("allow", "shop.test:443 203.0.113.7")]);
    });
    eventually("the second version", || {
        holds(lab.status_of(&pod)["policy_version"] == 2)
    });
    let before = lab.status_of(&pod)["applied"].clone();
    lab.write_pod(&pod, &[("allow", "shop.test:443, http://x.test")]);
    let status = eventually("the problem", || {
        Some(lab.status_of(&pod)).filter(|status| status["problem"].is_string())
    });
    let problem = status["problem"].as_str().unwrap_or_default();
    assert!(problem.contains("line 1, column 16"), "{problem}");
    assert!(problem.contains("the last good policy stays"), "{problem}");
    assert_eq!(
        (&status["policy_version"], &status["applied"]),
        (&2.into(), &before)
    );
    assert_eq!(lab.metrics().get("egress_agent_pods_unreadable"), 1.0);
    let (code, explanation) = lab.explain(&pod, "203.0.113.7:80");
    assert_eq!(code, 0, "{explanation}");
    assert_eq!(explanation["entries"][0]["entry"], "203.0.113.7");
}

#[test]
fn only_root_may_use_the_socket_and_it_is_removed_with_the_agent() {
    let lab = Lab::new();
    let mut agent = lab.start_agent(&[]);
    let mode = |path: &std::path::Path| {
        let metadata = fs::metadata(path).expect("the socket exists");
        metadata.permissions().mode() & 0o777
    };
    eventually("the socket", || holds(lab.socket().exists()));
    assert_eq!(mode(&lab.socket()), 0o600);
    assert!(agent.stop().success());
    assert!(!lab.socket().exists());
    let output = lab.ask(&["status"]);
    assert_eq!(output.status.code(), Some(1));

    // A socket that a killed agent left behind is replaced.
    let mut agent = lab.start_agent(&[]);
    eventually("the agent answers", || {
        holds(lab.ask(&["status"]).status.success())
    });
    agent.kill();
    assert!(lab.socket().exists());
    let _agent = lab.start_agent(&[]);
    eventually("the next agent answers", || {
        holds(lab.ask(&["status"]).status.success())
    });
}

#[test]
fn a_second_agent_on_the_same_socket_reports_it_and_goes_on() {
    let first = Lab::new();
    let _first_agent = first.start_agent(&[]);
    eventually("the first answers", || {
        holds(first.ask(&["status"]).status.success())
    });
    let socket = first.socket();
    let second = Lab::builder()
        .config("socket", socket.to_str().expect("a path in UTF-8"))
        .build();
    let (_web, pod) = second.shop_and_cart("shop.test:443");
    let mut agent = second.start_agent(&[&pod]);
    agent.wait_log("that the socket is another's", |line| {
        line.contains("ERROR") && line.contains("another agent answers there")
    });
    pod.lookup("shop.test");
    pod.talks_tcp((server(10), 443));
    assert!(agent.stop().success());
    assert!(
        first.ask(&["status"]).status.success(),
        "the first still answers"
    );
}

#[test]
fn a_taken_http_port_is_reported_and_the_agent_goes_on() {
    let lab = served();
    let taken = lab
        .node()
        .run(|| std::net::TcpListener::bind(HTTP))
        .expect("the port is free");
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let agent = lab.start_agent(&[&pod]);
    agent.wait_log("that the port is taken", |line| {
        line.contains("ERROR") && line.contains("cannot serve /healthz")
    });
    pod.lookup("shop.test");
    pod.talks_tcp((server(10), 443));
    drop(taken);
    agent.wait_log("that it serves", |line| line.contains("serving /healthz"));
    assert_eq!(lab.http("/healthz").0, 200);
}

#[test]
fn slow_and_hostile_clients_do_not_affect_others() {
    let lab = served();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let mut agent = lab.start_agent(&[&pod]);
    eventually("the socket", || holds(lab.socket().exists()));
    // A pod that opens more connections than allowed, each with half a request.
    let stranger = lab.pod("evil", "pod");
    let gateway = IpAddr::V4(Ipv4Addr::new(10, 1, stranger.ipv4().octets()[2], 1));
    let half: Vec<TcpStream> = (0..200)
        .map(|_| {
            let mut stream = stranger.reach_tcp((gateway, 9465));
            let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: ");
            stream
        })
        .collect();
    let silent: Vec<UnixStream> = (0..40)
        .map(|_| UnixStream::connect(lab.socket()).expect("a connection"))
        .collect();
    assert_eq!(lab.http("/healthz"), (200, "ok\n".to_owned()));
    assert!(lab.ask(&["status"]).status.success());

    // Requests that are too long or invalid.
    for bytes in [
        [b"GET / HTTP/1.1\r\nA: ".as_slice(), &vec![b'a'; 100_000]].concat(),
        vec![0; 100_000],
        b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\nx".to_vec(),
    ] {
        let mut stream = lab.http_connection();
        // The agent may close the connection before everything is written.
        let _ = stream.write_all(&bytes);
        let mut response = Vec::new();
        let _ = stream.read_to_end(&mut response);
        assert!(!response.starts_with(b"HTTP/1.1 200"), "{}", response.len());
    }
    for bytes in [
        vec![b'x'; 100_000],
        b"{\"status\":7}\n".to_vec(),
        vec![b'['; 8000],
    ] {
        let mut stream = UnixStream::connect(lab.socket()).expect("a connection");
        let _ = stream.write_all(&bytes);
        let mut response = Vec::new();
        let _ = stream.read_to_end(&mut response);
        assert!(response.is_empty() || response.starts_with(b"{\"error\""));
    }
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    lab.metrics();
                }
            });
        }
        for _ in 0..20 {
            pod.lookup("shop.test");
            pod.talks_tcp((server(10), 443));
        }
    });
    drop((half, silent));
    assert!(
        agent.stop().success(),
        "the agent does not end while clients are connected"
    );
}
