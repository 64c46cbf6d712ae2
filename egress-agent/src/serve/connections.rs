//! A bounded number of connections, of which nobody can keep others out.

use std::{collections::VecDeque, net::IpAddr, time::Duration};

use tokio::task::AbortHandle;

/// Open connections, the oldest first. Each ends by itself after a while; when there are too many, the
/// oldest gives way, one of the same peer before others. So whoever holds connections open ends
/// their own.
pub(super) struct Connections {
    open: VecDeque<(Option<IpAddr>, AbortHandle)>,
    most: usize,
    most_of_peer: usize,
    patience: Duration,
}

impl Connections {
    /// At most this many, and this many of one peer, each for as long as `patience`.
    pub(super) fn new(most: usize, most_of_peer: usize, patience: Duration) -> Self {
        Self {
            open: VecDeque::new(),
            most,
            most_of_peer,
            patience,
        }
    }

    /// Serves a connection until it ends or has to give way.
    pub(super) fn serve(
        &mut self,
        peer: Option<IpAddr>,
        connection: impl Future<Output = ()> + Send + 'static,
    ) {
        self.open.retain(|(_, task)| !task.is_finished());
        let of_peer = self.open.iter().filter(|(other, _)| *other == peer).count();
        let oldest = if of_peer >= self.most_of_peer {
            self.open.iter().position(|(other, _)| *other == peer)
        } else if self.open.len() >= self.most {
            Some(0)
        } else {
            None
        };
        if let Some((_, task)) = oldest.and_then(|at| self.open.remove(at)) {
            task.abort();
        }
        let limited = tokio::time::timeout(self.patience, connection);
        let task = tokio::spawn(async move {
            // What takes too long is ended; whoever asked sees it.
            let _ = limited.await;
        });
        self.open.push_back((peer, task.abort_handle()));
    }
}
