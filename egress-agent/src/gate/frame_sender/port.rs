//! An interface on which frames are sent.

use std::{io, sync::Arc};

use egress_common::ids::{IfIndex, PodId};

use super::{Frame, lanes::Lost, senders::Senders, sending::send_some, socket::Socket};
use crate::{
    gate::{Stats, tally::Tally},
    report::PodIdentity,
};

/// An interface.
pub(super) struct Port {
    pub(super) pod: PodId,
    pub(super) identity: Arc<PodIdentity>,
    /// `None` before the first frame: a pod without DNS needs no socket.
    pub(super) socket: Option<Arc<Socket>>,
    unsent: Tally,
    /// Why the last frame could not be sent.
    error: Option<io::Error>,
}

impl Port {
    pub(super) fn new(pod: PodId, identity: &Arc<PodIdentity>) -> Self {
        Self {
            pod,
            identity: Arc::clone(identity),
            socket: None,
            unsent: Tally::default(),
            error: None,
        }
    }

    pub(super) fn send(&mut self, frames: &[Frame], bytes: &[u8], stats: &Stats) {
        let mut rest = frames;
        while let Some((_, behind)) = rest.split_first() {
            match self
                .socket()
                .and_then(|socket| send_some(socket, rest, bytes))
            {
                Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
                Err(error) => {
                    // To the pod the message is lost as any datagram may be, and it repeats its query. If the
                    // buffer is full, or no socket can be opened, the remaining frames fail, too.
                    let is_lasting =
                        error.kind() == io::ErrorKind::WouldBlock || self.socket.is_none();
                    let lost = if is_lasting { rest.len() } else { 1 };
                    stats.unsent.add(lost as u64);
                    self.unsent.add(lost as u64);
                    self.error = Some(error);
                    rest = if is_lasting { &[] } else { behind };
                }
            }
        }
    }

    /// Hands the frame to a sending thread.
    pub(super) fn hand_over(
        &mut self,
        senders: &Senders,
        frame: (&Frame, &[u8]),
        wait_ns: u64,
        stats: &Stats,
    ) {
        let pod = self.pod;
        match self.socket() {
            Ok(socket) => senders.push(pod, socket, frame, wait_ns),
            Err(error) => self.note_lost(Some(Lost::one(error)), stats),
        }
    }

    pub(super) fn note_lost(&mut self, lost: Option<Lost>, stats: &Stats) {
        if let Some(lost) = lost {
            stats.unsent.add(lost.frames);
            self.unsent.add(lost.frames);
            self.error = lost.error;
        }
    }

    fn socket(&mut self) -> io::Result<&Arc<Socket>> {
        match &mut self.socket {
            Some(socket) => Ok(socket),
            none => Ok(none.insert(Arc::new(Socket::open_quietly()?))),
        }
    }

    /// Logged once in minutes for each pod.
    pub(super) fn log_slow(&self, ifindex: IfIndex, took_ns: u64) {
        let PodIdentity {
            namespace, name, ..
        } = &*self.identity;
        tracing::warn!(
            pod = %format_args!("{namespace}/{name}"),
            ifindex = ifindex.get(),
            took_ms = took_ns / 1_000_000,
            "the pod takes frames slowly; a separate thread sends its DNS frames"
        );
    }

    pub(super) fn log_unsent(
        &mut self,
        ifindex: IfIndex,
        how_many: impl FnOnce(&mut Tally) -> Option<u64>,
    ) {
        let Some(frames) = how_many(&mut self.unsent) else {
            return;
        };
        let PodIdentity {
            namespace, name, ..
        } = &*self.identity;
        tracing::warn!(
            pod = %format_args!("{namespace}/{name}"),
            ifindex = ifindex.get(),
            frames,
            error = self.error.take().map(tracing::field::display),
            "DNS frames could not be put back and are lost"
        );
    }
}
