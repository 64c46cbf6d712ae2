//! Attaching the programs to interfaces, so that they stay when the agent is gone.

use std::{fs, io, path::Path};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    programs::{SchedClassifier, TcAttachType},
    util::KernelVersion,
};

use super::{Datapath, clsact, stamp_check, tcx};

/// How programs are attached to an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attach {
    /// tcx where the kernel has it (6.6), clsact below.
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

/// Which of the two programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Ingress of the host end: what the pod sends.
    FromPod,
    /// Egress of the host end: what the pod receives.
    ToPod,
}

impl Hook {
    /// Both, in the order in which they are attached.
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

/// Where one of the programs stands on an interface's hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// In front of all others.
    First,
    /// Behind what the text describes.
    Behind(String),
    /// It is not there.
    Missing,
}

impl Datapath {
    /// Attaches both programs to an interface, or replaces those of an earlier agent without a gap.
    ///
    /// `to_pod` comes first: an answer must not slip by while questions are already held.
    ///
    /// # Errors
    ///
    /// When the interface does not exist or the kernel refuses.
    pub fn attach(&mut self, ifindex: u32) -> Result<()> {
        for hook in Hook::BOTH {
            self.attach_one(ifindex, hook)?;
        }
        // An earlier agent may have attached the other way. Both together would hold each DNS
        // message twice, and the second time nobody would know its mark.
        let links = self.layout.links();
        match self.attach {
            Attach::Clsact => tcx::detach(&links, ifindex),
            Attach::Auto | Attach::Tcx => clsact::detach(&links, ifindex),
        }
    }

    /// Attaches one program, in place of an earlier agent's or of itself.
    pub(super) fn attach_one(&mut self, ifindex: u32, hook: Hook) -> Result<()> {
        match self.attach {
            Attach::Clsact => self.attach_clsact(ifindex, hook),
            Attach::Auto | Attach::Tcx => self.attach_tcx(ifindex, hook),
        }
        .with_context(|| format!("cannot attach `{}` to interface {ifindex}", hook.program()))
    }

    /// Detaches both programs; what is already gone is no error. When this returns, neither runs
    /// there any more.
    ///
    /// # Errors
    ///
    /// When a pin, a filter, or its element in the stamp check cannot be removed.
    pub fn detach(&mut self, ifindex: u32) -> Result<()> {
        self.release_stamps(ifindex)?;
        let links = self.layout.links();
        // A link whose pin is removed is detached when the kernel gets round to it; one whose last
        // descriptor is closed, at once.
        let held = tcx::links(&links, ifindex)?;
        detach(&links, ifindex)?;
        drop(held);
        Ok(())
    }

    /// Detaches from every interface that has pinned links or clsact filters of ours, without
    /// waiting for the last packet. The stamp check ends before.
    ///
    /// # Errors
    ///
    /// When a table, a pin or a filter cannot be removed.
    pub fn detach_all(&mut self) -> Result<()> {
        stamp_check::remove()?;
        detach_all(&self.layout.links()).map(drop)
    }

    /// Interfaces that have pinned links or clsact filters of ours.
    ///
    /// # Errors
    ///
    /// When the directory of links cannot be read.
    pub fn attached(&self) -> Result<Vec<u32>> {
        attached(&self.layout.links())
    }

    pub(super) fn program(&mut self, hook: Hook) -> Result<&mut SchedClassifier> {
        let program = self
            .ebpf
            .program_mut(hook.program())
            .ok_or_else(|| anyhow!("the eBPF object has no program `{}`", hook.program()))?;
        Ok(program.try_into()?)
    }

    /// Where one of the programs stands on an interface's hook.
    ///
    /// # Errors
    ///
    /// When the interface does not exist or the kernel does not answer.
    pub fn standing(&mut self, ifindex: u32, hook: Hook) -> Result<Standing> {
        if self.attach != Attach::Clsact {
            return self.tcx_standing(ifindex, hook);
        }
        // tcx programs run before every filter. Kernels without tcx refuse the question.
        let before = tcx::programs(ifindex, hook).unwrap_or_default();
        match before.first() {
            Some((_, name)) => Ok(Standing::Behind(format!("the tcx program `{name}`"))),
            None => self.clsact_standing(ifindex, hook),
        }
    }

    /// Puts one of the programs in front of all others on an interface's hook, with no packet
    /// unjudged meanwhile.
    ///
    /// # Errors
    ///
    /// When there is a program that nothing can be put in front of, or the kernel refuses.
    pub fn come_first(&mut self, ifindex: u32, hook: Hook) -> Result<()> {
        match self.attach {
            Attach::Clsact => self.clsact_first(ifindex, hook),
            Attach::Auto | Attach::Tcx => self.tcx_first(ifindex, hook),
        }
    }
}

/// Detaches everything that the directory of links tells of. Returns how many interfaces.
pub(super) fn detach_all(links: &Path) -> Result<usize> {
    let interfaces = attached(links)?;
    for &ifindex in &interfaces {
        detach(links, ifindex)?;
    }
    Ok(interfaces.len())
}

fn detach(links: &Path, ifindex: u32) -> Result<()> {
    tcx::detach(links, ifindex)?;
    clsact::detach(links, ifindex)
}

fn attached(links: &Path) -> Result<Vec<u32>> {
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
        let ifindex: Option<u32> = name
            .to_str()
            .and_then(|name| name.split('_').next()?.parse().ok());
        interfaces.extend(ifindex);
    }
    interfaces.sort_unstable();
    interfaces.dedup();
    Ok(interfaces)
}
