//! The texts of files that a command is given.

use std::{
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// The name of standard input among the arguments.
const STANDARD_INPUT: &str = "-";

/// A file that was read.
pub(super) struct Text {
    /// Its path, or `standard input`.
    pub(super) name: String,
    pub(super) text: String,
}

/// Reads files, standard input for `-`, and directories with their subdirectories. Of a directory, files whose names
/// end so are read. Returns also what could not be read.
pub(super) fn read(paths: &[PathBuf], extensions: &[&str]) -> (Vec<Text>, Vec<anyhow::Error>) {
    let (mut texts, mut errors) = (Vec::new(), Vec::new());
    for path in paths {
        if path.as_os_str() == STANDARD_INPUT {
            match read_standard_input() {
                Ok(text) => texts.push(text),
                Err(error) => errors.push(error),
            }
        } else {
            read_path(path, extensions, &mut texts, &mut errors);
        }
    }
    (texts, errors)
}

fn read_standard_input() -> Result<Text> {
    let mut text = String::new();
    io::stdin()
        .read_to_string(&mut text)
        .context("standard input cannot be read")?;
    Ok(Text {
        name: "standard input".to_owned(),
        text,
    })
}

/// Reads a file, or the files in and below a directory in the order of their names.
fn read_path(
    path: &Path,
    extensions: &[&str],
    texts: &mut Vec<Text>,
    errors: &mut Vec<anyhow::Error>,
) {
    if path.is_dir() {
        match files(path, extensions) {
            Ok(files) => {
                for file in files {
                    read_path(&file, extensions, texts, errors);
                }
            }
            Err(error) => errors.push(error),
        }
        return;
    }
    let shown = path.display().to_string();
    match fs::read_to_string(path).with_context(|| format!("{shown}: cannot be read")) {
        Ok(text) => texts.push(Text { name: shown, text }),
        Err(error) => errors.push(error),
    }
}

/// The subdirectories of a directory and its files with policies, but for hidden ones.
fn files(directory: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let mut entries = fs::read_dir(directory)
        .and_then(Iterator::collect::<io::Result<Vec<_>>>)
        .with_context(|| format!("{}: the directory cannot be listed", directory.display()))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    let is_wanted = |entry: &fs::DirEntry| {
        let is_known = entry
            .path()
            .extension()
            .is_some_and(|extension| extensions.iter().any(|known| extension == *known));
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
