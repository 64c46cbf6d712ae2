//! `cargo xtask manifests`: writes all manifests into one file, for use without kustomize.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use crate::workspace;

/// The comment above the objects.
const HEAD: &str = "\
# manifests/base in one file, written by `cargo xtask manifests`: edit the files there.
# Apply it with `kubectl apply -f`, or add it to the manifests that your own tools apply.
";

/// Writes manifests/egress-agent.yaml from manifests/base.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Writes nothing; fails when the file is out of date
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let path = directory().join("egress-agent.yaml");
    let flat = flat()?;
    if fs::read_to_string(&path).is_ok_and(|old| old == flat) {
        return Ok(());
    }
    if options.check {
        bail!("manifests/egress-agent.yaml is not manifests/base: run `cargo xtask manifests`");
    }
    fs::write(&path, flat).with_context(|| format!("cannot write {}", path.display()))?;
    println!("wrote {}", path.display());
    Ok(())
}

/// Checks that the file is up to date.
///
/// # Errors
///
/// Fails when it is not.
pub(crate) fn check() -> Result<()> {
    run(&Options { check: true })
}

/// Writes the file.
///
/// # Errors
///
/// Fails when a file of manifests/base cannot be read, or this one not written.
pub(crate) fn write() -> Result<()> {
    run(&Options { check: false })
}

fn directory() -> PathBuf {
    workspace::root().join("manifests")
}

/// The files that manifests/base lists, one after the other.
fn flat() -> Result<String> {
    let base = directory().join("base");
    let read = |name: &str| {
        let path = base.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let documents = resources(&read("kustomization.yaml")?)
        .into_iter()
        .map(|name| read(&name))
        .collect::<Result<Vec<_>>>()?;
    Ok(format!("{HEAD}---\n{}", documents.join("---\n")))
}

/// The entries under `resources:`, one a line.
fn resources(kustomization: &str) -> Vec<String> {
    kustomization
        .lines()
        .skip_while(|line| *line != "resources:")
        .skip(1)
        .map_while(|line| line.trim_start().strip_prefix("- "))
        .map(|entry| entry.trim().to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_keep_their_order() {
        let text =
            "kind: Kustomization\nresources:\n  - b.yaml\n  - a.yaml\npatches:\n  - path: c.yaml\n";
        assert_eq!(resources(text), ["b.yaml", "a.yaml"]);
    }
}
