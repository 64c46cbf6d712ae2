//! The report as workflow commands of GitHub Actions, which show findings at their lines.

use std::fmt::Write as _;

use super::{
    finding::{Finding, Severity},
    report::Report,
    text::in_a_line,
};

pub(super) fn text(report: &Report) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        text.push_str(&command(finding));
    }
    for workload in &report.workloads {
        let _ = writeln!(text, "{}  {}", workload.title, in_a_line(workload));
    }
    text
}

fn command(finding: &Finding) -> String {
    let name = match finding.topic.severity() {
        Severity::Error => "error",
        Severity::Warning => "warning",
        Severity::Note => "notice",
    };
    let mut properties = Vec::new();
    if let Some(place) = &finding.place {
        properties.push(format!("file={}", property(&place.file)));
        let numbers = [("line", place.line), ("col", place.column)];
        for (key, number) in numbers {
            properties.extend(number.map(|number| format!("{key}={number}")));
        }
    }
    properties.push(format!("title=egress-agent {}", finding.topic.as_str()));
    let properties = properties.join(",");
    let message = data(&finding.whole_message());
    format!("::{name} {properties}::{message}\n")
}

/// A message, escaped as `@actions/core` does it.
fn data(text: &str) -> String {
    text.replace('%', "%25")
        .replace('\r', "%0D")
        .replace('\n', "%0A")
}

/// The value of a property, escaped as `@actions/core` does it.
fn property(text: &str) -> String {
    data(text).replace(':', "%3A").replace(',', "%2C")
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Topic, *};
    use crate::pods::Place;

    #[test]
    fn what_ends_a_property_or_a_command_is_escaped() {
        let finding = Finding {
            topic: Topic::Policy,
            place: Some(Place {
                file: "a,b:c\n100%.yaml".to_owned(),
                line: Some(3),
                column: Some(7),
            }),
            origin: String::new(),
            workload: Some("shop/cart".to_owned()),
            message: "50%: a, b\r\n::error::c".to_owned(),
            excerpt: None,
            further: 2,
        };
        assert_eq!(
            command(&finding),
            "::error file=a%2Cb%3Ac%0A100%25.yaml,line=3,col=7,title=egress-agent policy::\
             shop/cart: 50%25: a, b%0D%0A::error::c (and 2 more workloads)\n"
        );
    }
}
