//! Signed responses are delivered unchanged, so a pod can validate them.

use std::{fs, path::PathBuf, process::Command};

use egress_tests::{
    DEADLINE, Lab, Pod, Running,
    addresses::{RESOLVER, server},
    dns::{RecordType, question},
    resolvers::unbound,
};

const ZONE: &str = "\
$ORIGIN test.
$TTL 300
@ IN SOA ns.test. root.test. 1 3600 600 86400 300
@ IN NS ns.test.
ns IN A 10.99.0.53
shop IN A 203.0.113.10
www IN CNAME shop
old IN DNAME new
a.new IN A 203.0.113.11
";

/// A resolver with a signed zone, and a pod that validates it.
struct Signed {
    pod: Pod,
    /// Not enforced, for comparison.
    free: Pod,
    anchor: PathBuf,
    agent: egress_tests::Agent,
    _resolver: Running,
    lab: Lab,
}

impl Signed {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::builder().without_dns().build();
        let anchor = sign(&lab);
        let resolver = lab.run_resolver(&mut unbound(&lab, "test.signed"));
        let (pod, free) = (lab.pod("shop", "cart"), lab.pod("shop", "free"));
        let entries = "shop.test:443 www.test:443 *.old.test:443";
        // A validator also queries the keys of the zones above.
        lab.write_pod(
            &pod,
            &[
                ("allow", entries),
                ("resolve", "test none.test new.test a.new.test"),
            ],
        );
        let agent = lab.start_agent(&[&pod]);
        Self {
            pod,
            free,
            anchor,
            agent,
            _resolver: resolver,
            lab,
        }
    }

    /// Runs `delv` in the pod, which trusts only the zone's key; returns its output.
    #[track_caller]
    fn delv(&self, name: &str, qtype: &str) -> String {
        let mut command = Command::new("delv");
        command
            .arg(format!("@{RESOLVER}"))
            .arg("-a")
            .arg(&self.anchor)
            .args(["+root=test.", name, qtype]);
        let output = self.pod.netns().run(|| command.output());
        let output = output.expect("delv, of the package bind9-dnsutils");
        format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    }
}

#[track_caller]
fn run(lab: &Lab, program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(lab.directory())
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}; `cargo xtask setup` installs it"));
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {printed}");
}

/// Signs [`ZONE`] with a new key; returns the file with the key to trust.
#[track_caller]
fn sign(lab: &Lab) -> PathBuf {
    let directory = lab.directory();
    fs::write(directory.join("test.zone"), ZONE).expect("write a zone");
    let algorithm = ["-a", "ECDSAP256SHA256", "-f", "KSK", "test."];
    run(lab, "dnssec-keygen", &algorithm);
    let signing = ["-S", "-z", "-o", "test.", "-f", "test.signed", "test.zone"];
    run(lab, "dnssec-signzone", &signing);
    let key = fs::read_dir(directory)
        .expect("the laboratory's directory")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "key"))
        .expect("dnssec-keygen writes a key");
    let key = fs::read_to_string(key).expect("read the key");
    let (_, data) = key
        .lines()
        .filter(|line| !line.starts_with(';'))
        .find_map(|line| line.split_once("DNSKEY"))
        .expect("a DNSKEY record");
    let mut fields = data.split_whitespace();
    let numbers: Vec<_> = fields.by_ref().take(3).collect();
    let base64: String = fields.collect();
    let anchor = directory.join("anchor.conf");
    let text = format!(
        "trust-anchors {{ test. static-key {} \"{base64}\"; }};\n",
        numbers.join(" ")
    );
    fs::write(&anchor, text).expect("write the anchor");
    anchor
}

#[test]
fn a_pod_validates_signatures_through_the_gate() {
    let scene = Signed::new();
    let _web = scene.lab.serve_tcp(443);
    for (name, qtype, address) in [
        ("shop.test", "A", Some(server(10))),
        ("www.test", "A", Some(server(10))),
        // A name below a DNAME: the validator queries the target itself.
        ("a.old.test", "A", Some(server(11))),
        // The absence of a record is signed, too.
        ("none.test", "A", None),
        ("shop.test", "AAAA", None),
    ] {
        let printed = scene.delv(name, qtype);
        assert!(
            printed.contains("fully validated"),
            "{name} {qtype}: {printed}"
        );
        if let Some(address) = address {
            assert!(printed.contains(&address.to_string()), "{name}: {printed}");
            scene.pod.talks_tcp((address, 443));
        }
    }
    // The agent makes the refusal itself, so it has no signature and does not validate.
    let printed = scene.delv("evil.test", "A");
    assert!(!printed.contains("fully validated"), "{printed}");
    scene
        .agent
        .wait_denial("the name", |d| d.is_question(&scene.pod, "evil.test"));
}

#[test]
fn signed_responses_arrive_byte_for_byte() {
    let scene = Signed::new();
    for (name, qtype) in [
        ("shop.test", RecordType::A),
        ("www.test", RecordType::A),
        ("a.old.test", RecordType::A),
        ("none.test", RecordType::A),
        ("test", RecordType::DNSKEY),
    ] {
        let mut bytes = question(0x1234, name, qtype);
        // DO, in the flags of the OPT record that ends the query.
        let flags = bytes.len() - 4;
        bytes[flags] |= 0x80;
        let answer = |pod: &Pod| {
            let socket = pod.dns_socket();
            socket.send(RESOLVER, &bytes);
            socket.receive(DEADLINE).expect("a response").0
        };
        let (held, free) = (answer(&scene.pod), answer(&scene.free));
        assert_eq!(held, free, "{name} {qtype}");
        // A signed response is longer than an unsigned one.
        assert!(held.len() > 120, "{name} {qtype} is not signed");
    }
}
