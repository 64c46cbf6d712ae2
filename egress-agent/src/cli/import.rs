//! `egress-agent import`

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use egress_import::{Imported, Input, Options, import as import_inputs};

use super::{
    ImportArgs,
    texts::{self, Text},
};

/// The ends of names of files that are read from directories.
const EXTENSIONS: [&str; 4] = ["yaml", "yml", "json", "rule"];

pub(super) fn import(args: &ImportArgs) -> Result<ExitCode> {
    let (texts, errors) = texts::read(&args.files, &EXTENSIONS);
    for error in &errors {
        eprintln!("{error:#}");
    }
    let inputs: Vec<Input> = texts
        .into_iter()
        .map(|Text { name, text }| Input { name, text })
        .collect();
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

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

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
