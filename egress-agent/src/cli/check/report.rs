//! The result of `check` over all files, before it is written in one of the formats.

use std::collections::{BTreeMap, HashMap};

use egress_policy::{
    Annotations, DescribedRule, Description, Inputs, Origin, PolicyError, Problem as PolicyProblem,
    Settings, check_destinations, describe,
};

use super::{
    super::texts::Text,
    finding::{Finding, Severity, Topic},
};
use crate::pods::{self, Checked, NO_ADDRESS, Place, Places, Pod, Problem, kind_and_name};

/// Workloads and findings.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) workloads: Vec<Workload>,
    pub(super) findings: Vec<Finding>,
    /// How many documents of each other kind there are.
    pub(super) ignored: BTreeMap<String, usize>,
    /// Whether warnings are failures.
    pub(super) strict: bool,
}

/// A workload, or a pod.
#[derive(Debug)]
pub(super) struct Workload {
    pub(super) kind: &'static str,
    pub(super) namespace: String,
    pub(super) name: String,
    /// `namespace/name`, with the kind of a workload.
    pub(super) title: String,
    pub(super) place: Place,
    pub(super) host_network: bool,
    /// What its pods may reach; `None` if that cannot be read.
    pub(super) description: Option<Description>,
    /// Objects that the files lack and that might change the answer.
    pub(super) missing: Vec<String>,
}

impl Report {
    pub(super) fn new(
        texts: &[Text],
        errors: &[anyhow::Error],
        settings: &Settings,
        strict: bool,
    ) -> Self {
        let texts = || texts.iter().map(|of| (&*of.name, &*of.text));
        let checked = pods::read_for_check(texts());
        let mut building = Building {
            places: Places::new(texts()),
            checked: &checked,
            findings: Vec::new(),
            seen: HashMap::new(),
        };
        for error in errors {
            building.file(format!("{error:#}"));
        }
        for problem in &checked.snapshot.problems {
            building.problem(Topic::Manifest, problem);
        }
        for problem in &checked.of_cluster {
            building.problem(Topic::Cluster, problem);
        }
        let pods = checked.snapshot.pods.values();
        let workloads: Vec<Workload> = pods.map(|pod| building.workload(pod, settings)).collect();
        building.objects(settings);
        let has_objects = !checked.policies.is_empty() || !checked.sets.is_empty();
        if workloads.is_empty() && !has_objects && !building.has(Severity::Error) {
            building.nothing();
        }
        Self {
            workloads,
            findings: building.findings,
            ignored: checked.ignored,
            strict,
        }
    }

    /// How many findings have this severity.
    pub(super) fn count(&self, severity: Severity) -> usize {
        let findings = self.findings.iter();
        findings
            .filter(|finding| finding.topic.severity() == severity)
            .count()
    }

    /// Whether nothing is wrong.
    pub(super) fn is_success(&self) -> bool {
        let warns = self.strict && self.count(Severity::Warning) > 0;
        self.count(Severity::Error) == 0 && !warns
    }
}

struct Building<'a> {
    places: Places<'a>,
    checked: &'a Checked,
    findings: Vec<Finding>,
    /// The findings about policy objects, by place and message: every workload that an object selects has them.
    seen: HashMap<(String, String), usize>,
}

impl Building<'_> {
    fn has(&self, severity: Severity) -> bool {
        let mut findings = self.findings.iter();
        findings.any(|finding| finding.topic.severity() == severity)
    }

    fn add(&mut self, topic: Topic, place: Option<Place>, message: String) {
        self.findings.push(Finding {
            topic,
            origin: place.as_ref().map(Place::to_string).unwrap_or_default(),
            place,
            workload: None,
            message,
            excerpt: None,
            further: 0,
        });
    }

    /// A file that cannot be read: `name: why`.
    fn file(&mut self, message: String) {
        match message.split_once(": ") {
            Some((file, what)) => {
                let place = Place {
                    file: file.to_owned(),
                    line: None,
                    column: None,
                };
                self.add(Topic::File, Some(place), what.to_owned());
            }
            None => self.add(Topic::File, None, message),
        }
    }

    fn problem(&mut self, topic: Topic, problem: &Problem) {
        let Problem { origin, message } = problem;
        self.add(topic, Some(Place::of_origin(origin)), message.clone());
        // A message about a part of an object names its path.
        let path = message.split([' ', ':', ',', ';']);
        let path = path.into_iter().find(|word| word.starts_with("spec."));
        if let (Some(path), Some(last)) = (path, self.findings.last_mut()) {
            last.place = Some(self.places.field(origin, path, None));
        }
    }

    fn nothing(&mut self) {
        let message = "no Pod, no workload and no policy in these files".to_owned();
        self.add(Topic::Nothing, None, message);
    }

    fn workload(&mut self, pod: &Pod, settings: &Settings) -> Workload {
        let title = pod.key().to_string();
        let own = Annotations::from_map(&pod.annotations);
        let inherited = Annotations::from_map(&pod.namespace_annotations);
        let inputs = Inputs {
            pod: &own,
            namespace: &inherited,
            objects: &pod.objects,
        };
        let description = match describe(inputs, settings) {
            Ok(mut description) => {
                if pod.addresses.is_empty() && pod.interface.is_some() {
                    description.warnings.push(NO_ADDRESS.to_owned());
                }
                self.warnings(pod, &title, &description);
                Some(description)
            }
            Err(error) => {
                self.unreadable(pod, &title, &error, [&own, &inherited]);
                None
            }
        };
        let (kind, name) = kind_and_name(&pod.name);
        let mut missing = Vec::new();
        if !self.checked.namespaces.contains_key(&pod.namespace) {
            missing.push(format!(
                "Namespace {}, with its labels and annotations",
                pod.namespace
            ));
        }
        Workload {
            kind,
            namespace: pod.namespace.clone(),
            name: name.to_owned(),
            title,
            place: Place::of_origin(&pod.origin),
            host_network: pod.host_network,
            description,
            missing,
        }
    }

    fn warnings(&mut self, pod: &Pod, title: &str, description: &Description) {
        for warning in &description.warnings {
            let rule = rule_of(warning, description);
            let place = match rule {
                Some(rule) => self.place(
                    pod,
                    &rule.origin,
                    &rule.path(),
                    Some((rule.at.line, rule.at.column)),
                ),
                None => Place::of_origin(&pod.origin),
            };
            self.of_workload(
                Finding {
                    topic: Topic::Meaning,
                    place: Some(place),
                    origin: pod.origin.clone(),
                    workload: Some(title.to_owned()),
                    message: warning.clone(),
                    excerpt: None,
                    further: 0,
                },
                rule.is_some_and(|rule| rule.origin.object().is_some()),
            );
        }
    }

    fn unreadable(
        &mut self,
        pod: &Pod,
        title: &str,
        error: &PolicyError,
        [own, inherited]: [&Annotations; 2],
    ) {
        for problem in error.problems() {
            let message = message_of(problem);
            let (place, is_of_object) = match problem {
                PolicyProblem::Value { origin, key, what } => (
                    self.place(pod, origin, key, Some((what.line, what.column))),
                    origin.object().is_some(),
                ),
                PolicyProblem::Key { origin, key, .. } => {
                    (self.place(pod, origin, key, None), false)
                }
                PolicyProblem::Limit { .. }
                | PolicyProblem::AtLeast { .. }
                | PolicyProblem::Internal => (Place::of_origin(&pod.origin), false),
            };
            self.of_workload(
                Finding {
                    topic: Topic::Policy,
                    place: Some(place),
                    origin: pod.origin.clone(),
                    workload: Some(title.to_owned()),
                    message,
                    excerpt: problem.excerpt(own, inherited),
                    further: 0,
                },
                is_of_object,
            );
        }
    }

    /// Reads the policies and sets that concern no workload. The problems of all others have been found already.
    fn objects(&mut self, settings: &Settings) {
        let none = Annotations::default();
        let checked = self.checked;
        for (name, objects) in &checked.alone {
            let inputs = Inputs {
                pod: &none,
                namespace: &none,
                objects,
            };
            let (topic, messages) = match describe(inputs, settings) {
                Ok(description) => (Topic::Meaning, with_places(&description)),
                Err(error) => (
                    Topic::Policy,
                    error.problems().iter().map(in_object).collect(),
                ),
            };
            let Some(origin) = checked.policies.get(name) else {
                continue;
            };
            for (message, at) in messages {
                let place = match at {
                    Some((path, at)) => self.places.field(origin, &path, Some(at)),
                    None => Place::of_origin(origin),
                };
                self.of_object(topic, place, origin, message);
            }
        }
        for (name, (origin, destinations)) in &checked.sets {
            for (number, column, message) in check_destinations(destinations) {
                let path = "spec.destinations";
                let place = self.places.field(origin, path, Some((number, column)));
                let message = format!("EgressSet {name}, {path}[{}]: {message}", number - 1);
                self.of_object(Topic::Policy, place, origin, message);
            }
        }
    }

    /// Adds what is wrong with an object, unless a workload has it already.
    fn of_object(&mut self, topic: Topic, place: Place, origin: &str, message: String) {
        let key = (place.to_string(), message.clone());
        if !self.seen.contains_key(&key) {
            self.seen.insert(key, self.findings.len());
            self.findings.push(Finding {
                topic,
                place: Some(place),
                origin: origin.to_owned(),
                workload: None,
                message,
                excerpt: None,
                further: 0,
            });
        }
    }

    /// Adds a finding. What is written in a policy object is found again for each workload that it selects.
    fn of_workload(&mut self, finding: Finding, is_of_object: bool) {
        if !is_of_object {
            self.findings.push(finding);
            return;
        }
        let place = finding.place.as_ref().map(Place::to_string);
        let key = (place.unwrap_or_default(), finding.message.clone());
        match self.seen.get(&key) {
            Some(&index) => self.findings[index].further += 1,
            None => {
                self.seen.insert(key, self.findings.len());
                self.findings.push(finding);
            }
        }
    }

    /// The place of an entry, or of a key.
    fn place(&self, pod: &Pod, origin: &Origin, path: &str, at: Option<(usize, usize)>) -> Place {
        match origin {
            Origin::Pod => self.places.annotation(&pod.origin, path, at),
            Origin::Namespace => {
                let namespace = self.checked.namespaces.get(&pod.namespace);
                let namespace = namespace.unwrap_or(&pod.origin);
                self.places.annotation(namespace, path, at)
            }
            Origin::Policy(_) | Origin::Rule(_) | Origin::Service(_) => {
                let object = origin.object();
                let object = object.and_then(|name| self.checked.policies.get(name));
                self.places.field(object.unwrap_or(&pod.origin), path, at)
            }
        }
    }
}

/// A message, and the path, line and column that it is about.
type Message = (String, Option<(String, (usize, usize))>);

fn message_of(problem: &PolicyProblem) -> String {
    let mut message = problem.to_string();
    if message.contains("there is no EgressSet named") {
        message.push_str("; if the cluster has one, give its manifest, too");
    }
    message
}

fn in_object(problem: &PolicyProblem) -> Message {
    let at = match problem {
        PolicyProblem::Value { key, what, .. } => Some((key.clone(), (what.line, what.column))),
        PolicyProblem::Key { .. }
        | PolicyProblem::Limit { .. }
        | PolicyProblem::AtLeast { .. }
        | PolicyProblem::Internal => None,
    };
    (message_of(problem), at)
}

fn with_places(description: &Description) -> Vec<Message> {
    let warnings = description.warnings.iter();
    warnings
        .map(|warning| {
            let rule = rule_of(warning, description);
            let at = rule.map(|rule| (rule.path(), (rule.at.line, rule.at.column)));
            (warning.clone(), at)
        })
        .collect()
}

/// The rule that a warning is about, which it quotes.
fn rule_of<'a>(warning: &str, description: &'a Description) -> Option<&'a DescribedRule> {
    let mut rules = description.rules.iter();
    rules.find(|rule| {
        warning.contains(&format!("`{}`", rule.entry)) && warning.contains(&rule.origin.to_string())
    })
}
