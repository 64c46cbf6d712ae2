//! In a cluster with thousands of Services: what an agent needs to start, and what a change of an `EndpointSlice` costs it.
#![allow(
    clippy::allow_attributes,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "the measured values are far below those at which a float loses whole units"
)]

mod common;

use std::{
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use common::{
    Spread, cpu_ns, full_node::SETTLED, mib, objects::Admin, print_table, quantile, since,
    status_kib,
};
use egress_tests::{
    Agent, ApiServer, Cluster, ClusterPod, Lab, TcpProxy,
    addresses::{self, server},
    cluster::allow,
    newer::NewerApi,
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

/// The numbers of Services.
const SERVICES: [usize; 3] = [0, 1_000, 5_000];
/// The number of endpoints of each, which are pods.
const ENDPOINTS: usize = 10;
/// The number of namespaces that they are in.
const NAMESPACES: usize = 50;
/// The number of pods on the node. All are closed.
const PODS: usize = 50;
/// How often an agent is started.
const STARTS: usize = 3;
/// The number of measurements of changes.
const ROUNDS: usize = 5;
/// The number of changes in each.
const CHANGES: usize = 100;
/// The time from one change to the next.
const CHANGE_EVERY: Duration = Duration::from_millis(50);
/// The number of changes that concern the pods.
const OUTSIDE: usize = 10;

fn main() {
    let scene = Scene::new();
    let mut all = Vec::new();
    let mut made = 0;
    for services in SERVICES {
        scene.create(made..services);
        made = services;
        all.push(scene.measure(services));
    }
    print(&all);
}

/// What was measured with one number of Services.
struct Measured {
    services: usize,
    /// Milliseconds from the agent's start until it is ready, sorted.
    ready: Vec<f64>,
    /// CPU milliseconds of the agent until then, sorted.
    start: Vec<f64>,
    resident: u64,
    peak: u64,
    /// CPU milliseconds of the agent for each change of a slice between pods, in each round.
    change: Vec<f64>,
    /// Milliseconds from the API server's response, when a Service gets an endpoint outside of the cluster, until the
    /// policies of all pods deny it, sorted.
    outside: Vec<f64>,
}

struct Scene {
    cluster: Cluster,
    pods: Vec<ClusterPod>,
    namespaces: Vec<String>,
    runtime: Runtime,
    admin: Admin,
    kubeconfig: PathBuf,
    _proxy: TcpProxy,
    _newer: NewerApi,
}

impl Scene {
    fn new() -> Self {
        let internal = json!([
            addresses::PODS,
            addresses::PODS6,
            "10.96.0.0/16",
            "10.128.0.0/9"
        ]);
        let lab = Lab::builder().without_dns();
        let lab = lab.config("ranges", json!({ "internal": internal }));
        let cluster = Cluster::on(ApiServer::shared(), lab);
        let runtime = Runtime::new().expect("a tokio runtime");
        let admin = runtime.block_on(Admin::connect(&cluster.server));
        let policy = allow(&format!("{}:443", server(10)));
        let shop = cluster.namespace("shop", &policy);
        let pods = (0..PODS).map(|n| cluster.run(&shop, &format!("p{n}"), &Value::Null));
        let pods = pods.collect();
        let namespaces =
            (0..NAMESPACES).map(|n| cluster.namespace(&format!("team{n}"), &json!({})));
        let namespaces = namespaces.collect();
        // The tests' API server has these objects in an older version, which this renames.
        let newer = NewerApi::start(&cluster.server);
        let proxy = TcpProxy::start_in(cluster.lab.node(), newer.port());
        let url = format!("http://127.0.0.1:{}", proxy.port());
        let of_agent = json!({ "server": url });
        let kubeconfig = cluster
            .server
            .kubeconfig_of("services", &of_agent, &json!({}));
        Self {
            cluster,
            pods,
            namespaces,
            runtime,
            admin,
            kubeconfig,
            _proxy: proxy,
            _newer: newer,
        }
    }

    fn create(&self, numbers: std::ops::Range<usize>) {
        let objects = numbers.flat_map(|n| [self.service(n), self.slice(n, &inside(n, 0))]);
        let objects: Vec<Value> = objects.collect();
        self.runtime.block_on(self.admin.create(objects));
    }

    fn service(&self, n: usize) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "namespace": self.namespace(n), "name": format!("s{n}") },
            "spec": { "ports": [{ "name": "web", "port": 80, "targetPort": 8080 }] },
        })
    }

    fn slice(&self, n: usize, addresses: &[String]) -> Value {
        let service = format!("s{n}");
        let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
        let mut slice = NewerApi::slice(self.namespace(n), &service, &service, &addresses);
        slice["endpoints"] = addresses
            .iter()
            .map(|address| json!({ "addresses": [address] }))
            .collect();
        slice["ports"] = json!([{ "name": "web", "port": 8080, "protocol": "TCP" }]);
        slice
    }

    fn namespace(&self, n: usize) -> &str {
        &self.namespaces[n % NAMESPACES]
    }

    fn apply(&self, object: &Value) {
        self.runtime.block_on(self.admin.apply(object));
    }

    /// Starts an agent, and waits until it is ready.
    fn start(&self) -> Agent {
        let agent = self.cluster.lab.spawn_cluster_agent(&self.kubeconfig, &[]);
        agent.wait_ready();
        agent
    }

    fn measure(&self, services: usize) -> Measured {
        let mut measured = Measured {
            services,
            ready: Vec::new(),
            start: Vec::new(),
            resident: 0,
            peak: 0,
            change: Vec::new(),
            outside: Vec::new(),
        };
        for n in 0..STARTS {
            let start = Instant::now();
            let mut agent = self.start();
            measured.ready.push(since(start));
            measured.start.push(cpu_ns(agent.pid()) as f64 / 1e6);
            for pod in &self.pods {
                agent.wait_enforcing(pod.net());
            }
            if n + 1 < STARTS {
                agent.stop();
                continue;
            }
            thread::sleep(10 * SETTLED);
            [measured.resident, measured.peak] =
                ["VmRSS", "VmHWM"].map(|field| status_kib(agent.pid(), field));
            if services > 0 {
                self.change(&agent, services, &mut measured);
            }
        }
        measured.ready.sort_unstable_by(f64::total_cmp);
        measured.start.sort_unstable_by(f64::total_cmp);
        measured.outside.sort_unstable_by(f64::total_cmp);
        measured
    }

    fn change(&self, agent: &Agent, services: usize, measured: &mut Measured) {
        for round in 1..=ROUNDS {
            let before = cpu_ns(agent.pid());
            for change in 0..CHANGES {
                let n = change * 37 % services;
                self.apply(&self.slice(n, &inside(n, round)));
                thread::sleep(CHANGE_EVERY);
            }
            thread::sleep(SETTLED);
            let used = (cpu_ns(agent.pid()) - before) as f64;
            measured.change.push(used / 1e6 / CHANGES as f64);
        }
        for n in 0..OUTSIDE {
            let mut answered = Instant::now();
            let mut waiting: Vec<String> = (self.pods.iter())
                .map(|pod| format!("pod={}/{} ", pod.net().namespace(), pod.net().name()))
                .collect();
            agent.logs_after(
                "that the policy of every pod is applied",
                || {
                    let mut addresses = inside(n, 0);
                    addresses.push(server(9).to_string());
                    self.apply(&self.slice(n, &addresses));
                    answered = Instant::now();
                },
                |line| {
                    if line.contains("policy applied") {
                        waiting.retain(|pod| !line.contains(pod.as_str()));
                    }
                    waiting.is_empty()
                },
            );
            measured.outside.push(since(answered));
            thread::sleep(SETTLED);
        }
        // The next number of Services begins without any of them.
        for n in 0..OUTSIDE {
            self.apply(&self.slice(n, &inside(n, 0)));
        }
    }
}

/// The addresses of pods behind a Service. Another round has another one of them.
fn inside(n: usize, round: usize) -> Vec<String> {
    let address = |k: usize| format!("10.{}.{}.{}", 128 + k, n / 250, 1 + n % 250);
    let last = ENDPOINTS + round;
    (0..ENDPOINTS - 1).chain([last]).map(address).collect()
}

fn print(all: &[Measured]) {
    println!("A node with {PODS} closed pods, and Services with {ENDPOINTS} endpoints each.\n");
    let mut rows = vec![row![
        "Services",
        "ready after, median",
        "CPU until then",
        "resident",
        "peak",
        "CPU of a change of a slice",
        "an endpoint outside: in force, median",
        "longest",
    ]];
    for measured in all {
        let ms = |sorted: &[f64], part| match sorted {
            [] => "-".to_owned(),
            sorted => format!("{:.0} ms", quantile(sorted, part)),
        };
        let change = match measured.change[..] {
            [] => "-".to_owned(),
            _ => Spread::of(measured.change.iter().copied()).number("ms", 2),
        };
        rows.push(row![
            measured.services,
            ms(&measured.ready, 0.5),
            ms(&measured.start, 0.5),
            mib(measured.resident),
            mib(measured.peak),
            change,
            ms(&measured.outside, 0.5),
            ms(&measured.outside, 1.0),
        ]);
    }
    print_table(&rows);
}
