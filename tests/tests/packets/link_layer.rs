//! Messages that pods on one bridge may send each other on the link, and from which addresses.

use std::{fs, net::Ipv6Addr};

use egress_common::{address::link_local_of, reason::Reason};
use egress_tests::{
    Agent, DEADLINE, Lab, Pod,
    frames::Tap,
    programs::Programs,
    raw::{self, Ip, protocol},
    rewritten::finish,
};

const ROUTER_SOLICITATION: u8 = 133;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const MLD2_REPORT: u8 = 143;

const GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
const ALL_MLD2_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x16);

/// Two pods on one bridge on which the node is the gateway; the first pod is enforced.
struct Scene {
    agent: Agent,
    cart: Pod,
    mail: Pod,
    tap: Tap,
    neighbour: Tap,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::new();
        let [cart, mail] = lab.two_pods_on_a_bridge();
        lab.node()
            .ip_batch(&format!("addr add {GATEWAY}/64 dev br0 nodad\n"));
        lab.write_pod(&cart, &[("allow", "")]);
        let agent = lab.start_agent(&[&cart]);
        Self {
            agent,
            tap: Tap::open(cart.netns(), "eth0"),
            neighbour: Tap::open(mail.netns(), "eth0"),
            cart,
            mail,
            lab,
        }
    }

    /// Asserts that this frame to the neighbour is dropped: sends it and then an honest one, of which only
    /// the latter arrives.
    #[track_caller]
    fn assert_dropped(&self, frame: &[u8], reason: &str) {
        let mark = self.agent.mark();
        self.tap.send(frame);
        let honest = self.advertisement(own_link_local(&self.cart), &self.cart);
        self.tap.send(&honest);
        let first = self
            .neighbour
            .receive(DEADLINE, |seen| seen == frame || seen == &honest[..])
            .expect("the honest one arrives");
        assert_eq!(first, honest);
        self.agent.wait_denial_from(mark, reason, |denial| {
            denial.of(&self.cart) && denial.reason == reason
        });
    }

    #[track_caller]
    fn assert_passes(&self, frame: &[u8]) {
        self.tap.send(frame);
        let seen = self.neighbour.receive(DEADLINE, |seen| seen == frame);
        assert!(seen.is_some(), "it does not arrive: {frame:02x?}");
    }

    /// A neighbour advertisement of this address, from this pod's hardware address.
    fn advertisement(&self, target: Ipv6Addr, sender: &Pod) -> Vec<u8> {
        let option = [&[2, 1][..], &sender.hardware()].concat();
        let rest = [&[0x20, 0, 0, 0][..], &target.octets(), &option].concat();
        let frame = Ip::new(target, ALL_NODES)
            .hops(255)
            .icmp(ADVERTISEMENT, 0, &rest);
        self.to_neighbour(frame, sender)
    }

    fn to_neighbour(&self, mut frame: Vec<u8>, sender: &Pod) -> Vec<u8> {
        finish(sender, &mut frame);
        frame[..6].copy_from_slice(&self.mail.hardware());
        frame
    }
}

fn own_link_local(pod: &Pod) -> Ipv6Addr {
    link_local_of(pod.hardware()).into()
}

#[test]
fn a_pod_cannot_use_the_gateways_link_local_address() {
    let scene = Scene::new();
    scene.assert_dropped(&scene.advertisement(GATEWAY, &scene.cart), "spoofed_source");
    // A solicitation from the gateway's address has the same effect.
    let option = [&[1, 1][..], &scene.cart.hardware()].concat();
    let target = own_link_local(&scene.mail);
    let rest = [&[0; 4][..], &target.octets(), &option].concat();
    let asks = Ip::new(GATEWAY, target)
        .hops(255)
        .icmp(SOLICITATION, 0, &rest);
    scene.assert_dropped(&scene.to_neighbour(asks, &scene.cart), "spoofed_source");
    // Duplicate address detection makes an owner that starts see a conflict.
    let rest = [&[0; 4][..], &GATEWAY.octets()].concat();
    let looks = Ip::new(Ipv6Addr::UNSPECIFIED, ALL_NODES)
        .hops(255)
        .icmp(SOLICITATION, 0, &rest);
    scene.assert_dropped(&scene.to_neighbour(looks, &scene.cart), "spoofed_source");
}

#[test]
fn a_pod_cannot_use_a_neighbours_link_local_address() {
    const CHOSEN: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x1234, 0x5678, 0x9abc, 0xdef0);
    const ANOTHER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x1234, 0x5678, 0x9abc, 0xdef1);
    let scene = Scene::new();
    // Derived from the neighbour's hardware address.
    let of_mail = own_link_local(&scene.mail);
    scene.assert_dropped(&scene.advertisement(of_mail, &scene.cart), "spoofed_source");
    // Chosen by another enforced pod.
    scene.lab.write_pod(&scene.mail, &[("allow", "")]);
    scene.agent.wait_enforcing(&scene.mail);
    let mut chosen = scene.advertisement(CHOSEN, &scene.mail);
    chosen[..6].copy_from_slice(&scene.cart.hardware());
    Tap::open(scene.mail.netns(), "eth0").send(&chosen);
    assert!(
        scene
            .tap
            .receive(DEADLINE, |seen| seen == &chosen[..])
            .is_some()
    );
    // The second pod that claims the address does not get it, and may choose another.
    scene.assert_dropped(&scene.advertisement(CHOSEN, &scene.cart), "spoofed_source");
    scene.assert_passes(&scene.advertisement(ANOTHER, &scene.cart));
}

#[test]
fn messages_on_the_link_cannot_carry_other_data() {
    let scene = Scene::new();
    let own = own_link_local(&scene.cart);
    let neighbour = own_link_local(&scene.mail);
    let solicitation = |options: &[u8]| {
        let rest = [&[0; 4][..], &neighbour.octets(), options].concat();
        let frame = Ip::new(own, neighbour)
            .hops(255)
            .icmp(SOLICITATION, 0, &rest);
        scene.to_neighbour(frame, &scene.cart)
    };
    let address = [&[1, 1][..], &scene.cart.hardware()].concat();
    let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
    scene.assert_passes(&solicitation(&address));
    scene.assert_passes(&solicitation(&[&address[..], &nonce].concat()));
    let mut letter = vec![253, 25];
    letter.resize(200, b'x');
    scene.assert_dropped(&solicitation(&letter), "malformed");
    let mut long_nonce = vec![14, 8];
    long_nonce.resize(64, b'x');
    scene.assert_dropped(&solicitation(&long_nonce), "malformed");
    let mut trailer = solicitation(&address);
    trailer.extend([b'x'; 200]);
    scene.assert_dropped(&trailer, "malformed");

    let mut question = raw::arp(scene.cart.ipv4(), scene.mail.ipv4());
    finish(&scene.cart, &mut question);
    question[22..28].copy_from_slice(&scene.cart.hardware());
    let question = scene.to_neighbour(question, &scene.cart);
    scene.assert_passes(&question);
    let mut padded = question.clone();
    padded.resize(60, 0);
    scene.assert_passes(&padded);
    padded[59] = b'x';
    scene.assert_dropped(&padded, "malformed");
}

#[test]
fn ipv6_address_configuration_by_the_kernel_works() {
    let scene = Scene::new();
    let inside = scene.cart.netns();
    inside.run(|| {
        for (key, value) in [
            ("accept_dad", "1"),
            ("accept_ra", "1"),
            ("router_solicitations", "3"),
        ] {
            let path = format!("/proc/sys/net/ipv6/conf/eth0/{key}");
            fs::write(&path, value).unwrap_or_else(|e| panic!("{path}: {e}"));
        }
    });
    let own = own_link_local(&scene.cart);
    inside.ip_batch("link set eth0 down\nlink set eth0 up\n");
    let icmp = |frame: &[u8], at: usize, kind: u8| {
        frame[12..14] == [0x86, 0xdd]
            && frame.get(at) == Some(&kind)
            && frame[6..12] == scene.cart.hardware()
    };
    // Duplicate address detection with its nonce, the report of joined multicast groups, and the router
    // solicitation.
    let seen = |what: &str, is: &dyn Fn(&[u8]) -> bool| {
        assert!(scene.neighbour.receive(DEADLINE, is).is_some(), "{what}");
    };
    seen("duplicate address detection", &|frame| {
        icmp(frame, 54, SOLICITATION)
            && frame[22..38] == [0; 16]
            && frame[62..78] == own.octets()
            && frame.len() == 86
    });
    seen("a report", &|frame| icmp(frame, 62, MLD2_REPORT));
    seen("a search for routers", &|frame| {
        icmp(frame, 54, ROUTER_SOLICITATION) && frame[22..38] == own.octets()
    });
    let denials = scene.agent.denials();
    assert!(denials.is_empty(), "{denials:?}");
}

#[test]
fn multicast_reports_have_a_limited_size() {
    let mut programs = Programs::new();
    let own: Ipv6Addr = link_local_of([2, 0, 0, 0, 0, 2]).into();
    let report = |records: usize, auxiliary: u8, sources: u8| {
        let mut rest = vec![0, 0, 0, u8::try_from(records).unwrap()];
        for _ in 0..records {
            rest.extend([4, auxiliary, 0, sources]);
            rest.extend(ALL_ROUTERS.octets());
            rest.resize(rest.len() + 16 * usize::from(sources), 0x20);
        }
        let ip = Ip::new(own, ALL_MLD2_ROUTERS).hops(1);
        let ip = ip.extension(protocol::HOP_BY_HOP, &[0, 5, 2, 0, 0, 1, 0]);
        ip.icmp(MLD2_REPORT, 0, &rest)
    };
    programs.leaves(&report(1, 0, 0));
    programs.leaves(&report(16, 0, 0));
    programs.leaves(&report(2, 0, 3));
    programs.stays(&report(17, 0, 0), Reason::Malformed);
    programs.stays(&report(1, 4, 0), Reason::Malformed);
    programs.stays(&report(1, 0, 40), Reason::Malformed);
    // A hop-by-hop option other than the router alert.
    let ip = Ip::new(own, ALL_MLD2_ROUTERS).hops(1);
    let ip = ip.extension(protocol::HOP_BY_HOP, &[0, 0x1e, 4, b'x', b'x', b'x', b'x']);
    programs.stays(&ip.icmp(MLD2_REPORT, 0, &[0; 24]), Reason::Malformed);
}
