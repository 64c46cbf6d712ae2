//! Changes of ranges that are many.

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use egress_tests::{Lab, Pod, SHORT, StopAtEnd, addresses::server, eventually, holds};

const MANY: u32 = 2500;
/// An internal address outside, and the port of VXLAN.
const TUNNEL: ([u8; 4], u16) = ([10, 98, 0, 2], 4789);

/// One external address, and many that no range merges.
fn internal(external: u8, base: u32) -> Vec<String> {
    let many = (0..MANY).map(|i| {
        let [a, b, c, d] = (base + 2 * i + 1).to_be_bytes();
        format!("{a}.{b}.{c}.{d}/32")
    });
    std::iter::once(format!("203.0.113.{external}/32"))
        .chain(many)
        .collect()
}

fn assert_only_the_second_is_internal(pod: &Pod, first: u8, second: u8) {
    pod.talks_tcp((server(second), 443));
    assert!(
        pod.connect_tcp((server(first), 443), SHORT).is_err(),
        "the range is still in force"
    );
}

#[test]
fn thousands_of_ranges_may_be_replaced_at_once_and_at_a_start() {
    let first = internal(98, 0x0ac8_0000);
    let second = internal(99, 0x0adc_0000);
    let lab = Lab::builder()
        .config("ranges.internal", first.clone())
        .build();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let mut agent = lab.start_agent_with(&["--keep-enforcing"], &[&pod]);
    assert_only_the_second_is_internal(&pod, 99, 98);
    lab.edit_config("ranges.internal", second);
    agent.reload();
    assert_only_the_second_is_internal(&pod, 98, 99);
    agent.kill();
    lab.edit_config("ranges.internal", first);
    let _agent = lab.start_agent_with(&["--keep-enforcing"], &[&pod]);
    assert_only_the_second_is_internal(&pod, 99, 98);
}

#[test]
fn ranges_that_do_not_fit_open_no_tunnel() {
    let lab = Lab::builder()
        .config("ranges.internal", vec!["10.98.0.2/32"])
        .build();
    let sink = lab.serve_udp(TUNNEL.1);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*")]);
    let agent = lab.start_agent(&[&pod]);
    lab.fill_ranges(20);
    lab.edit_config("ranges.tunnels", Vec::<String>::new());
    let mut many = internal(99, 0x0ac8_0000);
    many.push("10.98.0.2/32".to_owned());
    lab.edit_config("ranges.internal", many);

    let socket = pod.udp_socket(TUNNEL);
    let (sent, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let sending = StopAtEnd(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = socket.send(b"VXLAN");
                sent.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_micros(500));
            }
        });
        let text = agent.refuses_to_reload();
        let from = sent.load(Ordering::Relaxed);
        eventually("the program goes on sending", || {
            holds(sent.load(Ordering::Relaxed) >= from + 100)
        });
        drop(sending);
        assert_eq!(sink.datagrams_to(TUNNEL.into()), 0, "a tunnel was open");
        assert!(text.contains("has room for"), "{text}");
    });
}
