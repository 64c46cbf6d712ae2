//! Combines annotations, policy objects and the settings: the rules in effect for a pod.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use egress_common::records::PortClass;

use super::{
    Annotations, Inputs, Mode, PodAnnotations, Settings,
    annotations::{self, At, Lists, Written},
    closed::{Closer, ModeSource, closers},
    entry::{Destination, class_intersection, class_words, is_everything},
    entry_warnings,
    error::{Origin, PolicyError, Problem},
    limits::check_limit,
    objects::{Objects, TierAction},
    sets::{ENTRIES, Sets},
    tiers::{self, Tiers},
};

/// Most pairs of destinations that are compared for `podAnnotations: narrow`. Each takes some nanoseconds.
const PAIRS: usize = 4_000_000;

/// How many warnings are printed; the rest are only counted.
const WARNINGS: usize = 20;

/// A rule in effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) destination: Destination,
    /// The packets that it matches; unused for names that are denied or only resolved.
    pub(super) class: PortClass,
    /// Whether it is an address entry of a pod that takes effect because its namespace allows any
    /// destination. It opens no more than the namespace's entry does.
    pub(super) under_any: bool,
    /// The text of its entry.
    pub(super) text: String,
    /// The place of its entry.
    pub(super) at: At,
    pub(super) origin: Origin,
}

/// All rules in effect for a pod.
#[derive(Clone, Debug)]
pub(super) struct Effective {
    pub(super) mode: Mode,
    pub(super) mode_by: ModeSource,
    /// Whether packets that no rule matches pass.
    pub(super) open: bool,
    /// What closes the pod; nothing if it is open.
    pub(super) closed_by: Vec<Closer>,
    /// Whether the lists below close the pod, so that the last tier is asked only about internal destinations.
    pub(super) selected: bool,
    /// What precedes and follows the lists below.
    pub(super) tiers: Tiers,
    pub(super) allow: Vec<Rule>,
    pub(super) deny: Vec<Rule>,
    pub(super) resolve: Vec<Rule>,
    pub(super) warnings: Vec<String>,
}

/// Parses everything that concerns the pod, and determines which rules take effect.
pub(super) fn resolve(inputs: Inputs<'_>, settings: &Settings) -> Result<Effective, PolicyError> {
    let mut problems = Vec::new();
    let mut warnings = Vec::new();
    let sets = Sets::new(&inputs.objects.sets);
    let pod = annotations::read(inputs.pod, &Origin::Pod, &sets, &mut problems);
    let mut namespace =
        annotations::read(inputs.namespace, &Origin::Namespace, &sets, &mut problems);
    for policy in &inputs.objects.namespace {
        namespace.add(annotations::read_policy(policy, &sets, &mut problems));
    }
    let tiers = tiers::read(inputs.objects, &sets, &mut problems, &mut warnings);
    if sets.are_exceeded() {
        problems.push(Problem::AtLeast {
            what: "entries, with all that sets and CIDRs with exceptions stand for",
            limit: ENTRIES,
        });
    }
    if problems.is_empty() {
        super::limits::check_written(&[&pod, &namespace], &tiers, &mut problems);
    }
    if let Some(error) = PolicyError::from_problems(problems) {
        return Err(error);
    }
    if tiers.is_empty() {
        return of_teams(&pod, &namespace, settings, warnings);
    }
    under_tiers(tiers, &pod, &namespace, settings, warnings)
}

/// The rules of a pod that is under ordered rules. A team cannot loosen these: if its own mode is looser, its lists
/// do not count.
fn under_tiers(
    tiers: Tiers,
    pod: &Lists,
    namespace: &Lists,
    settings: &Settings,
    mut warnings: Vec<String>,
) -> Result<Effective, PolicyError> {
    // Without lists and modes the agent's default decides what no rule matches.
    let unspoken = Effective {
        mode: implied_mode(settings),
        mode_by: ModeSource::OrderedRules,
        open: settings.default_mode == Mode::Off,
        closed_by: match settings.default_mode {
            Mode::Off => Vec::new(),
            Mode::Audit | Mode::Enforce => vec![Closer::DefaultMode],
        },
        selected: false,
        tiers: Tiers::default(),
        allow: Vec::new(),
        deny: Vec::new(),
        resolve: Vec::new(),
        warnings: Vec::new(),
    };
    let is_spoken_of = |lists: &Lists| lists.has_rules() || lists.mode.is_some();
    let mut effective = if is_spoken_of(pod) || is_spoken_of(namespace) {
        let of_teams = of_teams(pod, namespace, settings, Vec::new())?;
        if of_teams.mode < unspoken.mode {
            warnings.push(format!(
                "the lists of the pod and its namespace do not count: their mode is {}, and objects with ordered \
                 rules, which select the pod, have the mode {}",
                of_teams.mode.as_str(),
                unspoken.mode.as_str()
            ));
            Effective {
                open: true,
                closed_by: Vec::new(),
                ..unspoken
            }
        } else {
            Effective {
                selected: !of_teams.open,
                ..of_teams
            }
        }
    } else {
        let Effective { resolve, .. } = of_teams(pod, namespace, settings, Vec::new())?;
        Effective {
            resolve,
            ..unspoken
        }
    };
    for (action, rule) in tiers.rules() {
        if action == TierAction::Allow {
            warnings.extend(entry_warnings::of_allowed(rule));
            warnings.extend(entry_warnings::of_tunnel(rule));
        }
        warnings.extend(entry_warnings::of_entry(rule));
    }
    warnings.append(&mut effective.warnings);
    Ok(Effective {
        tiers,
        warnings: capped(warnings),
        ..effective
    })
}

/// The rules of annotations and namespaced policies alone.
fn of_teams(
    pod: &Lists,
    namespace: &Lists,
    settings: &Settings,
    mut warnings: Vec<String>,
) -> Result<Effective, PolicyError> {
    let (mode, open) = mode_and_open(pod, namespace, settings, &mut warnings);
    let has_lists = pod.has_rules() || namespace.has_rules();

    let mut deny = deny_rules(namespace.deny.as_deref());
    let pod_allow = allow_rules(pod.allow.as_deref());
    let mut allow = allow_rules(namespace.allow.as_deref());
    let pod_resolve = resolve_rules(pod.resolve.as_deref());
    let mut resolve = resolve_rules(namespace.resolve.as_deref());
    match settings.pod_annotations {
        PodAnnotations::Grant => {
            allow.extend(pod_allow);
            resolve.extend(pod_resolve);
        }
        PodAnnotations::Narrow => {
            // A `*` beside a denial of everything opens nothing and allows no query, so
            // it covers no entry of a pod either.
            if denies_everything(&deny) {
                allow.retain(|rule| rule.destination != Destination::Any);
            }
            // The namespace's lists decide which names may be queried, even if the pod reaches fewer
            // destinations.
            let queryable: Vec<Rule> = allow
                .iter()
                .chain(&resolve)
                .cloned()
                .map(name_only)
                .collect();
            resolve.extend(narrowed(
                pod_resolve,
                &queryable,
                "resolve",
                settings,
                &mut warnings,
            )?);
            if pod.allow.is_some() {
                allow = narrowed(pod_allow, &allow, "allow", settings, &mut warnings)?;
            }
        }
        PodAnnotations::Ignore => {
            for (list, key) in [(&pod.allow, "allow"), (&pod.resolve, "resolve")] {
                if list.is_some() {
                    warnings.push(format!(
                        "the pod's {key} grants nothing: the agent's configuration says \
                         podAnnotations: ignore"
                    ));
                }
            }
        }
    }
    deny.extend(deny_rules(pod.deny.as_deref()));
    for rule in &allow {
        warnings.extend(entry_warnings::of_allowed(rule));
        warnings.extend(entry_warnings::of_tunnel(rule));
    }
    for rule in allow.iter().chain(&deny).chain(&resolve) {
        warnings.extend(entry_warnings::of_entry(rule));
    }
    Ok(Effective {
        mode,
        mode_by: ModeSource::of(mode, pod, namespace),
        open,
        closed_by: if open || mode == Mode::Off && !has_lists {
            Vec::new()
        } else {
            closers(pod, namespace)
        },
        selected: false,
        tiers: Tiers::default(),
        allow,
        deny,
        resolve,
        warnings: capped(warnings),
    })
}

/// The mode of a pod that has rules, and no mode of its own or of its namespace.
fn implied_mode(settings: &Settings) -> Mode {
    match settings.default_mode {
        // Then only an explicit `mode: enforce` enforces.
        Mode::Audit => Mode::Audit,
        Mode::Off | Mode::Enforce => Mode::Enforce,
    }
}

/// The mode, and whether packets that no rule matches pass.
fn mode_and_open(
    pod: &Lists,
    namespace: &Lists,
    settings: &Settings,
    warnings: &mut Vec<String>,
) -> (Mode, bool) {
    let only_denies = pod.allow.is_none()
        && namespace.allow.is_none()
        && (pod.deny.is_some() || namespace.deny.is_some());
    let implied = |has_rules: bool| has_rules.then(|| implied_mode(settings));
    if settings.pod_annotations == PodAnnotations::Grant {
        let mode = pod
            .mode
            .or(namespace.mode)
            .or(implied(pod.has_rules() || namespace.has_rules()))
            .unwrap_or(settings.default_mode);
        return (mode, only_denies);
    }
    // The mode of the pod without annotations of its own. The pod can only tighten it.
    let without = namespace
        .mode
        .or(implied(namespace.has_rules()))
        .unwrap_or(settings.default_mode);
    let own = pod.mode.or(if namespace.mode.is_none() {
        implied(pod.has_rules())
    } else {
        None
    });
    if let Some(mode) = pod.mode
        && mode < without
    {
        warnings.push(format!(
            "the pod's mode {} does not count: without it the mode is {}, and a pod can only tighten that",
            mode.as_str(),
            without.as_str()
        ));
    }
    // A `deny` of its own does not open a pod that is closed because there is no list. This applies in audit
    // mode too: otherwise the report would lack packets that enforcement would drop.
    let closed_without = without != Mode::Off && !namespace.has_rules();
    (
        own.map_or(without, |own| own.max(without)),
        only_denies && !closed_without,
    )
}

/// The mode of a pod that is closed because its annotations, or the lists of its namespace, cannot be parsed. If
/// `defaultMode` is `audit`, only a readable `mode: enforce` enforces.
pub(super) fn mode_of_unreadable(
    pod: &Annotations,
    namespace: &Annotations,
    objects: &Objects,
    settings: &Settings,
) -> Mode {
    if settings.default_mode != Mode::Audit {
        return Mode::Enforce;
    }
    let written = |annotations: &Annotations| annotations.mode.as_deref().and_then(Mode::from_text);
    let of_policies = objects.namespace.iter().filter_map(|policy| policy.mode);
    let (pod, namespace) = (written(pod), written(namespace).max(of_policies.max()));
    let mode = match settings.pod_annotations {
        PodAnnotations::Grant => pod.or(namespace),
        PodAnnotations::Narrow | PodAnnotations::Ignore => pod.max(namespace),
    };
    mode.unwrap_or(Mode::Audit).max(Mode::Audit)
}

fn rules(list: Option<&[Written]>, class: impl Fn(&Written) -> PortClass) -> Vec<Rule> {
    // Entries that differ only in spelling are the same rule.
    let mut seen = BTreeSet::new();
    let rule = |written: &Written| Rule {
        destination: written.entry.destination.clone(),
        class: class(written),
        under_any: false,
        text: written.text.clone(),
        at: written.at,
        origin: written.origin.clone(),
    };
    let rules = list.unwrap_or_default().iter().map(rule);
    rules
        .filter(|rule| seen.insert((rule.destination.clone(), rule.class)))
        .collect()
}

pub(super) fn allow_rules(list: Option<&[Written]>) -> Vec<Rule> {
    rules(list, |written| written.entry.allowed_class())
}

pub(super) fn deny_rules(list: Option<&[Written]>) -> Vec<Rule> {
    rules(list, |written| written.entry.denied_class())
}

fn resolve_rules(list: Option<&[Written]>) -> Vec<Rule> {
    rules(list, |_| ANY_CLASS)
}

/// Class of rules that are only about names.
const ANY_CLASS: PortClass = PortClass {
    port_max: u16::MAX,
    protocols: egress_common::protocol::bits::ALL,
    ..PortClass::NONE
};

/// Whether a rule denies every packet to every destination.
pub(super) fn denies_everything(deny: &[Rule]) -> bool {
    deny.iter()
        .any(|rule| rule.destination == Destination::Any && is_everything(&rule.class))
}

fn name_only(rule: Rule) -> Rule {
    Rule {
        class: ANY_CLASS,
        ..rule
    }
}

/// The intersection of a pod's destination with one of its namespace, whether it is
/// [`Rule::under_any`], and the namespace's classes for it.
type Common<'a> = (Destination, bool, &'a BTreeSet<PortClass>);

/// The parts of the pod's rules that the namespace's rules cover.
fn narrowed(
    pod: Vec<Rule>,
    namespace: &[Rule],
    key: &str,
    settings: &Settings,
    warnings: &mut Vec<String>,
) -> Result<Vec<Rule>, PolicyError> {
    // Compare the patterns once for each pair of destinations, however many ports they have.
    let mut given: BTreeMap<&Destination, BTreeSet<PortClass>> = BTreeMap::new();
    for rule in namespace {
        given
            .entry(&rule.destination)
            .or_default()
            .insert(rule.class);
    }
    let destinations: BTreeSet<&Destination> = pod.iter().map(|rule| &rule.destination).collect();
    check_limit(
        "pairs of a destination of the pod and one of its namespace (podAnnotations: narrow)",
        destinations.len() * given.len(),
        PAIRS,
    )?;
    let mut common: HashMap<Destination, Vec<Common<'_>>> = HashMap::new();
    let mut narrowed = Vec::new();
    for rule in pod {
        let common = common.entry(rule.destination.clone()).or_insert_with(|| {
            let common = |given| common_destination(&rule.destination, given, settings);
            let is_address = matches!(rule.destination, Destination::Addresses(_));
            given
                .iter()
                .filter_map(|(to, classes)| {
                    let under_any = is_address && **to == Destination::Any;
                    Some((common(to)?, under_any, classes))
                })
                .collect()
        });
        let parts: BTreeSet<(Destination, PortClass, bool)> = common
            .iter()
            .flat_map(|(destination, under_any, classes)| {
                let both = classes
                    .iter()
                    .filter_map(|class| class_intersection(&rule.class, class));
                both.map(|class| (destination.clone(), class, *under_any))
            })
            .collect();
        let is_whole = |(destination, class, _): &(Destination, PortClass, bool)| {
            *destination == rule.destination && *class == rule.class
        };
        if parts.is_empty() {
            warnings.push(format!(
                "the pod's {key} entry `{}` does not count: its namespace's list does not cover it \
                 (podAnnotations: narrow): add it there, too, or remove it here",
                rule.text
            ));
        } else if !parts.iter().any(is_whole) {
            let parts: Vec<String> = parts
                .iter()
                .take(WARNINGS)
                .map(|(destination, class, _)| format!("{destination} ({})", class_words(class)))
                .collect();
            warnings.push(format!(
                "the pod's {key} entry `{}` counts only where its namespace's list covers it: {}",
                rule.text,
                parts.join(", ")
            ));
        }
        narrowed.extend(
            parts
                .into_iter()
                .map(|(destination, class, under_any)| Rule {
                    destination,
                    class,
                    under_any,
                    text: rule.text.clone(),
                    at: rule.at,
                    origin: Origin::Pod,
                }),
        );
        if narrowed.len() > ENTRIES {
            return Err(PolicyError::from_problem(Problem::AtLeast {
                what: "entries of the pod that its namespace's list covers, each counted for every entry there",
                limit: ENTRIES,
            }));
        }
    }
    Ok(narrowed)
}

/// The intersection of two destinations; `None` if it is empty, or if it cannot be determined
/// (two patterns of which neither covers the other; a name and an address).
fn common_destination(
    pod: &Destination,
    namespace: &Destination,
    settings: &Settings,
) -> Option<Destination> {
    match (pod, namespace) {
        (Destination::Any, given) => Some(given.clone()),
        // `*` does not open protected addresses, so it does not cover a pod's entry for them either.
        (Destination::Addresses(prefix), Destination::Any) => {
            let behind = settings.translators.v4_prefix_behind(prefix);
            let opens_protected = settings.protected.iter().any(|other| {
                other.intersection(prefix).is_some()
                    || behind.is_some_and(|behind| other.intersection(&behind).is_some())
            });
            (!opens_protected).then_some(Destination::Addresses(*prefix))
        }
        (Destination::Names(_), Destination::Any) => Some(pod.clone()),
        (Destination::Addresses(a), Destination::Addresses(b)) => {
            a.intersection(b).map(Destination::Addresses)
        }
        (Destination::Names(a), Destination::Names(b)) => {
            if b.covers(a) {
                Some(pod.clone())
            } else if a.covers(b) {
                Some(namespace.clone())
            } else {
                None
            }
        }
        (Destination::Addresses(_), Destination::Names(_))
        | (Destination::Names(_), Destination::Addresses(_)) => None,
    }
}

fn capped(mut warnings: Vec<String>) -> Vec<String> {
    let more = warnings.len().saturating_sub(WARNINGS);
    if more > 0 {
        warnings.truncate(WARNINGS);
        warnings.push(format!("and {more} more warnings"));
    }
    warnings
}
