//! The sources of facts about a cluster, and which of them have been read in full.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::snapshot::Facts;

/// A list of objects, or a file, that facts about a cluster come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FactSource {
    /// The Nodes.
    Node,
    /// The Service of the cluster's DNS.
    DnsService,
    /// The kubelet's file.
    Kubelet,
    /// The endpoints of the cluster's DNS.
    DnsEndpoints,
    /// The node's pods, one of which may be the node's DNS cache.
    Pods,
    /// The API server's own Service.
    ApiService,
    /// The endpoints of that Service.
    ApiEndpoints,
    /// The ranges of Services.
    ServiceRanges,
}

impl FactSource {
    /// The sources of resolvers.
    const OF_RESOLVERS: [Self; 4] = [
        Self::DnsService,
        Self::Kubelet,
        Self::DnsEndpoints,
        Self::Pods,
    ];
    /// The sources of internal prefixes, besides the ranges of Services.
    const OF_ADDRESSES: [Self; 4] = [
        Self::Node,
        Self::DnsService,
        Self::ApiService,
        Self::ApiEndpoints,
    ];
}

/// The sources that have been read in full. If such a source does not name a fact, the fact is gone. A fact that
/// another source has named may still hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Knowledge(BTreeSet<FactSource>);

impl Knowledge {
    /// Whether this source has been read in full.
    pub fn has(&self, source: FactSource) -> bool {
        self.0.contains(&source)
    }

    /// Whether every resolver is known.
    pub fn has_resolvers(&self) -> bool {
        FactSource::OF_RESOLVERS.into_iter().all(|of| self.has(of))
    }

    /// Whether every internal prefix is known, perhaps except the ranges of Services.
    pub fn has_addresses(&self) -> bool {
        FactSource::OF_ADDRESSES.into_iter().all(|of| self.has(of))
    }
}

impl FromIterator<FactSource> for Knowledge {
    fn from_iter<I: IntoIterator<Item = FactSource>>(known: I) -> Self {
        Self(known.into_iter().collect())
    }
}

/// Facts about a cluster by their sources. Several may name the same fact.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourcedFacts(BTreeMap<FactSource, Facts>);

impl SourcedFacts {
    /// The facts of one source.
    pub fn of(&mut self, source: FactSource) -> &mut Facts {
        self.0.entry(source).or_default()
    }

    /// The facts of every source.
    pub fn each(&mut self) -> impl Iterator<Item = &mut Facts> {
        self.0.values_mut()
    }

    /// Removes those of sources that are known by now, so that only those stay that a source may still name.
    pub fn retain_unknown(&mut self, knowledge: &Knowledge) {
        self.0.retain(|source, _| !knowledge.has(*source));
    }

    /// Adds those of others that are missing here.
    pub fn add_missing(&mut self, others: &Self) {
        for (source, facts) in &others.0 {
            self.of(*source).add_missing(facts);
        }
    }

    /// All of them, merged.
    pub fn merged(&self) -> Facts {
        let mut merged = Facts::default();
        for facts in self.0.values() {
            merged.add_missing(facts);
        }
        merged
    }
}
