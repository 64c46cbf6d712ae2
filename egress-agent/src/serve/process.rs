//! The agent's resource usage, from `/proc/self`.
#![expect(
    clippy::cast_precision_loss,
    reason = "metrics are floating-point numbers"
)]

use std::fs;

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};

/// The agent's resource usage. A value that cannot be read is 0.
#[derive(Debug, Default)]
pub(super) struct Usage {
    /// Memory, in bytes.
    pub(super) resident: u64,
    /// CPU time, in seconds.
    pub(super) cpu: f64,
    /// Open files.
    pub(super) files: u64,
    /// The limit of open files.
    pub(super) files_max: u64,
}

impl Usage {
    pub(super) fn now() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let cpu = getrusage(UsageWho::RUSAGE_SELF).map_or(0.0, |usage| {
            [usage.user_time(), usage.system_time()]
                .iter()
                .map(|time| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6)
                .sum()
        });
        Self {
            resident: resident(&status).unwrap_or(0),
            cpu,
            // The descriptor that reads the directory is not counted.
            files: fs::read_dir("/proc/self/fd")
                .map_or(0, |files| (files.count() as u64).saturating_sub(1)),
            files_max: getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(now, _)| now),
        }
    }
}

fn resident(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usage_of_this_process_is_plausible() {
        let usage = Usage::now();
        assert!(usage.resident > 1 << 20, "{usage:?}");
        assert!(usage.cpu >= 0.0 && usage.files >= 3 && usage.files_max >= usage.files);
        assert_eq!(resident("Name:\tx\nVmRSS:\t   12 kB\n"), Some(12 * 1024));
    }
}
