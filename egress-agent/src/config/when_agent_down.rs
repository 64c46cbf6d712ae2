//! How DNS is treated while no agent runs: `whenAgentDown`.

use std::time::Duration;

use serde::{Deserialize, Deserializer};

use super::{
    read::{self, Word},
    written::value,
};

/// How DNS is treated while no agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct WhenAgentDown {
    /// How long names resolve that the agent has decided (not with `dns.learn: agent`).
    #[serde(deserialize_with = "duration")]
    pub resolve_for: Duration,
    /// How all other DNS messages are treated.
    #[serde(deserialize_with = "read::word")]
    pub undecided: Undecided,
}

/// How DNS messages are treated that the agent would have to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undecided {
    /// They are dropped, unless an agent comes back before their senders have given up.
    Hold,
    /// They pass unread. Nothing is learned from them.
    Deliver,
}

impl Word for Undecided {
    const WORDS: &'static [(&'static str, Self)] =
        &[("hold", Self::Hold), ("deliver", Self::Deliver)];
}

impl Default for WhenAgentDown {
    fn default() -> Self {
        Self {
            resolve_for: Duration::from_secs(24 * 3600),
            undecided: Undecided::Hold,
        }
    }
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    value(deserializer, read::duration)
}
