//! The report as JSON. docs/check.md describes each field; fields are added, and never renamed or removed, within one
//! `version`.

use std::collections::BTreeMap;

use anyhow::Result;
use egress_policy::{Closer, DescribedRule, Description};
use serde::Serialize;

use super::{
    finding::{Finding, Severity},
    report::{Report, Workload},
};
use crate::pods::Place;

/// The version of the document's shape.
const VERSION: u32 = 1;

#[derive(Serialize)]
struct Document<'a> {
    version: u32,
    success: bool,
    strict: bool,
    summary: Summary,
    workloads: Vec<WorkloadJson<'a>>,
    findings: Vec<FindingJson<'a>>,
    ignored: &'a BTreeMap<String, usize>,
}

#[derive(Serialize)]
struct Summary {
    workloads: usize,
    errors: usize,
    warnings: usize,
    notes: usize,
}

#[derive(Serialize)]
struct WorkloadJson<'a> {
    kind: &'a str,
    namespace: &'a str,
    name: &'a str,
    #[serde(flatten)]
    place: PlaceJson<'a>,
    host_network: bool,
    policy: Option<PolicyJson<'a>>,
    missing: &'a [String],
}

#[derive(Serialize)]
struct PolicyJson<'a> {
    mode: &'static str,
    mode_from: String,
    closed: bool,
    closed_by: Vec<String>,
    rules: Vec<RuleJson<'a>>,
    reaches_internal: bool,
    notes: &'a [String],
    warnings: &'a [String],
}

#[derive(Serialize)]
struct RuleJson<'a> {
    tier: Option<&'static str>,
    action: &'static str,
    destination: &'a str,
    packets: &'a str,
    entry: &'a str,
    from: String,
    path: String,
    entry_line: usize,
    entry_column: usize,
}

#[derive(Serialize)]
struct FindingJson<'a> {
    severity: &'static str,
    topic: &'static str,
    #[serde(flatten)]
    place: PlaceJson<'a>,
    workload: Option<&'a str>,
    further_workloads: usize,
    message: &'a str,
}

#[derive(Serialize)]
struct PlaceJson<'a> {
    file: Option<&'a str>,
    line: Option<usize>,
    column: Option<usize>,
}

pub(super) fn text(report: &Report) -> Result<String> {
    let document = Document {
        version: VERSION,
        success: report.is_success(),
        strict: report.strict,
        summary: Summary {
            workloads: report.workloads.len(),
            errors: report.count(Severity::Error),
            warnings: report.count(Severity::Warning),
            notes: report.count(Severity::Note),
        },
        workloads: report.workloads.iter().map(workload).collect(),
        findings: report.findings.iter().map(finding).collect(),
        ignored: &report.ignored,
    };
    let mut text = serde_json::to_string_pretty(&document)?;
    text.push('\n');
    Ok(text)
}

fn workload(of: &Workload) -> WorkloadJson<'_> {
    WorkloadJson {
        kind: of.kind,
        namespace: &of.namespace,
        name: &of.name,
        place: place(Some(&of.place)),
        host_network: of.host_network,
        policy: of.description.as_ref().map(policy),
        missing: &of.missing,
    }
}

fn policy(of: &Description) -> PolicyJson<'_> {
    PolicyJson {
        mode: of.mode.as_str(),
        mode_from: of.mode_by.to_string(),
        closed: !of.open && !of.says_nothing(),
        closed_by: of.closed_by.iter().map(Closer::to_string).collect(),
        rules: of.rules.iter().map(rule).collect(),
        reaches_internal: of.reaches_internal,
        notes: &of.notes,
        warnings: &of.warnings,
    }
}

fn rule(of: &DescribedRule) -> RuleJson<'_> {
    RuleJson {
        tier: of.tier.map(egress_policy::objects::Tier::as_str),
        action: of.list.as_str(),
        destination: &of.destination,
        packets: &of.packets,
        entry: &of.entry,
        from: of.origin.to_string(),
        path: of.path(),
        entry_line: of.at.line,
        entry_column: of.at.column,
    }
}

fn finding(of: &Finding) -> FindingJson<'_> {
    FindingJson {
        severity: of.topic.severity().as_str(),
        topic: of.topic.as_str(),
        place: place(of.place.as_ref()),
        workload: of.workload.as_deref(),
        further_workloads: of.further,
        message: &of.message,
    }
}

fn place(of: Option<&Place>) -> PlaceJson<'_> {
    PlaceJson {
        file: of.map(|place| &*place.file),
        line: of.and_then(|place| place.line),
        column: of.and_then(|place| place.column),
    }
}
