//! Saying what sees the packets of enforced interfaces before the programs do.
//!
//! None of it makes a pod count as not enforced: a capture is such a reader, too, and harmless. But a
//! datapath that reads packets there and forwards them sends what is reported as denied.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::host::{self, TapWatch, interface_name};

/// How often to look.
const EVERY: Duration = Duration::from_secs(5);

/// What sees packets first, as it was last looked for.
pub(in crate::control) struct Taps {
    watch: TapWatch,
    looked: Option<Instant>,
    taps: host::Taps,
    failed: Option<String>,
}

impl Taps {
    pub(in crate::control) fn open() -> Result<Self> {
        Ok(Self {
            watch: TapWatch::open().context("cannot look for packet sockets and XDP programs")?,
            looked: None,
            taps: host::Taps::default(),
            failed: None,
        })
    }

    /// Looks, if it is time to.
    pub(in crate::control) fn look(&mut self) {
        if self.looked.is_some_and(|at| at.elapsed() < EVERY) {
            return;
        }
        self.looked = Some(Instant::now());
        match self.watch.look() {
            Ok(taps) => (self.taps, self.failed) = (taps, None),
            Err(error) => {
                self.failed = Some(format!(
                    "cannot look for packet sockets and XDP programs: {error}"
                ));
            }
        }
    }

    /// What is to be said of all interfaces together: where, and what.
    pub(in crate::control) fn of_node(&self) -> Option<(String, String)> {
        let what = match (&self.failed, self.taps.on_all) {
            (Some(failed), _) => failed.clone(),
            (None, 0) => return None,
            (None, _) => format!("a packet socket reads on every interface, {READS}"),
        };
        Some(("packet sockets".to_owned(), what))
    }

    /// What is to be said of a pod's interfaces.
    pub(in crate::control) fn of(&self, interfaces: &[u32]) -> Vec<String> {
        let mut said = Vec::new();
        for &ifindex in interfaces {
            let name = || interface_name(ifindex).unwrap_or_else(|| ifindex.to_string());
            if self.taps.has_socket(ifindex) {
                said.push(format!(
                    "a packet socket reads on interface {}, {READS}",
                    name()
                ));
            }
            if let Some(program) = self.taps.xdp(ifindex) {
                said.push(format!(
                    "an XDP program (id {program}) is on interface {} and sees packets before they are \
                     judged: what it redirects leaves, whatever the policy says",
                    name()
                ));
            }
        }
        said
    }
}

const READS: &str = "before packets are judged: a capture, as by tcpdump, does no harm; a datapath that \
                     forwards what it reads, as Open vSwitch's netdev does, sends what is denied. `ss \
                     --packet --processes` shows whose it is";
