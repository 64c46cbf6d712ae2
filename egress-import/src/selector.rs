//! Label selectors as Kubernetes has them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::{
    fields::Fields,
    object::{require, require_label},
};

/// Reads a label selector; without fields it selects everything.
pub(crate) fn read(fields: &Fields<'_>) -> Result<LabelSelector, String> {
    read_renamed(fields, |key| Ok(Some(key.to_owned())))
}

/// Reads a label selector and renames its keys. A key without a new name is left out of the selector.
pub(crate) fn read_renamed(
    fields: &Fields<'_>,
    mut renamed: impl FnMut(&str) -> Result<Option<String>, String>,
) -> Result<LabelSelector, String> {
    let others = fields.others(&["matchLabels", "matchExpressions"]);
    if !others.is_empty() {
        return Err(format!(
            "{} has unknown fields: {}",
            fields.place(),
            others.join(", ")
        ));
    }
    let mut selector = LabelSelector::default();
    for (key, value) in fields.text_map("matchLabels")? {
        if let Some(key) = renamed(&key)? {
            require_label(&mut selector, key, value);
        }
    }
    for expression in fields.mappings("matchExpressions")? {
        let operator = expression.needed("operator")?;
        let values = expression.texts("values")?;
        let is_right = match operator.as_str() {
            "In" | "NotIn" => !values.is_empty(),
            "Exists" | "DoesNotExist" => values.is_empty(),
            _ => false,
        };
        if !is_right {
            return Err(format!(
                "{} has the operator `{operator}` with {} values",
                expression.place(),
                values.len()
            ));
        }
        if let Some(key) = renamed(&expression.needed("key")?)? {
            require(&mut selector, &key, &operator, values);
        }
    }
    Ok(selector)
}

/// The selector in words, for remarks.
pub(crate) fn words(selector: &LabelSelector) -> String {
    let labels = selector
        .match_labels
        .iter()
        .flatten()
        .map(|(key, value)| format!("{key}={value}"));
    let expressions = selector.match_expressions.iter().flatten().map(|one| {
        let values = one.values.iter().flatten().cloned().collect::<Vec<_>>();
        format!("{} {} ({})", one.key, one.operator, values.join(", "))
    });
    let all: Vec<String> = labels.chain(expressions).collect();
    if all.is_empty() {
        "all".to_owned()
    } else {
        all.join(", ")
    }
}
