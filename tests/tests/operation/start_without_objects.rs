//! An agent that starts while the API server does not list a kind of policy objects, though it may have them. What these
//! objects deny stays denied.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    process::Command,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use egress_tests::{
    Agent, ApiServer, Cluster, ClusterPod, Identity, Lab, Pod, TcpProxy,
    addresses::server,
    cluster::{allow, rights},
    definitions::{path_of_objects, upstream_definition},
    eventually, holds,
    newer::NewerApi,
    yaml,
};
use serde_json::{Value, json};

const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

/// The port of `db` that an object of each kind denies, and the resource and the name of the kind.
const KINDS: [(u16, &str, &str); 4] = [
    (7001, "clusteregresspolicies", "ClusterEgressPolicy"),
    (7002, "egresspolicies", "EgressPolicy"),
    (7003, "egresssets", "EgressSet"),
    (7004, "clusternetworkpolicies", "ClusterNetworkPolicy"),
];
/// The port of `db` that is allowed.
const ALLOWED: u16 = 7005;
const PORTS: [u16; 5] = [7001, 7002, 7003, 7004, ALLOWED];

/// Runs a thread until it is dropped.
struct Until {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Until {
    fn run(mut once: impl FnMut() + Send + 'static) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopped.load(Relaxed) {
                once();
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Until {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

type Counts = Arc<Mutex<HashMap<(IpAddr, u16), usize>>>;

/// What arrives at a pod.
struct Arrivals {
    counts: Counts,
    _threads: Vec<Until>,
}

impl Arrivals {
    #[track_caller]
    fn at(pod: &Pod) -> Self {
        let counts = Counts::default();
        let threads = PORTS.into_iter().map(|port| {
            let bound = pod
                .netns()
                .run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)));
            let socket = bound.expect("a UDP socket");
            let timeout = Some(Duration::from_millis(50));
            socket.set_read_timeout(timeout).expect("a timeout");
            let counts = Arc::clone(&counts);
            Until::run(move || {
                if let Ok((_, from)) = socket.recv_from(&mut [0; 16]) {
                    let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
                    *counts.entry((from.ip(), port)).or_default() += 1;
                }
            })
        });
        Self {
            _threads: threads.collect(),
            counts,
        }
    }

    fn from(&self, pod: &Pod, port: u16) -> usize {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.get(&(IpAddr::V4(pod.ipv4()), port));
        count.copied().unwrap_or_default()
    }

    /// Waits until so many more datagrams of the pod have arrived where they may.
    #[track_caller]
    fn wait_more(&self, pod: &Pod, more: usize) {
        let before = self.from(pod, ALLOWED);
        eventually("allowed datagrams arrive", || {
            holds(self.from(pod, ALLOWED) >= before + more)
        });
    }
}

/// Sends to all ports of `to` all the time.
#[track_caller]
fn send(from: &Pod, to: Ipv4Addr) -> Until {
    let socket = from.netns().run(|| UdpSocket::bind((from.ipv4(), 0)));
    let socket = socket.expect("a UDP socket");
    Until::run(move || {
        for port in PORTS {
            // What is denied may be an error.
            let _ = socket.send_to(b"x", SocketAddr::from((to, port)));
        }
        thread::sleep(Duration::from_millis(2));
    })
}

/// A pod `cart` with an allowing annotation and with denying objects of every kind, a pod `solo` that is closed by an
/// object alone, and a pod `db` without a policy, to which both send.
struct Scene {
    _sending: Vec<Until>,
    arrivals: Arrivals,
    agent: Agent,
    cart: ClusterPod,
    solo: ClusterPod,
    db: ClusterPod,
    api: Arc<ApiServer>,
    cluster: Cluster,
    shop: String,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let api = Arc::new(ApiServer::start());
        install(&api);
        let cluster = Cluster::on(Arc::clone(&api), Lab::builder());
        let (data, shop) = (
            cluster.namespace("data", &Value::Null),
            cluster.namespace("shop", &Value::Null),
        );
        let alone = cluster.namespace("alone", &Value::Null);
        let db = cluster.run(&data, "db", &Value::Null);
        let to = db.net().ipv4();
        create_objects(&api, to, &shop);
        let only = json!({"podSelector": {}, "allow": [format!("{to}:{ALLOWED}/udp")]});
        create(&api, &egress_policy(&alone, &only));
        let cart = cluster.run(&shop, "cart", &annotations(to));
        let solo = cluster.run(&alone, "solo", &Value::Null);
        let agent = cluster.start_agent_with(&["--keep-enforcing"]);
        agent.wait_enforcing(cart.net());
        agent.wait_enforcing(solo.net());
        let arrivals = Arrivals::at(db.net());
        let sending = vec![send(cart.net(), to), send(solo.net(), to)];
        let scene = Self {
            _sending: sending,
            arrivals,
            agent,
            cart,
            solo,
            db,
            api,
            cluster,
            shop,
        };
        scene.assert_denied("at first");
        scene
    }

    fn state(&self) -> std::path::PathBuf {
        self.cluster.lab.directory().join("state/cluster.json")
    }

    /// Starts another agent after one that was killed.
    #[track_caller]
    fn start_again(&mut self) {
        self.agent = self.cluster.start_agent_with(&["--keep-enforcing"]);
    }

    /// Asserts that nothing has arrived yet that an object denies, while both pods send.
    #[track_caller]
    fn assert_denied(&self, when: &str) {
        self.arrivals.wait_more(self.cart.net(), 100);
        self.arrivals.wait_more(self.solo.net(), 100);
        for (port, _, kind) in KINDS {
            let arrived = self.arrivals.from(self.cart.net(), port);
            assert_eq!(arrived, 0, "denied by the {kind}, {when}");
            let arrived = self.arrivals.from(self.solo.net(), port);
            assert_eq!(arrived, 0, "not allowed by the EgressPolicy, {when}");
        }
    }

    fn status(&self) -> String {
        let (_, status) = self.cluster.lab.ask_json(&["status"]);
        status.to_string()
    }

    /// Waits until the agent knows every object again.
    #[track_caller]
    fn wait_listed(&self) {
        eventually("every kind is listed", || {
            holds(!self.status().contains("does not list objects of"))
        });
    }

    /// Asserts that objects can be removed: the API server's word counts again.
    #[track_caller]
    fn assert_the_cluster_may_remove(&self, kind: usize) {
        let (port, resource, _) = KINDS[kind];
        let name = "/apis/egress-agent.dev/v1alpha1";
        let path = format!("{name}/{resource}/guard");
        let deleted = self
            .api
            .asked_by(Identity::Admin, "DELETE", &path, &Value::Null);
        assert_eq!(deleted, 200);
        eventually("what the object has denied arrives", || {
            holds(self.arrivals.from(self.cart.net(), port) > 0)
        });
    }
}

fn annotations(to: Ipv4Addr) -> Value {
    json!({
        "egress-agent.dev/allow": format!("{to}:7001-{ALLOWED}/udp"),
        "egress-agent.dev/deny": "@guard:7003/udp",
    })
}

fn install(api: &ApiServer) {
    let mut definitions = yaml::objects("base/crds.yaml");
    definitions.push(upstream_definition("v1alpha2"));
    for definition in definitions {
        let status = api.asked_by(Identity::Admin, "POST", DEFINITIONS, &definition);
        assert_eq!(status, 200, "{definition}");
        let path = path_of_objects(&definition);
        eventually(&format!("{path} is served"), || {
            holds(api.asked_by(Identity::Admin, "GET", &path, &Value::Null) == 200)
        });
    }
}

fn egress_policy(namespace: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "egress-agent.dev/v1alpha1",
        "kind": "EgressPolicy",
        "metadata": {"namespace": namespace, "name": "guard"},
        "spec": spec,
    })
}

#[track_caller]
fn create(api: &ApiServer, object: &Value) {
    let version = object["apiVersion"].as_str().expect("a version");
    let kind = object["kind"].as_str();
    let (_, resource, _) = KINDS
        .into_iter()
        .find(|(.., name)| Some(*name) == kind)
        .expect("a kind");
    let within = match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("namespaces/{namespace}/"),
        None => String::new(),
    };
    let path = format!("/apis/{version}/{within}{resource}");
    let status = api.asked_by(Identity::Admin, "POST", &path, object);
    assert_eq!(status, 200, "{object}");
}

/// Creates an object of every kind for pods of the namespace.
#[track_caller]
fn create_objects(api: &ApiServer, to: Ipv4Addr, shop: &str) {
    let within = json!({"matchLabels": {"kubernetes.io/metadata.name": shop}});
    create(
        api,
        &json!({
            "apiVersion": "egress-agent.dev/v1alpha1",
            "kind": "ClusterEgressPolicy",
            "metadata": {"name": "guard"},
            "spec": {
                "tier": "Admin", "priority": 1, "namespaceSelector": within,
                "rules": [{"action": "Deny", "entries": [format!("{to}:7001/udp")]}],
            },
        }),
    );
    let deny = json!({"podSelector": {}, "deny": [format!("{to}:7002/udp")]});
    create(api, &egress_policy(shop, &deny));
    create(
        api,
        &json!({
            "apiVersion": "egress-agent.dev/v1alpha1",
            "kind": "EgressSet",
            "metadata": {"name": "guard"},
            "spec": {"destinations": [to.to_string()]},
        }),
    );
    create(
        api,
        &json!({
            "apiVersion": "policy.networking.k8s.io/v1alpha2",
            "kind": "ClusterNetworkPolicy",
            "metadata": {"name": "guard"},
            "spec": {
                "tier": "Admin", "priority": 2, "subject": {"namespaces": within},
                "egress": [{
                    "action": "Deny",
                    "to": [{"networks": [format!("{to}/32")]}],
                    "protocols": [{"udp": {"destinationPort": {"number": 7004}}}],
                }],
            },
        }),
    );
}

#[test]
fn destinations_that_objects_of_a_refused_kind_deny_stay_denied() {
    let mut scene = Scene::new();
    for (_, resource, kind) in KINDS {
        scene.agent.kill();
        let refused = rights(|allowed| allowed != resource);
        scene.api.allow_agent("agent", &refused);
        scene.start_again();
        scene.assert_denied(&format!("when the API server refuses {kind} at a start"));
        let problem = format!("does not list objects of {kind}");
        assert!(scene.status().contains(&problem), "{}", scene.status());
        // The next agent knows no more.
        scene.agent.kill();
        scene.start_again();
        scene.assert_denied(&format!("when it refuses {kind} at another start"));
        scene.api.allow_agent("agent", &rights(|_| true));
        scene.wait_listed();
        scene.assert_denied(&format!("when it lists {kind} again"));
    }
    scene.assert_the_cluster_may_remove(0);
}

#[test]
fn new_pods_are_closed_while_a_kind_is_refused_and_others_are_not() {
    let mut scene = Scene::new();
    scene.agent.kill();
    let to = scene.db.net().ipv4();
    let refused = rights(|resource| resource != "clusteregresspolicies");
    scene.api.allow_agent("agent", &refused);
    let early = scene.cluster.run(&scene.shop, "early", &annotations(to));
    scene.start_again();
    let late = scene.cluster.run(&scene.shop, "late", &annotations(to));
    let _web = scene.cluster.lab.serve_tcp(443);
    // A new interface is open until the agent has attached its programs.
    for pod in [&early, &late] {
        scene.agent.wait_enforcing(pod.net());
    }
    let _sending = [send(early.net(), to), send(late.net(), to)];
    for pod in [&early, &late] {
        let net = pod.net();
        scene.agent.wait_denial("that the pod is closed", |denial| {
            denial.is(net, "pod_unknown", IpAddr::V4(to), ALLOWED)
        });
    }
    // `db` was there before, and no object selected it.
    scene.db.net().talks_tcp((server(10), 443));
    // An edit of annotations counts.
    let mut edited = annotations(to);
    let key = "egress-agent.dev/allow";
    let entries = edited[key].as_str().expect("entries");
    edited[key] = format!("{entries} {}:443", server(10)).into();
    let Scene { cluster, cart, .. } = &mut scene;
    cluster.annotate(cart, &edited);
    eventually("the edit counts", || {
        holds(scene.cart.net().reaches(server(10)))
    });
    scene.assert_denied("when annotations have been edited");
    scene.api.allow_agent("agent", &rights(|_| true));
    for pod in [&early, &late] {
        scene.arrivals.wait_more(pod.net(), 100);
        for (port, _, kind) in KINDS {
            let arrived = scene.arrivals.from(pod.net(), port);
            assert_eq!(arrived, 0, "denied by the {kind} from the beginning");
        }
    }
}

#[test]
fn without_the_saved_state_pods_stay_as_they_are_while_a_kind_is_refused() {
    let mut scene = Scene::new();
    scene.agent.kill();
    std::fs::remove_file(scene.state()).expect("remove what the agent has saved");
    let refused = rights(|resource| resource != "clusteregresspolicies");
    scene.api.allow_agent("agent", &refused);
    scene.start_again();
    scene.assert_denied("without the saved state");
    scene.api.allow_agent("agent", &rights(|_| true));
    scene.wait_listed();
    scene.assert_denied("when the kind is listed again");
    scene.assert_the_cluster_may_remove(0);
}

#[test]
fn objects_stay_while_nothing_says_whether_their_kind_is_still_there() {
    let mut scene = Scene::new();
    scene.agent.kill();
    let definition = format!("{DEFINITIONS}/clusteregresspolicies.egress-agent.dev");
    let deleted = scene
        .api
        .asked_by(Identity::Admin, "DELETE", &definition, &Value::Null);
    assert_eq!(deleted, 200);
    let kind = "/apis/egress-agent.dev/v1alpha1/clusteregresspolicies";
    eventually("the kind is gone", || {
        let asked = scene
            .api
            .asked_by(Identity::Admin, "GET", kind, &Value::Null);
        holds(asked == 404)
    });
    let refused = rights(|resource| resource != "customresourcedefinitions");
    scene.api.allow_agent("agent", &refused);
    scene.start_again();
    scene.assert_denied("without the definitions");
    // An agent that can read the definitions knows that the kind is gone.
    scene.agent.kill();
    scene.api.allow_agent("agent", &rights(|_| true));
    scene.start_again();
    eventually("what the object has denied arrives", || {
        holds(scene.arrivals.from(scene.cart.net(), 7001) > 0)
    });
}

#[test]
fn objects_stay_while_their_version_is_not_served() {
    let mut scene = Scene::new();
    let definition = format!("{DEFINITIONS}/clusteregresspolicies.egress-agent.dev");
    let serve = |api: &ApiServer, is_served: bool| {
        let served = json!([{
            "op": "replace", "path": "/spec/versions/0/served", "value": is_served,
        }]);
        api.patch_json(&definition, &served);
        let kind = "/apis/egress-agent.dev/v1alpha1/clusteregresspolicies";
        eventually("the definition counts", || {
            let asked = api.asked_by(Identity::Admin, "GET", kind, &Value::Null);
            holds((asked == 200) == is_served)
        });
    };
    scene.agent.kill();
    serve(&scene.api, false);
    scene.start_again();
    scene.assert_denied("when the version is not served");
    serve(&scene.api, true);
    scene.wait_listed();
    scene.assert_denied("when the version is served again");
    scene.assert_the_cluster_may_remove(0);
}

#[test]
fn a_start_waits_for_a_kind_whose_definition_is_there() {
    let mut scene = Scene::new();
    scene.agent.kill();
    let newer = NewerApi::start(&scene.api);
    newer.hide("clusteregresspolicies");
    let proxy = TcpProxy::start_in(scene.cluster.lab.node(), newer.port());
    let url = format!("http://127.0.0.1:{}", proxy.port());
    let cluster = json!({"server": url});
    let kubeconfig = scene.api.kubeconfig_of("partial", &cluster, &json!({}));
    let lab = &scene.cluster.lab;
    scene.agent = lab.spawn_cluster_agent(&kubeconfig, &["--keep-enforcing"]);
    scene.agent.wait_log("that it waits", |line| {
        line.contains("waiting for the API server")
    });
    scene.agent.wait_log("what it waits for", |line| {
        line.contains("the ClusterEgressPolicy objects cannot be listed")
    });
    scene.assert_denied("when the API server does not serve the kind yet");
    newer.show_all();
    scene.agent.wait_ready();
    scene.assert_denied("when it serves the kind");
    scene.assert_the_cluster_may_remove(0);
}

#[test]
fn a_standby_is_not_ready_while_a_kind_is_refused_that_the_running_agent_knows() {
    let scene = Scene::new();
    let refused = rights(|resource| resource != "clusteregresspolicies");
    scene.api.allow_agent("agent", &refused);
    let socket = scene.cluster.lab.directory().join("standby.sock");
    let socket = socket.to_str().expect("a path in UTF-8");
    scene.cluster.lab.edit_config("socket", socket);
    let arguments = ["--take-over", "--keep-enforcing"];
    let standby = scene.cluster.spawn_agent(&arguments);
    standby.wait_log("that it stands by", |line| line.contains("standing by"));
    let ready = || {
        let mut command = Command::new(Agent::program());
        command.args(["ready", "--socket", socket]);
        let output = scene.cluster.lab.node().run(|| command.output());
        let output = output.expect("the agent's program runs");
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr),
        )
    };
    eventually("it says what is missing", || {
        let (is_ready, text) = ready();
        assert!(!is_ready, "{text}");
        holds(text.contains("the ClusterEgressPolicy objects could not be listed yet"))
    });
    scene.api.allow_agent("agent", &rights(|_| true));
    eventually("the standby is ready", || holds(ready().0));
}

#[test]
fn a_role_that_never_allowed_a_kind_closes_no_pod() {
    let api = Arc::new(ApiServer::start());
    install(&api);
    let cluster = Cluster::on(Arc::clone(&api), Lab::builder());
    let refused = rights(|resource| !resource.contains("polic"));
    api.allow_agent("agent", &refused);
    let _web = cluster.lab.serve_tcp(443);
    let shop = cluster.namespace("shop", &Value::Null);
    let (first, second) = (server(10), server(20));
    let mut cart = cluster.run(&shop, "cart", &allow(&format!("{first}:443")));
    let mut agent = cluster.start_agent_with(&["--keep-enforcing"]);
    agent.wait_enforcing(cart.net());
    cart.net().talks_tcp((first, 443));
    agent.kill();
    cluster.annotate(&mut cart, &allow(&format!("{second}:443")));
    let agent = cluster.start_agent_with(&["--keep-enforcing"]);
    eventually("the edit counts", || {
        holds(cart.net().reaches(second) && !cart.net().reaches(first))
    });
    let late = cluster.run(&shop, "late", &allow(&format!("{first}:443")));
    agent.wait_enforcing(late.net());
    late.net().talks_tcp((first, 443));
    assert!(!late.net().reaches(second), "the new pod is open");
    let open = cluster.run(&shop, "open", &Value::Null);
    eventually("a pod without a policy is open", || {
        holds(open.net().reaches(second))
    });
}
