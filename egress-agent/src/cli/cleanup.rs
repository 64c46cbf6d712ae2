//! `egress-agent cleanup`

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};

use super::CleanupArgs;
use crate::{config::Config, datapath};

pub(super) fn cleanup(args: &CleanupArgs) -> Result<ExitCode> {
    let bpffs = match &args.config {
        Some(path) => Config::from_file(path)?.bpffs,
        None => PathBuf::from("/sys/fs/bpf"),
    };
    match datapath::cleanup(&bpffs, None)? {
        None => println!(
            "nothing to remove: no agent has left programs or maps in {}",
            bpffs.display()
        ),
        Some(1) => println!("detached from 1 interface; nothing is enforced any more"),
        Some(detached) => {
            println!("detached from {detached} interfaces; nothing is enforced any more");
        }
    }
    if args.stay {
        wait_for_a_signal()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn wait_for_a_signal() -> Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .and_then(|runtime| {
            runtime.block_on(async {
                let mut terminate = signal(SignalKind::terminate())?;
                let mut interrupt = signal(SignalKind::interrupt())?;
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                Ok(())
            })
        })
        .context("cannot wait for a signal")
}
