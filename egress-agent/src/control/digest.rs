//! Digests in a policy's record in the kernel, by which the next agent knows what the policy was compiled from.

use std::collections::BTreeMap;

use egress_common::records::RANGE_SERVICES;
use sha2::{Digest as _, Sha256};

use crate::config::Config;

/// The digest of a pod's annotations and its namespace's. It is never zero, which stands for no annotations that
/// could be read.
pub(in crate::control) fn of_annotations(
    own: &BTreeMap<String, String>,
    namespace: &BTreeMap<String, String>,
) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for annotations in [own, namespace] {
        // With the lengths, the same bytes divided otherwise have another digest.
        hasher.update((annotations.len() as u64).to_be_bytes());
        for text in annotations.iter().flat_map(|(key, value)| [key, value]) {
            hasher.update((text.len() as u64).to_be_bytes());
            hasher.update(text);
        }
    }
    hasher.finalize().into()
}

/// The fingerprint of what the kernel's maps `ranges` and `tunnels` say under this configuration. Resolvers are
/// left out: DNS is held before flows are looked at, so flows need not be judged again because of them.
pub(in crate::control) fn of_ranges(config: &Config) -> u64 {
    let mut tunnels = config.tunnels();
    tunnels.sort_unstable();
    tunnels.dedup();
    let mut hasher = Sha256::new();
    // Numbers of fixed lengths, so that another version of the agent gets the same fingerprint.
    for tunnel in tunnels {
        hasher.update([tunnel.protocol]);
        hasher.update(tunnel.port.to_be_bytes());
    }
    hasher.update(b"ranges");
    let mut ranges = config.ranges_without_resolvers();
    ranges.sort_unstable();
    for (network, prefix_len, range) in ranges {
        hasher.update(network);
        hasher.update(prefix_len.to_be_bytes());
        hasher.update((range.kinds & !RANGE_SERVICES).to_be_bytes());
    }
    let digest: [u8; 32] = hasher.finalize().into();
    let first = digest.first_chunk().copied();
    first.map_or(0, u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(all: &[(&str, &str)]) -> BTreeMap<String, String> {
        let all = all.iter();
        all.map(|&(key, value)| (key.to_owned(), value.to_owned()))
            .collect()
    }

    #[test]
    fn annotations_that_are_divided_otherwise_have_another_digest() {
        let none = annotations(&[]);
        let one = annotations(&[("allow", "a.test")]);
        let all = [
            of_annotations(&none, &none),
            of_annotations(&one, &none),
            of_annotations(&none, &one),
            of_annotations(&annotations(&[("allowa", ".test")]), &none),
            of_annotations(&annotations(&[("allow", ""), ("deny", "")]), &none),
        ];
        for (i, digest) in all.iter().enumerate() {
            assert!(!all[..i].contains(digest), "{i}");
        }
        assert_eq!(of_annotations(&one, &none), all[1]);
    }

    #[test]
    fn every_range_and_tunnel_changes_the_fingerprint_and_a_resolver_does_not() {
        let of = |text: &str| of_ranges(&Config::from_yaml(text).expect("a configuration"));
        let plain = of("dns: {resolvers: [10.0.0.53]}\nnode: a\n");
        assert_eq!(plain, of("dns: {resolvers: [10.0.0.54]}\nnode: a\n"));
        let with = |ranges: &str| {
            of(&format!(
                "dns: {{resolvers: [10.0.0.53]}}\nnode: a\nranges: {{{ranges}}}\n"
            ))
        };
        let all = [
            plain,
            with("protected: [203.0.113.9/32]"),
            with("protected: [203.0.113.8/31]"),
            with("internal: [203.0.113.9/32]"),
            with("tunnels: []"),
        ];
        for (i, fingerprint) in all.iter().enumerate() {
            assert!(!all[..i].contains(fingerprint), "{i}");
        }
    }
}
