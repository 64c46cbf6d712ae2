//! What a policy means: from annotations to what the kernel and the gate look at.
//!
//! 1. [`annotations`]: the keys under `egress-agent.dev/`, and the entries of their lists
//!    (`parse`, `name_text`: the grammar of one entry);
//! 2. `effective`: pod, namespace and the agent's settings together, as plain rules;
//! 3. [`compile()`]: those rules as classes, prefixes and name rules;
//! 4. [`describe()`]: the same rules in words.
//!
//! Everything here is a pure function of its arguments.

pub mod annotations;
mod compile;
mod describe;
mod effective;
pub mod entry;
mod entry_warnings;
mod error;
mod excerpt;
pub mod explain;
mod name_text;
mod names;
mod parse;
pub mod pattern;
pub mod prefix;
mod resolver;
mod search_list;
mod translators;

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use egress_dns::Name;

pub use annotations::Annotations;
pub use compile::{
    Cidr, Compiled, NAMES, compile, refused, unidentified, unreadable, without_namespace,
};
pub use describe::describe;
pub use entry::number_word;
pub use error::{Origin, PolicyError, Problem, Unreadable};
pub use excerpt::Excerpt;
pub use name_text::{exact_name, name_pattern};
pub use names::{Grant, InternalAnswers, MayBeInternal, NameRules, QuestionRule};
pub use prefix::Prefix;
pub use resolver::Resolver;
pub use search_list::Autopath;
pub use translators::Translators;

/// What is done with a verdict. Ordered from the loosest to the tightest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// Nothing is judged.
    Off,
    /// Judged and reported; nothing is dropped or held.
    Audit,
    /// Judged; what is denied does not pass.
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

    /// The mode that an annotation's value is the word for.
    fn from_text(text: &str) -> Option<Self> {
        [Self::Off, Self::Audit, Self::Enforce]
            .into_iter()
            .find(|mode| mode.as_str() == text.trim())
    }
}

/// What a pod's own annotations may grant. Its `deny` counts in every case: it takes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PodAnnotations {
    /// A pod may allow for itself; its list and its namespace's add up.
    Grant,
    /// A pod with an `allow` reaches what that list and its namespace's list have in common; a pod
    /// without one reaches what its namespace's list allows.
    Narrow,
    /// A pod reaches what its namespace's list allows.
    Ignore,
}

/// What the agent's configuration says about every policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Mode of pods without any list or `mode`, of their own or of their namespace. [`Mode::Audit`] is also
    /// that of pods with a list and without a `mode`.
    pub default_mode: Mode,
    /// Who may grant.
    pub pod_annotations: PodAnnotations,
    /// Names at or below it may always be asked for.
    pub cluster_domain: Name,
    /// Whether questions for names that no entry could allow are refused.
    pub guard: bool,
    /// Whether internal destinations pass unless denied.
    pub allow_internal: bool,
    /// Which names may lead to internal addresses where those do not.
    pub internal_answers: Arc<InternalAnswers>,
    /// Prefixes that only an address entry opens: an entry `*` of a namespace does not cover them
    /// when `pod_annotations` is [`PodAnnotations::Narrow`].
    pub protected: Vec<Prefix>,
    /// Prefixes of translators: an IPv4 address that an entry names is meant behind them too.
    pub translators: Translators,
}
