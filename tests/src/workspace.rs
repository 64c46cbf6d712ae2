//! The checkout that the tests run in.
//!
//! It is found when a test runs. What the compiler would say (`env!`) is where the test was built first, which
//! is another place when the checkout was moved or copied.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// The top directory: that of the package which cargo tests or runs, or else of the current directory.
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

/// Where cargo puts what it builds; `CARGO_TARGET_DIR` moves it.
#[track_caller]
pub fn target() -> PathBuf {
    let root = root();
    env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root.join("target"), |directory| root.join(directory))
}

/// A directory for files that are not to be in memory, and that later runs may find again.
#[track_caller]
pub fn scratch() -> PathBuf {
    let directory = target().join("tmp");
    fs::create_dir_all(&directory).expect("a directory for scratch files");
    directory
}
