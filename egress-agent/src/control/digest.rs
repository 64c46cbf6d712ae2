//! Digests in a policy's record in the kernel, by which the next agent knows what the policy was compiled from.

use std::collections::BTreeMap;

use egress_common::records::RANGE_SERVICES;
use sha2::{Digest as _, Sha256};

use crate::{config::Config, pods::Pod};
use egress_policy::objects::Objects;

/// Longest name of an `EgressSet` (an RFC 1123 subdomain).
const SET_NAME_MAX: usize = 253;

/// The digest of the inputs of a pod's policy, as [`of_parts`] makes it.
pub(in crate::control) fn of_pod(pod: &Pod) -> [u8; 32] {
    of_parts(&pod.annotations, &pod.namespace_annotations, &pod.objects)
}

/// The digest of a pod's annotations, its namespace's, the objects that select it, and the sets that these use. It is
/// never zero, and without objects and sets it is that of the annotations alone.
pub(in crate::control) fn of_parts(
    own: &BTreeMap<String, String>,
    of_namespace: &BTreeMap<String, String>,
    objects: &Objects,
) -> [u8; 32] {
    let Objects {
        namespace, tiers, ..
    } = objects;
    let annotations = of_annotations(own, of_namespace);
    let used = used_sets(own.values().chain(of_namespace.values()), objects);
    if namespace.is_empty() && tiers.is_empty() && used.is_empty() {
        return annotations;
    }
    let mut hasher = Sha256::new();
    hasher.update(annotations);
    // These types contain only texts, numbers and lists, and always become JSON.
    let used: Vec<_> = used.into_iter().collect();
    let text = serde_json::to_vec(&(namespace, tiers, used)).unwrap_or_default();
    hasher.update(text);
    hasher.finalize().into()
}

/// The sets that the pod's entries name. Sets whose names are prefixes of those may be among them.
pub(in crate::control) fn used_sets_of(pod: &Pod) -> BTreeMap<&String, &Vec<String>> {
    let annotations = pod.annotations.values();
    used_sets(
        annotations.chain(pod.namespace_annotations.values()),
        &pod.objects,
    )
}

/// The sets that these annotations and objects name. Sets whose names are prefixes of those may be among them.
pub(in crate::control) fn used_sets<'a>(
    annotations: impl Iterator<Item = &'a String>,
    objects: &'a Objects,
) -> BTreeMap<&'a String, &'a Vec<String>> {
    let Objects {
        namespace,
        tiers,
        sets,
    } = objects;
    let of_policies = namespace.iter().flat_map(|policy| {
        let lists = [&policy.allow, &policy.deny, &policy.resolve];
        lists.into_iter().flatten().flatten()
    });
    let rules = tiers.iter().flat_map(|policy| &policy.rules);
    let texts = annotations
        .chain(of_policies)
        .chain(rules.flat_map(|rule| &rule.entries));
    // Searching the texts for each set would take time in proportion to the number of sets.
    let after_signs = texts.flat_map(|text| text.match_indices('@').map(|(at, _)| &text[at + 1..]));
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    let names = after_signs.flat_map(|rest| {
        let end = rest.find(|c| !is_of_name(c)).unwrap_or(rest.len());
        let lengths = 1..=end.min(SET_NAME_MAX);
        lengths.filter_map(|length| rest.get(..length))
    });
    names.filter_map(|name| sets.get_key_value(name)).collect()
}

/// The digest of a pod's annotations and its namespace's. It is never zero, which stands for no annotations that
/// could be read.
pub(in crate::control) fn of_annotations(
    own: &BTreeMap<String, String>,
    namespace: &BTreeMap<String, String>,
) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for annotations in [own, namespace] {
        // The lengths make sure that the same bytes divided differently have another digest.
        hasher.update((annotations.len() as u64).to_be_bytes());
        for text in annotations.iter().flat_map(|(key, value)| [key, value]) {
            hasher.update((text.len() as u64).to_be_bytes());
            hasher.update(text);
        }
    }
    hasher.finalize().into()
}

/// The fingerprint of the kernel's maps `ranges` and `tunnels` under this configuration. Resolvers are
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
    use std::sync::Arc;

    use egress_policy::objects::{NamespacePolicy, ObjectKind, ObjectName};

    use super::*;
    use crate::control::plan::scene::pod;

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
    fn every_object_and_every_set_that_is_used_changes_the_digest() {
        let plain = pod("cart");
        let with = |policies: &[&str], sets: &[(&str, &str)]| {
            let mut pod = plain.clone();
            let policy = |allow: &&str| {
                Arc::new(NamespacePolicy {
                    name: Arc::new(ObjectName {
                        kind: ObjectKind::EgressPolicy,
                        namespace: Some("shop".into()),
                        name: "web".into(),
                    }),
                    mode: None,
                    allow: Some(vec![(*allow).to_owned()]),
                    deny: None,
                    resolve: None,
                })
            };
            pod.objects.namespace = policies.iter().map(policy).collect();
            let sets = sets.iter();
            let sets = sets.map(|(name, one)| ((*name).to_owned(), vec![(*one).to_owned()]));
            pod.objects.sets = Arc::new(sets.collect());
            of_pod(&pod)
        };
        let all = [
            with(&[], &[]),
            with(&["a.test"], &[]),
            with(&["@web:443"], &[]),
            with(&["@web:443"], &[("web", "a.test")]),
            with(&["@web:443"], &[("web", "b.test")]),
            with(&["a.test", "b.test @web"], &[("web", "a.test")]),
            with(&["@web2"], &[("web2", "a.test")]),
        ];
        for (i, digest) in all.iter().enumerate() {
            assert!(!all[..i].contains(digest), "{i}");
        }
        let annotations = of_annotations(&plain.annotations, &plain.namespace_annotations);
        assert_eq!(all[0], annotations);
        assert_eq!(all[1], with(&["a.test"], &[("web", "a.test")]));
        assert_eq!(all[0], with(&[], &[("web", "a.test")]));
        let others = [("we", "a.test"), ("we2", "a.test"), ("web2", "a.test")];
        let used = with(&["@web2"], &[others[0], others[2]]);
        assert_eq!(used, with(&["@web2"], &others));
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
