//! A laboratory of network namespaces in which tests use the agent as a user does.
//!
//! A [`Lab`] is one node and the outside network, and is removed when it is dropped:
//!
//! ```text
//!  pod eth0 ── veth1 ┐
//!  pod eth0 ── veth2 ┤  node (the agent runs here)  uplink ── eth0  outside (resolver, servers)
//!  …                 ┘
//! ```
//!
//! A [`Pod`] is a network namespace with addresses of both families. The agent knows it only when a manifest
//! exists for it ([`Lab::write_pod`]). `outside` answers on every address of [`addresses::LOCAL_RANGES`], so
//! that each of thousands of names can have an address of its own. Its [`DnsServer`] sends the responses that
//! a test defines, to the byte.
//!
//! Everything here panics when the machine does not behave as expected: a laboratory that could not be built
//! is a failed test.
#![expect(
    clippy::missing_panics_doc,
    reason = "the laboratory panics whenever the machine under it fails: that is a failed test"
)]

pub mod addresses;
mod agent;
pub mod apiserver;
mod assertions;
pub mod bpf;
pub mod cluster;
mod container;
pub mod definitions;
pub mod dns;
pub mod features;
pub mod frames;
pub mod ifb;
mod lab;
mod line;
mod manifests;
mod namespace;
pub mod newer;
pub mod node;
pub mod observed;
mod pod;
mod process;
pub mod programs;
pub mod proxy;
pub mod raw;
pub mod resolvers;
pub mod rewritten;
pub mod rival;
mod scenes;
mod servers;
pub mod shared_page;
mod wait;
pub mod workspace;
pub mod yaml;

pub use agent::{Agent, Denial, KernelObjects};
pub use apiserver::{ApiServer, Identity};
pub use cluster::{Cluster, ClusterPod};
pub use definitions::DefinitionServer;
pub use dns::DnsServer;
pub use lab::{Builder, Lab};
pub use manifests::Annotations;
pub use namespace::{Namespace, leftovers};
pub use node::{Node, NodePod};
pub use pod::{Pod, echo_on, exchange};
pub use process::Running;
pub use proxy::TcpProxy;
pub use scenes::Shop;
pub use servers::{TcpEcho, UdpEcho};
pub use wait::{DEADLINE, SHORT, StopAtEnd, eventually, holds};
