//! Interfaces that come from one pod to another, or into quarantine, while programs behind them send all the time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use egress_tests::{
    Agent, Cluster, Lab, Pod, SHORT, UdpEcho, addresses::server, eventually, holds,
};
use serde_json::{Value, json};

const PORT: u16 = 7000;

/// A program in a pod that sends datagrams to an address that the pod's policy denies.
struct Sender {
    sent: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Sender {
    fn start(pod: &Pod) -> Self {
        let socket = pod.udp_socket((server(99), PORT));
        let (sent, stop) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let (count, is_to_stop) = (Arc::clone(&sent), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            while !is_to_stop.load(Ordering::Relaxed) {
                if socket.send(b"secret").is_ok() {
                    count.fetch_add(1, Ordering::Relaxed);
                }
                thread::sleep(Duration::from_micros(500));
            }
        });
        Self {
            sent,
            stop,
            thread: Some(thread),
        }
    }

    /// Waits until it has sent this many more.
    #[track_caller]
    fn goes_on(&self, more: usize) {
        let from = self.sent.load(Ordering::Relaxed);
        eventually("the program goes on sending", || {
            holds(self.sent.load(Ordering::Relaxed) >= from + more)
        });
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How many datagrams have arrived at the denied address.
fn arrived(sink: &UdpEcho) -> usize {
    sink.datagrams_to((server(99), PORT).into())
}

/// Asserts that nothing arrives at the denied address from the change until the agent says so on standard error.
#[track_caller]
fn nothing_arrives(
    agent: &Agent,
    (sender, sink): (&Sender, &UdpEcho),
    what: &str,
    change: impl FnOnce(),
    printed: impl FnMut(&str) -> bool,
) {
    let before = arrived(sink);
    agent.logs_after(what, change, printed);
    sender.goes_on(50);
    assert_eq!(arrived(sink) - before, 0, "datagrams arrived: {what}");
}

/// One file with the manifests of pods: all of them come and go in one edit.
fn write_pods(lab: &Lab, pods: &[Pod], name: impl Fn(&Pod) -> String, uid: &str) {
    let manifests = pods.iter().map(|pod| {
        let manifest = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "namespace": pod.namespace(),
                "name": name(pod),
                "uid": format!("{uid}-{}", pod.interface()),
                "annotations": {
                    "egress-agent.dev/interface": pod.interface(),
                    "egress-agent.dev/allow": format!("{}:443", server(10)),
                },
            },
            "status": { "podIPs": [{ "ip": pod.ipv4() }, { "ip": pod.ipv6() }] },
        });
        manifest.to_string()
    });
    let text: Vec<String> = manifests.collect();
    lab.write_file("pods.yaml", text.join("\n---\n").as_bytes());
}

#[test]
fn nothing_denied_leaves_while_pods_are_recreated_or_renamed() {
    let lab = Lab::new();
    let sink = lab.serve_udp(PORT);
    let pods: Vec<Pod> = (0..9).map(|i| lab.pod("shop", &format!("p{i}"))).collect();
    let last = &pods[8];
    let own_name = |pod: &Pod| pod.name().to_owned();
    let sender = Sender::start(last);
    eventually("datagrams arrive without an agent", || {
        holds(arrived(&sink) > 0)
    });
    write_pods(&lab, &pods, own_name, "first");
    let agent = lab.start_agent(&[last]);
    // Earlier datagrams have been read by then.
    eventually("nothing arrives any more", || {
        let before = arrived(&sink);
        sender.goes_on(50);
        holds(arrived(&sink) == before)
    });
    let begins = |name: &str| {
        let pod = format!("pod=shop/{name}");
        move |line: &str| line.contains("enforcing") && line.contains(&pod)
    };
    for uid in ["second", "third"] {
        nothing_arrives(
            &agent,
            (&sender, &sink),
            "that the pods with other UIDs are enforced",
            || write_pods(&lab, &pods, own_name, uid),
            begins("p8"),
        );
    }
    nothing_arrives(
        &agent,
        (&sender, &sink),
        "that the renamed pods are enforced",
        || write_pods(&lab, &pods, |pod| format!("new-{}", pod.name()), "fourth"),
        begins("new-p8"),
    );
    // The pod has its own maps: it reaches its allowed destinations, and the former pods are gone.
    let _web = lab.serve_tcp(443);
    last.talks_tcp((server(10), 443));
    eventually("the former pods are removed", || {
        let printed = agent.stderr();
        holds(printed.matches("removed").count() >= 27)
    });
}

/// A pod of a cluster that sends to a denied address, while nothing denied arrives.
struct Scene {
    cluster: Cluster,
    shop: String,
    sink: UdpEcho,
    agent: Agent,
}

impl Scene {
    fn new(arguments: &[&str]) -> Self {
        let cluster = Cluster::new();
        let sink = cluster.lab.serve_udp(PORT);
        let shop = cluster.namespace("shop", &Value::Null);
        let agent = cluster.start_agent_with(arguments);
        Self {
            cluster,
            shop,
            sink,
            agent,
        }
    }

    /// Asserts that the pod's interface goes into quarantine and that nothing arrives meanwhile.
    #[track_caller]
    fn closes(&self, pod: &Pod, sender: &Sender, change: impl FnOnce()) {
        let interface = format!("pod=interface {} ", pod.interface());
        nothing_arrives(
            &self.agent,
            (sender, &self.sink),
            "that the interface is in quarantine",
            change,
            |line| line.contains("enforcing") && line.contains(&interface),
        );
        let mark = self.agent.mark();
        self.agent
            .wait_denial_from(mark, "the datagrams", |denial| {
                denial.reason == "pod_unknown" && denial.pod == pod.interface()
            });
    }
}

fn allow_one() -> Value {
    json!({ "egress-agent.dev/allow": format!("{}:443", server(10)) })
}

#[test]
fn a_pod_whose_object_is_deleted_while_its_programs_run_goes_into_quarantine_at_once() {
    for arguments in [&[][..], &["--attach", "clsact"][..]] {
        let scene = Scene::new(arguments);
        let cart = scene.cluster.run(&scene.shop, "cart", &allow_one());
        scene.agent.wait_enforcing(cart.net());
        let sender = Sender::start(cart.net());
        scene.closes(cart.net(), &sender, || {
            scene.cluster.server.delete(cart.object());
        });
    }
}

#[test]
fn a_pod_that_is_said_to_have_failed_while_its_programs_run_goes_into_quarantine_at_once() {
    let scene = Scene::new(&[]);
    let cart = scene.cluster.run(&scene.shop, "cart", &allow_one());
    scene.agent.wait_enforcing(cart.net());
    let sender = Sender::start(cart.net());
    scene.closes(cart.net(), &sender, || {
        let failed = json!({ "phase": "Failed" });
        scene.cluster.server.set_status(cart.object(), &failed);
    });
}

#[test]
fn a_pod_stays_enforced_on_the_interfaces_that_no_other_pod_has() {
    let scene = Scene::new(&[]);
    let (cluster, agent) = (&scene.cluster, &scene.agent);
    let zoo = cluster.run(&scene.shop, "zoo", &allow_one());
    agent.wait_enforcing(zoo.net());
    let net = cluster.lab.pod(&scene.shop, "cart");
    let quarantined = format!("pod=interface {} ", net.interface());
    agent.wait_log("that the interface is in quarantine", |line| {
        line.contains("enforcing") && line.contains(&quarantined)
    });
    let sender = Sender::start(&net);
    // Somebody moves the other pod's interface into this pod's network.
    zoo.net().netns().ip_batch(&format!(
        "link set eth0 netns {} name eth9\n",
        net.netns().name()
    ));
    net.netns().ip_batch("link set eth9 up\n");
    let (object, uid) = cluster.create(&scene.shop, "cart", &allow_one());
    let mut cart = cluster.pod_without_processes(object, &uid, net);
    let own = format!("pod={}/cart", scene.shop);
    nothing_arrives(
        agent,
        (&sender, &scene.sink),
        "that the pod is enforced",
        || {
            cart.running().start_container();
        },
        |line| line.contains("enforcing") && line.contains(&own),
    );
    let others = format!(
        "interface {} is already that of pod {}/zoo; enforced on its other interfaces",
        zoo.net().interface(),
        scene.shop
    );
    agent.wait_log("whose the other interface is", |line| {
        line.contains(&others)
    });
    let mark = agent.mark();
    agent.wait_denial_from(mark, "the datagrams", |denial| {
        denial.is(cart.net(), "no_rule", server(99), PORT)
    });
    cluster.set_addresses(&cart);
    let _web = cluster.lab.serve_tcp(443);
    cart.net().talks_tcp((server(10), 443));
    assert!(
        cart.net().connect_tcp((server(20), 443), SHORT).is_err(),
        "the pod is open"
    );
}

/// With `CAP_NET_ADMIN` a pod may give one of its interfaces to a network namespace in which none of its programs run.
#[test]
fn an_interface_that_a_pod_gives_away_is_closed_at_once() {
    let mut scene = Scene::new(&[]);
    let (lab, agent) = (&scene.cluster.lab, &scene.agent);
    let cart = scene.cluster.run(&scene.shop, "cart", &allow_one());
    agent.wait_enforcing(cart.net());
    let inside = cart.net().netns();
    let add = |name: &str| {
        lab.node().ip_batch(&format!(
            "link add {name} address 02:00:00:00:00:09 type veth peer name {name} netns {}\n\
             link set {name} up\n",
            inside.name()
        ));
        inside.ip_batch(&format!("link set {name} up\n"));
    };
    let own = format!("pod={}/cart", scene.shop);
    let moves = |line: &str| line.contains("enforcing on other interfaces") && line.contains(&own);
    agent.logs_after("that both are enforced", || add("given"), moves);

    let away = lab.pod_without_interface(&scene.shop, "away");
    let gateway = format!("10.1.{}.1", away.ipv4().octets()[2]);
    lab.node()
        .ip_batch(&format!("addr add {gateway}/30 dev given\n"));
    inside.ip_batch(&format!("link set given netns {}\n", away.netns().name()));
    away.netns().ip_batch(&format!(
        "addr add {}/30 dev given\n\
         link set given up\n\
         neigh add {gateway} lladdr 02:00:00:00:00:09 dev given nud permanent\n\
         route add default via {gateway}\n",
        away.ipv4()
    ));
    let sender = Sender::start(&away);
    // A new interface of the pod makes the agent look at all of them.
    nothing_arrives(
        agent,
        (&sender, &scene.sink),
        "that the interface is in quarantine",
        || add("kept"),
        |line| line.contains("enforcing") && line.contains("pod=interface given "),
    );
    assert!(scene.agent.stop().success());
    eventually("datagrams arrive without an agent", || {
        holds(arrived(&scene.sink) > 0)
    });
}

/// With `CAP_NET_ADMIN` a pod may give its only interface to such a namespace, and send there through sockets that it
/// keeps.
#[test]
fn an_edit_takes_effect_on_an_interface_that_its_pod_hides() {
    let mut scene = Scene::new(&[]);
    let (lab, agent) = (&scene.cluster.lab, &scene.agent);
    let _web = lab.serve_tcp(443);
    let both = json!({ "egress-agent.dev/allow": format!("{} {}", server(10), server(20)) });
    let cart = scene.cluster.run(&scene.shop, "cart", &both);
    agent.wait_enforcing(cart.net());
    let away = lab.pod_without_interface(&scene.shop, "away");
    let (own, hidden) = (cart.net().ipv4(), away.netns().name());
    let gateway = format!("10.1.{}.1", own.octets()[2]);
    let inside = cart.net().netns();
    inside.ip_batch(&format!("link set eth0 netns {hidden}\n"));
    away.netns().ip_batch(&format!(
        "addr add {own}/30 dev eth0\nlink set eth0 up\nroute add default via {gateway}\n"
    ));
    away.talks_tcp((server(20), 443));
    // Another interface of that namespace makes the agent look for the pod.
    lab.node().ip_batch(&format!(
        "link add other type veth peer name other netns {hidden}\n"
    ));
    agent.wait_log("that the pod is not found", |line| {
        line.contains("enforced on its earlier interfaces")
    });
    let mut edited = cart.object().clone();
    edited["metadata"]["annotations"] = allow_one();
    agent.applies_policy_after(cart.net(), || {
        scene.cluster.server.apply(&edited);
    });
    away.talks_tcp((server(10), 443));
    assert!(
        away.connect_tcp((server(20), 443), SHORT).is_err(),
        "what the pod may not reach any more is reached"
    );
    agent.wait_denial("the connection", |denial| {
        denial.is(cart.net(), "no_rule", server(20), 443)
    });
    assert!(scene.agent.stop().success());
}
