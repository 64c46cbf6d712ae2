//! The manifests mean the same to the API server, to the agent and to each other.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use clap::Parser as _;
use egress_agent::{
    cli::Cli,
    config::Config,
    pods::cluster::{ACCESS, Within},
};
use egress_policy::{self as policy, Annotations, Mode, PodAnnotations};
use egress_tests::yaml::{self, identity};
use k8s_openapi::api::{
    admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding},
    apps::v1::{DaemonSet, Deployment},
    core::v1::{ConfigMap, Container, Namespace, Pod, PodSpec, ResourceQuota, ServiceAccount},
    rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

/// Every directory for `kubectl apply -k`.
const KUSTOMIZATIONS: [&str; 5] = [
    ".",
    "base",
    "overlays/audit",
    "overlays/locked-down",
    "cleanup",
];

/// Parses the object as its type and serialises it again: a field that the type does not have is lost.
fn check<T: DeserializeOwned + Serialize>(object: &Value) -> Result<(), String> {
    let typed: T = serde_json::from_value(object.clone()).map_err(|error| error.to_string())?;
    let back = serde_json::to_value(typed).map_err(|error| error.to_string())?;
    if back == *object {
        Ok(())
    } else {
        Err(format!(
            "is not the same when read and written:\n{object:#}\n{back:#}"
        ))
    }
}

fn check_typed(object: &Value) -> Result<(), String> {
    let text = |key: &str| object[key].as_str().unwrap_or_default().to_owned();
    match (text("apiVersion").as_str(), text("kind").as_str()) {
        ("v1", "Namespace") => check::<Namespace>(object),
        ("v1", "ResourceQuota") => check::<ResourceQuota>(object),
        ("v1", "ServiceAccount") => check::<ServiceAccount>(object),
        ("v1", "ConfigMap") => check::<ConfigMap>(object),
        ("v1", "Pod") => check::<Pod>(object),
        ("apps/v1", "DaemonSet") => check::<DaemonSet>(object),
        ("apps/v1", "Deployment") => check::<Deployment>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRole") => check::<ClusterRole>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => {
            check::<ClusterRoleBinding>(object)
        }
        ("rbac.authorization.k8s.io/v1", "Role") => check::<Role>(object),
        ("rbac.authorization.k8s.io/v1", "RoleBinding") => check::<RoleBinding>(object),
        ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy") => {
            check::<ValidatingAdmissionPolicy>(object)
        }
        ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicyBinding") => {
            check::<ValidatingAdmissionPolicyBinding>(object)
        }
        ("apiextensions.k8s.io/v1", "CustomResourceDefinition") => {
            check::<CustomResourceDefinition>(object)
        }
        ("monitoring.coreos.com/v1", "PodMonitor") => {
            check_keys(&object["spec"], &["selector", "podMetricsEndpoints"])
        }
        ("monitoring.coreos.com/v1", "PrometheusRule") => {
            for group in list(&object["spec"]["groups"]) {
                check_keys(group, &["name", "rules"])?;
                for rule in list(&group["rules"]) {
                    check_keys(rule, &["alert", "expr", "for", "labels", "annotations"])?;
                }
            }
            check_keys(&object["spec"], &["groups"])
        }
        (version, kind) => Err(format!("{version} {kind} is not known here")),
    }
}

fn check_keys(object: &Value, keys: &[&str]) -> Result<(), String> {
    let found: BTreeSet<&str> = object
        .as_object()
        .ok_or("not a mapping")?
        .keys()
        .map(String::as_str)
        .collect();
    if found == keys.iter().copied().collect() {
        Ok(())
    } else {
        Err(format!("has {found:?}: expected {keys:?}"))
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn the<T: DeserializeOwned>(objects: &[Value], kind: &str) -> T {
    let [object] = objects
        .iter()
        .filter(|object| object["kind"] == kind)
        .collect::<Vec<_>>()[..]
    else {
        panic!("not one {kind}");
    };
    serde_json::from_value(object.clone()).expect(kind)
}

fn configuration(objects: &[Value]) -> Config {
    let map: ConfigMap = the(objects, "ConfigMap");
    let data = map.data.expect("data");
    let text = data.get("config.yaml").expect("config.yaml");
    Config::from_yaml(text).unwrap_or_else(|error| panic!("{error}"))
}

fn pod_spec(objects: &[Value]) -> PodSpec {
    let daemon_set: DaemonSet = the(objects, "DaemonSet");
    daemon_set
        .spec
        .and_then(|spec| spec.template.spec)
        .expect("a pod spec")
}

fn agent(spec: &PodSpec) -> &Container {
    let [agent] = spec.containers.as_slice() else {
        panic!("not one container");
    };
    agent
}

#[test]
fn every_field_of_every_object_is_known_to_the_api_server() {
    for file in yaml::files() {
        // kubectl reads the kustomizations; the agent reads examples/pods and its own configuration.
        if file.ends_with("kustomization.yaml") || file == "examples/egress-agent.yaml" {
            continue;
        }
        for object in yaml::objects(&file) {
            check_typed(&object)
                .unwrap_or_else(|error| panic!("{file}: {:?} {error}", identity(&object)));
        }
    }
}

#[test]
fn a_misspelled_field_is_detected() {
    let mut objects = yaml::objects("base/daemonset.yaml");
    objects[0]["spec"]["template"]["spec"]["hostPid"] = true.into();
    assert!(check_typed(&objects[0]).is_err());
}

#[test]
fn every_file_is_in_a_kustomization_or_an_example() {
    for file in yaml::files() {
        let Some((directory, name)) = file.rsplit_once('/') else {
            continue;
        };
        if directory.starts_with("examples") || name == "kustomization.yaml" {
            continue;
        }
        let [kustomization] = &yaml::objects(&format!("{directory}/kustomization.yaml"))[..] else {
            panic!("{directory}: not one kustomization");
        };
        let named = list(&kustomization["resources"])
            .iter()
            .any(|entry| entry == name)
            || list(&kustomization["patches"])
                .iter()
                .any(|patch| patch["path"] == name);
        assert!(named, "{file}");
    }
}

#[test]
fn the_flat_file_is_the_base() {
    assert_eq!(yaml::objects("egress-agent.yaml"), yaml::kustomized("base"));
    assert_eq!(yaml::kustomized("."), yaml::kustomized("base"));
}

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

/// One right of the agent, from a `ClusterRole` or a `Role`.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    /// The namespace; empty for the whole cluster.
    within: String,
    group: String,
    resource: String,
    names: Vec<String>,
    verbs: Vec<String>,
}

#[test]
fn the_agents_rights_are_exactly_those_it_uses() {
    let mut granted = BTreeSet::new();
    let objects = yaml::kustomized("base");
    for object in objects.iter().filter(|object| !object["rules"].is_null()) {
        for rule in list(&object["rules"]) {
            let strings = |key: &str| -> Vec<String> {
                list(&rule[key])
                    .iter()
                    .map(|text| text.as_str().expect("a text").to_owned())
                    .collect()
            };
            for group in strings("apiGroups") {
                for resource in strings("resources") {
                    granted.insert(Right {
                        within: identity(object).1,
                        group: group.clone(),
                        resource,
                        names: strings("resourceNames"),
                        verbs: strings("verbs"),
                    });
                }
            }
        }
    }
    assert_eq!(granted, used());

    // Each role is bound to the agent alone.
    for role in objects.iter().filter(|object| !object["rules"].is_null()) {
        let kind = role["kind"].as_str().expect("a kind");
        let binding = objects
            .iter()
            .find(|object| {
                object["kind"] == format!("{kind}Binding")
                    && object["roleRef"]["name"] == role["metadata"]["name"]
                    && object["metadata"]["namespace"] == role["metadata"]["namespace"]
            })
            .unwrap_or_else(|| panic!("{:?} is not bound", identity(role)));
        assert_eq!(binding["roleRef"]["kind"], kind);
        let [subject] = list(&binding["subjects"]) else {
            panic!("not one subject");
        };
        assert_eq!(identity(&objects[0]).2, "egress-agent");
        assert_eq!(
            (&subject["kind"], &subject["name"], &subject["namespace"]),
            (
                &"ServiceAccount".into(),
                &"egress-agent".into(),
                &"egress-agent".into()
            )
        );
    }
}

/// The rights that the agent's requests need.
fn used() -> BTreeSet<Right> {
    let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    ACCESS
        .iter()
        .map(|access| Right {
            within: match access.within {
                Within::Cluster => String::new(),
                Within::DnsNamespace => "kube-system".to_owned(),
                Within::Default => "default".to_owned(),
            },
            group: access.group.to_owned(),
            resource: access.resource.to_owned(),
            names: owned(access.names),
            verbs: owned(access.verbs),
        })
        .collect()
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

#[test]
fn the_annotations_of_the_examples_are_valid_and_cause_no_warning() {
    let settings = Config::default_config()
        .expect("defaults")
        .policy_settings();
    let mut read = 0;
    let files = ["cluster/shop.yaml", "pods/shop.yaml", "pods/others.yaml"];
    let objects = files.map(|file| yaml::objects(&format!("examples/{file}")));
    for object in objects.iter().flatten() {
        for metadata in [&object["metadata"], &object["spec"]["template"]["metadata"]] {
            let Ok(annotations) = serde_json::from_value(metadata["annotations"].clone()) else {
                continue;
            };
            let own = Annotations::from_map(&annotations);
            let text = policy::describe("x", &own, &Annotations::default(), &settings)
                .unwrap_or_else(|error| panic!("{error}"));
            assert!(!text.contains("warning:"), "{text}");
            read += 1;
        }
    }
    assert_eq!(read, 7);
}

/// The files that `tests/e2e/run` applies, relative to the manifests.
const END_TO_END: [&str; 3] = ["namespaces.yaml", "pods.yaml", "unreadable.yaml"];

#[test]
fn the_pods_of_the_end_to_end_checks_are_valid_for_the_api_server_and_the_agent() {
    let settings = Config::default_config()
        .expect("defaults")
        .policy_settings();
    let mut unreadable = Vec::new();
    for file in END_TO_END {
        for object in yaml::objects(&format!("../tests/e2e/{file}")) {
            check_typed(&object).unwrap_or_else(|error| panic!("{file}: {error}"));
            let (_, _, name) = identity(&object);
            let annotations = &object["metadata"]["annotations"];
            let annotations: BTreeMap<String, String> =
                serde_json::from_value(annotations.clone()).unwrap_or_default();
            let own = Annotations::from_map(&annotations);
            match policy::describe(&name, &own, &Annotations::default(), &settings) {
                Ok(_) => {}
                Err(error) => unreadable.push((name, error.to_string())),
            }
        }
    }
    let [(name, error)] = &unreadable[..] else {
        panic!("{unreadable:?}");
    };
    assert_eq!(name, "unreadable");
    assert!(error.contains("`https` is not a port"), "{error}");
}

/// The script replaces these texts.
#[test]
fn the_end_to_end_script_finds_the_texts_that_it_replaces() {
    let script = include_str!("../../e2e/run");
    let pods = include_str!("../../e2e/pods.yaml");
    for text in ["example.com", "*.kernel.org", "1.1.1.1", "busybox:1.37"] {
        assert!(pods.contains(text), "{text}");
        let pattern = text.replace('.', "\\.").replace('*', "\\*");
        assert!(script.contains(&format!("s|{pattern}|")), "{pattern}");
    }
    for (file, image) in [
        ("egress-agent.yaml", "registry.invalid/egress-agent:"),
        ("cleanup/daemonset.yaml", "registry.invalid/egress-agent:"),
    ] {
        let spec = pod_spec(&yaml::objects(file));
        let containers = spec
            .init_containers
            .iter()
            .flatten()
            .chain(&spec.containers);
        for container in containers {
            let named = container.image.as_deref().expect("an image");
            assert!(named.starts_with(image), "{file}: {named}");
        }
    }
    for file in END_TO_END {
        assert!(script.contains(&format!("$here/{file}")), "{file}");
    }
}

#[test]
fn alerts_use_existing_metrics_and_are_documented() {
    let metrics = include_str!("../../../docs/metrics.md");
    let operations = include_str!("../../../docs/operations.md");
    let [object] = &yaml::objects("components/monitoring/rules.yaml")[..] else {
        panic!("not one object");
    };
    let mut alerts = 0;
    for rule in list(&object["spec"]["groups"][0]["rules"]) {
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        let alert = text(&rule["alert"]);
        let row = operations
            .lines()
            .find(|line| line.starts_with(&format!("| `{alert}` |")))
            .unwrap_or_else(|| panic!("docs/operations.md has no {alert}"));
        for name in metric_names(&text(&rule["expr"])) {
            assert!(
                row.contains(&name),
                "{alert}: docs/operations.md without {name}"
            );
            // A histogram's series: `_bucket` belongs to the family.
            let family = name.strip_suffix("_bucket").unwrap_or(&name);
            assert!(
                metrics.contains(&format!("`{family}`")),
                "{alert}: docs/metrics.md has no {family}"
            );
        }
        for key in ["summary", "description"] {
            assert!(!text(&rule["annotations"][key]).is_empty(), "{alert}");
        }
        alerts += 1;
    }
    let documented = operations
        .lines()
        .filter(|line| line.starts_with("| `EgressAgent"))
        .count();
    assert_eq!(documented, alerts, "alerts in docs/operations.md");
}

fn metric_names(expression: &str) -> BTreeSet<String> {
    expression
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| word.starts_with("egress_agent_"))
        .map(str::to_owned)
        .collect()
}
