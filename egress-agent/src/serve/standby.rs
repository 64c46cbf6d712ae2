//! What an agent answers on its socket while it stands by for another one's end: whether it is ready to take over.

use std::{path::Path, time::Duration};

use super::{
    connections::Connections,
    protocol::{Request, Response},
    socket::{Bound, read_request, write_response},
};

/// How long to wait before listening is tried again.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// Most clients at once.
const CLIENTS: usize = 4;
/// How long one may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Answers until it is dropped; the socket is removed then. `missing` says what this agent lacks before it
/// can take over. Where the other agent has the same socket, nothing is answered.
pub async fn stand_by(path: &Path, missing: impl Fn() -> Vec<String>) {
    let bound = loop {
        match Bound::open(path) {
            Ok(bound) => break bound,
            Err(error) => {
                tracing::debug!(error = %format!("{error:#}"), "cannot say that this agent stands by");
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
            // A client that has gone needs no answer.
            let _ = write_response(&mut stream, &response).await;
        });
    }
}
