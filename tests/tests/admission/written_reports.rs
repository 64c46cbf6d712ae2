//! The reports that agents write, at a server of a current Kubernetes release: with the agent's own writer, which creates
//! the object and later changes it by a merge patch.

use std::sync::Arc;

use egress_agent::pods::{
    PodCounts, PolicyState,
    cluster::{NodeReport, ReportSink},
};
use egress_api::{
    PROBLEM_ABOUT_MAX, PROBLEM_TEXT_MAX, REPORTED_POLICIES_MAX, REPORTED_PROBLEMS_MAX,
};
use egress_policy::objects::{ObjectKind, ObjectName};
use egress_tests::{DefinitionServer, eventually};
use serde_json::{Value, json};
use tokio::{runtime::Runtime, task::JoinSet};

const REPORTS: &str = "/apis/egress-agent.dev/v1alpha1/egressnodereports";
const NODE_UID: &str = "6a1c0ffe-0000-4000-8000-000000000000";

/// An agent's writer, for a node of its own.
struct Writer {
    server: Arc<DefinitionServer>,
    node: &'static str,
    sink: ReportSink,
    _tasks: JoinSet<()>,
    _runtime: Runtime,
}

impl Writer {
    #[track_caller]
    fn start(node: &'static str) -> Self {
        let server = DefinitionServer::shared();
        let runtime = Runtime::new().expect("a tokio runtime");
        let mut tasks = JoinSet::new();
        let sink = runtime.block_on(ReportSink::alone(&server.kubeconfig(), node, &mut tasks));
        Self {
            server,
            node,
            sink: sink.expect("a kubeconfig"),
            _tasks: tasks,
            _runtime: runtime,
        }
    }

    /// Publishes a report, and returns the object when it is the number-th that was written.
    #[track_caller]
    fn write(&self, report: NodeReport, number: u64) -> Value {
        self.sink.publish(report);
        eventually("the report is written", || {
            let counters = self.sink.counters();
            assert_eq!(counters.failed(), 0, "the server refuses it");
            (counters.written() == number).then_some(())
        });
        self.server.get(&format!("{REPORTS}/{}", self.node)).ok()
    }
}

fn state(kind: ObjectKind, namespace: Option<&str>, name: &str) -> PolicyState {
    PolicyState {
        name: Arc::new(ObjectName {
            kind,
            namespace: namespace.map(str::to_owned),
            name: name.to_owned(),
        }),
        generation: Some(5),
        applied: Some(4),
        selected: 3,
        enforced: 2,
        problem: None,
    }
}

fn report(policies: &[PolicyState], problems: &[(&str, &str)]) -> NodeReport {
    let pods = PodCounts {
        selected: 41,
        enforced: 40,
        audited: 2,
    };
    let problems = problems.iter();
    let problems = problems.map(|(about, text)| ((*about).to_owned(), *text));
    NodeReport::new(Some(NODE_UID), pods, policies, problems)
}

#[test]
fn what_is_read_back_is_what_the_agent_has_written() {
    let writer = Writer::start("written");
    let unread = PolicyState {
        generation: None,
        applied: None,
        problem: Some("it cannot be read".to_owned()),
        ..state(ObjectKind::ClusterNetworkPolicy, None, "unread")
    };
    let web = state(ObjectKind::EgressPolicy, Some("shop"), "web");
    let created = writer.write(report(&[web.clone(), unread], &[("node", "it is slow")]), 1);
    let metadata = &created["metadata"];
    assert_eq!(
        metadata["ownerReferences"],
        json!([{ "apiVersion": "v1", "kind": "Node", "name": "written", "uid": NODE_UID }])
    );
    assert_eq!(
        created["status"],
        json!({
            "agentVersion": env!("CARGO_PKG_VERSION"),
            "pods": { "selected": 41, "enforced": 40, "audited": 2 },
            "policyCounts": { "selecting": 2, "applied": 0, "notSelecting": 0, "leftOut": 0 },
            "policies": [
                { "kind": "ClusterNetworkPolicy", "name": "unread", "selected": 3, "enforced": 2,
                  "problem": "it cannot be read" },
                { "kind": "EgressPolicy", "namespace": "shop", "name": "web", "generation": 5,
                  "appliedGeneration": 4, "selected": 3, "enforced": 2 },
            ],
            "problems": [{ "about": "node", "message": "it is slow" }],
            "problemCount": 1,
        })
    );

    // A merge patch replaces lists as a whole, and no field of the report before is left.
    let in_force = PolicyState {
        applied: Some(5),
        enforced: 3,
        ..web
    };
    let patched = writer.write(report(&[in_force], &[]), 2);
    assert_eq!(
        patched["status"],
        json!({
            "agentVersion": env!("CARGO_PKG_VERSION"),
            "pods": { "selected": 41, "enforced": 40, "audited": 2 },
            "policyCounts": { "selecting": 1, "applied": 1, "notSelecting": 0, "leftOut": 0 },
            "policies": [
                { "kind": "EgressPolicy", "namespace": "shop", "name": "web", "generation": 5,
                  "appliedGeneration": 5, "selected": 3, "enforced": 3 },
            ],
            "problems": [],
            "problemCount": 0,
        })
    );
    for field in ["uid", "ownerReferences"] {
        assert_eq!(patched["metadata"][field], metadata[field]);
    }
}

#[test]
fn the_largest_report_is_accepted() {
    let writer = Writer::start("largest");
    let text = "x".repeat(2 * PROBLEM_TEXT_MAX);
    let policies: Vec<PolicyState> = (0..REPORTED_POLICIES_MAX + 20)
        .map(|number| PolicyState {
            generation: Some(i64::MAX),
            applied: Some(1),
            selected: u32::MAX,
            problem: Some(text.clone()),
            ..state(
                ObjectKind::EgressPolicy,
                Some(&"n".repeat(63)),
                &format!("{number:0253}"),
            )
        })
        .collect();
    let about = "a".repeat(2 * PROBLEM_ABOUT_MAX);
    let problems = vec![(about.as_str(), text.as_str()); REPORTED_PROBLEMS_MAX + 20];
    let written = writer.write(report(&policies, &problems), 1);
    let status = &written["status"];
    let count = |list: &Value| list.as_array().map(Vec::len);
    assert_eq!(count(&status["policies"]), Some(REPORTED_POLICIES_MAX));
    assert_eq!(count(&status["problems"]), Some(REPORTED_PROBLEMS_MAX));
    assert_eq!(status["policyCounts"]["leftOut"], 20);
}
