//! The cost of many nodes' reports for the API server.
//!
//! Simulated agents write with the agent's own code, each over a connection of its own. Every agent's report changes at
//! the same moment, as when a policy that selects pods of every node is edited.
#![allow(
    clippy::allow_attributes,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "the measured values are far below those at which a float loses whole units"
)]

mod common;

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use common::{Spread, cpu_ns, print_table};
use egress_agent::pods::{
    PodCounts, PolicyState,
    cluster::{NodeReport, ReportSink},
};
use egress_policy::objects::{ObjectKind, ObjectName};
use egress_tests::{ApiServer, Identity, cluster::rights, yaml};
use serde_json::{Value, json};
use tokio::{runtime::Runtime, task::JoinSet, time::sleep};

/// The number of simulated agents.
const AGENTS: usize = 100;
/// The number of policies in the cluster.
const POLICIES: usize = 500;
/// How often the policy of all nodes is edited.
const EDITS: i64 = 7;
/// The duration of the idle phase.
const IDLE: Duration = Duration::from_secs(20);
/// The nodes that the numbers are extrapolated to.
const NODES: usize = 5_000;
/// The most that all nodes together write in a second.
const WRITES_A_SECOND: usize = 100;

fn main() {
    let server = ApiServer::start();
    server.allow_agent("agent", &rights(|_| true));
    for definition in yaml::objects("base/crds.yaml") {
        let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
        let status = server.asked_by(Identity::Admin, "POST", path, &definition);
        assert_eq!(status, 200, "{definition}");
    }
    let rows = [40, POLICIES].map(|selecting| measure(&server, selecting));
    println!("{AGENTS} simulated agents, {POLICIES} policies. CPU of one core.\n");
    let mut table = vec![row![
        "policies with pods on each node",
        "object",
        "writes of an edit",
        "API server, each",
        "etcd, each",
        "idle"
    ]];
    table.extend(rows.iter().map(|measured| measured.row.clone()));
    print_table(&table);
    println!("The same for {NODES} nodes, calculated.\n");
    let mut table = vec![row![
        "policies with pods on each node",
        "objects",
        "writes a second",
        "for",
        "API server and etcd meanwhile"
    ]];
    table.extend(rows.iter().map(|measured| measured.extrapolated.clone()));
    print_table(&table);
}

struct Measured {
    row: Vec<String>,
    extrapolated: Vec<String>,
}

/// A report on a node on which this many policies select pods. The first policy has this generation.
fn report(selecting: usize, generation: i64) -> NodeReport {
    let policies: Vec<PolicyState> = (0..POLICIES)
        .map(|number| {
            let generation = if number == 0 { generation } else { 1 };
            let has_pods = number < selecting;
            PolicyState {
                name: Arc::new(ObjectName {
                    kind: ObjectKind::EgressPolicy,
                    namespace: Some(format!("team-{:03}", number / 4)),
                    name: format!("allow-partner-services-{}", number % 4),
                }),
                generation: Some(generation),
                applied: has_pods.then_some(generation),
                selected: if has_pods { 3 } else { 0 },
                enforced: if has_pods { 3 } else { 0 },
                problem: None,
            }
        })
        .collect();
    let pods = PodCounts {
        selected: 110,
        enforced: 110,
        audited: 0,
    };
    NodeReport::new(
        Some("6a1c0ffe-0000-4000-8000-000000000000"),
        pods,
        &policies,
        [].into_iter(),
    )
}

fn measure(server: &ApiServer, selecting: usize) -> Measured {
    let runtime = Runtime::new().expect("a tokio runtime");
    let user = json!({ "token": Identity::Agent.token() });
    let kubeconfig = server.kubeconfig_with("simulated", server.port(), &user);
    let mut tasks = JoinSet::new();
    let agents = runtime.block_on(start(&kubeconfig, selecting, &mut tasks));
    edit(&runtime, &agents, selecting, 1);
    let bytes = object_bytes(server, selecting);

    let cpu = || server.processes().map(cpu_ns);
    let before = cpu();
    std::thread::sleep(IDLE);
    let idle = rates(before, cpu(), IDLE);
    let (mut servers, mut stores) = (Vec::new(), Vec::new());
    for generation in 2..2 + EDITS {
        let (before, begun) = (cpu(), Instant::now());
        edit(&runtime, &agents, selecting, generation);
        // Work of the API server that follows the last response belongs to the write.
        std::thread::sleep(Duration::from_secs(1));
        let elapsed = begun.elapsed();
        let busy = rates(before, cpu(), elapsed);
        let each = |at: usize| (busy[at] - idle[at]) * elapsed.as_secs_f64() * 1e3 / AGENTS as f64;
        servers.push(each(0));
        stores.push(each(1));
    }
    let (api, etcd) = (Spread::of(servers), Spread::of(stores));
    Measured {
        row: row![
            selecting.to_string(),
            kib(bytes),
            AGENTS.to_string(),
            api.number("ms", 2),
            etcd.number("ms", 2),
            format!("{:.2} %", (idle[0] + idle[1]) * 100.0)
        ],
        extrapolated: row![
            selecting.to_string(),
            format!("{:.0} MiB", (bytes * NODES) as f64 / f64::from(1 << 20)),
            WRITES_A_SECOND.to_string(),
            format!("{} s", NODES / WRITES_A_SECOND),
            format!(
                "{:.1} cores",
                WRITES_A_SECOND as f64 * (api.middle + etcd.middle) / 1e3
            )
        ],
    }
}

/// The part of a core that each process used.
fn rates(before: [u64; 2], after: [u64; 2], elapsed: Duration) -> [f64; 2] {
    [0, 1].map(|at| (after[at] - before[at]) as f64 / 1e9 / elapsed.as_secs_f64())
}

fn node(selecting: usize, number: usize) -> String {
    format!("node-{selecting}-{number}")
}

async fn start(kubeconfig: &Path, selecting: usize, tasks: &mut JoinSet<()>) -> Vec<ReportSink> {
    let mut agents = Vec::new();
    for number in 0..AGENTS {
        let agent = ReportSink::alone(kubeconfig, &node(selecting, number), tasks).await;
        agents.push(agent.expect("an agent"));
    }
    agents
}

/// Hands every agent its next report, and waits until all have been written.
fn edit(runtime: &Runtime, agents: &[ReportSink], selecting: usize, generation: i64) {
    runtime.block_on(async {
        let before = written(agents);
        for agent in agents {
            agent.publish(report(selecting, generation));
        }
        let begun = Instant::now();
        while written(agents) < before + agents.len() as u64 {
            assert!(
                begun.elapsed() < Duration::from_secs(120),
                "reports are not written"
            );
            sleep(Duration::from_millis(20)).await;
        }
    });
    let failed: u64 = agents.iter().map(|agent| agent.counters().failed()).sum();
    assert_eq!(failed, 0, "writes failed");
}

fn written(agents: &[ReportSink]) -> u64 {
    agents.iter().map(|agent| agent.counters().written()).sum()
}

/// The size of an object as the API server stores it, in JSON with its metadata.
fn object_bytes(server: &ApiServer, selecting: usize) -> usize {
    let like = json!({
        "apiVersion": "egress-agent.dev/v1alpha1",
        "kind": "EgressNodeReport",
        "metadata": {"name": node(selecting, 0)},
    });
    let reports = server.list(&like).into_iter();
    let mut reports = reports.map(|report| serde_json::to_value(report).expect("JSON"));
    let report =
        reports.find(|report: &Value| report["metadata"]["name"] == like["metadata"]["name"]);
    report.expect("a report").to_string().len()
}

fn kib(bytes: usize) -> String {
    format!("{:.1} KiB", bytes as f64 / 1024.0)
}
