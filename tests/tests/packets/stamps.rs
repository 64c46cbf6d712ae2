//! Frames that skip the agent's programs on an interface do not leave, and this is reported.

use std::{net::Ipv4Addr, process::Command};

use egress_tests::{
    Agent, DEADLINE, Lab, Pod, SHORT, TcpEcho, UdpEcho,
    addresses::{server, server6},
    eventually, exchange,
    frames::Tap,
    holds,
    ifb::Ifb,
    observed::HTTP,
    raw::{self, Ip},
    rewritten::{finish, nft},
};

const REASON: &str = "not_judged";

struct Scene {
    agent: Agent,
    tcp: TcpEcho,
    udp: UdpEcho,
    pod: Pod,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn start(arguments: &[&str], annotations: &[(&str, &str)]) -> Self {
        let lab = Lab::builder().config("http", HTTP).build();
        lab.dns().addresses("shop.test", &[server(10)]);
        let (tcp, udp) = (lab.serve_tcp(443), lab.serve_udp(4000));
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, annotations);
        let agent = lab.start_agent_with(arguments, &[&pod]);
        Self {
            agent,
            tcp,
            udp,
            pod,
            lab,
        }
    }

    /// Asserts that the pod reaches its allowed name, and nothing else.
    #[track_caller]
    fn assert_enforced(&self) {
        self.pod.lookup("shop.test");
        self.pod.talks_tcp((server(10), 443));
        assert!(self.pod.connect_tcp((server(99), 443), SHORT).is_err());
    }

    /// Asserts that nothing arrives outside that the pod sends through its ifb device.
    #[track_caller]
    fn assert_nothing_leaves(&self) {
        for to in [server(99), server6(99)] {
            let connected = self.pod.connect_tcp((to, 443), SHORT);
            assert!(connected.is_err(), "connected to {to}");
            assert_eq!(self.tcp.connections_to((to, 443).into()), 0, "to {to}");
            assert!(!self.pod.echo_udp((to, 4000), b"secret", SHORT), "{to}");
            assert_eq!(self.udp.datagrams_to((to, 4000).into()), 0, "to {to}");
        }
    }

    /// The list of the node's nf_tables tables.
    fn tables(&self) -> String {
        self.nft_list(&["tables"])
    }

    /// One of the agent's tables, in nft's syntax.
    fn listed(&self, family: &str) -> String {
        self.nft_list(&["table", family, "egress-agent"])
    }

    /// The same without counters.
    fn table(&self, family: &str) -> String {
        without_counters(&self.listed(family))
    }

    fn nft_list(&self, what: &[&str]) -> String {
        let mut command = Command::new("nft");
        command.arg("list").args(what);
        let output = self.lab.node().run(|| command.output());
        let output = output.expect("nft, of the package nftables");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// The listing of a table without the counters of its sets' elements.
fn without_counters(list: &str) -> String {
    let lines = list.lines().map(|line| {
        let words: Vec<_> = line.split(' ').collect();
        let mut kept = Vec::new();
        let mut numbers = false;
        for word in words {
            if !(numbers && word.starts_with(|first: char| first.is_ascii_digit())) {
                kept.push(word);
            }
            numbers = matches!(word, "packets" | "bytes");
        }
        kept.join(" ")
    });
    lines.collect::<Vec<_>>().join("\n")
}

const ALLOW: &[(&str, &str)] = &[("allow", "shop.test:443")];

#[test]
fn frames_resent_by_an_ifb_device_do_not_leave_and_are_reported() {
    for attach in ["tcx", "clsact"] {
        let scene = Scene::start(&["--attach", attach], ALLOW);
        scene.assert_enforced();
        let ifb = Ifb::redirect(&scene.pod);
        scene.assert_nothing_leaves();
        let denial = scene
            .agent
            .wait_denial("frames that nobody judged", |denial| {
                denial.of(&scene.pod) && denial.reason == REASON
            });
        assert_eq!(denial.event, "denied");
        assert_eq!(denial.dst_ip, None, "the packet was not parsed");
        let series = format!(
            "egress_agent_denials_total{{event=\"denied\",namespace=\"shop\",reason=\"{REASON}\"}}"
        );
        eventually("it is counted", || {
            holds(scene.lab.metrics().find(&series) >= 1.0)
        });
        drop(ifb);
        scene.assert_enforced();
    }
}

#[test]
fn in_audit_mode_unjudged_frames_pass_and_are_reported() {
    let mode = [ALLOW, &[("mode", "audit")]].concat();
    let scene = Scene::start(&[], &mode);
    let ifb = Ifb::redirect(&scene.pod);
    scene.pod.talks_tcp((server(99), 443));
    let denial = scene
        .agent
        .wait_denial("frames that nobody judged", |denial| {
            denial.of(&scene.pod) && denial.reason == REASON
        });
    assert_eq!(denial.event, "would_deny");
    // In enforce mode the frames are dropped.
    scene
        .agent
        .applies_policy_after(&scene.pod, || scene.lab.write_pod(&scene.pod, ALLOW));
    assert!(scene.pod.connect_tcp((server(98), 443), SHORT).is_err());
    drop(ifb);
    scene.assert_enforced();
    scene
        .agent
        .applies_policy_after(&scene.pod, || scene.lab.write_pod(&scene.pod, &mode));
    let _ifb = Ifb::redirect(&scene.pod);
    scene.pod.talks_tcp((server(97), 443));
}

#[test]
fn unjudged_frames_of_a_released_pod_pass() {
    let scene = Scene::start(&[], ALLOW);
    scene.assert_enforced();
    scene.lab.remove_pod(&scene.pod);
    let _ifb = Ifb::redirect(&scene.pod);
    eventually("the pod is not enforced any more", || {
        holds(scene.pod.connect_tcp((server(99), 443), SHORT).is_ok())
    });
}

#[test]
fn unjudged_frames_stay_dropped_without_an_agent_and_under_the_next_one() {
    let mut scene = Scene::start(&[], ALLOW);
    scene.assert_enforced();
    let mut open = scene.pod.talks_tcp((server(10), 443));
    scene.agent.kill();
    {
        let _ifb = Ifb::redirect(&scene.pod);
        scene.assert_nothing_leaves();
    }
    assert!(exchange(&mut open, b"no agent", DEADLINE));
    let before = scene.tables();
    scene.agent = scene.lab.start_agent(&[&scene.pod]);
    assert!(exchange(&mut open, b"another agent", DEADLINE));
    assert_eq!(scene.tables(), before);
    scene.assert_enforced();
    let _ifb = Ifb::redirect(&scene.pod);
    scene.assert_nothing_leaves();
    scene
        .agent
        .wait_denial("frames that nobody judged", |denial| {
            denial.of(&scene.pod) && denial.reason == REASON
        });
}

#[test]
fn a_takeover_drops_no_packet_of_a_connection() {
    let mut scene = Scene::start(&[], ALLOW);
    scene.assert_enforced();
    for _ in 0..3 {
        // A packet that is dropped for lack of a stamp is retransmitted.
        let before = retransmissions(&scene.pod);
        let mut open = scene.pod.talks_tcp((server(10), 443));
        scene.agent.kill();
        let pod = &scene.pod;
        let next = std::thread::scope(|scope| {
            let starting = scope.spawn(|| scene.lab.start_agent(&[pod]));
            while !starting.is_finished() {
                assert!(exchange(&mut open, b"on", DEADLINE));
            }
            starting.join().expect("the next agent starts")
        });
        assert_eq!(retransmissions(&scene.pod), before);
        assert!(!next.denials().iter().any(|denial| denial.reason == REASON));
        scene.agent = next;
    }
}

#[test]
fn removed_tables_are_restored_and_reported() {
    let scene = Scene::start(&[], ALLOW);
    scene.assert_enforced();
    let before = scene.tables();
    for command in [
        "flush ruleset\n",
        "flush table inet egress-agent\n",
        "delete element inet egress-agent enforced { \"veth1\" }\n",
        "insert rule bridge egress-agent received accept\n",
    ] {
        let restored = || {
            scene
                .lab
                .metrics()
                .find("egress_agent_stamp_tables_restored_total")
        };
        let count = restored();
        nft(scene.lab.node(), command);
        eventually("the table is restored", || holds(restored() > count));
        assert_eq!(sorted(&scene.tables()), sorted(&before), "{command}");
        let ifb = Ifb::redirect(&scene.pod);
        scene.assert_nothing_leaves();
        drop(ifb);
        scene.assert_enforced();
    }
    scene.agent.wait_log("that tables were put back", |line| {
        line.contains("WARN") && line.contains("tables of nf_tables")
    });
}

/// Changes of the agent's tables that remove none of them: the family of the table, a text of its listing,
/// and the text that replaces it.
const REPLACED: &[(&str, &str, &str)] = &[
    // These would drop everything.
    ("inet", "policy accept", "policy drop"),
    ("arp", "policy accept", "policy drop"),
    // These would drop nothing, or only a part.
    ("inet", "hook prerouting", "hook input"),
    ("bridge", "hook prerouting", "hook input"),
    ("arp", "hook input", "hook output"),
    // A nat chain sees only the first packet of a connection.
    (
        "inet",
        "type filter hook prerouting priority -2147483648",
        "type nat hook prerouting priority -150",
    ),
    ("inet", "priority -2147483648", "priority -150"),
    ("inet", "iif @enforced drop", "iif @enforced accept"),
    ("inet", "iif @enforced", "iif != @enforced"),
    ("bridge", "iif @enforced drop", "iif @audited drop"),
    ("bridge", "iif @enforced drop", "iif @enforced return"),
    ("arp", "priority set none", "priority set 1:1"),
    (
        "inet",
        "iif @enforced drop",
        "iif @enforced limit rate 1/day drop",
    ),
    // Elements would expire.
    ("inet", "\t\tcounter\n", "\t\tflags timeout\n\t\tcounter\n"),
];

#[test]
fn dormant_or_replaced_tables_are_restored_and_reported() {
    let scene = Scene::start(&[], ALLOW);
    scene.assert_enforced();
    let before = ["inet", "bridge", "arp"].map(|family| (family, scene.table(family)));
    let restored = || {
        scene
            .lab
            .metrics()
            .find("egress_agent_stamp_tables_restored_total")
    };
    let assert_restored = |command: &str| {
        let count = restored();
        nft(scene.lab.node(), command);
        eventually("the table is restored", || holds(restored() > count));
        for (family, before) in &before {
            assert_eq!(scene.table(family), *before, "{command}");
        }
        let ifb = Ifb::redirect(&scene.pod);
        scene.assert_nothing_leaves();
        drop(ifb);
        scene.assert_enforced();
    };
    for (family, _) in &before {
        assert_restored(&format!(
            "add table {family} egress-agent {{ flags dormant; }}\n"
        ));
    }
    // Changes the policy without removing anything.
    assert_restored("add chain inet egress-agent received { policy drop; }\n");
    for (family, was, becomes) in REPLACED {
        let listed = scene.listed(family);
        assert!(listed.contains(was), "{was} in {listed}");
        let table = listed.replace(was, becomes);
        assert_restored(&format!("delete table {family} egress-agent\n{table}"));
    }
    scene.agent.wait_log("that tables were put back", |line| {
        line.contains("WARN") && line.contains("tables of nf_tables")
    });
}

#[test]
fn unchanged_tables_are_not_restored() {
    let scene = Scene::start(&[], ALLOW);
    // Other tables, and chains next to the agent's own, are no change.
    nft(
        scene.lab.node(),
        "add table inet other\nadd chain inet egress-agent beside\n",
    );
    let ifb = Ifb::redirect(&scene.pod);
    scene.assert_nothing_leaves();
    drop(ifb);
    scene
        .agent
        .wait_denial("frames that nobody judged", |denial| {
            denial.of(&scene.pod) && denial.reason == REASON
        });
    let restored = scene
        .lab
        .metrics()
        .find("egress_agent_stamp_tables_restored_total");
    assert!((restored - 0.0).abs() < f64::EPSILON, "{restored}");
}

#[test]
fn no_table_is_left_after_stop_or_cleanup() {
    let mut scene = Scene::start(&[], ALLOW);
    assert_eq!(scene.tables().matches("egress-agent").count(), 3);
    scene.agent.stop();
    assert_eq!(scene.tables(), "", "after SIGTERM");
    scene.agent = scene.lab.start_agent(&[&scene.pod]);
    assert_eq!(scene.tables().matches("egress-agent").count(), 3);
    scene.agent.kill();
    scene.lab.cleanup();
    assert_eq!(scene.tables(), "", "after `egress-agent cleanup`");
    scene.pod.talks_tcp((server(99), 443));
}

#[test]
fn frames_passed_by_a_filter_in_front_of_ours_do_not_leave() {
    let lab = Lab::builder().config("http", HTTP).build();
    let (web, pod) = lab.shop_and_cart("shop.test:443");
    let interface = pod.interface();
    lab.tc(&format!("qdisc add dev {interface} clsact"));
    // Filters of one priority are of one kind, so no other filter can be put in front of this one.
    lab.tc(&format!(
        "filter add dev {interface} ingress prio 1 protocol ip u32 match u32 0 0 flowid 1:1"
    ));
    let agent = lab.start_agent_with(&["--attach", "clsact"], &[&pod]);
    assert!(pod.connect_tcp((server(99), 443), SHORT).is_err());
    assert_eq!(web.connections_to((server(99), 443).into()), 0);
    agent.wait_denial("frames that nobody judged", |denial| {
        denial.of(&pod) && denial.reason == REASON
    });
}

/// Two pods on one bridge; the first is enforced.
fn on_a_bridge() -> (Lab, Pod, Pod, Agent) {
    let lab = Lab::new();
    let [cart, mail] = lab.two_pods_on_a_bridge();
    lab.write_pod(&cart, ALLOW);
    let agent = lab.start_agent(&[&cart]);
    (lab, cart, mail, agent)
}

#[test]
fn frames_resent_by_an_ifb_device_do_not_reach_a_neighbour_on_a_bridge() {
    let (lab, cart, mail, agent) = on_a_bridge();
    let (tap, neighbour) = (
        Tap::open(cart.netns(), "eth0"),
        Tap::open(mail.netns(), "eth0"),
    );
    let forged = raw::arp(mail.ipv4(), mail.ipv4());
    let mut honest = raw::arp(cart.ipv4(), mail.ipv4());
    // A bridge port may send only from its own address, in the frame and in the ARP message.
    for sender in [6, 22] {
        honest[sender..sender + 6].copy_from_slice(&cart.hardware());
    }
    let to_mail = |mut frame: Vec<u8>| {
        frame[..6].copy_from_slice(&mail.hardware());
        frame
    };
    let v4 = |from, payload: &[u8]| {
        let mut frame = Ip::new(from, mail.ipv4()).udp(5000, 5000, payload);
        finish(&cart, &mut frame);
        to_mail(frame)
    };
    let mut v6 = Ip::new(cart.ipv6(), mail.ipv6()).udp(5000, 5000, b"six");
    finish(&cart, &mut v6);
    let frames = [
        to_mail(forged),
        v4(mail.ipv4(), b"forged"),
        v4(cart.ipv4(), b"four"),
        to_mail(v6),
        to_mail(raw::ethernet(0x88b5, b"an EtherType for experiments")),
    ];
    let ifb = Ifb::redirect(&cart);
    for frame in &frames {
        tap.send(frame);
    }
    drop(ifb);
    let honest = to_mail(honest);
    tap.send(&honest);
    let first = neighbour
        .receive(DEADLINE, |seen| {
            seen == honest || frames.iter().any(|frame| seen == frame)
        })
        .expect("the honest one arrives");
    assert_eq!(first, honest);
    agent.wait_denial("frames that nobody judged", |denial| {
        denial.of(&cart) && denial.reason == REASON
    });
    drop(lab);
}

#[test]
fn the_node_learns_nothing_from_arp_resent_by_an_ifb_device() {
    let scene = Scene::start(&[], ALLOW);
    let claimed = "10.77.0.5";
    let interface = scene.pod.interface();
    let node = scene.lab.node();
    node.ip_batch(&format!("route add 10.77.0.0/24 dev {interface}\n"));
    let neighbours = || {
        let mut command = Command::new("ip");
        command.args(["-n", scene.lab.node().name(), "neigh", "show", claimed]);
        let output = command.output().expect("ip, of the package iproute2");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let gateway = Ipv4Addr::new(10, 1, 1, 1);
    let tap = Tap::open(scene.pod.netns(), "eth0");
    let ifb = Ifb::redirect(&scene.pod);
    let mut request = raw::arp(claimed.parse().expect("an address"), gateway);
    request[..6].copy_from_slice(&scene.pod.gateway_hardware());
    tap.send(&request);
    drop(ifb);
    scene.assert_enforced();
    assert_eq!(neighbours(), "");
    scene
        .agent
        .wait_denial("frames that nobody judged", |denial| {
            denial.of(&scene.pod) && denial.reason == REASON
        });
}

fn sorted(lines: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = lines.lines().collect();
    lines.sort_unstable();
    lines
}

/// The number of segments that the pod's kernel has retransmitted.
fn retransmissions(pod: &Pod) -> u64 {
    pod.netns().counter("TcpExt:", "TCPLostRetransmit")
        + pod.netns().counter("TcpExt:", "TCPTimeouts")
        + pod.netns().counter("TcpExt:", "TCPLossProbes")
}
