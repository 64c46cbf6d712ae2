//! The checkout in which the tests run.
//!
//! It is located when a test runs. The compiler's value (`env!`) is the place of the first build, which
//! differs when the checkout was moved or copied.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// The top directory: that of the package that cargo tests or runs, or else that of the current directory.
#[track_caller]
pub fn root() -> PathBuf {
    let is_root = |directory: &&Path| {
        directory.join("Cargo.lock").is_file() && directory.join("tests/Cargo.toml").is_file()
    };
    let here = env::current_dir().expect("a current directory");
    let package = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let mut starts = package.iter().chain([&here]);
    let found = starts.find_map(|start| start.ancestors().find(is_root));
    let found = found.unwrap_or_else(|| panic!("{} is not in the checkout", here.display()));
    found.to_owned()
}

/// Cargo's target directory; `CARGO_TARGET_DIR` moves it.
#[track_caller]
pub fn target() -> PathBuf {
    let root = root();
    env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root.join("target"), |directory| root.join(directory))
}

/// A directory on disk, not in memory, whose files later runs can find again.
#[track_caller]
pub fn scratch() -> PathBuf {
    let directory = target().join("tmp");
    fs::create_dir_all(&directory).expect("a directory for scratch files");
    directory
}
