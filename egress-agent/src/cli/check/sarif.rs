//! The report as SARIF 2.1.0 (OASIS), for code scanning.

use std::fmt::Write as _;

use anyhow::Result;
use serde_json::{Value, json};

use super::{
    finding::{Finding, Topic},
    report::Report,
};
use crate::pods::Place;

const SCHEMA: &str =
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json";

pub(super) fn text(report: &Report) -> Result<String> {
    let rules: Vec<Value> = Topic::ALL
        .iter()
        .map(|topic| {
            json!({
                "id": topic.as_str(),
                "shortDescription": { "text": topic.description() },
                "defaultConfiguration": { "level": topic.severity().as_str() },
            })
        })
        .collect();
    let results: Vec<Value> = report.findings.iter().map(result).collect();
    let log = json!({
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{
            "tool": {
                "driver": {
                    "name": env!("CARGO_PKG_NAME"),
                    "semanticVersion": env!("CARGO_PKG_VERSION"),
                    "rules": rules,
                },
            },
            "columnKind": "unicodeCodePoints",
            "results": results,
        }],
    });
    let mut text = serde_json::to_string_pretty(&log)?;
    text.push('\n');
    Ok(text)
}

fn result(finding: &Finding) -> Value {
    let topic = finding.topic;
    let index = Topic::ALL.iter().position(|known| *known == topic);
    let mut result = json!({
        "ruleId": topic.as_str(),
        "ruleIndex": index,
        "level": topic.severity().as_str(),
        "message": { "text": finding.whole_message() },
    });
    if let Some(place) = &finding.place {
        result["locations"] = json!([{ "physicalLocation": location(place) }]);
    }
    result
}

fn location(place: &Place) -> Value {
    let mut location = json!({ "artifactLocation": { "uri": uri(&place.file) } });
    if let Some(line) = place.line {
        location["region"] = match place.column {
            Some(column) => json!({ "startLine": line, "startColumn": column }),
            None => json!({ "startLine": line }),
        };
    }
    location
}

/// A path as a URI reference (RFC 3986): a relative one stays relative.
fn uri(path: &str) -> String {
    let mut uri = String::new();
    if path.starts_with('/') {
        uri.push_str("file://");
    }
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            let _ = write!(uri, "%{byte:02X}");
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_becomes_a_uri_reference() {
        assert_eq!(uri("shop/a b:1.yaml"), "shop/a%20b%3A1.yaml");
        assert_eq!(uri("/tmp/é.yaml"), "file:///tmp/%C3%A9.yaml");
    }
}
