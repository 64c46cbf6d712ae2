//! Pod ranges and addresses of the cluster's other nodes.
//!
//! An attacker who has taken over a node can write its Node object. So only prefixes for private use count
//! here: another node cannot make an address on the internet internal.

use std::sync::LazyLock;

use super::{super::Problem, facts::NodeFacts};
use egress_policy::{Prefix, prefix};

/// Most prefixes that count, after adjacent ones are merged. The kernel's map has room for twice as many.
const PREFIXES: usize = 2048;

/// Prefixes for private use (RFC 1918, RFC 6598, RFC 4193).
static PRIVATE: LazyLock<Vec<Prefix>> = LazyLock::new(|| {
    let texts = [
        "10.0.0.0/8",
        "100.64.0.0/10",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "fc00::/7",
    ];
    let read = texts.map(|text| Prefix::parse(text).expect("a prefix"));
    read.to_vec()
});

/// The prefixes of the other nodes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct OtherNodes {
    /// The internal prefixes, each with its origin.
    pub(super) prefixes: Vec<(Prefix, &'static str)>,
    /// The first prefix that is not for private use, and how many there are.
    public: Option<(Prefix, usize)>,
    /// How many prefixes exceeded the limit.
    left_out: usize,
}

impl OtherNodes {
    pub(super) fn of<'a>(nodes: impl Iterator<Item = &'a NodeFacts>) -> Self {
        let (mut pods, mut hosts) = (Vec::new(), Vec::new());
        for node in nodes {
            pods.extend(node.pod_prefixes.iter().copied());
            hosts.extend(node.addresses.iter().copied().map(Prefix::host));
        }
        let mut others = Self::default();
        for (found, origin) in [
            (pods, "podCIDRs of the cluster's nodes"),
            (hosts, "addresses of the cluster's nodes"),
        ] {
            let (private, public): (Vec<_>, Vec<_>) = found
                .into_iter()
                .partition(|prefix| PRIVATE.iter().any(|private| private.covers(prefix)));
            if let Some(first) = public.first() {
                let (_, count) = others.public.get_or_insert((*first, 0));
                *count += public.len();
            }
            let merged = prefix::merge(&private);
            others
                .prefixes
                .extend(merged.into_iter().map(|prefix| (prefix, origin)));
        }
        others.left_out = others.prefixes.len().saturating_sub(PREFIXES);
        others.prefixes.truncate(PREFIXES);
        others
    }

    /// The prefixes that do not count, and what to do about them.
    pub(super) fn problem(&self) -> Option<Problem> {
        let mut messages = Vec::new();
        if let Some((first, count)) = self.public {
            messages.push(format!(
                "{count} pod ranges or addresses of other nodes are not for private use, such as {first}, and \
                 do not count as internal"
            ));
        }
        if self.left_out > 0 {
            messages.push(format!(
                "{} pod ranges or addresses of other nodes are over the limit of {PREFIXES} and do not count as \
                 internal",
                self.left_out
            ));
        }
        (!messages.is_empty()).then(|| Problem {
            origin: "nodes".into(),
            message: format!(
                "{}: list the internal ranges in ranges.internal, and set cluster.nodes to own",
                messages.join("; ")
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(pods: &str, address: &str) -> NodeFacts {
        NodeFacts {
            uid: String::new(),
            pod_prefixes: vec![Prefix::parse(pods).expect("a prefix")],
            addresses: vec![address.parse().expect("an address")],
            ..NodeFacts::default()
        }
    }

    fn texts(others: &OtherNodes) -> Vec<String> {
        let prefixes = others.prefixes.iter();
        prefixes.map(|(prefix, _)| prefix.to_string()).collect()
    }

    #[test]
    fn adjacent_ranges_are_merged() {
        let nodes = [
            node("10.244.1.0/24", "192.168.7.6"),
            node("10.244.0.0/24", "192.168.7.7"),
            node("fd00:0:0:1::/64", "fd01::1"),
        ];
        let others = OtherNodes::of(nodes.iter());
        assert_eq!(
            texts(&others),
            [
                "10.244.0.0/23",
                "fd00:0:0:1::/64",
                "192.168.7.6/31",
                "fd01::1"
            ]
        );
        assert_eq!(others.problem(), None);
    }

    #[test]
    fn an_address_on_the_internet_does_not_become_internal() {
        let nodes = [
            node("0.0.0.0/1", "8.8.8.8"),
            node("2001:db8::/64", "10.0.0.7"),
        ];
        let others = OtherNodes::of(nodes.iter());
        assert_eq!(texts(&others), ["10.0.0.7"]);
        let problem = others.problem().expect("a problem").message;
        assert!(problem.starts_with("3 pod ranges"), "{problem}");
        assert!(problem.contains("0.0.0.0/1"), "{problem}");
    }

    #[test]
    fn prefixes_over_the_limit_are_reported() {
        let nodes: Vec<NodeFacts> = (0..=u16::try_from(PREFIXES).expect("few"))
            .map(|n| {
                let [high, low] = (2 * n).to_be_bytes();
                node("10.244.0.0/24", &format!("192.168.{high}.{low}"))
            })
            .collect();
        let others = OtherNodes::of(nodes.iter());
        assert_eq!(others.prefixes.len(), PREFIXES);
        let problem = others.problem().expect("a problem").message;
        assert!(problem.starts_with("2 pod ranges"), "{problem}");
    }
}
