//! `egress-agent ready`

use std::process::ExitCode;

use anyhow::Result;

use super::{ReadyArgs, ask::ask};
use crate::serve::protocol::{Request, Response};

pub(super) fn ready(args: &ReadyArgs) -> Result<ExitCode> {
    let Response::Ready(missing) = ask(&args.socket, &Request::Ready)? else {
        anyhow::bail!("the agent answered another request: it may be of another version");
    };
    if missing.is_empty() {
        println!("ready");
        return Ok(ExitCode::SUCCESS);
    }
    for what in missing {
        println!("{what}");
    }
    Ok(ExitCode::FAILURE)
}
