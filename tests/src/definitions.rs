//! A server of a current Kubernetes release for definitions and their objects, on loopback.
//!
//! It is the part of the API server that checks schemas and evaluates the expressions in them, without the rest of a
//! cluster (tests/tests/admission/server). [`ApiServer`](crate::ApiServer) is too old for that.

use std::{
    env, fmt, fs,
    path::PathBuf,
    process::Command,
    sync::{Arc, Mutex, PoisonError, Weak},
    thread,
    time::Instant,
};

use http::Request;
use kube::{
    Client, Config,
    client::Body,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

use crate::{
    apiserver::{POLL, Process, START, start_etcd},
    eventually, holds, workspace, yaml,
};

/// The server that `cargo xtask setup` builds, below the workspace's top directory.
const BUILT: &str = "target/kubernetes/definitions/server";
/// Names another one.
const NAMED: &str = "DEFINITION_SERVER";
/// The token of requests.
const TOKEN: &str = "token-of-admin";
/// The file with the kubeconfig.
const KUBECONFIG: &str = "kubeconfig";
/// The collection of definitions.
pub const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

/// The server with its etcd, and the definitions of the manifests. Both are ended, and their files removed, when it is
/// dropped.
pub struct DefinitionServer {
    // The server must end before its etcd.
    _server: Process,
    _etcd: Process,
    client: Client,
    runtime: Mutex<Runtime>,
    directory: TempDir,
}

impl fmt::Debug for DefinitionServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DefinitionServer").finish_non_exhaustive()
    }
}

/// The server's response.
#[derive(Clone, Debug, PartialEq)]
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// The body.
    pub body: Value,
}

impl Response {
    /// Asserts that the request succeeded.
    #[track_caller]
    pub fn ok(self) -> Value {
        assert!(self.status < 300, "{self:#?}");
        self.body
    }

    /// A refusal: the field, and the message.
    pub fn causes(&self) -> Vec<(&str, &str)> {
        let causes = self.body["details"]["causes"].as_array();
        let texts = causes.into_iter().flatten().map(|cause| {
            let text = |field: &str| cause[field].as_str().unwrap_or_default();
            (text("field"), text("message"))
        });
        texts.collect()
    }
}

/// The types of a request's body and response.
#[derive(Clone, Copy, Debug)]
pub struct Types {
    /// The body's.
    pub content: &'static str,
    /// The response's.
    pub accept: &'static str,
}

impl Types {
    /// JSON.
    pub const JSON: Self = Self {
        content: "application/json",
        accept: "application/json",
    };
    /// A server-side apply.
    pub const APPLY: Self = Self {
        content: "application/apply-patch+yaml",
        ..Self::JSON
    };
    /// The output of `kubectl get`.
    pub const TABLE: Self = Self {
        accept: "application/json;as=Table;v=v1;g=meta.k8s.io",
        ..Self::JSON
    };
}

impl DefinitionServer {
    /// A server that the tests of one binary share as long as any of them uses it. Each test needs names of its own.
    #[track_caller]
    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<DefinitionServer>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let server = Arc::new(Self::start());
            *shared = Arc::downgrade(&server);
            server
        })
    }

    /// Starts etcd and the server, and installs the definitions of the manifests.
    #[track_caller]
    fn start() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (etcd, etcd_port) = start_etcd(directory.path());
        let log = directory.path().join("server.log");
        let mut command = Command::new(program());
        command
            .arg("-etcd")
            .arg(format!("http://127.0.0.1:{etcd_port}"))
            .arg("-directory")
            .arg(directory.path())
            .args(["-token", TOKEN]);
        let mut process = Process::start(&mut command, &log);
        let port_file = directory.path().join("port");
        let start = Instant::now();
        let port = loop {
            if let Ok(port) = fs::read_to_string(&port_file)
                && !port.is_empty()
            {
                break port;
            }
            assert!(
                !process.has_ended() && start.elapsed() < START,
                "no server of definitions: {}",
                fs::read_to_string(&log).unwrap_or_default()
            );
            thread::sleep(POLL);
        };
        let kubeconfig = json!({
            "clusters": [{ "name": "c", "cluster": {
                "server": format!("https://127.0.0.1:{port}"),
                "certificate-authority": directory.path().join("apiserver.crt"),
            } }],
            "users": [{ "name": "u", "user": { "token": TOKEN } }],
            "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
            "current-context": "x",
        });
        let text = kubeconfig.to_string();
        fs::write(directory.path().join(KUBECONFIG), text).expect("write a kubeconfig");
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a tokio runtime");
        let client = runtime.block_on(async {
            let read: Kubeconfig = serde_json::from_value(kubeconfig).expect("a kubeconfig");
            let options = KubeConfigOptions::default();
            let config = Config::from_custom_kubeconfig(read, &options).await;
            Client::try_from(config.expect("a configuration")).expect("a client")
        });
        let server = Self {
            _server: process,
            _etcd: etcd,
            client,
            runtime: Mutex::new(runtime),
            directory,
        };
        eventually("the server of definitions is ready", || {
            holds(
                server
                    .try_ask("GET", "/readyz", Types::JSON, &Value::Null)?
                    .status
                    == 200,
            )
        });
        for definition in yaml::objects("base/crds.yaml") {
            server.install(&definition);
        }
        server
    }

    /// A kubeconfig of an administrator.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join(KUBECONFIG)
    }

    /// Installs a definition, and waits until its objects are served.
    #[track_caller]
    pub fn install(&self, definition: &Value) {
        self.ask("POST", DEFINITIONS, Types::JSON, definition).ok();
        let path = path_of_objects(definition);
        eventually(&format!("{path} is served"), || {
            holds(self.get(&path).status == 200)
        });
    }

    /// Requests a path.
    #[track_caller]
    pub fn get(&self, path: &str) -> Response {
        self.ask("GET", path, Types::JSON, &Value::Null)
    }

    /// Sends a request.
    #[track_caller]
    pub fn ask(&self, method: &str, path: &str, types: Types, body: &Value) -> Response {
        let response = self.try_ask(method, path, types, body);
        response.unwrap_or_else(|| panic!("no response to {method} {path}"))
    }

    /// The response, if the server is there.
    fn try_ask(&self, method: &str, path: &str, types: Types, body: &Value) -> Option<Response> {
        let body = match body {
            Value::Null => Vec::new(),
            body => body.to_string().into_bytes(),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", types.content)
            .header("accept", types.accept)
            .body(Body::from(body))
            .expect("a request");
        let runtime = self.runtime.lock().unwrap_or_else(PoisonError::into_inner);
        runtime.block_on(async {
            let response = self.client.send(request).await.ok()?;
            let status = response.status().as_u16();
            let bytes = response.into_body().collect_bytes().await.ok()?;
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
            Some(Response { status, body })
        })
    }
}

/// `DEFINITION_SERVER`, or the one that setup has built.
fn program() -> PathBuf {
    if let Some(named) = env::var_os(NAMED) {
        return named.into();
    }
    let built = workspace::root().join(BUILT);
    assert!(
        built.exists(),
        "there is no {}: run `cargo xtask setup`, which builds it, or name another with {NAMED}",
        built.display()
    );
    built
}

/// The path of the objects of a definition's first version, in all namespaces.
#[must_use]
pub fn path_of_objects(definition: &Value) -> String {
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let spec = &definition["spec"];
    format!(
        "/apis/{}/{}/{}",
        text(&spec["group"]),
        text(&spec["versions"][0]["name"]),
        text(&spec["names"]["plural"])
    )
}

/// A definition of the upstream kind `ClusterNetworkPolicy` in this version, which accepts every object.
#[must_use]
pub fn upstream_definition(version: &str) -> Value {
    let open = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    let group = "policy.networking.k8s.io";
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("clusternetworkpolicies.{group}"),
            "annotations": {"api-approved.kubernetes.io": "unapproved, for tests"},
        },
        "spec": {
            "group": group,
            "scope": "Cluster",
            "names": {"kind": "ClusterNetworkPolicy", "plural": "clusternetworkpolicies"},
            "versions": [{
                "name": version, "served": true, "storage": true,
                "schema": {"openAPIV3Schema": open},
            }],
        },
    })
}
