//! The hardware addresses from which a pod may send on a bridge.

use std::net::{Ipv6Addr, SocketAddr, UdpSocket};

use egress_common::address::link_local_of;
use egress_tests::{
    Agent, ApiServer, Cluster, DEADLINE, Lab, Pod, SHORT,
    addresses::server,
    cluster::allow,
    echo_on, eventually,
    frames::{self, Tap},
    holds,
    ifb::Ifb,
    raw::{self, Ip},
    rewritten::finish,
};
use serde_json::{Value, json};

const ADVERTISEMENT: u8 = 136;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const PORT: u16 = 4000;
const FREE: [u8; 6] = [2, 0, 0, 0, 99, 99];
const SPOOFED: &str = "spoofed_hardware";

/// Two pods on one bridge that may reach each other; the first is enforced.
struct Scene {
    cart: Pod,
    mail: Pod,
    tap: Tap,
    neighbour: Tap,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::builder()
            .config("ranges.internal", vec!["10.1.0.0/16"])
            .build();
        let [cart, mail] = lab.two_pods_on_a_bridge();
        for (from, to) in [(&cart, &mail), (&mail, &cart)] {
            from.netns()
                .ip_batch(&format!("route add {}/32 dev eth0\n", to.ipv4()));
        }
        lab.write_pod(&cart, &[("allow", "")]);
        Self {
            tap: Tap::open(cart.netns(), "eth0"),
            neighbour: Tap::open(mail.netns(), "eth0"),
            cart,
            mail,
            lab,
        }
    }

    #[track_caller]
    fn start(&self) -> Agent {
        self.lab.start_agent(&[&self.cart])
    }

    /// A datagram to the neighbour, from the pod's own addresses.
    fn datagram(&self, payload: &[u8]) -> Vec<u8> {
        let to = (self.mail.ipv4().into(), PORT);
        let mut frame = frames::udp(&self.cart, (self.cart.ipv4().into(), PORT), to, payload);
        frame[..6].copy_from_slice(&self.mail.hardware());
        frame
    }

    /// Asserts that this frame is dropped: sends it and then an honest one, of which only the latter arrives,
    /// and the bridge still knows the neighbour behind its own port.
    #[track_caller]
    fn assert_dropped(&self, agent: &Agent, frame: &[u8]) {
        let mark = agent.mark();
        self.tap.send(frame);
        self.assert_dropped_since(agent, mark, frame);
    }

    #[track_caller]
    fn assert_dropped_since(&self, agent: &Agent, mark: usize, frame: &[u8]) {
        let honest = self.datagram(b"the honest one");
        self.tap.send(&honest);
        let first = self
            .neighbour
            .receive(DEADLINE, |seen| seen == frame || seen == &honest[..])
            .expect("the honest one arrives");
        assert_eq!(first, honest);
        agent.wait_denial_from(mark, SPOOFED, |denial| {
            denial.of(&self.cart) && denial.reason == SPOOFED
        });
        let learned = self.learned(self.mail.hardware());
        assert_ne!(learned.as_deref(), Some(self.cart.interface()));
    }

    /// The port behind which the bridge has learned this address.
    fn learned(&self, hardware: [u8; 6]) -> Option<String> {
        let output = std::process::Command::new("bridge")
            .args(["-n", self.lab.node().name(), "fdb", "show", "br", "br0"])
            .output()
            .expect("bridge, of the package iproute2");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = text
            .lines()
            .find(|line| line.starts_with(&formatted(hardware)))?;
        let mut words = line.split(' ').skip_while(|word| *word != "dev");
        words.nth(1).map(str::to_owned)
    }
}

fn formatted(hardware: [u8; 6]) -> String {
    hardware.map(|byte| format!("{byte:02x}")).join(":")
}

fn set_hardware(pod: &Pod, hardware: [u8; 6]) {
    pod.netns()
        .ip_batch(&format!("link set eth0 address {}\n", formatted(hardware)));
}

fn from(mut frame: Vec<u8>, hardware: [u8; 6]) -> Vec<u8> {
    frame[6..12].copy_from_slice(&hardware);
    frame
}

#[test]
fn a_pod_on_a_bridge_cannot_send_from_a_neighbours_hardware_address() {
    let scene = Scene::new();
    let agent = scene.start();
    let of_mail = scene.mail.hardware();
    scene.assert_dropped(&agent, &from(scene.datagram(b"as the neighbour"), of_mail));
    scene.assert_dropped(&agent, &from(scene.datagram(b"as nobody"), FREE));
    scene.assert_dropped(&agent, &from(scene.datagram(b"to all"), [0xff; 6]));

    let mut arp = raw::arp(scene.cart.ipv4(), scene.mail.ipv4());
    arp[..6].copy_from_slice(&of_mail);
    arp[22..28].copy_from_slice(&of_mail);
    scene.assert_dropped(&agent, &from(arp, of_mail));

    // The link-local address derived from the neighbour's hardware address: the neighbour would take it for a
    // duplicate.
    let target: Ipv6Addr = link_local_of(of_mail).into();
    let rest = [&[0x20, 0, 0, 0][..], &target.octets(), &[2, 1], &of_mail].concat();
    let mut frame = Ip::new(target, ALL_NODES)
        .hops(255)
        .icmp(ADVERTISEMENT, 0, &rest);
    finish(&scene.cart, &mut frame);
    scene.assert_dropped(&agent, &from(frame, of_mail));
}

#[test]
fn a_frame_of_an_open_flow_needs_the_pods_hardware_address() {
    let scene = Scene::new();
    let agent = scene.start();
    let to = SocketAddr::from((scene.mail.ipv4(), PORT));
    let echo = scene.mail.netns().run(|| UdpSocket::bind(to));
    let echo = echo.expect("a socket of the neighbour's");
    let socket = scene.cart.netns().run(|| {
        let socket = UdpSocket::bind((scene.cart.ipv4(), PORT))?;
        socket.connect(to)?;
        Ok::<_, std::io::Error>(socket)
    });
    let socket = socket.expect("a socket of the pod's");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..3 {
                let mut buffer = [0; 64];
                let (length, from) = echo.recv_from(&mut buffer).expect("a datagram");
                echo.send_to(&buffer[..length], from).expect("its echo");
            }
        });
        for _ in 0..3 {
            assert!(echo_on(&socket, b"hello", DEADLINE));
        }
    });
    let frame = from(scene.datagram(b"as the neighbour"), scene.mail.hardware());
    scene.assert_dropped(&agent, &frame);
}

#[test]
fn a_pod_is_bound_to_the_hardware_address_it_was_found_with() {
    let scene = Scene::new();
    let mut agent = scene.start();
    let ours = scene.cart.hardware();
    let changed = |agent: &Agent, hardware| {
        set_hardware(&scene.cart, hardware);
        let mark = agent.mark();
        let frame = from(scene.datagram(b"changed"), hardware);
        scene.tap.send(&frame);
        scene.assert_dropped_since(agent, mark, &frame);
        set_hardware(&scene.cart, ours);
    };
    changed(&agent, scene.mail.hardware());
    changed(&agent, FREE);
    // The next agent does not accept the changed address either.
    agent.kill();
    set_hardware(&scene.cart, FREE);
    let agent = scene.start();
    changed(&agent, FREE);
}

#[test]
fn a_pod_cannot_claim_a_hardware_address_of_the_node_or_a_neighbour() {
    let scene = Scene::new();
    let gateway = [2, 0, 0, 0, 55, 1];
    scene.lab.node().ip_batch(&format!(
        "link add uplink2 type veth peer name far2\nlink set uplink2 up\nlink set uplink2 master br0\n\
         addr add 10.55.0.2/24 dev br0\n\
         neigh add 10.55.0.1 lladdr {} dev br0\n\
         route add 10.56.0.0/16 via 10.55.0.1\n",
        formatted(gateway)
    ));
    let bridge = [2, 0, 0, 0, 0x77, 1];
    let node = scene.cart.gateway_hardware();
    set_hardware(&scene.cart, bridge);
    let agent = scene.start();
    let problem = |whose: &str| {
        eventually(whose, || {
            let status = scene.lab.status_of(&scene.cart);
            let problem = status["problem"].as_str().unwrap_or_default();
            problem.contains(whose).then_some(())
        });
    };
    let silent = |hardware| {
        let mark = agent.mark();
        scene
            .tap
            .send(&from(scene.datagram(b"in that name"), hardware));
        agent.wait_denial_from(mark, SPOOFED, |denial| {
            denial.of(&scene.cart) && denial.reason == SPOOFED
        });
        let seen = |seen: &[u8]| seen.ends_with(b"in that name");
        assert!(scene.neighbour.receive(SHORT, seen).is_none());
    };
    problem("that of the node's interface br0");
    silent(bridge);
    set_hardware(&scene.cart, node);
    problem("that of the node's interface");
    silent(node);
    set_hardware(&scene.cart, gateway);
    problem("that of a gateway");
    silent(gateway);
    // A unique address is bound.
    set_hardware(&scene.cart, FREE);
    eventually("the pod is bound to its address", || {
        (scene.lab.status_of(&scene.cart)["problem"].is_null()).then_some(())
    });
    let frame = from(scene.datagram(b"mine"), FREE);
    scene.tap.send(&frame);
    assert!(
        scene
            .neighbour
            .receive(DEADLINE, |seen| seen == &frame[..])
            .is_some()
    );
    // No other pod on the bridge gets the same address.
    set_hardware(&scene.mail, FREE);
    scene.lab.write_pod(&scene.mail, &[("allow", "")]);
    agent.wait_enforcing(&scene.mail);
    let of_mail = eventually("a problem", || {
        let status = scene.lab.status_of(&scene.mail);
        status["problem"].as_str().map(str::to_owned)
    });
    let whose = format!(
        "that of the pod behind interface {}",
        scene.cart.interface()
    );
    assert!(of_mail.contains(&whose), "{of_mail}");
}

#[test]
fn a_routed_interface_may_send_from_any_hardware_address() {
    let lab = Lab::new();
    let (_web, pod) = lab.shop_and_cart("203.0.113.10:443");
    let _agent = lab.start_agent(&[&pod]);
    pod.talks_tcp((server(10), 443));
    // As a bridge or a virtual machine in the pod does.
    set_hardware(&pod, FREE);
    pod.talks_tcp((server(10), 443));
}

#[test]
fn an_interface_that_becomes_a_bridge_port_is_bound_from_then_on() {
    let scene = Scene::new();
    let port = scene.cart.interface();
    scene
        .lab
        .node()
        .ip_batch(&format!("link set {port} nomaster\n"));
    let agent = scene.start();
    scene
        .lab
        .node()
        .ip_batch(&format!("link set {port} master br0\n"));
    // Repeated denials are folded, so the line may come later than the frame for which it is.
    let mark = agent.mark();
    eventually("the port is bound", || {
        scene.tap.send(&from(scene.datagram(b"as nobody"), FREE));
        std::thread::sleep(std::time::Duration::from_millis(20));
        let denials = agent.denials();
        let mut later = denials[mark.min(denials.len())..].iter();
        later.any(|denial| denial.reason == SPOOFED).then_some(())
    });
    scene.assert_dropped(
        &agent,
        &from(scene.datagram(b"as the neighbour"), scene.mail.hardware()),
    );
}

#[test]
fn a_network_plugin_may_change_the_hardware_address_during_setup() {
    let cluster = Cluster::on(ApiServer::shared(), Lab::builder());
    let lab = &cluster.lab;
    let shop = cluster.namespace("shop", &Value::Null);
    let listed = allow("");
    let agent = cluster.start_agent();
    let (object, uid) = cluster.create(&shop, "cart", &listed);
    let net = lab.pod(&shop, "cart");
    let mut cart = cluster.pod_without_processes(object, &uid, net);
    let port = cart.net().interface().to_owned();
    lab.node().ip_batch(&format!(
        "link add br0 type bridge\nlink set br0 up\nlink set {port} master br0\n"
    ));
    let wait_bound = |hardware: [u8; 6]| {
        eventually("the port is bound to its address", || {
            let expected = json!(hardware);
            let entries = lab.shared_entries("link_hardware");
            let is_it = |entry: &Value| entry["value"]["addr"] == expected;
            holds(entries.iter().any(is_it))
        });
    };
    wait_bound(cart.net().hardware());
    set_hardware(cart.net(), FREE);
    wait_bound(FREE);
    cart.running().start_container();
    agent.wait_enforcing(cart.net());
    wait_bound(FREE);
    // From here on it is the pod that changes its address.
    let other = [2, 0, 0, 0, 99, 98];
    set_hardware(cart.net(), other);
    let mark = agent.mark();
    let own = cart.net().ipv4().into();
    let frame = frames::udp(cart.net(), (own, 1), (server(1), 1), b"changed");
    Tap::open(cart.net().netns(), "eth0").send(&from(frame, other));
    agent.wait_denial_from(mark, SPOOFED, |denial| {
        denial.pod == "cart" && denial.reason == SPOOFED
    });
    wait_bound(FREE);
}

#[test]
fn a_frame_that_skips_the_programs_cannot_draw_a_neighbours_traffic() {
    let scene = Scene::new();
    scene.lab.write_pod(&scene.mail, &[("allow", "")]);
    let agent = scene.lab.start_agent(&[&scene.cart, &scene.mail]);
    scene.neighbour.send(&{
        let mut frame = raw::ethernet(0x0806, &[]);
        frame[6..12].copy_from_slice(&scene.mail.hardware());
        frame
    });
    let ifb = Ifb::redirect(&scene.cart);
    // Link-local destinations, which a bridge handles itself: spanning tree and others.
    for last in 0..=0x0f {
        let mut frame = raw::ethernet(0x88cc, b"from the neighbour, it says");
        frame[..6].copy_from_slice(&[1, 0x80, 0xc2, 0, 0, last]);
        frame[6..12].copy_from_slice(&scene.mail.hardware());
        scene.tap.send(&frame);
        let learned = scene.learned(scene.mail.hardware());
        assert_ne!(
            learned.as_deref(),
            Some(scene.cart.interface()),
            "by 01:80:c2:00:00:{last:02x}"
        );
    }
    drop(ifb);
    drop(agent);
}

#[test]
fn in_audit_mode_a_foreign_hardware_address_passes_and_is_reported() {
    let scene = Scene::new();
    let mode = &[("allow", ""), ("mode", "audit")];
    scene.lab.write_pod(&scene.cart, mode);
    let agent = scene.start();
    let frame = from(scene.datagram(b"as nobody"), FREE);
    scene.tap.send(&frame);
    let arrived = scene.neighbour.receive(DEADLINE, |seen| seen == frame);
    assert!(arrived.is_some(), "audit mode stops nothing");
    let denial = agent.wait_denial(SPOOFED, |denial| {
        denial.of(&scene.cart) && denial.reason == SPOOFED
    });
    assert_eq!(
        (denial.event.as_str(), denial.verdict.as_str()),
        ("would_deny", "audited")
    );
    agent.applies_policy_after(&scene.cart, || {
        scene.lab.write_pod(&scene.cart, &[("allow", "")]);
    });
    scene.assert_dropped(&agent, &from(scene.datagram(b"as nobody again"), FREE));
}

#[test]
fn an_address_that_turns_out_to_be_a_gateways_is_refused() {
    let scene = Scene::new();
    let agent = scene.start();
    let own = scene.datagram(b"before");
    scene.tap.send(&own);
    let arrived = scene.neighbour.receive(DEADLINE, |seen| seen == own);
    assert!(arrived.is_some(), "it is the pod's own");
    // A router on the link whose hardware address the node comes to know only now.
    scene.lab.node().ip_batch(&format!(
        "addr add 10.55.0.2/24 dev br0\n\
         route add 10.56.0.0/16 via 10.55.0.1\n\
         neigh replace 10.55.0.1 lladdr {} dev br0 nud reachable\n",
        formatted(scene.cart.hardware())
    ));
    eventually("the pod has a problem", || {
        let status = scene.lab.status_of(&scene.cart);
        let problem = status["problem"].as_str().unwrap_or_default();
        problem.contains("that of a gateway").then_some(())
    });
    let mark = agent.mark();
    scene.tap.send(&scene.datagram(b"as the gateway"));
    agent.wait_denial_from(mark, SPOOFED, |denial| {
        denial.of(&scene.cart) && denial.reason == SPOOFED
    });
    let seen = |seen: &[u8]| seen.ends_with(b"as the gateway");
    assert!(scene.neighbour.receive(SHORT, seen).is_none());
}

#[test]
fn a_pod_that_sends_spanning_tree_messages_past_the_programs_is_switched_off() {
    let scene = Scene::new();
    scene
        .lab
        .node()
        .ip_batch("link set br0 type bridge stp_state 1 forward_delay 200\n");
    let agent = scene.start();
    let show = |what: &str, path: &[&str]| {
        let mut command = std::process::Command::new("ip");
        command.args([
            "-n",
            scene.lab.node().name(),
            "-d",
            "-j",
            "link",
            "show",
            what,
        ]);
        let output = command.output().expect("ip, of the package iproute2");
        let links: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let found = path.iter().fold(&links[0], |at, key| &at[*key]);
        found.as_str().unwrap_or_default().to_owned()
    };
    let root = || show("br0", &["linkinfo", "info_data", "root_id"]);
    let state = || {
        let port = scene.cart.interface();
        show(port, &["linkinfo", "info_slave_data", "state"])
    };
    let bridge = show("br0", &["linkinfo", "info_data", "bridge_id"]);
    eventually("the bridge is its own root", || holds(root() == bridge));
    eventually("the port forwards", || holds(state() == "forwarding"));
    // A bridge that is before all others, and wants to be the root (IEEE 802.1D, section 9.3.1).
    let own = scene.cart.hardware();
    let claims = [&[0; 2][..], &own].concat();
    let message = [
        &[0x42, 0x42, 3, 0, 0, 0, 0, 0][..],
        &claims,
        &[0; 4],
        &claims,
        &[0x80, 1, 0, 0, 20, 0, 2, 0, 15, 0],
    ]
    .concat();
    let mut frame = raw::ethernet(message.len() as u16, &message);
    frame[..6].copy_from_slice(&[1, 0x80, 0xc2, 0, 0, 0]);
    frame[6..12].copy_from_slice(&own);
    // By the programs it does not get to the bridge.
    scene.tap.send(&frame);
    agent.wait_denial("the message", |denial| {
        denial.of(&scene.cart) && denial.reason == "malformed"
    });
    assert_eq!((root(), state()), (bridge.clone(), "forwarding".to_owned()));
    // Past them it does, and ends what the pod has on the bridge.
    let ifb = Ifb::redirect(&scene.cart);
    scene.tap.send(&frame);
    eventually("the port is switched off", || holds(state() == "disabled"));
    assert_eq!(root(), bridge);
    drop(ifb);
}
