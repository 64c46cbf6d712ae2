//! What several targets compare with.

use std::{collections::BTreeSet, net::IpAddr};

use hickory_proto::rr::{DNSClass, Name, RData, Record, rdata::SVCB, rdata::svcb::SvcParamValue};

/// The addresses of the asked name and of every name that its aliases lead to: records are gone
/// through again and again until nothing is added.
pub fn reachable(asked: &Name, records: &[Record]) -> BTreeSet<IpAddr> {
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
