//! A node of a cluster with as many pods as a node has at most.

use std::time::Duration;

use egress_tests::{
    Agent, ApiServer, Cluster, ClusterPod, Lab, addresses::RESOLVER, cluster::allow,
};
use serde_json::Value;

use super::{
    dns::{Client, ZONE},
    responder::Responder,
};

/// The number of pods on the full node.
pub(crate) const PODS: usize = 250;
/// The number of addresses that each pod has resolved.
pub(crate) const ADDRESSES: u32 = 40;
/// The time after which the agent is idle.
pub(crate) const SETTLED: Duration = Duration::from_millis(500);

/// A cluster without pods.
#[track_caller]
pub(crate) fn cluster() -> Cluster {
    Cluster::on(ApiServer::shared(), Lab::builder().without_dns())
}

/// A node with the maximum number of pods, and its agent.
pub(crate) struct FullNode {
    pub(crate) agent: Agent,
    pub(crate) pods: Vec<ClusterPod>,
    /// The namespace of the pods.
    pub(crate) namespace: String,
    _responder: Responder,
}

impl FullNode {
    /// Starts the agent and the pods, and has each pod resolve its addresses.
    #[track_caller]
    pub(crate) fn new(cluster: &Cluster) -> Self {
        let responder = Responder::start(&cluster.lab);
        let namespace = cluster.namespace("full", &Value::Null);
        let policy = allow(&format!("*.{ZONE}:443"));
        let agent = cluster.start_agent();
        let pods: Vec<ClusterPod> = (0..PODS)
            .map(|n| cluster.run(&namespace, &format!("p{n}"), &policy))
            .collect();
        for pod in &pods {
            agent.wait_enforcing(pod.net());
            Client::new(pod.net(), RESOLVER).latencies(ADDRESSES);
        }
        Self {
            agent,
            pods,
            namespace,
            _responder: responder,
        }
    }
}
