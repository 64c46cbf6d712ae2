//! `egress-agent status`

use std::{collections::BTreeMap, fmt::Write as _, process::ExitCode};

use anyhow::{Result, bail};

use super::{
    StatusArgs,
    ask::{ask, columns, span},
};
use crate::serve::protocol::{PodStatus, PolicyStatus, Request, Response, Status};
use egress_policy::Resolver;

pub(super) fn status(args: &StatusArgs) -> Result<ExitCode> {
    let request = Request::Status {
        pod: args.pod.clone(),
        names: args.json || args.pod.is_some(),
    };
    let Response::Status(status) = ask(&args.socket, &request)? else {
        bail!("the agent answered another request: it may be of another version");
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&status)?);
        return Ok(ExitCode::SUCCESS);
    }
    let text = match (&args.pod, status.pods.first()) {
        (Some(_), Some(pod)) => one(pod),
        _ => all(&status),
    };
    print!("{text}");
    Ok(ExitCode::SUCCESS)
}

fn all(status: &Status) -> String {
    let agent = &status.agent;
    let mut text = format!(
        "node {}: egress-agent {} (pid {}, {}) up {}\n",
        agent.node,
        agent.version,
        agent.pid,
        agent.hook,
        span(agent.uptime_seconds)
    );
    lines(&mut text, "NOT HEALTHY", &agent.unhealthy);
    lines(&mut text, "NOT READY", &agent.not_ready);
    let _ = writeln!(text, "\nresolvers");
    let rows: Vec<Vec<String>> = status
        .resolvers
        .iter()
        .map(|resolver| {
            let asked = Resolver {
                address: resolver.address,
                port: resolver.port,
            };
            vec![asked.to_string(), resolver.source.clone()]
        })
        .collect();
    text.push_str(&columns("  ", &rows));
    let lost: Vec<String> = status
        .losses
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(what, count)| format!("{what} {count}"))
        .collect();
    let _ = writeln!(text, "\nlosses: {}", or_none(&lost.join(", ")));
    let existing = &agent.existing_connections;
    let _ = writeln!(
        text,
        "connections from before: outbound {} ({}), {} kept; inbound {} kept, {} judged",
        existing.outbound,
        existing.because,
        existing.outbound_trusted,
        existing.inbound_kept,
        existing.inbound_judged
    );
    for problem in &status.problems {
        let _ = writeln!(text, "problem: {}: {}", problem.about, problem.message);
    }
    text.push('\n');
    policies(&mut text, &status.policies);
    if status.pods.is_empty() {
        text.push_str("no pods\n");
        return text;
    }
    let heads = [
        "POD",
        "MODE",
        "INTERFACES",
        "VERSION",
        "APPLIED",
        "NAMES",
        "ADDRESSES",
        "DENIED",
        "NOTE",
    ];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    rows.extend(status.pods.iter().map(row));
    text.push_str(&columns("", &rows));
    text
}

/// The policy objects that select pods of the node, or have problems.
fn policies(text: &mut String, policies: &[PolicyStatus]) {
    let concerns = |policy: &&PolicyStatus| {
        policy.selected > 0 || policy.applied_generation.is_some() || policy.problem.is_some()
    };
    let shown: Vec<&PolicyStatus> = policies.iter().filter(concerns).collect();
    if policies.is_empty() {
        return;
    }
    let others = policies.len() - shown.len();
    if !shown.is_empty() {
        let heads = [
            "POLICY",
            "GENERATION",
            "APPLIED",
            "PODS",
            "ENFORCED",
            "NOTE",
        ];
        let mut rows = vec![heads.map(str::to_owned).to_vec()];
        rows.extend(shown.into_iter().map(policy_row));
        text.push_str(&columns("", &rows));
    }
    if others > 0 {
        let _ = writeln!(text, "{others} policies select no pod of this node");
    }
    text.push('\n');
}

fn policy_row(policy: &PolicyStatus) -> Vec<String> {
    let generation = |number: Option<i64>| number.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let name = match &policy.namespace {
        Some(namespace) => format!("{} {namespace}/{}", policy.kind, policy.name),
        None => format!("{} {}", policy.kind, policy.name),
    };
    vec![
        name,
        generation(policy.generation),
        generation(policy.applied_generation),
        policy.selected.to_string(),
        policy.enforced.to_string(),
        policy.problem.clone().unwrap_or_default(),
    ]
}

fn row(pod: &PodStatus) -> Vec<String> {
    let dash = || "-".to_owned();
    let counts = |enforced: usize| {
        if pod.enforced {
            enforced.to_string()
        } else {
            dash()
        }
    };
    let denied: u64 = pod.denied.values().chain(pod.would_deny.values()).sum();
    vec![
        format!("{}/{}", pod.namespace, pod.pod),
        pod.mode.clone(),
        or_dash(&interfaces(pod)),
        pod.policy_version
            .map_or_else(dash, |version| version.to_string()),
        pod.applied.clone().map_or_else(dash, seconds_only),
        counts(pod.names),
        counts(pod.addresses),
        if pod.enforced {
            (denied + pod.denials_unreported).to_string()
        } else {
            dash()
        },
        pod.problem.clone().unwrap_or_default(),
    ]
}

fn one(pod: &PodStatus) -> String {
    let mut text = format!("{}/{}  uid {}\n", pod.namespace, pod.pod, pod.uid);
    let mut rows = vec![vec!["mode".to_owned(), pod.mode.clone()]];
    rows.push(vec![
        "enforced".to_owned(),
        if pod.enforced {
            format!("on {}", interfaces(pod))
        } else {
            "no".to_owned()
        },
    ]);
    if let (Some(applied), Some(version)) = (&pod.applied, pod.policy_version) {
        let since = seconds_only(applied.clone());
        rows.push(vec![
            "policy".to_owned(),
            format!("version {version} since {since}"),
        ]);
    }
    if let Some(problem) = &pod.problem {
        rows.push(vec!["problem".to_owned(), problem.clone()]);
    }
    rows.push(vec![
        "denied".to_owned(),
        or_none(&counts(&pod.denied)).to_owned(),
    ]);
    if !pod.would_deny.is_empty() {
        rows.push(vec!["would deny".to_owned(), counts(&pod.would_deny)]);
    }
    if pod.denials_unreported > 0 {
        rows.push(vec![
            "unreported".to_owned(),
            pod.denials_unreported.to_string(),
        ]);
    }
    if let Some(last) = &pod.last_denial {
        rows.push(vec!["last denial".to_owned(), last.to_string()]);
    }
    text.push_str(&columns("  ", &rows));
    let _ = writeln!(
        text,
        "  resolved: {} allowed names, {} addresses in the allow map",
        pod.names, pod.addresses
    );
    let mut rows = Vec::new();
    for resolved in pod.resolved.iter().flatten() {
        let name = resolved.name.clone();
        let name = name.unwrap_or_else(|| "(learned by an earlier agent)".to_owned());
        let note = if resolved.listed {
            ""
        } else {
            "no entry allows it"
        };
        for (i, address) in resolved.addresses.iter().enumerate() {
            let life = match address.remaining_seconds {
                0 => "expired".to_owned(),
                seconds => span(seconds),
            };
            let name = if i == 0 { name.clone() } else { String::new() };
            rows.push(vec![
                name,
                address.address.to_string(),
                life,
                note.to_owned(),
            ]);
        }
    }
    text.push_str(&columns("    ", &rows));
    if pod.resolved_left_out > 0 {
        let _ = writeln!(text, "    and {} more addresses", pod.resolved_left_out);
    }
    text
}

fn interfaces(pod: &PodStatus) -> String {
    let names = pod
        .interfaces
        .iter()
        .map(|interface| match &interface.name {
            Some(name) => format!("{name} ({})", interface.index),
            None => format!("({})", interface.index),
        });
    names.collect::<Vec<_>>().join(", ")
}

fn counts(counts: &BTreeMap<String, u64>) -> String {
    let counts = counts
        .iter()
        .map(|(reason, count)| format!("{reason} {count}"));
    counts.collect::<Vec<_>>().join(", ")
}

fn lines(text: &mut String, title: &str, wrong: &[String]) {
    for line in wrong {
        let _ = writeln!(text, "{title}: {line}");
    }
}

/// A time without milliseconds.
fn seconds_only(time: String) -> String {
    match time.split_once('.') {
        Some((seconds, _)) => format!("{seconds}Z"),
        None => time,
    }
}

fn or_none(text: &str) -> &str {
    if text.is_empty() { "none" } else { text }
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-" } else { text }.to_owned()
}
