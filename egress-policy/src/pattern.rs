//! Name patterns: the destinations of entries for names.
//!
//! A pattern is compared with a [`Name`] label by label and byte by byte, never with its text, because a
//! label may contain a dot.

use std::fmt;

use egress_dns::Name;

/// A name, a subtree, or a name with `*` inside its labels.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NamePattern {
    /// This name alone.
    Exactly(Name),
    /// Every name with one or more labels before this one (`*.example.com`).
    Below(Name),
    /// A name with `*` inside a label.
    Glob(LabelGlobs),
}

/// Labels of which some contain `*`, each for any number of bytes (also none) of its label. So a label that
/// is only `*` stands for any one label.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LabelGlobs {
    /// Whether one or more labels come before (`*.api-*.example.com`).
    below: bool,
    /// From the leftmost label on, in lower case; never two `*` in a row.
    labels: Box<[Box<[u8]>]>,
}

impl LabelGlobs {
    /// The pattern with these labels; ASCII letters become lower case.
    pub fn new<'a>(below: bool, labels: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let labels = labels
            .into_iter()
            .map(|label| {
                let mut label = label.to_ascii_lowercase();
                label.dedup_by(|a, b| *a == b'*' && *b == b'*');
                label.into()
            })
            .collect();
        Self { below, labels }
    }

    /// Whether the name has these labels.
    pub fn matches(&self, name: &Name) -> bool {
        let Some(before) = name.labels().count().checked_sub(self.labels.len()) else {
            return false;
        };
        (if self.below { before > 0 } else { before == 0 })
            && name
                .labels()
                .skip(before)
                .zip(&self.labels)
                .all(|(label, glob)| matches(glob, label))
    }

    /// Whether this pattern matches every name that `other` matches.
    ///
    /// A `*` of `other` is treated as a byte that only a `*` of this pattern can match.
    fn covers(&self, other: &Self) -> bool {
        let Some(before) = other.labels.len().checked_sub(self.labels.len()) else {
            return false;
        };
        (if self.below {
            before > 0 || other.below
        } else {
            before == 0 && !other.below
        }) && other.labels[before..]
            .iter()
            .zip(&self.labels)
            .all(|(inner, glob)| matches(glob, inner))
    }
}

impl NamePattern {
    /// Whether the pattern matches the name.
    pub fn matches(&self, name: &Name) -> bool {
        match self {
            Self::Exactly(only) => only == name,
            Self::Below(top) => top != name && name.is_within(top),
            Self::Glob(globs) => globs.matches(name),
        }
    }

    /// Whether the pattern matches every name that `other` matches.
    pub fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (_, Self::Exactly(name)) => self.matches(name),
            (Self::Below(top), Self::Below(below)) => below.is_within(top),
            (Self::Below(top), Self::Glob(globs)) => globs.is_below(top),
            (Self::Glob(outer), Self::Glob(inner)) => outer.covers(inner),
            (Self::Exactly(_), Self::Below(_) | Self::Glob(_)) => false,
            (Self::Glob(outer), Self::Below(top)) => outer.covers(&LabelGlobs {
                below: true,
                labels: top.labels().map(Into::into).collect(),
            }),
        }
    }
}

impl LabelGlobs {
    /// Whether every matched name is strictly below `top`.
    fn is_below(&self, top: &Name) -> bool {
        let Some(before) = self.labels.len().checked_sub(top.labels().count()) else {
            return false;
        };
        (before > 0 || self.below)
            && self.labels[before..]
                .iter()
                .map(|label| &**label)
                .eq(top.labels())
    }
}

/// The pattern in the grammar of entries, with IDNA names in their ASCII form.
impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(name) => write!(f, "{name}"),
            Self::Below(name) => write!(f, "*.{name}"),
            Self::Glob(LabelGlobs { below, labels }) => {
                if *below {
                    f.write_str("*.")?;
                }
                for (i, label) in labels.iter().enumerate() {
                    if i > 0 {
                        f.write_str(".")?;
                    }
                    // Entries admit only ASCII in such labels.
                    write!(f, "{}", label.escape_ascii())?;
                }
                Ok(())
            }
        }
    }
}

/// Whether the glob matches the label; `*` stands for any number of bytes.
///
/// Time is at most proportional to the product of both lengths: only the last `*` is ever tried again,
/// because a longer match of an earlier one would gain nothing.
fn matches(glob: &[u8], label: &[u8]) -> bool {
    let (mut g, mut l) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while l < label.len() {
        if glob.get(g) == Some(&b'*') {
            star = Some((g, l));
            g += 1;
        } else if glob.get(g) == Some(&label[l].to_ascii_lowercase()) {
            g += 1;
            l += 1;
        } else if let Some((at, taken)) = star {
            star = Some((at, taken + 1));
            g = at + 1;
            l = taken + 1;
        } else {
            return false;
        }
    }
    glob[g..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_labels(text.split('.').map(str::as_bytes)).unwrap()
    }

    fn globs(text: &str) -> NamePattern {
        let (below, rest) = match text.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        NamePattern::Glob(LabelGlobs::new(below, rest.split('.').map(str::as_bytes)))
    }

    #[test]
    fn a_subtree_has_one_or_more_labels_below_its_top() {
        let pattern = NamePattern::Below(name("example.com"));
        assert!(pattern.matches(&name("a.example.com")));
        assert!(pattern.matches(&name("a.b.EXAMPLE.com")));
        assert!(!pattern.matches(&name("example.com")));
        assert!(!pattern.matches(&name("evilexample.com")));
        assert!(!pattern.matches(&name("example.com.evil.io")));
    }

    #[test]
    fn a_dot_inside_a_label_does_not_separate_labels() {
        let evil = Name::from_labels([b"a.example".as_slice(), b"com"]).unwrap();
        assert!(!NamePattern::Below(name("example.com")).matches(&evil));
        assert!(!NamePattern::Exactly(name("a.example.com")).matches(&evil));
        assert!(!globs("*a.example.com").matches(&evil));
    }

    #[test]
    fn a_star_inside_a_label_stays_inside_it() {
        let pattern = globs("api-*.example.com");
        assert!(pattern.matches(&name("api-eu.example.com")));
        assert!(pattern.matches(&name("api-.example.com")));
        assert!(!pattern.matches(&name("api-eu.west.example.com")));
        assert!(!pattern.matches(&name("x.api-eu.example.com")));
        assert!(!pattern.matches(&name("api.example.com")));
        let several = globs("*.s3-*-x*.amazon*.com");
        assert!(several.matches(&name("b.a.s3-eu-x1.amazonaws.com")));
        assert!(!several.matches(&name("s3-eu-x1.amazonaws.com")));
    }

    #[test]
    fn a_star_as_a_label_stands_for_one_label() {
        let pattern = globs("s3.*.amazonaws.com");
        assert!(pattern.matches(&name("s3.eu-west-1.amazonaws.com")));
        assert!(!pattern.matches(&name("s3.amazonaws.com")));
        assert!(!pattern.matches(&name("s3.dualstack.eu-west-1.amazonaws.com")));
        assert!(!pattern.matches(&name("x.s3.eu-west-1.amazonaws.com")));
        let deeper = globs("*.*.example.com");
        assert!(deeper.matches(&name("a.b.example.com")));
        assert!(deeper.matches(&name("a.b.c.example.com")));
        assert!(!deeper.matches(&name("b.example.com")));
        assert!(pattern.covers(&NamePattern::Exactly(name("s3.x.amazonaws.com"))));
        assert!(pattern.covers(&globs("s3.eu-*.amazonaws.com")));
        assert!(!globs("s3.eu-*.amazonaws.com").covers(&pattern));
        assert!(NamePattern::Below(name("amazonaws.com")).covers(&pattern));
    }

    #[test]
    fn a_pattern_covers_another_only_if_it_matches_all_of_its_names() {
        let below = |text| NamePattern::Below(name(text));
        let exactly = |text| NamePattern::Exactly(name(text));
        assert!(below("example.com").covers(&exactly("a.example.com")));
        assert!(!below("example.com").covers(&exactly("example.com")));
        assert!(below("example.com").covers(&below("a.example.com")));
        assert!(below("example.com").covers(&below("example.com")));
        assert!(!below("a.example.com").covers(&below("example.com")));
        assert!(below("example.com").covers(&globs("api-*.example.com")));
        assert!(!below("example.com").covers(&globs("api-*.example*.com")));
        assert!(globs("api-*.example.com").covers(&globs("api-eu-*.example.com")));
        assert!(!globs("api-eu-*.example.com").covers(&globs("api-*.example.com")));
        assert!(!globs("a*.example.com").covers(&below("example.com")));
        assert!(globs("*.ex*.com").covers(&below("example.com")));
        assert!(globs("*.ex*.com").covers(&globs("*.exa*.com")));
        assert!(!exactly("a.example.com").covers(&below("example.com")));
    }

    /// The definition, without regard to time.
    fn matches_by_definition(glob: &[u8], label: &[u8]) -> bool {
        match glob.split_first() {
            None => label.is_empty(),
            Some((b'*', rest)) => {
                (0..=label.len()).any(|n| matches_by_definition(rest, &label[n..]))
            }
            Some((byte, rest)) => label
                .split_first()
                .is_some_and(|(first, tail)| first == byte && matches_by_definition(rest, tail)),
        }
    }

    proptest! {
        #[test]
        fn globs_match_according_to_their_definition(glob in "[ab*]{0,8}", label in "[ab]{0,10}") {
            prop_assert_eq!(
                matches(glob.as_bytes(), label.as_bytes()),
                matches_by_definition(glob.as_bytes(), label.as_bytes())
            );
        }

        #[test]
        fn a_covering_pattern_matches_every_name_of_the_covered_one(
            outer in "(\\*\\.)?[ab*]{0,2}a[ab*]{0,2}\\.b",
            inner in "(\\*\\.)?[ab*]{0,2}a[ab*]{0,2}\\.b",
            other in "([ab]{1,2}\\.){0,2}[ab]{1,4}\\.b",
        ) {
            if globs(&outer).covers(&globs(&inner)) && globs(&inner).matches(&name(&other)) {
                prop_assert!(globs(&outer).matches(&name(&other)));
            }
        }
    }

    #[test]
    fn many_stars_do_not_take_exponential_time() {
        let glob = [b"a*".repeat(31), b"b".to_vec()].concat();
        let label = [b'a'; 63];
        assert!(!matches(&glob, &label));
    }
}
