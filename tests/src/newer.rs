//! A proxy that gives the tests' old API server an API of current releases.
//!
//! `EndpointSlices` of version v1: the old server has the objects, lists, watches and rights in version
//! v1beta1. Only the names differ, so the proxy renames them.

use std::{
    io::{Error, Result},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::{AsyncBufReadExt as _, StreamExt as _};
use http::{Request, header::CONTENT_TYPE};
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
};

use crate::{ApiServer, Identity};

/// The path of requests, and the path on the old server.
const PATHS: (&str, &str) = (
    "/apis/discovery.k8s.io/v1/",
    "/apis/discovery.k8s.io/v1beta1/",
);
/// The response about a resource that a server does not have.
const NOT_FOUND: &str = r#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"the server could not find the requested resource","reason":"NotFound","code":404}"#;
/// The version in objects, likewise.
const VERSIONS: (&str, &str) = ("\"discovery.k8s.io/v1\"", "\"discovery.k8s.io/v1beta1\"");

/// The resources that the API does not have now.
type Hidden = Arc<Mutex<Vec<&'static str>>>;

/// Serves the newer API on a port of 127.0.0.1, without TLS, until it is dropped.
#[derive(Debug)]
pub struct NewerApi {
    port: u16,
    hidden: Hidden,
    _runtime: Runtime,
}

impl NewerApi {
    /// Starts a proxy in front of this server.
    #[track_caller]
    pub fn start(server: &ApiServer) -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a tokio runtime");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"));
        let listener = listener.expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let behind: Arc<Config> = Arc::new(runtime.block_on(server.config(Identity::Agent)));
        let hidden = Hidden::default();
        let hides = Arc::clone(&hidden);
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let client = Client::try_from((*behind).clone()).expect("a client");
                let hidden = Arc::clone(&hides);
                // A client that closes the connection ends only this task.
                tokio::spawn(async move { serve(stream, &client, &hidden).await.ok() });
            }
        });
        Self {
            port,
            hidden,
            _runtime: runtime,
        }
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Answers new requests for this resource as a server does that does not have it.
    pub fn hide(&self, resource: &'static str) {
        lock(&self.hidden).push(resource);
    }

    /// Answers requests for every resource again.
    pub fn show_all(&self) {
        lock(&self.hidden).clear();
    }

    /// A kubeconfig for this proxy. All requests have the agent's rights.
    pub fn kubeconfig(&self, server: &ApiServer) -> std::path::PathBuf {
        let url = format!("http://127.0.0.1:{}", self.port);
        server.kubeconfig_of("newer", &json!({ "server": url }), &json!({}))
    }

    /// An `EndpointSlice` of a Service, in the old server's version.
    pub fn slice(namespace: &str, service: &str, name: &str, addresses: &[&str]) -> Value {
        json!({
            "apiVersion": "discovery.k8s.io/v1beta1",
            "kind": "EndpointSlice",
            "metadata": {
                "namespace": namespace,
                "name": name,
                "labels": { "kubernetes.io/service-name": service },
            },
            "addressType": "IPv4",
            "endpoints": [{ "addresses": addresses }],
            "ports": [],
        })
    }
}

/// Answers the requests of one connection, one after the other.
async fn serve(stream: TcpStream, client: &Client, hidden: &Hidden) -> Result<()> {
    let mut stream = BufReader::new(stream);
    while let Some(request) = read(&mut stream).await? {
        let path = request.uri().path();
        let resource = path.rsplit('/').next().unwrap_or_default();
        if lock(hidden).contains(&resource) {
            head(&mut stream, 404).await?;
            chunk(&mut stream, NOT_FOUND).await?;
            stream.write_all(b"0\r\n\r\n").await?;
            continue;
        }
        let answered = client.request_stream(request).await;
        let lines = match answered {
            Ok(lines) => lines,
            Err(kube::Error::Api(status)) => {
                let body = serde_json::to_string(&status)?;
                head(&mut stream, status.code).await?;
                chunk(&mut stream, &body).await?;
                stream.write_all(b"0\r\n\r\n").await?;
                continue;
            }
            Err(error) => return Err(Error::other(error)),
        };
        head(&mut stream, 200).await?;
        let mut lines = std::pin::pin!(lines.lines());
        while let Some(line) = lines.next().await {
            let (new, old) = VERSIONS;
            let renamed = line?.replace(old, new);
            chunk(&mut stream, &format!("{renamed}\n")).await?;
        }
        stream.write_all(b"0\r\n\r\n").await?;
    }
    Ok(())
}

fn lock(hidden: &Hidden) -> MutexGuard<'_, Vec<&'static str>> {
    hidden.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The next request, in the old server's terms; `None` at the end of the stream.
async fn read(stream: &mut BufReader<TcpStream>) -> Result<Option<Request<Vec<u8>>>> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    let mut words = line.split(' ');
    let (Some(method), Some(path)) = (words.next(), words.next()) else {
        return Err(Error::other(format!("no request: {line}")));
    };
    let (new, old) = PATHS;
    let path = match path.strip_prefix(new) {
        Some(rest) => format!("{old}{rest}"),
        None => path.to_owned(),
    };
    let mut request = Request::builder().method(method).uri(path);
    let mut length = 0;
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            break;
        };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().map_err(Error::other)?,
            "accept" | "content-type" => request = request.header(name, value),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    request.body(body).map(Some).map_err(Error::other)
}

async fn head(stream: &mut BufReader<TcpStream>, code: u16) -> Result<()> {
    let head = format!(
        "HTTP/1.1 {code} -\r\n{CONTENT_TYPE}: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await
}

async fn chunk(stream: &mut BufReader<TcpStream>, text: &str) -> Result<()> {
    let chunk = format!("{:x}\r\n{text}\r\n", text.len());
    stream.write_all(chunk.as_bytes()).await
}
