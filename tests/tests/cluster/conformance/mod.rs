//! What the conformance tests of the Kubernetes network-policy-api expect of egress (`conformance/` of
//! kubernetes-sigs/network-policy-api, at commit 0eec1b0): which pods a policy selects, what its rules say, and which
//! packets then arrive.
//!
//! Four teams have two pods each. A pod listens on the TCP ports 80 and 8080 and the UDP ports 53 and 5353; the ports
//! of SCTP are 9003 and 9005. The team names stand for those of upstream's namespaces: red for gryffindor, green for
//! slytherin, yellow for hufflepuff, blue for ravenclaw.
//!
//! Every packet is sent over IPv4 and IPv6. TCP and UDP are sockets in both pods. SCTP is an INIT chunk for a raw socket
//! in the other pod, because not every kernel has SCTP.
//!
//! Upstream's expectations of ingress are left out: egress-agent does not enforce that part.

mod cidrs;
mod nodes;
mod protocols;
mod tiers;

use std::{
    collections::BTreeMap,
    io::Read as _,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU16, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use egress_tests::{
    Agent, ApiServer, Cluster, ClusterPod, DEADLINE, Lab, Namespace, Pod, TcpEcho, UdpEcho,
    frames::{self, Tap},
};
use etherparse::ip_number;
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};

use crate::policies::{install, install_upstream, put};

/// A pod of a team: `("red", 0)`.
type Who = (&'static str, usize);

/// A protocol and a destination port.
#[derive(Clone, Copy, Debug)]
enum To {
    Tcp(u16),
    Udp(u16),
    Sctp(u16),
}

/// Packets of one pod to another.
type Path = (Who, To, Who);

const TEAMS: [&str; 4] = ["red", "green", "yellow", "blue"];
const TCP_PORTS: [u16; 2] = [80, 8080];
const UDP_PORTS: [u16; 2] = [53, 5353];

/// The addresses of the agent's node.
const OWN_NODE: [&str; 2] = ["10.98.0.1", "fd98::1"];
/// The addresses of another node, on which the servers in `outside` answer.
const OTHER_NODE: [&str; 2] = ["10.99.0.7", "fd99::7"];

/// The time in which a frame that was dropped on the other pod's behalf does not arrive. Each use also waits for the
/// denial line.
const AFTER_DENIAL: Duration = Duration::from_millis(20);

/// The pods, the policies, and the agent.
struct Scene {
    agent: Agent,
    pods: BTreeMap<&'static str, Vec<ClusterPod>>,
    _servers: Vec<(TcpEcho, UdpEcho)>,
    cluster: Cluster,
}

/// The API server of these tests. Their policies select only pods of their own cluster.
pub(crate) fn server() -> Arc<ApiServer> {
    static SHARED: Mutex<Weak<ApiServer>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let server = Arc::new(ApiServer::start());
        install(&server);
        install_upstream(&server);
        *shared = Arc::downgrade(&server);
        server
    })
}

impl Scene {
    /// Starts the agent when the pods run and the policies are there, which are about these teams.
    #[track_caller]
    fn new(subjects: &[&str], policies: impl FnOnce(&Names) -> Vec<Value>) -> Self {
        let cluster = Cluster::on(server(), Lab::builder());
        let names = Names(cluster.node().to_owned());
        // Pods and nodes are internal addresses, as in a cluster.
        let other = format!("{}-other", cluster.node());
        for (name, pods, addresses) in [
            (
                cluster.node(),
                json!(["10.1.0.0/16", "fd01::/16"]),
                OWN_NODE,
            ),
            (&*other, json!(["10.2.0.0/16", "fd02::/16"]), OTHER_NODE),
        ] {
            let addresses = addresses.map(|ip| json!({ "type": "InternalIP", "address": ip }));
            let node = json!({
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": { "name": name, "labels": { "nodes": names.label("nodes") } },
                "spec": { "podCIDR": pods[0], "podCIDRs": pods },
            });
            cluster.server.apply(&node);
            cluster
                .server
                .set_status(&node, &json!({ "addresses": addresses }));
        }
        let mut pods = BTreeMap::new();
        let mut servers = Vec::new();
        for team in TEAMS {
            let namespace = names.namespace(team);
            set_team(&cluster.server, &namespace, &names.label(team));
            let of_team: Vec<ClusterPod> = (0..2)
                .map(|number| {
                    let labels = json!({ "team": names.label(team) });
                    let ports = [("web", 80, "TCP"), ("dns", 53, "UDP")];
                    cluster.run_with(&namespace, &format!("{team}-{number}"), &labels, &ports)
                })
                .collect();
            for pod in &of_team {
                let netns = pod.net().netns();
                for (tcp, udp) in TCP_PORTS.into_iter().zip(UDP_PORTS) {
                    servers.push((TcpEcho::start(netns, tcp), UdpEcho::start(netns, udp)));
                }
            }
            pods.insert(team, of_team);
        }
        for policy in policies(&names) {
            put(&cluster.server, &policy);
        }
        let agent = cluster.start_agent();
        for pod in subjects.iter().flat_map(|team| &pods[team]) {
            agent.wait_enforcing(pod.net());
        }
        Self {
            agent,
            pods,
            _servers: servers,
            cluster,
        }
    }

    fn names(&self) -> Names {
        Names(self.cluster.node().to_owned())
    }

    fn pod(&self, (team, number): Who) -> &Pod {
        self.pods[team][number].net()
    }

    /// Makes a change, and waits until the agent has applied it to both pods of the team.
    #[track_caller]
    fn edit(&self, team: &'static str, change: impl FnOnce(&ApiServer, &Names)) {
        let [first, second] = [(team, 0), (team, 1)].map(|who| self.pod(who));
        self.agent.applies_policy_after(first, || {
            self.agent.applies_policy_after(second, || {
                change(&self.cluster.server, &self.names());
            });
        });
    }

    /// Asserts that packets arrive on each of these paths.
    #[track_caller]
    fn arrive(&self, paths: &[Path]) {
        self.each(paths, |from, to, netns| self.arrives(from, to, netns));
    }

    /// Asserts that packets on each of these paths are denied by a rule.
    #[track_caller]
    fn denied(&self, paths: &[Path]) {
        self.each(paths, |from, to, netns| self.is_denied(from, to, netns));
    }

    /// Does this for each path and family, at the same time.
    #[track_caller]
    fn each(&self, paths: &[Path], check: impl Fn(&Pod, (To, IpAddr), &Namespace) + Sync) {
        thread::scope(|scope| {
            for (from, to, peer) in paths {
                let (from, peer) = (self.pod(*from), self.pod(*peer));
                let check = &check;
                for address in [IpAddr::V4(peer.ipv4()), IpAddr::V6(peer.ipv6())] {
                    scope.spawn(move || check(from, (*to, address), peer.netns()));
                }
            }
        });
    }

    /// Asserts that a packet to this address arrives in this network namespace.
    #[track_caller]
    fn arrives(&self, from: &Pod, (to, address): (To, IpAddr), netns: &Namespace) {
        match to {
            To::Tcp(port) => drop(from.talks_tcp((address, port))),
            To::Udp(port) => from.talks_udp((address, port)),
            To::Sctp(port) => {
                let init = Init::new(from, (address, port), netns);
                init.send();
                assert!(
                    init.arrives_within(DEADLINE),
                    "sctp {address}:{port} of {} does not arrive; denials: {:#?}",
                    from.name(),
                    self.agent.denials()
                );
            }
        }
    }

    /// Asserts that a packet to this address is denied, and does not arrive in this network namespace.
    #[track_caller]
    fn is_denied(&self, from: &Pod, (to, address): (To, IpAddr), netns: &Namespace) {
        const BY_RULE: &str = "deny_rule";
        match to {
            To::Tcp(port) => drop(self.agent.denies_tcp(from, (address, port), BY_RULE)),
            To::Udp(port) => drop(self.agent.denies_udp(from, (address, port), BY_RULE)),
            To::Sctp(port) => {
                let init = Init::new(from, (address, port), netns);
                let mark = self.agent.mark();
                init.send();
                let what = format!("sctp {address}:{port} of {}", from.name());
                self.agent.wait_denial_from(mark, &what, |denial| {
                    denial.is(from, BY_RULE, address, port)
                        && denial.protocol.as_deref() == Some("sctp")
                });
                assert!(!init.arrives_within(AFTER_DENIAL), "{what} arrives");
            }
        }
    }
}

/// An SCTP INIT chunk with a source port of its own, and the place where it is to arrive.
struct Init<'a> {
    from: &'a Pod,
    to: (IpAddr, u16),
    port: u16,
    receiver: Socket,
}

impl<'a> Init<'a> {
    #[track_caller]
    fn new(from: &'a Pod, to: (IpAddr, u16), netns: &Namespace) -> Self {
        static NEXT: AtomicU16 = AtomicU16::new(20_000);
        let domain = if to.0.is_ipv4() {
            Domain::IPV4
        } else {
            Domain::IPV6
        };
        let sctp = Protocol::from(i32::from(ip_number::SCTP.0));
        let receiver = netns.run(|| Socket::new(domain, Type::RAW, Some(sctp)));
        Self {
            from,
            to,
            port: NEXT.fetch_add(1, Ordering::Relaxed),
            receiver: receiver.expect("a raw socket"),
        }
    }

    #[track_caller]
    fn send(&self) {
        // A frame that the agent's program drops may be reported as one that was not sent.
        let tap = Tap::open(self.from.netns(), "eth0");
        tap.offer(&frames::sctp_init(self.from, self.to, self.port));
    }

    /// Whether it arrives in time.
    #[track_caller]
    fn arrives_within(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        // A raw socket receives the header of IPv4, and none of IPv6 (raw(7), RFC 3542, section 3).
        let header = if self.to.0.is_ipv4() { 20 } else { 0 };
        let [one, two] = [self.port, self.to.1].map(u16::to_be_bytes);
        let ports = [one, two].concat();
        let mut buffer = [0; 256];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let timed = self.receiver.set_read_timeout(Some(left));
            timed.expect("a time-out that is not zero");
            match (&self.receiver).read(&mut buffer) {
                Ok(length) if buffer[..length].get(header..header + 4) == Some(&*ports) => {
                    return true;
                }
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    }
}

/// Names that no other test's objects have.
struct Names(String);

impl Names {
    fn namespace(&self, team: &str) -> String {
        format!("{}-{team}", self.0)
    }

    /// The value of the label `team` of a team's namespace and pods.
    fn label(&self, team: &str) -> String {
        self.namespace(team)
    }

    /// The team's namespace, by the label that every namespace has.
    fn by_name(&self, team: &str) -> Value {
        json!({ "namespaces": { "matchLabels": { "kubernetes.io/metadata.name": self.namespace(team) } } })
    }

    /// The team's namespace, by its label `team`.
    fn by_team(&self, team: &str) -> Value {
        json!({ "namespaces": { "matchLabels": { "team": self.label(team) } } })
    }

    /// The team's pods, by the label `team` of both.
    fn pods(&self, team: &str) -> Value {
        let selector = json!({ "matchLabels": { "team": self.label(team) } });
        json!({ "pods": { "namespaceSelector": selector, "podSelector": selector } })
    }

    /// The cluster's nodes.
    fn nodes(&self) -> Value {
        json!({ "nodes": { "matchLabels": { "nodes": self.label("nodes") } } })
    }

    /// A policy with these rules about egress.
    fn policy(&self, tier: &str, priority: u32, subject: &Value, egress: &[Value]) -> Value {
        let name = format!("{}-{}-{priority}", self.0, tier.to_lowercase());
        json!({
            "apiVersion": "policy.networking.k8s.io/v1alpha2",
            "kind": "ClusterNetworkPolicy",
            "metadata": { "name": name },
            "spec": { "tier": tier, "priority": priority, "subject": subject, "egress": egress },
        })
    }
}

/// Sets the label `team` of a namespace.
fn set_team(server: &ApiServer, namespace: &str, team: &str) {
    server.apply(&json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": { "name": namespace, "labels": { "team": team } },
    }));
}

/// A rule for every protocol and port.
fn rule(action: &str, to: &[Value]) -> Value {
    json!({ "name": action.to_lowercase(), "action": action, "to": to })
}

/// A rule for these protocols and ports.
fn rule_at(action: &str, to: &[Value], at: &[To]) -> Value {
    let protocols = at.iter().map(|to| {
        let (protocol, number) = match to {
            To::Tcp(port) => ("tcp", port),
            To::Udp(port) => ("udp", port),
            To::Sctp(port) => ("sctp", port),
        };
        json!({ protocol: { "destinationPort": { "number": number } } })
    });
    let mut rule = rule(action, to);
    rule["protocols"] = protocols.collect();
    rule
}

/// A rule for the port that the destination's pods give this name.
fn rule_at_named(action: &str, to: &[Value], port: &str) -> Value {
    let mut rule = rule(action, to);
    rule["protocols"] = json!([{ "destinationNamedPort": port }]);
    rule
}
