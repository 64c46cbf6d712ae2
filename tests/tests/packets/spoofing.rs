//! Answers that somebody else sends in the resolver's name.

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

/// A pod that has asked for `shop.test` and waits: the resolver has the question and says nothing
/// before it is told to.
struct Waiting {
    agent: Agent,
    socket: DnsSocket,
    cart: Pod,
    /// A pod under a policy of its own, that forges.
    mail: Pod,
    lab: Lab,
}

impl Waiting {
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
        eventually("the question is at the resolver", || {
            holds(lab.dns().asked("shop.test") == 1)
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

    /// An answer with this address that fits the open question in everything.
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

    /// The resolver answers at last: that is the first thing the pod receives, and all it learns.
    #[track_caller]
    fn hears_the_truth_alone(&self) {
        let to = self.socket.address();
        self.lab.dns().send(RESOLVER, to, &self.answer(TRUTH));
        let answer = self.socket.expect("the resolver's answer");
        assert_eq!(answer.addresses, [server(TRUTH)]);
        let learned: Vec<IpAddr> = self.lab.allowed(&self.cart).into_keys().collect();
        assert_eq!(learned, [server(TRUTH)]);
        assert!(self.lab.allowed(&self.mail).is_empty());
    }

    /// This pod's forgery ends at its own interface.
    #[track_caller]
    fn is_stopped(&self, forger: &Pod, src: IpAddr, count: u64) {
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
fn another_pod_that_forges_the_resolvers_answer_opens_nothing() {
    let scene = Waiting::new();
    let tap = Tap::open(scene.mail.netns(), "eth0");
    // It has guessed everything right: port, id, name and type.
    let forged = scene.answer(LIE);
    tap.send(&frames::udp(
        &scene.mail,
        (RESOLVER, 53),
        scene.asker(),
        &forged,
    ));
    scene.is_stopped(&scene.mail, RESOLVER, 1);
    // Over IPv6 too, though the question went out over IPv4.
    tap.send(&frames::udp(
        &scene.mail,
        (RESOLVER6, 53),
        (scene.cart.ipv6().into(), scene.asker().1),
        &forged,
    ));
    scene.is_stopped(&scene.mail, RESOLVER6, 1);
    scene.hears_the_truth_alone();
}

#[test]
fn a_pod_that_forges_an_answer_to_itself_opens_nothing() {
    let scene = Waiting::new();
    let forged = frames::udp(
        &scene.cart,
        (RESOLVER, 53),
        scene.asker(),
        &scene.answer(LIE),
    );
    Tap::open(scene.cart.netns(), "eth0").send(&forged);
    scene.is_stopped(&scene.cart, RESOLVER, 1);
    // What it sends itself within its own namespace, nobody else hears: it can deceive its own
    // programs, and they find the address closed.
    Tap::open(scene.cart.netns(), "lo").send(&forged);
    scene
        .agent
        .denies_tcp(&scene.cart, (server(LIE), 443), "address_not_learned");
    assert!(scene.lab.allowed(&scene.cart).is_empty());
}

#[test]
fn a_question_in_a_neighbours_name_does_not_leave() {
    let scene = Waiting::new();
    let question = egress_tests::dns::question(9, "shop.test", RecordType::A);
    let forged = frames::udp(&scene.mail, scene.asker(), (RESOLVER, 53), &question);
    Tap::open(scene.mail.netns(), "eth0").send(&forged);
    scene.is_stopped(&scene.mail, scene.asker().0, 1);
    scene.hears_the_truth_alone();
    assert_eq!(scene.lab.dns().asked("shop.test"), 1);
}

#[test]
fn a_sender_on_the_node_that_guesses_finds_nothing_open() {
    let scene = Waiting::new();
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
    // From an address that is no resolver's it is no answer at all, and reaches the pod as any
    // datagram may.
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
    scene.hears_the_truth_alone();
}
