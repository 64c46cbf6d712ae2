//! Finds other programs, and runs them, also as root.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::workspace;

/// Directories of system programs that a user's `PATH` often lacks.
const SYSTEM_DIRECTORIES: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// How often the progress of a long command is reported.
const STILL_EVERY: Duration = Duration::from_secs(30);

/// Finds `program` in `PATH`, then among the system's programs.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(SYSTEM_DIRECTORIES.iter().map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

/// Whether this process runs as root.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// A command for `program`, through sudo unless this process is root already.
///
/// # Errors
///
/// Fails when this process is not root and sudo is missing.
pub(crate) fn as_root(program: &str) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    let Some(sudo) = find("sudo") else {
        bail!("`{program}` needs root and there is no sudo: run this command as root");
    };
    let mut command = Command::new(sudo);
    command.arg(program);
    Ok(command)
}

/// The cargo that runs this program, started in the workspace's top directory.
///
/// The command does not inherit the calling cargo's choice of compiler.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace::root());
    command
}

/// Arguments with which cargo starts the built program as root.
///
/// Cargo itself runs as the user, so that no file in the target directory belongs to root.
///
/// # Errors
///
/// Fails when this process is not root and sudo is missing.
pub(crate) fn root_runner() -> Result<Vec<String>> {
    if is_root() {
        return Ok(Vec::new());
    }
    if find("sudo").is_none() {
        bail!("there is no sudo: run the same command as root");
    }
    let runner = "target.'cfg(all())'.runner = ['sudo', '--preserve-env']";
    Ok(vec!["--config".to_owned(), runner.to_owned()])
}

/// Prints `command`, runs it, and fails when it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    println!("+ {}", shown(command));
    let status = command
        .status()
        .with_context(|| format!("cannot run `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs a `command` that may take minutes, as [`run`] does. Prints its purpose, and then its duration every
/// half minute: the last step of a build may take long without output, and a log shows no progress at all.
pub(crate) fn long(command: &mut Command, what: &str) -> Result<()> {
    println!("{what}: takes minutes when nothing is built yet");
    let report = |after: Duration| println!("… {what}: still running after {}", minutes(after));
    watched(STILL_EVERY, report, || run(command))
}

/// Does `work`, and passes its duration to `report` at this interval.
fn watched<T>(every: Duration, report: impl Fn(Duration) + Send, work: impl FnOnce() -> T) -> T {
    let (done, ended) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let began = Instant::now();
            while ended.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                report(began.elapsed());
            }
        });
        let result = work();
        drop(done);
        result
    })
}

/// `90 s` as `1 min 30 s`.
fn minutes(time: Duration) -> String {
    match (time.as_secs() / 60, time.as_secs() % 60) {
        (0, seconds) => format!("{seconds} s"),
        (minutes, seconds) => format!("{minutes} min {seconds} s"),
    }
}

/// Runs `command` silently and returns its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&bytes(command)?).into_owned())
}

/// Runs `command` silently and returns its standard output, which need not be text.
pub(crate) fn bytes(command: &mut Command) -> Result<Vec<u8>> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run `{}`", shown(command)))?;
    if !output.status.success() {
        bail!(
            "`{}` failed: {}\n{}",
            shown(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(output.stdout)
}

/// Whether `command` runs and succeeds; its output is discarded.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// `command` as a person would type it, with only the name of the program.
fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let mut words = vec![name.to_string_lossy().into_owned()];
    words.extend(command.get_args().map(quoted));
    words.join(" ")
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_alphanumeric() || "-_=/.,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_it_would_be_typed() {
        let mut command = Command::new("/usr/bin/cargo");
        command.args(["build", "--config", "a = \"b\""]);
        assert_eq!(shown(&command), "cargo build --config 'a = \"b\"'");
    }

    #[test]
    fn the_duration_of_long_work_is_reported() {
        let (report, reported) = mpsc::channel();
        let result = watched(
            Duration::from_millis(1),
            move |after| report.send(after).unwrap(),
            || {
                let first: Duration = reported.recv().unwrap();
                let second = reported.recv().unwrap();
                first < second
            },
        );
        assert!(result);
        assert_eq!(minutes(Duration::from_secs(30)), "30 s");
        assert_eq!(minutes(Duration::from_secs(150)), "2 min 30 s");
    }

    #[test]
    fn a_missing_program_is_not_found() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program-anywhere").is_none());
    }
}
