//! In a cluster with many policy objects: the time until an edit of a label is in force, and its cost.
#![allow(
    clippy::allow_attributes,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "the measured values are far below those at which a float loses whole units"
)]

mod common;

use std::{
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use common::{
    Spread, cpu_ns,
    full_node::{FullNode, PODS, SETTLED, cluster},
    mib,
    objects::{Admin, GROUP},
    print_table, quantile, since, status_kib,
};
use egress_agent::datapath::{Attach, Datapath, InterfaceMap, Options};
use egress_common::{
    flow::UDP_NS,
    ids::{IfIndex, PolicyId},
    limits::{ALLOW_ENTRIES, FLOW_ENTRIES, FlowLimits},
};
use egress_tests::Cluster;
use serde_json::{Value, json};
use tokio::{runtime::Runtime, task::JoinSet, time};

/// The numbers of policies that select none of the pods.
const POLICIES: [usize; 4] = [10, 100, 1_000, 10_000];
/// The number of measurements with each number of policies.
const ROUNDS: usize = 5;
/// The number of edits of a measurement: one of each pod.
const EDITS: usize = PODS;
/// The time from one edit to the next.
const EDIT_EVERY: Duration = Duration::from_millis(20);
/// The number of edits of policies.
const POLICY_EDITS: usize = 10;
/// How often the measurement looks whether an edit is in force.
const LOOK_EVERY: Duration = Duration::from_micros(500);
/// The time within which an edit must be in force.
const IN_FORCE: Duration = Duration::from_secs(20);
/// The number of namespaces that policies are in, besides that of the pods.
const NAMESPACES: usize = 40;

fn main() {
    let cluster = cluster();
    let runtime = Runtime::new().expect("a tokio runtime");
    let admin = Arc::new(runtime.block_on(Admin::connect(&cluster.server)));
    runtime.block_on(admin.install());
    let full = FullNode::new(&cluster);
    let mut scene = Scene {
        known: vec![PolicyId::new(0); PODS],
        ifindexes: (full.pods.iter())
            .map(|pod| cluster.lab.ifindex(pod.net().interface()))
            .collect(),
        full,
        runtime,
        admin,
        rounds: 0,
    };
    scene.select(&cluster);
    let mut all = Vec::new();
    let mut made = 0;
    for policies in POLICIES {
        scene.create(made..policies);
        made = policies;
        all.push(cluster.lab.node().run(|| scene.measure(&cluster, policies)));
    }
    print(&all);
    let Scene { mut full, .. } = scene;
    full.agent.stop();
    print_start(&cluster, &full);
}

/// The measurements with one number of policies.
struct Measured {
    policies: usize,
    /// Milliseconds from the API server's response to an edit of a label until it is in force, sorted.
    label: Vec<f64>,
    /// The same of an edit of a policy that selects one pod.
    policy: Vec<f64>,
    /// CPU milliseconds of the agent for each edit of a label that changes what selects the pod, in each round.
    changing: Vec<f64>,
    /// The same of a label that no selector names.
    ignored: Vec<f64>,
    resident: u64,
    peak: u64,
}

struct Scene {
    full: FullNode,
    runtime: Runtime,
    admin: Arc<Admin>,
    ifindexes: Vec<IfIndex>,
    /// The version of each pod's policy that is in force.
    known: Vec<PolicyId>,
    /// Counts the rounds of edits of labels.
    rounds: usize,
}

/// An edit to which the API server has responded.
#[derive(Clone, Copy)]
struct Answered {
    pod: usize,
    at: Instant,
}

impl Scene {
    /// Creates the policies and sets that select pods: a guardrail for all of them, and one policy for each value of
    /// the label `version`.
    fn select(&self, cluster: &Cluster) {
        let namespaces =
            (0..NAMESPACES).map(|n| cluster.namespace(&format!("team{n}"), &json!({})));
        namespaces.for_each(drop);
        let partners = json!({
            "apiVersion": GROUP,
            "kind": "EgressSet",
            "metadata": { "name": "partners" },
            "spec": { "destinations": ["partner.test", "198.51.100.0/24"] },
        });
        let guard = json!({
            "apiVersion": GROUP,
            "kind": "ClusterEgressPolicy",
            "metadata": { "name": "guard" },
            "spec": {
                "tier": "Admin",
                "priority": 1,
                "rules": [{ "action": "Deny", "entries": ["*:25/tcp", "*.evil.test"] }],
            },
        });
        let of_versions = (0..2).map(|version| {
            let allow = json!(["@partners:443", format!("203.0.113.{}:443", 10 + version)]);
            policy(
                &self.full.namespace,
                &format!("version{version}"),
                ("version", &version.to_string()),
                &allow,
            )
        });
        let allow = json!(["192.0.2.0/28:443"]);
        let first = policy(&self.full.namespace, "first", ("first", "yes"), &allow);
        let all = [partners, guard, first].into_iter().chain(of_versions);
        self.runtime.block_on(self.admin.create(all));
        self.runtime.block_on(async {
            for pod in &self.full.pods {
                let (namespace, name) = (pod.net().namespace(), pod.net().name());
                self.admin.label(namespace, name, ("version", "0")).await;
            }
            let pod = self.full.pods[0].net();
            self.admin
                .label(pod.namespace(), pod.name(), ("first", "yes"))
                .await;
        });
    }

    /// Creates policies that select none of the pods: half of them in other namespaces, a quarter in that of the pods,
    /// and a quarter for the whole cluster. One in twenty comes with a set, which it uses.
    fn create(&self, numbers: std::ops::Range<usize>) {
        let objects = numbers.flat_map(|n| {
            let value = format!("none-{n}");
            let set = format!("set-{n}");
            let uses_set = n % 20 == 0;
            let mut allow: Vec<String> = (0..8).map(|k| format!("host{k}.n{n}.test:443")).collect();
            if uses_set {
                allow.push(format!("@{set}:443"));
            }
            let other = self
                .full
                .namespace
                .replace("full", &format!("team{}", n % NAMESPACES));
            let name = format!("policy-{n}");
            let policy = match n % 4 {
                0 => policy(&self.full.namespace, &name, ("app", &value), &json!(allow)),
                1 => json!({
                    "apiVersion": GROUP,
                    "kind": "ClusterEgressPolicy",
                    "metadata": { "name": name },
                    "spec": {
                        "tier": "Admin",
                        "priority": n % 1000,
                        "podSelector": { "matchLabels": { "app": value } },
                        "rules": [{ "action": "Allow", "entries": allow }],
                    },
                }),
                _ => policy(&other, &name, ("app", &value), &json!(allow)),
            };
            let set = uses_set.then(|| {
                let destinations: Vec<String> =
                    (0..10).map(|k| format!("set{k}.n{n}.test")).collect();
                json!({
                    "apiVersion": GROUP,
                    "kind": "EgressSet",
                    "metadata": { "name": set },
                    "spec": { "destinations": destinations },
                })
            });
            set.into_iter().chain([policy])
        });
        let objects: Vec<Value> = objects.collect();
        self.runtime.block_on(self.admin.create(objects));
    }

    /// To be called in the node's network namespace.
    fn measure(&mut self, cluster: &Cluster, policies: usize) -> Measured {
        let interfaces = interfaces(cluster);
        // Creating objects keeps the agent busy for a moment after the last one.
        thread::sleep(10 * SETTLED);
        self.note(&interfaces);
        let mut measured = Measured {
            policies,
            label: Vec::new(),
            policy: Vec::new(),
            changing: Vec::new(),
            ignored: Vec::new(),
            resident: 0,
            peak: 0,
        };
        for _ in 0..ROUNDS {
            self.rounds += 1;
            let before = cpu_ns(self.full.agent.pid());
            measured
                .label
                .extend(self.churn("version", Some(&interfaces)));
            let used = (cpu_ns(self.full.agent.pid()) - before) as f64;
            measured.changing.push(used / 1e6 / EDITS as f64);

            thread::sleep(SETTLED);
            let before = cpu_ns(self.full.agent.pid());
            self.churn("note", None);
            let used = (cpu_ns(self.full.agent.pid()) - before) as f64;
            measured.ignored.push(used / 1e6 / EDITS as f64);
        }
        for n in 0..POLICY_EDITS {
            thread::sleep(SETTLED);
            let allow = json!([format!("192.0.2.{}/28:443", 16 * ((n + 1) % 2))]);
            let first = policy(&self.full.namespace, "first", ("first", "yes"), &allow);
            self.runtime.block_on(self.admin.apply(&first));
            let answered = Answered {
                pod: 0,
                at: Instant::now(),
            };
            let taken = self.wait(&interfaces, answered);
            measured.policy.push(taken);
        }
        measured.label.sort_unstable_by(f64::total_cmp);
        measured.policy.sort_unstable_by(f64::total_cmp);
        let pid = self.full.agent.pid();
        [measured.resident, measured.peak] = ["VmRSS", "VmHWM"].map(|field| status_kib(pid, field));
        measured
    }

    /// Edits a label of one pod after the other to another value than in the round before. With `interfaces`, it waits until each edit is in
    /// force; returns the milliseconds of each.
    fn churn(&mut self, label: &'static str, interfaces: Option<&InterfaceMap>) -> Vec<f64> {
        let (answered, answers) = mpsc::channel();
        let pods: Vec<(String, String)> = (self.full.pods.iter())
            .map(|pod| {
                (
                    pod.net().namespace().to_owned(),
                    pod.net().name().to_owned(),
                )
            })
            .collect();
        let value = (self.rounds % 2).to_string();
        let admin = Arc::clone(&self.admin);
        let editing = self.runtime.spawn(async move {
            let mut every = time::interval(EDIT_EVERY);
            let mut edits = JoinSet::new();
            for (pod, (namespace, name)) in pods.into_iter().enumerate() {
                every.tick().await;
                let (admin, answered) = (Arc::clone(&admin), answered.clone());
                let value = value.clone();
                edits.spawn(async move {
                    admin.label(&namespace, &name, (label, &value)).await;
                    let at = Instant::now();
                    let _ = answered.send(Answered { pod, at });
                });
            }
            edits.join_all().await;
        });
        let mut taken = Vec::new();
        for answered in answers {
            if let Some(interfaces) = interfaces {
                taken.push(self.wait(interfaces, answered));
            }
        }
        self.runtime.block_on(editing).expect("no edit fails");
        taken
    }

    /// Waits until a pod is under another version of its policy.
    fn wait(&mut self, interfaces: &InterfaceMap, answered: Answered) -> f64 {
        let Answered { pod, at } = answered;
        let ifindex = self.ifindexes[pod];
        loop {
            let now = version(interfaces, ifindex);
            if now != self.known[pod] {
                self.known[pod] = now;
                return since(at);
            }
            assert!(
                at.elapsed() < IN_FORCE,
                "an edit of pod {pod} is not in force"
            );
            thread::sleep(LOOK_EVERY);
        }
    }

    fn note(&mut self, interfaces: &InterfaceMap) {
        let known = self
            .ifindexes
            .iter()
            .map(|&ifindex| version(interfaces, ifindex));
        self.known = known.collect();
    }
}

fn version(interfaces: &InterfaceMap, ifindex: IfIndex) -> PolicyId {
    let entry = interfaces.entry(ifindex).expect("the map can be read");
    entry.expect("the pod is enforced").policy()
}

/// The agent's map of interfaces.
fn interfaces(cluster: &Cluster) -> InterfaceMap {
    let datapath = Datapath::open(&Options {
        bpffs: cluster.lab.bpffs(),
        allow_entries: ALLOW_ENTRIES,
        flows: FlowLimits::of(FLOW_ENTRIES),
        udp_idle: Duration::from_nanos(UDP_NS),
        attach: Attach::Auto,
        trace: false,
        learns: true,
    });
    let datapath = datapath.expect("the agent's maps");
    datapath.interfaces().expect("the agent's map")
}

fn policy(namespace: &str, name: &str, label: (&str, &str), allow: &Value) -> Value {
    let (key, value) = label;
    json!({
        "apiVersion": GROUP,
        "kind": "EgressPolicy",
        "metadata": { "namespace": namespace, "name": name },
        "spec": { "podSelector": { "matchLabels": { key: value } }, "allow": allow },
    })
}

fn print(all: &[Measured]) {
    println!("A node with {PODS} pods, and edits of labels, 50 a second.\n");
    let mut rows = vec![row![
        "policies that select no pod",
        "label: in force, median",
        "p95",
        "longest",
        "policy: in force, median",
        "longest",
        "CPU",
        "resident",
        "peak",
    ]];
    let ms = |sorted: &[f64], part| format!("{:.0} ms", quantile(sorted, part));
    for measured in all {
        let share = Spread::of(measured.changing.iter().copied()).middle;
        let share = share / (EDIT_EVERY.as_secs_f64() * 1e3);
        rows.push(row![
            measured.policies,
            ms(&measured.label, 0.5),
            ms(&measured.label, 0.95),
            ms(&measured.label, 1.0),
            ms(&measured.policy, 0.5),
            ms(&measured.policy, 1.0),
            format!("{:.0} %", 100.0 * share),
            mib(measured.resident),
            mib(measured.peak),
        ]);
    }
    print_table(&rows);

    println!("The agent's CPU time for one edit, {ROUNDS} rounds of {EDITS} edits.\n");
    let mut rows = vec![row![
        "policies that select no pod",
        "changes the pod's policy",
        "ratio",
        "in no selector",
        "ratio",
    ]];
    let base = |of: fn(&Measured) -> &Vec<f64>| {
        Spread::of(all.iter().take(1).flat_map(of).copied()).middle
    };
    let (changing, ignored) = (base(|one| &one.changing), base(|one| &one.ignored));
    for measured in all {
        let spread = |numbers: &[f64]| Spread::of(numbers.iter().copied());
        let ratio = |numbers: &[f64], base: f64| Spread::of(numbers.iter().map(|one| one / base));
        rows.push(row![
            measured.policies,
            spread(&measured.changing).number("ms", 2),
            ratio(&measured.changing, changing).ratio(),
            spread(&measured.ignored).number("ms", 2),
            ratio(&measured.ignored, ignored).ratio(),
        ]);
    }
    print_table(&rows);
}

/// Starts another agent, which lists all policies at once.
fn print_start(cluster: &Cluster, full: &FullNode) {
    let start = Instant::now();
    let agent = cluster.start_agent();
    let ready = since(start);
    for pod in &full.pods {
        agent.wait_enforcing(pod.net());
    }
    let [resident, peak] = ["VmRSS", "VmHWM"].map(|field| status_kib(agent.pid(), field));
    println!(
        "An agent that starts with all of them is ready after {:.1} s, with {} resident and a peak of {}.",
        ready / 1e3,
        mib(resident),
        mib(peak)
    );
}
