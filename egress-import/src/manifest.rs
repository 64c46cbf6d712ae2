//! Reads the documents of a file.

use std::collections::BTreeMap;

use serde_json::Value;
use serde_saphyr::{Spanned, UserMessageFormatter};

use crate::{Problem, fields::Fields};

/// An object that was read.
#[derive(Clone, Debug)]
pub(crate) struct Manifest {
    /// File and line.
    pub(crate) origin: String,
    /// The API group, without its version; empty for the core group.
    pub(crate) group: String,
    pub(crate) kind: String,
    /// Empty if it has none.
    pub(crate) name: String,
    pub(crate) namespace: Option<String>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) value: Value,
}

impl Manifest {
    /// Kind, namespace and name, for messages.
    pub(crate) fn source(&self) -> String {
        match &self.namespace {
            _ if self.name.is_empty() => format!("{} without a name", self.kind),
            Some(namespace) => format!("{} {namespace}/{}", self.kind, self.name),
            None => format!("{} {}", self.kind, self.name),
        }
    }

    /// Its fields.
    pub(crate) fn field(&self, key: &str) -> Result<Fields<'_>, String> {
        Fields::new(self.value.get(key).unwrap_or(&Value::Null), key)
    }

    /// The field `spec`.
    pub(crate) fn spec(&self) -> Result<Fields<'_>, String> {
        self.field("spec")
    }
}

/// The objects of a file, those in lists included.
pub(crate) fn read(file: &str, text: &str, problems: &mut Vec<Problem>) -> Vec<Manifest> {
    let options = serde_saphyr::options! {
        with_snippet: false,
        // `on` and `no` are texts.
        strict_booleans: true,
        // Anchors and aliases cannot expand without bound.
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 10_000 },
    };
    let documents: Vec<Spanned<Value>> =
        match serde_saphyr::from_multiple_with_options(text, options) {
            Ok(documents) => documents,
            Err(error) => {
                let place = error
                    .location()
                    .map(|at| format!(":{}:{}", at.line(), at.column()))
                    .unwrap_or_default();
                let message = error
                    .without_snippet()
                    .render_with_formatter(&UserMessageFormatter);
                problems.push(Problem {
                    origin: format!("{file}{place}"),
                    message: format!("the file cannot be read: {message}"),
                });
                return Vec::new();
            }
        };
    let mut manifests = Vec::new();
    for document in documents {
        let origin = format!("{file}:{}", document.defined.line());
        add(origin, document.value, problems, &mut manifests);
    }
    manifests
}

fn add(origin: String, value: Value, problems: &mut Vec<Problem>, manifests: &mut Vec<Manifest>) {
    if value.is_null() {
        return;
    }
    let is_list = value
        .get("kind")
        .and_then(Value::as_str)
        .is_some_and(|kind| kind.ends_with("List"));
    if is_list && let Some(Value::Array(items)) = value.get("items") {
        for (i, item) in items.iter().enumerate() {
            add(
                format!("{origin}, item {i}"),
                item.clone(),
                problems,
                manifests,
            );
        }
        return;
    }
    match manifest(&origin, value) {
        Ok(manifest) => manifests.push(manifest),
        Err(message) => problems.push(Problem { origin, message }),
    }
}

fn manifest(origin: &str, value: Value) -> Result<Manifest, String> {
    let (api_version, kind, name, namespace, labels) = {
        let fields = Fields::new(&value, "the document")?;
        let metadata = fields.mapping("metadata")?;
        (
            fields.needed("apiVersion")?,
            fields.needed("kind")?,
            // Files of tools, such as a Kustomization, have none.
            metadata.text("name")?.unwrap_or_default(),
            metadata.text("namespace")?,
            metadata.text_map("labels")?,
        )
    };
    let group = api_version
        .split_once('/')
        .map_or("", |(group, _)| group)
        .to_owned();
    Ok(Manifest {
        origin: origin.to_owned(),
        group,
        kind,
        name,
        namespace,
        labels,
        value,
    })
}
