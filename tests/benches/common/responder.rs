//! A DNS server with almost no work of its own, so that the measurement shows the path to it.

use std::{
    net::{IpAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use egress_tests::{Lab, addresses::RESOLVER};
use nix::unistd::{Pid, gettid};

use super::dns::{address_of, number_of};

const HEADER: usize = 12;
/// The length of type and class, which follow the name.
const QUESTION_TAIL: usize = 4;
/// A pointer to the query's name, type A, class IN, a TTL of 300 seconds, 4 bytes of data.
const RECORD: [u8; 12] = [0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 0x2c, 0, 4];

/// Responds to every query for `q<number>.…` with one address. It stops when dropped.
pub(crate) struct Responder {
    id: Pid,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Responder {
    /// Starts it on the address of the laboratory's resolver.
    pub(crate) fn start(lab: &Lab) -> Self {
        let socket = lab
            .outside()
            .run(|| UdpSocket::bind((RESOLVER, 53)))
            .expect("the resolver's address is free");
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .expect("a time-out that is not zero");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (send_id, id) = mpsc::channel();
        let thread = thread::spawn(move || {
            send_id.send(gettid()).expect("its starter waits for it");
            while !stopped.load(Ordering::Relaxed) {
                answer(&socket);
            }
        });
        Self {
            id: id.recv().expect("a thread that starts"),
            stop,
            thread: Some(thread),
        }
    }

    /// The id of its thread.
    pub(crate) fn id(&self) -> Pid {
        self.id
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Responds to one query, if one arrives.
fn answer(socket: &UdpSocket) {
    let mut message = [0; 512];
    let Ok((len, from)) = socket.recv_from(&mut message) else {
        return;
    };
    if let Some(len) = reply(&mut message, len) {
        let _ = socket.send_to(&message[..len], from);
    }
}

/// Turns a query of this length into its response; returns the response's length.
pub(crate) fn reply(message: &mut [u8], len: usize) -> Option<usize> {
    let number = number_of(message.get(..len)?)?;
    let name = message
        .get(HEADER..len)?
        .iter()
        .position(|&byte| byte == 0)?;
    let IpAddr::V4(address) = address_of(number) else {
        return None;
    };
    let end = HEADER + name + 1 + QUESTION_TAIL;
    // QR, RD, RA; one question, one answer, nothing else (no OPT record).
    message[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
    message[end..end + RECORD.len()].copy_from_slice(&RECORD);
    let data = end + RECORD.len();
    message[data..data + 4].copy_from_slice(&address.octets());
    Some(data + 4)
}
