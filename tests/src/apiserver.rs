//! A real Kubernetes API server with its etcd, on loopback.
//!
//! Nothing else of a cluster is there: no scheduler, no controllers and no kubelet. A test plays
//! their part: it binds pods to nodes, reports their status, and deletes them for good.

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
const BUILT: &str = "target/kubernetes/1.20.2/kube-apiserver";
/// How long a server may take until it answers.
const START: Duration = Duration::from_secs(90);
/// How often it is asked.
const POLL: Duration = Duration::from_millis(100);
/// How often another port is tried: a free port may be taken before it is used.
const ATTEMPTS: usize = 5;
/// The address that the server says it has; nothing listens there.
pub const ADVERTISED: &str = "192.0.2.10";
/// The first address of the range of Services: that of the Service `default/kubernetes`.
pub const API_SERVICE: &str = "10.96.0.1";

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// Someone who may do everything.
    Admin,
    /// The agent's service account, `egress-agent` in the namespace of that name, which may do only
    /// what roles allow.
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

    /// The token that stands for it from the first start on.
    pub fn token(self) -> &'static str {
        match self {
            Self::Admin => "token-of-admin",
            Self::Agent => "token-of-agent",
        }
    }
}

/// An API server with its etcd; both are ended, and their files removed, when it is dropped.
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
struct Process(Child);

impl Process {
    fn start(command: &mut Command, log: &Path) -> Self {
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

    fn has_ended(&mut self) -> bool {
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
    /// A server that tests of one binary share while any of them has it. They have to keep to
    /// nodes and namespaces of their own, and must not stop it.
    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<ApiServer>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let server = Arc::new(Self::start());
            *shared = Arc::downgrade(&server);
            server
        })
    }

    /// Starts both, and waits until the server answers.
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

    /// The port that it listens at, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Kills the server; etcd goes on.
    pub fn kill(&self) {
        *self.server() = None;
    }

    /// Starts the server again, at the same port, with what is in etcd.
    #[track_caller]
    pub fn run(&self) {
        assert!(
            self.try_run(),
            "no API server; its log ends with:\n{}",
            self.log()
        );
    }

    /// Says which tokens count from the next start on.
    pub fn write_tokens(&self, tokens: &[(Identity, &str)]) {
        let line = |(identity, token): &(Identity, &str)| {
            let (user, groups) = identity.user();
            format!("{token},{user},{user},\"{groups}\"")
        };
        let lines: Vec<_> = tokens.iter().map(line).collect();
        fs::write(self.file("tokens.csv"), lines.join("\n")).expect("write the tokens");
    }

    /// A kubeconfig of someone.
    pub fn kubeconfig(&self, identity: Identity) -> PathBuf {
        let user = json!({ "token": identity.token() });
        self.kubeconfig_with(&format!("{identity:?}"), self.port, &user)
    }

    /// A kubeconfig for the server at another port, as through a proxy, with this user, under this
    /// name.
    pub fn kubeconfig_with(&self, name: &str, port: u16, user: &Value) -> PathBuf {
        self.kubeconfig_of(name, &self.cluster(port), user)
    }

    /// A kubeconfig for a cluster, as kubeconfigs write it down. Nobody sees it half written.
    pub fn kubeconfig_of(&self, name: &str, cluster: &Value, user: &Value) -> PathBuf {
        let path = self.file(&format!("{name}.kubeconfig"));
        let mut new = NamedTempFile::new_in(self.directory.path()).expect("a temporary file");
        let text = Self::kubeconfig_value(cluster, user).to_string();
        new.write_all(text.as_bytes()).expect("write a kubeconfig");
        new.persist(&path).expect("rename a file");
        path
    }

    /// The server at this port, as kubeconfigs name it.
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

    /// A file of this name in the server's directory, which is gone with it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Creates an object, or makes what it says of itself so.
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

    /// All objects like this one: of its kind, and in its namespace if it has one.
    #[track_caller]
    pub fn list(&self, like: &Value) -> Vec<DynamicObject> {
        let listed = self.with(async |client| {
            let (api, _) = api_of(client, like);
            api.list(&kube::api::ListParams::default()).await
        });
        listed.unwrap_or_else(|e| panic!("list {like}: {e}")).items
    }

    /// Status of the answer that somebody gets who asks for this.
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

    /// Creates an `EndpointSlice` of a Service, if the server has such in version v1.
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

    /// Allows the agent these rules everywhere, and nothing that another call allowed under this
    /// name.
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

    /// Does something as administrator. Each time over a connection of its own, so that one that
    /// died with an earlier server does not matter.
    fn with<T>(&self, ask: impl AsyncFnOnce(Client) -> T) -> T {
        self.with_as(Identity::Admin, ask)
    }

    fn with_as<T>(&self, identity: Identity, ask: impl AsyncFnOnce(Client) -> T) -> T {
        self.block_on(async {
            let config = self.config(identity).await;
            ask(Client::try_from(config).expect("a client")).await
        })
    }

    /// What a client of somebody's needs.
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

    /// Starts the server; false when it ends or does not answer.
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
            // Pods need no service account here.
            ("disable-admission-plugins", "ServiceAccount".into()),
            ("service-cluster-ip-range", "10.96.0.0/16".into()),
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
        // Before its etcd, which it would miss.
        *self.server() = None;
        let _ = self.etcd.0.kill();
    }
}

/// The API of the kind of an object, in its namespace if it has one, and its name.
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

/// `KUBE_APISERVER`, or the one that is built.
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

fn start_etcd(directory: &Path) -> (Process, u16) {
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

/// The key that the server signs service accounts' tokens with; nobody here has such a token.
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
