//! Names and wildcards of other products, as entries of this one.
//!
//! Here `*.` at the beginning is one or more labels, `*` as another label exactly one, and `*` within a label any
//! part of that label (docs/policy.md).

/// What `*` means to a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wildcards {
    /// There is none.
    None,
    /// As a label it is exactly one label; within a label, any part of it. `**.` at the beginning is one or more
    /// labels (Cilium).
    Within,
    /// As a label it is exactly one label (GKE, OVN-Kubernetes).
    OneLabel,
    /// As a label it is one or more labels (network-policy-api, Amazon EKS, Calico, Istio).
    Labels,
    /// Any text, dots included, also none (Antrea).
    Text,
}

/// The purpose of the translated name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    /// The entries may match fewer names, never more.
    Allow,
    /// The entries may match more names, never fewer.
    Deny,
    /// The entries match the same names.
    Pass,
}

/// A translated name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Translated {
    /// Names and wildcards in the grammar of this project.
    pub(crate) names: Vec<String>,
    /// What differs in meaning.
    pub(crate) note: Option<String>,
    /// Why there are no names.
    pub(crate) left_out: Option<String>,
    /// A wider wildcard that the reader may take instead.
    pub(crate) wider: Option<String>,
}

impl Translated {
    fn exactly(name: String) -> Self {
        Self {
            names: vec![name],
            ..Self::default()
        }
    }

    fn with_note(names: Vec<String>, note: String) -> Self {
        Self {
            names,
            note: Some(note),
            ..Self::default()
        }
    }

    fn none(reason: String, wider: Option<String>) -> Self {
        Self {
            left_out: Some(reason),
            wider,
            ..Self::default()
        }
    }
}

/// Translates a name. With `deep`, a wildcard for one label at the beginning becomes one for one or more.
pub(crate) fn translate(text: &str, wildcards: Wildcards, verb: Verb, deep: bool) -> Translated {
    let name = text.trim().to_lowercase();
    let name = name.strip_suffix('.').unwrap_or(&name);
    if !name.contains('*') {
        return Translated::exactly(name.to_owned());
    }
    let labels: Vec<&str> = name.split('.').collect();
    if labels.last().is_some_and(|last| last.contains('*')) {
        return everything(text, &labels, wildcards, verb);
    }
    match wildcards {
        Wildcards::None => Translated::none(
            format!("`{text}` has a `*`, which is no wildcard there"),
            None,
        ),
        Wildcards::Within => within(text, name, &labels, verb, deep),
        Wildcards::OneLabel => {
            if labels
                .iter()
                .any(|label| label.contains('*') && *label != "*")
            {
                return Translated::none(
                    format!("`{text}` has a `*` within a label, which is no wildcard there"),
                    None,
                );
            }
            within(text, name, &labels, verb, deep)
        }
        Wildcards::Labels => whole_labels(text, name, &labels, verb),
        Wildcards::Text => any_text(text, name, &labels, verb),
    }
}

/// A wildcard in the last label matches names below every top-level domain.
fn everything(text: &str, labels: &[&str], wildcards: Wildcards, verb: Verb) -> Translated {
    if verb == Verb::Deny && wildcards != Wildcards::None {
        return Translated::with_note(
            vec!["*".to_owned()],
            format!("`{text}` has no fixed end, so the deny is `*`: every address"),
        );
    }
    let wider = (labels == ["*"]).then(|| "*".to_owned());
    Translated::none(
        format!(
            "`{text}` matches names below every top-level domain: no entry stands for all names, and `*` also \
             reaches addresses that have no name"
        ),
        wider,
    )
}

/// `*` ends at a dot.
fn within(text: &str, name: &str, labels: &[&str], verb: Verb, deep: bool) -> Translated {
    if let Some(rest) = name.strip_prefix("**.") {
        if rest.split('.').any(|label| label.contains("**")) {
            return Translated::none(format!("`{text}` has `**` behind its beginning"), None);
        }
        // Older versions of Cilium take `**` for `*`.
        return if verb == Verb::Pass {
            Translated::none(not_the_same(text), None)
        } else {
            Translated::with_note(
                vec![format!("*.{rest}")],
                format!(
                    "`{text}` is one or more labels in versions that know `**`, and one label in older ones; \
                     here `*.` is one or more labels"
                ),
            )
        };
    }
    if labels.iter().any(|label| label.contains("**")) {
        return Translated::none(format!("`{text}` has `**` behind its beginning"), None);
    }
    if labels.first() != Some(&"*") {
        return Translated::exactly(name.to_owned());
    }
    let difference = format!(
        "`{text}` is exactly one label there, and `{name}` is one or more here: `a.b.{}` would match, too",
        labels[1..].join(".")
    );
    match verb {
        Verb::Deny => Translated::with_note(vec![name.to_owned()], difference),
        Verb::Allow if deep => Translated::with_note(
            vec![name.to_owned()],
            format!("wider than the original: {difference}"),
        ),
        Verb::Allow | Verb::Pass => Translated::none(difference, Some(name.to_owned())),
    }
}

/// `*` is one or more whole labels.
fn whole_labels(text: &str, name: &str, labels: &[&str], verb: Verb) -> Translated {
    if labels
        .iter()
        .any(|label| label.contains('*') && *label != "*")
    {
        return Translated::none(
            format!("`{text}` has a `*` within a label, which is no wildcard there"),
            None,
        );
    }
    if !labels[1..].contains(&"*") {
        return Translated::exactly(name.to_owned());
    }
    inner(
        text,
        vec![name.to_owned()],
        labels,
        verb,
        "is one or more labels there, and exactly one here",
    )
}

/// `*` is any text.
fn any_text(text: &str, name: &str, labels: &[&str], verb: Verb) -> Translated {
    let first = labels[0];
    let others = &labels[1..];
    if others.iter().any(|label| label.contains('*')) {
        let names = if first.contains("**") || others.iter().any(|label| label.contains("**")) {
            Vec::new()
        } else {
            vec![name.to_owned()]
        };
        return inner(
            text,
            names,
            labels,
            verb,
            "is any text there, dots included, and ends at a dot here",
        );
    }
    if first == "*" {
        return Translated::exactly(name.to_owned());
    }
    match first.strip_prefix('*') {
        // Any text before a fixed end of the first label: that label alone, or with labels before it.
        Some(end) if !end.contains('*') => Translated {
            names: vec![name.to_owned(), format!("*.{name}")],
            ..Translated::default()
        },
        _ => inner(
            text,
            vec![name.to_owned()],
            labels,
            verb,
            "is any text there, dots included, and ends at a dot here",
        ),
    }
}

/// A wildcard behind the beginning that matches more there than here.
fn inner(
    text: &str,
    names: Vec<String>,
    labels: &[&str],
    verb: Verb,
    difference: &str,
) -> Translated {
    match verb {
        Verb::Allow if names.is_empty() => {
            Translated::none(format!("`{text}`: its `*` {difference}"), None)
        }
        Verb::Allow => Translated::with_note(
            names,
            format!("narrower than the original: the `*` in `{text}` {difference}"),
        ),
        Verb::Pass => Translated::none(not_the_same(text), None),
        Verb::Deny => {
            let last = labels
                .iter()
                .rposition(|label| label.contains('*'))
                .unwrap_or(0);
            let wider = format!("*.{}", labels[last + 1..].join("."));
            let note = format!("the `*` in `{text}` {difference}, so the deny is wider: `{wider}`");
            Translated::with_note(vec![wider], note)
        }
    }
}

fn not_the_same(text: &str) -> String {
    format!("no entry stands for exactly the names of `{text}`")
}

#[cfg(test)]
#[path = "names_tests.rs"]
mod tests;
