//! Runs a program on a frame that no interface carries (`BPF_PROG_TEST_RUN`). The maps change as they
//! would with a real packet.

use std::time::Duration;

use anyhow::{Context as _, Result};
use aya::{TestRun as _, TestRunOptions};
use egress_common::ids::IfIndex;

use super::{Datapath, Hook};

/// Length and offsets of `struct __sk_buff`, `include/uapi/linux/bpf.h`.
const SK_BUFF: usize = 192;
const MARK: usize = 8;
const IFINDEX: usize = 40;

/// The result of running a program on a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DryRun {
    /// The verdict that the program returned.
    pub action: Action,
    /// The frame's mark afterwards.
    pub mark: u32,
    /// How long one run took on average.
    pub duration: Duration,
}

/// The verdict that a program returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The frame continues.
    Pass,
    /// It is dropped.
    Drop,
    /// It is turned round.
    Redirect,
    /// Another value.
    Other(u32),
}

impl Datapath {
    /// How many instructions the verifier examined before it accepted a program; its limit is one
    /// million. `None` below kernel 5.16, which does not report the number.
    ///
    /// # Errors
    ///
    /// When the kernel cannot describe the program.
    pub fn verified_instructions(&mut self, hook: Hook) -> Result<Option<u32>> {
        let info = self.program(hook)?.info().with_context(|| {
            format!(
                "cannot read the kernel's description of the program `{}`",
                hook.program()
            )
        })?;
        Ok(info.verified_instruction_count())
    }

    /// Runs a program `repeat` times on a frame, as if it had arrived on an interface of this
    /// network namespace.
    ///
    /// # Errors
    ///
    /// When the interface does not exist, or the kernel rejects the frame (shorter than an Ethernet
    /// header, longer than a page).
    pub fn dry_run(
        &mut self,
        hook: Hook,
        ifindex: IfIndex,
        mark: u32,
        frame: &[u8],
        repeat: u32,
    ) -> Result<DryRun> {
        let mut context_in = [0; SK_BUFF];
        context_in[MARK..MARK + 4].copy_from_slice(&mark.to_ne_bytes());
        context_in[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.get().to_ne_bytes());
        let mut context_out = [0; SK_BUFF];
        let result = self
            .program(hook)?
            .test_run(TestRunOptions {
                data_in: Some(frame),
                ctx_in: Some(&context_in),
                ctx_out: Some(&mut context_out),
                repeat,
                ..TestRunOptions::default()
            })
            .with_context(|| format!("cannot run `{}` on a frame", hook.program()))?;
        let mut mark = [0; 4];
        mark.copy_from_slice(&context_out[MARK..MARK + 4]);
        Ok(DryRun {
            // TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT.
            action: match result.return_value {
                u32::MAX => Action::Pass,
                2 => Action::Drop,
                7 => Action::Redirect,
                other => Action::Other(other),
            },
            mark: u32::from_ne_bytes(mark),
            duration: result.duration,
        })
    }
}
