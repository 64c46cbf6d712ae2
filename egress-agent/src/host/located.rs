//! Where a pod is, or why nobody can say.

use std::{io, net::IpAddr};

/// What the machine knows of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The host's ends of its interfaces, by their numbers, in ascending order; at least one.
    pub interfaces: Vec<u32>,
    /// The addresses of global scope on the other ends now. A pod that may configure its own network
    /// chooses them: that there are some says that its network is made, and no more.
    pub addresses: Vec<IpAddr>,
    /// The network namespaces that those interfaces lead to; at least one.
    pub namespaces: Vec<Network>,
}

/// A network namespace in which a pod's process was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its inode number, which no other namespace has while it exists.
    pub inode: u64,
    /// A process that is in it.
    pub pid: u32,
}

/// Why a pod has not been located.
#[derive(Debug, thiserror::Error)]
pub enum Missing {
    /// The UID has a form that no UID has.
    #[error("{0:?} is not the UID of a pod: it must be hexadecimal digits and dashes")]
    Uid(String),
    /// The kubelet has not made its group, or it is where nobody looks.
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
    /// The network namespaces of its processes may not be read.
    #[error(
        "the network namespace of its processes cannot be read: {0}; the agent needs CAP_SYS_PTRACE, \
         and a /proc without hidepid"
    )]
    Unreadable(io::Error),
    /// Its processes are in the host's network only. A container runtime's own process is too,
    /// before it has entered the pod's.
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
    /// Whether nothing of the pod runs, so that nobody is there who could send something.
    pub fn is_nobody(&self) -> bool {
        matches!(self, Self::Group | Self::Process)
    }

    /// Whether it has a control group, so that its kubelet has begun to start it or has stopped it.
    pub fn has_group(&self) -> bool {
        !matches!(self, Self::Uid(_) | Self::Group)
    }

    /// Whether this is how every pod begins: it may have gone in a moment.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Group | Self::Process | Self::HostNetwork | Self::Interface | Self::Kernel(_) => {
                true
            }
            Self::Uid(_) | Self::ForeignProcesses | Self::Unreadable(_) | Self::HostEnd(_) => false,
        }
    }
}
