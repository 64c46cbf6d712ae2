//! A real Kubernetes API server with its etcd, on loopback.
//!
//! Nothing else of a cluster runs: no scheduler, no controllers and no kubelet. A test does their work: it
//! binds pods to nodes, reports their status, and deletes them for good.

use std::{
    env,
    fs::{self, File},
    future::Future,
    io::Write as _,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::{Duration, Instant},
};

use http::Request;
use kube::{
    Api, Client, Config,
    api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use tempfile::{NamedTempFile, TempDir};
use tokio::runtime::{Builder, Runtime};

use crate::workspace;

/// The API server that `cargo xtask setup` builds, below the workspace's top directory.
const BUILT: &str = "target/kubernetes/1.20.2-2/kube-apiserver";
/// The time within which a server must answer.
pub(crate) const START: Duration = Duration::from_secs(90);
/// The interval between two attempts to reach it.
pub(crate) const POLL: Duration = Duration::from_millis(100);
/// The number of ports to try: another process may take a free port before the server uses it.
const ATTEMPTS: usize = 5;
/// The address that the server advertises; nothing listens there.
pub const ADVERTISED: &str = "192.0.2.10";
/// The first address of the range of Services, which is that of the Service `default/kubernetes`.
pub const API_SERVICE: &str = "10.96.0.1";

/// The client of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// An administrator with all rights.
    Admin,
    /// The agent's service account, `egress-agent` in the namespace of that name, which has only the rights
    /// of its roles.
    Agent,
}

impl Identity {
    fn user(self) -> (&'static str, &'static str) {
        match self {
            Self::Admin => ("admin", "system:masters"),
            Self::Agent => (
                "system:serviceaccount:egress-agent:egress-agent",
                "system:serviceaccounts,system:serviceaccounts:egress-agent",
            ),
        }
    }

    /// The token of this identity from the first start on.
    pub fn token(self) -> &'static str {
        match self {
            Self::Admin => "token-of-admin",
            Self::Agent => "token-of-agent",
        }
    }
}

/// An API server with its etcd. Both are ended, and their files removed, when it is dropped.
#[derive(Debug)]
pub struct ApiServer {
    etcd: Process,
    etcd_port: u16,
    server: Mutex<Option<Process>>,
    port: u16,
    runtime: Mutex<Runtime>,
    directory: TempDir,
}

/// A program that is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Process(Child);

impl Process {
    #[track_caller]
    pub(crate) fn start(command: &mut Command, log: &Path) -> Self {
        let log = File::options()
            .create(true)
            .append(true)
            .open(log)
            .expect("a log file");
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("duplicate a file"))
            .stderr(log);
        let spawned = command.spawn();
        Self(spawned.unwrap_or_else(|e| panic!("start {}: {e}", command.get_program().display())))
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.0.try_wait().expect("wait(2) for a child").is_some()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl ApiServer {
    /// A server that the tests of one binary share as long as any of them uses it. Each test must use nodes
    /// and namespaces of its own, and must not stop the server.
    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<ApiServer>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let server = Arc::new(Self::start());
            *shared = Arc::downgrade(&server);
            server
        })
    }

    /// Starts etcd and the server, and waits until the server answers.
    #[track_caller]
    pub fn start() -> Self {
        let directory = tempfile::Builder::new()
            .prefix("egress-apiserver-")
            .tempdir()
            .expect("a temporary directory");
        let (etcd, etcd_port) = start_etcd(directory.path());
        make_key(directory.path());
        let runtime = Builder::new_current_thread().enable_all().build();
        let mut server = Self {
            etcd,
            etcd_port,
            server: Mutex::new(None),
            port: 0,
            runtime: Mutex::new(runtime.expect("a tokio runtime")),
            directory,
        };
        server.write_tokens(&[Identity::Admin, Identity::Agent].map(|i| (i, i.token())));
        for _ in 0..ATTEMPTS {
            server.port = free_port();
            if server.try_run() {
                return server;
            }
        }
        panic!("no API server; its log ends with:\n{}", server.log());
    }

    /// The port of the server on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The processes of the server and of its etcd.
    pub fn processes(&self) -> [u32; 2] {
        let server = self.server().as_ref().map(|server| server.0.id());
        [server.expect("the server runs"), self.etcd.0.id()]
    }

    /// Kills the server; etcd keeps running.
    pub fn kill(&self) {
        *self.server() = None;
    }

    /// Starts the server again, on the same port, with the state in etcd.
    #[track_caller]
    pub fn run(&self) {
        assert!(
            self.try_run(),
            "no API server; its log ends with:\n{}",
            self.log()
        );
    }

    /// Sets the tokens that are valid from the next start on.
    pub fn write_tokens(&self, tokens: &[(Identity, &str)]) {
        let line = |(identity, token): &(Identity, &str)| {
            let (user, groups) = identity.user();
            format!("{token},{user},{user},\"{groups}\"")
        };
        let lines: Vec<_> = tokens.iter().map(line).collect();
        fs::write(self.file("tokens.csv"), lines.join("\n")).expect("write the tokens");
    }

    /// A kubeconfig for this identity.
    pub fn kubeconfig(&self, identity: Identity) -> PathBuf {
        let user = json!({ "token": identity.token() });
        self.kubeconfig_with(&format!("{identity:?}"), self.port, &user)
    }

    /// A kubeconfig with this file name, for this user and for the server on another port, such as a proxy's.
    pub fn kubeconfig_with(&self, name: &str, port: u16, user: &Value) -> PathBuf {
        self.kubeconfig_of(name, &self.cluster(port), user)
    }

    /// A kubeconfig for a cluster and a user, in kubeconfig's own format. It is written atomically.
    pub fn kubeconfig_of(&self, name: &str, cluster: &Value, user: &Value) -> PathBuf {
        let path = self.file(&format!("{name}.kubeconfig"));
        let mut new = NamedTempFile::new_in(self.directory.path()).expect("a temporary file");
        let text = Self::kubeconfig_value(cluster, user).to_string();
        new.write_all(text.as_bytes()).expect("write a kubeconfig");
        new.persist(&path).expect("rename a file");
        path
    }

    /// The server on this port, in kubeconfig's format.
    fn cluster(&self, port: u16) -> Value {
        json!({
            "server": format!("https://127.0.0.1:{port}"),
            "certificate-authority": self.file("certs").join("apiserver.crt"),
        })
    }

    fn kubeconfig_value(cluster: &Value, user: &Value) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "c", "cluster": cluster }],
            "users": [{ "name": "u", "user": user }],
            "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
            "current-context": "x",
        })
    }

    /// The path of a file in the server's directory, which is removed with the server.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Creates an object, or updates it to this state.
    #[track_caller]
    pub fn apply(&self, object: &Value) -> DynamicObject {
        let patch = PatchParams::apply("tests").force();
        let applied = self.with(async |client| {
            let (api, name) = api_of(client, object);
            api.patch(&name, &patch, &Patch::Apply(object)).await
        });
        applied.unwrap_or_else(|e| panic!("apply {object}: {e}"))
    }

    /// Changes the status of an object, as its controller would.
    #[track_caller]
    pub fn set_status(&self, object: &Value, status: &Value) {
        let patch = Patch::Merge(json!({ "status": status }));
        let patched = self.with(async |client| {
            let (api, name) = api_of(client, object);
            api.patch_status(&name, &PatchParams::default(), &patch)
                .await
        });
        patched.unwrap_or_else(|e| panic!("status of {object}: {e}"));
    }

    /// Deletes an object at once.
    #[track_caller]
    pub fn delete(&self, object: &Value) {
        let deleted = self.with(async |client| {
            let (api, name) = api_of(client, object);
            api.delete(&name, &DeleteParams::default().grace_period(0))
                .await
        });
        deleted.unwrap_or_else(|e| panic!("delete {object}: {e}"));
    }

    /// All objects of the same kind as this one, and of its namespace if it has one.
    #[track_caller]
    pub fn list(&self, like: &Value) -> Vec<DynamicObject> {
        let listed = self.with(async |client| {
            let (api, _) = api_of(client, like);
            api.list(&kube::api::ListParams::default()).await
        });
        listed.unwrap_or_else(|e| panic!("list {like}: {e}")).items
    }

    /// The HTTP status of the response to a request of this identity.
    #[track_caller]
    pub fn asked_by(&self, identity: Identity, method: &str, path: &str, body: &Value) -> u16 {
        let content = match method {
            "PATCH" => "application/merge-patch+json",
            _ => "application/json",
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", content)
            .body(body.to_string().into_bytes())
            .expect("a request");
        match self.with_as(identity, async |client| client.request_text(request).await) {
            Ok(_) => 200,
            Err(kube::Error::Api(status)) => status.code,
            Err(error) => panic!("{method} {path}: {error}"),
        }
    }

    /// Changes the object at this path by a JSON patch, as administrator.
    #[track_caller]
    pub fn patch_json(&self, path: &str, changes: &Value) {
        let request = Request::patch(path)
            .header("content-type", "application/json-patch+json")
            .body(changes.to_string().into_bytes())
            .expect("a request");
        let patched = self.with(async |client| client.request_text(request).await);
        patched.unwrap_or_else(|e| panic!("patch {path}: {e}"));
    }

    /// Creates an `EndpointSlice` of a Service, if the server supports version v1 of them.
    #[track_caller]
    pub fn apply_slice(&self, namespace: &str, service: &str, addresses: &[&str]) {
        let has_slices = self.with(async |client| {
            let served = client.list_api_group_resources("discovery.k8s.io/v1").await;
            served.is_ok()
        });
        if has_slices {
            self.apply(&json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "namespace": namespace,
                    "name": format!("{service}-x"),
                    "labels": { "kubernetes.io/service-name": service },
                },
                "addressType": "IPv4",
                "endpoints": [{ "addresses": addresses }],
                "ports": [],
            }));
        }
    }

    /// Creates a namespace with these annotations.
    #[track_caller]
    pub fn namespace(&self, name: &str, annotations: &Value) {
        self.apply(&json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": { "name": name, "annotations": annotations },
        }));
    }

    /// Grants the agent these rights everywhere. An earlier grant under the same name is replaced.
    #[track_caller]
    pub fn allow_agent(&self, name: &str, rules: &Value) {
        self.apply(&json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": { "name": name },
            "rules": rules,
        }));
        self.apply(&json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": { "name": name },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name },
            "subjects": [{
                "kind": "User",
                "apiGroup": "rbac.authorization.k8s.io",
                "name": Identity::Agent.user().0,
            }],
        }));
    }

    /// Performs requests as administrator. Each call uses a new connection, because an earlier one may have
    /// died with an earlier server.
    fn with<T>(&self, ask: impl AsyncFnOnce(Client) -> T) -> T {
        self.with_as(Identity::Admin, ask)
    }

    fn with_as<T>(&self, identity: Identity, ask: impl AsyncFnOnce(Client) -> T) -> T {
        self.block_on(async {
            let config = self.config(identity).await;
            ask(Client::try_from(config).expect("a client")).await
        })
    }

    /// The client configuration of this identity.
    pub(crate) async fn config(&self, identity: Identity) -> Config {
        let user = json!({ "token": identity.token() });
        let kubeconfig = Self::kubeconfig_value(&self.cluster(self.port), &user);
        let read: Kubeconfig = serde_json::from_value(kubeconfig).expect("a kubeconfig");
        Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
            .await
            .expect("a configuration")
    }

    fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        let runtime = self.runtime.lock().unwrap_or_else(PoisonError::into_inner);
        runtime.block_on(future)
    }

    fn server(&self) -> MutexGuard<'_, Option<Process>> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the server; false if it ends or does not answer.
    fn try_run(&self) -> bool {
        let file = |name: &str| self.file(name).display().to_string();
        let etcd = format!("http://127.0.0.1:{}", self.etcd_port);
        let mut command = Command::new(apiserver());
        for (flag, value) in [
            ("etcd-servers", etcd),
            ("bind-address", "127.0.0.1".into()),
            ("secure-port", self.port.to_string()),
            ("advertise-address", ADVERTISED.into()),
            ("cert-dir", file("certs")),
            ("token-auth-file", file("tokens.csv")),
            ("authorization-mode", "RBAC".into()),
            // Pods in these tests need no service account.
            ("disable-admission-plugins", "ServiceAccount".into()),
            ("service-cluster-ip-range", "10.96.0.0/16,fd96::/112".into()),
            // A beta feature of the next release, and always there in current ones.
            ("feature-gates", "IPv6DualStack=true".into()),
            (
                "service-account-issuer",
                "https://kubernetes.default.svc".into(),
            ),
            ("service-account-key-file", file("sa.key")),
            ("service-account-signing-key-file", file("sa.key")),
        ] {
            command.arg(format!("--{flag}={value}"));
        }
        let mut process = Process::start(&mut command, &self.file("apiserver.log"));
        let start = Instant::now();
        while start.elapsed() < START {
            if process.has_ended() {
                return false;
            }
            if self.file("certs").join("apiserver.crt").exists() && self.answers() {
                *self.server() = Some(process);
                return true;
            }
            thread::sleep(POLL);
        }
        false
    }

    fn answers(&self) -> bool {
        self.with(async |client| {
            let request = Request::get("/readyz").body(Vec::new()).expect("a request");
            let asked = client.request_text(request);
            let answer = tokio::time::timeout(Duration::from_secs(5), asked).await;
            matches!(answer, Ok(Ok(text)) if text == "ok")
        })
    }

    fn log(&self) -> String {
        let log = fs::read_to_string(self.file("apiserver.log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        // The server must end before its etcd.
        *self.server() = None;
        let _ = self.etcd.0.kill();
    }
}

/// The API of the object's kind, in its namespace if it has one, and the object's name.
fn api_of(client: Client, object: &Value) -> (Api<DynamicObject>, String) {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let version = text(&object["apiVersion"]).expect("an apiVersion");
    let kind = text(&object["kind"]).expect("a kind");
    let (group, version) = version.rsplit_once('/').unwrap_or(("", &version));
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &kind));
    let metadata = &object["metadata"];
    let api = match text(&metadata["namespace"]) {
        Some(namespace) => Api::namespaced_with(client, &namespace, &resource),
        None => Api::all_with(client, &resource),
    };
    (api, text(&metadata["name"]).unwrap_or_default())
}

/// `KUBE_APISERVER`, or the server that setup has built.
fn apiserver() -> PathBuf {
    if let Some(named) = env::var_os("KUBE_APISERVER") {
        return named.into();
    }
    let built = workspace::root().join(BUILT);
    assert!(
        built.exists(),
        "there is no {}: run `cargo xtask setup`, which builds it, or name another with \
         KUBE_APISERVER",
        built.display()
    );
    built
}

pub(crate) fn start_etcd(directory: &Path) -> (Process, u16) {
    let program = env::var_os("ETCD").unwrap_or_else(|| "etcd".into());
    let log = directory.join("etcd.log");
    for attempt in 0..ATTEMPTS {
        let (clients, peers) = (free_port(), free_port());
        let address = |port| format!("http://127.0.0.1:{port}");
        let mut command = Command::new(&program);
        command
            .arg("--data-dir")
            .arg(directory.join(format!("etcd-{attempt}")))
            .args(["--listen-client-urls", &address(clients)])
            .args(["--advertise-client-urls", &address(clients)])
            .args(["--listen-peer-urls", &address(peers)])
            .args(["--initial-advertise-peer-urls", &address(peers)])
            .args(["--initial-cluster", &format!("default={}", address(peers))]);
        let mut process = Process::start(&mut command, &log);
        let start = Instant::now();
        while start.elapsed() < START && !process.has_ended() {
            if std::net::TcpStream::connect(("127.0.0.1", clients)).is_ok() {
                return (process, clients);
            }
            thread::sleep(POLL);
        }
    }
    let log = fs::read_to_string(log).unwrap_or_default();
    panic!("no etcd (package etcd-server; ETCD names another); its log:\n{log}");
}

/// Creates the key with which the server signs service accounts' tokens; no test uses such a token.
fn make_key(directory: &Path) {
    let mut command = Command::new("openssl");
    command
        .args([
            "genpkey",
            "-quiet",
            "-algorithm",
            "RSA",
            "-pkeyopt",
            "rsa_keygen_bits:2048",
        ])
        .arg("-out")
        .arg(directory.join("sa.key"));
    let made = command.output().expect("openssl, of the package openssl");
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").port()
}
