//! The report for people.

use std::{fmt::Write as _, io::IsTerminal as _};

use super::{
    excerpts::excerpt_text,
    finding::{Finding, Severity},
    report::{Report, Workload},
};

/// Whether carets have a colour.
#[derive(Clone, Copy)]
pub(super) enum Style {
    Plain,
    Colour,
}

impl Style {
    /// Colours on a terminal, unless `NO_COLOR` is set.
    pub(super) fn of_standard_error() -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if std::io::stderr().is_terminal() && !unwanted {
            Self::Colour
        } else {
            Self::Plain
        }
    }

    /// The text in bold red.
    pub(super) fn red(self, text: &str) -> String {
        match self {
            Self::Plain => text.to_owned(),
            Self::Colour => format!("\u{1b}[1;31m{text}\u{1b}[0m"),
        }
    }
}

/// The problems, for standard error: one on each line, and below it the line of the annotation, with carets under the
/// invalid text.
pub(super) fn problems(report: &Report, style: Style) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        match finding.topic.severity() {
            Severity::Error => {
                let _ = writeln!(text, "{}", with_origin(finding, ""));
                if let Some(excerpt) = &finding.excerpt {
                    text.push_str(&excerpt_text(excerpt, style));
                }
            }
            Severity::Note => {
                let _ = writeln!(text, "{}", with_origin(finding, "note: "));
            }
            Severity::Warning if finding.workload.is_none() => {
                let _ = writeln!(text, "{}", with_origin(finding, "warning: "));
            }
            // Each is at its workload.
            Severity::Warning => {}
        }
    }
    if !report.ignored.is_empty() {
        let kinds = report.ignored.iter();
        let kinds: Vec<String> = kinds
            .map(|(kind, count)| format!("{kind} ({count})"))
            .collect();
        let _ = writeln!(text, "note: these kinds are not read: {}", kinds.join(", "));
    }
    let warnings = report.count(Severity::Warning);
    if report.strict && warnings > 0 {
        let _ = writeln!(text, "{warnings} warnings (--strict)");
    }
    text
}

fn with_origin(finding: &Finding, word: &str) -> String {
    let message = finding.whole_message();
    if finding.origin.is_empty() {
        format!("{word}{message}")
    } else {
        format!("{}: {word}{message}", finding.origin)
    }
}

/// The destinations that each workload's pods may reach, for standard output.
pub(super) fn workloads(report: &Report, summary: bool) -> String {
    let mut text = String::new();
    let width = report.workloads.iter().map(|of| of.title.len()).max();
    for workload in &report.workloads {
        if summary {
            let title = &workload.title;
            let width = width.unwrap_or_default();
            let _ = writeln!(text, "{title:width$}  {}", in_a_line(workload));
        } else {
            in_full(workload, &mut text);
        }
    }
    text
}

/// The destinations that a workload's pods may reach, in one line.
pub(super) fn in_a_line(workload: &Workload) -> String {
    match &workload.description {
        None => "cannot be read".to_owned(),
        Some(_) if workload.host_network => HOST_NETWORK.to_owned(),
        Some(description) => description.summary(),
    }
}

const HOST_NETWORK: &str = "in the host's network, where no packet is judged";

fn in_full(workload: &Workload, text: &mut String) {
    let Some(description) = &workload.description else {
        return;
    };
    if workload.host_network {
        let _ = writeln!(text, "{}\n  {HOST_NETWORK}", workload.title);
        return;
    }
    text.push_str(&description.text(&workload.title));
    for missing in &workload.missing {
        let _ = writeln!(
            text,
            "  not among the files, and may change this: {missing}"
        );
    }
}
