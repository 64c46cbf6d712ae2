//! Attaches the programs to interfaces in a way that outlives the agent.

use std::{fs, io, path::Path};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    programs::{SchedClassifier, TcAttachType},
    util::KernelVersion,
};
use egress_common::ids::IfIndex;

use super::{Datapath, clsact, stamp_check, tcx};

/// The way in which programs are attached to an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attach {
    /// tcx if the kernel has it (6.6), otherwise clsact.
    #[default]
    Auto,
    /// tcx links.
    Tcx,
    /// Filters on a clsact qdisc.
    Clsact,
}

impl Attach {
    pub(super) fn resolve(self, kernel: KernelVersion) -> Self {
        match self {
            Self::Auto if kernel >= KernelVersion::new(6, 6, 0) => Self::Tcx,
            Self::Auto => Self::Clsact,
            chosen => chosen,
        }
    }
}

/// One of the two programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Ingress of the host end: packets from the pod.
    FromPod,
    /// Egress of the host end: packets to the pod.
    ToPod,
}

impl Hook {
    /// Both programs, in the order in which they are attached.
    pub const BOTH: [Self; 2] = [Self::ToPod, Self::FromPod];

    pub(super) const fn program(self) -> &'static str {
        match self {
            Self::FromPod => "from_pod",
            Self::ToPod => "to_pod",
        }
    }

    pub(super) const fn attach_type(self) -> TcAttachType {
        match self {
            Self::FromPod => TcAttachType::Ingress,
            Self::ToPod => TcAttachType::Egress,
        }
    }
}

/// The position of one of the programs on an interface's hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Position {
    /// In front of all others.
    First,
    /// Behind the program that the text describes.
    Behind(String),
    /// Not attached.
    Missing,
}

impl Datapath {
    /// Attaches both programs to an interface, or replaces those of an earlier agent without a gap.
    ///
    /// `to_pod` comes first: no response may pass unheld while queries are already held.
    ///
    /// # Errors
    ///
    /// When the interface does not exist or the kernel rejects it.
    pub fn attach(&mut self, ifindex: IfIndex) -> Result<()> {
        for hook in Hook::BOTH {
            self.attach_one(ifindex, hook)?;
        }
        // An earlier agent may have attached the programs in the other way. Both together would hold each DNS
        // message twice, and the second time the mark would be unknown.
        let links = self.layout.links();
        match self.attach {
            Attach::Clsact => tcx::detach(&links, ifindex),
            Attach::Auto | Attach::Tcx => clsact::detach(&links, ifindex),
        }
    }

    /// Attaches one program, and replaces that of an earlier agent or an existing one.
    pub(super) fn attach_one(&mut self, ifindex: IfIndex, hook: Hook) -> Result<()> {
        match self.attach {
            Attach::Clsact => self.attach_clsact(ifindex, hook),
            Attach::Auto | Attach::Tcx => self.attach_tcx(ifindex, hook),
        }
        .with_context(|| format!("cannot attach `{}` to interface {ifindex}", hook.program()))
    }

    /// Detaches both programs; a missing one is not an error. When this returns, neither runs there any
    /// more.
    ///
    /// # Errors
    ///
    /// When a pin, a filter, or its element in the stamp check cannot be removed.
    pub fn detach(&mut self, ifindex: IfIndex) -> Result<()> {
        self.exempt_from_stamps(ifindex)?;
        let links = self.layout.links();
        // After its pin is removed, the kernel detaches a link with a delay; after its last descriptor is
        // closed, at once.
        let held = tcx::links(&links, ifindex)?;
        detach(&links, ifindex)?;
        drop(held);
        Ok(())
    }

    /// Detaches the programs from every interface with pinned links or clsact filters of ours, without
    /// waiting for the last packet. Removes the stamp check first.
    ///
    /// # Errors
    ///
    /// When a table, a pin or a filter cannot be removed.
    pub fn detach_all(&mut self) -> Result<()> {
        stamp_check::remove()?;
        detach_all(&self.layout.links()).map(drop)
    }

    /// The interfaces with pinned links or clsact filters of ours.
    ///
    /// # Errors
    ///
    /// When the directory of links cannot be read.
    pub fn attached(&self) -> Result<Vec<IfIndex>> {
        attached(&self.layout.links())
    }

    pub(super) fn program(&mut self, hook: Hook) -> Result<&mut SchedClassifier> {
        let program = self
            .ebpf
            .program_mut(hook.program())
            .ok_or_else(|| anyhow!("the eBPF object has no program `{}`", hook.program()))?;
        Ok(program.try_into()?)
    }

    /// The position of one of the programs on an interface's hook.
    ///
    /// # Errors
    ///
    /// When the interface does not exist or the kernel does not answer.
    pub fn position(&mut self, ifindex: IfIndex, hook: Hook) -> Result<Position> {
        if self.attach != Attach::Clsact {
            return self.tcx_position(ifindex, hook);
        }
        // tcx programs run before every filter. Kernels without tcx reject the query.
        let before = tcx::programs(ifindex, hook).unwrap_or_default();
        match before.first() {
            Some((_, name)) => Ok(Position::Behind(format!("the tcx program `{name}`"))),
            None => self.clsact_position(ifindex, hook),
        }
    }

    /// Moves one of the programs in front of all others on an interface's hook. No packet passes unjudged
    /// in between.
    ///
    /// # Errors
    ///
    /// When nothing can be put in front of another program, or the kernel rejects it.
    pub fn come_first(&mut self, ifindex: IfIndex, hook: Hook) -> Result<()> {
        match self.attach {
            Attach::Clsact => self.clsact_first(ifindex, hook),
            Attach::Auto | Attach::Tcx => self.tcx_first(ifindex, hook),
        }
    }
}

/// Detaches everything in the directory of links. Returns the number of interfaces.
pub(super) fn detach_all(links: &Path) -> Result<usize> {
    let interfaces = attached(links)?;
    for &ifindex in &interfaces {
        detach(links, ifindex)?;
    }
    Ok(interfaces.len())
}

fn detach(links: &Path, ifindex: IfIndex) -> Result<()> {
    tcx::detach(links, ifindex)?;
    clsact::detach(links, ifindex)
}

fn attached(links: &Path) -> Result<Vec<IfIndex>> {
    let mut interfaces = Vec::new();
    let entries = match fs::read_dir(links) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(interfaces),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read {}", links.display()));
        }
    };
    for entry in entries {
        let name = entry
            .context("cannot read the directory of links")?
            .file_name();
        let ifindex = name
            .to_str()
            .and_then(|name| name.split('_').next()?.parse().ok());
        interfaces.extend(ifindex.map(IfIndex::new));
    }
    interfaces.sort_unstable();
    interfaces.dedup();
    Ok(interfaces)
}
