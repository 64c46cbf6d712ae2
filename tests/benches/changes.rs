//! The time until a changed manifest is applied: for one pod, and for a hundred pods whose namespace is
//! edited.
#![allow(
    clippy::allow_attributes,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "the measured values are far below those at which a float loses whole units"
)]

mod common;

use std::time::Instant;

use common::{Spread, print_table, quantile};
use egress_tests::{Agent, Annotations, Lab, Pod};

const PODS: usize = 100;
const ROUNDS: usize = 20;
const ROUNDS_OF_MANY: usize = 5;

/// Two different policies. Each has a name and a prefix, so it uses every kind of map.
const POLICIES: [&str; 2] = ["a.test:443 192.0.2.0/24:443", "b.test:443 198.51.100.0/24"];

/// The steps, and the log line that ends each of them, for one pod or for several.
const STEPS: [(&str, &str); 4] = [
    ("begin", "enforcing"),
    ("change", "policy applied"),
    ("remove", "released"),
    ("detach", "removed"),
];

fn main() {
    let lab = Lab::builder().without_dns().build();
    let one = lab.pod("one", "p");
    let many: Vec<Pod> = (0..PODS)
        .map(|i| lab.pod("many", &format!("p{i}")))
        .collect();
    // The pods have no policy of their own: their namespace sets and removes it.
    for pod in many.iter().chain([&one]) {
        lab.write_pod(pod, &[]);
    }
    let agent = lab.start_agent(&[]);
    let mut rows = vec![row![
        "",
        "one pod",
        "longest round",
        format!("{PODS} pods, all of them"),
        "longest round",
    ]];
    let of_one = rounds(&lab, &agent, "one", 1, ROUNDS);
    let of_many = rounds(&lab, &agent, "many", PODS, ROUNDS_OF_MANY);
    for (i, (step, _)) in STEPS.iter().enumerate() {
        rows.push(row![
            step,
            middle(&of_one[i]),
            longest(&of_one[i]),
            middle(&of_many[i]),
            longest(&of_many[i]),
        ]);
    }
    println!("From a changed manifest to its being in force, in milliseconds.\n");
    print_table(&rows);
}

/// Sets, changes and removes the namespace's policy repeatedly; returns the milliseconds of each step. Each
/// removal includes the wait until the programs are detached.
fn rounds(lab: &Lab, agent: &Agent, namespace: &str, pods: usize, rounds: usize) -> [Vec<f64>; 4] {
    let mut taken: [Vec<f64>; 4] = Default::default();
    for _ in 0..rounds {
        let [first, second] = POLICIES;
        let steps: [Annotations<'_>; 3] = [&[("allow", first)], &[("allow", second)], &[]];
        for (i, annotations) in steps.into_iter().enumerate() {
            let (_, says) = STEPS[i];
            let is_last = i + 1 == steps.len();
            let (mut reported, mut removed) = (0, 0);
            let mut applied = None;
            let start = Instant::now();
            agent.logs_after(
                &format!("{says}, of {pods} pods"),
                || lab.write_namespace(namespace, annotations),
                |line| {
                    if line.contains(says) {
                        reported += of_pods(line);
                    }
                    if reported == pods {
                        applied.get_or_insert_with(|| start.elapsed());
                    }
                    removed += usize::from(line.contains(STEPS[3].1));
                    reported == pods && (!is_last || removed == pods)
                },
            );
            let whole = start.elapsed();
            taken[i].push(applied.unwrap_or(whole).as_secs_f64() * 1e3);
            if is_last {
                taken[3].push(whole.as_secs_f64() * 1e3);
            }
        }
    }
    taken
}

/// The number of pods that a line is about.
fn of_pods(line: &str) -> usize {
    let Some((_, pods)) = line.split_once("pods=") else {
        return 1;
    };
    let digits = pods.split(|c: char| !c.is_ascii_digit()).next();
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(1)
}

fn middle(taken: &[f64]) -> String {
    Spread::of(taken.iter().copied()).number("ms", 0)
}

fn longest(taken: &[f64]) -> String {
    let mut sorted = taken.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    format!("{:.0} ms", quantile(&sorted, 1.0))
}
