//! The cost of a connection: bare, under the agent, and through a proxy on the node, as where each name has a proxy.
#![allow(
    clippy::allow_attributes,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "the measured values are far below those at which a float loses whole units"
)]

mod common;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::mpsc,
    thread,
    time::Instant,
};

use common::{Placement, Spread, cpu_ns, plot::Chart, print_table, quantile, ratios, take_turns};
use egress_tests::{Lab, Pod, Running, addresses::server, eventually, holds};
use nix::unistd::gettid;

const ROUNDS: usize = 30;
/// The number of connections in a round, one after the other.
const CONNECTIONS: u32 = 500;
const PORT: u16 = 443;
const REQUEST: [u8; 128] = [b'q'; 128];
const RESPONSE: [u8; 1024] = [b'a'; 1024];

/// One of the compared ways to the server, and its measurements, one number per round.
struct Variant<'a> {
    what: &'static str,
    pod: &'a Pod,
    to: IpAddr,
    /// The process in between.
    pid: Option<u32>,
    p50: Vec<f64>,
    p99: Vec<f64>,
    rate: Vec<f64>,
    cpu: Vec<f64>,
}

impl<'a> Variant<'a> {
    fn new(what: &'static str, pod: &'a Pod, to: IpAddr, pid: Option<u32>) -> Self {
        Self {
            what,
            pod,
            to,
            pid,
            p50: Vec::new(),
            p99: Vec::new(),
            rate: Vec::new(),
            cpu: Vec::new(),
        }
    }

    fn round(&mut self) {
        let cpu = || self.pid.map_or(0, cpu_ns) as f64 / 1000.0;
        let before = cpu();
        let taken = self.pod.netns().run(|| connect_and_close(self.to));
        self.cpu.push((cpu() - before) / f64::from(CONNECTIONS));
        self.p50.push(quantile(&taken, 0.5));
        self.p99.push(quantile(&taken, 0.99));
        self.rate
            .push(taken.len() as f64 * 1e6 / taken.iter().sum::<f64>());
    }
}

/// Connects, sends a request, reads the response to its end and closes; returns the time of each in microseconds, sorted.
fn connect_and_close(to: IpAddr) -> Vec<f64> {
    let mut response = Vec::with_capacity(RESPONSE.len());
    let mut taken: Vec<f64> = (0..CONNECTIONS)
        .map(|_| {
            response.clear();
            let start = Instant::now();
            let mut stream = TcpStream::connect((to, PORT)).expect("a connection");
            stream.write_all(&REQUEST).expect("send a request");
            stream.read_to_end(&mut response).expect("a response");
            drop(stream);
            let taken = start.elapsed().as_secs_f64() * 1e6;
            assert_eq!(response, RESPONSE, "the whole response");
            taken
        })
        .collect();
    taken.sort_unstable_by(f64::total_cmp);
    taken
}

/// Answers one request on each connection, and closes it.
fn serve(listener: &TcpListener) {
    for stream in listener.incoming() {
        let mut stream = stream.expect("accept(2)");
        let mut request = REQUEST;
        if stream.read_exact(&mut request).is_ok() {
            let _ = stream.write_all(&RESPONSE);
        }
    }
}

/// A proxy on the node that forwards the connections of one name.
fn proxy(lab: &Lab, listen: IpAddr, server: IpAddr) -> Running {
    let configuration = format!(
        "global\n\
         \x20 nbthread 1\n\
         defaults\n\
         \x20 mode tcp\n\
         \x20 timeout connect 5s\n\
         \x20 timeout client 60s\n\
         \x20 timeout server 60s\n\
         listen name\n\
         \x20 bind {listen}:{PORT}\n\
         \x20 server name {server}:{PORT}\n"
    );
    let file = lab.directory().join("haproxy.cfg");
    fs::write(&file, configuration).expect("write a configuration");
    let mut command = Command::new("/usr/sbin/haproxy");
    let proxy = lab.run_on_node(command.arg("-db").arg("-f").arg(&file));
    eventually("haproxy listens", || {
        let path = "/proc/thread-self/net/tcp";
        let open = lab.node().run(|| fs::read_to_string(path)).ok()?;
        holds(open.contains(&format!(":{PORT:04X} ")))
    });
    proxy
}

fn main() {
    let lab = Lab::new();
    lab.dns().addresses("shop.test", &[server(10)]);
    let [bare, enforced, proxied] = ["bare", "enforced", "proxied"].map(|name| lab.pod("b", name));
    lab.write_pod(&enforced, &[("allow", &format!("shop.test:{PORT}"))]);
    let agent = lab.start_agent(&[&enforced]);
    assert_eq!(enforced.lookup("shop.test"), [server(10)]);
    let [a, b, c, _] = proxied.ipv4().octets();
    let gateway = IpAddr::from([a, b, c, 1]);
    let proxy = proxy(&lab, gateway, server(10));

    let at = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT));
    let listener = lab.outside().run(|| TcpListener::bind(at));
    let listener = listener.expect("a free port");
    let (of_server, server_thread) = mpsc::channel();
    thread::spawn(move || {
        of_server.send(gettid()).expect("the main thread waits");
        serve(&listener);
    });
    let server_thread = server_thread.recv().expect("the server runs");

    let mut chart =
        Chart::new("Time of a connection (connect, request, close), ratio of the median to bare");
    for placement in Placement::BOTH {
        placement.place(&[server_thread]);
        let mut variants = [
            Variant::new("bare", &bare, server(10), None),
            Variant::new("egress-agent", &enforced, server(10), Some(agent.pid())),
            Variant::new("a proxy (HAProxy)", &proxied, gateway, Some(proxy.id())),
        ];
        for variant in &variants {
            variant.pod.netns().run(|| connect_and_close(variant.to));
        }
        take_turns(&mut variants, ROUNDS, Variant::round);
        let placed = placement.text();
        println!("{placed}: {ROUNDS} rounds of {CONNECTIONS} connections.\n");
        report(&variants);
        let others = [variants[1].what, variants[2].what];
        chart.add(placed, &others, ratios(&variants, |it| &it.p50));
    }
    chart.write("connections");
}

fn report(variants: &[Variant<'_>; 3]) {
    let bare = &variants[0];
    let mut rows = vec![row![
        "",
        "p50, to bare",
        "p99, to bare",
        "connections/s, to bare",
        "p50",
        "p99",
        "CPU in between"
    ]];
    for variant in variants {
        let number = |numbers: &[f64]| Spread::of(numbers.iter().copied()).number("µs", 0);
        rows.push(row![
            variant.what,
            Spread::of_ratios(&variant.p50, &bare.p50).ratio(),
            Spread::of_ratios(&variant.p99, &bare.p99).ratio(),
            Spread::of_ratios(&variant.rate, &bare.rate).ratio(),
            number(&variant.p50),
            number(&variant.p99),
            variant.pid.map_or("-".to_owned(), |_| number(&variant.cpu))
        ]);
    }
    print_table(&rows);
}
