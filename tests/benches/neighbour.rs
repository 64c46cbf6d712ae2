//! The effect of a pod that makes the agent work on its neighbour's DNS, in two ways: the pod's own server sends
//! responses of 64 KiB over TCP, with fifteen aliases and thousands of addresses, on many connections at a time; and
//! the pod floods the agent with queries for names that are new each time.
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
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use common::{
    Spread,
    dns::{self, Client, ZONE},
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
/// The number of queries of a flood in a millisecond.
const FLOOD: u64 = 20;
const ROUNDS: usize = 5;
/// The number of names that the neighbour queries in each round beside costly responses, one by one.
const NAMES: u32 = 100;
/// The same beside a flood. They are answered faster.
const NAMES_BESIDE_FLOOD: u32 = 1000;

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

/// An attack; it runs while [`State::on`] is true, and ends when it is dropped.
#[derive(Default)]
struct Attack {
    state: Arc<State>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    on: AtomicBool,
    is_over: AtomicBool,
    /// The number of costly responses that arrived, or of queries that were sent.
    messages: AtomicU64,
}

impl Drop for Attack {
    fn drop(&mut self) {
        self.state.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("the attack has not failed");
        }
    }
}

impl Attack {
    /// Costly responses, on all connections at a time.
    fn costly_responses(pod: &Pod) -> Self {
        let mut attack = Self::default();
        for id in 0..CONNECTIONS {
            let state = Arc::clone(&attack.state);
            let mut stream = pod.reach_tcp((RESOLVER, 53));
            stream
                .set_read_timeout(Some(Duration::from_secs(120)))
                .expect("a time-out");
            let asked = question(id as u16, "big.test", RecordType::A);
            attack.threads.push(thread::spawn(move || {
                while !state.is_over.load(Ordering::Relaxed) {
                    if !state.on.load(Ordering::Relaxed) {
                        thread::sleep(Duration::from_millis(5));
                        continue;
                    }
                    // The agent closes a connection for which it has no room.
                    if stream.write_all(&framed(&asked)).is_err()
                        || read_message(&mut stream).is_err()
                    {
                        return;
                    }
                    state.messages.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        attack
    }

    /// Queries for new names, [`FLOOD`] of them each millisecond.
    fn flood(pod: &Pod) -> Self {
        let mut attack = Self::default();
        let state = Arc::clone(&attack.state);
        let socket = pod.udp_socket((RESOLVER, 53));
        attack.threads.push(thread::spawn(move || {
            while !state.is_over.load(Ordering::Relaxed) {
                let began = Instant::now();
                if state.on.load(Ordering::Relaxed) {
                    for _ in 0..FLOOD {
                        // The device may have no room.
                        let _ = socket.send(&dns::question(dns::fresh()));
                    }
                    state.messages.fetch_add(FLOOD, Ordering::Relaxed);
                }
                thread::sleep(Duration::from_millis(1).saturating_sub(began.elapsed()));
            }
        }));
        attack
    }
}

/// Measures the neighbour's latencies without and with the attack, and prints them.
fn measure(client: &Client, names: u32, attack: &Attack, what: &str) {
    let mut quiet = (Vec::new(), Vec::new());
    let mut attacked = (Vec::new(), Vec::new());
    let mut messages = 0;
    for _ in 0..ROUNDS {
        for (on, (p50, p99)) in [(false, &mut quiet), (true, &mut attacked)] {
            attack.state.on.store(on, Ordering::Relaxed);
            // Waits until the last messages have arrived, or the first are on their way.
            thread::sleep(Duration::from_secs(1));
            let before = attack.state.messages.load(Ordering::Relaxed);
            let taken = client.latencies(names);
            messages += attack.state.messages.load(Ordering::Relaxed) - before;
            p50.push(quantile(&taken, 0.5));
            p99.push(quantile(&taken, 0.99));
        }
    }
    attack.state.on.store(false, Ordering::Relaxed);
    println!(
        "\n{ROUNDS} rounds of {names} fresh names of the neighbour, one by one, without and with {what}.\n"
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
    println!("There were {messages} messages of the attacker meanwhile.");
    assert!(messages > 0, "there was an attack");
}

fn main() {
    let lab = Lab::builder().without_dns().build();
    let _responder = Responder::start(&lab);
    serve(&lab);
    let [greedy, neighbour, bare_flooder, bare] =
        ["greedy", "neighbour", "bare-flooder", "bare"].map(|name| lab.pod("b", name));
    lab.write_pod(&greedy, &[("allow", &format!("big.test:443 *.{ZONE}:443"))]);
    lab.write_pod(&neighbour, &[("allow", &format!("*.{ZONE}:443"))]);
    let _agent = lab.start_agent(&[&greedy, &neighbour]);
    let client = Client::new(&neighbour, RESOLVER);
    client.latencies(NAMES);
    let what = format!(
        "{CONNECTIONS} connections of another pod that get {ALIASES} aliases and {ADDRESSES} addresses each time"
    );
    measure(&client, NAMES, &Attack::costly_responses(&greedy), &what);
    let what = format!(
        "{} queries a second of another pod for names that are new",
        FLOOD * 1000
    );
    measure(&client, NAMES_BESIDE_FLOOD, &Attack::flood(&greedy), &what);
    let client = Client::new(&bare, RESOLVER);
    client.latencies(NAMES);
    let what = format!("{what}; neither pod is enforced");
    measure(
        &client,
        NAMES_BESIDE_FLOOD,
        &Attack::flood(&bare_flooder),
        &what,
    );
}
