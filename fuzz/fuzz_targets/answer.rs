//! What an answer teaches is what a plain reading of all of it allows.
#![no_main]

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr},
};

use egress_dns::read_answer;
use egress_fuzz::reachable;
use hickory_proto::op::Message;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|message: &[u8]| {
    let Ok(answer) = read_answer(message) else {
        return;
    };
    let learned: BTreeSet<IpAddr> = answer
        .addresses
        .iter()
        .map(|learned| Ipv6Addr::from(learned.address).to_canonical())
        .collect();
    for learned in &answer.addresses {
        assert!(learned.ttl <= i32::MAX as u32);
    }
    if answer.response_code != 0 || answer.qclass != 1 {
        assert!(learned.is_empty());
    }
    let Ok(theirs) = Message::from_vec(message) else {
        return;
    };
    if answer.response_code != 0 || answer.qclass != 1 || answer.truncated {
        return;
    }
    let expected = reachable(theirs.queries[0].name(), &theirs.answers);
    assert_eq!(learned, expected, "{theirs:?}");
});
