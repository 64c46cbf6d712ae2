use std::fs;

use tempfile::TempDir;

use super::*;

fn pod(name: &str, allow: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  annotations:\n    \
         egress-agent.dev/interface: veth-{name}\n    egress-agent.dev/allow: {allow}\n\
         status:\n  podIPs:\n  - ip: 10.0.0.1\n"
    )
}

fn namespace(name: &str, allow: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  annotations:\n    \
         egress-agent.dev/allow: {allow}\n"
    )
}

struct Dir {
    dir: TempDir,
    files: Files,
}

impl Dir {
    fn new() -> Self {
        Self {
            dir: TempDir::new().unwrap(),
            files: Files::default(),
        }
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        // A new inode each time, so that no two versions look the same.
        let path = self.dir.path().join(name);
        let new = self.dir.path().join(".new");
        fs::write(&new, text).unwrap();
        fs::rename(new, path).unwrap();
    }

    fn read(&mut self) -> Snapshot {
        self.files
            .read_directory(self.dir.path(), &BTreeSet::new())
            .unwrap();
        self.files.snapshot()
    }
}

/// The allow list of each pod, in the order of the names.
fn allows(snapshot: &Snapshot) -> Vec<(&str, &str)> {
    let pods = snapshot.pods.values();
    pods.map(|pod| (&*pod.name, &*pod.annotations["egress-agent.dev/allow"]))
        .collect()
}

fn problem_texts(snapshot: &Snapshot) -> String {
    let problems: Vec<_> = snapshot.problems.iter().map(ToString::to_string).collect();
    problems.join("\n")
}

#[test]
fn pods_follow_files_that_are_added_changed_and_removed() {
    let mut dir = Dir::new();
    assert_eq!(dir.read(), Snapshot::default());
    dir.write("a.yaml", pod("a", "one.test") + &pod("b", "two.test"));
    dir.write(
        "c.json",
        r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"x"}}"#,
    );
    assert_eq!(allows(&dir.read()), [("a", "one.test"), ("b", "two.test")]);
    dir.write("a.yaml", pod("a", "three.test"));
    assert_eq!(allows(&dir.read()), [("a", "three.test")]);
    fs::remove_file(dir.dir.path().join("a.yaml")).unwrap();
    assert_eq!(dir.read(), Snapshot::default());
}

#[test]
fn only_manifest_files_are_read() {
    let mut dir = Dir::new();
    for name in [
        "a.txt",
        ".a.yaml",
        "a.yaml~",
        "#a.yaml#",
        ".a.yaml.swp",
        "a.yaml.bak",
        "yaml",
    ] {
        dir.write(name, pod("a", "x.test"));
    }
    assert_eq!(dir.read(), Snapshot::default());
    dir.write("a.yml", pod("a", "x.test"));
    assert_eq!(dir.read().pods.len(), 1);
}

#[test]
fn a_broken_edit_leaves_the_pod_as_it_was_and_the_rest_of_the_file_works() {
    let mut dir = Dir::new();
    dir.write("a.yaml", pod("a", "old.test") + &pod("b", "old.test"));
    dir.read();
    dir.write(
        "a.yaml",
        "---\nkind: Pod\nmetadata: [\n".to_owned() + &pod("b", "new.test"),
    );
    for _ in 0..2 {
        let snapshot = dir.read();
        assert_eq!(allows(&snapshot), [("a", "old.test"), ("b", "new.test")]);
        let problems = problem_texts(&snapshot);
        assert!(
            problems.contains("pod default/a is not in the readable part"),
            "{problems}"
        );
    }
    dir.write("a.yaml", pod("b", "new.test"));
    let snapshot = dir.read();
    assert_eq!(allows(&snapshot), [("b", "new.test")]);
    assert_eq!(snapshot.problems, []);
}

#[test]
fn a_file_that_is_empty_or_unreadable_keeps_its_pods() {
    let too_long = "#".repeat(usize::try_from(FILE_MAX).unwrap() + 1);
    for text in [
        b"".as_slice(),
        b"# nothing\n",
        b"\xff\xfe",
        too_long.as_bytes(),
    ] {
        let mut dir = Dir::new();
        dir.write(
            "a.yaml",
            pod("a", "x.test") + &namespace("default", "y.test"),
        );
        let before = dir.read();
        dir.write("a.yaml", text);
        let snapshot = dir.read();
        assert_eq!(snapshot.pods, before.pods);
        let problems = problem_texts(&snapshot);
        assert!(problems.contains(KEPT), "{problems}");
    }
}

#[test]
fn an_empty_file_that_never_had_pods_is_not_a_problem() {
    let mut dir = Dir::new();
    dir.write("a.yaml", "");
    assert_eq!(dir.read(), Snapshot::default());
}

#[test]
fn a_path_that_is_not_a_regular_file_is_reported_and_skipped() {
    let mut dir = Dir::new();
    let path = dir.dir.path().join("pipe.yaml");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
    fs::create_dir(dir.dir.path().join("dir.yaml")).unwrap();
    dir.write("a.yaml", pod("a", "x.test"));
    let snapshot = dir.read();
    assert_eq!(allows(&snapshot), [("a", "x.test")]);
    let problems = problem_texts(&snapshot);
    assert_eq!(
        problems.matches("is not a regular file").count(),
        2,
        "{problems}"
    );
}

#[test]
fn an_invalid_address_leaves_a_known_pod_as_it_was() {
    let mut dir = Dir::new();
    dir.write("a.yaml", pod("a", "old.test"));
    dir.write("b.yaml", pod("b", "old.test").replace("10.0.0.1", "ten"));
    dir.read();
    dir.write("a.yaml", pod("a", "new.test").replace("10.0.0.1", "ten"));
    dir.write("b.yaml", pod("b", "new.test").replace("10.0.0.1", "ten"));
    let snapshot = dir.read();
    assert_eq!(allows(&snapshot), [("a", "old.test"), ("b", "new.test")]);
    let addresses: Vec<_> = snapshot
        .pods
        .values()
        .map(|pod| pod.addresses.len())
        .collect();
    assert_eq!(addresses, [1, 0]);
    let problems = problem_texts(&snapshot);
    assert!(
        problems.contains("\"ten\" in status.podIPs is not an IP address"),
        "{problems}"
    );
    assert!(
        problems.contains("pod default/a stays as it was read before"),
        "{problems}"
    );
}

#[test]
fn the_first_of_two_files_with_the_same_pod_counts() {
    let mut dir = Dir::new();
    dir.write(
        "b.yaml",
        pod("a", "second.test") + &namespace("default", "second.test"),
    );
    dir.write(
        "a.yaml",
        pod("a", "first.test") + &namespace("default", "first.test"),
    );
    let snapshot = dir.read();
    assert_eq!(allows(&snapshot), [("a", "first.test")]);
    let pod = &snapshot.pods[&crate::pods::NamespacedName::new("default", "a")];
    assert_eq!(
        pod.namespace_annotations["egress-agent.dev/allow"],
        "first.test"
    );
    let problems = problem_texts(&snapshot);
    assert!(
        problems.contains("pod default/a is already described at "),
        "{problems}"
    );
    assert!(
        problems.contains("namespace default is already described at "),
        "{problems}"
    );
    assert_eq!(snapshot.problems.len(), 2);
}

#[test]
fn a_pod_gets_the_annotations_of_its_own_namespace_only() {
    let mut dir = Dir::new();
    let in_shop = pod("a", "x.test").replace("  name: a\n", "  name: a\n  namespace: shop\n");
    dir.write("pods.yaml", in_shop + &pod("b", "x.test"));
    dir.write("zz.yaml", namespace("shop", "all.test"));
    let snapshot = dir.read();
    let lent: Vec<_> = snapshot
        .pods
        .values()
        .map(|pod| (&*pod.name, pod.namespace_annotations.len()))
        .collect();
    assert_eq!(lent, [("b", 0), ("a", 1)]);
}

#[test]
fn a_directory_that_is_gone_keeps_everything() {
    let mut dir = Dir::new();
    dir.write("a.yaml", pod("a", "x.test"));
    let before = dir.read();
    let gone = dir.dir.path().join("gone");
    assert!(dir.files.read_directory(&gone, &BTreeSet::new()).is_err());
    assert_eq!(dir.files.snapshot(), before);
}

#[test]
fn a_file_that_is_being_written_is_left_as_it_was() {
    let mut dir = Dir::new();
    dir.write("a.yaml", pod("a", "old.test"));
    dir.read();
    dir.write("a.yaml", pod("a", "new.test"));
    dir.write("b.yaml", pod("b", "new.test"));
    let writing = BTreeSet::from(["a.yaml".into(), "b.yaml".into()]);
    dir.files.read_directory(dir.dir.path(), &writing).unwrap();
    assert_eq!(allows(&dir.files.snapshot()), [("a", "old.test")]);
    assert_eq!(allows(&dir.read()), [("a", "new.test"), ("b", "new.test")]);
}

#[test]
fn a_half_read_file_is_restored() {
    let mut dir = Dir::new();
    dir.write("a.yaml", pod("a", "old.test"));
    dir.read();
    let before = dir.files.clone();
    dir.write("a.yaml", pod("a", "half.test"));
    dir.write("b.yaml", pod("b", "half.test"));
    dir.read();
    for name in ["a.yaml", "b.yaml"] {
        dir.files.restore(&dir.dir.path().join(name), &before);
    }
    assert_eq!(allows(&dir.files.snapshot()), [("a", "old.test")]);
    assert_eq!(
        allows(&dir.read()),
        [("a", "half.test"), ("b", "half.test")]
    );
}

fn policy(app: &str, allow: &str) -> String {
    format!(
        "---\napiVersion: egress-agent.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: {app}}}\nspec:\n  \
         podSelector: {{matchLabels: {{app: {app}}}}}\n  allow: {allow}\n"
    )
}

fn labelled(name: &str, app: &str) -> String {
    pod(name, "a.test").replace("metadata:", &format!("metadata:\n  labels: {{app: {app}}}"))
}

/// The first `allow` of the policies that select each pod, in the order of the names.
fn policies(snapshot: &Snapshot) -> Vec<Vec<&str>> {
    let pods = snapshot.pods.values();
    pods.map(|pod| {
        let policies = pod.objects.namespace.iter();
        policies
            .map(|policy| &*policy.allow.as_ref().unwrap()[0])
            .collect()
    })
    .collect()
}

#[test]
fn a_policy_selects_pods_of_other_files() {
    let mut dir = Dir::new();
    dir.write("pods.yaml", labelled("a", "web") + &labelled("b", "db"));
    dir.write("policies.yaml", policy("web", "[w.test]"));
    assert_eq!(policies(&dir.read()), [vec!["w.test"], vec![]]);
    dir.write("pods.yaml", labelled("a", "db") + &labelled("b", "web"));
    assert_eq!(policies(&dir.read()), [vec![], vec!["w.test"]]);
    dir.write("policies.yaml", policy("db", "[d.test]"));
    assert_eq!(policies(&dir.read()), [vec!["d.test"], vec![]]);
    fs::remove_file(dir.dir.path().join("policies.yaml")).unwrap();
    let snapshot = dir.read();
    assert_eq!(policies(&snapshot), [vec![""; 0], vec![]]);
    assert_eq!(problem_texts(&snapshot), "");
}

#[test]
fn a_policy_that_cannot_be_read_any_more_stays() {
    let mut dir = Dir::new();
    dir.write("pods.yaml", labelled("a", "web"));
    dir.write("policies.yaml", policy("web", "[w.test]"));
    dir.read();
    dir.write("policies.yaml", policy("web", "w.test"));
    let snapshot = dir.read();
    assert_eq!(policies(&snapshot), [["w.test"]]);
    let problems = problem_texts(&snapshot);
    assert!(problems.contains("spec.allow cannot be read"), "{problems}");
    assert!(
        problems.contains("EgressPolicy default/web stays as it was read before"),
        "{problems}"
    );
}

#[test]
fn a_new_policy_that_cannot_be_read_allows_nothing() {
    let mut dir = Dir::new();
    dir.write("pods.yaml", labelled("a", "web") + &labelled("b", "db"));
    dir.write("policies.yaml", policy("web", "w.test"));
    let snapshot = dir.read();
    let allows = |pod: &crate::pods::Pod| pod.objects.namespace[0].allow.clone();
    let pods: Vec<_> = snapshot.pods.values().collect();
    assert_eq!(allows(pods[0]), Some(Vec::new()));
    assert!(pods[1].objects.namespace.is_empty(), "it harms another pod");
    let problems = problem_texts(&snapshot);
    assert!(problems.contains("so it allows nothing"), "{problems}");
}

#[test]
fn cluster_policies_select_by_the_labels_of_namespaces() {
    let mut dir = Dir::new();
    let of = |rules: &str| {
        format!(
            "---\napiVersion: egress-agent.dev/v1alpha1\nkind: ClusterEgressPolicy\nmetadata: {{name: all}}\n\
             spec:\n  tier: Admin\n  priority: 1\n  namespaceSelector: {{matchLabels: {{team: shop}}}}\n  \
             rules: {rules}\n"
        )
    };
    let set = "---\napiVersion: egress-agent.dev/v1alpha1\nkind: EgressSet\nmetadata: {name: git}\n\
               spec: {destinations: [github.com]}\n";
    let shop =
        namespace("shop", "a.test").replace("metadata:", "metadata:\n  labels: {team: shop}");
    let in_shop = pod("a", "a.test").replace("metadata:", "metadata:\n  namespace: shop");
    dir.write("pods.yaml", in_shop + &pod("b", "a.test") + &shop);
    dir.write(
        "policies.yaml",
        of("[{action: Allow, entries: [\"@git:443\"]}]") + set,
    );
    let snapshot = dir.read();
    assert_eq!(problem_texts(&snapshot), "");
    for pod in snapshot.pods.values() {
        let tiers: Vec<_> = pod
            .objects
            .tiers
            .iter()
            .map(|tier| &*tier.name.name)
            .collect();
        let expected: &[&str] = if pod.namespace == "shop" {
            &["all"]
        } else {
            &[]
        };
        assert_eq!(tiers, expected, "{}", pod.name);
        assert_eq!(pod.objects.sets["git"], ["github.com"]);
    }
}

#[test]
fn a_rule_about_nodes_needs_a_cluster() {
    let mut dir = Dir::new();
    dir.write("pods.yaml", pod("a", "a.test"));
    dir.write(
        "policies.yaml",
        "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {name: up}\n\
         spec:\n  tier: Admin\n  priority: 1\n  subject: {namespaces: {}}\n  egress:\n  \
         - {action: Deny, to: [{nodes: {}}]}\n",
    );
    let snapshot = dir.read();
    let problems = problem_texts(&snapshot);
    assert!(
        problems.contains(
            "policies.yaml:1: ClusterNetworkPolicy up: spec.egress[0]: the addresses of nodes are known only in \
             a cluster: the rule denies everything"
        ),
        "{problems}"
    );
    let pod = snapshot.pods.values().next().unwrap();
    assert_eq!(pod.objects.tiers[0].rules[0].entries, ["*"]);
}
