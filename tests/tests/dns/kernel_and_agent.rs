//! With `dns.learn: kernel` a pod receives the responses, and gets the addresses and denials, that it would with `agent`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    process::{Command, Stdio},
};

use egress_agent::datapath::boottime_ns;
use egress_common::classes::ClassSet;
use egress_tests::{
    Agent, DEADLINE, Lab, Pod,
    addresses::{RESOLVER, RESOLVER6, numbered, server},
    dns::{Answer, RecordType, question},
    observed::HTTP,
    resolvers,
};
use hickory_proto::rr::Record;

/// Addresses of a name that fit into a response with EDNS, and not into one without.
const MANY: u32 = 60;

const ZONE: &str = "\
$ORIGIN test.
$TTL 600
@ IN SOA ns.test. root.test. 1 3600 600 86400 300
@ IN NS ns.test.
ns IN A 10.99.0.53
shop 3000 IN A 203.0.113.10
shop IN A 203.0.113.11
shop IN AAAA 2001:db8::a
SHOUT IN A 203.0.113.12
www 40 IN CNAME shop
deep IN CNAME www
c1 IN CNAME c2
c2 IN CNAME c3
c3 IN CNAME c4
c4 IN CNAME c5
c5 IN CNAME c6
c6 IN CNAME sHoUt
lost IN CNAME nothing
loop IN CNAME loop2
loop2 IN CNAME loop
few IN A 203.0.113.30
few IN A 203.0.113.31
few IN A 203.0.113.32
few IN A 203.0.113.33
few IN A 203.0.113.34
few IN A 203.0.113.35
few IN A 203.0.113.36
few IN A 203.0.113.37
denied IN A 203.0.113.21
guarded IN A 203.0.113.10
guarded IN A 203.0.113.20
inside IN A 10.1.200.1
evil IN A 203.0.113.66
*.wild IN A 203.0.113.40
a.b.c.d.e.f.g.h.i.j.k IN A 203.0.113.41
txt IN TXT \"hello\"
mail IN MX 10 shop
srv IN SRV 1 1 443 shop
";

/// The policy before and after an edit. `deny` is about an address that an allowed name has.
const LISTS: [&str; 2] = [
    "shop.test:443 www.test:80 deep.test:81 *.test:8080 *.wild.test:9000",
    "shop.test:444 *.test:8080 few.test:83 10.1.200.0/24:1 guarded.test:84 c1.test:85",
];

/// Writes the zone into the laboratory's directory; returns the file's name.
fn zone(lab: &Lab) -> &'static str {
    let many = (0..MANY).map(|n| format!("many IN A {}\n", numbered(n)));
    let long = format!("{0}.{0}.{0} IN A 203.0.113.42\n", "l".repeat(63));
    let zone = ZONE.to_owned() + &many.collect::<String>() + &long;
    fs::write(lab.directory().join("test.zone"), zone).expect("write a zone");
    "test.zone"
}

/// The names to ask for, and the types of each.
fn queries() -> Vec<(String, RecordType)> {
    use RecordType::{A, AAAA, HTTPS, MX, SRV, TXT};
    let names = [
        "shop",
        "SHOUT",
        "www",
        "deep",
        "c1",
        "lost",
        "few",
        "denied",
        "guarded",
        "inside",
        "evil",
        "any.wild",
        "x.y.wild",
        "a.b.c.d.e.f.g.h.i.j.k",
        "many",
        "absent",
    ];
    let mut queries: Vec<(String, RecordType)> = Vec::new();
    for name in names {
        queries.extend([A, AAAA, HTTPS].map(|qtype| (format!("{name}.test"), qtype)));
    }
    let long = format!("{0}.{0}.{0}.test", "l".repeat(63));
    queries.extend([
        ("sHoP.TeSt".to_owned(), A),
        ("Deep.tesT".to_owned(), A),
        (long, A),
        ("txt.test".to_owned(), TXT),
        ("mail.test".to_owned(), MX),
        ("srv.test".to_owned(), SRV),
    ]);
    queries
}

/// Changes a query that ends with an OPT record of 11 bytes.
type Change = fn(&mut Vec<u8>);

/// The ways in which clients ask.
const WAYS: [(&str, Change); 5] = [
    ("EDNS", |_| {}),
    ("no EDNS", |message| {
        message.truncate(message.len() - 11);
        message[10..12].copy_from_slice(&[0, 0]);
    }),
    ("DNSSEC", |message| {
        let flags = message.len() - 4;
        message[flags] |= 0x80;
    }),
    ("CD and AD", |message| message[3] |= 0x30),
    ("a cookie", |message| {
        let len = message.len();
        message[len - 2..].copy_from_slice(&[0, 12]);
        message.extend([0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8]);
    }),
];

/// What a pod saw, what the agent kept, and what it reported.
#[derive(Debug, Default)]
struct Outcome {
    /// Each query with its response, without lifetimes and the order of records.
    responses: Vec<(String, String)>,
    /// The allow map after each part of the test.
    allowed: Vec<BTreeMap<IpAddr, ClassSet>>,
    /// The seconds for which each address stays in it.
    lifetimes: Vec<BTreeMap<IpAddr, u64>>,
    denied: BTreeSet<(String, Option<String>, Option<IpAddr>)>,
}

/// A response without lifetimes and the order of records.
fn described(answer: &Answer) -> String {
    let sorted = |records: &[Record]| {
        let described = records
            .iter()
            .map(|record| format!("{} {}", record.name.to_lowercase(), record.data));
        described.collect::<BTreeSet<_>>()
    };
    let message = &answer.message;
    let asked = &message.queries;
    // BIND truncates a response after some of the addresses, in a random order.
    if message.metadata.truncation {
        return format!("{:?} {asked:?} truncated", answer.code);
    }
    format!(
        "{:?} {asked:?} {:?} {:?}",
        answer.code,
        sorted(&message.answers),
        sorted(&message.authorities),
    )
}

/// Asks each query in each way, three times: the agent decides the name the first time.
#[track_caller]
fn ask_all(pod: &Pod, outcome: &mut Outcome) {
    let (v4, v6) = (pod.dns_socket(), pod.dns_socket6());
    let mut id = 1;
    for (name, qtype) in queries() {
        for (way, change) in WAYS {
            for (socket, resolver) in [(&v4, RESOLVER), (&v6, RESOLVER6), (&v4, RESOLVER)] {
                let what = format!("{name} {qtype} with {way} at {resolver}");
                let mut message = question(id, &name, qtype);
                change(&mut message);
                socket.send(resolver, &message);
                let (bytes, _) = socket
                    .receive(DEADLINE)
                    .unwrap_or_else(|| panic!("no response: {what}"));
                assert_eq!(bytes[..2], id.to_be_bytes(), "{what}");
                outcome
                    .responses
                    .push((what, described(&Answer::read(&bytes))));
                id += 1;
            }
        }
    }
}

/// What comes of all queries under a policy and, after an edit, under another one.
#[track_caller]
fn outcome(learn: &str, resolver: impl Fn(&Lab) -> Command) -> Outcome {
    let lab = Lab::builder()
        .without_dns()
        .config("dns.learn", learn)
        .config("http", HTTP)
        .config("ranges.protected", vec!["203.0.113.20/32"])
        .build();
    let upstream = server(53);
    let mut command = resolvers::named(&lab, &[upstream], zone(&lab));
    let _upstream = lab.run_outside(command.stderr(Stdio::null()));
    let _resolver = lab.run_resolver(&mut resolver(&lab));
    let pod = lab.pod("shop", "cart");
    let policy = |allow| [("allow", allow), ("deny", "203.0.113.21 evil.test")];
    lab.write_pod(&pod, &policy(LISTS[0]));
    let agent = lab.start_agent(&[&pod]);
    let mut outcome = Outcome::default();
    ask_all(&pod, &mut outcome);
    outcome.note_allowed(&lab, &pod);
    agent.applies_policy_after(&pod, || lab.write_pod(&pod, &policy(LISTS[1])));
    outcome.note_allowed(&lab, &pod);
    ask_all(&pod, &mut outcome);
    outcome.note_allowed(&lab, &pod);
    outcome.note_denied(&agent, &pod);
    if learn == "kernel" {
        let passed = lab
            .metrics()
            .get("egress_agent_dns_passed_total{direction=\"answer\"}");
        let all = u32::try_from(outcome.responses.len()).expect("some thousands");
        assert!(
            passed > f64::from(all) / 3.0,
            "the programs read {passed} of {all} responses"
        );
    }
    outcome
}

impl Outcome {
    #[track_caller]
    fn note_allowed(&mut self, lab: &Lab, pod: &Pod) {
        let (mut classes, mut lifetimes) = (BTreeMap::new(), BTreeMap::new());
        let now_ns = boottime_ns();
        for (address, entry) in lab.allowed(pod) {
            classes.insert(address, entry.classes);
            let left_ns = entry.expires_ns.saturating_sub(now_ns);
            lifetimes.insert(address, left_ns / 1_000_000_000);
        }
        self.allowed.push(classes);
        self.lifetimes.push(lifetimes);
    }

    #[track_caller]
    fn note_denied(&mut self, agent: &Agent, pod: &Pod) {
        // Denials before this one are logged before it.
        agent.denies_name(pod, "last.example");
        let denials = agent.denials().into_iter();
        self.denied = denials
            .map(|denial| (denial.reason, denial.dns_name, denial.dst_ip))
            .collect();
    }
}

#[track_caller]
fn check(resolver: impl Fn(&Lab) -> Command) {
    let agent = outcome("agent", &resolver);
    let kernel = outcome("kernel", &resolver);
    for (by_agent, by_kernel) in agent.responses.iter().zip(&kernel.responses) {
        assert_eq!(by_agent, by_kernel);
    }
    for (by_agent, by_kernel) in agent.allowed.iter().zip(&kernel.allowed) {
        assert_eq!(by_agent, by_kernel);
    }
    for (by_agent, by_kernel) in agent
        .lifetimes
        .iter()
        .flatten()
        .zip(kernel.lifetimes.iter().flatten())
    {
        // The two runs take different times, and a resolver counts lifetimes down. The zone has 40, 600 and 3000 seconds.
        assert!(
            by_agent.1.abs_diff(*by_kernel.1) < 200,
            "{by_agent:?} {by_kernel:?}"
        );
    }
    assert_eq!(agent.denied, kernel.denied);
}

fn dnsmasq(lab: &Lab) -> Command {
    let mut command = resolvers::dnsmasq(lab);
    command
        .arg("--cache-size=0")
        .arg(format!("--server=/test/{}", server(53)));
    command
}

fn pdns(lab: &Lab) -> Command {
    let directory = lab.directory();
    let mut command = Command::new("/usr/sbin/pdns_recursor");
    command
        .args([
            "--daemon=no",
            "--threads=1",
            "--disable-syslog=yes",
            "--security-poll-suffix=",
            "--allow-from=0.0.0.0/0,::/0",
            "--dont-query=",
            "--setuid=",
            "--dnssec=off",
        ])
        .arg(format!("--config-dir={}", directory.display()))
        .arg(format!("--socket-dir={}", directory.display()))
        .arg(format!("--local-address={RESOLVER},{RESOLVER6}"))
        .arg(format!("--forward-zones=test={}", server(53)));
    command
}

#[test]
fn the_programs_learn_what_the_agent_does_with_unbound_as_resolver() {
    check(|lab| resolvers::unbound(lab, zone(lab)));
}

#[test]
fn the_programs_learn_what_the_agent_does_with_bind_as_resolver() {
    check(|lab| resolvers::named(lab, &[RESOLVER, RESOLVER6], zone(lab)));
}

#[test]
fn the_programs_learn_what_the_agent_does_with_knot_resolver() {
    check(|lab| resolvers::kresd(lab, server(53)));
}

#[test]
fn the_programs_learn_what_the_agent_does_with_dnsmasq_as_resolver() {
    check(dnsmasq);
}

#[test]
fn the_programs_learn_what_the_agent_does_with_powerdns_recursor() {
    check(pdns);
}
