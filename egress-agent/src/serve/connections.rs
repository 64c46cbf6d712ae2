//! A bounded set of connections, in which no peer can keep others out.

use std::{collections::VecDeque, net::IpAddr, time::Duration};

use tokio::task::AbortHandle;

/// Open connections, the oldest first. Each one ends after a time limit. When there are too many, the oldest
/// is closed, preferably one of the same peer. So a peer that holds connections open loses only its own.
pub(super) struct Connections {
    open: VecDeque<(Option<IpAddr>, AbortHandle)>,
    most: usize,
    most_of_peer: usize,
    patience: Duration,
}

impl Connections {
    /// At most `most` connections, at most `most_of_peer` of one peer, each for `patience` at most.
    pub(super) fn new(most: usize, most_of_peer: usize, patience: Duration) -> Self {
        Self {
            open: VecDeque::new(),
            most,
            most_of_peer,
            patience,
        }
    }

    /// Serves a connection until it ends, times out or is evicted.
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
            // A connection that takes too long is closed, which the client sees.
            let _ = limited.await;
        });
        self.open.push_back((peer, task.abort_handle()));
    }
}
