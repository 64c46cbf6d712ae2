//! Responses with records other than plain addresses, and what the agent learns from them.

use egress_tests::{
    Lab,
    addresses::{server, server6},
    dns::{RecordType, ResponseCode, Send, address, cname, hints, https_alias, raw_record},
};

const DNAME: u16 = 39;
const SOA: u16 = 6;
const SRV: u16 = 33;

/// `example.net` in wire form.
const EXAMPLE_NET: &[u8] = b"\x07example\x03net\0";

#[test]
fn aliases_in_https_records_are_followed_to_their_hints() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns().on("shop.test", |asked| {
        vec![Send::answer(
            asked,
            &[
                https_alias("pool.example"),
                // Of a name in the chain, of the alias's target, and of a name that the chain does not reach.
                hints(&[server(8), server6(8)]).of("pool.example"),
                address(server(9)).of("pool.example"),
                hints(&[server(66)]).of("bank.example"),
            ],
        )]
    });
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    let answer = pod.resolve("shop.test", RecordType::HTTPS);
    assert_eq!(answer.message.answers.len(), 4, "the response was changed");
    for address in [server(8), server6(8), server(9)] {
        pod.talks_tcp((address, 443));
    }
    agent.denies_tcp(&pod, (server(66), 443), "address_not_learned");
}

#[test]
fn addresses_outside_the_answer_section_are_not_learned() {
    let lab = Lab::new();
    lab.dns().on("_web._tcp.shop.test", |asked| {
        let service = [&[0, 1, 0, 1, 1, 187][..], EXAMPLE_NET].concat();
        let records = [
            raw_record(SRV, &service),
            address(server(66)),
            address(server(67)),
            address(server(68)).of("example.net"),
        ];
        // One record stays in the answer section; one moves to the authority section and two to the
        // additional section.
        vec![Send::answer(asked, &records).edited(|bytes| {
            assert_eq!(bytes[6..12], [0, 4, 0, 0, 0, 0]);
            bytes[6..12].copy_from_slice(&[0, 1, 0, 1, 0, 2]);
        })]
    });
    let pod = lab.pod("shop", "cart");
    let entries = "_web._tcp.shop.test:443 example.net:443";
    lab.write_pod(&pod, &[("allow", entries)]);
    let agent = lab.start_agent(&[&pod]);
    let answer = pod.resolve("_web._tcp.shop.test", RecordType::SRV);
    assert_eq!(answer.message.answers.len(), 1);
    assert_eq!(
        answer.message.additionals.len(),
        2,
        "the response was changed"
    );
    assert!(lab.allowed(&pod).is_empty());
    agent.denies_tcp(&pod, (server(68), 443), "address_not_learned");
}

#[test]
fn a_dname_is_followed_by_the_cname_that_comes_with_it() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    for (name, backwards) in [("a.old.test", false), ("b.old.test", true)] {
        let host = if backwards { 2 } else { 1 };
        lab.dns().on(name, move |asked| {
            let target = asked.name.replace("old.test", "example.net");
            let mut records = vec![
                raw_record(DNAME, EXAMPLE_NET).of("old.test"),
                cname(&target).of(&asked.name),
                address(server(host)).of(&target),
            ];
            if backwards {
                records.reverse();
            }
            vec![Send::answer(asked, &records)]
        });
    }
    // Without the CNAME that RFC 6672 requires, no client can follow the DNAME either.
    lab.dns().on("c.old.test", |asked| {
        vec![Send::answer(
            asked,
            &[
                raw_record(DNAME, EXAMPLE_NET).of("old.test"),
                address(server(66)).of("c.example.net"),
            ],
        )]
    });
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "*.old.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    for (name, host) in [("a.old.test", 1), ("b.old.test", 2)] {
        assert_eq!(pod.resolve(name, RecordType::A).message.answers.len(), 3);
        pod.talks_tcp((server(host), 443));
    }
    pod.resolve("c.old.test", RecordType::A);
    agent.denies_tcp(&pod, (server(66), 443), "address_not_learned");
}

#[test]
fn negative_responses_are_delivered_and_remove_no_address() {
    let lab = Lab::new();
    let (_web, pod) = lab.shop_and_cart("shop.test:443 gone.test:443");
    let _agent = lab.start_agent(&[&pod]);
    assert_eq!(pod.lookup("shop.test"), [server(10)]);

    assert_eq!(
        pod.resolve("gone.test", RecordType::A).code,
        ResponseCode::NXDomain
    );
    // NODATA: the name exists, but has no record of this type.
    let answer = pod.resolve("shop.test", RecordType::AAAA);
    assert_eq!(answer.code, ResponseCode::NoError);
    assert!(answer.message.answers.is_empty());
    for code in [ResponseCode::ServFail, ResponseCode::Refused] {
        lab.dns().on("shop.test", move |asked| {
            // An address in an error response is not learned.
            let error = u8::try_from(u16::from(code)).expect("a small code");
            vec![Send::answer(asked, &[address(server(66))]).edited(|bytes| bytes[3] |= error)]
        });
        assert_eq!(pod.resolve("shop.test", RecordType::A).code, code);
    }
    let learned: Vec<_> = lab.allowed(&pod).into_keys().collect();
    assert_eq!(learned, [server(10)]);
    pod.talks_tcp((server(10), 443));
}

#[test]
fn a_name_resolved_before_an_entry_allowed_it_works_once_one_does() {
    let lab = Lab::new();
    let _web = lab.serve_tcp(443);
    lab.dns()
        .answer("later.test", [cname("cdn.example"), address(server(20))]);
    lab.dns().addresses("never.test", &[server(21)]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(
        &pod,
        &[
            ("allow", "shop.test:443"),
            ("resolve", "later.test never.test"),
        ],
    );
    let agent = lab.start_agent(&[&pod]);
    assert_eq!(pod.lookup("later.test"), [server(20)]);
    assert_eq!(pod.lookup("never.test"), [server(21)]);
    agent.denies_tcp(&pod, (server(20), 443), "address_not_learned");

    agent.applies_policy_after(&pod, || {
        lab.write_pod(&pod, &[("allow", "shop.test:443 later.test:443")]);
    });
    pod.talks_tcp((server(20), 443));
    agent.denies_tcp(&pod, (server(21), 443), "address_not_learned");
    assert_eq!(
        lab.dns().queries_for("later.test"),
        1,
        "the name was queried again"
    );
}

#[test]
fn unknown_record_types_arrive_byte_for_byte() {
    let lab = Lab::new();
    let odd: Vec<u8> = (0..=255).collect();
    let sent = odd.clone();
    lab.dns().on("shop.test", move |asked| {
        vec![Send::answer(
            asked,
            &[
                raw_record(65_280, &sent),
                raw_record(46, &sent),
                raw_record(SOA, EXAMPLE_NET),
                address(server(10)),
            ],
        )]
    });
    let pod = lab.pod("shop", "cart");
    // The same response to a pod that is not enforced.
    let free = lab.pod("shop", "free");
    lab.write_pod(&pod, &[("allow", "shop.test:443")]);
    let _agent = lab.start_agent(&[&pod]);
    let bytes = |pod: &egress_tests::Pod| {
        let socket = pod.dns_socket();
        socket.ask(
            egress_tests::addresses::RESOLVER,
            7,
            "shop.test",
            RecordType::ANY,
        );
        socket
            .receive(egress_tests::DEADLINE)
            .expect("a response")
            .0
    };
    let held = bytes(&pod);
    assert!(held.windows(odd.len()).any(|w| w == odd));
    assert_eq!(held, bytes(&free));
    assert_eq!(
        lab.allowed(&pod).into_keys().collect::<Vec<_>>(),
        [server(10)]
    );
}
