//! `/healthz`, `/readyz` and `/metrics`. Anyone on the node's network may connect, so the number of
//! connections, their duration and their requests are bounded.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::net::TcpListener;

use super::{Sources, Tried, connections::Connections, health, listen, metrics};

/// Most connections at a time, and most from one address.
const CONNECTIONS: usize = 64;
const CONNECTIONS_OF_PEER: usize = 16;
/// How long a client may take to send a request's head.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);
/// How long a connection may last.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most headers of a request, and most bytes of its head.
const HEADERS: usize = 64;
const HEAD_BYTES: usize = 16 * 1024;
/// How long to wait after a connection could not be accepted.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Serves until the runtime ends.
pub(super) async fn serve(address: SocketAddr, sources: Arc<Sources>, tried: Tried) {
    let listener = listen(
        &address.to_string(),
        "/healthz, /readyz and /metrics",
        tried,
        async || {
            TcpListener::bind(address)
                .await
                .context("cannot listen there")
        },
    )
    .await;
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics_page))
        .with_state(sources);
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .keep_alive(false)
        .max_headers(HEADERS)
        .max_buf_size(HEAD_BYTES);
    let mut connections = Connections::new(CONNECTIONS, CONNECTIONS_OF_PEER, PATIENCE);
    loop {
        let Ok((stream, peer)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_AGAIN).await;
            continue;
        };
        let service = TowerToHyperService::new(router.clone());
        let connection = http.serve_connection(TokioIo::new(stream), service);
        connections.serve(Some(peer.ip()), async {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "an HTTP connection failed");
            }
        });
    }
}

async fn healthz(State(sources): State<Arc<Sources>>) -> Response {
    page(&health::unwell(&sources))
}

async fn readyz(State(sources): State<Arc<Sources>>) -> Response {
    page(&health::unready(&sources))
}

fn page(wrong: &[String]) -> Response {
    if wrong.is_empty() {
        return (StatusCode::OK, "ok\n").into_response();
    }
    let lines: String = wrong
        .iter()
        .flat_map(|line| [line.as_str(), "\n"])
        .collect();
    (StatusCode::SERVICE_UNAVAILABLE, lines).into_response()
}

async fn metrics_page(State(sources): State<Arc<Sources>>) -> Response {
    match metrics::text(&sources) {
        Ok(text) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => {
            tracing::error!(error = %format!("{error:#}"), "cannot collect metrics");
            (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")).into_response()
        }
    }
}
