//! The contents in force of each file: the latest version, and the last readable version of every object that
//! cannot be read any more.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    fs::{File, Metadata, OpenOptions},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::fcntl::OFlag;

use super::{Problem, Snapshot, manifest::Manifests, object::Object, snapshot::assemble};

/// Longest file that is read, in bytes. A pod's manifest has a few thousand.
pub(super) const FILE_MAX: u64 = 4 << 20;

const KEPT: &str = "its last readable content stays in force";

/// The contents in force of a file.
#[derive(Clone, Debug, Default)]
pub(super) struct Contents {
    pub(super) objects: Vec<Object>,
    pub(super) problems: Vec<Problem>,
    /// Whether a part could not be read, so that objects may be missing.
    pub(super) unreadable: bool,
}

impl Contents {
    /// The contents of a file that was never read before.
    pub(super) fn of(read: Manifests) -> Self {
        Self::default().after(read)
    }

    /// The contents in force after `self` was in force and the file was read again.
    ///
    /// Every readable object takes effect at once. If a part is unreadable, nobody can tell which of the
    /// former objects it was, so all missing objects stay: a mistake in an edit must not end enforcement. An
    /// object with an unreadable part stays as it was.
    fn after(&self, read: Manifests) -> Self {
        let Manifests {
            mut objects,
            mut problems,
            mut unreadable,
            for_check: _,
            ignored: _,
        } = read;
        for object in &mut objects {
            if !object.is_incomplete() {
                continue;
            }
            let former = self.objects.iter().find(|former| former.is_same(object));
            if let Some(former) = former.filter(|former| !former.is_incomplete()) {
                problems.push(Problem {
                    origin: object.origin().to_owned(),
                    message: format!("{object} stays as it was read before"),
                });
                *object = former.clone();
            }
        }
        if objects.is_empty() && problems.is_empty() && !self.objects.is_empty() {
            // Most likely a writer has just truncated the file.
            unreadable = true;
        }
        if unreadable {
            let missing = |former: &&Object| !objects.iter().any(|object| object.is_same(former));
            let kept: Vec<_> = self.objects.iter().filter(missing).cloned().collect();
            for object in &kept {
                problems.push(Problem {
                    origin: object.origin().to_owned(),
                    message: format!(
                        "{object} is not in the readable part of the file; {KEPT}. Correct \
                         the file, or remove it to remove its pods"
                    ),
                });
            }
            objects.extend(kept);
        }
        Self {
            objects,
            problems,
            unreadable,
        }
    }

    /// The contents in force if the file cannot be read at all.
    fn after_failure(&self, path: &Path, what: &str) -> Self {
        let message = if self.objects.is_empty() {
            what.to_owned()
        } else {
            format!("{what}; {KEPT}")
        };
        let problems = vec![Problem {
            origin: path.display().to_string(),
            message,
        }];
        Self {
            objects: self.objects.clone(),
            problems,
            unreadable: true,
        }
    }
}

/// The attributes that distinguish a changed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileVersion {
    device: u64,
    inode: u64,
    len: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileVersion {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            len: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

#[derive(Clone, Debug)]
struct FileState {
    /// `None` if the file must be read again even if it looks unchanged.
    version: Option<FileVersion>,
    contents: Arc<Contents>,
}

/// The contents in force of files, by path. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Files(BTreeMap<PathBuf, FileState>);

impl Files {
    /// Reads a file, unless it looks unchanged.
    pub(super) fn read(&mut self, path: &Path) {
        let former = self.0.remove(path);
        let former_contents = former.as_ref().map(|known| &*known.contents);
        let nothing = Contents::default();
        let former_contents = former_contents.unwrap_or(&nothing);
        let known = match open(path) {
            Ok((_, version))
                if former
                    .as_ref()
                    .is_some_and(|known| known.version == Some(version)) =>
            {
                self.0.extend(former.map(|known| (path.to_owned(), known)));
                return;
            }
            Ok((file, version)) => {
                let contents = match text(file) {
                    Ok(text) => {
                        let name = path.display().to_string();
                        former_contents.after(Manifests::read(&name, &text))
                    }
                    Err(what) => former_contents.after_failure(path, &what),
                };
                FileState {
                    version: Some(version),
                    contents: Arc::new(contents),
                }
            }
            Err(what) => {
                let contents = former_contents.after_failure(path, &what);
                FileState {
                    version: None,
                    contents: Arc::new(contents),
                }
            }
        };
        self.0.insert(path.to_owned(), known);
    }

    /// Reads the changed files of a directory, and forgets those that are gone. Files in `writing` are
    /// skipped, because their writers have not finished.
    ///
    /// # Errors
    ///
    /// When the directory cannot be listed. Then nothing is forgotten.
    pub(super) fn read_directory(
        &mut self,
        directory: &Path,
        writing: &BTreeSet<OsString>,
    ) -> io::Result<()> {
        let mut present = BTreeSet::new();
        for entry in directory.read_dir()? {
            let name = entry?.file_name();
            if is_manifest_name(&name) {
                present.insert(name);
            }
        }
        self.0
            .retain(|path, _| path.file_name().is_some_and(|name| present.contains(name)));
        for name in present.difference(writing) {
            self.read(&directory.join(name));
        }
        Ok(())
    }

    /// Restores the contents of a file from `before`, and has it read again next time.
    pub(super) fn restore(&mut self, path: &Path, before: &Self) {
        match before.0.get(path) {
            Some(known) => {
                let known = FileState {
                    version: None,
                    contents: Arc::clone(&known.contents),
                };
                self.0.insert(path.to_owned(), known);
            }
            None => {
                self.0.remove(path);
            }
        }
    }

    /// Has a file read again next time, even if it looks unchanged.
    pub(super) fn force_reread(&mut self, path: &Path) {
        if let Some(known) = self.0.get_mut(path) {
            known.version = None;
        }
    }

    /// The snapshot of all files together.
    pub(super) fn snapshot(&self) -> Snapshot {
        assemble(self.0.values().map(|known| &*known.contents))
    }
}

/// Whether a file with this name is read: it has an extension of manifests, and is neither hidden nor an
/// editor's temporary file.
pub(super) fn is_manifest_name(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else {
        return false;
    };
    let ends_well = matches!(
        Path::new(name).extension().and_then(OsStr::to_str),
        Some("yaml" | "yml" | "json")
    );
    // The extension excludes `.name.yaml.swp`, `#name.yaml#` and `name.yaml~`; the first character excludes
    // others.
    ends_well && !name.starts_with(['.', '#', '~'])
}

/// Opens a regular file.
fn open(path: &Path) -> Result<(File, FileVersion), String> {
    let cannot = |error: io::Error| format!("cannot be opened: {error}");
    // Without O_NONBLOCK opening a FIFO would wait for a writer.
    let flags = (OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).bits();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(cannot)?;
    let metadata = file.metadata().map_err(cannot)?;
    if !metadata.is_file() {
        return Err("is not a regular file".into());
    }
    let version = FileVersion::of(&metadata);
    Ok((file, version))
}

fn text(file: File) -> Result<String, String> {
    let mut bytes = Vec::new();
    file.take(FILE_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("cannot be read: {error}"))?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(format!(
            "is longer than {} MiB; split it into several files",
            FILE_MAX >> 20
        ));
    }
    String::from_utf8(bytes).map_err(|error| {
        format!(
            "is not UTF-8 text (byte {})",
            error.utf8_error().valid_up_to() + 1
        )
    })
}

#[cfg(test)]
#[path = "contents_tests.rs"]
mod tests;
