//! Rules in the form for the kernel and the gate: classes, prefixes, name rules.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    hash::{DefaultHasher, Hasher as _},
    sync::Arc,
};

use egress_common::{
    address::Address,
    classes::ClassSet,
    limits::CIDR_ENTRIES,
    records::{
        POLICY_ALLOW_INTERNAL, POLICY_OPEN, POLICY_REFUSED, POLICY_SELECTED,
        POLICY_SPEAKS_OF_NAMES, POLICY_UNIDENTIFIED, POLICY_UNREADABLE, Policy, PortClass,
    },
    verdict::is_dns,
};

use super::{
    Annotations, Inputs, Mode, Settings,
    annotations::At,
    classes::{Action, Classes, with_actions},
    closed::{CLOSERS, Closer},
    effective::{self, Effective, Rule},
    entry::{Destination, is_everything},
    error::{Origin, PREFIXES, PolicyError, Problem},
    limits::check_limit,
    names::{NameRule, NameRules, QuestionRule},
    objects::{NamespacePolicy, Objects, TierAction, TierPolicy, TierRule},
    openings::Openings,
    parse::read_entry,
    pattern::NamePattern,
    prefix::{Prefix, inherit},
    services::added::{self, Added},
    tiers::Tiers,
    translators::Translators,
};

/// One entry for a policy's CIDR trie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    /// The network address, IPv4 in mapped form.
    pub network: Address,
    /// Length in bits of the 128-bit form: 96 more for IPv4.
    pub prefix_len: u32,
    /// Its own classes and those of all prefixes that contain it.
    pub classes: ClassSet,
}

impl Cidr {
    pub(super) fn of((prefix, classes): (Prefix, ClassSet)) -> Self {
        Self {
            network: prefix.network(),
            prefix_len: prefix.prefix_len(),
            classes,
        }
    }
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
    /// The first objects that close the pod, at most [`CLOSERS`]. For an open pod with denied names, what closes it to
    /// DNS servers that are no resolvers. Nothing if it is open otherwise, or closed for another reason than a policy.
    pub closed_by: Arc<[Closer]>,
    /// What stands for the endpoints of Services, see [`Self::with_services`].
    pub(super) services: Arc<[Added]>,
    /// The classes of its other rules: those of the policy without that, in the same order.
    pub(super) own: ClassSet,
    /// The policy without that, if there is any.
    pub(super) alone: Option<Arc<Compiled>>,
    /// The entries that decide about addresses, in the order in which they explain a decision.
    pub(super) deciding: Vec<Deciding>,
    pub(super) translators: Translators,
    /// The rules from which it was compiled.
    pub(super) source: Source,
}

/// The rules that a policy was compiled from; none for a policy without any. Policies are compared by the result.
#[derive(Clone, Debug)]
pub(super) struct Source(pub(super) Option<Arc<Effective>>);

impl PartialEq for Source {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Source {}

/// An entry that decides about packets to an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Deciding {
    /// The destination.
    pub(super) destination: Destination,
    /// The class of its packets.
    pub(super) class: u8,
    source: EntrySource,
}

/// The text of an entry, and where it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntrySource {
    /// Its text.
    pub text: Box<str>,
    /// The object in which it is written.
    pub origin: Origin,
    /// Its place there.
    pub at: At,
}

impl EntrySource {
    pub(super) fn of(rule: &Rule) -> Self {
        Self {
            text: rule.text.as_str().into(),
            origin: rule.origin.clone(),
            at: rule.at,
        }
    }
}

impl Compiled {
    /// The entry that put the address into the class with this number; the first one in a tier, and the most
    /// specific one of annotations and namespaced policies. A name's addresses are not compared: of several entries
    /// with names, it is the first.
    pub fn deciding_entry(&self, address: &Address, class: u8) -> Option<&EntrySource> {
        let of = |address: &Address| {
            let mut deciding = self.deciding.iter();
            deciding.find(|entry| entry.class == class && entry.destination.contains(address))
        };
        let behind = || of(&self.translators.v4_behind(address)?);
        let by_address = match of(address) {
            Some(entry) if entry.destination != Destination::Any => Some(entry),
            any => behind().or(any),
        };
        let named = || {
            let mut deciding = self.deciding.iter();
            let is_name = |entry: &&Deciding| matches!(entry.destination, Destination::Names(_));
            deciding.find(|entry| entry.class == class && is_name(entry))
        };
        by_address.or_else(named).map(|entry| &entry.source)
    }
}

/// Compiles all that concerns a pod.
///
/// # Errors
///
/// When any part of it cannot be parsed or exceeds a limit: half a policy is not a policy. The
/// lists are parsed in every mode, including `off`.
///
/// A panic is an error, too: otherwise one pod's policy could end the agent, which all pods need.
pub fn compile(inputs: Inputs<'_>, settings: &Settings) -> Result<Compiled, PolicyError> {
    std::panic::catch_unwind(|| compile_or_panic(inputs, settings))
        .unwrap_or_else(|_| Err(PolicyError::from_problem(Problem::Internal)))
        .map_err(|error| error.naming(inputs.objects))
}

fn compile_or_panic(inputs: Inputs<'_>, settings: &Settings) -> Result<Compiled, PolicyError> {
    let effective = effective::resolve(inputs, settings)?;
    build(&Arc::new(effective), settings, &[])
}

/// The form of these rules, and of what stands for the endpoints of Services.
pub(super) fn build(
    source: &Arc<Effective>,
    settings: &Settings,
    added: &[Added],
) -> Result<Compiled, PolicyError> {
    let Effective {
        mode,
        mode_by: _,
        open,
        mut closed_by,
        selected,
        mut tiers,
        mut allow,
        mut deny,
        resolve,
        mut warnings,
    } = Effective::clone(source);

    let ordered = !tiers.is_empty();
    let mut classes = Classes::new(ordered, &tiers, &allow, &deny)?;
    let mut own = classes.all();
    if !added.is_empty() {
        let moved = added::insert(added, &classes, &mut tiers, &mut allow, &mut deny);
        let with_added = Classes::new(ordered, &tiers, &allow, &deny)?;
        own = with_added.counterparts(&classes, |action| moved.action(action));
        classes = with_added;
    }
    let mut record = classes.record()?;
    record.flags = flags(settings)
        | if open { POLICY_OPEN } else { 0 }
        | if selected { POLICY_SELECTED } else { 0 };

    let mut prefixes = Vec::new();
    let mut listed: BTreeMap<NamePattern, NameRule> = BTreeMap::new();
    for (action, rule) in with_actions(&tiers, &allow, &deny) {
        let bit = classes.bit(action, rule);
        match &rule.destination {
            Destination::Any => record.any |= bit,
            Destination::Addresses(prefix) => prefixes.push((*prefix, bit)),
            Destination::Names(pattern) => {
                let name = listed.entry(pattern.clone()).or_default();
                if action.denies() {
                    name.denied.get_or_insert_with(|| EntrySource::of(rule));
                } else {
                    record.named |= bit;
                    // Under ordered rules, a name may be queried if it opens something.
                    name.queryable |= !ordered;
                }
                name.classes |= bit;
            }
        }
    }
    for rule in &resolve {
        if let Destination::Names(pattern) = &rule.destination {
            listed.entry(pattern.clone()).or_default().queryable = true;
        }
    }
    let cidrs: Vec<Cidr> = inherit(prefixes).into_iter().map(Cidr::of).collect();
    check_limit(PREFIXES, cidrs.len(), CIDR_ENTRIES as usize)?;

    record.names = fingerprint(&listed, settings);
    let openings = ordered.then(|| Openings::new(&record, &cidrs));
    let unlisted = match &openings {
        Some(openings) => {
            let asks_any = resolve
                .iter()
                .any(|rule| rule.destination == Destination::Any);
            let may_ask = asks_any && openings.may_open(ClassSet::EMPTY);
            if !settings.guard || may_ask || openings.opens(ClassSet::EMPTY) {
                QuestionRule::Allowed
            } else {
                QuestionRule::NotListed
            }
        }
        None => unlisted(&allow, &deny, &resolve, open, settings),
    };
    let denied_name = listed.values().find_map(|rule| rule.denied.as_ref());
    let denies_names = denied_name.is_some();
    if closed_by.is_empty()
        && let Some(entry) = denied_name
    {
        // An open pod is closed to DNS servers that are no resolvers.
        closed_by.push(Closer::Written(entry.origin.clone()));
    }
    if denies_names || unlisted == QuestionRule::NotListed {
        record.flags |= POLICY_SPEAKS_OF_NAMES;
        let of_tiers = tiers
            .rules()
            .filter(|(action, _)| *action == TierAction::Allow);
        warn_of_dns(of_tiers.map(|(_, rule)| rule).chain(&allow), &mut warnings);
    }
    let mut names = NameRules::new(settings, unlisted, openings);
    names.extend(listed);
    let mut ordered = tiers.rules();
    let closes = ordered.find(|(action, rule)| {
        let to_all = match &rule.destination {
            Destination::Any => true,
            Destination::Addresses(prefix) => prefix.is_whole_family(),
            Destination::Names(_) => false,
        };
        *action == TierAction::Deny && to_all && is_everything(&rule.class)
    });
    names.closed_by(closes.map(|(_, rule)| EntrySource::of(rule)));
    let deciding = deciding(&classes, &tiers, &allow, &deny);
    Ok(Compiled {
        mode,
        record,
        names,
        cidrs,
        warnings,
        closed_by: closed_by.into_iter().take(CLOSERS).collect(),
        services: added.into(),
        own,
        alone: None,
        deciding,
        translators: settings.translators.clone(),
        source: Source(Some(Arc::clone(source))),
    })
}

/// The policy of a pod whose annotations, or the lists of its namespace, could never be parsed. What they allow counts as
/// empty: everything external is denied that ordered rules do not allow, with a reason of its own. If `defaultMode` is
/// `audit`, denials are only reported, unless a readable `mode: enforce` is among the annotations or policies.
///
/// Of the objects, those with ordered rules count. What the namespace denies counts if all of its lists can be parsed.
pub fn unreadable(
    pod: &Annotations,
    namespace: &Annotations,
    objects: &Objects,
    settings: &Settings,
) -> Compiled {
    let mode = effective::mode_of_unreadable(pod, namespace, objects, settings);
    let denying = compile_closed(mode, namespace, &denials_only(objects), settings);
    let compiled = denying.or_else(|_| {
        let objects = Objects {
            namespace: Vec::new(),
            ..objects.clone()
        };
        compile_closed(mode, &Annotations::default(), &objects, settings)
    });
    let Ok(mut compiled) = compiled else {
        return unreadable_tiers(settings);
    };
    compiled.record.flags |= POLICY_UNREADABLE;
    compiled
}

/// The objects, with policies of the namespace that only deny.
fn denials_only(objects: &Objects) -> Objects {
    let policy = |policy: &Arc<NamespacePolicy>| {
        Arc::new(NamespacePolicy {
            mode: None,
            allow: Some(Vec::new()),
            resolve: None,
            ..NamespacePolicy::clone(policy)
        })
    };
    Objects {
        namespace: objects.namespace.iter().map(policy).collect(),
        ..objects.clone()
    }
}

/// The policy of a pod whose lists allow nothing, under these objects. Of the namespace's annotations only `deny` counts.
fn compile_closed(
    mode: Mode,
    namespace: &Annotations,
    objects: &Objects,
    settings: &Settings,
) -> Result<Compiled, PolicyError> {
    let closing = Annotations {
        allow: Some(String::new()),
        deny: namespace.deny.clone(),
        mode: (mode == Mode::Enforce).then(|| Mode::Enforce.as_str().to_owned()),
        ..Annotations::default()
    };
    let inputs = Inputs {
        pod: &Annotations::default(),
        namespace: &closing,
        objects,
    };
    compile(inputs, settings)
}

/// The policy of a pod whose ordered rules could never be parsed. They could deny anything, so everything is denied,
/// internal addresses too. If `defaultMode` is `audit`, denials are only reported.
pub fn unreadable_tiers(settings: &Settings) -> Compiled {
    let none = Annotations::default();
    Compiled {
        mode: effective::mode_of_unreadable(&none, &none, &Objects::default(), settings),
        ..closed_to_all(settings, POLICY_UNREADABLE)
    }
}

/// The policy of an interface whose pod is not known yet: everything external is denied, with a reason of its own. Of
/// the objects, those with ordered rules count, without their names: nothing is resolved yet. If these rules cannot be
/// compiled, internal addresses are denied, too.
pub fn unidentified(objects: &Objects, settings: &Settings) -> Compiled {
    let closed = closed(settings, POLICY_UNIDENTIFIED);
    let objects = without_names(objects);
    if objects.tiers.is_empty() {
        return closed;
    }
    let Ok(compiled) = compile_closed(Mode::Enforce, &Annotations::default(), &objects, settings)
    else {
        return closed_to_all(settings, POLICY_UNIDENTIFIED);
    };
    let mut record = compiled.record;
    record.flags |= closed.record.flags;
    Compiled {
        record,
        cidrs: compiled.cidrs,
        deciding: compiled.deciding,
        ..closed
    }
}

/// The objects with ordered rules, without entries for names and without rules that then match nothing.
fn without_names(objects: &Objects) -> Objects {
    let is_name = |entry: &str| {
        let read = read_entry(entry);
        read.is_ok_and(|entry| matches!(entry.destination, Destination::Names(_)))
    };
    let rule = |rule: &TierRule| {
        let entries = rule.entries.iter().filter(|entry| !is_name(entry));
        let entries: Vec<String> = entries.cloned().collect();
        let rule = TierRule {
            entries,
            ..rule.clone()
        };
        (!rule.entries.is_empty()).then_some(rule)
    };
    let policy = |policy: &Arc<TierPolicy>| {
        let rules: Vec<TierRule> = policy.rules.iter().filter_map(rule).collect();
        let policy = TierPolicy {
            rules,
            ..TierPolicy::clone(policy)
        };
        (!policy.rules.is_empty()).then(|| Arc::new(policy))
    };
    Objects {
        namespace: Vec::new(),
        tiers: objects.tiers.iter().filter_map(policy).collect(),
        sets: Arc::clone(&objects.sets),
    }
}

/// The policy of a pod whose namespace is not known yet. If `defaultMode` is `audit` and there is no
/// quarantine of interfaces, denials are only reported.
pub fn without_namespace(
    pod: &Annotations,
    quarantine: bool,
    objects: &Objects,
    settings: &Settings,
) -> Compiled {
    let mode = if quarantine {
        Mode::Enforce
    } else {
        effective::mode_of_unreadable(pod, &Annotations::default(), objects, settings)
    };
    Compiled {
        mode,
        ..unidentified(objects, settings)
    }
}

/// The policy of a pod that is closed because it has an interface that cannot be enforced. Internal
/// addresses are denied too, so that no data from them leaves through that interface.
pub fn refused(settings: &Settings) -> Compiled {
    closed_to_all(settings, POLICY_REFUSED)
}

/// A policy under which even internal addresses are denied.
fn closed_to_all(settings: &Settings, why: u32) -> Compiled {
    let settings = Settings {
        allow_internal: false,
        guard: true,
        ..settings.clone()
    };
    closed(&settings, why)
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
        names: NameRules::new(settings, unlisted, None),
        cidrs: Vec::new(),
        warnings: Vec::new(),
        closed_by: Arc::default(),
        services: Arc::default(),
        own: ClassSet::EMPTY,
        alone: None,
        deciding: Vec::new(),
        translators: settings.translators.clone(),
        source: Source(None),
    }
}

/// Warns of entries for DNS ports that open nothing under a policy with rules about names.
fn warn_of_dns<'a>(allow: impl Iterator<Item = &'a Rule>, warnings: &mut Vec<String>) {
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
        let [low, high] = rule.classes.words;
        hasher.write(format!("{pattern} {low:x} {high:x} {denied}\n").as_bytes());
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

/// The entries that decide about packets. In a tier the first one explains a decision, of lists the most specific one.
pub(super) fn deciding(
    classes: &Classes,
    tiers: &Tiers,
    allow: &[Rule],
    deny: &[Rule],
) -> Vec<Deciding> {
    let entry = |(action, rule): (Action, &Rule)| Deciding {
        destination: rule.destination.clone(),
        class: classes.bit(action, rule).first(),
        source: EntrySource::of(rule),
    };
    let no_tiers = Tiers::default();
    let mut lists: Vec<Deciding> = with_actions(&no_tiers, allow, deny)
        .filter(|(action, rule)| !classes.bit(*action, rule).is_empty())
        .map(entry)
        .collect();
    lists.sort_by_key(|entry| match entry.destination {
        Destination::Addresses(prefix) => Reverse(Some(prefix.prefix_len())),
        Destination::Any | Destination::Names(_) => Reverse(None),
    });
    let ordered = with_actions(tiers, &[], &[]).map(entry);
    ordered.chain(lists).collect()
}
