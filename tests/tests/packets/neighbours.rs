//! A pod that abuses its own network, and the pod next to it, which must not notice.

use std::{
    fs,
    io::{IoSliceMut, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    process::Command,
    thread,
};

use egress_tests::{
    Lab, Namespace, Pod,
    addresses::{RESOLVER, server},
    dns::{DnsStream, RecordType, ResponseCode, framed, framed_query, question, read_message},
    eventually, holds,
    observed::HTTP,
};
use nix::{
    cmsg_space,
    sys::{
        signal::{Signal, kill},
        socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt},
        time::TimeSpec,
    },
    unistd::Pid,
};
use serde_json::Value;

#[track_caller]
fn run_in(namespace: &Namespace, program: &str, arguments: &[&str]) {
    let mut command = Command::new(program);
    let output = namespace.run(|| command.args(arguments).output());
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
}

/// Redirects everything that reaches the pod to a queue that sends nothing: an ingress hook forwards it to
/// another device.
#[track_caller]
fn block_delivery(pod: &Pod) {
    let netns = pod.netns();
    netns.ip_batch(
        "link add slow type veth peer name end\n\
         link set slow up\n\
         link set end up\n",
    );
    let queue = "qdisc replace dev slow root tbf rate 8bit burst 1600 limit 100000000";
    run_in(netns, "tc", &queue.split(' ').collect::<Vec<_>>());
    let ruleset = "add table netdev lab; \
        add chain netdev lab in { type filter hook ingress device \"eth0\" priority 0; }; \
        add rule netdev lab in ip protocol udp fwd to \"slow\"";
    run_in(netns, "nft", &[ruleset]);
}

#[test]
fn a_pod_that_blocks_delivery_does_not_stop_its_neighbours_dns() {
    // More than the send buffer of any socket holds.
    const QUESTIONS: u16 = 4000;
    let lab = Lab::builder().config("http", HTTP).build();
    let _web = lab.serve_tcp(443);
    let [greedy, neighbour] = lab.pods_of_shop(["greedy", "neighbour"]);
    let agent = lab.start_agent(&[&greedy, &neighbour]);
    assert_eq!(greedy.lookup("shop.test"), [server(10)]);
    block_delivery(&greedy);
    let socket = greedy.dns_socket();
    let ask = |from: u16| {
        for id in from..from + QUESTIONS {
            // These queries are refused, so the agent itself responds.
            socket.ask(RESOLVER, id, "evil.test", RecordType::A);
        }
    };
    ask(0);
    assert_eq!(neighbour.lookup("shop.test"), [server(10)]);
    neighbour.talks_tcp((server(10), 443));
    let refused = neighbour.resolve("evil.test", RecordType::A);
    assert_eq!(refused.code, ResponseCode::NXDomain);
    eventually("frames are lost", || {
        holds(lab.metrics().get("egress_agent_frames_unsent_total") > 0.0)
    });
    agent.wait_log("whose frames are lost", |line| {
        line.contains("could not be put back") && line.contains("pod=shop/greedy")
    });

    // However long it lasts, the agent logs one line every few seconds, and none about the neighbour.
    ask(QUESTIONS);
    assert_eq!(neighbour.lookup("shop.test"), [server(10)]);
    let text = agent.stderr();
    let lines = text.matches("could not be put back").count();
    assert!(lines < 4, "{lines} lines:\n{text}");
    assert!(!text.contains("back and are lost pod=shop/neighbour"));
}

#[test]
fn the_agents_sockets_close_with_their_pods() {
    // One socket for the probes of all interfaces.
    const PROBES: usize = 1;
    let lab = Lab::new();
    let pods = lab.pods_of_shop(["greedy", "neighbour"]);
    let mut agent = lab.start_agent(&[&pods[0], &pods[1]]);
    let sockets = || {
        let table = lab
            .node()
            .run(|| fs::read_to_string("/proc/thread-self/net/packet"));
        table.expect("a table").lines().skip(1).count()
    };
    for pod in &pods {
        assert_eq!(pod.lookup("shop.test"), [server(10)]);
    }
    eventually("each pod has one socket", || {
        holds(sockets() == pods.len() + PROBES)
    });
    lab.remove_pod(&pods[0]);
    eventually("one pod's socket is left", || {
        holds(sockets() == 1 + PROBES)
    });
    assert_eq!(pods[1].lookup("shop.test"), [server(10)]);
    assert!(agent.stop().success());
    assert_eq!(sockets(), 0);
}

/// The number of addresses in a costly response: as many as a message holds.
const ADDRESSES: u32 = 4000;

/// The most expensive response to a query: `question` with the flags of a response, and 16 bytes for each
/// address, whose owner is a pointer to the queried name. Responses with different numbers have different
/// addresses.
fn costly_response(question: &[u8], number: u16) -> Vec<u8> {
    const HEADER: usize = 12;
    const OPT: usize = 11;
    let mut message = question[..question.len() - OPT].to_vec();
    message[2..4].copy_from_slice(&[0x85, 0x80]);
    message[6..8].copy_from_slice(&(ADDRESSES as u16).to_be_bytes());
    message[10..HEADER].copy_from_slice(&[0, 0]);
    let first = u32::from(Ipv4Addr::new(198, 18, 0, 1)) + u32::from(number) * ADDRESSES;
    for number in 0..ADDRESSES {
        message.extend([0xc0, HEADER as u8, 0, 1, 0, 1, 0, 0, 1, 0x2c, 0, 4]);
        message.extend((first + number).to_be_bytes());
    }
    message
}

/// A socket that keeps everything it receives, with the kernel's timestamps.
struct Stamped(UdpSocket);

impl Stamped {
    #[track_caller]
    fn open(pod: &Pod) -> Self {
        let socket = pod
            .netns()
            .run(|| UdpSocket::bind((pod.ipv4(), 0)))
            .expect("a UDP socket in a pod");
        setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20)).expect("a large buffer");
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true).expect("timestamps");
        socket
            .set_read_timeout(Some(egress_tests::DEADLINE))
            .expect("a time-out");
        Self(socket)
    }

    /// The kernel's timestamp and the transaction id of the next datagram.
    #[track_caller]
    fn receive(&self) -> (TimeSpec, u16) {
        let mut bytes = vec![0; 65_535];
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let mut space = cmsg_space!(TimeSpec);
        let message = recvmsg::<()>(
            self.0.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::empty(),
        )
        .expect("a datagram");
        let stamp = message
            .cmsgs()
            .expect("control messages")
            .find_map(|message| match message {
                ControlMessageOwned::ScmTimestampns(stamp) => Some(stamp),
                _ => None,
            });
        let stamp = stamp.expect("a timestamp");
        (stamp, u16::from_be_bytes([bytes[0], bytes[1]]))
    }
}

/// The number of responses that the programs have passed to the agent.
#[track_caller]
fn held_responses(lab: &Lab) -> u64 {
    let values = &lab.shared_entries("counters")[0]["values"];
    let values = values.as_array().expect("a value for each CPU");
    let of_cpu = |value: &Value| value["value"]["held_answers"].as_u64();
    values.iter().filter_map(of_cpu).sum()
}

#[test]
fn costly_responses_of_one_pod_do_not_delay_another_pods() {
    // Each response has addresses of its own, so that none is cheaper because of another.
    const COSTLY: u16 = 20;
    let lab = Lab::builder()
        .config("limits.addressesPerPod", 200_000)
        .build();
    let [greedy, neighbour] = lab.pods_of_shop(["greedy", "neighbour"]);
    lab.write_pod(&greedy, &[("allow", "big.test:443")]);
    // The test sends the responses itself, at the right moment.
    for name in ["big.test", "small.test"] {
        lab.dns().on(name, |_| Vec::new());
    }
    lab.write_pod(&neighbour, &[("allow", "small.test:443")]);
    let agent = lab.start_agent(&[&greedy, &neighbour]);
    let (many, one) = (Stamped::open(&greedy), Stamped::open(&neighbour));
    let to = |socket: &Stamped| socket.0.local_addr().expect("a bound socket");
    for id in 0..COSTLY {
        let asked = question(id, "big.test", RecordType::A);
        many.0.send_to(&asked, (RESOLVER, 53)).expect("send");
    }
    let asked = question(COSTLY, "small.test", RecordType::A);
    one.0.send_to(&asked, (RESOLVER, 53)).expect("send");
    eventually("all queries are with the resolver", || {
        holds(
            lab.dns().queries_for("big.test") == usize::from(COSTLY)
                && lab.dns().queries_for("small.test") == 1,
        )
    });

    // All responses arrive while the agent is stopped; the neighbour's is the last.
    let pid = Pid::from_raw(agent.pid().cast_signed());
    kill(pid, Signal::SIGSTOP).expect("kill(2)");
    for id in 0..COSTLY {
        let answer = costly_response(&question(id, "big.test", RecordType::A), id);
        lab.dns().send(RESOLVER, to(&many), &answer);
    }
    let [a, b, c, d] = [203, 0, 113, 10];
    let mut answer = asked[..asked.len() - 11].to_vec();
    answer[2..4].copy_from_slice(&[0x85, 0x80]);
    answer[6..12].copy_from_slice(&[0, 1, 0, 0, 0, 0]);
    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 0x2c, 0, 4, a, b, c, d]);
    lab.dns().send(RESOLVER, to(&one), &answer);
    // A busy CPU may process packets later than they are sent.
    eventually("all responses are held", || {
        holds(held_responses(&lab) > u64::from(COSTLY))
    });
    kill(pid, Signal::SIGCONT).expect("kill(2)");

    let (small, id) = one.receive();
    assert_eq!(id, COSTLY);
    let costly: Vec<_> = (0..COSTLY).map(|_| many.receive()).collect();
    let ids: Vec<u16> = costly.iter().map(|(_, id)| *id).collect();
    assert_eq!(ids, (0..COSTLY).collect::<Vec<_>>(), "in order");
    let before = costly.iter().filter(|(stamp, _)| *stamp < small).count();
    assert!(
        before < usize::from(COSTLY),
        "all costly answers went before the neighbour's"
    );
    let all = ADDRESSES as usize * usize::from(COSTLY);
    assert_eq!(lab.allowed(&greedy).len(), all);
}

/// Whether the newest allow map has an address already, and is not that of this version.
#[track_caller]
fn is_filled_beside(lab: &Lab, version: u64) -> bool {
    let maps = lab.allow_maps();
    maps.last_key_value().is_some_and(|(&newest, id)| {
        // The command fails for an empty map.
        let mut first = Command::new("bpftool");
        let first = first
            .args(["map", "getnext", "id", &id.to_string()])
            .output();
        u64::from(newest) != version && first.expect("bpftool").status.success()
    })
}

/// The version of the policy that a pod's interface is under.
#[track_caller]
fn version(lab: &Lab, pod: &Pod) -> u64 {
    let ifindex = u64::from(lab.ifindex(pod.interface()).get());
    let interfaces = lab.shared_entries("interfaces");
    let of_pod = interfaces.iter().find(|entry| entry["key"] == ifindex);
    let version = of_pod.and_then(|entry| entry["value"]["policy"].as_u64());
    version.expect("the pod is enforced")
}

#[test]
fn an_edit_for_a_pod_with_many_addresses_does_not_delay_another_pods_dns() {
    const RESPONSES: u16 = 30;
    const ATTEMPTS: u16 = 20;
    let lab = Lab::builder()
        .config("limits.addressesPerPod", 200_000)
        .build();
    let [large, neighbour] = lab.pods_of_shop(["large", "neighbour"]);
    lab.write_pod(&large, &[("allow", "big.test:443")]);
    lab.dns().on("big.test", |_| Vec::new());
    let agent = lab.start_agent(&[&large, &neighbour]);
    let many = Stamped::open(&large);
    for id in 0..RESPONSES {
        let asked = question(id, "big.test", RecordType::A);
        many.0.send_to(&asked, (RESOLVER, 53)).expect("send");
        eventually("the query is with the resolver", || {
            holds(lab.dns().queries_for("big.test") > usize::from(id))
        });
        let to = many.0.local_addr().expect("a bound socket");
        lab.dns().send(RESOLVER, to, &costly_response(&asked, id));
        assert_eq!(many.receive().1, id);
    }
    let all = lab.allowed(&large).len();
    assert_eq!(all, ADDRESSES as usize * usize::from(RESPONSES));

    let pid = Pid::from_raw(agent.pid().cast_signed());
    let socket = neighbour.dns_socket();
    let was_served_meanwhile = (0..ATTEMPTS).any(|attempt| {
        let before = version(&lab, &large);
        let mut is_under_way = [false; 2];
        agent.applies_policy_after(&large, || {
            let names = format!("big.test:443 other{attempt}.test:443");
            lab.write_pod(&large, &[("allow", &names)]);
            eventually("the edit has begun", || {
                holds(is_filled_beside(&lab, before) || version(&lab, &large) != before)
            });
            kill(pid, Signal::SIGSTOP).expect("kill(2)");
            is_under_way[0] = version(&lab, &large) == before;
            socket.ask(RESOLVER, attempt, "shop.test", RecordType::A);
            kill(pid, Signal::SIGCONT).expect("kill(2)");
            let answer = socket.expect("the neighbour's response");
            kill(pid, Signal::SIGSTOP).expect("kill(2)");
            assert_eq!(answer.addresses, [server(10)]);
            is_under_way[1] = version(&lab, &large) == before;
            kill(pid, Signal::SIGCONT).expect("kill(2)");
        });
        is_under_way == [true; 2]
    });
    assert!(
        was_served_meanwhile,
        "the neighbour's queries waited until all addresses were copied"
    );
    assert_eq!(lab.allowed(&large).len(), all);
}

#[test]
fn a_pod_that_floods_a_stopped_agent_leaves_room_for_another_pods_query() {
    // Each query takes 16 KiB of the ring. All together take more than half of it, which is one pod's limit,
    // and more than 256 frames.
    const LENGTH: usize = 8000;
    const LONG: u16 = 300;
    // These fill the rest between the long ones and the end of the ring.
    const SHORT: u16 = 100;
    let lab = Lab::builder().mtu(9000).build();
    let [greedy, neighbour] = lab.pods_of_shop(["greedy", "neighbour"]);
    let agent = lab.start_agent(&[&greedy, &neighbour]);
    let pid = Pid::from_raw(agent.pid().cast_signed());
    kill(pid, Signal::SIGSTOP).expect("kill(2)");
    let socket = greedy.dns_socket();
    for id in 0..LONG + SHORT {
        let mut asked = question(id, "evil.test", RecordType::A);
        if id < LONG {
            asked.resize(LENGTH, 0);
        }
        socket.send(RESOLVER, &asked);
    }
    let socket = neighbour.dns_socket();
    socket.ask(RESOLVER, 1, "shop.test", RecordType::A);
    kill(pid, Signal::SIGCONT).expect("kill(2)");
    let answer = socket.expect("the neighbour's query was held");
    assert_eq!(answer.addresses, [server(10)]);
    agent.wait_denial("the queries above the pod's limit", |denial| {
        denial.is(&greedy, "dns_not_held", RESOLVER, 53)
    });
}

/// Serves DNS over TCP on one connection: the beginning of a long response to each query for `big.test`, and
/// a complete response to every other query.
fn serve(mut stream: TcpStream) -> Option<()> {
    loop {
        let asked = read_message(&mut stream).ok()?;
        let mut bytes = framed(&costly_response(&asked, 0));
        if asked.windows(4).any(|bytes| bytes == b"\x03big") {
            bytes.truncate(bytes.len() - 1);
        }
        stream.write_all(&bytes).ok()?;
    }
}

#[test]
fn connections_that_use_up_their_pods_memory_leave_room_for_another_pods() {
    // Together, the responses and the data that the pod sends after its queries fill the 16 MiB that the
    // agent buffers for all pods.
    const LONG: usize = 244;
    const CONNECTIONS: usize = 256;
    let lab = Lab::builder().without_dns().config("http", HTTP).build();
    let listener = lab
        .outside()
        .run(|| TcpListener::bind((RESOLVER, 53)))
        .expect("the resolver's address is free");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(|| serve(stream));
        }
    });
    let [greedy, neighbour] = ["greedy", "neighbour"].map(|name| {
        let pod = lab.pod("shop", name);
        lab.write_pod(&pod, &[("allow", "big.test:443 whole.test:443")]);
        pod
    });
    let agent = lab.start_agent(&[&greedy, &neighbour]);
    let mut held = Vec::new();
    let response = 2 + costly_response(&question(7, "big.test", RecordType::A), 0).len();
    for number in 0..CONNECTIONS {
        let mut stream = greedy.reach_tcp((RESOLVER, 53));
        if number < LONG {
            stream
                .write_all(&framed_query(7, "big.test"))
                .expect("the connection is open");
        }
        // The agent buffers the data after the query until the message is complete.
        let mut beginning = [0xff; 4000];
        beginning[..2].copy_from_slice(&4096u16.to_be_bytes());
        // The connection may be reset here, because it exceeds the pod's limit.
        let _ = stream.write_all(&beginning);
        if number < LONG {
            let _ = stream.read_exact(&mut vec![0; response - 1]);
        }
        held.push(stream);
    }
    let mut stream = DnsStream::open(&neighbour, RESOLVER);
    stream.write(&framed_query(7, "whole.test"));
    read_message(&mut stream.tcp).expect("the neighbour's response");
    assert_eq!(lab.allowed(&neighbour).len(), ADDRESSES as usize);
    assert!(!agent.denials().iter().any(|denial| denial.of(&neighbour)));
    agent.wait_denial("a connection above the pod's limit", |denial| {
        denial.of(&greedy) && denial.reason == "dns_over_tcp"
    });
}
