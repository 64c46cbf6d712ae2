//! Programs that see files of the pod, as a container runtime provides them.

use std::{
    fs,
    process::{Command, Output},
};

use crate::{Lab, Pod};

impl Lab {
    /// Runs a program, with its arguments and environment, in the pod's network and in a mount namespace of
    /// its own, with this text as `/etc/resolv.conf`. Waits for its end.
    #[track_caller]
    pub fn run_in(&self, pod: &Pod, resolv_conf: &str, program: &Command) -> Output {
        let settings = self.directory().join(format!("resolv-{}.conf", pod.name()));
        fs::write(&settings, resolv_conf).expect("write resolv.conf");
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c"])
            .arg("mount --bind \"$1\" /etc/resolv.conf && shift && exec \"$@\"")
            .arg("sh")
            .arg(&settings)
            .arg(program.get_program())
            .args(program.get_args());
        for (name, value) in program.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        pod.netns()
            .run(|| command.output())
            .expect("unshare, of the package util-linux")
    }
}
