//! Protocols without ports: ESP, GRE and others, with entries of their own.

use std::net::{IpAddr, SocketAddr};

use egress_tests::{
    Agent, DEADLINE, Lab, Pod, SHORT,
    addresses::{server, server6},
    dns::RecordType,
    frames::{self, Tap},
};
use etherparse::IpNumber;
use socket2::{Domain, Protocol, Socket, Type};

const ESP: u8 = 50;
const GRE: u8 = 47;
const OSPF: u8 = 89;

/// A pod with these entries, and a tap on the frames that leave the node.
struct Wire {
    agent: Agent,
    uplink: Tap,
    pod: Pod,
    lab: Lab,
}

impl Wire {
    fn new(rules: &[(&str, &str)]) -> Self {
        let lab = Lab::new();
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, rules);
        let agent = lab.start_agent(&[&pod]);
        let uplink = Tap::open(lab.outside(), "eth0");
        Self {
            agent,
            uplink,
            pod,
            lab,
        }
    }

    /// Sends a packet of this protocol from an ordinary raw socket.
    #[track_caller]
    fn send(&self, protocol: u8, to: IpAddr) {
        let domain = if to.is_ipv4() {
            Domain::IPV4
        } else {
            Domain::IPV6
        };
        let raw = Some(Protocol::from(i32::from(protocol)));
        self.pod
            .netns()
            .run(|| {
                let socket = Socket::new(domain, Type::RAW, raw)?;
                socket.send_to(&[protocol; 16], &SocketAddr::from((to, 0)).into())
            })
            .expect("the pod sends a packet");
    }

    /// True if a packet of this protocol leaves the node.
    #[track_caller]
    fn reaches(&self, protocol: u8, to: IpAddr, timeout: std::time::Duration) -> bool {
        self.send(protocol, to);
        let own = self.pod.address_for(to);
        // Ignores the ICMP error that quotes the packet.
        self.uplink
            .receive(timeout, |seen| {
                frames::is(seen, own, to, IpNumber(protocol))
            })
            .is_some()
    }

    #[track_caller]
    fn assert_denied(&self, protocol: u8, to: IpAddr, reason: &str) {
        let mark = self.agent.mark();
        assert!(
            !self.reaches(protocol, to, SHORT),
            "{protocol} to {to} left"
        );
        self.agent.wait_denial_from(mark, reason, |denial| {
            denial.of(&self.pod)
                && denial.reason == reason
                && denial.dst_ip == Some(to)
                && denial.protocol == Some(protocol.to_string())
        });
    }
}

#[test]
fn a_protocol_reaches_only_addresses_whose_entries_name_it() {
    let wire = Wire::new(&[(
        "allow",
        "203.0.113.1/esp [2001:db8::1]/gre 203.0.113.2:443 203.0.113.3/ip-89 203.0.113.4/any",
    )]);
    for (protocol, to) in [
        (ESP, server(1)),
        (GRE, server6(1)),
        (OSPF, server(3)),
        (ESP, server(4)),
        (GRE, server(4)),
    ] {
        assert!(wire.reaches(protocol, to, DEADLINE), "{protocol} to {to}");
    }
    for (protocol, to) in [(GRE, server(1)), (ESP, server(2)), (ESP, server(3))] {
        wire.assert_denied(protocol, to, "port_not_allowed");
    }
    wire.assert_denied(ESP, server(5), "no_rule");
    assert!(wire.pod.connect_tcp((server(1), 443), SHORT).is_err());
}

#[test]
fn a_name_may_be_allowed_for_one_protocol() {
    let wire = Wire::new(&[("allow", "vpn.test/esp")]);
    wire.lab.dns().addresses("vpn.test", &[server(9)]);
    wire.assert_denied(ESP, server(9), "address_not_learned");
    wire.pod.resolve("vpn.test", RecordType::A);
    assert!(wire.reaches(ESP, server(9), DEADLINE));
    wire.assert_denied(GRE, server(9), "port_not_allowed");
}

#[test]
fn a_denied_protocol_does_not_leave_an_open_pod() {
    let wire = Wire::new(&[("deny", "203.0.113.0/24/gre")]);
    wire.assert_denied(GRE, server(1), "deny_rule");
    assert!(wire.reaches(ESP, server(1), DEADLINE));
}

#[test]
fn explain_names_the_protocol() {
    let wire = Wire::new(&[("allow", "203.0.113.1/esp")]);
    let (code, text) = wire.lab.explain(&wire.pod, "203.0.113.1/ip-50");
    assert_eq!(code, 0, "{text}");
    let (code, text) = wire.lab.explain(&wire.pod, "203.0.113.1");
    assert_eq!(code, 0, "{text}");
    assert_eq!(text["ports"][0]["protocol"], "esp", "{text}");
    let (code, text) = wire.lab.explain(&wire.pod, "203.0.113.1/gre");
    assert_eq!(code, 1, "{text}");
}
