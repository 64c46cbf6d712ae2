//! Remarks for the reader of the written objects.

use std::fmt;

/// How a remark concerns the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// A difference in meaning. No destination is lost.
    Note,
    /// Something that the original allows is not allowed.
    LeftOut,
    /// Something that restricts the original could not be written.
    Refused,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Note => "note",
            Self::LeftOut => "left out",
            Self::Refused => "refused",
        })
    }
}

/// One remark.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Remark {
    pub(crate) severity: Severity,
    pub(crate) text: String,
}

impl Remark {
    pub(crate) fn note(text: impl Into<String>) -> Self {
        Self {
            severity: Severity::Note,
            text: text.into(),
        }
    }

    pub(crate) fn left_out(text: impl Into<String>) -> Self {
        Self {
            severity: Severity::LeftOut,
            text: text.into(),
        }
    }

    pub(crate) fn refused(text: impl Into<String>) -> Self {
        Self {
            severity: Severity::Refused,
            text: text.into(),
        }
    }
}

/// Adds a remark unless it is there already.
pub(crate) fn add(remarks: &mut Vec<Remark>, remark: Remark) {
    if !remarks.contains(&remark) {
        remarks.push(remark);
    }
}
