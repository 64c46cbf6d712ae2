//! `egress-agent run`

use std::process::ExitCode;

use anyhow::{Context as _, Result};

use super::{AttachArg, RunArgs};
use crate::{config::Config, control, datapath::Attach};

pub(super) fn run(args: RunArgs) -> Result<ExitCode> {
    let options = control::Options {
        config: Config::from_file(&args.config)?,
        config_file: args.config,
        pods_dir: args.pods_dir,
        keep_enforcing: args.keep_enforcing,
        attach: match args.attach {
            AttachArg::Auto => Attach::Auto,
            AttachArg::Tcx => Attach::Tcx,
            AttachArg::Clsact => Attach::Clsact,
        },
        datapath_log: args.datapath_log,
    };
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(control::run(options))?;
    Ok(ExitCode::SUCCESS)
}
