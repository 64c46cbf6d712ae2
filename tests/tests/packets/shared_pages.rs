//! Headers in memory pages that the pod can still write to: the bytes that are sent are the judged ones.

use std::{
    net::{Ipv6Addr, SocketAddr, UdpSocket},
    sync::atomic::AtomicBool,
    thread,
    time::Duration,
};

use egress_tests::{
    Lab, Pod, StopAtEnd,
    addresses::server6,
    raw::{IPV6, Ip},
    rewritten::with_rule,
    shared_page::{SharedPage, without_checksums},
};

/// The port that the pod may reach at `server6(1)`.
const PORT: u16 = 4000;
/// A port that the pod may not reach.
const OTHER_PORT: u16 = 22;
/// The port to which the pod's socket sends, before the pod's rule rewrites the packet.
const WRITTEN_PORT: u16 = 6666;
/// The number of datagrams. If headers were judged in the page, one in twenty would arrive on the other port,
/// but none while the two threads do not run at the same time.
const DATAGRAMS: usize = 8000;

/// A UDP datagram of the pod to this port.
fn datagram(pod: &Pod, port: u16) -> Vec<u8> {
    Ip::new(pod.ipv6(), server6(1)).udp(7777, port, &[b'x'; 56])[IPV6..].to_vec()
}

fn listen(lab: &Lab, port: u16) -> UdpSocket {
    let socket = lab
        .outside()
        .run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)))
        .expect("a free port");
    without_checksums(&socket).expect("UDP over IPv6 without checksums");
    socket.set_nonblocking(true).expect("a socket");
    socket
}

/// The number of datagrams that have arrived.
fn arrived(socket: &UdpSocket) -> usize {
    std::iter::from_fn(|| socket.recv(&mut [0; 128]).ok()).count()
}

#[test]
fn a_port_in_a_shared_page_cannot_change_after_the_verdict() {
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "[2001:db8::1]:4000")]);
    let _agent = lab.start_agent(&[&pod]);
    let (allowed, denied) = (listen(&lab, PORT), listen(&lab, OTHER_PORT));

    let socket = pod.udp_socket((server6(1), WRITTEN_PORT));
    without_checksums(&socket).expect("UDP over IPv6 without checksums");
    let [to_port, to_other] = [PORT, OTHER_PORT].map(|port| datagram(&pod, port));
    let page = SharedPage::new(&to_port);
    let stop = AtomicBool::new(false);
    let (mut on_allowed, mut on_denied) = (0, 0);
    // The header of the socket's datagram becomes a destination option with four bytes of padding, so that
    // the page begins with the UDP header.
    let rule =
        format!("udp dport {WRITTEN_PORT} @nh,320,64 set 0x1100010400000000 @nh,48,8 set 60");
    with_rule(pod.netns(), "eth0", &rule, || {
        thread::scope(|scope| {
            let _flipping = StopAtEnd(&stop);
            scope.spawn(|| page.flip(0, [&to_port[..8], &to_other[..8]], &stop));
            for _ in 0..DATAGRAMS {
                page.send(to_port.len(), &socket).expect("send the page");
                thread::sleep(Duration::from_micros(50));
                on_allowed += arrived(&allowed);
                on_denied += arrived(&denied);
            }
        });
    });
    // After this last datagram, all earlier ones have arrived.
    let last = pod.udp_socket(SocketAddr::from((server6(1), PORT)));
    last.send(b"the last").expect("send a datagram");
    allowed.set_nonblocking(false).expect("a socket");
    allowed
        .set_read_timeout(Some(egress_tests::DEADLINE))
        .expect("a time-out");
    let mut buffer = [0; 128];
    loop {
        let len = allowed
            .recv(&mut buffer)
            .expect("the last datagram arrives");
        if &buffer[..len] == b"the last" {
            break;
        }
        on_allowed += 1;
    }
    on_denied += arrived(&denied);

    assert!(
        on_allowed > 0,
        "nothing arrived: the packets are not what this test means"
    );
    assert_eq!(
        on_denied, 0,
        "on the denied port, of {DATAGRAMS} ({on_allowed} on the other)"
    );
}
