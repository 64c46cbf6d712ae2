//! Multicast and broadcasts that a sender's own kernel gives back to it (`PACKET_LOOPBACK`).

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    process::Command,
};

use egress_tests::{
    Agent, DEADLINE, Lab, Namespace, Pod, SHORT, addresses::server, observed::HTTP,
};
use nix::net::if_::if_nametoindex;
use socket2::{Domain, Protocol, Socket, Type};

/// The group of multicast DNS in each family, and a port.
const GROUP: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 251);
const GROUP6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xfb);
const PORT: u16 = 5353;
const NOBODY: &[(&str, &str)] = &[("allow", "203.0.113.1:4000")];

fn scene(attach: &str, annotations: &[(&str, &str)]) -> (Agent, Pod, Lab) {
    let lab = Lab::builder().config("http", HTTP).build();
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, annotations);
    let agent = lab.start_agent_with(&["--attach", attach], &[&pod]);
    (agent, pod, lab)
}

/// A socket that hears the group of its family on an interface, and sends to it there. Without a group it
/// hears and sends broadcasts.
#[track_caller]
fn member(netns: &Namespace, interface: &str, to: IpAddr) -> UdpSocket {
    let socket = netns.run(|| -> std::io::Result<UdpSocket> {
        let any: IpAddr = match to {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let any = SocketAddr::new(any, PORT);
        let socket = Socket::new(Domain::for_address(any), Type::DGRAM, Some(Protocol::UDP))?;
        socket.bind_device(Some(interface.as_bytes()))?;
        socket.set_broadcast(true)?;
        if to.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.bind(&any.into())?;
        let socket = UdpSocket::from(socket);
        let index = if_nametoindex(interface)?;
        match to {
            IpAddr::V4(group) if group.is_multicast() => {
                let socket = socket2::SockRef::from(&socket);
                let on = socket2::InterfaceIndexOrAddress::Index(index);
                socket.join_multicast_v4_n(&group, &on)?;
            }
            IpAddr::V4(_) => {}
            IpAddr::V6(group) => socket.join_multicast_v6(&group, index)?,
        }
        socket.set_read_timeout(Some(DEADLINE))?;
        Ok(socket)
    });
    socket.expect("a socket of the group")
}

fn hears(socket: &UdpSocket, expected: &[u8]) -> bool {
    let mut buffer = [0; 64];
    while let Ok((length, _)) = socket.recv_from(&mut buffer) {
        if &buffer[..length] == expected {
            return true;
        }
    }
    false
}

/// Where the node and the pod speak to everybody on their link.
fn everybody() -> [IpAddr; 3] {
    [GROUP.into(), GROUP6.into(), Ipv4Addr::BROADCAST.into()]
}

#[test]
fn the_node_hears_its_own_multicast_on_a_pods_interface_and_the_pod_is_not_blamed() {
    for (attach, mode) in [("tcx", "enforce"), ("tcx", "audit"), ("clsact", "enforce")] {
        let (agent, pod, lab) = scene(attach, &[NOBODY, &[("mode", mode)]].concat());
        for to in everybody() {
            let socket = member(lab.node(), pod.interface(), to);
            socket
                .send_to(b"from the node", (to, PORT))
                .expect("the node sends");
            assert!(
                hears(&socket, b"from the node"),
                "{mode}: the node does not hear what it sent to {to}"
            );
        }
        // When this is reported, anything that was denied before would have been, too.
        let _ = pod.connect_tcp((server(20), 443), SHORT);
        agent.wait_denial("what the pod itself sends", |denial| {
            denial.is(&pod, "no_rule", server(20), 443)
        });
        let others: Vec<_> = agent
            .denials()
            .into_iter()
            .filter(|denial| denial.reason != "no_rule")
            .collect();
        assert!(others.is_empty(), "{mode}: {others:?}");
    }
}

#[test]
fn a_frame_that_a_pods_own_kernel_has_looped_back_is_judged_like_any_other() {
    let (agent, pod, lab) = scene("auto", NOBODY);
    let node = lab.node();
    let heard = member(node, pod.interface(), GROUP.into());
    let own = member(pod.netns(), "eth0", GROUP.into());
    let tc = |arguments: &str| {
        let mut command = Command::new("tc");
        command.args(arguments.split_ascii_whitespace());
        let output = pod.netns().run(|| command.output());
        let output = output.expect("tc, of the package iproute2");
        assert!(output.status.success(), "{output:?}");
    };
    // The pod sends the frame that comes back again, without an Ethernet header.
    tc("qdisc add dev eth0 clsact");
    tc(
        "filter add dev eth0 ingress protocol ip u32 match u32 0 0 action mirred egress redirect dev eth0",
    );
    let mark = agent.mark();
    own.send_to(b"from the pod", (GROUP, PORT))
        .expect("the pod sends");
    agent.wait_denial_from(mark, "the datagram to the group", |denial| {
        denial.is(&pod, "protected", GROUP.into(), PORT)
    });
    agent.wait_denial_from(mark, "what was looped back", |denial| {
        denial.of(&pod) && denial.reason == "malformed"
    });
    heard.set_read_timeout(Some(SHORT)).expect("a time-out");
    assert!(heard.recv_from(&mut [0; 64]).is_err(), "the node hears it");
}
