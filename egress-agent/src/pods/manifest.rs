//! Reads manifests of Pods, Namespaces and policy objects.

use std::borrow::Cow;

use k8s_openapi::api::core::v1;
use serde::{Deserialize, de::DeserializeOwned};
use serde_saphyr::{Localizer, Location, Spanned, UserMessageFormatter};

use super::{
    Problem,
    documents::{Document, documents},
    object::{Namespace, Object, PodObject, PolicyManifest},
    policies::PolicyKind,
    workload::{Workload, WorkloadManifest},
    yaml_hint::hint,
};

/// The objects and problems of a file.
#[derive(Debug, Default)]
pub(super) struct Manifests {
    pub(super) objects: Vec<Object>,
    pub(super) problems: Vec<Problem>,
    /// Whether a part could not be read, so that objects may be missing.
    pub(super) unreadable: bool,
    /// Whether they are read for people who write policies: see [`Self::read_for_check`].
    pub(super) for_check: bool,
    /// For these people, the kinds of documents that are not read.
    pub(super) ignored: Vec<String>,
}

impl Manifests {
    /// Reads the text of a file; `file` is its name, for messages.
    pub(super) fn read(file: &str, text: &str) -> Self {
        Self::default().of(file, text)
    }

    /// The same, for people who write policies. A workload is read as a pod of its template. A document of another kind
    /// and a pod without an interface are no problems.
    pub(super) fn read_for_check(file: &str, text: &str) -> Self {
        let manifests = Self {
            for_check: true,
            ..Self::default()
        };
        manifests.of(file, text)
    }

    fn of(mut self, file: &str, text: &str) -> Self {
        let manifests = &mut self;
        for document in documents(text) {
            if let Err(problem) = manifests.read_document(file, document) {
                manifests.unreadable = true;
                manifests.problems.push(problem);
            }
        }
        self
    }

    fn read_document(&mut self, file: &str, document: Document<'_>) -> Result<(), Problem> {
        let origin = format!("{file}:{}", document.first_line);
        let Some(type_meta) = parse::<Option<TypeMeta>>(file, document, "document")? else {
            return Ok(());
        };
        match type_meta.kind(&origin)? {
            Kind::Pod => self.add_pod(&origin, parse(file, document, "Pod")?),
            Kind::Namespace => self.add_namespace(&origin, parse(file, document, "Namespace")?),
            Kind::Policy(kind) => {
                self.add_policy(&origin, kind, parse(file, document, kind.name())?)
            }
            Kind::List(of) => {
                let list = parse::<List>(file, document, "List")?;
                for item in list.items {
                    let line = document.lines_before as u64 + item.defined.line();
                    let origin = format!("{file}:{line}");
                    if let Err(problem) = self.read_item(origin, of.as_deref(), item.value) {
                        self.unreadable = true;
                        self.problems.push(problem);
                    }
                }
                Ok(())
            }
            Kind::Other(kind) => match self.workload(&kind) {
                Some(workload) => {
                    self.add_workload(&origin, workload, parse(file, document, &kind)?)
                }
                None => {
                    self.ignore(origin, &kind);
                    Ok(())
                }
            },
        }
    }

    /// The workload of this apiVersion and kind, if workloads are read.
    fn workload(&self, kind: &str) -> Option<Workload> {
        Workload::of(kind).filter(|_| self.for_check)
    }

    fn add_workload(
        &mut self,
        origin: &str,
        workload: Workload,
        manifest: WorkloadManifest,
    ) -> Result<(), Problem> {
        let pod = PodObject::of_template(origin, workload.word(), manifest.pod(origin)?)?;
        self.objects.push(Object::Pod(Box::new(pod)));
        Ok(())
    }

    fn read_item(
        &mut self,
        origin: String,
        of: Option<&Kind>,
        item: serde_json::Value,
    ) -> Result<(), Problem> {
        let type_meta: TypeMeta = convert(&origin, item.clone())?;
        let kind = match of {
            // The items of a PodList need no kind.
            Some(kind) if type_meta.kind.is_none() => kind.clone(),
            _ => type_meta.kind(&origin)?,
        };
        match kind {
            Kind::Pod => {
                let pod = convert(&origin, item)?;
                self.add_pod(&origin, pod)
            }
            Kind::Namespace => {
                let namespace = convert(&origin, item)?;
                self.add_namespace(&origin, namespace)
            }
            Kind::Policy(kind) => {
                let policy = convert(&origin, item)?;
                self.add_policy(&origin, kind, policy)
            }
            Kind::List(_) => Err(Problem {
                origin,
                message: "a List inside a List is not read".into(),
            }),
            Kind::Other(kind) => match self.workload(&kind) {
                Some(workload) => {
                    let manifest = convert(&origin, item)?;
                    self.add_workload(&origin, workload, manifest)
                }
                None => {
                    self.ignore(origin, &kind);
                    Ok(())
                }
            },
        }
    }

    fn add_pod(&mut self, origin: &str, pod: v1::Pod) -> Result<(), Problem> {
        let (pod, mut problems) = PodObject::read(origin, pod)?;
        if self.for_check && pod.pod.interface.is_none() && !pod.incomplete {
            // That there is nothing to enforce on is a matter of the node.
            problems.pop();
        }
        self.objects.push(Object::Pod(Box::new(pod)));
        self.problems.extend(problems);
        Ok(())
    }

    fn add_namespace(&mut self, origin: &str, namespace: v1::Namespace) -> Result<(), Problem> {
        self.objects
            .push(Object::Namespace(Namespace::read(origin, namespace)?));
        Ok(())
    }

    fn add_policy(
        &mut self,
        origin: &str,
        kind: PolicyKind,
        policy: PolicyManifest,
    ) -> Result<(), Problem> {
        let (object, problem) = policy.read(origin, kind)?;
        self.objects.push(object);
        self.problems.extend(problem);
        Ok(())
    }

    fn ignore(&mut self, origin: String, kind: &str) {
        if self.for_check {
            self.ignored.push(kind.to_owned());
            return;
        }
        let policies = PolicyKind::ALL.map(PolicyKind::name).join(", ");
        let message =
            format!("ignored: kind {kind}; only v1 Pod, Namespace, List, {policies} are read");
        self.problems.push(Problem { origin, message });
    }
}

#[derive(Deserialize)]
struct TypeMeta {
    #[serde(rename = "apiVersion")]
    api_version: Option<String>,
    kind: Option<String>,
}

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    items: Vec<Spanned<serde_json::Value>>,
}

#[derive(Clone)]
enum Kind {
    Pod,
    Namespace,
    Policy(PolicyKind),
    /// The kind of the items is set if the list's own kind defines it.
    List(Option<Box<Kind>>),
    Other(String),
}

impl TypeMeta {
    fn kind(self, origin: &str) -> Result<Kind, Problem> {
        let wrong = |message: String| Problem {
            origin: origin.to_owned(),
            message,
        };
        let kind = self.kind.ok_or_else(|| {
            wrong(
                "the document has no kind; expected a v1 Pod, Namespace or List, or a policy"
                    .into(),
            )
        })?;
        let api_version = self
            .api_version
            .ok_or_else(|| wrong(format!("the {kind} has no apiVersion; expected \"v1\"")))?;
        if api_version != "v1" {
            let policy = policy_kind(&api_version, &kind).map_err(wrong)?;
            let other = || Kind::Other(format!("{api_version} {kind}"));
            return Ok(policy.unwrap_or_else(other));
        }
        Ok(match &*kind {
            "Pod" => Kind::Pod,
            "Namespace" => Kind::Namespace,
            "List" => Kind::List(None),
            "PodList" => Kind::List(Some(Box::new(Kind::Pod))),
            "NamespaceList" => Kind::List(Some(Box::new(Kind::Namespace))),
            other => {
                // A spelling mistake must not look like a pod that was removed.
                for meant in ["Pod", "Namespace", "List", "PodList", "NamespaceList"] {
                    if other.eq_ignore_ascii_case(meant) {
                        return Err(wrong(format!("kind {other} must be written {meant}")));
                    }
                }
                Kind::Other(kind)
            }
        })
    }
}

/// The kind of policy object; `None` if it is none. The message is for one that would be a policy if it were written
/// correctly: that must not look like a policy that was removed.
fn policy_kind(api_version: &str, kind: &str) -> Result<Option<Kind>, String> {
    let (group, version) = api_version.split_once('/').unwrap_or((api_version, ""));
    let one = kind.strip_suffix("List").unwrap_or(kind);
    let mut kinds = PolicyKind::ALL.into_iter();
    let Some(policy) = kinds.find(|of| of.group() == group && of.name().eq_ignore_ascii_case(one))
    else {
        return Ok(None);
    };
    if policy.name() != one {
        return Err(format!("kind {kind} must be written {}", policy.name()));
    }
    if policy.version() != version {
        return Err(format!(
            "the {kind} has the apiVersion {api_version:?}: expected \"{group}/{}\"",
            policy.version()
        ));
    }
    let is_list = one != kind;
    let policy = Kind::Policy(policy);
    Ok(Some(if is_list {
        Kind::List(Some(Box::new(policy)))
    } else {
        policy
    }))
}

/// Parses a document as `what`. Limits prevent anchors and aliases from expanding without bound.
fn parse<T: DeserializeOwned>(
    file: &str,
    document: Document<'_>,
    what: &str,
) -> Result<T, Problem> {
    let options = serde_saphyr::options! {
        with_snippet: false,
        // `off` is a mode, not `false`.
        strict_booleans: true,
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 10_000 },
    };
    serde_saphyr::from_str_with_options(document.text, options).map_err(|error| {
        let formatter = UserMessageFormatter.with_localizer(&WithoutLocation);
        let message = error.without_snippet().render_with_formatter(&formatter);
        let origin = match error.location() {
            Some(at) => {
                let line = document.lines_before as u64 + at.line();
                format!("{file}:{line}:{}", at.column())
            }
            None => format!("{file}:{}", document.first_line),
        };
        let line = error.location().map(|at| at.line() as usize);
        let hint = line.and_then(|line| hint(document.text, line));
        let hint = hint.map(|hint| format!("; {hint}")).unwrap_or_default();
        Problem {
            origin,
            message: format!("the {what} cannot be read: {message}{hint}"),
        }
    })
}

fn convert<T: DeserializeOwned>(origin: &str, item: serde_json::Value) -> Result<T, Problem> {
    serde_json::from_value(item).map_err(|error| Problem {
        origin: origin.to_owned(),
        message: format!("the List's item cannot be read: {error}"),
    })
}

/// Omits the line and column of the parser, which count from the beginning of the document: the problem's
/// origin has those of the file.
struct WithoutLocation;

impl Localizer for WithoutLocation {
    fn attach_location<'a>(&self, base: Cow<'a, str>, _: Location) -> Cow<'a, str> {
        base
    }
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
