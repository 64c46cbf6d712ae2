//! What an answer teaches is what a plain reading of all of it allows.
#![no_main]

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr},
};

use egress_agent::dns::read_answer;
use hickory_proto::{
    op::Message,
    rr::{DNSClass, Name, RData, Record, rdata::SVCB, rdata::svcb::SvcParamValue},
};
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

/// The addresses of the asked name and of every name that its aliases lead to: records are gone
/// through again and again until nothing is added.
fn reachable(asked: &Name, records: &[Record]) -> BTreeSet<IpAddr> {
    let mut names = vec![asked.clone()];
    let mut addresses = BTreeSet::new();
    loop {
        let before = names.len();
        for record in records.iter().filter(|r| r.dns_class == DNSClass::IN) {
            if !names.contains(&record.name) {
                continue;
            }
            match &record.data {
                RData::A(a) => _ = addresses.insert(IpAddr::V4(a.0)),
                RData::AAAA(aaaa) => _ = addresses.insert(IpAddr::V6(aaaa.0).to_canonical()),
                RData::CNAME(cname) => add(&mut names, &cname.0),
                RData::SVCB(svcb) => service(svcb, &mut names, &mut addresses),
                RData::HTTPS(https) => service(&https.0, &mut names, &mut addresses),
                _ => (),
            }
        }
        if names.len() == before {
            return addresses;
        }
    }
}

fn add(names: &mut Vec<Name>, name: &Name) {
    if !names.contains(name) {
        names.push(name.clone());
    }
}

fn service(svcb: &SVCB, names: &mut Vec<Name>, addresses: &mut BTreeSet<IpAddr>) {
    if svcb.svc_priority == 0 {
        add(names, &svcb.target_name);
        return;
    }
    for (_, value) in &svcb.svc_params {
        match value {
            SvcParamValue::Ipv4Hint(hint) => {
                addresses.extend(hint.0.iter().map(|a| IpAddr::V4(a.0)));
            }
            SvcParamValue::Ipv6Hint(hint) => {
                addresses.extend(hint.0.iter().map(|a| IpAddr::V6(a.0).to_canonical()));
            }
            _ => (),
        }
    }
}
