//! The cost of a lookup: bare, under the agent, and through dnsmasq as a forwarding resolver that fills an nftables
//! set. Names are new, so that the agent has to decide them, or known. All variants use the same server: first one with
//! almost no work of its own, so that only the path to it counts; then unbound, which has to query another server for
//! each new name, as a cluster's resolver does.
//!
//! The placement of client and server by the scheduler determines what "bare" costs. On one CPU, each hands
//! over to the other without a wake-up, and anything in between looks expensive; on two CPUs, each message
//! wakes a CPU, as a message from another machine does. So both placements are measured.
#![allow(
    clippy::allow_attributes,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "the measured values are far below those at which a float loses whole units"
)]

mod common;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    process::{Child, Command, Stdio},
};

use common::{
    Placement, Spread, cpu_ns,
    dns::{Client, ZONE},
    plot::Chart,
    print_table, quantile, ratios,
    responder::Responder,
    take_turns,
};
use egress_tests::{Lab, Running, addresses::RESOLVER, eventually};
use nix::unistd::Pid;
use serde_json::json;

const ROUNDS: usize = 30;
/// The number of names in a round, queried one by one.
const SINGLE_NAMES: u32 = 2000;
/// The number of names in a round, queried with [`OPEN`] queries pending.
const PIPELINED_NAMES: u32 = 2000;
const OPEN: u32 = 32;
/// How many known names a client queries in turn. All clients of a pod together query fewer than the programs can learn.
const KNOWN_NAMES: u32 = 200;

/// One of the compared paths to the server, and its measurements, one number per round.
struct Variant {
    what: &'static str,
    client: Client,
    /// The process in between.
    pid: Option<u32>,
    p50: Vec<f64>,
    p99: Vec<f64>,
    /// Queries per second, one by one.
    single_rate: Vec<f64>,
    /// Queries per second with [`OPEN`] pending.
    rate: Vec<f64>,
    single_cpu: Vec<f64>,
    pipelined_cpu: Vec<f64>,
}

impl Variant {
    fn new(what: &'static str, client: Client, pid: Option<u32>) -> Self {
        Self {
            what,
            client,
            pid,
            p50: Vec::new(),
            p99: Vec::new(),
            single_rate: Vec::new(),
            rate: Vec::new(),
            single_cpu: Vec::new(),
            pipelined_cpu: Vec::new(),
        }
    }

    fn round(&mut self) {
        let cpu = || self.pid.map_or(0, cpu_ns) as f64 / 1000.0;
        let before = cpu();
        let latencies = self.client.latencies(SINGLE_NAMES);
        let between = cpu();
        let rate = self.client.questions_per_second(PIPELINED_NAMES, OPEN);
        let after = cpu();
        self.p50.push(quantile(&latencies, 0.5));
        self.p99.push(quantile(&latencies, 0.99));
        self.single_rate
            .push(latencies.len() as f64 * 1e6 / latencies.iter().sum::<f64>());
        self.rate.push(rate);
        self.single_cpu
            .push((between - before) / f64::from(SINGLE_NAMES));
        self.pipelined_cpu
            .push((after - between) / f64::from(PIPELINED_NAMES));
    }
}

/// dnsmasq on the node, with an nftables set to fill.
struct Dnsmasq(Child);

impl Dnsmasq {
    fn start(lab: &Lab, listen: IpAddr, server: IpAddr) -> Self {
        let rules = "add table inet bench\n\
                     delete table inet bench\n\
                     add table inet bench\n\
                     add set inet bench allowed { type ipv4_addr; }\n";
        let file = lab.directory().join("set.nft");
        fs::write(&file, rules).expect("write nftables rules");
        let nft = lab
            .node()
            .run(|| Command::new("/usr/sbin/nft").arg("-f").arg(&file).status())
            .expect("nft, of the package nftables");
        assert!(nft.success(), "nft: {nft}");
        let mut command = Command::new("/usr/sbin/dnsmasq");
        command
            .args(["--keep-in-foreground", "--conf-file=/dev/null"])
            .args(["--no-resolv", "--no-hosts", "--no-poll", "--user=root"])
            .args(["--bind-interfaces", "--except-interface=lo"])
            .arg(format!(
                "--pid-file={}",
                lab.directory().join("pid").display()
            ))
            .arg(format!("--listen-address={listen}"))
            .arg(format!("--server={server}"))
            .arg(format!("--nftset=/{ZONE}/4#inet#bench#allowed"))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let child = lab.node().run(|| command.spawn());
        let dnsmasq = Self(child.expect("dnsmasq, of the package dnsmasq-base"));
        eventually("dnsmasq listens", || {
            let path = "/proc/thread-self/net/udp";
            let open = lab.node().run(|| fs::read_to_string(path)).ok()?;
            open.contains(":0035 ").then_some(())
        });
        dnsmasq
    }
}

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The address of unbound, which queries [`RESOLVER`].
const FORWARDER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 54));

fn unbound(lab: &Lab) -> Running {
    let configuration = format!(
        "server:\n\
         \x20 interface: {FORWARDER}\n\
         \x20 access-control: 0.0.0.0/0 allow\n\
         \x20 username: \"\"\n\
         \x20 chroot: \"\"\n\
         \x20 pidfile: \"\"\n\
         \x20 use-syslog: no\n\
         \x20 do-daemonize: no\n\
         \x20 module-config: \"iterator\"\n\
         \x20 num-threads: 1\n\
         \x20 local-zone: \"test.\" nodefault\n\
         remote-control:\n\
         \x20 control-enable: no\n\
         forward-zone:\n\
         \x20 name: \".\"\n\
         \x20 forward-addr: {RESOLVER}\n"
    );
    let file = lab.directory().join("unbound.conf");
    fs::write(&file, configuration).expect("write a configuration");
    let log = fs::File::create(lab.directory().join("unbound.log")).expect("a log file");
    let mut command = Command::new("/usr/sbin/unbound");
    let unbound = lab.run_outside(command.arg("-d").arg("-c").arg(&file).stderr(log));
    eventually("unbound listens", || {
        let path = "/proc/thread-self/net/udp";
        let open = lab.outside().run(|| fs::read_to_string(path)).ok()?;
        (open.matches(":0035 ").count() > 1).then_some(())
    });
    unbound
}

fn main() {
    let lab = Lab::builder()
        .without_dns()
        .config("limits.addressesPerPod", 131_072)
        .config("dns.resolvers", json!([RESOLVER, FORWARDER]))
        .build();
    let responder = Responder::start(&lab);
    let unbound = unbound(&lab);
    let names = ["bare", "enforced", "steady", "proxied"];
    let [bare, enforced, steady, proxied] = names.map(|name| lab.pod("b", name));
    // The maps of the pod that resolves new names all the time are full, so another one queries the known names.
    for pod in [&enforced, &steady] {
        lab.write_pod(pod, &[("allow", &format!("*.{ZONE}:443"))]);
    }
    let agent = lab.start_agent(&[&enforced, &steady]);
    let [a, b, c, _] = proxied.ipv4().octets();
    let gateway = IpAddr::from([a, b, c, 1]);

    let mut latency = Chart::new("Time of a lookup, ratio of the median to bare");
    let mut rate = Chart::new("Lookups per second with 32 open, ratio to bare");
    for (server, what) in [
        (RESOLVER, "a server that does next to nothing"),
        (FORWARDER, "unbound, which asks that server"),
    ] {
        let dnsmasq = Dnsmasq::start(&lab, gateway, server);
        for placement in Placement::BOTH {
            let unbound = Pid::from_raw(unbound.id().cast_signed());
            placement.place(&[responder.id(), unbound]);
            let placed = placement.text();
            for (names, enforced) in [("new", &enforced), ("known", &steady)] {
                let paths = [
                    ("bare", &bare, server, None),
                    ("egress-agent", enforced, server, Some(agent.pid())),
                    ("dnsmasq --nftset", &proxied, gateway, Some(dnsmasq.0.id())),
                ];
                let variants = measure(paths.map(|(what, pod, resolver, pid)| {
                    let client = match names {
                        "new" => Client::new(pod, resolver),
                        _ => Client::of_known(pod, resolver, KNOWN_NAMES),
                    };
                    Variant::new(what, client, pid)
                }));
                let situation = format!("{names} names, before {what}, {placed}");
                println!("{situation}:\n");
                report(&variants);
                let others = [variants[1].what, variants[2].what];
                latency.add(&situation, &others, ratios(&variants, |it| &it.p50));
                rate.add(&situation, &others, ratios(&variants, |it| &it.rate));
            }
        }
    }
    latency.write("dns-latency");
    rate.write("dns-rate");
}

/// Runs all rounds.
fn measure(mut variants: [Variant; 3]) -> [Variant; 3] {
    for variant in &variants {
        variant.client.latencies(SINGLE_NAMES);
    }
    take_turns(&mut variants, ROUNDS, Variant::round);
    variants
}

fn report(variants: &[Variant; 3]) {
    let bare = &variants[0];
    println!(
        "{ROUNDS} rounds of {SINGLE_NAMES} names one by one and {PIPELINED_NAMES} with {OPEN} open (pipelined).\n"
    );
    println!("Ratio to bare, the median and the middle half of the rounds:\n");
    let mut ratios = vec![row!["", "p50", "p99", "queries/s, one by one", "pipelined"]];
    for variant in &variants[1..] {
        ratios.push(row![
            variant.what,
            Spread::of_ratios(&variant.p50, &bare.p50).ratio(),
            Spread::of_ratios(&variant.p99, &bare.p99).ratio(),
            Spread::of_ratios(&variant.single_rate, &bare.single_rate).ratio(),
            Spread::of_ratios(&variant.rate, &bare.rate).ratio(),
        ]);
    }
    print_table(&ratios);
    println!("Medians; CPU of the program in between, for each question:\n");
    let mut numbers = vec![row![
        "",
        "p50",
        "p99",
        "queries/s, pipelined",
        "CPU, one by one",
        "CPU, pipelined"
    ]];
    for variant in variants {
        let cpu = |numbers: &[f64]| {
            variant.pid.map_or("-".to_owned(), |_| {
                Spread::of(numbers.iter().copied()).number("µs", 1)
            })
        };
        numbers.push(row![
            variant.what,
            Spread::of(variant.p50.iter().copied()).number("µs", 0),
            Spread::of(variant.p99.iter().copied()).number("µs", 0),
            Spread::of(variant.rate.iter().map(|rate| rate / 1e3)).number("k", 1),
            cpu(&variant.single_cpu),
            cpu(&variant.pipelined_cpu),
        ]);
    }
    print_table(&numbers);
}
