//! Finding packet sockets and XDP programs, which see packets of enforced interfaces before the agent's programs do.
//!
//! They do not make a pod count as not enforced: a packet capture is one of them and does no harm. But a datapath
//! that forwards the packets that it reads there also forwards packets that are reported as denied.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use egress_common::ids::IfIndex;

use crate::host::{self, TapWatch, interface_name};

/// How often to look.
const EVERY: Duration = Duration::from_secs(5);

/// Packet sockets and XDP programs, as of the last look.
pub(in crate::control) struct Taps {
    watch: TapWatch,
    looked: Option<Instant>,
    found: host::Taps,
    failed: Option<String>,
}

impl Taps {
    pub(in crate::control) fn open() -> Result<Self> {
        Ok(Self {
            watch: TapWatch::open().context("cannot look for packet sockets and XDP programs")?,
            looked: None,
            found: host::Taps::default(),
            failed: None,
        })
    }

    /// Looks for them when it is time to.
    pub(in crate::control) fn look(&mut self) {
        if self.looked.is_some_and(|at| at.elapsed() < EVERY) {
            return;
        }
        self.looked = Some(Instant::now());
        match self.watch.look() {
            Ok(taps) => (self.found, self.failed) = (taps, None),
            Err(error) => {
                self.failed = Some(format!(
                    "cannot look for packet sockets and XDP programs: {error}"
                ));
            }
        }
    }

    /// The problem of the whole node, and what it is about.
    pub(in crate::control) fn of_node(&self) -> Option<(String, String)> {
        let what = match (&self.failed, self.found.on_all) {
            (Some(failed), _) => failed.clone(),
            (None, 0) => return None,
            (None, _) => format!("a packet socket reads on every interface, {READS}"),
        };
        Some(("packet sockets".to_owned(), what))
    }

    /// The problems of these interfaces.
    pub(in crate::control) fn of(&self, interfaces: &[IfIndex]) -> Vec<String> {
        let mut problems = Vec::new();
        for &ifindex in interfaces {
            let name = || interface_name(ifindex).unwrap_or_else(|| ifindex.to_string());
            if self.found.has_socket(ifindex) {
                problems.push(format!(
                    "a packet socket reads on interface {}, {READS}",
                    name()
                ));
            }
            if let Some(program) = self.found.xdp(ifindex) {
                problems.push(format!(
                    "an XDP program (id {program}) is on interface {} and sees packets before they are \
                     judged: what it redirects leaves, whatever the policy says",
                    name()
                ));
            }
        }
        problems
    }
}

const READS: &str = "before packets are judged: a capture, as by tcpdump, does no harm; a datapath that \
                     forwards what it reads, as Open vSwitch's netdev does, sends what is denied. `ss \
                     --packet --processes` shows whose it is";
