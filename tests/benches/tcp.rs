//! The cost of a new name over TCP, with a connection of its own: bare, and with every segment held by the
//! agent, with the same server.
#![allow(
    clippy::allow_attributes,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "the measured values are far below those at which a float loses whole units"
)]

mod common;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
    thread,
    time::Instant,
};

use common::{
    Placement, Spread, cpu_ns,
    dns::{ZONE, fresh, number_of, question},
    print_table, quantile,
    responder::reply,
};
use egress_tests::{DEADLINE, Lab, Pod, addresses::RESOLVER};
use nix::unistd::{Pid, gettid};

const ROUNDS: usize = 30;
/// The number of connections in a round, each with one query.
const CONNECTIONS: u32 = 300;

/// Responds to one query on each connection, one connection after the other. It ends with the process.
fn serve(lab: &Lab) -> Pid {
    let listener = lab
        .outside()
        .run(|| TcpListener::bind((RESOLVER, 53)))
        .expect("the resolver's address is free");
    let (send_id, id) = mpsc::channel();
    thread::spawn(move || {
        send_id.send(gettid()).expect("its starter waits for it");
        for stream in listener.incoming() {
            // A lost client is visible in the client's own results.
            let _ = stream.and_then(answer);
        }
    });
    id.recv().expect("a thread that starts")
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let mut bytes = [0; 512];
    let len = stream.read(&mut bytes)?;
    let message = bytes.get_mut(2..).unwrap_or_default();
    if let Some(len) = number_of(message).and_then(|_| reply(message, len.saturating_sub(2))) {
        bytes[..2].copy_from_slice(&(len as u16).to_be_bytes());
        stream.write_all(&bytes[..2 + len])?;
    }
    // The client ends the connection.
    stream.read(&mut bytes).map(drop)
}

/// Connects and queries; returns the time of each in microseconds, sorted.
fn latencies(pod: &Pod) -> Vec<f64> {
    let to = SocketAddr::new(RESOLVER, 53);
    let mut taken: Vec<f64> = pod.netns().run(|| {
        (0..CONNECTIONS)
            .map(|_| {
                let message = question(fresh());
                let framed = [&(message.len() as u16).to_be_bytes(), &message[..]].concat();
                let start = Instant::now();
                let mut stream = TcpStream::connect_timeout(&to, DEADLINE).expect("connect");
                stream.write_all(&framed).expect("send a query");
                let mut answer = [0; 512];
                let len = stream.read(&mut answer).expect("a response");
                let elapsed = start.elapsed().as_secs_f64() * 1e6;
                assert!(len > 14 && answer[9] == 1, "not an answer with an address");
                elapsed
            })
            .collect()
    });
    taken.sort_unstable_by(f64::total_cmp);
    taken
}

#[derive(Default)]
struct Variant {
    p50: Vec<f64>,
    p99: Vec<f64>,
    cpu: Vec<f64>,
}

impl Variant {
    fn round(&mut self, pod: &Pod, pid: Option<u32>) {
        let cpu = || pid.map_or(0, cpu_ns) as f64 / 1000.0;
        let before = cpu();
        let taken = latencies(pod);
        self.cpu.push((cpu() - before) / f64::from(CONNECTIONS));
        self.p50.push(quantile(&taken, 0.5));
        self.p99.push(quantile(&taken, 0.99));
    }
}

fn main() {
    let lab = Lab::builder()
        .without_dns()
        .config("limits.addressesPerPod", 131_072)
        .build();
    let server = serve(&lab);
    let [bare, enforced] = ["bare", "enforced"].map(|name| lab.pod("b", name));
    lab.write_pod(&enforced, &[("allow", &format!("*.{ZONE}:443"))]);
    let agent = lab.start_agent(&[&enforced]);

    for placement in Placement::BOTH {
        placement.place(&[server]);
        let (mut without, mut with) = (Variant::default(), Variant::default());
        latencies(&enforced);
        for round in 0..ROUNDS {
            if round % 2 == 0 {
                without.round(&bare, None);
                with.round(&enforced, Some(agent.pid()));
            } else {
                with.round(&enforced, Some(agent.pid()));
                without.round(&bare, None);
            }
        }
        println!(
            "{}: {ROUNDS} rounds of {CONNECTIONS} connections with a question each.\n",
            placement.text()
        );
        let number = |numbers: &[f64]| Spread::of(numbers.iter().copied()).number("µs", 0);
        print_table(&[
            row!["", "p50", "p99", "CPU of the agent"],
            row!["bare", number(&without.p50), number(&without.p99), "-"],
            row![
                "egress-agent",
                number(&with.p50),
                number(&with.p99),
                number(&with.cpu)
            ],
            row![
                "ratio",
                Spread::of_ratios(&with.p50, &without.p50).ratio(),
                Spread::of_ratios(&with.p99, &without.p99).ratio(),
                ""
            ],
        ]);
    }
}
