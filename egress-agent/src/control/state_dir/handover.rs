//! The queries that pods have open when an agent ends, in a file for the next agent. Their responses are on the way,
//! and the gate does not deliver a response to no open query.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::control::state_dir::file as state_file;
use crate::{config::Config, datapath::boottime_ns, gate::OpenQuestion};

/// The file in `stateDir`.
const FILE: &str = "questions.json";
/// Raised whenever an older agent would misread the file.
const VERSION: u32 = 1;
/// How long after the earlier agent's end its queries are of use: stub resolvers ask again after five seconds.
const OF_USE_NS: u64 = 5_000_000_000;

#[derive(Debug, Serialize, Deserialize)]
struct Document {
    version: u32,
    /// The node's name.
    node: String,
    /// When it was written, of `CLOCK_BOOTTIME`.
    written_ns: u64,
    questions: Vec<OpenQuestion>,
}

fn path(config: &Config) -> PathBuf {
    config.state_dir.join(FILE)
}

/// Takes the open queries that an agent left which has just ended.
pub(in crate::control) fn take(config: &Config) -> Vec<OpenQuestion> {
    let path = path(config);
    let taken = state_file::read::<Document>(&path)
        .and_then(|document| state_file::remove(&path).map(|()| document));
    let document = match taken {
        Ok(document) => document,
        Err(error) => {
            tracing::warn!(
                error = %format!("{error:#}"),
                "cannot read the open queries that an earlier agent left; pods ask again"
            );
            None
        }
    };
    let now_ns = boottime_ns();
    document
        .filter(|document| {
            document.version == VERSION
                && document.node == config.node
                // A time in the future is from before a reboot.
                && now_ns.checked_sub(document.written_ns).is_some_and(|ago| ago < OF_USE_NS)
        })
        .map(|document| document.questions)
        .unwrap_or_default()
}

/// Writes the open queries for the next agent.
pub(in crate::control) fn leave(config: &Config, questions: Vec<OpenQuestion>) {
    if questions.is_empty() {
        return;
    }
    let document = Document {
        version: VERSION,
        node: config.node.clone(),
        written_ns: boottime_ns(),
        questions,
    };
    if let Err(error) = state_file::write(&path(config), &document) {
        tracing::warn!(
            error = %format!("{error:#}"),
            "cannot write the open queries for the next agent; pods ask again"
        );
    }
}
