//! Policies: from annotations and policy objects to the form for the kernel and the gate.
//!
//! 1. [`annotations`]: the keys under `egress-agent.dev/`, and the entries of their lists and of [`objects`]
//!    (`parse`, `name_text`, `sets`: the grammar of one entry);
//! 2. `effective`: the rules in effect, from pod, namespace, policy objects (`tiers`: those with ordered rules) and
//!    the agent's settings;
//! 3. [`compile()`]: those rules as classes, prefixes and name rules;
//! 4. [`services`]: what these rules mean for the addresses of Services;
//! 5. [`describe()`]: the same rules in words.
//!
//! All functions are pure.

pub mod annotations;
mod classes;
mod closed;
mod compile;
mod describe;
mod effective;
pub mod entry;
mod entry_warnings;
mod error;
pub mod except;
mod excerpt;
pub mod explain;
mod limits;
mod name_text;
mod names;
pub mod objects;
mod openings;
mod parse;
pub mod pattern;
pub mod prefix;
mod resolver;
mod search_list;
pub mod services;
mod sets;
mod tiers;
mod translators;

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::sync::{Arc, LazyLock};

use egress_dns::Name;
use serde::{Deserialize, Serialize};

pub use annotations::Annotations;
pub use closed::{CLOSERS, Closer, ModeSource};
pub use compile::{
    Cidr, Compiled, EntrySource, compile, refused, unidentified, unreadable, unreadable_tiers,
    without_namespace,
};
pub use describe::{DescribedRule, Description, describe};
pub use entry::number_word;
pub use error::{Origin, PolicyError, Problem, RuleName, Unreadable};
pub use excerpt::Excerpt;
pub use limits::NAMES;
pub use name_text::{exact_name, name_pattern};
pub use names::{Grant, InternalAnswers, MayBeInternal, NameRules, QuestionRule};
pub use objects::Objects;
pub use parse::check_entry;
pub use prefix::Prefix;
pub use resolver::Resolver;
pub use search_list::Autopath;
pub use sets::{check_destinations, set_of_entry};
pub use translators::Translators;

/// All that concerns one pod, not parsed yet.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The pod's annotations.
    pub pod: &'a Annotations,
    /// Its namespace's annotations.
    pub namespace: &'a Annotations,
    /// The policy objects that select it.
    pub objects: &'a Objects,
}

impl<'a> Inputs<'a> {
    /// Without policy objects.
    pub fn annotations(pod: &'a Annotations, namespace: &'a Annotations) -> Self {
        static NO_OBJECTS: LazyLock<Objects> = LazyLock::new(Objects::default);
        Self {
            pod,
            namespace,
            objects: &NO_OBJECTS,
        }
    }
}

impl Inputs<'_> {
    /// Whether an entry uses a set.
    pub fn use_sets(self) -> bool {
        let Objects {
            namespace, tiers, ..
        } = self.objects;
        let annotations = [self.pod, self.namespace].into_iter();
        let annotations = annotations
            .flat_map(|of| [&of.allow, &of.deny, &of.resolve])
            .flatten();
        let lists = namespace
            .iter()
            .flat_map(|policy| [&policy.allow, &policy.deny, &policy.resolve])
            .flatten()
            .flatten();
        let rules = tiers.iter().flat_map(|policy| &policy.rules);
        let mut texts = annotations
            .chain(lists)
            .chain(rules.flat_map(|rule| &rule.entries));
        texts.any(|text| text.contains(sets::SIGN))
    }
}

/// The effect of verdicts. Ordered from the loosest to the tightest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// No packet is judged.
    Off,
    /// Packets are judged and denials are reported; none is dropped or held.
    Audit,
    /// Packets are judged, and denied ones are dropped.
    Enforce,
}

impl Mode {
    /// The word that annotations and the configuration use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Audit => "audit",
            Self::Enforce => "enforce",
        }
    }

    /// Parses an annotation's value.
    fn from_text(text: &str) -> Option<Self> {
        [Self::Off, Self::Audit, Self::Enforce]
            .into_iter()
            .find(|mode| mode.as_str() == text.trim())
    }
}

/// The power of a pod's own annotations. Its `deny` always counts, because it only takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PodAnnotations {
    /// A pod may allow destinations; its list and its namespace's add up.
    Grant,
    /// A pod with an `allow` reaches the intersection of that list and its namespace's; a pod
    /// without one reaches the destinations in its namespace's list.
    Narrow,
    /// A pod reaches the destinations in its namespace's list.
    Ignore,
}

/// The settings of the agent's configuration for all policies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Mode of pods without any list or `mode`, of their own or of their namespace. If it is [`Mode::Audit`],
    /// pods with a list and without a `mode` have it too.
    pub default_mode: Mode,
    /// The power of pods' own annotations.
    pub pod_annotations: PodAnnotations,
    /// Names at or below it may always be queried.
    pub cluster_domain: Name,
    /// Whether queries for names that no entry could allow are refused.
    pub guard: bool,
    /// Whether internal destinations pass unless denied.
    pub allow_internal: bool,
    /// The names that may resolve to internal addresses if `allow_internal` is false.
    pub internal_answers: Arc<InternalAnswers>,
    /// Prefixes that only an address entry opens: an entry `*` of a namespace does not cover them
    /// when `pod_annotations` is [`PodAnnotations::Narrow`].
    pub protected: Vec<Prefix>,
    /// Prefixes of translators: an entry for an IPv4 address also covers the address behind them.
    pub translators: Translators,
}
