//! UIDs of pods, as they appear in names of cgroups.

use std::fmt;

/// The longest accepted UID; the API server's have 36 characters, those of static pods 32.
const LONGEST: usize = 64;

/// A pod's UID that can be part of a path: hexadecimal digits and dashes, nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Uid(String);

impl Uid {
    pub(super) fn new(text: &str) -> Option<Self> {
        let fits = (1..=LONGEST).contains(&text.len());
        let plain = text
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        (fits && plain).then(|| Self(text.to_owned()))
    }

    /// As systemd writes it in a slice's name, where a dash separates levels of the tree.
    pub(super) fn in_slice(&self) -> String {
        self.0.replace('-', "_")
    }

    /// The reverse of [`Self::in_slice`].
    pub(super) fn from_slice(text: &str) -> Option<Self> {
        if text.contains('-') {
            return None;
        }
        Self::new(&text.replace('_', "-"))
    }
}

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_uid_becomes_part_of_a_path() {
        for text in [
            "",
            "..",
            "../../x",
            "a/b",
            "a.b",
            "a\0",
            "é",
            "a b",
            "a_b",
            "*",
            &"a".repeat(65),
        ] {
            assert_eq!(Uid::new(text), None, "{text:?}");
        }
        for text in [
            "0f3a2c1d-11aa-4bcd-8e6f-0123456789ab",
            "0123456789abcdef0123456789ABCDEF",
            "a",
        ] {
            let uid = Uid::new(text).unwrap();
            assert_eq!(uid.to_string(), text);
            assert_eq!(Uid::from_slice(&uid.in_slice()), Some(uid));
        }
    }
}
