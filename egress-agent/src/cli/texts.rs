//! The texts of files that a command is given.
//!
//! The input is bounded, so that a mistyped path, such as a device or a whole file system, ends with an error.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

/// The name of standard input among the arguments.
const STANDARD_INPUT: &str = "-";

/// Limits on the input.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Bytes of one file.
    file: u64,
    /// Bytes of all files.
    all: u64,
    /// Files.
    files: usize,
    /// Directories inside each other.
    depth: usize,
}

const LIMITS: Limits = Limits {
    file: 16 << 20,
    all: 64 << 20,
    files: 10_000,
    depth: 32,
};

/// A file that was read.
#[derive(Debug)]
pub(super) struct Text {
    /// Its path, or `standard input`.
    pub(super) name: String,
    pub(super) text: String,
}

/// Reads files, standard input for `-`, and directories with their subdirectories. In a directory, reads only files
/// whose names have one of the extensions. Returns the errors of files that could not be read, too.
pub(super) fn read(paths: &[PathBuf], extensions: &[&str]) -> (Vec<Text>, Vec<anyhow::Error>) {
    read_within(paths, extensions, LIMITS)
}

fn read_within(
    paths: &[PathBuf],
    extensions: &[&str],
    limits: Limits,
) -> (Vec<Text>, Vec<anyhow::Error>) {
    let mut reading = Reading {
        extensions,
        limits,
        left: limits.all,
        texts: Vec::new(),
        errors: Vec::new(),
        is_full: false,
    };
    for path in paths {
        if path.as_os_str() == STANDARD_INPUT {
            reading.add("standard input".to_owned(), |_| Ok(io::stdin().lock()));
        } else {
            reading.path(path, 0);
        }
    }
    (reading.texts, reading.errors)
}

struct Reading<'a> {
    extensions: &'a [&'a str],
    limits: Limits,
    /// Bytes that may still be read.
    left: u64,
    texts: Vec<Text>,
    errors: Vec<anyhow::Error>,
    /// Whether a limit of all files was met. Then nothing more is read.
    is_full: bool,
}

impl Reading<'_> {
    /// Reads a file, or the files in and below a directory in the order of their names.
    fn path(&mut self, path: &Path, depth: usize) {
        if self.is_full {
            return;
        }
        if !path.is_dir() {
            let is_given = depth == 0;
            self.add(path.display().to_string(), |name| {
                open(path, is_given).with_context(|| format!("{name}: cannot be read"))
            });
            return;
        }
        let found = if depth < self.limits.depth {
            files(path, self.extensions)
        } else {
            let depth = self.limits.depth;
            let path = path.display();
            Err(anyhow::anyhow!(
                "{path}: is not read: there are more than {depth} directories inside each other"
            ))
        };
        match found {
            Ok(files) => {
                for file in files {
                    self.path(&file, depth + 1);
                }
            }
            Err(error) => self.errors.push(error),
        }
    }

    fn add<R: Read>(&mut self, name: String, open: impl FnOnce(&str) -> Result<R>) {
        if self.is_full {
            return;
        }
        let files = self.limits.files;
        if self.texts.len() >= files {
            self.is_full = true;
            self.errors.push(anyhow::anyhow!(
                "{name}: not read, like everything after it: there are more than {files} files; give fewer at a time"
            ));
            return;
        }
        let read = open(&name).and_then(|from| self.text(&name, from));
        match read {
            Ok(text) => self.texts.push(Text { name, text }),
            Err(error) => self.errors.push(error),
        }
    }

    fn text(&mut self, name: &str, from: impl Read) -> Result<String> {
        let most = self.limits.file.min(self.left);
        let mut bytes = Vec::new();
        from.take(most + 1)
            .read_to_end(&mut bytes)
            .with_context(|| format!("{name}: cannot be read"))?;
        let length = bytes.len() as u64;
        if length > self.limits.file {
            bail!(
                "{name}: is longer than {} MiB; split it into several files",
                self.limits.file >> 20
            );
        }
        let Some(left) = self.left.checked_sub(length) else {
            self.is_full = true;
            bail!(
                "{name}: not read, like everything after it: all files together are longer than {} MiB; give fewer at a \
                 time",
                self.limits.all >> 20
            );
        };
        self.left = left;
        String::from_utf8(bytes).map_err(|error| {
            let valid = error.utf8_error().valid_up_to();
            anyhow::anyhow!("{name}: is not UTF-8 text (byte {})", valid + 1)
        })
    }
}

/// Opens a file. One that is found in a directory must be a regular file: a named pipe there would wait for a writer.
fn open(path: &Path, is_given: bool) -> Result<File> {
    if !is_given && !fs::metadata(path)?.is_file() {
        bail!("is not a regular file");
    }
    Ok(File::open(path)?)
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

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Limits = Limits {
        file: 1 << 20,
        all: 2 << 20,
        files: 3,
        depth: 2,
    };

    #[track_caller]
    fn read(directory: &Path, expected: usize, error: &str) {
        let (texts, errors) = read_within(&[directory.to_owned()], &["yaml"], SMALL);
        assert_eq!(texts.len(), expected, "{errors:?}");
        let [found] = &errors[..] else {
            panic!("{errors:?}");
        };
        let found = format!("{found:#}");
        assert!(found.contains(error), "{found}");
    }

    #[test]
    fn a_file_that_is_too_long_is_an_error_and_the_others_are_read() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("a.yaml"), "a".repeat((1 << 20) + 1)).unwrap();
        fs::write(directory.path().join("b.yaml"), "b: 1").unwrap();
        read(directory.path(), 1, "a.yaml: is longer than 1 MiB");
    }

    #[test]
    fn the_size_of_all_files_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a.yaml", "b.yaml", "c.yaml"] {
            fs::write(directory.path().join(name), "a".repeat(900 << 10)).unwrap();
        }
        read(
            directory.path(),
            2,
            "c.yaml: not read, like everything after it: all files together are longer than 2 MiB",
        );
    }

    #[test]
    fn the_number_of_files_and_the_depth_of_directories_are_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("1/2/3");
        fs::create_dir_all(&below).unwrap();
        fs::write(below.join("deep.yaml"), "a: 1").unwrap();
        read(directory.path(), 0, "directories inside each other");
        fs::remove_dir_all(directory.path().join("1")).unwrap();
        for number in 0..5 {
            fs::write(directory.path().join(format!("{number}.yaml")), "a: 1").unwrap();
        }
        read(
            directory.path(),
            3,
            "3.yaml: not read, like everything after it: there are more than 3 files",
        );
    }
}
