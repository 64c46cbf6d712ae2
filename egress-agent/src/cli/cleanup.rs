//! `egress-agent cleanup`

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;

use super::CleanupArgs;
use crate::{config::Config, datapath};

pub(super) fn cleanup(args: &CleanupArgs) -> Result<ExitCode> {
    let bpffs = match &args.config {
        Some(path) => Config::from_file(path)?.bpffs,
        None => PathBuf::from("/sys/fs/bpf"),
    };
    match datapath::cleanup(&bpffs)? {
        None => println!(
            "nothing to remove: no agent left anything in {}",
            bpffs.display()
        ),
        Some(1) => println!("detached from 1 interface; nothing is enforced any more"),
        Some(detached) => {
            println!("detached from {detached} interfaces; nothing is enforced any more");
        }
    }
    Ok(ExitCode::SUCCESS)
}
