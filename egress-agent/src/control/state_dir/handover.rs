//! The questions that pods have open when an agent ends, in a file for the next agent: their answers are on the way,
//! and an answer to no open question is not delivered.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::control::state_dir::file as state_file;
use crate::{config::Config, datapath::boottime_ns, gate::OpenQuestion};

/// The file in `stateDir`.
const FILE: &str = "questions.json";
/// Raised whenever an older agent would read the file in another sense.
const VERSION: u32 = 1;
/// How long after the earlier agent's end its questions are of use: stub resolvers ask again after five seconds.
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

/// Takes what an agent that has just ended left, if one did.
pub(in crate::control) fn take(config: &Config) -> Vec<OpenQuestion> {
    let path = path(config);
    let taken = state_file::read::<Document>(&path)
        .and_then(|document| state_file::remove(&path).map(|()| document));
    let document = match taken {
        Ok(document) => document,
        Err(error) => {
            tracing::warn!(
                error = %format!("{error:#}"),
                "the questions that pods had open cannot be taken over; they ask again"
            );
            None
        }
    };
    let now_ns = boottime_ns();
    document
        .filter(|document| {
            document.version == VERSION
                && document.node == config.node
                // A later time is from before a reboot.
                && now_ns.checked_sub(document.written_ns).is_some_and(|ago| ago < OF_USE_NS)
        })
        .map(|document| document.questions)
        .unwrap_or_default()
}

/// Leaves the open questions to the next agent.
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
            "the questions that pods have open cannot be left to the next agent; they ask again"
        );
    }
}
