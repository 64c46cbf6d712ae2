//! Programs that see the pod's own files: what a container runtime would give them.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use crate::{Lab, Pod};

impl Lab {
    /// Runs a program to its end in the pod's network, with this text as its `/etc/resolv.conf`,
    /// in a mount namespace of its own.
    #[track_caller]
    pub fn run_in(
        &self,
        pod: &Pod,
        resolv_conf: &str,
        program: &Path,
        arguments: &[&str],
    ) -> Output {
        let settings = self.directory().join(format!("resolv-{}.conf", pod.name()));
        fs::write(&settings, resolv_conf).expect("write resolv.conf");
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c"])
            .arg("mount --bind \"$1\" /etc/resolv.conf && shift && exec \"$@\"")
            .arg("sh")
            .arg(&settings)
            .arg(program)
            .args(arguments);
        pod.netns()
            .run(|| command.output())
            .expect("unshare, of the package util-linux")
    }
}
