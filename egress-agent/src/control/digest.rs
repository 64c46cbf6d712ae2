//! Digests that a policy's record in the kernel has, so that the next agent knows what the policy was made of.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

/// The digest of a pod's annotations and its namespace's. It is never zero, which stands for no annotations that
/// could be read.
pub(super) fn of_annotations(
    own: &BTreeMap<String, String>,
    namespace: &BTreeMap<String, String>,
) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for annotations in [own, namespace] {
        // Lengths, so that the same bytes divided otherwise have another digest.
        hasher.update((annotations.len() as u64).to_be_bytes());
        for text in annotations.iter().flat_map(|(key, value)| [key, value]) {
            hasher.update((text.len() as u64).to_be_bytes());
            hasher.update(text);
        }
    }
    hasher.finalize().into()
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
}
