//! How long it takes until a changed manifest is in force: for one pod, and for a hundred whose
//! namespace is edited.
#![allow(
    clippy::allow_attributes,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "what is measured is far from where a float loses its units"
)]

mod common;

use std::time::Instant;

use common::{Spread, print_table, quantile};
use egress_tests::{Agent, Annotations, Lab, Pod};

const PODS: usize = 100;
const ROUNDS: usize = 20;
const ROUNDS_OF_MANY: usize = 5;

/// Two policies that differ; each has a name and a prefix, and so all the maps there are.
const POLICIES: [&str; 2] = ["a.test:443 192.0.2.0/24:443", "b.test:443 198.51.100.0/24"];

/// What is waited for is what the agent says as soon as it is so: of each pod, or of several.
const STEPS: [(&str, &str); 4] = [
    ("begin", "enforcing"),
    ("change", "policy applied"),
    ("release", "released"),
    ("remove", "removed"),
];

fn main() {
    let lab = Lab::builder().without_dns().build();
    let one = lab.pod("one", "p");
    let many: Vec<Pod> = (0..PODS)
        .map(|i| lab.pod("many", &format!("p{i}")))
        .collect();
    // Without a policy of their own: their namespace gives them theirs, and takes it away.
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

/// Gives the namespace a policy, another one, and none, over and over; milliseconds of each step. What
/// has been removed is waited for as part of removing it.
fn rounds(lab: &Lab, agent: &Agent, namespace: &str, pods: usize, rounds: usize) -> [Vec<f64>; 4] {
    let mut taken: [Vec<f64>; 4] = Default::default();
    for _ in 0..rounds {
        let [first, second] = POLICIES;
        let steps: [Annotations<'_>; 3] = [&[("allow", first)], &[("allow", second)], &[]];
        for (i, annotations) in steps.into_iter().enumerate() {
            let (_, says) = STEPS[i];
            let is_last = i + 1 == steps.len();
            let (mut said, mut removed) = (0, 0);
            let mut in_force = None;
            let start = Instant::now();
            agent.says_after(
                &format!("{says}, of {pods} pods"),
                || lab.write_namespace(namespace, annotations),
                |line| {
                    if line.contains(says) {
                        said += of_pods(line);
                    }
                    if said == pods {
                        in_force.get_or_insert_with(|| start.elapsed());
                    }
                    removed += usize::from(line.contains(STEPS[3].1));
                    said == pods && (!is_last || removed == pods)
                },
            );
            let whole = start.elapsed();
            taken[i].push(in_force.unwrap_or(whole).as_secs_f64() * 1e3);
            if is_last {
                taken[3].push(whole.as_secs_f64() * 1e3);
            }
        }
    }
    taken
}

/// How many pods a line is about.
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
