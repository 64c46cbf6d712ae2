//! Writes objects as YAML with comments.

use std::fmt::Write as _;

use egress_api::{Action, Tier};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::{
    object::{Document, Entries, Line, Object, Spec},
    remark::Remark,
};

/// The longest line of a comment, in characters.
const WIDTH: usize = 110;

const HEADER: &str = "\
# Written by `egress-agent import`. Read the comments before you apply this: docs/import.md explains them.
# \"note\" is a difference in meaning, \"left out\" is allowed by the original and not here, and \"refused\" restricts
# the original and could not be written.
# Unlike the originals, these objects leave traffic within the cluster alone unless `ranges.allowInternal: false`.
# DNS queries to the cluster's resolvers need no entry. Pods may look up the names that their entries name.
";

/// The whole output.
pub(crate) fn write(documents: &[Document]) -> String {
    let mut text = HEADER.to_owned();
    for document in documents {
        let mut heading = format!("from {}: {}", document.origin, document.source);
        let mut remarks: &[Remark] = &document.remarks;
        if document.objects.is_empty() {
            text.push_str("---\n");
            comment(&mut text, "", &heading);
            write_remarks(&mut text, "", remarks);
        }
        for object in &document.objects {
            text.push_str("---\n");
            comment(&mut text, "", &heading);
            write_remarks(&mut text, "", remarks);
            write_remarks(&mut text, "", &object.remarks);
            write_object(&mut text, object);
            heading = format!("also from {}: {}", document.origin, document.source);
            remarks = &[];
        }
    }
    text
}

fn write_object(text: &mut String, object: &Object) {
    let _ = writeln!(
        text,
        "apiVersion: egress-agent.dev/v1alpha1\nkind: {}\nmetadata:\n  name: {}",
        object.kind(),
        scalar(&object.name)
    );
    if let Some(namespace) = &object.namespace {
        let _ = writeln!(text, "  namespace: {}", scalar(namespace));
    }
    text.push_str("spec:\n");
    match &object.spec {
        Spec::Policy(policy) => {
            write_selector(text, "podSelector", &policy.pods);
            for (key, entries) in [("allow", &policy.allow), ("deny", &policy.deny)] {
                if let Some(entries) = entries {
                    write_list(text, "  ", key, entries);
                }
            }
        }
        Spec::Cluster(cluster) => {
            let tier = match cluster.tier {
                Tier::Admin => "Admin",
                Tier::Baseline => "Baseline",
            };
            let _ = writeln!(text, "  tier: {tier}\n  priority: {}", cluster.priority);
            write_selector(text, "namespaceSelector", &cluster.subject.namespaces);
            write_selector(text, "podSelector", &cluster.subject.pods);
            text.push_str("  rules:\n");
            for rule in &cluster.rules {
                if !rule.entries.has_entries() {
                    if let Some(name) = &rule.name {
                        comment(text, "  ", &format!("rule {name}:"));
                    }
                    write_lines(text, "  ", &rule.entries);
                    continue;
                }
                let action = match rule.action {
                    Action::Allow => "Allow",
                    Action::Deny => "Deny",
                    Action::Pass => "Pass",
                };
                match &rule.name {
                    Some(name) => {
                        let _ = writeln!(text, "  - name: {}\n    action: {action}", scalar(name));
                    }
                    None => {
                        let _ = writeln!(text, "  - action: {action}");
                    }
                }
                write_list(text, "    ", "entries", &rule.entries);
            }
        }
        Spec::Set(entries) => write_list(text, "  ", "destinations", entries),
    }
}

fn write_list(text: &mut String, indent: &str, key: &str, entries: &Entries) {
    if entries.has_entries() {
        let _ = writeln!(text, "{indent}{key}:");
        write_lines(text, indent, entries);
    } else {
        let _ = writeln!(text, "{indent}{key}: []");
        // Behind the list, as an empty one has no lines.
        write_lines(text, indent, entries);
    }
}

fn write_lines(text: &mut String, indent: &str, entries: &Entries) {
    for line in &entries.0 {
        match line {
            Line::Remark(remark) => write_remarks(text, indent, std::slice::from_ref(remark)),
            Line::Entry { text: entry, .. } => {
                let _ = writeln!(text, "{indent}- {}", scalar(entry));
            }
            Line::Offered(entry) => {
                let _ = writeln!(text, "{indent}# - {}", scalar(entry));
            }
        }
    }
}

fn write_remarks(text: &mut String, indent: &str, remarks: &[Remark]) {
    for remark in remarks {
        comment(
            text,
            indent,
            &format!("{}: {}", remark.severity, remark.text),
        );
    }
}

/// A comment, in lines of at most [`WIDTH`] characters unless a word is longer.
fn comment(text: &mut String, indent: &str, what: &str) {
    let mut line = format!("{indent}#");
    for word in what.split_whitespace() {
        // Control characters of the input cannot end the comment.
        let word: String = word.chars().filter(|c| !c.is_control()).collect();
        if line.chars().count() + 1 + word.chars().count() > WIDTH && line.len() > indent.len() + 3
        {
            let _ = writeln!(text, "{line}");
            line = format!("{indent}#  ");
        }
        line.push(' ');
        line.push_str(&word);
    }
    let _ = writeln!(text, "{line}");
}

fn write_selector(text: &mut String, key: &str, selector: &LabelSelector) {
    let labels = selector.match_labels.as_ref().filter(|map| !map.is_empty());
    let expressions = selector
        .match_expressions
        .as_ref()
        .filter(|list| !list.is_empty());
    if labels.is_none() && expressions.is_none() {
        let _ = writeln!(text, "  {key}: {{}}");
        return;
    }
    let _ = writeln!(text, "  {key}:");
    if let Some(labels) = labels {
        text.push_str("    matchLabels:\n");
        for (key, value) in labels {
            let _ = writeln!(text, "      {}: {}", scalar(key), scalar(value));
        }
    }
    if let Some(expressions) = expressions {
        text.push_str("    matchExpressions:\n");
        for expression in expressions {
            let _ = writeln!(
                text,
                "    - key: {}\n      operator: {}",
                scalar(&expression.key),
                scalar(&expression.operator)
            );
            if let Some(values) = &expression.values {
                let values: Vec<String> = values.iter().map(|value| scalar(value)).collect();
                let _ = writeln!(text, "      values: [{}]", values.join(", "));
            }
        }
    }
}

/// A YAML scalar that is a text for every reader of YAML.
fn scalar(text: &str) -> String {
    let is_word = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && !["true", "false", "yes", "no", "on", "off", "null", "y", "n"]
            .contains(&text.to_ascii_lowercase().as_str());
    let is_address =
        text.starts_with(|c: char| c.is_ascii_digit()) && text.matches('.').count() > 2;
    let is_plain = text
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "._/:-".contains(c))
        && !text.ends_with(':');
    if is_plain && (is_word || is_address) {
        text.to_owned()
    } else {
        serde_json::to_string(text).unwrap_or_default()
    }
}
