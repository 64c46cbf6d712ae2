//! `egress-agent import`

use std::{
    fs,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use egress_import::{Imported, Input, Options, import as import_inputs};

use super::ImportArgs;

/// The name of standard input among the arguments.
const STANDARD_INPUT: &str = "-";

/// The ends of names of files that are read from directories.
const EXTENSIONS: [&str; 4] = ["yaml", "yml", "json", "rule"];

pub(super) fn import(args: &ImportArgs) -> Result<ExitCode> {
    let mut inputs = Vec::new();
    let mut errors = Vec::new();
    for path in &args.files {
        if path.as_os_str() == STANDARD_INPUT {
            match read_standard_input() {
                Ok(input) => inputs.push(input),
                Err(error) => errors.push(error),
            }
        } else {
            read_path(path, &mut inputs, &mut errors);
        }
    }
    for error in &errors {
        eprintln!("{error:#}");
    }
    let options = Options {
        deep_wildcards: args.deep_wildcards,
        namespace: args.namespace.clone(),
    };
    let Imported {
        yaml,
        objects,
        findings,
        problems,
    } = import_inputs(&inputs, &options);
    for problem in &problems {
        eprintln!("{}: {}", problem.origin, problem.message);
    }
    for finding in &findings {
        eprintln!(
            "{}: {}: {}: {}",
            finding.origin, finding.source, finding.severity, finding.text
        );
    }
    io::stdout()
        .write_all(yaml.as_bytes())
        .context("cannot write to standard output")?;
    if objects == 0 {
        eprintln!("nothing to import in these files");
    }
    let is_strict_failure = args.strict && !findings.is_empty();
    let is_read = errors.is_empty() && problems.is_empty() && objects > 0;
    Ok(if is_read && !is_strict_failure {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn read_standard_input() -> Result<Input> {
    let mut text = String::new();
    io::stdin()
        .read_to_string(&mut text)
        .context("standard input cannot be read")?;
    Ok(Input {
        name: "standard input".to_owned(),
        text,
    })
}

/// Reads a file, or the files in and below a directory in the order of their names.
fn read_path(path: &Path, inputs: &mut Vec<Input>, errors: &mut Vec<anyhow::Error>) {
    if path.is_dir() {
        match files(path) {
            Ok(files) => {
                for file in files {
                    read_path(&file, inputs, errors);
                }
            }
            Err(error) => errors.push(error),
        }
        return;
    }
    let shown = path.display().to_string();
    match fs::read_to_string(path).with_context(|| format!("{shown}: cannot be read")) {
        Ok(text) => inputs.push(Input { name: shown, text }),
        Err(error) => errors.push(error),
    }
}

/// The subdirectories of a directory and its files with policies, but for hidden ones.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut entries = fs::read_dir(directory)
        .and_then(Iterator::collect::<io::Result<Vec<_>>>)
        .with_context(|| format!("{}: the directory cannot be listed", directory.display()))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    let is_wanted = |entry: &fs::DirEntry| {
        let is_known = entry
            .path()
            .extension()
            .is_some_and(|extension| EXTENSIONS.iter().any(|known| extension == *known));
        // A link to a directory is not followed, as it may lead to one above.
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        !entry.file_name().to_string_lossy().starts_with('.') && (is_directory || is_known)
    };
    Ok(entries
        .iter()
        .filter(|entry| is_wanted(entry))
        .map(fs::DirEntry::path)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {}
  policyTypes: [Egress]
  egress:
  - to: [{ipBlock: {cidr: 203.0.113.0/24}}]
    ports: [{port: PORT}]
";

    fn run(directory: &Path, strict: bool) -> ExitCode {
        import(&ImportArgs {
            files: vec![directory.to_owned()],
            namespace: None,
            deep_wildcards: false,
            strict,
        })
        .unwrap()
    }

    #[test]
    fn directories_are_read_with_their_subdirectories() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(run(directory.path(), false), ExitCode::FAILURE);
        let below = directory.path().join("a/b");
        fs::create_dir_all(&below).unwrap();
        fs::write(below.join("web.yml"), POLICY.replace("PORT", "443")).unwrap();
        fs::write(below.join("README.md"), "not: [a, policy").unwrap();
        fs::write(below.join(".hidden.yaml"), "not: [a, policy").unwrap();
        assert_eq!(run(directory.path(), true), ExitCode::SUCCESS);
    }

    #[test]
    fn strict_fails_if_something_was_left_out() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("web.yaml");
        fs::write(&file, POLICY.replace("PORT", "https")).unwrap();
        assert_eq!(run(directory.path(), false), ExitCode::SUCCESS);
        assert_eq!(run(directory.path(), true), ExitCode::FAILURE);
        fs::write(&file, "not: [a, policy").unwrap();
        assert_eq!(run(directory.path(), false), ExitCode::FAILURE);
    }
}
