//! `egress-agent cleanup`

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;

use super::{CleanupArgs, read_config};
use crate::datapath;

pub(super) fn cleanup(args: &CleanupArgs) -> Result<ExitCode> {
    let bpffs = match &args.config {
        Some(path) => read_config(path)?.bpffs,
        None => PathBuf::from("/sys/fs/bpf"),
    };
    let detached = datapath::cleanup(&bpffs)?;
    println!("detached from {detached} interfaces; nothing is enforced any more");
    Ok(ExitCode::SUCCESS)
}
