//! How far each kind of policy objects is known: listed, awaited, absent or unlisted. A start waits for a kind that
//! is awaited.
//!
//! A server that restarts refuses requests for a moment (403), or does not know a kind yet that it has (404). Only the
//! definitions tell that a kind does not exist.

use std::collections::BTreeSet;

use egress_policy::objects::ObjectKind;

use super::{
    super::policies::{PolicyKind, PolicyKinds},
    definitions::Definition,
    health::{Health, Watched},
    table::Table,
};

/// How far a kind of policy objects is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KindState {
    /// Its objects have been listed.
    Listed,
    /// It will be listed, or its absence will be known: a start waits for that.
    Awaited,
    /// It does not exist.
    Absent,
    /// The server may have it and does not list it. A start goes on without it unless an earlier agent knew its
    /// objects, because the agent's roles may never have allowed it.
    Unlisted,
}

impl KindState {
    /// The state of a kind. `is_listed` tells whether a complete list of its objects has been read.
    pub(super) fn of(
        kind: PolicyKind,
        is_listed: bool,
        definitions: &Table<Definition>,
        health: &Health,
    ) -> Self {
        let watched = watched(kind);
        if is_listed {
            return Self::Listed;
        }
        let is_refused = health.is_refused(watched) || health.is_in_other_version(watched);
        if !is_refused && !health.is_not_served(watched) {
            return Self::Awaited;
        }
        let is_complete = definitions.is_complete();
        match is_complete.then(|| Definition::is_there(definitions, kind)) {
            Some(false) => Self::Absent,
            _ if is_refused => Self::Unlisted,
            None if health.is_not_offered(Watched::Definitions) => Self::Unlisted,
            // The server will serve it, or say which definitions there are.
            Some(true) | None => Self::Awaited,
        }
    }
}

/// The kinds that have been listed, and those that may exist and have not.
pub(super) fn kinds(states: impl Iterator<Item = (PolicyKind, KindState)>) -> PolicyKinds {
    let (mut listed, mut unlisted) = (BTreeSet::new(), BTreeSet::new());
    for (kind, state) in states {
        match state {
            KindState::Listed => listed.insert(kind),
            KindState::Awaited | KindState::Unlisted => unlisted.insert(kind),
            KindState::Absent => false,
        };
    }
    PolicyKinds {
        listed,
        unlisted,
        withheld: BTreeSet::new(),
    }
}

/// The watch of a kind.
pub(super) fn watched(kind: PolicyKind) -> Watched {
    match kind {
        PolicyKind::Policy(ObjectKind::EgressPolicy) => Watched::EgressPolicies,
        PolicyKind::Policy(ObjectKind::ClusterEgressPolicy) => Watched::ClusterEgressPolicies,
        PolicyKind::Policy(ObjectKind::ClusterNetworkPolicy) => Watched::ClusterNetworkPolicies,
        PolicyKind::Set => Watched::EgressSets,
    }
}

#[cfg(test)]
mod tests {
    use kube::{core::PartialObjectMeta, runtime::watcher::Event};
    use serde_json::json;

    use super::{super::health::Failure, *};

    const KIND: PolicyKind = PolicyKind::Policy(ObjectKind::ClusterEgressPolicy);

    fn refused() -> Failure {
        Failure::Refused("it is forbidden".into())
    }

    /// The state of the kind after such failures of its list and of the list of definitions. `has` tells whether
    /// the definitions, if they have been listed, have the kind.
    fn state(failure: Option<Failure>, definitions: Option<Failure>, has: bool) -> KindState {
        let health = Health::default();
        if let Some(failure) = failure {
            // A server counts as unreachable only after several failures.
            health.record_failure(watched(KIND), failure.clone());
            health.record_failure(watched(KIND), failure);
        }
        let mut table = Table::default();
        match definitions {
            Some(failure) => {
                health.record_failure(Watched::Definitions, failure);
            }
            None => {
                let name = super::super::definitions::name_of(KIND);
                let metadata = json!({ "metadata": { "name": name } });
                let listed = has.then(|| {
                    let read = serde_json::from_value(metadata).expect("metadata");
                    Event::InitApply(read)
                });
                let events = [Event::Init].into_iter().chain(listed);
                for event in events.chain([Event::InitDone]) {
                    table.apply::<PartialObjectMeta<_>>(event, |read, _| Definition::read(read));
                }
            }
        }
        KindState::of(KIND, false, &table, &health)
    }

    #[test]
    fn a_kind_is_absent_only_if_the_definitions_do_not_have_it() {
        assert_eq!(
            state(Some(Failure::NotServed), None, false),
            KindState::Absent
        );
        assert_eq!(state(Some(refused()), None, false), KindState::Absent);
        assert_eq!(state(None, None, false), KindState::Awaited);
    }

    #[test]
    fn a_kind_that_is_defined_and_not_served_is_awaited() {
        for failure in [Failure::NotServed, Failure::NotServedYet] {
            assert_eq!(state(Some(failure), None, true), KindState::Awaited);
        }
        let unreachable = Failure::Unreachable("x".into());
        assert_eq!(state(Some(unreachable), None, true), KindState::Awaited);
    }

    #[test]
    fn a_kind_that_is_refused_or_in_another_version_may_exist() {
        for failure in [refused(), Failure::OtherVersion] {
            assert_eq!(state(Some(failure), None, true), KindState::Unlisted);
        }
        assert_eq!(
            state(Some(refused()), Some(refused()), true),
            KindState::Unlisted
        );
    }

    #[test]
    fn without_definitions_nothing_says_that_a_kind_does_not_exist() {
        let not_served = || Some(Failure::NotServed);
        assert_eq!(
            state(not_served(), Some(refused()), false),
            KindState::Unlisted
        );
        let interrupted = Failure::Unreachable("x".into());
        assert_eq!(
            state(not_served(), Some(interrupted), false),
            KindState::Awaited
        );
    }
}
