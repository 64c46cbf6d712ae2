//! `egress-agent check`
//!
//! ```text
//!  files ─ texts ─▶ pods::read_for_check ─▶ report: workloads and findings ─▶ text, json, sarif, github
//! ```

mod excerpts;
mod finding;
mod github;
mod json;
mod report;
mod sarif;
mod text;

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::{Context as _, Result};

use self::report::Report;
use super::{CheckArgs, CheckOutput, texts};
use crate::config::Config;

/// The ends of names of files that are read from directories.
const EXTENSIONS: [&str; 3] = ["yaml", "yml", "json"];

pub(super) fn check(args: &CheckArgs) -> Result<ExitCode> {
    let settings = match &args.config {
        Some(path) => Config::from_file(path)?.policy_settings(),
        None => Config::default_config()?.policy_settings(),
    };
    let (texts, errors) = texts::read(&args.files, &EXTENSIONS);
    let report = Report::new(&texts, &errors, &settings, args.strict);
    let written = match args.output {
        CheckOutput::Text => {
            eprint!(
                "{}",
                text::problems(&report, text::Style::of_standard_error())
            );
            text::workloads(&report, args.summary)
        }
        CheckOutput::Json => json::text(&report)?,
        CheckOutput::Sarif => sarif::text(&report)?,
        CheckOutput::Github => github::text(&report),
    };
    io::stdout()
        .write_all(written.as_bytes())
        .context("cannot write to standard output")?;
    Ok(if report.is_success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::pods;

    #[test]
    fn the_examples_are_what_they_say() {
        // Cargo runs tests in the directory of their package.
        let examples = Path::new("../manifests/examples");
        let args = CheckArgs {
            files: vec![examples.join("pods")],
            strict: false,
            summary: false,
            output: CheckOutput::Text,
            config: Some(examples.join("egress-agent.yaml")),
        };
        assert_eq!(check(&args).unwrap(), ExitCode::SUCCESS);
        let (texts, errors) = texts::read(&args.files, &EXTENSIONS);
        assert!(errors.is_empty(), "{errors:?}");
        let texts = texts.iter().map(|of| (&*of.name, &*of.text));
        let snapshot = pods::read_for_check(texts).snapshot;
        assert!(snapshot.problems.is_empty(), "{:?}", snapshot.problems);
        assert_eq!(snapshot.pods.len(), 4);
        for (key, pod) in &snapshot.pods {
            assert!(pod.interface.is_some(), "{key:?} has no interface");
            assert!(!pod.addresses.is_empty(), "{key:?} has no address");
        }
    }

    #[test]
    fn check_reads_files_and_directories() {
        let pod = |name: &str, allow: &str| {
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  annotations: \
                 {{egress-agent.dev/interface: {name}, egress-agent.dev/allow: {allow}}}\n"
            )
        };
        let dir = tempfile::TempDir::new().unwrap();
        let (below, named) = (dir.path().join("below"), dir.path().join("manifest"));
        std::fs::create_dir(&below).unwrap();
        std::fs::write(dir.path().join("a.yaml"), pod("a", "x")).unwrap();
        std::fs::write(&named, pod("b", "y")).unwrap();
        std::fs::write(below.join("c.json.yaml"), pod("c", "z")).unwrap();
        let missing = dir.path().join("missing.yaml");
        let (texts, errors) = texts::read(&[dir.path().to_owned(), named, missing], &EXTENSIONS);
        let texts = texts.iter().map(|of| (&*of.name, &*of.text));
        let snapshot = pods::read_for_check(texts).snapshot;
        let allows = snapshot.pods.values();
        let allows: Vec<_> = allows
            .map(|pod| (&*pod.name, &*pod.annotations["egress-agent.dev/allow"]))
            .collect();
        assert_eq!(allows, [("a", "x"), ("b", "y"), ("c", "z")]);
        assert_eq!(snapshot.problems, []);
        assert_eq!(errors.len(), 1, "{errors:?}");
        let error = format!("{:#}", errors[0]);
        assert!(error.contains("missing.yaml: cannot be read: "), "{error}");
    }
}
