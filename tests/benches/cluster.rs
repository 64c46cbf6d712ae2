//! In a cluster: the time until a new pod is enforced, the time until an annotation is applied, and the cost
//! of an agent with many pods.
#![allow(
    clippy::allow_attributes,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "the measured values are far below those at which a float loses whole units"
)]

mod common;

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use common::{
    dns::ZONE,
    full_node::{ADDRESSES, FullNode, PODS, SETTLED, cluster},
    print_table, quantile, resident, share_of_cpu, since,
};
use egress_tests::{Agent, Cluster, addresses::server, cluster::allow};
use serde_json::Value;

/// The number of new pods, and of edits.
const ROUNDS: usize = 30;
/// The number of pods that are added to it: a laboratory has no room for more.
const MORE: usize = 4;
/// The duration of the idle phase.
const IDLE: Duration = Duration::from_secs(60);
/// The time that a runtime takes, or more, from a pod's interface to its first process.
const RUNTIME: Duration = Duration::from_millis(200);

fn main() {
    few_pods();
    many_pods();
}

fn few_pods() {
    let cluster = cluster();
    let agent = cluster.start_agent();
    let [closed, process] = new_pods(&cluster, &agent, "after", Process::AfterInterface, ROUNDS);
    let [_, interface] = new_pods(&cluster, &agent, "before", Process::BeforeInterface, ROUNDS);
    let [sent, answered] = edits(&cluster, &agent);
    println!("A node with one pod at a time.\n");
    print_table(&[
        row!["from", "to", "median", "p95", "longest"],
        row(
            "the interface is made",
            "it is closed to the outside",
            closed,
        ),
        row(
            "the pod's process is there too",
            "the pod is enforced",
            process,
        ),
        row(
            "the interface is made, after the process",
            "the pod is enforced",
            interface,
        ),
        row("an edit is sent to the API server", "it is in force", sent),
        row("the API server has answered", "it is in force", answered),
    ]);
}

fn many_pods() {
    let cluster = cluster();
    let full = FullNode::new(&cluster);
    let rows = cost_of_many(&full.agent);
    let [closed, process] = new_pods(
        &cluster,
        &full.agent,
        "after",
        Process::AfterInterface,
        MORE,
    );
    let [sent, answered] = edits(&cluster, &full.agent);
    println!("A node with {PODS} pods.\n");
    print_table(&rows);
    print_table(&[
        row!["from", "to", "median", "p95", "longest"],
        row(
            "the interface is made",
            "it is closed to the outside",
            closed,
        ),
        row(
            "the pod's process is there too",
            "the pod is enforced",
            process,
        ),
        row("an edit is sent to the API server", "it is in force", sent),
        row("the API server has answered", "it is in force", answered),
    ]);
}

fn row(from: &str, to: &str, mut taken: Vec<f64>) -> Vec<String> {
    taken.sort_unstable_by(f64::total_cmp);
    let ms = |part| format!("{:.0} ms", quantile(&taken, part));
    row![from, to, ms(0.5), ms(0.95), ms(1.0)]
}

/// Whether a pod's process starts before or after its interface exists.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Process {
    BeforeInterface,
    AfterInterface,
}

/// Creates pods one by one whose objects the API server already has. Returns milliseconds from the interface
/// to its quarantine (if no process exists yet), and from the later of process and interface to the pod's
/// enforcement.
fn new_pods(
    cluster: &Cluster,
    agent: &Agent,
    name: &str,
    process: Process,
    rounds: usize,
) -> [Vec<f64>; 2] {
    let namespace = cluster.namespace(name, &Value::Null);
    let policy = allow(&format!("{}:443 *.{ZONE}:443", server(10)));
    let mut taken: [Vec<f64>; 2] = Default::default();
    for n in 0..rounds {
        let name = format!("p{n}");
        let (object, uid) = cluster.create(&namespace, &name, &policy);
        let net = cluster.lab.pod_without_interface(&namespace, &name);
        let interface = net.interface().to_owned();
        sleep(SETTLED);
        let mut pod;
        let start = if process == Process::BeforeInterface {
            pod = cluster.pod_without_processes(object, &uid, net);
            pod.running().start_container();
            let start = Instant::now();
            cluster.lab.add_interface(pod.net());
            start
        } else {
            let start = Instant::now();
            cluster.lab.add_interface(&net);
            agent.wait_log("that the interface is enforced", |line| {
                line.contains("enforcing") && line.contains(&format!("pod=interface {interface} "))
            });
            taken[0].push(since(start));
            sleep(RUNTIME);
            pod = cluster.pod_without_processes(object, &uid, net);
            pod.running().start_container();
            Instant::now()
        };
        agent.wait_enforcing(pod.net());
        taken[1].push(since(start));
        cluster.delete(pod);
    }
    taken
}

/// Edits a pod's annotation. Returns the milliseconds until it is applied, from the request and from the API
/// server's response, which comes at about the time of the watch event.
fn edits(cluster: &Cluster, agent: &Agent) -> [Vec<f64>; 2] {
    let namespace = cluster.namespace("edited", &Value::Null);
    let policies = ["a.test:443 192.0.2.0/24:443", "b.test:443 198.51.100.0/24"].map(allow);
    let mut pod = cluster.run(&namespace, "p", &policies[0]);
    agent.wait_enforcing(pod.net());
    let of_pod = format!("pod={namespace}/p ");
    let mut taken: [Vec<f64>; 2] = Default::default();
    for n in 0..ROUNDS {
        sleep(SETTLED);
        let start = Instant::now();
        let mut answered = start;
        agent.logs_after(
            "that the policy is applied",
            || {
                cluster.annotate(&mut pod, &policies[(n + 1) % 2]);
                answered = Instant::now();
            },
            |line| line.contains("policy applied") && line.contains(&of_pod),
        );
        taken[0].push(since(start));
        taken[1].push(since(answered));
    }
    taken
}

/// The memory that the agent of a full node has, and its CPU time while nothing happens.
fn cost_of_many(agent: &Agent) -> Vec<Vec<String>> {
    let mut rows = vec![row!["", "resident", "CPU, of one core"]];
    let pods = format!("{PODS} pods of {ADDRESSES} addresses");
    rows.push(row![pods, resident(agent.pid()), "-"]);
    sleep(2 * SETTLED);
    let used = share_of_cpu(agent.pid(), || sleep(IDLE));
    rows.push(row![
        format!("after {} idle seconds", IDLE.as_secs()),
        resident(agent.pid()),
        used
    ]);
    rows
}
