//! Files whose names are rules.

use std::{collections::BTreeSet, net::Ipv4Addr};

use egress_import::{Input, Options, import};
use proptest::prelude::*;

use crate::{
    addresses,
    names::names,
    written::{Packet, Written},
};

/// A rule: the destination, if it has one, and the port, if it has one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rule {
    destination: Destination,
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Destination {
    Anywhere,
    Name(String),
    Address(Ipv4Addr),
}

/// A file of a program.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct File {
    program: &'static str,
    place: &'static str,
    rule: Rule,
    content: &'static str,
}

impl File {
    fn input(&self) -> Input {
        let Rule { destination, port } = &self.rule;
        let destination = match destination {
            Destination::Anywhere => None,
            Destination::Name(name) => Some(name.clone()),
            Destination::Address(address) => Some(address.to_string()),
        };
        let port = port.map(|port| port.to_string());
        let rule: Vec<String> = destination.into_iter().chain(port).collect();
        let (program, place, rule) = (self.program, self.place, rule.join(":"));
        Input {
            name: format!("{program}/{place}/{rule}.rule"),
            text: self.content.to_owned(),
        }
    }

    /// Whether it lets its program send this packet. Only an empty file, or one with comments, is a rule of the
    /// documented form, and only those for destinations outside of the cluster concern these packets.
    fn opens(&self, to: &Destination, port: u16) -> bool {
        let is_external = self.place.ends_with("egress/external");
        let is_rule = self.content.is_empty() || self.content.starts_with('#');
        let reaches =
            self.rule.destination == Destination::Anywhere || self.rule.destination == *to;
        is_external && is_rule && reaches && self.rule.port.is_none_or(|of| of == port)
    }
}

fn file() -> impl Strategy<Value = File> {
    let destination = prop_oneof![
        1 => Just(Destination::Anywhere),
        4 => "([ab]\\.){1,2}c".prop_map(Destination::Name),
        1 => "\\*\\.[ab]\\.c".prop_map(Destination::Name),
        2 => addresses().prop_map(|addresses| Destination::Address(addresses[0])),
    ];
    (
        prop::sample::select(vec!["shop", "bank/service.cart"]),
        prop::sample::select(vec![
            "egress/external",
            "manifests/egress/external",
            "egress",
            "egress/internal",
        ]),
        destination,
        prop::option::of(0_u16..6),
        prop::sample::select(vec!["", "# why\n", "team: a\n"]),
    )
        .prop_map(|(program, place, destination, port, content)| {
            // A file with neither has no name.
            let port = match destination {
                Destination::Anywhere => Some(port.unwrap_or(443)),
                _ => port,
            };
            File {
                program,
                place,
                rule: Rule { destination, port },
                content,
            }
        })
}

proptest! {
    #[test]
    fn files_of_several_programs(
        files in prop::collection::btree_set(file(), 1..8),
        more in addresses(),
        names in names(),
        port in 1_u16..8,
    ) {
        let files: BTreeSet<File> = files;
        let inputs: Vec<Input> = files.iter().map(File::input).collect();
        let imported = import(&inputs, &Options::default());
        prop_assert!(imported.problems.is_empty(), "{:?}", imported.problems);
        let listed = files.iter().filter_map(|file| match file.rule.destination {
            Destination::Address(address) => Some(address),
            _ => None,
        });
        let addresses: Vec<Ipv4Addr> = listed.chain(more).collect();
        for (program, label) in [("shop", "shop"), ("bank/service.cart", "service.cart")] {
            let of_program = || files.iter().filter(|file| file.program == program);
            // No file of a program closes it.
            if of_program().next().is_none() {
                continue;
            }
            let written = Written::of_pod(&imported.yaml, "n", &[("app", label)]);
            let to_names = names.iter().map(|name| Destination::Name(name.clone()));
            let to_addresses = addresses.iter().copied().map(Destination::Address);
            for to in to_names.chain(to_addresses) {
                let packet = match &to {
                    Destination::Name(name) => Packet::to_name(name, port),
                    Destination::Address(address) => Packet::to(*address, port),
                    Destination::Anywhere => continue,
                };
                let theirs = of_program().any(|file| file.opens(&to, port));
                let ours = written.allows(&packet);
                prop_assert!(theirs || !ours, "{:?} of {}\n{}", to, program, imported.yaml);
                prop_assert!(ours || !theirs || !imported.findings.is_empty(), "{:?}\n{}", to, imported.yaml);
            }
        }
    }
}
