//! Compares what is made of the files in `tests/data` with the files beside them.
//!
//! `web.imported.yaml` is the output for `web.yaml`. After a change that is meant, write it again in `tests/data`:
//! `egress-agent import cilium/web.yaml > cilium/web.imported.yaml`. A file that ends in `.paths` has the paths of rule
//! files, one on each line; copy its output from the failed test.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use egress_import::{Imported, Input, Options, import};

/// The products, with at least three files each.
const PRODUCTS: [&str; 9] = [
    "antrea",
    "aws",
    "calico",
    "cilium",
    "gke",
    "istio",
    "kubernetes",
    "openshift",
    "rule-files",
];

#[test]
fn the_output_for_each_file_is_the_file_beside_it() {
    // Cargo runs tests in the directory of their package.
    let data = Path::new("tests/data");
    let mut wrong = String::new();
    for product in PRODUCTS {
        let files = files(&data.join(product));
        assert!(files.len() >= 3, "{product} has {} files", files.len());
        for file in files {
            let imported = imported(data, &file);
            assert!(
                imported.problems.is_empty(),
                "{file:?}: {:?}",
                imported.problems
            );
            let beside = file.with_extension("imported.yaml");
            let expected = fs::read_to_string(&beside).unwrap_or_default();
            if imported.yaml != expected {
                let _ = writeln!(
                    wrong,
                    "{}:\n{}",
                    beside.display(),
                    difference(&expected, &imported.yaml)
                );
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// The files of a directory that are no output.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| !path.to_string_lossy().ends_with(".imported.yaml"))
        .collect();
    files.sort();
    files
}

fn imported(data: &Path, file: &Path) -> Imported {
    let text = fs::read_to_string(file).unwrap();
    let inputs = if file
        .extension()
        .is_some_and(|extension| extension == "paths")
    {
        text.lines()
            .map(|path| Input {
                name: path.to_owned(),
                text: String::new(),
            })
            .collect()
    } else {
        let name = file.strip_prefix(data).unwrap().display().to_string();
        vec![Input { name, text }]
    };
    import(&inputs, &Options::default())
}

/// The lines that differ, behind what both begin with and before what both end with.
fn difference(expected: &str, found: &str) -> String {
    let (expected, found): (Vec<&str>, Vec<&str>) =
        (expected.lines().collect(), found.lines().collect());
    let same = expected
        .iter()
        .zip(&found)
        .take_while(|(a, b)| a == b)
        .count();
    let same_end = expected[same..]
        .iter()
        .rev()
        .zip(found[same..].iter().rev())
        .take_while(|(a, b)| a == b)
        .count();
    let mut text = String::new();
    for (sign, lines) in [('-', &expected), ('+', &found)] {
        for line in &lines[same..lines.len() - same_end] {
            let _ = writeln!(text, "{sign}{line}");
        }
    }
    text
}
