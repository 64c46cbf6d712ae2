//! The agent's pods: arguments, configuration, updates, probes, mounts and privileges.

use std::path::Path;

use clap::Parser as _;
use egress_agent::cli::Cli;
use egress_policy::{Mode, PodAnnotations};
use egress_tests::yaml;
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Container, PodSpec},
};
use serde_json::Value;

use super::{KUSTOMIZATIONS, agent, configuration, pod_spec, the};

#[test]
fn the_agent_accepts_every_configuration() {
    let base = configuration(&yaml::kustomized("base"));
    assert_eq!(base.default_mode, Mode::Off);
    assert_eq!(base.pod_annotations, PodAnnotations::Grant);
    let audit = configuration(&yaml::kustomized("overlays/audit"));
    assert_eq!(audit.default_mode, Mode::Audit);
    assert!(!audit.quarantine.enabled);
    let locked = configuration(&yaml::kustomized("overlays/locked-down"));
    assert_eq!(locked.default_mode, Mode::Enforce);
    assert_eq!(locked.pod_annotations, PodAnnotations::Narrow);
    assert!(locked.quarantine.enabled);
}

#[test]
fn the_agent_accepts_its_arguments() {
    for kustomization in ["base", "cleanup"] {
        let spec = pod_spec(&yaml::kustomized(kustomization));
        let containers = spec
            .init_containers
            .iter()
            .flatten()
            .chain(&spec.containers);
        for container in containers {
            let args = container.args.iter().flatten().map(String::as_str);
            let words = ["egress-agent"].into_iter().chain(args);
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{kustomization}: {error}");
            }
        }
    }
}

/// The start gate's container, which the components add to the pods of a `DaemonSet`.
#[test]
fn the_start_gate_accepts_its_arguments_and_has_its_directories() {
    for component in ["start-gate", "start-gate-cleanup"] {
        let file = format!("components/{component}/kustomization.yaml");
        let [kustomization] = &yaml::objects(&file)[..] else {
            panic!("not one kustomization");
        };
        let text = kustomization["patches"][0]["patch"].as_str();
        let patch: Value = serde_saphyr::from_str(text.expect("a patch")).expect("YAML");
        let target = &kustomization["patches"][0]["target"]["name"];
        assert_eq!(&patch["metadata"]["name"], target);
        let spec: PodSpec =
            serde_json::from_value(patch["spec"]["template"]["spec"].clone()).expect("a pod");
        let containers = spec.init_containers.iter().flatten();
        let containers: Vec<&Container> = containers.chain(&spec.containers).collect();
        let [gate] = containers[..] else {
            panic!("not one container");
        };
        let args = gate.args.iter().flatten().map(String::as_str);
        let words = ["egress-agent"].into_iter().chain(args);
        assert!(Cli::try_parse_from(words).is_ok(), "{component}");
        let security = gate.security_context.as_ref().expect("a security context");
        let capabilities = security.capabilities.as_ref().expect("capabilities");
        assert_eq!(capabilities.add, None, "the gate needs no capabilities");
        let paths: Vec<&str> = gate
            .volume_mounts
            .iter()
            .flatten()
            .map(|mount| mount.mount_path.as_str())
            .collect();
        for path in ["/etc/cni/net.d", "/etc/tmpfiles.d"] {
            assert!(paths.contains(&path), "{component}: {path}");
            let on_node = spec.volumes.iter().flatten().any(|volume| {
                let host = volume.host_path.as_ref();
                host.is_some_and(|host| host.path == path)
            });
            // The rule names the same path on the node.
            assert!(on_node, "{component}: {path}");
        }
    }
}

/// A rolling update or an eviction must not end enforcement.
#[test]
fn a_replaced_agent_pod_leaves_its_node_enforced() {
    let spec = pod_spec(&yaml::kustomized("base"));
    let args = agent(&spec).args.clone().expect("arguments");
    assert!(args.contains(&"--keep-enforcing".to_owned()));
}

/// Only one pod of a node can have a port of the host's network. With such a port the new agent would wait
/// for the old one's end.
#[test]
fn an_update_starts_the_new_agent_before_it_ends_the_old_one() {
    let objects = yaml::kustomized("base");
    let daemon_set: DaemonSet = the(&objects, "DaemonSet");
    let update = daemon_set.spec.and_then(|spec| spec.update_strategy);
    let update = update
        .and_then(|update| update.rolling_update)
        .expect("an update");
    let surge = serde_json::to_value(&update).expect("an update");
    assert_eq!(
        surge,
        serde_json::json!({ "maxSurge": 1, "maxUnavailable": 0 })
    );
    let spec = pod_spec(&objects);
    let args = agent(&spec).args.clone().expect("arguments");
    assert!(args.contains(&"--take-over".to_owned()));
    assert!(
        spec.containers
            .iter()
            .all(|container| container.ports.is_none())
    );
}

#[test]
fn probes_use_the_port_on_which_the_agent_listens() {
    for kustomization in KUSTOMIZATIONS.iter().filter(|path| **path != "cleanup") {
        let objects = yaml::kustomized(kustomization);
        let http = configuration(&objects).serve.http.expect("http");
        let spec = pod_spec(&objects);
        let agent = agent(&spec);
        for probe in [&agent.startup_probe, &agent.liveness_probe] {
            let get = probe
                .as_ref()
                .and_then(|probe| probe.http_get.as_ref())
                .expect("a probe");
            assert_eq!(get.path.as_deref(), Some("/healthz"));
            assert_eq!(get.host.as_deref(), Some(http.ip().to_string().as_str()));
            let port = serde_json::to_value(&get.port).expect("a port");
            assert_eq!(port, http.port(), "{kustomization}");
        }
        // A standby agent has the socket, but not the port.
        let readiness = agent.readiness_probe.as_ref().expect("a probe");
        let command = readiness
            .exec
            .as_ref()
            .and_then(|exec| exec.command.clone());
        assert_eq!(command.expect("a command"), ["egress-agent", "ready"]);
    }
}

/// All paths in the configuration exist, and the agent's files outlive the pod where they must.
#[test]
fn every_path_of_the_configuration_is_mounted() {
    for kustomization in KUSTOMIZATIONS.iter().filter(|path| **path != "cleanup") {
        let objects = yaml::kustomized(kustomization);
        let config = configuration(&objects);
        let spec = pod_spec(&objects);
        let agent = agent(&spec);
        let mounts = agent.volume_mounts.as_deref().expect("mounts");
        let mount_of = |path: &Path| {
            mounts
                .iter()
                .filter(|mount| path.starts_with(&mount.mount_path))
                .max_by_key(|mount| mount.mount_path.len())
        };
        for (path, written) in [
            (config.bpffs.as_path(), true),
            (config.serve.socket.as_path(), true),
            (Path::new("/sys/fs/cgroup"), false),
            (Path::new("/etc/egress-agent/config.yaml"), false),
        ] {
            let mount =
                mount_of(path).unwrap_or_else(|| panic!("{} is not mounted", path.display()));
            assert_eq!(mount.read_only != Some(true), written, "{}", path.display());
            let volumes = spec.volumes.as_deref().expect("volumes");
            assert!(
                volumes.iter().any(|volume| volume.name == mount.name),
                "{}",
                mount.name
            );
        }
        // Through the root directory of process 1, so the pod needs the host's PID namespace.
        assert!(config.cluster.kubelet_config.starts_with("/proc/1/root"));
        assert_eq!(spec.host_pid, Some(true));
    }
}

#[test]
fn the_agent_is_not_privileged_and_its_root_file_system_is_read_only() {
    for kustomization in KUSTOMIZATIONS {
        let spec = pod_spec(&yaml::kustomized(kustomization));
        for container in spec
            .init_containers
            .iter()
            .flatten()
            .chain(&spec.containers)
        {
            let context = container
                .security_context
                .as_ref()
                .expect("a security context");
            assert_eq!(context.privileged, Some(false));
            assert_eq!(context.allow_privilege_escalation, Some(false));
            assert_eq!(context.read_only_root_filesystem, Some(true));
            let capabilities = context.capabilities.as_ref().expect("capabilities");
            assert_eq!(capabilities.drop, Some(vec!["ALL".to_owned()]));
            assert!(
                container
                    .resources
                    .as_ref()
                    .is_some_and(|resources| resources.requests.is_some())
            );
        }
    }
}
