//! TCP throughput through the interface of an enforced pod, compared with that of a pod unknown to the agent.
#![allow(
    clippy::allow_attributes,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "the measured values are far below those at which a float loses whole units"
)]

mod common;

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use common::{Spread, print_table};
use egress_tests::{Lab, Pod, addresses::server};

const ROUNDS: usize = 30;
const ROUND: Duration = Duration::from_millis(300);
const PORT: u16 = 5201;
const BUFFER: usize = 128 << 10;

/// The first byte of a connection selects the server's behaviour.
const TAKE: u8 = b't';
const GIVE: u8 = b'g';

/// Sends until the round is over, or the other side has closed the connection.
fn send(stream: &mut TcpStream) {
    let buffer = vec![0; BUFFER];
    let start = Instant::now();
    while start.elapsed() < ROUND && stream.write_all(&buffer).is_ok() {}
    let _ = stream.shutdown(Shutdown::Write);
}

/// Receives to the end; returns bytes per second.
fn receive(stream: &mut TcpStream) -> f64 {
    let mut buffer = vec![0; BUFFER];
    let start = Instant::now();
    let mut bytes = 0;
    while let Ok(len @ 1..) = stream.read(&mut buffer) {
        bytes += len;
    }
    bytes as f64 / start.elapsed().as_secs_f64()
}

fn serve(listener: &TcpListener) {
    for stream in listener.incoming() {
        let mut stream = stream.expect("accept(2)");
        let mut order = [0];
        if stream.read_exact(&mut order).is_err() {
            continue;
        }
        if order[0] == TAKE {
            let rate = receive(&mut stream);
            let _ = stream.write_all(&rate.to_be_bytes());
        } else {
            send(&mut stream);
        }
    }
}

fn measure(pod: &Pod, order: u8) -> f64 {
    let mut stream = pod.reach_tcp((server(10), PORT));
    stream.write_all(&[order]).expect("an open connection");
    if order == GIVE {
        return receive(&mut stream);
    }
    send(&mut stream);
    let mut rate = [0; 8];
    stream.read_exact(&mut rate).expect("what arrived");
    f64::from_be_bytes(rate)
}

fn main() {
    let lab = Lab::new();
    let (bare, enforced) = (lab.pod("b", "bare"), lab.pod("b", "enforced"));
    lab.write_pod(&enforced, &[("allow", "203.0.113.0/24:5201")]);
    let _agent = lab.start_agent(&[&enforced]);
    let listener = lab
        .outside()
        .run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))
        .expect("a free port");
    thread::spawn(move || serve(&listener));

    let mut rows = vec![row!["direction", "enforced / bare", "bare", "enforced"]];
    for (what, order) in [("from the pod", TAKE), ("to the pod", GIVE)] {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            let (first, second) = if round % 2 == 0 {
                let first = measure(&bare, order);
                (first, measure(&enforced, order))
            } else {
                let second = measure(&enforced, order);
                (measure(&bare, order), second)
            };
            if round > 0 {
                without.push(first);
                with.push(second);
            }
        }
        let gigabits =
            |rates: &[f64]| Spread::of(rates.iter().map(|r| r * 8e-9)).number("Gbit/s", 1);
        rows.push(row![
            what,
            Spread::of_ratios(&with, &without).ratio(),
            gigabits(&without),
            gigabits(&with)
        ]);
    }
    println!("TCP, one stream: {ROUNDS} rounds of {ROUND:?} each way.\n");
    print_table(&rows);
}
