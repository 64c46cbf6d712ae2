//! Policy objects at an API server, by the thousand.

use std::time::{Duration, Instant};

use egress_tests::{ApiServer, Identity, yaml};
use futures_util::{StreamExt as _, stream};
use kube::{
    Api, Client, Config,
    api::{
        ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams,
    },
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};

/// The API group of the agent's own kinds, with their version.
pub(crate) const GROUP: &str = "egress-agent.dev/v1alpha1";
/// The number of requests that are open at the same time.
const CONCURRENT: usize = 8;
/// The time within which the server serves a new kind.
const SERVED: Duration = Duration::from_secs(30);

/// An administrator's connection to an API server.
pub(crate) struct Admin {
    client: Client,
}

impl Admin {
    pub(crate) async fn connect(server: &ApiServer) -> Self {
        let file = server.kubeconfig(Identity::Admin);
        let read = Kubeconfig::read_from(file).expect("a kubeconfig");
        let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await;
        let client = Client::try_from(config.expect("a configuration")).expect("a client");
        Self { client }
    }

    /// Installs the definitions of the manifests.
    pub(crate) async fn install(&self) {
        for definition in yaml::objects("base/crds.yaml") {
            // An old server applies no definition with validations that it does not know.
            self.create([definition.clone()]).await;
            let kind = definition["spec"]["names"]["kind"].as_str();
            let any = json!({ "apiVersion": GROUP, "kind": kind, "metadata": { "name": "" } });
            let start = Instant::now();
            while self.api(&any).list(&ListParams::default()).await.is_err() {
                assert!(start.elapsed() < SERVED, "{kind:?} is not served");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }

    /// Creates many objects.
    pub(crate) async fn create(&self, objects: impl IntoIterator<Item = Value>) {
        let creations = objects.into_iter().map(async |object| {
            let api = self.api(&object);
            let created: DynamicObject = serde_json::from_value(object).expect("an object");
            let created = api.create(&PostParams::default(), &created).await;
            created.unwrap_or_else(|error| panic!("create: {error}"));
        });
        let mut creations = stream::iter(creations).buffer_unordered(CONCURRENT);
        while creations.next().await.is_some() {}
    }

    /// Creates an object, or updates it to this state.
    pub(crate) async fn apply(&self, object: &Value) {
        let name = object["metadata"]["name"].as_str().expect("a name");
        let patch = PatchParams::apply("benchmarks").force();
        let applied = self
            .api(object)
            .patch(name, &patch, &Patch::Apply(object))
            .await;
        applied.unwrap_or_else(|error| panic!("apply {object}: {error}"));
    }

    /// Sets a label of a pod.
    pub(crate) async fn label(&self, namespace: &str, pod: &str, label: (&str, &str)) {
        let like = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "namespace": namespace },
        });
        let (key, value) = label;
        let patch = json!({ "metadata": { "labels": { key: value } } });
        let patched = self
            .api(&like)
            .patch(pod, &PatchParams::default(), &Patch::Merge(patch))
            .await;
        patched.unwrap_or_else(|error| panic!("label {pod}: {error}"));
    }

    /// The API of the object's kind, in its namespace if it has one.
    fn api(&self, object: &Value) -> Api<DynamicObject> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let version = text(&object["apiVersion"]);
        let (group, version) = version.rsplit_once('/').unwrap_or(("", &version));
        let kind = text(&object["kind"]);
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &kind));
        match object["metadata"]["namespace"].as_str() {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        }
    }
}
