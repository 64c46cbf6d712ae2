//! `egress-agent check`

use std::{fmt::Write as _, io::IsTerminal as _, path::PathBuf, process::ExitCode};

use anyhow::Result;

use super::{CheckArgs, texts};
use crate::{
    config::Config,
    pods::{self, NO_ADDRESS, Snapshot},
};
use egress_policy::{Annotations, Excerpt, Inputs, PolicyError, describe};

/// The ends of names of files that are read from directories.
const EXTENSIONS: [&str; 3] = ["yaml", "yml", "json"];

/// How a line with a warning begins.
const WARNING: &str = "  warning: ";

pub(super) fn check(args: &CheckArgs) -> Result<ExitCode> {
    let settings = match &args.config {
        Some(path) => Config::from_file(path)?.policy_settings(),
        None => Config::default_config()?.policy_settings(),
    };
    let style = Style::of_standard_error();
    let (Snapshot { pods, problems, .. }, errors) = read(&args.files);
    for error in &errors {
        eprintln!("{error:#}");
    }
    let mut wrong = problems.len() + errors.len();
    let mut warnings = 0;
    for problem in &problems {
        eprintln!("{problem}");
    }
    for (name, pod) in &pods {
        let title = name.to_string();
        let own = Annotations::from_map(&pod.annotations);
        let inherited = Annotations::from_map(&pod.namespace_annotations);
        let inputs = Inputs {
            pod: &own,
            namespace: &inherited,
            objects: &pod.objects,
        };
        match describe(&title, inputs, &settings) {
            Ok(text) => {
                print!("{text}");
                warnings += text
                    .lines()
                    .filter(|line| line.starts_with(WARNING))
                    .count();
                if pod.addresses.is_empty() && pod.interface.is_some() {
                    println!("  warning: {NO_ADDRESS}");
                }
            }
            Err(error) => {
                wrong += 1;
                let about = format!("{}: {title}", pod.origin);
                eprint!("{}", problems_text(&about, &error, &own, &inherited, style));
            }
        }
    }
    if pods.is_empty() && wrong == 0 {
        eprintln!("no Pod and no workload in these files");
        wrong += 1;
    }
    if args.strict && warnings > 0 {
        eprintln!("{warnings} warnings (--strict)");
        wrong += 1;
    }
    Ok(if wrong == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Reads files and directories. Returns also what could not be read.
fn read(paths: &[PathBuf]) -> (Snapshot, Vec<anyhow::Error>) {
    let (texts, errors) = texts::read(paths, &EXTENSIONS);
    let texts = texts.iter().map(|of| (&*of.name, &*of.text));
    (pods::read_for_check(texts), errors)
}

/// Whether carets have a colour.
#[derive(Clone, Copy)]
enum Style {
    Plain,
    Colour,
}

impl Style {
    /// Colours on a terminal, unless `NO_COLOR` is set.
    fn of_standard_error() -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if std::io::stderr().is_terminal() && !unwanted {
            Self::Colour
        } else {
            Self::Plain
        }
    }

    /// The text in bold red.
    fn red(self, text: &str) -> String {
        match self {
            Self::Plain => text.to_owned(),
            Self::Colour => format!("\u{1b}[1;31m{text}\u{1b}[0m"),
        }
    }
}

/// A line for each problem; below it the line of the annotation, with carets under what is wrong.
fn problems_text(
    about: &str,
    error: &PolicyError,
    pod: &Annotations,
    namespace: &Annotations,
    style: Style,
) -> String {
    let mut text = String::new();
    for problem in error.problems() {
        let _ = writeln!(text, "{about}: {problem}");
        if let Some(excerpt) = problem.excerpt(pod, namespace) {
            text.push_str(&excerpt_text(&excerpt, style));
        }
    }
    text
}

fn excerpt_text(excerpt: &Excerpt, style: Style) -> String {
    let Excerpt {
        line,
        text,
        before,
        width,
    } = excerpt;
    let number = line.to_string();
    let (margin, indent) = (" ".repeat(number.len()), " ".repeat(*before));
    let carets = style.red(&"^".repeat(*width));
    format!("  {number} | {text}\n  {margin} | {indent}{carets}\n")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_examples_are_what_they_say() {
        // Cargo runs tests in the directory of their package.
        let examples = Path::new("../manifests/examples");
        let args = CheckArgs {
            files: vec![examples.join("pods")],
            strict: false,
            config: Some(examples.join("egress-agent.yaml")),
        };
        assert_eq!(check(&args).unwrap(), ExitCode::SUCCESS);
        let (Snapshot { pods, problems, .. }, errors) = read(&args.files);
        assert!(errors.is_empty(), "{errors:?}");
        assert!(problems.is_empty(), "{problems:?}");
        assert_eq!(pods.len(), 4);
        for (key, pod) in &pods {
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
        let (snapshot, errors) = read(&[dir.path().to_owned(), named, missing]);
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

    #[test]
    fn only_the_carets_have_a_colour() {
        let excerpt = Excerpt {
            line: 10,
            text: "a.test:x".to_owned(),
            before: 7,
            width: 1,
        };
        assert_eq!(
            excerpt_text(&excerpt, Style::Plain),
            "  10 | a.test:x\n     |        ^\n"
        );
        assert_eq!(
            excerpt_text(&excerpt, Style::Colour),
            "  10 | a.test:x\n     |        \u{1b}[1;31m^\u{1b}[0m\n"
        );
    }
}
