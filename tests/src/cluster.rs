//! A cluster with one node that looks real to the agent: a real API server, a [`Lab`] for its network, and
//! pods with cgroups and processes as a [`Node`] has them.
//!
//! The agent runs on the laboratory's node, which reaches the API server only through a [`TcpProxy`].

use std::{
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use egress_agent::pods::cluster::ACCESS;
use serde_json::{Value, json};

use crate::{
    Agent, ApiServer, Identity, Lab, Node, NodePod, Pod, TcpProxy,
    addresses::{RESOLVER, RESOLVER6},
    eventually, holds,
    lab::Builder,
    node::Qos,
};

/// A cluster of one node. All of it is removed when this is dropped.
#[derive(Debug)]
pub struct Cluster {
    /// The node's network.
    pub lab: Lab,
    /// The API server.
    pub server: Arc<ApiServer>,
    /// The connection from the node to the API server.
    pub proxy: TcpProxy,
    node: Node,
    name: String,
}

/// A pod that the API server knows and that runs on the node.
#[derive(Debug)]
pub struct ClusterPod {
    object: Value,
    running: NodePod,
}

impl Cluster {
    /// A cluster whose API server is shared with other tests of this binary.
    #[track_caller]
    pub fn new() -> Self {
        Self::on(ApiServer::shared(), Lab::builder())
    }

    /// A cluster with this API server, and a laboratory with these settings. Its configuration lists the
    /// resolvers of its pods.
    #[track_caller]
    pub fn on(server: Arc<ApiServer>, lab: Builder) -> Self {
        server.allow_agent("agent", &rights(|_| true));
        Self::without_rights(server, lab)
    }

    /// Like [`Self::on`], but the agent has only the rights for which the API server already has roles.
    #[track_caller]
    pub fn without_rights(server: Arc<ApiServer>, lab: Builder) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("node-{}-{number}", std::process::id());
        // The resolvers in the laboratory's configuration replace the cluster's DNS service.
        let lab = lab.config("node", name.clone()).build();
        server.apply(&json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": { "name": name },
        }));
        let proxy = TcpProxy::start_in(lab.node(), server.port());
        Self {
            lab,
            server,
            proxy,
            node: Node::default(),
            name,
        }
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.name
    }

    /// Creates a namespace of this cluster alone whose name ends with `name`.
    #[track_caller]
    pub fn namespace(&self, name: &str, annotations: &Value) -> String {
        let namespace = format!("{}-{name}", self.name);
        self.server.namespace(&namespace, annotations);
        namespace
    }

    /// Creates the object of a pod on this node, and no network or process.
    #[track_caller]
    pub fn create(&self, namespace: &str, name: &str, annotations: &Value) -> (Value, String) {
        self.create_as(namespace, name, annotations, false)
    }

    /// As [`Self::create`], in the host's network.
    #[track_caller]
    pub fn create_on_host(
        &self,
        namespace: &str,
        name: &str,
        annotations: &Value,
    ) -> (Value, String) {
        self.create_as(namespace, name, annotations, true)
    }

    #[track_caller]
    fn create_as(
        &self,
        namespace: &str,
        name: &str,
        annotations: &Value,
        host_network: bool,
    ) -> (Value, String) {
        let mut object = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "namespace": namespace, "name": name, "annotations": annotations },
            "spec": {
                "nodeName": self.name,
                "hostNetwork": host_network,
                "containers": [{ "name": "main", "image": "none" }],
            },
        });
        if annotations.is_null() {
            object["metadata"]["annotations"] = json!({});
        }
        let created = self.server.apply(&object);
        let uid = created.metadata.uid.expect("the API server gives a UID");
        (object, uid)
    }

    /// Creates a pod that runs and has its addresses in its status.
    #[track_caller]
    pub fn run(&self, namespace: &str, name: &str, annotations: &Value) -> ClusterPod {
        let (object, uid) = self.create(namespace, name, annotations);
        self.start(object, &uid)
    }

    /// As [`Self::run`], with these labels and these ports of its container, as `(name, number, protocol)`.
    #[track_caller]
    pub fn run_with(
        &self,
        namespace: &str,
        name: &str,
        labels: &Value,
        ports: &[(&str, u16, &str)],
    ) -> ClusterPod {
        let ports = ports.iter().map(
            |(name, number, protocol)| json!({ "name": name, "containerPort": number, "protocol": protocol }),
        );
        let object = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "namespace": namespace, "name": name, "labels": labels },
            "spec": {
                "nodeName": self.name,
                "containers": [{ "name": "main", "image": "none", "ports": ports.collect::<Value>() }],
            },
        });
        let created = self.server.apply(&object);
        let uid = created.metadata.uid.expect("the API server gives a UID");
        self.start(object, &uid)
    }

    /// Runs the pod of this object.
    #[track_caller]
    fn start(&self, object: Value, uid: &str) -> ClusterPod {
        let metadata = &object["metadata"];
        let text = |field: &str| metadata[field].as_str().expect("a text");
        let pod = self.lab.pod(text("namespace"), text("name"));
        let mut pod = self.pod_without_processes(object, uid, pod);
        pod.running.start_container();
        self.set_addresses(&pod);
        pod
    }

    /// Creates the cgroup of a pod in which nothing runs yet.
    #[track_caller]
    pub fn pod_without_processes(&self, object: Value, uid: &str, pod: Pod) -> ClusterPod {
        let running = self.node.pod_without_processes(pod, uid, Qos::Burstable);
        ClusterPod { object, running }
    }

    /// A network made for a pod before the API server knows the pod and before its processes start. The agent has put its
    /// interface into quarantine and knows its addresses.
    #[track_caller]
    pub fn quarantined(&self, agent: &Agent, namespace: &str, name: &str) -> Pod {
        let net = self.lab.pod(namespace, name);
        agent.wait_quarantined(net.interface());
        self.lab.wait_own(&[net.ipv4().into(), net.ipv6().into()]);
        net
    }

    /// Writes the pod's addresses into its status, as its kubelet does once it knows them.
    #[track_caller]
    pub fn set_addresses(&self, pod: &ClusterPod) {
        let (v4, v6) = (pod.net().ipv4(), pod.net().ipv6());
        self.server.set_status(
            &pod.object,
            &json!({
                "phase": "Running",
                "podIP": v4,
                "podIPs": [{ "ip": v4 }, { "ip": v6 }],
            }),
        );
    }

    /// Sets a pod's phase to `Running`, as its kubelet does, whether or not the pod runs.
    #[track_caller]
    pub fn set_running(&self, object: &Value) {
        self.server
            .set_status(object, &json!({ "phase": "Running" }));
    }

    /// Replaces the pod's annotations.
    #[track_caller]
    pub fn annotate(&self, pod: &mut ClusterPod, annotations: &Value) {
        pod.object["metadata"]["annotations"].clone_from(annotations);
        self.server.apply(&pod.object);
    }

    /// Waits until the agent uses this resolver. If its first request for the cluster's DNS service fails, it deals with
    /// the pods before it knows the service.
    #[track_caller]
    pub fn wait_resolver(&self, address: IpAddr) {
        eventually(&format!("the agent uses the resolver {address}"), || {
            let (_, status) = self.lab.ask_json(&["status"]);
            let mut resolvers = status["resolvers"].as_array()?.iter();
            holds(resolvers.any(|resolver| resolver["address"] == address.to_string()))
        });
    }

    /// All Events in a namespace.
    #[track_caller]
    pub fn events(&self, namespace: &str) -> Vec<Value> {
        let like = json!({
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": { "namespace": namespace, "name": "any" },
        });
        let events = self.server.list(&like).into_iter();
        events.map(|event| event.data).collect()
    }

    /// Deletes the pod at once, first at the API server and then on the node.
    #[track_caller]
    pub fn delete(&self, pod: ClusterPod) {
        self.server.delete(&pod.object);
        drop(pod);
    }

    /// The kubeconfig of the agent.
    #[track_caller]
    pub fn kubeconfig(&self) -> PathBuf {
        let user = json!({ "token": Identity::Agent.token() });
        self.server
            .kubeconfig_with(&self.name, self.proxy.port(), &user)
    }

    /// Starts the agent, and waits until it is ready.
    #[track_caller]
    pub fn start_agent(&self) -> Agent {
        self.start_agent_with(&[])
    }

    /// Starts the agent with further arguments, and waits until it is ready.
    #[track_caller]
    pub fn start_agent_with(&self, arguments: &[&str]) -> Agent {
        let agent = self.spawn_agent(arguments);
        agent.wait_ready();
        agent
    }

    /// Starts the agent without waiting.
    #[track_caller]
    pub fn spawn_agent(&self, arguments: &[&str]) -> Agent {
        self.lab.spawn_cluster_agent(&self.kubeconfig(), arguments)
    }

    /// Makes the laboratory's resolver the cluster's DNS service. Clusters with a shared API server share it.
    #[track_caller]
    pub fn announce_resolver(&self) {
        let service = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "namespace": "kube-system", "name": "kube-dns" },
            "spec": {
                "clusterIP": "None",
                "ports": [{ "name": "dns", "port": 53, "protocol": "UDP" }],
            },
        });
        self.server.apply(&service);
        self.set_resolvers(&[RESOLVER, RESOLVER6]);
    }

    /// Makes these addresses the endpoints of the cluster's DNS service.
    #[track_caller]
    pub fn set_resolvers(&self, addresses: &[IpAddr]) {
        let addresses = addresses.iter().map(|address| json!({ "ip": address }));
        self.server.apply(&json!({
            "apiVersion": "v1",
            "kind": "Endpoints",
            "metadata": { "namespace": "kube-system", "name": "kube-dns" },
            "subsets": [{
                "addresses": addresses.collect::<Value>(),
                "ports": [{ "name": "dns", "port": 53, "protocol": "UDP" }],
            }],
        }));
    }
}

impl Default for Cluster {
    fn default() -> Self {
        Self::new()
    }
}

impl ClusterPod {
    /// Its network, and methods of programs in it.
    pub fn net(&self) -> &Pod {
        self.running.pod()
    }

    /// Its processes and cgroups.
    pub fn running(&mut self) -> &mut NodePod {
        &mut self.running
    }

    /// The object as it was sent to the API server.
    pub fn object(&self) -> &Value {
        &self.object
    }
}

/// Annotations with this list of destinations that a pod may reach.
#[must_use]
pub fn allow(entries: &str) -> Value {
    json!({ "egress-agent.dev/allow": entries })
}

/// The agent's rights to the resources of which `includes` is true, everywhere.
pub fn rights(includes: impl Fn(&str) -> bool) -> Value {
    ACCESS
        .iter()
        .filter(|access| includes(access.resource))
        .map(|access| {
            json!({
                "apiGroups": [access.group],
                "resources": [access.resource],
                "verbs": access.verbs,
            })
        })
        .collect()
}
