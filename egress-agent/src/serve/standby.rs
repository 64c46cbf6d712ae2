//! The socket of an agent that stands by until another one ends: it answers whether it is ready to take over.

use std::{path::Path, time::Duration};

use super::{
    connections::Connections,
    protocol::{Request, Response},
    socket::{Bound, read_request, write_response},
};

/// How long to wait before the next attempt to listen.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// Most clients at a time.
const CLIENTS: usize = 4;
/// How long a client may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves until the future is dropped, and then removes the socket. `missing` returns the prerequisites that
/// this agent lacks before it can take over. If the other agent has the same socket, this one serves nothing.
pub async fn stand_by(path: &Path, missing: impl Fn() -> Vec<String>) {
    let bound = loop {
        match Bound::open(path) {
            Ok(bound) => break bound,
            Err(error) => {
                tracing::debug!(
                    error = %format!("{error:#}"),
                    "cannot open the socket while standing by; the agent tries again"
                );
            }
        }
        tokio::time::sleep(RETRY_EVERY).await;
    };
    let mut clients = Connections::new(CLIENTS, CLIENTS, PATIENCE);
    loop {
        let Ok((mut stream, _)) = bound.listener.accept().await else {
            tokio::time::sleep(RETRY_EVERY).await;
            continue;
        };
        let missing = missing();
        clients.serve(None, async move {
            let response = match read_request(&mut stream).await {
                Ok(Ok(Request::Ready)) => Response::Ready(missing),
                Ok(Ok(_)) => Response::Error(
                    "this agent stands by: another one enforces the pods of this node until it ends".into(),
                ),
                Ok(Err(error)) => Response::Error(error),
                Err(_) => return,
            };
            // The client may have gone.
            let _ = write_response(&mut stream, &response).await;
        });
    }
}
