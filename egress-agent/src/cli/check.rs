//! `egress-agent check`

use std::process::ExitCode;

use anyhow::Result;

use super::CheckArgs;
use crate::{
    config::Config,
    pods::{self, NO_ADDRESS, Snapshot},
};
use egress_policy::{Annotations, describe};

pub(super) fn check(args: &CheckArgs) -> Result<ExitCode> {
    let settings = match &args.config {
        Some(path) => Config::from_file(path)?.policy_settings(),
        None => Config::default_config()?.policy_settings(),
    };
    let Snapshot { pods, problems, .. } = pods::read_files(&args.files);
    let mut wrong = problems.len();
    for problem in &problems {
        eprintln!("{problem}");
    }
    for (name, pod) in &pods {
        let title = name.to_string();
        let own = Annotations::from_map(&pod.annotations);
        let inherited = Annotations::from_map(&pod.namespace_annotations);
        match describe(&title, &own, &inherited, &settings) {
            Ok(text) => {
                print!("{text}");
                if pod.addresses.is_empty() && pod.interface.is_some() {
                    println!("  warning: {NO_ADDRESS}");
                }
            }
            Err(error) => {
                wrong += 1;
                eprintln!("{}: {title}: {error}", pod.origin);
            }
        }
    }
    if pods.is_empty() && wrong == 0 {
        eprintln!("no Pod in these files");
        wrong += 1;
    }
    Ok(if wrong == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
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
            config: Some(examples.join("egress-agent.yaml")),
        };
        assert_eq!(check(&args).unwrap(), ExitCode::SUCCESS);
        let Snapshot { pods, problems, .. } = pods::read_files(&args.files);
        assert!(problems.is_empty(), "{problems:?}");
        assert_eq!(pods.len(), 4);
        for (key, pod) in &pods {
            assert!(pod.interface.is_some(), "{key:?} has no interface");
            assert!(!pod.addresses.is_empty(), "{key:?} has no address");
        }
    }
}
