//! `cargo xtask crds`: writes the definitions of the policy kinds from their types.
//!
//! A program in `egress-api` prints them, so that xtask does not depend on the Kubernetes libraries. A test of
//! `egress-api` fails when the file is out of date.

use std::fs;

use anyhow::{Context as _, Result};

use crate::{manifests, process, workspace};

/// The comment above the definitions.
const HEAD: &str = "\
# The definitions of the policy kinds, written by `cargo xtask crds` from the types in egress-api: edit the types there.
";

/// Writes manifests/base/crds.yaml from the types in egress-api, and manifests/egress-agent.yaml.
#[derive(clap::Args)]
pub(crate) struct Options {}

pub(crate) fn run(_: &Options) -> Result<()> {
    let mut command = process::cargo();
    command.args([
        "run",
        "--quiet",
        "--locked",
        "--package",
        "egress-api",
        "--example",
        "crds",
    ]);
    let definitions = process::output(&mut command)?;
    let definitions = definitions.trim_start_matches("---\n");
    let path = workspace::root().join("manifests/base/crds.yaml");
    let text = format!("{HEAD}{definitions}");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("wrote {}", path.display());
    manifests::write()
}
