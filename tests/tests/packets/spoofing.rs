//! Responses that somebody else sends in the resolver's name.

use std::net::{IpAddr, SocketAddr};

use egress_tests::{
    Agent, Lab, Pod,
    addresses::{RESOLVER, RESOLVER6, server},
    dns::{DnsSocket, Question, RecordType, Send, address},
    eventually,
    frames::{self, Tap},
    holds,
};

const LIE: u8 = 66;
const TRUTH: u8 = 10;
const ID: u16 = 0x5a5a;

/// A pod that has queried `shop.test` and waits. The resolver has the query and sends nothing until the test
/// makes it.
struct Pending {
    agent: Agent,
    socket: DnsSocket,
    cart: Pod,
    /// A pod under a policy of its own that forges packets.
    mail: Pod,
    lab: Lab,
}

impl Pending {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::new();
        lab.dns().on("shop.test", |_| Vec::new());
        let (cart, mail) = (lab.pod("shop", "cart"), lab.pod("shop", "mail"));
        for pod in [&cart, &mail] {
            lab.write_pod(pod, &[("allow", "shop.test:443")]);
        }
        let agent = lab.start_agent(&[&cart, &mail]);
        let socket = cart.dns_socket();
        socket.ask(RESOLVER, ID, "shop.test", RecordType::A);
        eventually("the query is at the resolver", || {
            holds(lab.dns().queries_for("shop.test") == 1)
        });
        Self {
            agent,
            socket,
            cart,
            mail,
            lab,
        }
    }

    fn asker(&self) -> (IpAddr, u16) {
        let address = self.socket.address();
        (address.ip(), address.port())
    }

    /// A response with this address that matches the pending query in every field.
    fn answer(&self, host: u8) -> Vec<u8> {
        let asked = Question {
            name: "shop.test".to_owned(),
            qtype: RecordType::A,
            id: ID,
            from: self.socket.address(),
            to: SocketAddr::new(RESOLVER, 53),
            tcp: false,
            payload: 512,
        };
        Send::answer(&asked, &[address(server(host))])
            .bytes()
            .to_vec()
    }

    /// The resolver responds at last. Asserts that the pod receives only this response and learns only its
    /// address.
    #[track_caller]
    fn delivers_only_the_real_response(&self) {
        let to = self.socket.address();
        self.lab.dns().send(RESOLVER, to, &self.answer(TRUTH));
        let answer = self.socket.expect("the resolver's response");
        assert_eq!(answer.addresses, [server(TRUTH)]);
        let learned: Vec<IpAddr> = self.lab.allowed(&self.cart).into_keys().collect();
        assert_eq!(learned, [server(TRUTH)]);
        assert!(self.lab.allowed(&self.mail).is_empty());
    }

    /// Waits until this pod's forgeries have been dropped at its own interface.
    #[track_caller]
    fn wait_stopped(&self, forger: &Pod, src: IpAddr, count: u64) {
        let mut seen = 0;
        self.agent.wait_denial("a forged source", |d| {
            if d.of(forger) && d.reason == "spoofed_source" && d.src_ip == Some(src) {
                seen += d.count;
            }
            seen >= count
        });
    }
}

#[test]
fn a_response_forged_by_another_pod_opens_nothing() {
    let scene = Pending::new();
    let tap = Tap::open(scene.mail.netns(), "eth0");
    // The forger has guessed port, id, name and type.
    let forged = scene.answer(LIE);
    tap.send(&frames::udp(
        &scene.mail,
        (RESOLVER, 53),
        scene.asker(),
        &forged,
    ));
    scene.wait_stopped(&scene.mail, RESOLVER, 1);
    // Over IPv6 too, although the query was sent over IPv4.
    tap.send(&frames::udp(
        &scene.mail,
        (RESOLVER6, 53),
        (scene.cart.ipv6().into(), scene.asker().1),
        &forged,
    ));
    scene.wait_stopped(&scene.mail, RESOLVER6, 1);
    scene.delivers_only_the_real_response();
}

#[test]
fn a_response_that_a_pod_forges_to_itself_opens_nothing() {
    let scene = Pending::new();
    let forged = frames::udp(
        &scene.cart,
        (RESOLVER, 53),
        scene.asker(),
        &scene.answer(LIE),
    );
    Tap::open(scene.cart.netns(), "eth0").send(&forged);
    scene.wait_stopped(&scene.cart, RESOLVER, 1);
    // Nobody else receives a packet within the pod's own namespace. The pod can deceive its own programs, but
    // the address stays denied.
    Tap::open(scene.cart.netns(), "lo").send(&forged);
    scene
        .agent
        .denies_tcp(&scene.cart, (server(LIE), 443), "address_not_learned");
    assert!(scene.lab.allowed(&scene.cart).is_empty());
}

#[test]
fn a_query_in_a_neighbours_name_does_not_leave() {
    let scene = Pending::new();
    let question = egress_tests::dns::question(9, "shop.test", RecordType::A);
    let forged = frames::udp(&scene.mail, scene.asker(), (RESOLVER, 53), &question);
    Tap::open(scene.mail.netns(), "eth0").send(&forged);
    scene.wait_stopped(&scene.mail, scene.asker().0, 1);
    scene.delivers_only_the_real_response();
    assert_eq!(scene.lab.dns().queries_for("shop.test"), 1);
}

#[test]
fn responses_with_wrong_guesses_open_nothing() {
    let scene = Pending::new();
    let tap = Tap::open(scene.lab.node(), scene.cart.interface());
    let (own, port) = scene.asker();
    let right = scene.answer(LIE);
    let edited = |edit: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = right.clone();
        edit(&mut bytes);
        bytes
    };
    let second = IpAddr::from([10, 99, 0, 54]);
    let guesses = [
        ("another id", port, edited(&|b| b[0] ^= 1)),
        ("another port", port ^ 1, right.clone()),
        ("another name", port, edited(&|b| b[13] = b'x')),
        ("another type", port, edited(&|b| b[24] = 28)),
        ("another class", port, edited(&|b| b[26] = 3)),
    ];
    for (_, port, bytes) in &guesses {
        tap.offer(&frames::udp_to(
            &scene.cart,
            (RESOLVER, 53),
            (own, *port),
            bytes,
        ));
    }
    // A datagram from an address that is not a resolver's is not a DNS response, and reaches the pod as
    // ordinary traffic.
    tap.send(&frames::udp_to(
        &scene.cart,
        (second, 53),
        (own, port ^ 2),
        &right,
    ));
    let mut reported = 0;
    scene.agent.wait_denial("each guess", |d| {
        if d.of(&scene.cart) && d.reason == "dns_unsolicited" {
            reported += d.count;
        }
        reported >= guesses.len() as u64
    });
    assert!(scene.lab.allowed(&scene.cart).is_empty());
    scene.delivers_only_the_real_response();
}
