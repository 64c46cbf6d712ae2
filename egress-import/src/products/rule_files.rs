//! Rule files: empty files whose names say what a program may reach.
//!
//! `<program>/manifests/egress/external/github.com:443.rule` lets the program reach github.com on TCP port 443. The
//! form is that of Monzo (<https://monzo.com/blog/controlling-outbound-traffic-from-kubernetes/>). In addition,
//! `443.rule` is any destination on that port, and `github.com.rule` is any TCP port. A file below `egress/` and not
//! below `egress/external/` is about something in the cluster.

use std::{collections::BTreeMap, path::Path};

use egress_api::Action;

use super::{policy, translator};
use crate::{
    Input, Options,
    names::Wildcards,
    object::{Document, Entries, Policy, labels},
    remark::Remark,
    rule::{Peer, Ports, Protocol, Rule},
};

/// The label with the program's name.
const LABEL: &str = "app";

/// Whether a file's name says that it is a rule.
pub(crate) fn is_rule_file(path: &str) -> bool {
    Path::new(path)
        .extension()
        .is_some_and(|extension| extension == "rule")
}

/// One object for each program.
pub(crate) fn import(files: &[&Input], options: &Options) -> Vec<Document> {
    let mut programs: BTreeMap<Option<String>, Vec<(&Input, Place)>> = BTreeMap::new();
    for file in files {
        let place = Place::read(&file.name);
        programs
            .entry(place.program.clone())
            .or_default()
            .push((file, place));
    }
    programs
        .into_iter()
        .map(|(program, files)| write(program, &files, options))
        .collect()
}

/// The rule that a path describes.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    program: Option<String>,
    is_external: bool,
    rule: String,
}

impl Place {
    fn read(path: &str) -> Self {
        let parts: Vec<&str> = path
            .split(['/', '\\'])
            .filter(|part| !part.is_empty() && *part != ".")
            .collect();
        let (file, directories) = parts.split_last().unwrap_or((&"", &[]));
        let egress = directories.iter().rposition(|part| *part == "egress");
        let program = egress.and_then(|at| {
            directories[..at]
                .iter()
                .rev()
                .find(|part| **part != "manifests")
        });
        Self {
            program: program.map(|part| (*part).to_owned()),
            is_external: egress.is_some_and(|at| directories.get(at + 1) == Some(&"external")),
            rule: file.strip_suffix(".rule").unwrap_or(file).to_owned(),
        }
    }
}

fn write(program: Option<String>, files: &[(&Input, Place)], options: &Options) -> Document {
    let directory = files.first().map(|(file, _)| {
        file.name
            .rsplit_once(['/', '\\'])
            .map_or(".", |(directory, _)| directory)
    });
    let mut document = Document {
        origin: directory.unwrap_or_default().to_owned(),
        source: format!(
            "rule files of {}",
            program.as_deref().unwrap_or("no program")
        ),
        ..Document::default()
    };
    let Some(program) = program else {
        document.remarks.push(Remark::refused(
            "the path of these files does not end in `<program>/egress/external/<rule>.rule`, so it does not say \
             whose rules they are",
        ));
        return document;
    };
    let mut allow = Entries::default();
    for (file, place) in files {
        allow.extend(translator(options).entries(&rule(file, place)).0);
    }
    let mut object = policy(
        &program,
        options.namespace.clone(),
        Policy {
            pods: labels([(LABEL.to_owned(), program.clone())]),
            allow: Some(allow),
            deny: None,
        },
    );
    object.remarks.push(Remark::note(format!(
        "rule files do not say how pods are labelled; this selects the label `{LABEL}`. Change it to yours"
    )));
    document.objects.push(object);
    document
}

fn rule(file: &Input, place: &Place) -> Rule {
    let mut rule = Rule::new(Action::Allow);
    let content = file.text.lines().map(str::trim);
    if content
        .clone()
        .any(|line| !line.is_empty() && !line.starts_with('#'))
    {
        rule.conditions
            .push(format!("{}.rule is not empty", place.rule));
    }
    if !place.is_external {
        rule.peers.push(Peer::Cluster(format!(
            "{}.rule, which is not below egress/external",
            place.rule
        )));
        return rule;
    }
    let (host, port) = match place.rule.rsplit_once(':') {
        Some((host, port)) => (Some(host), Some(port)),
        None if place.rule.parse::<u16>().is_ok() => (None, Some(place.rule.as_str())),
        None => (Some(place.rule.as_str()), None),
    };
    rule.ports.push(Ports::read(Protocol::Tcp, port, None));
    rule.peers.push(match host {
        None => Peer::Anywhere,
        Some(host) if host.parse::<std::net::IpAddr>().is_ok() => Peer::cidr(host, &[]),
        Some(host) => Peer::Name {
            text: host.to_owned(),
            wildcards: Wildcards::None,
        },
    });
    rule
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_says_whose_rule_it_is() {
        for (path, program, is_external, rule) in [
            (
                "a/service.github/manifests/egress/external/github.com:443.rule",
                Some("service.github"),
                true,
                "github.com:443",
            ),
            ("shop/egress/external/443.rule", Some("shop"), true, "443"),
            ("./shop/egress/ledger.rule", Some("shop"), false, "ledger"),
            ("egress/external/443.rule", None, true, "443"),
            ("github.com.rule", None, false, "github.com"),
        ] {
            let place = Place::read(path);
            assert_eq!(place.program.as_deref(), program, "{path}");
            assert_eq!(
                (place.is_external, place.rule.as_str()),
                (is_external, rule)
            );
        }
    }
}
