//! Reads an `EgressPolicy`.

use std::sync::Arc;

use egress_policy::objects::{NamespacePolicy, ObjectName};

use super::Mode;
use crate::{
    policy::{Body, ONLY_TAKES_AWAY, Policy, PolicySubject, selector},
    read::Reader,
};

const FIELDS: &[&str] = &["podSelector", "mode", "allow", "deny", "resolve"];

pub(crate) fn policy(name: Arc<ObjectName>, reader: &mut Reader<'_>) -> Policy {
    let mut is_good = reader.expect_only(FIELDS).is_ok();
    let pods = selector(reader, "podSelector", &mut is_good);
    let mode: Option<Mode> = reader.optional("mode");
    let resolve: Option<Vec<String>> = reader.optional("resolve");
    let closed = || Some(Vec::new());
    let mut allow = reader
        .try_optional::<Vec<String>>("allow")
        .unwrap_or_else(|_| {
            reader.problems.push("so it allows nothing".to_owned());
            closed()
        });
    let deny = reader.try_optional("deny").unwrap_or_else(|_| {
        reader.problems.push("so it denies everything".to_owned());
        Some(vec!["*".to_owned()])
    });
    let mut mode = mode.map(Into::into);
    let mut resolve = resolve;
    if !is_good {
        // Perhaps it is not about all of these pods.
        allow = closed();
        (mode, resolve) = (None, None);
        reader.problems.push(ONLY_TAKES_AWAY.to_owned());
    }
    let subject = PolicySubject {
        namespace: name.namespace.clone(),
        pods,
        ..PolicySubject::default()
    };
    let body = NamespacePolicy {
        name: Arc::clone(&name),
        mode,
        allow,
        deny,
        resolve,
    };
    Policy {
        name,
        subject: Arc::new(subject),
        body: Body::Namespace(Arc::new(body)),
        is_complete: reader.problems.is_empty(),
        problems: std::mem::take(&mut reader.problems),
    }
}

impl From<Mode> for egress_policy::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Enforce => Self::Enforce,
            Mode::Audit => Self::Audit,
            Mode::Off => Self::Off,
        }
    }
}
