//! Echo servers.

use std::{
    collections::HashMap,
    fmt,
    io::{IoSlice, IoSliceMut, Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use nix::{
    cmsg_space,
    libc::in6_pktinfo,
    poll::{PollFd, PollFlags, poll},
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn6, recvmsg, sendmsg, setsockopt,
        sockopt,
    },
};

use crate::Namespace;

const STOP_POLL_MILLISECONDS: u16 = 50;

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// The open connections, by their numbers: a thousand short ones must not use up the process's open files.
    streams: Mutex<HashMap<usize, TcpStream>>,
    /// Peer and own address of each connection, or of each datagram.
    contacts: Mutex<Vec<(SocketAddr, SocketAddr)>>,
}

impl Shared {
    fn contacts(&self) -> MutexGuard<'_, Vec<(SocketAddr, SocketAddr)>> {
        self.contacts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn streams(&self) -> MutexGuard<'_, HashMap<usize, TcpStream>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_contact(&self, peer: SocketAddr, own: SocketAddr) {
        self.contacts().push((plain(peer), plain(own)));
    }

    fn count(&self, own: SocketAddr) -> usize {
        self.contacts()
            .iter()
            .filter(|(_, reached)| *reached == own)
            .count()
    }
}

/// The address, with an IPv4-mapped IPv6 address as IPv4.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// A TCP server on one port of every address of its namespace.
pub struct TcpEcho {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for TcpEcho {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpEcho")
            .field("contacts", &self.shared.contacts)
            .finish_non_exhaustive()
    }
}

impl TcpEcho {
    /// Starts the server.
    #[track_caller]
    pub fn start(namespace: &Namespace, port: u16) -> Self {
        let shared = Arc::<Shared>::default();
        let thread = namespace.run(|| {
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
                .unwrap_or_else(|e| panic!("listen on TCP port {port}: {e}"));
            listener
                .set_nonblocking(true)
                .expect("a non-blocking listener");
            let shared = Arc::clone(&shared);
            thread::spawn(move || accept(&shared, &listener))
        });
        Self {
            shared,
            thread: Some(thread),
        }
    }

    /// The number of connections to this address.
    pub fn connections_to(&self, own: SocketAddr) -> usize {
        self.shared.count(own)
    }

    /// The clients' addresses, in order.
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.shared
            .contacts()
            .iter()
            .map(|(peer, _)| *peer)
            .collect()
    }
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    let mut next = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        poll(
            &mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)],
            STOP_POLL_MILLISECONDS,
        )
        .expect("poll(2)");
        while let Ok((mut stream, peer)) = listener.accept() {
            stream.set_nonblocking(false).expect("a blocking stream");
            let Ok(own) = stream.local_addr() else {
                continue;
            };
            shared.note_contact(peer, own);
            let copy = stream.try_clone().expect("duplicate a socket");
            let number = next;
            next += 1;
            shared.streams().insert(number, copy);
            let shared = Arc::clone(shared);
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(length @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..length]).is_err() {
                        break;
                    }
                }
                let _ = stream.shutdown(Shutdown::Both);
                shared.streams().remove(&number);
            });
        }
    }
}

impl Drop for TcpEcho {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for stream in self.shared.streams().values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// A UDP server on one port of every address of its namespace. It answers from the address to which a
/// datagram was sent.
pub struct UdpEcho {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for UdpEcho {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UdpEcho")
            .field("contacts", &self.shared.contacts)
            .finish_non_exhaustive()
    }
}

impl UdpEcho {
    /// Starts the server.
    #[track_caller]
    pub fn start(namespace: &Namespace, port: u16) -> Self {
        let shared = Arc::<Shared>::default();
        let thread = namespace.run(|| {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))
                .unwrap_or_else(|e| panic!("bind UDP port {port}: {e}"));
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true).expect("IPV6_RECVPKTINFO");
            let shared = Arc::clone(&shared);
            thread::spawn(move || echo_datagrams(&shared, &socket, port))
        });
        Self {
            shared,
            thread: Some(thread),
        }
    }

    /// The number of datagrams to this address.
    pub fn datagrams_to(&self, own: SocketAddr) -> usize {
        self.shared.count(own)
    }

    /// The senders' addresses, in order.
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.shared
            .contacts()
            .iter()
            .map(|(peer, _)| *peer)
            .collect()
    }
}

fn echo_datagrams(shared: &Shared, socket: &UdpSocket, port: u16) {
    let mut buffer = vec![0; 65_535];
    let mut control = cmsg_space!(in6_pktinfo);
    while !shared.stop.load(Ordering::Relaxed) {
        let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, STOP_POLL_MILLISECONDS).expect("poll(2)");
        if polled[0].any() != Some(true) {
            continue;
        }
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let Ok(received) = recvmsg::<SockaddrIn6>(
            socket.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_DONTWAIT,
        ) else {
            continue;
        };
        let (length, peer) = (received.bytes, received.address);
        let own = received.cmsgs().ok().and_then(|mut all| {
            all.find_map(|message| match message {
                ControlMessageOwned::Ipv6PacketInfo(info) => Some(info.ipi6_addr),
                _ => None,
            })
        });
        let (Some(peer), Some(own)) = (peer, own) else {
            continue;
        };
        shared.note_contact(
            SocketAddr::new(IpAddr::V6(peer.ip()), peer.port()),
            SocketAddr::new(IpAddr::V6(Ipv6Addr::from(own.s6_addr)), port),
        );
        let info = in6_pktinfo {
            ipi6_addr: own,
            ipi6_ifindex: 0,
        };
        // If an echo cannot be sent, the test that waits for it fails.
        let _ = sendmsg(
            socket.as_raw_fd(),
            &[IoSlice::new(&buffer[..length])],
            &[ControlMessage::Ipv6PacketInfo(&info)],
            MsgFlags::empty(),
            Some(&peer),
        );
    }
}

impl Drop for UdpEcho {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
