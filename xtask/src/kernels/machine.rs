//! A virtual machine and its serial console.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// The limit of a machine's run time, many times what it needs on an idle computer.
const TIME_LIMIT: Duration = Duration::from_secs(600);

const MEMORY: &str = "1536M";

/// A running machine, which is switched off on drop.
pub(super) struct Machine {
    qemu: Child,
    lines: Receiver<String>,
    deadline: Instant,
}

impl Machine {
    /// Boots a kernel. `settings` reach its first process as environment variables.
    ///
    /// The processor is emulated, which works everywhere, also inside a virtual machine.
    ///
    /// # Errors
    ///
    /// Fails when qemu cannot be started.
    pub(super) fn boot(image: &Path, initramfs: &Path, settings: &str) -> Result<Self> {
        // A machine that panics restarts at once, and `-no-reboot` turns the restart into its end.
        let kernel = format!("console=ttyS0 quiet panic=-1 {settings}");
        // qemu must end with this process, however that ends.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        command.args(["-accel", "tcg", "-m", MEMORY, "-nic", "none", "-no-reboot"]);
        command.args(["-display", "none", "-monitor", "none", "-serial", "stdio"]);
        command.arg("-kernel").arg(image);
        command.arg("-initrd").arg(initramfs);
        command.args(["-append", &kernel]);
        let mut qemu = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run qemu-system-x86_64")?;
        let lines = qemu.stdout.take().map(read_lines);
        Ok(Self {
            qemu,
            lines: lines.context("qemu has no standard output")?,
            deadline: Instant::now() + TIME_LIMIT,
        })
    }

    /// The next line of the console; `None` when the machine has been switched off.
    ///
    /// # Errors
    ///
    /// Fails when the time limit is reached.
    pub(super) fn line(&mut self) -> Result<Option<String>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                bail!(
                    "the machine did not finish within {} s",
                    TIME_LIMIT.as_secs()
                )
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Reads a console in a thread of its own, which ends with the machine.
fn read_lines(console: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}
