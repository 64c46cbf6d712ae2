//! A node, its pods and the outside network.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU8, AtomicU32, Ordering},
};

use egress_common::ids::IfIndex;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::geteuid,
};
use serde_json::{Value, json};

use crate::{
    Agent, DnsServer, Pod, Running, TcpEcho, UdpEcho,
    addresses::{LOCAL_RANGES, PODS, PODS6, RESOLVER, RESOLVER6, STRANGER},
    line::Line,
    namespace::{Namespace, PREFIX, sweep},
    rewritten::nft,
};

/// Static neighbour entries for both ends of the link to the outside: an interface that has just come up
/// receives no multicast of IPv6 neighbour discovery for about a second.
const UPLINK: &str = "02:00:00:ff:00:01";
/// See [`UPLINK`].
const OUTSIDE: &str = "02:00:00:ff:00:02";

/// A ruleset that needs connection tracking.
const TRACKING: &str = "table inet tracking {
    chain forward {
        type filter hook forward priority filter;
        ct state invalid drop
    }
}
";

/// The settings of a [`Lab`].
#[derive(Debug)]
pub struct Builder {
    mtu: u32,
    dns: bool,
    lossy: bool,
    tracking: bool,
    config: Value,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            mtu: 1500,
            dns: true,
            lossy: false,
            tracking: false,
            config: json!({
                "node": "n1",
                "dns": dns_settings(),
            }),
        }
    }
}

impl Builder {
    /// Sets the MTU of every link.
    #[must_use]
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// Leaves port 53 of the resolvers' addresses free for another program.
    #[must_use]
    pub fn without_dns(mut self) -> Self {
        self.dns = false;
        self
    }

    /// Makes the link between the node and the outside lose, repeat and reorder DNS packets.
    #[must_use]
    pub fn lossy(mut self) -> Self {
        self.lossy = true;
        self
    }

    /// Makes the node track connections, as a node with rules of kube-proxy does.
    #[must_use]
    pub fn tracking(mut self) -> Self {
        self.tracking = true;
        self
    }

    /// Makes an address stay allowed for exactly its TTL.
    #[must_use]
    pub fn exact_lifetimes(self) -> Self {
        self.config("dns.minTtl", "1s").config("dns.grace", "0s")
    }

    /// Sets a key of the agent's configuration, by its dotted path (`dns.minTtl`).
    #[must_use]
    pub fn config(mut self, key: &str, value: impl Into<Value>) -> Self {
        set(&mut self.config, key, value.into());
        self
    }

    /// Builds the laboratory.
    #[track_caller]
    pub fn build(self) -> Lab {
        Lab::from_builder(self)
    }
}

fn set(config: &mut Value, key: &str, value: Value) {
    let mut at = config;
    for part in key.split('.') {
        at = &mut at[part];
    }
    *at = value;
}

/// Connects `uplink` of the node with `eth0` of the outside.
#[track_caller]
fn link(
    name: &str,
    node: &Namespace,
    outside: &Namespace,
    mtu: u32,
    is_lossy: bool,
) -> Option<Line> {
    let uplink = format!("link add uplink mtu {mtu} address {UPLINK} type veth peer");
    if !is_lossy {
        let outside = outside.name();
        node.ip_batch(&format!(
            "{uplink} name eth0 mtu {mtu} address {OUTSIDE} netns {outside}\n"
        ));
        return None;
    }
    let line = Namespace::create(&format!("{name}-line"), false);
    node.ip_batch(&format!(
        "{uplink} name near mtu {mtu} netns {}\n",
        line.name()
    ));
    outside.ip_batch(&format!(
        "link add eth0 mtu {mtu} address {OUTSIDE} type veth peer name far mtu {mtu} netns {}\n",
        line.name()
    ));
    line.ip_batch("link set near up\nlink set far up\n");
    Some(Line::start(line))
}

/// A node, its pods and the outside network. All of it is removed when this is dropped.
#[derive(Debug)]
pub struct Lab {
    name: String,
    directory: PathBuf,
    mtu: u32,
    pods: AtomicU8,
    dns: Option<DnsServer>,
    /// Declared before the namespaces, so that it is dropped first.
    _line: Option<Line>,
    node: Namespace,
    outside: Namespace,
}

impl Lab {
    /// A laboratory with its resolver and the agent's default configuration.
    #[track_caller]
    #[expect(
        clippy::new_without_default,
        reason = "building one changes the machine"
    )]
    pub fn new() -> Self {
        Builder::default().build()
    }

    /// A builder for a laboratory with other settings.
    pub fn builder() -> Builder {
        Builder::default()
    }

    #[track_caller]
    fn from_builder(builder: Builder) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        assert!(
            geteuid().is_root(),
            "the laboratory makes network namespaces and must run as root: sudo, or `cargo xtask test`"
        );
        sweep();
        let Builder {
            mtu,
            dns,
            lossy,
            tracking,
            config,
        } = builder;
        let name = format!(
            "{PREFIX}{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let directory = std::env::temp_dir().join(&name);
        let node = Namespace::create(&format!("{name}-node"), true);
        let outside = Namespace::create(&format!("{name}-outside"), false);
        let line = link(&name, &node, &outside, mtu, lossy);
        if tracking {
            nft(&node, TRACKING);
        }
        node.ip_batch(&format!(
            "addr add 10.98.0.1/30 dev uplink\n\
             addr add fd98::1/64 dev uplink nodad\n\
             link set uplink up\n\
             neigh add fd98::2 lladdr {OUTSIDE} dev uplink\n"
        ));
        let mut lines = format!(
            "addr add 10.98.0.2/30 dev eth0\n\
             addr add fd98::2/64 dev eth0 nodad\n\
             link set eth0 up\n\
             neigh add fd98::1 lladdr {UPLINK} dev eth0\n\
             route add {PODS} via 10.98.0.1\n\
             route add {PODS6} via fd98::1\n"
        );
        for range in LOCAL_RANGES {
            lines.extend(["route add local ", range, " dev lo\n"]);
        }
        outside.ip_batch(&lines);
        node.ip_batch("route add default via 10.98.0.2\nroute add default via fd98::2\n");

        let mut lab = Self {
            name,
            directory,
            mtu,
            pods: AtomicU8::new(0),
            dns: None,
            _line: line,
            node,
            outside,
        };
        fs::create_dir_all(lab.pods_dir()).expect("a directory for manifests");
        fs::create_dir_all(lab.bpffs()).expect("a directory to mount on");
        mount(
            Some("bpf"),
            &lab.bpffs(),
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .expect("mount(2) of a BPF file system");
        lab.write_config(config);
        if dns {
            lab.dns = Some(DnsServer::start(
                &lab.outside,
                &[RESOLVER, RESOLVER6, STRANGER],
            ));
        }
        lab
    }

    fn write_config(&self, mut config: Value) {
        set(&mut config, "bpffs", json!(self.bpffs()));
        // Tests run in parallel, so each needs its own socket.
        if config.get("socket").is_none() {
            set(&mut config, "socket", json!(self.socket()));
        }
        if config.get("stateDir").is_none() {
            set(
                &mut config,
                "stateDir",
                json!(self.directory().join("state")),
            );
        }
        let text = serde_saphyr::to_string(&config).expect("plain data is YAML");
        fs::write(self.config_file(), text).expect("write the configuration");
    }

    /// Sets a key of the configuration file, by its dotted path, as an operator edits it. A running agent
    /// does not read it before [`Agent::reload`].
    #[track_caller]
    pub fn edit_config(&self, key: &str, value: impl Into<Value>) {
        let text = fs::read_to_string(self.config_file()).expect("read the configuration");
        let mut config: Value = serde_saphyr::from_str(&text).expect("it was written as YAML");
        set(&mut config, key, value.into());
        self.write_config(config);
    }

    /// The namespace of the agent and of the host ends of the pods' interfaces.
    pub fn node(&self) -> &Namespace {
        &self.node
    }

    /// The index of an interface of the node.
    #[track_caller]
    pub fn ifindex(&self, interface: &str) -> IfIndex {
        self.node.ifindex(interface)
    }

    /// The namespace of all servers that pods may reach.
    pub fn outside(&self) -> &Namespace {
        &self.outside
    }

    /// The resolver.
    #[track_caller]
    pub fn dns(&self) -> &DnsServer {
        self.dns
            .as_ref()
            .expect("this laboratory was built without a resolver")
    }

    /// The directory of manifests that the agent watches.
    pub fn pods_dir(&self) -> PathBuf {
        self.directory.join("pods")
    }

    /// The agent's configuration.
    pub fn config_file(&self) -> PathBuf {
        self.directory.join("config.yaml")
    }

    /// The mount point of this laboratory's BPF file system. Each mount is an instance of its own, so
    /// laboratories do not see each other's pins.
    pub fn bpffs(&self) -> PathBuf {
        self.directory.join("bpf")
    }

    /// A directory for a test's own files, removed with the laboratory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Creates a network namespace with a veth to the node, for a pod of this Kubernetes namespace and name.
    /// The agent does not know the pod before [`Self::write_pod`].
    #[track_caller]
    pub fn pod(&self, namespace: &str, name: &str) -> Pod {
        let pod = self.pod_without_interface(namespace, name);
        self.add_interface(&pod);
        pod
    }

    /// Creates a pod whose interface does not exist yet; see [`Self::add_interface`].
    #[track_caller]
    pub fn pod_without_interface(&self, namespace: &str, name: &str) -> Pod {
        let number = self.pods.fetch_add(1, Ordering::Relaxed) + 1;
        let netns = Namespace::create(&format!("{}-{namespace}-{name}-{number}", self.name), false);
        Pod::new(
            namespace,
            name,
            netns,
            format!("veth{number}"),
            Ipv4Addr::new(10, 1, number, 2),
            Ipv6Addr::new(0xfd01, number.into(), 0, 0, 0, 0, 0, 2),
        )
    }

    /// Adds the pod's interface, its addresses and its routes.
    #[track_caller]
    pub fn add_interface(&self, pod: &Pod) {
        self.add_interface_as(pod, "");
    }

    /// As [`Self::add_interface`], with this index at both ends.
    #[track_caller]
    pub fn add_interface_with_index(&self, pod: &Pod, index: u32) {
        self.add_interface_as(pod, &format!("index {index} "));
    }

    #[track_caller]
    fn add_interface_as(&self, pod: &Pod, index: &str) {
        let number = pod.ipv4().octets()[2];
        let (mtu, host) = (self.mtu, pod.interface());
        let (v4, v6) = (pod.ipv4(), pod.ipv6());
        self.node.ip_batch(&format!(
            "link add {host} {index}mtu {mtu} address {near} \
             type veth peer name eth0 {index}mtu {mtu} address {far} netns {netns}\n\
             addr add 10.1.{number}.1/30 dev {host}\n\
             addr add fd01:{number:x}::1/64 dev {host} nodad\n\
             link set {host} up\n",
            near = hardware(pod.gateway_hardware()),
            far = hardware(pod.hardware()),
            netns = pod.netns().name()
        ));
        pod.netns().ip_batch(&format!(
            "addr add {v4}/30 dev eth0\n\
             addr add {v6}/64 dev eth0 nodad\n\
             link set eth0 up\n\
             route add default via 10.1.{number}.1\n\
             route add default via fd01:{number:x}::1\n"
        ));
    }

    /// A TCP echo server in `outside` on this port of every address.
    #[track_caller]
    pub fn serve_tcp(&self, port: u16) -> TcpEcho {
        TcpEcho::start(&self.outside, port)
    }

    /// A UDP echo server in `outside` on this port of every address.
    #[track_caller]
    pub fn serve_udp(&self, port: u16) -> UdpEcho {
        UdpEcho::start(&self.outside, port)
    }

    /// Another DNS server in `outside`, on port 53 of these addresses.
    #[track_caller]
    pub fn serve_dns(&self, addresses: &[IpAddr]) -> DnsServer {
        DnsServer::start(&self.outside, addresses)
    }

    /// Another DNS server in `outside`, on these addresses and ports.
    #[track_caller]
    pub fn serve_dns_at(&self, on: &[SocketAddr]) -> DnsServer {
        DnsServer::start_at(&self.outside, on)
    }

    /// Runs a program in `outside` until it is dropped.
    #[track_caller]
    pub fn run_outside(&self, command: &mut Command) -> Running {
        Running::start(&self.outside, command)
    }

    /// Runs a program on the node until it is dropped.
    #[track_caller]
    pub fn run_on_node(&self, command: &mut Command) -> Running {
        Running::start(&self.node, command)
    }

    /// Starts the agent and waits until it judges packets of each of these pods.
    #[track_caller]
    pub fn start_agent(&self, pods: &[&Pod]) -> Agent {
        self.start_agent_with(&[], pods)
    }

    /// Starts the agent with further arguments after `run`, and waits as [`Self::start_agent`] does.
    #[track_caller]
    pub fn start_agent_with(&self, arguments: &[&str], pods: &[&Pod]) -> Agent {
        let agent = self.spawn_agent(arguments);
        agent.wait_ready();
        for pod in pods {
            agent.wait_enforcing(pod);
        }
        agent
    }

    /// Starts the agent without waiting.
    #[track_caller]
    pub fn spawn_agent(&self, arguments: &[&str]) -> Agent {
        let mut command = self.agent_command("run");
        command
            .arg("--pods-dir")
            .arg(self.pods_dir())
            .args(arguments)
            .args(attach_arguments(arguments));
        Agent::start(&self.node, command)
    }

    /// Starts the agent with these environment variables, without waiting. Its output on standard output and
    /// standard error stays in their pipes until [`Agent::read_output`].
    #[track_caller]
    pub fn spawn_agent_unread(&self, environment: &[(&str, &str)]) -> Agent {
        let mut command = self.agent_command("run");
        command
            .arg("--pods-dir")
            .arg(self.pods_dir())
            .envs(environment.iter().copied());
        Agent::start_unread(&self.node, command)
    }

    /// Starts the agent as part of a cluster, with further arguments after `run`, without waiting.
    #[track_caller]
    pub fn spawn_cluster_agent(&self, kubeconfig: &Path, arguments: &[&str]) -> Agent {
        let mut command = self.agent_command("run");
        command
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .args(arguments)
            .args(attach_arguments(arguments));
        Agent::start(&self.node, command)
    }

    /// The agent's program with a subcommand and the laboratory's configuration.
    pub fn agent_command(&self, subcommand: &str) -> Command {
        let mut command = Command::new(Agent::program());
        command
            .arg(subcommand)
            .arg("--config")
            .arg(self.config_file());
        command.env("NO_COLOR", "1");
        command
    }

    /// Runs `egress-agent cleanup` on the node and returns its output.
    #[track_caller]
    pub fn cleanup(&self) -> String {
        let mut command = self.agent_command("cleanup");
        let output = self
            .node
            .run(|| command.output())
            .expect("the agent's program runs");
        let printed = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(
            output.status.success(),
            "egress-agent cleanup: {}\n{printed}",
            output.status
        );
        printed
    }
}

/// The value of `--attach` for agents whose test does not set it.
const ATTACH: &str = "EGRESS_TEST_ATTACH";

/// The variable with the value of `dns.learn` for tests that do not choose it themselves. Without it they have the
/// default.
const LEARN: &str = "EGRESS_TEST_LEARN";

fn dns_settings() -> Value {
    let mut settings = json!({ "resolvers": [RESOLVER, RESOLVER6] });
    if let Ok(learn) = std::env::var(LEARN) {
        settings["learn"] = json!(learn);
    }
    settings
}

/// The arguments that `$EGRESS_TEST_ATTACH` adds to these arguments of `egress-agent run`.
fn attach_arguments(arguments: &[&str]) -> Vec<String> {
    let chosen = arguments.contains(&"--attach");
    let attach = std::env::var(ATTACH).ok().filter(|_| !chosen);
    attach.map_or_else(Vec::new, |attach| vec!["--attach".to_owned(), attach])
}

fn hardware(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}

impl Drop for Lab {
    fn drop(&mut self) {
        // A failure here cannot be handled, and a panic would hide that of the test. The next process that
        // builds a laboratory removes the rest.
        let _ = umount2(&self.bpffs(), MntFlags::MNT_DETACH);
        let _ = fs::remove_dir_all(&self.directory);
    }
}
