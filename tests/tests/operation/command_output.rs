//! The output of a command of the agent that reads files and ends.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use egress_tests::Agent;
use serde_json::Value;

/// The program's exit status, standard output and standard error.
pub(crate) struct CommandOutput {
    pub(crate) code: Option<i32>,
    pub(crate) output: String,
    pub(crate) errors: String,
}

impl CommandOutput {
    /// Runs a command of the agent in this directory, with this standard input.
    #[track_caller]
    pub(crate) fn of(command: &str, directory: &Path, arguments: &[&str], input: &str) -> Self {
        let mut child = Command::new(Agent::program())
            .arg(command)
            .args(arguments)
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the agent's program runs");
        let mut stdin = child.stdin.take().expect("it is a pipe");
        // A program that fails early does not read all of it.
        _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        let output = child.wait_with_output().expect("the program ends");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the output is UTF-8");
        Self {
            code: output.status.code(),
            output: text(output.stdout),
            errors: text(output.stderr),
        }
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.output)
            .unwrap_or_else(|error| panic!("{error}: {} {}", self.output, self.errors))
    }

    #[track_caller]
    pub(crate) fn has(&self, text: &str) {
        assert!(
            self.output.contains(text),
            "{text:?} is missing:\n{}\n{}",
            self.output,
            self.errors
        );
    }
}
