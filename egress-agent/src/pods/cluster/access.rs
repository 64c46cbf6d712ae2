//! The agent's requests to the API server, and so exactly the rights that its roles must grant.

/// A right that the agent uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The API group; empty for the core group.
    pub group: &'static str,
    /// The resource, in the plural.
    pub resource: &'static str,
    /// The verbs that the agent uses on it.
    pub verbs: &'static [&'static str],
    /// The scope.
    pub within: Within,
    /// The only objects that the agent uses; empty for all.
    pub names: &'static [&'static str],
}

/// The scope of a right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Within {
    /// In the whole cluster, as a `ClusterRole`.
    Cluster,
    /// In the namespace of the DNS Service, which is `kube-system` unless `cluster.dnsService` names another
    /// one. The names of objects are those of the default, too.
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
    // Services and their endpoints.
    all("", "services"),
    all("discovery.k8s.io", "endpointslices"),
    // Only where the API server has no EndpointSlices of version v1.
    all("", "endpoints"),
    all("egress-agent.dev", "egresspolicies"),
    all("egress-agent.dev", "clusteregresspolicies"),
    all("egress-agent.dev", "egresssets"),
    all("policy.networking.k8s.io", "clusternetworkpolicies"),
    // Metadata only. A watch cannot name several objects.
    all("apiextensions.k8s.io", "customresourcedefinitions"),
    Access {
        group: "",
        resource: "services",
        verbs: FOLLOW,
        within: Within::DnsNamespace,
        names: &["kube-dns"],
    },
    // Selected by label, because their names are generated.
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
    // The node's own object only, which RBAC cannot express: the names are those of the nodes.
    Access {
        group: "egress-agent.dev",
        resource: "egressnodereports",
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
