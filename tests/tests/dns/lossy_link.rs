//! A link to the resolver that loses, repeats and reorders packets: every query gets its response in the end,
//! and the addresses in a response are allowed when it arrives.

use std::{collections::HashMap, thread};

use egress_tests::{
    Agent, Lab, Pod, SHORT,
    addresses::{RESOLVER, numbered},
    dns::{Answer, DnsStream, RecordType, framed_query},
};

struct Scene {
    agent: Agent,
    pod: Pod,
    lab: Lab,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::builder().lossy().build();
        lab.dns().numbered("fresh.test");
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("allow", "*.fresh.test:443")]);
        let agent = lab.start_agent(&[&pod]);
        Self { agent, pod, lab }
    }

    /// Asserts that this is the response for a number, and that its address is allowed.
    #[track_caller]
    fn assert_learned(&self, number: u32, answer: &Answer) {
        assert_eq!(answer.addresses, [numbered(number)]);
        let allowed = self.lab.allowed(&self.pod);
        assert!(allowed.contains_key(&numbered(number)), "{number}");
    }

    /// Asserts that the agent withheld only repeated responses.
    #[track_caller]
    fn assert_only_repetitions_are_withheld(&self) {
        for denial in self.agent.denials() {
            assert_eq!(denial.reason, "dns_unsolicited", "{denial:?}");
        }
    }
}

#[test]
fn every_query_is_answered_in_the_end() {
    const QUESTIONS: u32 = 500;
    let scene = Scene::new();
    let socket = scene.pod.dns_socket();
    let name = |number: u32| format!("n{number}.fresh.test");
    let mut open: HashMap<u16, u32> = (0..QUESTIONS).map(|n| (n as u16, n)).collect();
    let mut asked = 0;
    while !open.is_empty() {
        // A batch at a time, as a resolver sends its queue.
        for (&id, &number) in open.iter().take(50) {
            socket.ask(RESOLVER, id, &name(number), RecordType::A);
            asked += 1;
        }
        assert!(asked < 20 * QUESTIONS, "{} have no answer", open.len());
        while let Some((bytes, _)) = socket.receive(SHORT) {
            let answer = Answer::read(&bytes);
            let number = open.remove(&answer.message.metadata.id);
            if let Some(number) = number {
                scene.assert_learned(number, &answer);
            }
        }
    }
    assert!(asked > QUESTIONS, "the link loses nothing");
    scene.assert_only_repetitions_are_withheld();
}

#[test]
fn every_query_over_tcp_is_answered() {
    const CONNECTIONS: u32 = 20;
    const QUESTIONS: u32 = 10;
    let scene = Scene::new();
    let scene = &scene;
    let connects = |connection: u32| {
        let mut stream = DnsStream::open_without_delay(&scene.pod, RESOLVER);
        let numbers = connection * QUESTIONS..(connection + 1) * QUESTIONS;
        if connection.is_multiple_of(2) {
            for number in numbers {
                send_query(&mut stream, number);
                scene.assert_learned(number, &read_response(&mut stream));
            }
        } else {
            // All of them before the first response.
            numbers.clone().for_each(|n| send_query(&mut stream, n));
            numbers.for_each(|n| scene.assert_learned(n, &read_response(&mut stream)));
        }
    };
    thread::scope(|scope| {
        for first in 0..4 {
            scope.spawn(move || (first..CONNECTIONS).step_by(4).for_each(connects));
        }
    });
    let sent_again = scene.pod.netns().counter("TcpExt:", "TCPLostRetransmit")
        + scene.pod.netns().counter("TcpExt:", "TCPTimeouts");
    assert!(sent_again > 0, "the link loses nothing");
    assert!(scene.agent.denials().is_empty());
}

/// Sends the query for a number, in two segments.
#[track_caller]
fn send_query(stream: &mut DnsStream, number: u32) {
    let query = framed_query(number as u16, &format!("n{number}.fresh.test"));
    let (first, second) = query.split_at(7);
    stream.write(first);
    stream.write(second);
}

#[track_caller]
fn read_response(stream: &mut DnsStream) -> Answer {
    stream.receive().expect("a response")
}
