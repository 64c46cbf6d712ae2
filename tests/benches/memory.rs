//! The agent's memory when it enforces many pods that have learned many addresses.
#![allow(
    clippy::allow_attributes,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "the measured values are far below those at which a float loses whole units"
)]

mod common;

use std::{path::Path, process::Command};

use common::{
    dns::{Client, ZONE},
    print_table,
    responder::Responder,
    status_kib,
};
use egress_common::limits::ALLOW_ENTRIES;
use egress_tests::{Lab, Pod, addresses::RESOLVER};

const PODS: usize = 100;
const ADDRESSES: u32 = 200;
const RANDOM_NAMES: u32 = 100_000;

fn main() {
    let lab = Lab::builder().without_dns().build();
    let _responder = Responder::start(&lab);
    let pods: Vec<Pod> = (0..PODS).map(|i| lab.pod("b", &format!("p{i}"))).collect();
    let first = lab.pod("b", "first");
    let rules = format!("*.{ZONE}:443");
    lab.write_pod(&first, &[("allow", &rules)]);
    let agent = lab.start_agent(&[&first]);
    Client::new(&first, RESOLVER).latencies(1);
    let mut rows = vec![row!["", "resident", "of it private", "peak"]];
    let mut state = |what: &str| {
        let [resident, private, peak] =
            ["VmRSS", "RssAnon", "VmHWM"].map(|field| status_kib(agent.pid(), field));
        let mib = |kib: u64| format!("{:.1} MiB", kib as f64 / 1024.0);
        rows.push(row![what, mib(resident), mib(private), mib(peak)]);
    };
    state("one pod, one address");
    for pod in &pods {
        lab.write_pod(pod, &[("allow", &rules)]);
    }
    for pod in &pods {
        agent.wait_enforcing(pod);
    }
    state(&format!("{PODS} pods"));
    for pod in &pods {
        Client::new(pod, RESOLVER).latencies(ADDRESSES);
    }
    state(&format!("{PODS} pods of {ADDRESSES} addresses"));
    println!("The agent's memory.\n");
    print_table(&rows);

    assert_eq!(lab.allowed(&pods[0]).len(), ADDRESSES as usize);
    let (mut shared, mut own) = (0, 0);
    for pin in lab.all_pins() {
        let Some(bytes) = map_bytes(&pin) else {
            continue;
        };
        if pin.starts_with(lab.pins().join("pods")) {
            own += bytes;
        } else {
            shared += bytes;
        }
    }
    println!(
        "The kernel's memory for maps: {:.1} MiB shared by all pods, {:.0} KiB more for each pod.",
        shared as f64 / f64::from(1 << 20),
        own as f64 / 1024.0 / (PODS + 1) as f64
    );

    // A pod resolves random names below its wildcard: the memory for them is limited.
    let before = status_kib(agent.pid(), "RssAnon");
    let client = Client::new(&first, RESOLVER);
    for round in 1..=2 {
        client.questions_per_second(RANDOM_NAMES / 2, 32);
        println!(
            "After {} names of one pod: {:.1} MiB more, {} addresses in its map.",
            round * RANDOM_NAMES / 2,
            (status_kib(agent.pid(), "RssAnon").saturating_sub(before)) as f64 / 1024.0,
            lab.allowed(&first).len()
        );
        assert!(lab.allowed(&first).len() <= ALLOW_ENTRIES as usize);
    }
}

/// The memory that the kernel accounts for the pinned map, in bytes; `None` for other pins.
fn map_bytes(pin: &Path) -> Option<u64> {
    let output = Command::new("bpftool")
        .args(["--json", "map", "show", "pinned"])
        .arg(pin)
        .output()
        .expect("bpftool");
    let shown: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    shown["bytes_memlock"].as_u64()
}
