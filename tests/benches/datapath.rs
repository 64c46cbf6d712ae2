//! The cost of a packet in the programs: the kernel runs the program repeatedly on one frame
//! (`BPF_PROG_TEST_RUN`).
#![allow(
    clippy::allow_attributes,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "the measured values are far below those at which a float loses whole units"
)]

mod common;

use std::net::IpAddr;

use common::{Spread, print_table};
use egress_agent::datapath::{Action, Attach, Datapath, Hook, Options};
use egress_common::ids::IfIndex;
use egress_tests::{Lab, Pod, addresses::server};
use etherparse::PacketBuilder;

const ROUNDS: usize = 30;
const REPEAT: u32 = 100_000;
/// The ports of the entries of the pod with many classes.
const PORTS: std::ops::Range<u16> = 400..460;

struct Case {
    what: &'static str,
    hook: Hook,
    ifindex: IfIndex,
    mark: u32,
    frame: Vec<u8>,
    action: Action,
    taken: Vec<f64>,
}

/// The pod's port of an established connection.
const CONNECTED: u16 = 40_000;
/// The pod's port of a connection that is not established.
const OPENING: u16 = 40_001;

/// A TCP packet of the pod.
fn tcp(pod: &Pod, to: IpAddr, port: u16, opens: bool) -> Vec<u8> {
    let IpAddr::V4(to) = to else {
        panic!("{to} is not an IPv4 address")
    };
    let step = PacketBuilder::ethernet2(pod.hardware(), pod.gateway_hardware())
        .ipv4(pod.ipv4().octets(), to.octets(), 64)
        .tcp(port, 443, 1, 65_000);
    let step = if opens { step.syn() } else { step.ack(1) };
    let mut frame = Vec::new();
    step.write(&mut frame, &[0; 64]).expect("a frame in memory");
    frame
}

/// A TCP packet of the server: its SYN-ACK, or a later one.
fn answer(pod: &Pod, server: IpAddr, port: u16, accepts: bool) -> Vec<u8> {
    let IpAddr::V4(server) = server else {
        panic!("{server} is not an IPv4 address")
    };
    let step = PacketBuilder::ethernet2(pod.gateway_hardware(), pod.hardware())
        .ipv4(server.octets(), pod.ipv4().octets(), 64)
        .tcp(443, port, 1, 65_000)
        .ack(2);
    let step = if accepts { step.syn() } else { step };
    let mut frame = Vec::new();
    step.write(&mut frame, &[]).expect("a frame in memory");
    frame
}

fn main() {
    let lab = Lab::new();
    let pod = lab.pod("b", "pod");
    lab.dns().addresses("shop.test", &[server(10)]);
    lab.write_pod(&pod, &[("allow", "shop.test:443 198.51.100.0/24:443")]);
    let wide = lab.pod("b", "wide");
    let entries: Vec<String> = PORTS
        .map(|port| format!("198.51.100.0/24:{port}"))
        .collect();
    lab.write_pod(&wide, &[("allow", &entries.join(" "))]);
    let _agent = lab.start_agent(&[&pod, &wide]);
    pod.lookup("shop.test");

    lab.node().run(|| {
        // The agent's maps, with programs of this process that are not attached.
        let mut datapath = Datapath::open(&Options {
            bpffs: lab.bpffs(),
            allow_entries: egress_common::limits::ALLOW_ENTRIES,
            flows: egress_common::limits::FlowLimits::of(egress_common::limits::FLOW_ENTRIES),
            udp_idle: std::time::Duration::from_nanos(egress_common::flow::UDP_NS),
            attach: Attach::Auto,
            trace: false,
            learns: true,
        })
        .expect("the agent's maps");
        let ifindex = |pod: &Pod| {
            let index = nix::net::if_::if_nametoindex(pod.interface());
            IfIndex::new(index.expect("the pod's interface is there"))
        };
        let (of_pod, of_wide) = (ifindex(&pod), ifindex(&wide));
        let case = |what, frame, action| Case {
            what,
            hook: Hook::FromPod,
            ifindex: of_pod,
            mark: 0,
            frame,
            action,
            taken: Vec::new(),
        };
        let known = tcp(&pod, server(10), CONNECTED, false);
        let opens = tcp(&pod, server(10), OPENING, true);
        let opens_wide = tcp(&wide, IpAddr::from([198, 51, 100, 7]), OPENING, true);
        let denied_wide = tcp(&wide, server(66), OPENING, true);
        // The server has answered on the first connection, but not on the second.
        for (hook, frame) in [
            (Hook::FromPod, tcp(&pod, server(10), CONNECTED, true)),
            (Hook::ToPod, answer(&pod, server(10), CONNECTED, true)),
            (Hook::FromPod, known.clone()),
        ] {
            let run = datapath
                .dry_run(hook, of_pod, 0, &frame, 1)
                .expect("the kernel runs the program");
            assert_eq!(run.action, Action::Pass);
        }
        let mut cases = [
            case("established flow", known.clone(), Action::Pass),
            Case {
                hook: Hook::ToPod,
                ..case(
                    "established flow, to the pod",
                    answer(&pod, server(10), CONNECTED, false),
                    Action::Pass,
                )
            },
            case("opening flow", opens, Action::Pass),
            case("denied", tcp(&pod, server(66), OPENING, true), Action::Drop),
            Case {
                ifindex: of_wide,
                ..case("opening flow, 60 classes", opens_wide, Action::Pass)
            },
            Case {
                ifindex: of_wide,
                ..case("denied, 60 classes", denied_wide, Action::Drop)
            },
            Case {
                what: "mark looked at, redirected (floor)",
                hook: Hook::ToPod,
                mark: datapath.marks().bounce,
                ..case("", known.clone(), Action::Redirect)
            },
        ];
        for _ in 0..ROUNDS {
            for case in &mut cases {
                let run = datapath
                    .dry_run(case.hook, case.ifindex, case.mark, &case.frame, REPEAT)
                    .expect("the kernel runs the program");
                assert_eq!(run.action, case.action, "{}", case.what);
                case.taken.push(run.duration.as_nanos() as f64);
            }
        }
        println!("{ROUNDS} rounds of {REPEAT} runs.\n");
        let mut rows = vec![row!["packet", "median", "middle half"]];
        for case in &cases {
            let taken = Spread::of(case.taken.iter().copied());
            rows.push(row![
                case.what,
                taken.number("ns", 0),
                format!("{:.0} to {:.0}", taken.low, taken.high)
            ]);
        }
        print_table(&rows);
    });
}
