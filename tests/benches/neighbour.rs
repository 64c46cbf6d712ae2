//! The effect of a pod that makes the agent work on its neighbour's DNS: the pod's own server sends responses
//! of 64 KiB over TCP, with fifteen aliases and thousands of addresses, on many connections at a time.
#![allow(
    clippy::allow_attributes,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "the measured values are far below those at which a float loses whole units"
)]

mod common;

use std::{
    io::Write as _,
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use common::{
    Spread,
    dns::{Client, ZONE},
    print_table, quantile,
    responder::Responder,
};
use egress_tests::{
    Lab, Pod,
    addresses::RESOLVER,
    dns::{RecordType, framed, question, read_message},
};

/// The number of the attacker's simultaneous connections.
const CONNECTIONS: usize = 120;
const ALIASES: u16 = 15;
const ADDRESSES: u16 = 4000;
const ROUNDS: usize = 3;
/// The number of names that the neighbour queries in each round, one by one.
const NAMES: u32 = 100;

/// A response to this query that is as expensive for the agent as possible.
fn costly(question: &[u8]) -> Vec<u8> {
    const HEADER: usize = 12;
    const OPT: usize = 11;
    // Type A, class IN, a TTL of 300 seconds, 4 bytes of data.
    const RECORD: [u8; 10] = [0, 1, 0, 1, 0, 0, 1, 0x2c, 0, 4];
    let mut message = question[..question.len() - OPT].to_vec();
    message[2..4].copy_from_slice(&[0x85, 0x80]);
    message[6..8].copy_from_slice(&(ALIASES + ADDRESSES).to_be_bytes());
    message[10..HEADER].copy_from_slice(&[0, 0]);
    // Each alias is a label and a pointer to the queried name.
    let mut owner = HEADER as u16;
    for number in 0..ALIASES {
        message.extend((0xc000 | owner).to_be_bytes());
        message.extend([0, 5, 0, 1, 0, 0, 1, 0x2c, 0, 4]);
        owner = message.len() as u16;
        message.extend([1, b'a' + number as u8, 0xc0, HEADER as u8]);
    }
    for number in 0..u32::from(ADDRESSES) {
        message.extend((0xc000 | owner).to_be_bytes());
        message.extend(RECORD);
        message.extend((0xc612_0001 + number).to_be_bytes());
    }
    message
}

/// Serves expensive responses on TCP port 53 of the resolver, until the process ends.
fn serve(lab: &Lab) {
    let listener = lab
        .outside()
        .run(|| TcpListener::bind((RESOLVER, 53)))
        .expect("the resolver's address is free");
    let ready = costly(&question(0, "big.test", RecordType::A));
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut answer = ready.clone();
            thread::spawn(move || {
                while let Ok(asked) = read_message(&mut stream) {
                    answer[..2].copy_from_slice(&asked[..2]);
                    if stream.write_all(&framed(&answer)).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

/// The attack; it runs while [`Attack::on`] is true.
struct Attack {
    on: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
}

impl Attack {
    fn start(pod: &Pod) -> Self {
        let attack = Self {
            on: Arc::default(),
            answers: Arc::default(),
        };
        for id in 0..CONNECTIONS {
            let (on, answers) = (Arc::clone(&attack.on), Arc::clone(&attack.answers));
            let mut stream = pod.reach_tcp((RESOLVER, 53));
            stream
                .set_read_timeout(Some(Duration::from_secs(120)))
                .expect("a time-out");
            let asked = question(id as u16, "big.test", RecordType::A);
            thread::spawn(move || {
                loop {
                    if !on.load(Ordering::Relaxed) {
                        thread::sleep(Duration::from_millis(5));
                        continue;
                    }
                    // The agent closes a connection for which it has no room.
                    if stream.write_all(&framed(&asked)).is_err()
                        || read_message(&mut stream).is_err()
                    {
                        return;
                    }
                    answers.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        attack
    }
}

fn main() {
    let lab = Lab::builder().without_dns().build();
    let _responder = Responder::start(&lab);
    serve(&lab);
    let [greedy, neighbour] = ["greedy", "neighbour"].map(|name| lab.pod("b", name));
    lab.write_pod(&greedy, &[("allow", "big.test:443")]);
    lab.write_pod(&neighbour, &[("allow", &format!("*.{ZONE}:443"))]);
    let _agent = lab.start_agent(&[&greedy, &neighbour]);
    let attack = Attack::start(&greedy);
    let client = Client::new(&neighbour, RESOLVER);
    client.latencies(NAMES);
    let mut quiet = (Vec::new(), Vec::new());
    let mut attacked = (Vec::new(), Vec::new());
    let mut answers = 0;
    for _ in 0..ROUNDS {
        for (on, (p50, p99)) in [(false, &mut quiet), (true, &mut attacked)] {
            attack.on.store(on, Ordering::Relaxed);
            // Waits until the last responses have arrived, or the first are on their way.
            thread::sleep(Duration::from_secs(1));
            let before = attack.answers.load(Ordering::Relaxed);
            let taken = client.latencies(NAMES);
            answers += attack.answers.load(Ordering::Relaxed) - before;
            p50.push(quantile(&taken, 0.5));
            p99.push(quantile(&taken, 0.99));
        }
    }
    println!(
        "{ROUNDS} rounds of {NAMES} fresh names of the neighbour, one by one, without and with \
         {CONNECTIONS} connections of another pod that get {ALIASES} aliases and {ADDRESSES} addresses \
         each time.\n"
    );
    let us = |numbers: &[f64]| Spread::of(numbers.iter().copied()).number("µs", 0);
    print_table(&[
        row!["", "p50", "p99"],
        row!["alone", us(&quiet.0), us(&quiet.1)],
        row!["attacked", us(&attacked.0), us(&attacked.1)],
        row![
            "ratio",
            Spread::of_ratios(&attacked.0, &quiet.0).ratio(),
            Spread::of_ratios(&attacked.1, &quiet.1).ratio(),
        ],
    ]);
    println!("The attacker got {answers} answers meanwhile.");
    assert!(answers > 0, "there was an attack");
}
