//! After a boot no pod gets a network before the agent is ready.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use egress_tests::{Agent, Lab, Running, SHORT, addresses::server, eventually, holds};
use serde_json::Value;

/// The relevant directories of a node.
struct Node {
    root: tempfile::TempDir,
    lab: Lab,
}

impl Node {
    #[track_caller]
    fn new() -> Self {
        let lab = Lab::new();
        let root = tempfile::tempdir().expect("a directory");
        let node = Self { root, lab };
        fs::create_dir_all(node.cni()).expect("a directory");
        let network = r#"{"cniVersion":"0.4.0","name":"pods","plugins":[{"type":"bridge"}]}"#;
        fs::write(node.cni().join("10-pods.conflist"), network).expect("write a file");
        node
    }

    fn cni(&self) -> PathBuf {
        self.root.path().join("etc/cni/net.d")
    }

    fn tmpfiles(&self) -> PathBuf {
        self.root.path().join("etc/tmpfiles.d")
    }

    fn gate_command(&self) -> Command {
        let mut command = Command::new(Agent::program());
        command.arg("start-gate").arg("--cni-dir").arg(self.cni());
        command.arg("--tmpfiles-dir").arg(self.tmpfiles());
        command.arg("--socket").arg(self.lab.socket());
        command
    }

    /// Creates the files that systemd creates at boot, before it starts any service.
    #[track_caller]
    fn boot(&self) {
        self.apply(&["--boot"]);
    }

    /// Applies the rules of tmpfiles.d.
    #[track_caller]
    fn apply(&self, arguments: &[&str]) {
        for rule in fs::read_dir(self.tmpfiles()).expect("rules").flatten() {
            let output = Command::new("systemd-tmpfiles")
                .arg("--create")
                .args(arguments)
                .arg(rule.path())
                .output();
            let output = output.expect("systemd-tmpfiles, of the package systemd");
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && text.is_empty(), "{text}");
        }
    }

    /// The plugins of the network that a container runtime would use: those of the file that is first in
    /// alphabetical order.
    #[track_caller]
    fn plugins(&self) -> Vec<String> {
        let entries = fs::read_dir(self.cni()).expect("the directory").flatten();
        let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        files.sort();
        let first = fs::read(&files[0]).expect("the first file");
        let network: Value = serde_json::from_slice(&first).expect("JSON");
        let plugins = network["plugins"].as_array().expect("plugins");
        plugins
            .iter()
            .map(|plugin| plugin["type"].as_str().expect("a type").to_owned())
            .collect()
    }

    fn is_closed(&self) -> bool {
        self.plugins() == ["egress-agent-is-not-ready"]
    }

    /// Runs the gate's program until the result is dropped.
    #[track_caller]
    fn gate(&self) -> Running {
        let gate = self.lab.run_on_node(&mut self.gate_command());
        eventually("there is a rule", || holds(has_files(&self.tmpfiles())));
        gate
    }
}

fn has_files(directory: &Path) -> bool {
    let mut names = fs::read_dir(directory).into_iter().flatten().flatten();
    names.any(|entry| entry.path().extension().is_some_and(|end| end == "conf"))
}

#[test]
fn after_a_boot_no_network_is_made_until_the_agent_knows_its_pods() {
    let node = Node::new();
    let (_web, cart) = node.lab.shop_and_cart("shop.test:443");
    let gate = node.gate();
    assert_eq!(
        node.plugins(),
        ["bridge"],
        "the installation closed the node"
    );

    drop(gate);
    node.boot();
    assert!(node.is_closed());
    let _gate = node.gate();
    // The agent starts late.
    std::thread::sleep(SHORT);
    assert!(node.is_closed(), "it was opened without an agent");

    // An unreadable file could be the manifest of any pod.
    node.lab.write_file("unreadable.yaml", b"{{{ not YAML");
    let agent = node.lab.start_agent(&[&cart]);
    std::thread::sleep(SHORT);
    assert!(
        node.is_closed(),
        "it was opened although pods may be missing"
    );

    node.lab.remove_file("unreadable.yaml");
    eventually("the gate is opened", || holds(!node.is_closed()));
    assert_eq!(node.plugins(), ["bridge"]);
    assert!(cart.connect_tcp((server(99), 443), SHORT).is_err());
    drop(agent);
}

#[test]
fn applying_the_rules_on_a_running_node_closes_nothing() {
    let node = Node::new();
    let _gate = node.gate();
    node.apply(&[]);
    assert!(!node.is_closed());
}

#[test]
fn a_removed_gate_is_open_and_stays_open() {
    let node = Node::new();
    drop(node.gate());
    node.boot();
    assert!(node.is_closed());
    let mut command = node.gate_command();
    command.arg("--remove");
    let removed = node.lab.node().run(|| command.output()).expect("it runs");
    assert!(removed.status.success(), "{removed:?}");
    assert!(!node.is_closed());
    assert!(!has_files(&node.tmpfiles()));
}

#[test]
fn a_rule_that_cannot_be_written_is_an_error_with_its_path() {
    let node = Node::new();
    fs::write(node.tmpfiles(), "in the way").expect("write a file");
    let mut command = node.gate_command();
    let output = node.lab.node().run(|| command.output()).expect("it runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(
        text.contains("egress-agent-start-gate.conf") && text.contains("do not wait"),
        "{text}"
    );
}
