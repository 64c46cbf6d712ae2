//! Rules in the form for the kernel and the gate: classes, prefixes, name rules.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hasher as _},
};

use egress_common::{
    address::Address,
    limits::{CIDR_ENTRIES, CLASSES},
    records::{
        POLICY_ALLOW_INTERNAL, POLICY_OPEN, POLICY_REFUSED, POLICY_SPEAKS_OF_NAMES,
        POLICY_UNIDENTIFIED, POLICY_UNREADABLE, Policy, PortClass,
    },
    verdict::is_dns,
};

use super::{
    Annotations, Mode, Settings,
    annotations::{Lists, Written},
    effective::{self, Effective, Rule},
    entry::Destination,
    error::{PolicyError, Problem},
    names::{NameRule, NameRules, QuestionRule},
    pattern::NamePattern,
    prefix::{Prefix, inherit},
    translators::Translators,
};

/// Most names and wildcards in one pod's policy, including those of its namespace. Kubernetes limits the
/// annotations of one object to 256 KiB, so only very short names reach this limit.
pub const NAMES: usize = 10_000;

/// Most names with `*` inside a label among them. The thread that serves all pods compares each of them with
/// every name that the pod queries.
const GLOBS: usize = 100;

/// One entry for a policy's CIDR trie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    /// The network address, IPv4 in mapped form.
    pub network: Address,
    /// Length in bits of the 128-bit form: 96 more for IPv4.
    pub prefix_len: u32,
    /// Bitmap of its own classes and of those of all prefixes that contain it.
    pub classes: u64,
}

/// A policy, ready for the kernel and the gate. The same set of rules results in the same bytes,
/// in whatever order they were written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// Whether verdicts are enforced, only reported, or not made.
    pub mode: Mode,
    /// The kernel's record; `own` and `own_len` are left empty.
    pub record: Policy,
    /// The rules about names.
    pub names: NameRules,
    /// The CIDR trie, sorted.
    pub cidrs: Vec<Cidr>,
    /// Warnings for the author of a readable policy.
    pub warnings: Vec<String>,
    /// The `deny` entries with an address, the most specific first.
    denials: Vec<Denial>,
    translators: Translators,
}

/// A `deny` entry with an address.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Denial {
    destination: Destination,
    class: u8,
    text: Box<str>,
}

impl Compiled {
    /// The text of the `deny` entry that put the address into the denying class with this bit
    /// number; the most specific entry if there are several.
    pub fn explain_deny(&self, address: &Address, class: u8) -> Option<String> {
        let of = |address: &Address| {
            let mut denials = self.denials.iter();
            denials.find(|denial| denial.class == class && denial.destination.contains(address))
        };
        let behind = || of(&self.translators.v4_behind(address)?);
        let denial = match of(address) {
            Some(denial) if denial.destination != Destination::Any => Some(denial),
            any => behind().or(any),
        };
        denial.map(|denial| denial.text.to_string())
    }
}

/// Compiles the annotations of a pod and its namespace.
///
/// # Errors
///
/// When any part of them cannot be parsed or exceeds a limit: half a policy is not a policy. The
/// lists are parsed in every mode, including `off`.
pub fn compile(
    pod: &Annotations,
    namespace: &Annotations,
    settings: &Settings,
) -> Result<Compiled, PolicyError> {
    let Effective {
        mode,
        open,
        allow,
        deny,
        resolve,
        mut warnings,
    } = effective::resolve(pod, namespace, settings)?;

    let classes = Classes::new(&allow, &deny)?;
    let mut record = classes.record();
    record.flags = flags(settings) | if open { POLICY_OPEN } else { 0 };

    let mut prefixes = Vec::new();
    let mut listed: BTreeMap<NamePattern, NameRule> = BTreeMap::new();
    for rule in &allow {
        let bit = classes.bit(Action::of_allow(rule), rule);
        match &rule.destination {
            Destination::Any => record.any |= bit,
            Destination::Addresses(prefix) => prefixes.push((*prefix, bit)),
            Destination::Names(pattern) => {
                record.named |= bit;
                let name = listed.entry(pattern.clone()).or_default();
                name.classes |= bit;
                name.queryable = true;
            }
        }
    }
    for rule in &deny {
        match &rule.destination {
            Destination::Any => record.any |= classes.bit(Action::Deny, rule),
            Destination::Addresses(prefix) => {
                prefixes.push((*prefix, classes.bit(Action::Deny, rule)));
            }
            Destination::Names(pattern) => {
                let name = listed.entry(pattern.clone()).or_default();
                name.denied = Some(rule.text.as_str().into());
            }
        }
    }
    for rule in &resolve {
        if let Destination::Names(pattern) = &rule.destination {
            listed.entry(pattern.clone()).or_default().queryable = true;
        }
    }
    let cidrs: Vec<Cidr> = inherit(prefixes)
        .into_iter()
        .map(|(prefix, classes)| Cidr {
            network: prefix.network(),
            prefix_len: prefix.prefix_len(),
            classes,
        })
        .collect();
    check_limit("address prefixes", cidrs.len(), CIDR_ENTRIES as usize)?;

    record.names = fingerprint(&listed, settings);
    let unlisted = unlisted(&allow, &deny, &resolve, open, settings);
    let denies_names = deny
        .iter()
        .any(|rule| matches!(rule.destination, Destination::Names(_)));
    if denies_names || unlisted == QuestionRule::NotListed {
        record.flags |= POLICY_SPEAKS_OF_NAMES;
        warn_of_dns(&allow, &mut warnings);
    }
    let mut names = NameRules::new(settings, unlisted);
    names.extend(listed);
    let denials = denials(&deny, &classes);
    Ok(Compiled {
        mode,
        record,
        names,
        cidrs,
        warnings,
        denials,
        translators: settings.translators.clone(),
    })
}

/// The policy of a pod whose annotations could never be parsed: everything external is denied, with a reason
/// of its own. If `defaultMode` is `audit`, denials are only reported, unless a readable `mode: enforce` is
/// among the annotations.
pub fn unreadable(pod: &Annotations, namespace: &Annotations, settings: &Settings) -> Compiled {
    Compiled {
        mode: effective::mode_of_unreadable(pod, namespace, settings),
        ..closed(settings, POLICY_UNREADABLE)
    }
}

/// The policy of an interface whose pod is not known yet: everything external is denied, with a reason of its
/// own.
pub fn unidentified(settings: &Settings) -> Compiled {
    closed(settings, POLICY_UNIDENTIFIED)
}

/// The policy of a pod whose namespace is not known yet. If `defaultMode` is `audit` and there is no
/// quarantine of interfaces, denials are only reported.
pub fn without_namespace(pod: &Annotations, quarantine: bool, settings: &Settings) -> Compiled {
    let mode = if quarantine {
        Mode::Enforce
    } else {
        effective::mode_of_unreadable(pod, &Annotations::default(), settings)
    };
    Compiled {
        mode,
        ..unidentified(settings)
    }
}

/// The policy of a pod that is closed because it has an interface that cannot be enforced. Internal
/// addresses are denied too, so that no data from them leaves through that interface.
pub fn refused(settings: &Settings) -> Compiled {
    let settings = Settings {
        allow_internal: false,
        guard: true,
        ..settings.clone()
    };
    closed(&settings, POLICY_REFUSED)
}

fn closed(settings: &Settings, why: u32) -> Compiled {
    let (unlisted, names) = if settings.guard {
        (QuestionRule::NotListed, POLICY_SPEAKS_OF_NAMES)
    } else {
        (QuestionRule::Allowed, 0)
    };
    Compiled {
        mode: Mode::Enforce,
        record: Policy {
            flags: flags(settings) | why | names,
            ..Policy::CLOSED
        },
        names: NameRules::new(settings, unlisted),
        cidrs: Vec::new(),
        warnings: Vec::new(),
        denials: Vec::new(),
        translators: settings.translators.clone(),
    }
}

/// Warns of entries for DNS ports that open nothing under a policy with rules about names.
fn warn_of_dns(allow: &[Rule], warnings: &mut Vec<String>) {
    for rule in allow {
        let PortClass {
            port_min: first,
            port_max: last,
            protocols,
            ..
        } = rule.class;
        if first == last
            && is_dns(protocols, first)
            && !matches!(rule.destination, Destination::Addresses(_))
        {
            warnings.push(format!(
                "the {}'s allow entry `{}` opens nothing: under a policy with rules about names, only an \
                 entry with its address opens a DNS server",
                rule.origin, rule.text
            ));
        }
    }
}

/// A number that changes whenever the classes of any name's addresses change.
fn fingerprint(listed: &BTreeMap<NamePattern, NameRule>, settings: &Settings) -> u64 {
    // Hash the text, so that another version of the agent computes the same number.
    let mut hasher = DefaultHasher::new();
    let (domain, internal) = (&settings.cluster_domain, &settings.internal_answers);
    hasher.write(format!("{domain} {internal}\n").as_bytes());
    for (pattern, rule) in listed {
        let denied = u8::from(rule.denied.is_some());
        hasher.write(format!("{pattern} {:x} {denied}\n", rule.classes).as_bytes());
    }
    hasher.finish()
}

fn flags(settings: &Settings) -> u32 {
    if settings.allow_internal {
        POLICY_ALLOW_INTERNAL
    } else {
        0
    }
}

/// The rule for queries that no entry matches. A `deny` of everything refuses them: their responses would be
/// useless, and the queries could only carry data out.
fn unlisted(
    allow: &[Rule],
    deny: &[Rule],
    resolve: &[Rule],
    open: bool,
    settings: &Settings,
) -> QuestionRule {
    let is_any = |rule: &Rule| rule.destination == Destination::Any;
    let asks_any = resolve.iter().any(is_any);
    let reaches_any = (open || allow.iter().any(is_any)) && !effective::denies_everything(deny);
    if !settings.guard || asks_any || reaches_any {
        QuestionRule::Allowed
    } else {
        QuestionRule::NotListed
    }
}

fn denials(deny: &[Rule], classes: &Classes) -> Vec<Denial> {
    let mut denials: Vec<Denial> = deny
        .iter()
        .filter(|rule| !matches!(rule.destination, Destination::Names(_)))
        .map(|rule| Denial {
            destination: rule.destination.clone(),
            class: classes.bit(Action::Deny, rule).trailing_zeros() as u8,
            text: rule.text.as_str().into(),
        })
        .collect();
    denials.sort_by_key(|denial| match denial.destination {
        Destination::Addresses(prefix) => Reverse(Some(prefix.prefix_len())),
        Destination::Any | Destination::Names(_) => Reverse(None),
    });
    denials
}

/// The action of a class on its packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Action {
    Allow,
    /// [`Rule::under_any`].
    AllowUnderAny,
    Deny,
}

impl Action {
    fn of_allow(rule: &Rule) -> Self {
        if rule.under_any {
            Self::AllowUnderAny
        } else {
            Self::Allow
        }
    }
}

/// The distinct (action, protocols, ports) of a policy, in a fixed order.
struct Classes(Vec<(Action, PortClass)>);

impl Classes {
    fn new(allow: &[Rule], deny: &[Rule]) -> Result<Self, PolicyError> {
        let denies_packets = |rule: &&Rule| !matches!(rule.destination, Destination::Names(_));
        let denied = deny.iter().filter(denies_packets);
        let distinct: BTreeSet<(Action, PortClass)> = allow
            .iter()
            .map(|rule| (Action::of_allow(rule), rule.class))
            .chain(denied.map(|rule| (Action::Deny, rule.class)))
            .collect();
        check_limit(
            "classes (distinct action, protocol and port range)",
            distinct.len(),
            CLASSES,
        )?;
        Ok(Self(distinct.into_iter().collect()))
    }

    /// The bit of the rule's class.
    fn bit(&self, action: Action, rule: &Rule) -> u64 {
        self.0
            .binary_search(&(action, rule.class))
            .map_or(0, |index| 1 << index)
    }

    fn record(&self) -> Policy {
        let mut record = Policy::CLOSED;
        for (index, (action, class)) in self.0.iter().enumerate() {
            record.classes[index] = *class;
            match action {
                Action::Allow => {}
                Action::AllowUnderAny => record.under_any |= 1 << index,
                Action::Deny => record.deny |= 1 << index,
            }
        }
        record
    }
}

fn check_limit(what: &'static str, count: usize, limit: usize) -> Result<(), PolicyError> {
    let problem = (count > limit).then_some(Problem::Limit { what, count, limit });
    PolicyError::from_problems(problem.into_iter().collect()).map_or(Ok(()), Err)
}

/// Counts the entries before they are compiled, so that the work is bounded.
pub(super) fn check_written(pod: &Lists, namespace: &Lists, problems: &mut Vec<Problem>) {
    let mut names = BTreeSet::new();
    let mut prefixes = BTreeSet::<Prefix>::new();
    for lists in [pod, namespace] {
        for Written { entry, .. } in [&lists.allow, &lists.deny, &lists.resolve]
            .into_iter()
            .flatten()
            .flatten()
        {
            match &entry.destination {
                Destination::Any => {}
                Destination::Addresses(prefix) => {
                    prefixes.insert(*prefix);
                }
                Destination::Names(pattern) => {
                    names.insert(pattern);
                }
            }
        }
    }
    let globs = names
        .iter()
        .filter(|pattern| matches!(pattern, NamePattern::Glob(_)))
        .count();
    for (what, count, limit) in [
        ("names", names.len(), NAMES),
        (
            "names with * inside a label, or as a label after the first",
            globs,
            GLOBS,
        ),
        ("address prefixes", prefixes.len(), CIDR_ENTRIES as usize),
    ] {
        if count > limit {
            problems.push(Problem::Limit { what, count, limit });
        }
    }
}
