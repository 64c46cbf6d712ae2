//! `egress-agent cleanup`

use std::process::ExitCode;

use anyhow::Result;

use super::CleanupArgs;
use crate::datapath;

pub(super) fn cleanup(args: &CleanupArgs) -> Result<ExitCode> {
    let detached = datapath::cleanup(&args.bpffs)?;
    println!("detached from {detached} interfaces; nothing is enforced any more");
    Ok(ExitCode::SUCCESS)
}
