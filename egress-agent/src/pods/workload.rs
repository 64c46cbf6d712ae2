//! Workloads, as far as they have a template of pods.

use k8s_openapi::{api::core::v1, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use serde::Deserialize;

use super::Problem;

/// A kind of workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Workload {
    /// `apiVersion` and kind.
    kind: &'static str,
    /// Its short name, as `kubectl` writes it.
    word: &'static str,
}

const ALL: [Workload; 7] = [
    Workload::new("apps/v1 Deployment", "deployment"),
    Workload::new("apps/v1 StatefulSet", "statefulset"),
    Workload::new("apps/v1 DaemonSet", "daemonset"),
    Workload::new("apps/v1 ReplicaSet", "replicaset"),
    Workload::new("ReplicationController", "replicationcontroller"),
    Workload::new("batch/v1 Job", "job"),
    Workload::new("batch/v1 CronJob", "cronjob"),
];

impl Workload {
    const fn new(kind: &'static str, word: &'static str) -> Self {
        Self { kind, word }
    }

    /// The workload of this `apiVersion` and kind; without the `apiVersion` if that is `v1`.
    pub(super) fn of(kind: &str) -> Option<Self> {
        ALL.into_iter().find(|known| known.kind == kind)
    }

    /// Its kind, as manifests write it.
    fn kind(self) -> &'static str {
        self.kind.rsplit(' ').next().unwrap_or(self.kind)
    }

    /// Its kind as one word in lower case.
    pub(super) const fn word(self) -> &'static str {
        self.word
    }
}

/// The kind and the name of a pod that was read for `check`: those of the workload whose pods it stands for.
pub fn kind_and_name(pod: &str) -> (&'static str, &str) {
    let Some((word, name)) = pod.split_once('/') else {
        return ("Pod", pod);
    };
    let workload = ALL.into_iter().find(|known| known.word == word);
    (workload.map_or("Pod", Workload::kind), name)
}

/// The manifest of a workload.
#[derive(Deserialize)]
pub(super) struct WorkloadManifest {
    metadata: ObjectMeta,
    spec: Spec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    template: Option<v1::PodTemplateSpec>,
    job_template: Option<JobTemplate>,
}

#[derive(Deserialize)]
struct JobTemplate {
    spec: JobSpec,
}

#[derive(Deserialize)]
struct JobSpec {
    template: v1::PodTemplateSpec,
}

impl WorkloadManifest {
    /// A pod as the template describes it, with the workload's name and namespace.
    pub(super) fn pod(self, origin: &str) -> Result<v1::Pod, Problem> {
        let of_job = self.spec.job_template.map(|job| job.spec.template);
        let template = self.spec.template.or(of_job).ok_or_else(|| Problem {
            origin: origin.to_owned(),
            message: "the workload has no template of pods (spec.template)".to_owned(),
        })?;
        let of_template = template.metadata.unwrap_or_default();
        Ok(v1::Pod {
            metadata: ObjectMeta {
                name: self.metadata.name,
                namespace: self.metadata.namespace,
                labels: of_template.labels,
                annotations: of_template.annotations,
                ..ObjectMeta::default()
            },
            spec: template.spec,
            status: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::pods::read_for_check;

    #[test]
    fn a_workload_stands_for_the_pods_of_its_template() {
        let deployment = "\
apiVersion: apps/v1
kind: Deployment
metadata: {name: cart, namespace: shop, labels: {app: other}}
spec:
  selector: {matchLabels: {app: cart}}
  template:
    metadata:
      labels: {app: cart}
      annotations: {egress-agent.dev/allow: shop.test:443}
    spec: {containers: [{name: main, image: example.com/main}]}
";
        let cron_job = "\
apiVersion: batch/v1
kind: CronJob
metadata: {name: report, namespace: shop}
spec:
  schedule: '0 0 * * *'
  jobTemplate:
    spec:
      template:
        spec: {hostNetwork: true, containers: [{name: main, image: example.com/main}]}
";
        let policy = "\
apiVersion: egress-agent.dev/v1alpha1
kind: EgressPolicy
metadata: {name: web, namespace: shop}
spec: {podSelector: {matchLabels: {app: cart}}, allow: [web.test:443]}
";
        let all = [
            ("d.yaml", deployment),
            ("c.yaml", cron_job),
            ("p.yaml", policy),
        ];
        let snapshot = read_for_check(all).snapshot;
        assert_eq!(snapshot.problems, []);
        let pods: Vec<_> = snapshot.pods.values().collect();
        let [report, cart] = pods[..] else {
            panic!("{pods:?}");
        };
        assert_eq!(
            (&*report.name, report.host_network),
            ("cronjob/report", true)
        );
        assert_eq!((&*cart.name, &*cart.namespace), ("deployment/cart", "shop"));
        assert_eq!(cart.annotations["egress-agent.dev/allow"], "shop.test:443");
        assert_eq!(cart.objects.namespace.len(), 1);
        assert!(report.objects.namespace.is_empty());
    }

    #[test]
    fn a_workload_without_a_template_is_a_problem_with_its_place() {
        let text = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: cart}\nspec: {}\n";
        let snapshot = read_for_check([("d.yaml", text)]).snapshot;
        let problem = snapshot.problems[0].to_string();
        assert!(
            problem.starts_with("d.yaml:1: the workload has no template"),
            "{problem}"
        );
    }
}
