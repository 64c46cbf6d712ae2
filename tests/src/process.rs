//! A program in a namespace.

use std::process::{Child, Command, Stdio};

use crate::Namespace;

/// A program that runs in a namespace and is killed when this is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
}

impl Running {
    /// Starts the command in `namespace`.
    #[track_caller]
    pub(crate) fn start(namespace: &Namespace, command: &mut Command) -> Self {
        command.stdin(Stdio::null());
        // A child inherits the namespaces of the thread that started it.
        let spawned = namespace.run(|| command.spawn());
        Self {
            child: spawned
                .unwrap_or_else(|e| panic!("start {}: {e}", command.get_program().display())),
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Kills it and waits for its end.
    pub(crate) fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The exit status, if the process has ended.
    pub fn ended(&mut self) -> Option<String> {
        self.child
            .try_wait()
            .expect("wait(2) for a child")
            .map(|status| status.to_string())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}
