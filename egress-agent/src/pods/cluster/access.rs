//! What the agent asks the API server for, and so what its roles must allow, and nothing else.

/// A right that the agent uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The API group; empty for the core group.
    pub group: &'static str,
    /// The resource, in the plural.
    pub resource: &'static str,
    /// What is done with it.
    pub verbs: &'static [&'static str],
    /// Where.
    pub within: Within,
    /// The only objects it is done to; empty for all.
    pub names: &'static [&'static str],
}

/// Where a right is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Within {
    /// In the whole cluster, as a `ClusterRole`.
    Cluster,
    /// In the namespace of the DNS Service, `kube-system` unless `cluster.dnsService` says
    /// otherwise. The names are those of the default, too.
    DnsNamespace,
    /// In the namespace `default`, where the API server's own Service is.
    Default,
}

const FOLLOW: &[&str] = &["list", "watch"];

/// Every right the agent uses.
pub const ACCESS: &[Access] = &[
    // RBAC cannot limit this to the pods of one node; the agent asks for those only.
    all("", "pods"),
    all("", "namespaces"),
    all("", "nodes"),
    all("networking.k8s.io", "servicecidrs"),
    Access {
        group: "",
        resource: "services",
        verbs: FOLLOW,
        within: Within::DnsNamespace,
        names: &["kube-dns"],
    },
    // Found by label: their names are made up.
    Access {
        group: "discovery.k8s.io",
        resource: "endpointslices",
        verbs: FOLLOW,
        within: Within::DnsNamespace,
        names: &[],
    },
    // Only where the API server has no EndpointSlices of version v1.
    Access {
        group: "",
        resource: "endpoints",
        verbs: FOLLOW,
        within: Within::DnsNamespace,
        names: &["kube-dns"],
    },
    api_server("", "services"),
    api_server("discovery.k8s.io", "endpointslices"),
    api_server("", "endpoints"),
    Access {
        group: "events.k8s.io",
        resource: "events",
        verbs: &["create", "patch"],
        within: Within::Cluster,
        names: &[],
    },
];

const fn all(group: &'static str, resource: &'static str) -> Access {
    Access {
        group,
        resource,
        verbs: FOLLOW,
        within: Within::Cluster,
        names: &[],
    }
}

const fn api_server(group: &'static str, resource: &'static str) -> Access {
    Access {
        group,
        resource,
        verbs: FOLLOW,
        within: Within::Default,
        names: &["kubernetes"],
    }
}
