//! `cargo xtask e2e`: the image, the manifests and the agent in a real cluster, on this machine.
//!
//! tests/e2e/node creates the cluster and removes it; this module provides what that needs.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::leftovers::Inventory;
use crate::setup::{self, Program, Purpose, kubernetes};
use crate::{image, process, workspace};

/// The oldest version of Kubernetes that knows every field of the manifests.
const FOR_ALL_OF_THE_MANIFESTS: (u32, u32) = (1, 30);

/// The programs that this command needs besides those of the others.
const PROGRAMS: [Program; 7] = [
    Program {
        name: "containerd",
        packages: &["containerd"],
        purpose: "the node's container runtime",
        needed_for: Purpose::E2e,
        services: &["containerd.service"],
    },
    Program {
        name: "runc",
        packages: &["runc"],
        purpose: "the program with which containerd starts containers",
        needed_for: Purpose::E2e,
        services: &[],
    },
    Program {
        // Not in any PATH.
        name: "/usr/lib/cni/bridge",
        packages: &["containernetworking-plugins"],
        purpose: "the node's network of pods",
        needed_for: Purpose::E2e,
        services: &[],
    },
    Program {
        name: "kubectl",
        packages: &["kubectl", "kubernetes-client"],
        purpose: "applying the manifests",
        needed_for: Purpose::E2e,
        services: &[],
    },
    Program {
        name: "busybox",
        packages: &["busybox-static"],
        purpose: "the pods' programs",
        needed_for: Purpose::E2e,
        services: &[],
    },
    Program {
        name: "unshare",
        packages: &["util-linux"],
        purpose: "keeping the node's processes apart",
        needed_for: Purpose::E2e,
        services: &[],
    },
    Program {
        name: "systemd-tmpfiles",
        packages: &["systemd-standalone-tmpfiles", "systemd"],
        purpose: "the rule that closes the start gate when the node boots",
        needed_for: Purpose::E2e,
        services: &[],
    },
];

/// Checks the agent in a cluster of one node on this machine, from its image and its manifests on.
///
/// API server, controllers, scheduler and kubelet are built from Debian's sources when they are missing
/// (some minutes, once), containerd and the network plugins are Debian's. `KUBERNETES_PROGRAMS` names a
/// directory with those four of another version. The node lives in namespaces of its own and is gone at the end. Takes
/// some minutes when everything is built, and needs root. Not part of
/// `cargo xtask test`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Copies the logs of the node's programs there at the end
    #[arg(long, value_name = "DIRECTORY")]
    logs: Option<PathBuf>,
    /// What to run in place of the checks, with KUBECONFIG set: `-- bash` to look around
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    setup::ensure(Purpose::Test)?;
    setup::programs(&PROGRAMS)?;
    let kubernetes = kubernetes::ensure_node()?;
    let archive = workspace::target().join("e2e.oci.tar");
    image::write(&archive)?;

    let before = Inventory::take()?;
    let scripts = workspace::root().join("tests/e2e");
    let mut node = process::as_root(&scripts.join("node").to_string_lossy())?;
    node.arg("--programs").arg(&kubernetes.programs);
    node.arg("--archive").arg(&archive);
    if let Some(logs) = &options.logs {
        std::fs::create_dir_all(logs).with_context(|| format!("cannot make {}", logs.display()))?;
        node.arg("--keep-logs").arg(logs);
    }
    if options.command.is_empty() {
        node.arg(scripts.join("run"));
        node.args(["--overlays", "--network-policy-api"]);
        node.args(["--reboot", "\"$NODE\" --reboot"]);
        if kubernetes.version < FOR_ALL_OF_THE_MANIFESTS {
            // The API server leaves out fields that it does not know.
            node.arg("--no-validation");
        }
    } else {
        node.args(&options.command);
    }
    process::run(&mut node)?;
    before.compare()
}
