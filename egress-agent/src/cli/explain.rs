//! `egress-agent explain`

use std::{fmt::Write as _, process::ExitCode};

use anyhow::{Result, bail};

use super::{
    ExplainArgs,
    ask::{ask, columns, span},
};
use crate::serve::protocol::{
    AddressExplained, Decision, EntryStatus, Explanation, PortsStatus, Request, Response,
};

/// Exit status if packets are denied.
const DENIED: u8 = 1;
/// Exit status if there is no answer.
const UNKNOWN: u8 = 2;

pub(super) fn explain(args: &ExplainArgs) -> ExitCode {
    ask_and_print(args).unwrap_or_else(|error| {
        eprintln!("egress-agent: {error:#}");
        ExitCode::from(UNKNOWN)
    })
}

fn ask_and_print(args: &ExplainArgs) -> Result<ExitCode> {
    let request = Request::Explain {
        pod: args.pod.clone(),
        target: args.target.clone(),
    };
    let Response::Explanation(explanation) = ask(&args.socket, &request)? else {
        bail!("the agent answered another request: it may be of another version");
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&explanation)?);
    } else {
        print!("{}", text(&explanation));
    }
    Ok(match explanation.decision {
        Decision::Allowed | Decision::WouldDeny => ExitCode::SUCCESS,
        Decision::Denied => ExitCode::from(DENIED),
        Decision::Unknown => ExitCode::from(UNKNOWN),
    })
}

fn text(explanation: &Explanation) -> String {
    let word = match explanation.decision {
        Decision::Allowed => "ALLOWED",
        Decision::Denied => "DENIED",
        Decision::WouldDeny => "ALLOWED for now (audit mode), would be DENIED",
        Decision::Unknown => "NOT JUDGED",
    };
    let mut text = format!("{word}: {} to {}\n", explanation.pod, explanation.target);
    let _ = write!(text, "  {}", explanation.because);
    if let Some(reason) = &explanation.reason {
        let _ = write!(text, " ({reason})");
    }
    text.push('\n');
    entries(&mut text, "    ", &explanation.entries);
    if !explanation.closed_by.is_empty() {
        let _ = writeln!(text, "  closed by: {}", explanation.closed_by.join(", "));
    }
    if !explanation.ports.is_empty() {
        let _ = writeln!(text, "  open: {}", ports(&explanation.ports));
    }
    if let Some(question) = &explanation.question {
        let may = if question.allowed { "may" } else { "may not" };
        if question.because != explanation.because {
            let _ = writeln!(text, "  the name {may} be asked for: {}", question.because);
        }
        if question.entries != explanation.entries {
            entries(&mut text, "    ", &question.entries);
        }
    }
    addresses(&mut text, explanation);
    if let Some(problem) = &explanation.problem {
        let _ = writeln!(text, "  problem: {problem}");
    }
    if let Some(hint) = &explanation.hint {
        let _ = writeln!(text, "  to allow it: {hint}");
    }
    text
}

fn entries(text: &mut String, indent: &str, entries: &[EntryStatus]) {
    for entry in entries {
        let EntryStatus {
            of,
            annotation,
            entry,
            line,
            column,
        } = entry;
        let _ = writeln!(
            text,
            "{indent}`{entry}`: {annotation} of the {of}, line {line}, column {column}"
        );
    }
}

fn addresses(text: &mut String, explanation: &Explanation) {
    if explanation.question.is_none() {
        for address in &explanation.addresses {
            if !address.names.is_empty() {
                let _ = writeln!(
                    text,
                    "  the pod resolved it from {}",
                    address.names.join(", ")
                );
            }
            if address.remaining_seconds.is_some() {
                let _ = writeln!(text, "  its lifetime: {}", life(address));
            }
        }
        return;
    }
    if explanation.addresses.is_empty() {
        return;
    }
    let _ = writeln!(text, "  its addresses, as the pod resolved it:");
    let rows: Vec<Vec<String>> = explanation
        .addresses
        .iter()
        .map(|address| {
            let reason = address.reason.as_deref();
            vec![
                address.address.to_string(),
                life(address),
                reason.map_or("allowed".to_owned(), |reason| format!("denied: {reason}")),
            ]
        })
        .collect();
    text.push_str(&columns("    ", &rows));
    if explanation.addresses_left_out > 0 {
        let left_out = explanation.addresses_left_out;
        let _ = writeln!(text, "    and {left_out} more that were not checked");
    }
}

fn life(address: &AddressExplained) -> String {
    match address.remaining_seconds {
        None => "not in the allow map".to_owned(),
        Some(0) => "expired".to_owned(),
        Some(seconds) => span(seconds),
    }
}

fn ports(open: &[PortsStatus]) -> String {
    let words = open.iter().map(|ports| match (ports.first, ports.last) {
        (Some(0), Some(u16::MAX)) | (None, _) | (_, None) => ports.protocol.clone(),
        (Some(first), Some(last)) if first == last => format!("{} {first}", ports.protocol),
        (Some(first), Some(last)) => format!("{} {first}-{last}", ports.protocol),
    });
    words.collect::<Vec<_>>().join(", ")
}
