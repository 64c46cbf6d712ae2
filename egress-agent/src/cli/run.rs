//! `egress-agent run`

use std::process::ExitCode;

use anyhow::{Context as _, Result};

use super::{AttachArg, RunArgs};
use crate::{
    config::Config,
    control::{self, SourceOptions},
    datapath::Attach,
};

pub(super) fn run(args: RunArgs) -> Result<ExitCode> {
    let options = control::Options {
        config: match &args.config {
            Some(file) => Config::from_file(file)?,
            None => Config::default_config()?,
        },
        config_file: args.config,
        source: match args.pods_dir {
            Some(directory) => SourceOptions::Directory(directory),
            None => SourceOptions::Cluster {
                kubeconfig: args.kubeconfig,
            },
        },
        keep_enforcing: args.keep_enforcing,
        take_over: args.take_over,
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
