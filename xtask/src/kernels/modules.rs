//! Kernel modules in the order of their dependencies.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use object::{Object as _, ObjectSection as _};

use super::package::Kernel;
use crate::process;

/// The modules of a kernel.
struct Modules {
    /// The file of each, by name.
    files: BTreeMap<String, PathBuf>,
    /// The modules that are part of the kernel itself.
    built_in: BTreeSet<String>,
}

/// The contents of the wanted modules and their dependencies, in the order in which to load them, without
/// those that are built into the kernel.
///
/// # Errors
///
/// Fails when one of them is neither a module of the kernel nor built in.
pub(super) fn load_order(kernel: &Kernel, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
    let modules = Modules::of(kernel)?;
    let mut order = Vec::new();
    for name in wanted {
        modules
            .add(name, &mut order)
            .with_context(|| format!("module {name} of kernel {}", kernel.release))?;
    }
    Ok(order)
}

impl Modules {
    fn of(kernel: &Kernel) -> Result<Self> {
        let directory = kernel.modules();
        let list = directory.join("modules.builtin");
        let built_in = fs::read_to_string(&list)
            .with_context(|| format!("cannot read {}", list.display()))?
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect();
        let mut files = BTreeMap::new();
        collect(&directory.join("kernel"), &mut files)?;
        Ok(Self { files, built_in })
    }

    fn add(&self, name: &str, order: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
        if self.built_in.contains(name) || order.iter().any(|(there, _)| there == name) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            bail!("{name} is neither a module nor built in");
        };
        let content = read(path)?;
        for needed in needs(&content).with_context(|| format!("cannot read {}", path.display()))? {
            self.add(&needed, order)?;
        }
        order.push((name.to_owned(), content));
        Ok(())
    }
}

fn collect(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    for entry in entries {
        let path = entry.context("cannot list the modules")?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// The name of the module in a file; names have underscores where files may have dashes.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let name = file
        .strip_suffix(".ko")
        .or_else(|| file.strip_suffix(".ko.xz"))?;
    Some(name.replace('-', "_"))
}

/// The module in the form that every kernel loads: not every kernel unpacks it itself.
fn read(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        return process::bytes(
            Command::new("xz")
                .args(["--decompress", "--stdout"])
                .arg(path),
        );
    }
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The dependencies that a module names.
fn needs(module: &[u8]) -> Result<Vec<String>> {
    let file = object::File::parse(module)?;
    let section = file.section_by_name(".modinfo").context("no .modinfo")?;
    Ok(needs_in(section.data()?))
}

/// Parses `key=value` strings that each end with a zero byte.
fn needs_in(modinfo: &[u8]) -> Vec<String> {
    modinfo
        .split(|&byte| byte == 0)
        .filter_map(|field| field.strip_prefix(b"depends="))
        .flat_map(|names| names.split(|&byte| byte == b','))
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_a_modules_information() {
        let modinfo = b"license=GPL\0depends=nf-tables,crc32c\0name=x\0";
        assert_eq!(needs_in(modinfo), ["nf_tables", "crc32c"]);
        assert!(needs_in(b"license=GPL\0depends=\0").is_empty());
    }

    #[test]
    fn modules_are_identified_by_name() {
        let name = |path| module_name(Path::new(path));
        assert_eq!(name("kernel/net/veth.ko").as_deref(), Some("veth"));
        assert_eq!(name("sch-ingress.ko.xz").as_deref(), Some("sch_ingress"));
        assert_eq!(name("modules.dep"), None);
    }
}
