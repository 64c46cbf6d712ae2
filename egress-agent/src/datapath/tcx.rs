//! Attaches the programs through tcx links (kernel 6.6 and newer).

use std::{fs, io, path::Path};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    programs::{
        LinkOrder, ProgramError, SchedClassifier,
        links::{FdLink, LinkError, PinnedLink},
        tc::{SchedClassifierLink, TcAttachOptions},
    },
    sys::SyscallError,
};
use egress_common::ids::IfIndex;

use super::{
    Datapath,
    links::{Hook, Position},
    pins::remove_if_there,
};
use crate::host::interface_name;

impl Datapath {
    /// Attaches one program, and replaces that of an earlier agent or an existing one.
    pub(super) fn attach_tcx(&mut self, ifindex: IfIndex, hook: Hook) -> Result<()> {
        let (pin, next) = pins(&self.layout.links(), ifindex, hook);
        let program = self.program(hook)?;
        let mut attached = false;
        if let Some(link) = pinned(&pin)? {
            match program.attach_to_link(SchedClassifierLink::try_from(link)?) {
                Ok(id) => {
                    // The pin keeps the link; this is only a second handle.
                    drop(program.take_link(id)?);
                    attached = true;
                }
                // The link has outlived its interface, and the index belongs to a new one now.
                Err(error) if is_defunct(&error) => remove_if_there(&pin)?,
                Err(error) => return Err(error.into()),
            }
        }
        if !attached {
            let link = attach_first(program, ifindex, hook)?;
            link.pin(&pin)
                .with_context(|| format!("cannot pin {}", pin.display()))?;
        }
        // An agent that was killed while it moved its program has left a second link.
        remove_if_there(&next)
    }

    /// The position of the program on its hook.
    pub(super) fn tcx_position(&mut self, ifindex: IfIndex, hook: Hook) -> Result<Position> {
        let program = self.program(hook)?.info()?.id();
        let attached = programs(ifindex, hook)?;
        let mut attached = attached.iter();
        Ok(match attached.next() {
            Some((first, _)) if *first == program => Position::First,
            Some((_, name)) if attached.any(|(id, _)| *id == program) => {
                Position::Behind(format!("the tcx program `{name}`"))
            }
            _ => Position::Missing,
        })
    }

    /// Moves the program in front of all others on its hook.
    ///
    /// A link cannot be moved, and a program cannot be attached twice to one hook. So the link is updated to
    /// a copy of the program, the program is attached in front, and then the link is removed: nothing passes
    /// unjudged. In between (the kernel waits for two grace periods) a frame may meet both: the same rules
    /// judge it twice, and a DNS message may be lost, as any datagram may be.
    pub(super) fn tcx_first(&mut self, ifindex: IfIndex, hook: Hook) -> Result<()> {
        let (pin, next) = pins(&self.layout.links(), ifindex, hook);
        let behind = pinned(&pin)?.context("the program's link is gone")?;
        let name = hook.program();
        let copy: &mut SchedClassifier = self
            .stand_in()?
            .program_mut(name)
            .ok_or_else(|| anyhow!("the eBPF object has no program `{name}`"))?
            .try_into()?;
        let id = copy.attach_to_link(SchedClassifierLink::try_from(behind)?)?;
        // This is the link's last descriptor: dropping it detaches the link at once.
        let behind = copy.take_link(id)?;
        let link = attach_first(self.program(hook)?, ifindex, hook)?;
        remove_if_there(&next)?;
        link.pin(&next)
            .with_context(|| format!("cannot pin {}", next.display()))?;
        fs::rename(&next, &pin).with_context(|| format!("cannot move {}", pin.display()))?;
        drop(behind);
        Ok(())
    }
}

/// Removes the pins of both programs, and the links with them.
pub(super) fn detach(links: &Path, ifindex: IfIndex) -> Result<()> {
    for hook in Hook::BOTH {
        let (pin, next) = pins(links, ifindex, hook);
        remove_if_there(&pin)?;
        remove_if_there(&next)?;
    }
    Ok(())
}

/// The pinned links of both programs.
pub(super) fn links(links: &Path, ifindex: IfIndex) -> Result<Vec<FdLink>> {
    let mut found = Vec::new();
    for hook in Hook::BOTH.iter().rev() {
        let (pin, next) = pins(links, ifindex, *hook);
        found.extend(pinned(&pin)?);
        found.extend(pinned(&next)?);
    }
    Ok(found)
}

/// Ids and names of the programs on a hook, in the order in which packets meet them.
pub(super) fn programs(ifindex: IfIndex, hook: Hook) -> Result<Vec<(u32, String)>> {
    let name = name_of(ifindex)?;
    let (_, programs) = SchedClassifier::query_tcx(&name, hook.attach_type())?;
    Ok(programs
        .iter()
        .map(|program| {
            let name = program.name_as_str().unwrap_or("?");
            (program.id(), name.to_owned())
        })
        .collect())
}

/// The pin of a program's link, and the pin of a link that is to replace it.
fn pins(links: &Path, ifindex: IfIndex, hook: Hook) -> (std::path::PathBuf, std::path::PathBuf) {
    let name = format!("{ifindex}_{}", hook.program());
    (links.join(&name), links.join(format!("{name}_new")))
}

fn attach_first(program: &mut SchedClassifier, ifindex: IfIndex, hook: Hook) -> Result<FdLink> {
    let name = name_of(ifindex)?;
    let id = program.attach_with_options(
        &name,
        hook.attach_type(),
        TcAttachOptions::TcxOrder(LinkOrder::first()),
    )?;
    Ok(program.take_link(id)?.try_into()?)
}

fn name_of(ifindex: IfIndex) -> Result<String> {
    interface_name(ifindex).with_context(|| format!("there is no interface with index {ifindex}"))
}

fn pinned(path: &Path) -> Result<Option<FdLink>> {
    match PinnedLink::from_pin(path) {
        Ok(link) => Ok(Some(link.into())),
        Err(LinkError::SyscallError(SyscallError { io_error, .. }))
            if io_error.kind() == io::ErrorKind::NotFound =>
        {
            Ok(None)
        }
        Err(error) => {
            Err(error).with_context(|| format!("cannot open the pinned link {}", path.display()))
        }
    }
}

/// `bpf_link_update` on a tcx link without an interface returns ENOLINK (`tcx_link_update`,
/// `kernel/bpf/tcx.c`).
fn is_defunct(error: &ProgramError) -> bool {
    matches!(
        error,
        ProgramError::SyscallError(SyscallError { io_error, .. })
            if io_error.raw_os_error() == Some(libc::ENOLINK)
    )
}
