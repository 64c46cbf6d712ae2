//! A client that queries new names, or the same ones again and again.

use std::{
    cell::RefCell,
    iter,
    net::{IpAddr, UdpSocket},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use egress_tests::{Pod, addresses::numbered};

/// The zone of all queried names.
pub(crate) const ZONE: &str = "bench.test";

/// A response that takes longer counts as lost.
const PATIENCE: Duration = Duration::from_secs(2);

/// A client with a socket to a resolver.
pub(crate) struct Client {
    socket: UdpSocket,
    /// The numbers of the next names.
    numbers: RefCell<Box<dyn Iterator<Item = u32>>>,
}

/// The next unused number of a name.
pub(crate) fn fresh() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The one address of the name with this number.
pub(crate) fn address_of(number: u32) -> IpAddr {
    numbered(number % (1 << 17))
}

/// The number in the first label of a message's query.
pub(crate) fn number_of(message: &[u8]) -> Option<u32> {
    let label = message.get(13..13 + usize::from(*message.get(12)?))?;
    let digits = std::str::from_utf8(label.strip_prefix(b"q")?).ok()?;
    digits.parse().ok()
}

/// A query for an A record. The transaction id is the lower half of the number.
pub(crate) fn question(number: u32) -> Vec<u8> {
    let mut message = (number as u16).to_be_bytes().to_vec();
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    let name = format!("q{number}.{ZONE}");
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend(label.as_bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}

impl Client {
    /// A client in the pod that queries names that nobody has queried.
    pub(crate) fn new(pod: &Pod, resolver: IpAddr) -> Self {
        Self::with(pod, resolver, Box::new(iter::repeat_with(fresh)))
    }

    /// A client in the pod that queries this many names in turn.
    pub(crate) fn of_known(pod: &Pod, resolver: IpAddr, names: u32) -> Self {
        let numbers: Vec<u32> = (0..names).map(|_| fresh()).collect();
        Self::with(pod, resolver, Box::new(numbers.into_iter().cycle()))
    }

    fn with(pod: &Pod, resolver: IpAddr, numbers: Box<dyn Iterator<Item = u32>>) -> Self {
        let socket = pod.udp_socket((resolver, 53));
        socket
            .set_read_timeout(Some(PATIENCE))
            .expect("a time-out that is not zero");
        Self {
            socket,
            numbers: RefCell::new(numbers),
        }
    }

    /// Queries names one by one; returns the time of each in microseconds, sorted.
    pub(crate) fn latencies(&self, names: u32) -> Vec<f64> {
        let mut taken: Vec<f64> = (0..names)
            .map(|_| {
                let message = self.question();
                let start = Instant::now();
                self.send(&message);
                self.receive();
                start.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        taken.sort_unstable_by(f64::total_cmp);
        taken
    }

    /// Queries names with this many queries pending; returns queries per second.
    pub(crate) fn questions_per_second(&self, names: u32, open: u32) -> f64 {
        let messages: Vec<Vec<u8>> = (0..names).map(|_| self.question()).collect();
        let start = Instant::now();
        for message in &messages[..open as usize] {
            self.send(message);
        }
        for message in &messages[open as usize..] {
            self.receive();
            self.send(message);
        }
        for _ in 0..open {
            self.receive();
        }
        f64::from(names) / start.elapsed().as_secs_f64()
    }

    fn question(&self) -> Vec<u8> {
        let next = self.numbers.borrow_mut().next();
        question(next.expect("the numbers do not end"))
    }

    fn send(&self, message: &[u8]) {
        self.socket.send(message).expect("send a query");
    }

    /// Receives a response, which must have one address.
    fn receive(&self) {
        let mut answer = [0; 512];
        let len = self.socket.recv(&mut answer).expect("a response");
        let (response_code, answers) = (answer[3] & 0x0f, answer[7]);
        assert!(
            len > 12 && response_code == 0 && answers == 1,
            "not an answer with one address: {:?}",
            &answer[..len]
        );
    }
}
