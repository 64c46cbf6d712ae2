//! A query that the policy does not allow never leaves the node, in whatever form it is sent.

use std::net::SocketAddr;

use egress_tests::{
    DEADLINE, Lab,
    addresses::{RESOLVER, RESOLVER6, server},
    dns::{RecordType, ResponseCode, Send, address, hints, question, text},
    frames::{self, Tap},
};
use etherparse::ip_number;

/// The query types that docs/dns.md treats in their own way.
const TYPES: [RecordType; 9] = [
    RecordType::A,
    RecordType::AAAA,
    RecordType::ANY,
    RecordType::TXT,
    RecordType::NULL,
    RecordType::SRV,
    RecordType::PTR,
    RecordType::HTTPS,
    RecordType::CNAME,
];

#[test]
fn a_dns_tunnel_sends_nothing_out() {
    let lab = Lab::new();
    for name in ["*.evil.test", "*.shop.test", "shop.test"] {
        lab.dns().on(name, |asked| {
            vec![Send::answer(asked, &[text("the way back")])]
        });
    }
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let mut agent = lab.start_agent(&[&pod]);
    let outside = Tap::open(lab.outside(), "eth0");

    // A tunnelling program sends data in labels, below a name of its own or of an allowed domain.
    let mut asked = 0;
    let mut word = 0x9e37_79b9_u32;
    for qtype in TYPES {
        for round in 0..12 {
            let words: Vec<String> = (0..6)
                .map(|_| {
                    word = word.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
                    format!("{word:08x}")
                })
                .collect();
            let label = words.concat();
            let domain = if round % 2 == 0 {
                "evil.test"
            } else {
                "shop.test"
            };
            let resolver = if round % 3 == 0 { RESOLVER6 } else { RESOLVER };
            let name = format!("{label}.{label}.{domain}");
            let answer = pod.resolve_at(resolver, &name, qtype);
            assert_eq!(answer.code, ResponseCode::NXDomain, "{qtype} {name}");
            assert!(answer.message.answers.is_empty());
            asked += 1;
        }
    }
    // The gate keeps the order of queries, so the first packet outside must be the allowed one.
    assert_eq!(
        pod.resolve("shop.test", RecordType::TXT)
            .message
            .answers
            .len(),
        1
    );
    let own = pod.ipv4().into();
    let first = outside
        .receive(DEADLINE, |frame| {
            frames::is(frame, own, RESOLVER, ip_number::UDP)
        })
        .expect("the allowed query");
    assert!(
        first.windows(10).any(|w| w == b"\x04shop\x04test"),
        "{first:?}"
    );
    assert_eq!(lab.dns().questions().len(), 1);
    assert!(agent.stop().success());
    let told: u64 = agent
        .denials()
        .iter()
        .filter(|d| d.reason == "dns_name")
        .map(|d| d.count)
        .sum();
    let lost: u64 = agent
        .events("denials_lost")
        .iter()
        .filter_map(|line| line["count"].as_u64())
        .sum();
    assert_eq!(told + lost, asked);
}

#[test]
fn every_query_type_is_allowed_for_an_allowed_name_and_refused_for_others() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().on("shop.test", |asked| {
        // Every response has an address, whatever the query type is.
        let mut records = vec![address(server(10))];
        match asked.qtype {
            RecordType::HTTPS => records = vec![hints(&[server(11)])],
            RecordType::TXT => records.insert(0, text("v=1")),
            _ => {}
        }
        vec![Send::answer(asked, &records)]
    });
    lab.dns().on("10.113.0.203.in-addr.arpa", |asked| {
        vec![Send::answer(asked, &[text("shop.test")])]
    });
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    for qtype in TYPES {
        let answer = pod.resolve("shop.test", qtype);
        assert_eq!(answer.code, ResponseCode::NoError, "{qtype}");
        assert_eq!(
            pod.resolve("evil.test", qtype).code,
            ResponseCode::NXDomain,
            "{qtype}"
        );
    }
    let asked: Vec<_> = lab.dns().questions().iter().map(|q| q.qtype).collect();
    assert_eq!(asked, TYPES);
    // The addresses in the responses are learned, whatever the query type was.
    for host in [10, 11] {
        pod.talks_tcp((server(host), 443));
    }
    // The name for a reverse lookup is judged as any other name.
    agent.denies_name(&pod, "10.113.0.203.in-addr.arpa");
}

#[test]
fn messages_that_are_not_plain_queries_stay_on_the_node() {
    let lab = Lab::new();
    lab.dns().addresses("shop.test", &[server(10)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let mut agent = lab.start_agent(&[&pod]);
    let socket = pod.dns_socket();

    let plain = question(3, "shop.test", RecordType::A);
    let with = |edit: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = plain.clone();
        edit(&mut bytes);
        bytes
    };
    let mut odd = vec![
        // Data that leaves as a response.
        ("a response", with(&|b| b[2] |= 0x80)),
        ("a trailing byte", with(&|b| b.push(0))),
        ("an answer in a question", with(&|b| b[7] = 1)),
        ("a second additional record", with(&|b| b[11] = 2)),
        (
            "two questions",
            with(&|b| {
                b[5] = 2;
                let second = b[12..12 + 15].to_vec();
                b.splice(27..27, second);
            }),
        ),
        (
            "a name of 256 bytes",
            // Four labels of 62 bytes and one of 2: 4 × 63 + 3 + 1.
            with(&|b| {
                let mut name = [&[62; 1][..], &[b'a'; 62]].concat().repeat(4);
                name.extend(b"\x02aa\0");
                b.splice(12..12 + 11, name);
            }),
        ),
    ];
    for opcode in 1..16u8 {
        odd.push(("an opcode", with(&|b| b[2] |= opcode << 3)));
    }
    for (_, bytes) in &odd {
        socket.send(RESOLVER, bytes);
    }
    socket.ask(RESOLVER, 4, "shop.test", RecordType::A);
    let first = socket.expect("the plain query's response");
    assert_eq!(first.message.metadata.id, 4);
    assert_eq!(
        lab.dns().questions().len(),
        1,
        "{:?}",
        lab.dns().questions()
    );
    assert!(agent.stop().success());
    let told = agent.denials();
    let told: u64 = told
        .iter()
        .filter(|d| d.reason == "dns_malformed")
        .map(|d| d.count)
        .sum();
    assert_eq!(told, odd.len() as u64);
}

#[test]
fn the_longest_possible_name_is_judged_like_any_other() {
    // 255 bytes with the root label: three labels of 63, one of 51, `long` and `test`.
    let name = format!(
        "{}.{}.{}.{}.long.test",
        "a".repeat(63),
        "b".repeat(63),
        "c".repeat(63),
        "d".repeat(51)
    );
    assert_eq!(name.len() + 2, 255);
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().addresses("*.long.test", &[server(10)]);
    let (may, may_not) = (lab.pod("shop", "may"), lab.pod("shop", "may-not"));
    lab.write_pod(&may, &[("allow", "*.long.test:443")]);
    lab.write_pod(&may_not, &[("allow", "long.test:443")]);
    let agent = lab.start_agent(&[&may, &may_not]);
    assert_eq!(may.lookup(&name), [server(10)]);
    may.talks_tcp((server(10), 443));
    agent.denies_name(&may_not, &name);
    assert_eq!(lab.dns().queries_for(&name), 1);
}

#[test]
fn a_refusal_has_an_extended_error_only_if_the_query_has_edns() {
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    assert_eq!(
        pod.resolve("evil.test", RecordType::A).extended_error(),
        Some(18)
    );
    // Without the OPT record: the last 11 bytes, and its count.
    let mut plain = question(5, "evil.test", RecordType::A);
    plain.truncate(plain.len() - 11);
    plain[11] = 0;
    let socket = pod.dns_socket();
    socket.send(RESOLVER, &plain);
    let (bytes, from) = socket.receive(DEADLINE).expect("a refusal");
    assert_eq!(from, SocketAddr::new(RESOLVER, 53));
    let answer = egress_tests::dns::Answer::read(&bytes);
    assert_eq!(answer.code, ResponseCode::NXDomain);
    assert!(answer.message.edns.is_none());
    assert_eq!(lab.dns().queries_for("evil.test"), 0);
}
