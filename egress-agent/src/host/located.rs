//! The location of a pod, or the reason why it has none.

use std::{io, net::IpAddr};

use egress_common::ids::IfIndex;

/// The location of a pod on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The indexes of its host ends, in ascending order; at least one.
    pub interfaces: Vec<IfIndex>,
    /// The current addresses of global scope on the other ends. A pod that may configure its own network
    /// chooses them, so they prove only that its network is set up.
    pub addresses: Vec<IpAddr>,
    /// The network namespaces that those interfaces lead to; at least one.
    pub namespaces: Vec<Network>,
}

/// A network namespace in which a process of the pod was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its inode number, which is unique while the namespace exists.
    pub inode: u64,
    /// A process in it.
    pub pid: u32,
}

/// Why a pod has not been located.
#[derive(Debug, thiserror::Error)]
pub enum Missing {
    /// The text is not a valid UID.
    #[error("{0:?} is not the UID of a pod: it must be hexadecimal digits and dashes")]
    Uid(String),
    /// The kubelet has not created the pod's group, or it is in an unknown place.
    #[error("it has no control group on this machine yet")]
    Group,
    /// Nothing runs in its group.
    #[error("no process runs in its control group yet")]
    Process,
    /// Its processes have no id in the agent's PID namespace.
    #[error(
        "its processes cannot be seen from here: the agent must be in the host's PID namespace \
         (hostPID)"
    )]
    ForeignProcesses,
    /// The agent may not read the network namespaces of its processes.
    #[error(
        "the network namespace of its processes cannot be read: {0}; the agent needs CAP_SYS_PTRACE, \
         and a /proc without hidepid"
    )]
    Unreadable(io::Error),
    /// Its processes are only in the host's network. The container runtime's own process is there too before
    /// it enters the pod's network.
    #[error("its processes are in the host's network (hostNetwork), which is not any pod's")]
    HostNetwork,
    /// Its network namespace has no interface but loopback.
    #[error("its network namespace has no interface yet")]
    Interface,
    /// No interface of its network namespace has its other end on the host.
    #[error(
        "its interfaces ({}) have no other end on the host, so nothing can be enforced there: \
         macvlan, ipvlan and SR-IOV interfaces have none",
        .0.join(", ")
    )]
    HostEnd(Vec<String>),
    /// The kernel did not answer.
    #[error("cannot ask the kernel about its interfaces: {0}")]
    Kernel(#[from] io::Error),
}

impl Missing {
    /// Whether no process of the pod runs, so that nothing can send packets.
    pub fn has_no_process(&self) -> bool {
        matches!(self, Self::Group | Self::Process)
    }

    /// Whether the pod has a control group, so that its kubelet has begun to start it or has stopped it.
    pub fn has_group(&self) -> bool {
        !matches!(self, Self::Uid(_) | Self::Group)
    }

    /// Whether every pod passes through this state when it starts.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Group | Self::Process | Self::HostNetwork | Self::Interface | Self::Kernel(_) => {
                true
            }
            Self::Uid(_) | Self::ForeignProcesses | Self::Unreadable(_) | Self::HostEnd(_) => false,
        }
    }
}
