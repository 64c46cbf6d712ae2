//! Lists of packets (`rx-gro-list` of an interface in the pod): each packet in them has its own headers.

use std::{
    fs, io,
    net::{SocketAddr, UdpSocket},
    process::Command,
};

use egress_tests::{
    DEADLINE, Lab, Pod,
    addresses::server6,
    features::set_features,
    frames::{self, Tap},
    raw::IPV6,
    rewritten::with_rule,
};
use nix::sys::socket::{
    setsockopt,
    sockopt::{BindToDevice, UdpGsoSegment},
};

/// The port that the pod may reach at `server6(1)`.
const PORT: u16 = 4000;
/// A port that the pod may not reach.
const OTHER_PORT: u16 = 22;
/// The pod's own port.
const OWN_PORT: u16 = 7777;
/// The length of each packet's payload.
const PAYLOAD: u8 = 64;

/// Features that the interface lacks, so that it splits aggregates into packets.
const CUTTING: &[(&str, bool)] = &[
    ("tx-scatter-gather", false),
    ("tx-udp-segmentation", false),
    ("tx-gso-list", false),
];

/// A socket whose packets to `server6(1)` leave through one end of a veth pair, come back through the other
/// end as a list, and are forwarded.
fn socket_that_sends_lists(pod: &Pod) -> UdpSocket {
    let netns = pod.netns();
    let (from, to) = (pod.ipv6(), server6(1));
    netns.ip_batch(&format!(
        "link add out type veth peer name back\n\
         link set back address 02:00:00:00:77:02\nlink set out up\nlink set back up\n\
         route add {to}/128 dev out table 77\n\
         neigh add {to} lladdr 02:00:00:00:77:02 dev out nud permanent\n"
    ));
    // The sending end splits the aggregate, and the other end makes a list of the packets.
    set_features(netns, "out", CUTTING);
    set_features(netns, "back", &[("rx-gro", true), ("rx-gro-list", true)]);
    let from = SocketAddr::from((from, OWN_PORT));
    let socket = netns.run(|| {
        // A batch has no rules for IPv6.
        let rule = ["-6", "rule", "add", "oif", "out", "lookup", "77"];
        assert!(Command::new("ip").args(rule).status()?.success());
        fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
        let socket = UdpSocket::bind(from)?;
        setsockopt(&socket, BindToDevice, &"out".into())?;
        setsockopt(&socket, UdpGsoSegment, &i32::from(PAYLOAD))?;
        socket.connect((to, OTHER_PORT))?;
        Ok::<_, io::Error>(socket)
    });
    socket.expect("a socket that sends lists")
}

#[test]
fn a_list_of_packets_is_not_judged_by_its_first_packet_alone() {
    const SENTINEL: &[u8] = b"the honest one";
    let lab = Lab::new();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "[2001:db8::1]:4000")]);
    let agent = lab.start_agent(&[&pod]);
    // The uplink splits lists.
    set_features(lab.node(), "uplink", CUTTING);
    let outside = Tap::open(lab.outside(), "eth0");
    let socket = socket_that_sends_lists(&pod);

    // The rule changes the first packet's port to the allowed one.
    let rule = format!("udp dport {OTHER_PORT} udp dport set {PORT}");
    let mark = agent.mark();
    with_rule(pod.netns(), "eth0", &rule, || {
        socket
            .send(&[b'x'; 4 * PAYLOAD as usize])
            .expect("send four packets");
        let own = (pod.ipv6().into(), OWN_PORT + 1);
        let honest = frames::udp(&pod, own, (server6(1), PORT), SENTINEL);
        Tap::open(pod.netns(), "eth0").send(&honest);
        let first = outside
            .receive(DEADLINE, |seen| {
                seen.ends_with(SENTINEL) || seen.ends_with(&[b'x'; PAYLOAD as usize])
            })
            .expect("the honest one leaves");
        assert!(
            first.ends_with(SENTINEL),
            "a packet of the list left for port {}",
            u16::from_be_bytes([first[IPV6 + 2], first[IPV6 + 3]])
        );
        let denial = agent.wait_denial_from(mark, "the list", |denial| denial.of(&pod));
        assert_eq!(denial.reason, "malformed");
    });
}
