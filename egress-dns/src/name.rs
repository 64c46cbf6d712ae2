//! Domain names, as label sequences.
//!
//! A label may contain any byte, including a dot (RFC 2181, section 11). So names are compared label by label
//! and never as text: otherwise the name of the two labels `evil.github` and `com` would count as one below
//! `github.com`.

use std::{borrow::Borrow, fmt};

/// The longest label in bytes (RFC 1035, section 2.3.4).
pub const LABEL_MAX: usize = 63;
/// The longest name in bytes on the wire, including the root's zero byte (RFC 1035, section 2.3.4).
pub const NAME_MAX: usize = 255;

/// A domain name: its labels in wire form (a length byte before each), ASCII letters in lower case
/// (RFC 4343), without the root's zero byte. The root itself is empty.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Box<[u8]>);

/// Why labels do not make a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A label without bytes.
    #[error("a label is empty")]
    EmptyLabel,
    /// A label over [`LABEL_MAX`].
    #[error("a label is longer than {LABEL_MAX} bytes")]
    LabelTooLong,
    /// A name over [`NAME_MAX`].
    #[error("the name is longer than {NAME_MAX} bytes")]
    NameTooLong,
}

impl Name {
    /// The name with these labels, the leftmost first.
    ///
    /// # Errors
    ///
    /// When a label is empty, or a label or the name is too long.
    pub fn from_labels<'a>(labels: impl IntoIterator<Item = &'a [u8]>) -> Result<Self, NameError> {
        let mut wire = Vec::with_capacity(64);
        for label in labels {
            if label.is_empty() {
                return Err(NameError::EmptyLabel);
            }
            if label.len() > LABEL_MAX {
                return Err(NameError::LabelTooLong);
            }
            wire.push(label.len() as u8);
            wire.extend(label.iter().map(u8::to_ascii_lowercase));
        }
        if wire.len() + 1 > NAME_MAX {
            return Err(NameError::NameTooLong);
        }
        Ok(Self(wire.into()))
    }

    /// The name with this wire form; see [`Self::as_wire`]. `None` if the bytes are not a name's.
    pub fn from_wire(wire: &[u8]) -> Option<Self> {
        let name = Self::from_labels(Labels(wire)).ok()?;
        (name.as_wire().len() == wire.len()).then_some(name)
    }

    /// The wire form: length-prefixed labels in lower case, without the root's zero byte.
    pub fn as_wire(&self) -> &[u8] {
        &self.0
    }

    /// The labels, the leftmost first.
    pub fn labels(&self) -> Labels<'_> {
        Labels(&self.0)
    }

    /// Whether this name equals `ancestor` or is below it.
    pub fn is_within(&self, ancestor: &Self) -> bool {
        self.suffixes().any(|suffix| suffix == ancestor.as_wire())
    }

    /// The rest of this name after `beginning`, if it begins with all labels of that.
    pub fn after(&self, beginning: &Self) -> Option<Self> {
        let rest = self.0.strip_prefix(beginning.as_wire())?;
        Some(Self(rest.into()))
    }

    /// The wire forms of this name and of each of its ancestors, the root (an empty slice) last.
    pub fn suffixes(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = Some(&*self.0);
        std::iter::from_fn(move || {
            let current = rest?;
            rest = match current.split_first() {
                Some((&len, tail)) => tail.get(usize::from(len)..),
                None => None,
            };
            Some(current)
        })
    }
}

impl Borrow<[u8]> for Name {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

/// Iterator over the labels of a [`Name`].
#[derive(Clone, Debug)]
pub struct Labels<'a>(&'a [u8]);

impl<'a> Iterator for Labels<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (&len, rest) = self.0.split_first()?;
        let (label, rest) = rest.split_at_checked(usize::from(len))?;
        self.0 = rest;
        Some(label)
    }
}

/// Presentation form without a trailing dot (`.` for the root). Dots, backslashes and unprintable bytes are
/// escaped as in RFC 1035, section 5.1.
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str(".");
        }
        for (i, label) in self.labels().enumerate() {
            if i > 0 {
                f.write_str(".")?;
            }
            for &byte in label {
                match byte {
                    b'.' | b'\\' => write!(f, "\\{}", char::from(byte))?,
                    0x21..=0x7e => write!(f, "{}", char::from(byte))?,
                    _ => write!(f, "\\{byte:03}")?,
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Name({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::from_labels(text.split('.').map(str::as_bytes)).unwrap()
    }

    #[test]
    fn case_does_not_matter() {
        assert_eq!(name("GitHub.COM"), name("github.com"));
    }

    #[test]
    fn only_the_wire_form_of_a_name_is_read_as_one() {
        for text in ["a", "shop.test", "*.a-b.example.com"] {
            let name = name(text);
            assert_eq!(Name::from_wire(name.as_wire()), Some(name));
        }
        let root = Name::from_labels([]).unwrap();
        assert_eq!(Name::from_wire(b""), Some(root));
        let long = [1; 255];
        for wire in [&b"\x04sho"[..], b"\x00", b"\x04shop\x00", b"\x40", &long] {
            assert_eq!(Name::from_wire(wire), None, "{wire:?}");
        }
    }

    #[test]
    fn a_dot_inside_a_label_is_no_separator() {
        let one_label = Name::from_labels([b"evil.github".as_slice(), b"com"]).unwrap();
        assert_ne!(one_label, name("evil.github.com"));
        assert!(!one_label.is_within(&name("github.com")));
        assert_eq!(one_label.to_string(), "evil\\.github.com");
    }

    #[test]
    fn a_name_is_within_itself_and_its_ancestors() {
        assert!(name("a.b.example.com").is_within(&name("example.com")));
        assert!(name("example.com").is_within(&name("example.com")));
        assert!(!name("evilexample.com").is_within(&name("example.com")));
        assert!(!name("com").is_within(&name("example.com")));
    }

    #[test]
    fn a_name_begins_with_another_only_by_whole_labels() {
        let after = |text, beginning| name(text).after(&name(beginning));
        assert_eq!(after("api.x.test.svc", "API.x.test"), Some(name("svc")));
        assert_eq!(after("api.x.test", "ap"), None);
        assert_eq!(after("api.x", "api.x.test"), None);
        let whole = after("api.x", "api.x").unwrap();
        assert!(whole.as_wire().is_empty());
    }

    #[test]
    fn the_limits_of_rfc_1035_apply() {
        assert_eq!(
            Name::from_labels([[b'a'; 64].as_slice()]),
            Err(NameError::LabelTooLong)
        );
        assert_eq!(
            Name::from_labels([b"".as_slice()]),
            Err(NameError::EmptyLabel)
        );
        let label = [b'a'; 63];
        let almost = [&label[..], &label, &label, &label[..61]];
        assert!(Name::from_labels(almost).is_ok());
        let over = [&label[..], &label, &label, &label[..62]];
        assert_eq!(Name::from_labels(over), Err(NameError::NameTooLong));
    }
}
