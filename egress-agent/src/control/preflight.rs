//! What must be so before anything is loaded.

use anyhow::{Context as _, Result, bail};

/// Capability numbers, `include/uapi/linux/capability.h`.
const NET_ADMIN: u32 = 12;
const NET_RAW: u32 = 13;
const SYS_ADMIN: u32 = 21;

/// Checks that the process may do what the agent does.
///
/// # Errors
///
/// Names each missing capability and what it is for.
pub(super) fn check_privileges() -> Result<()> {
    let status =
        std::fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let effective = effective_capabilities(&status).context("no CapEff in /proc/self/status")?;
    let missing = missing(effective);
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "missing privileges: {}; run the agent as root, or give it these capabilities",
        missing.join(", ")
    );
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn missing(effective: u64) -> Vec<&'static str> {
    let has = |capability: u32| effective & (1 << capability) != 0;
    let mut missing = Vec::new();
    // It implies CAP_BPF and CAP_PERFMON, which loading needs; opening maps and BTF by their ids
    // takes CAP_SYS_ADMIN itself (bpf_map_get_fd_by_id, kernel/bpf/syscall.c).
    if !has(SYS_ADMIN) {
        missing.push("CAP_SYS_ADMIN (to load programs and open maps; CAP_BPF is not enough)");
    }
    if !has(NET_ADMIN) {
        missing.push("CAP_NET_ADMIN (to attach programs to interfaces)");
    }
    if !has(NET_RAW) {
        missing.push("CAP_NET_RAW (to put held DNS messages back)");
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        assert!(missing(u64::MAX).is_empty());
        assert!(missing(1 << SYS_ADMIN | 1 << NET_ADMIN | 1 << NET_RAW).is_empty());
        assert_eq!(missing(1 << NET_ADMIN).len(), 2);
        assert!(missing(0)[0].contains("CAP_SYS_ADMIN"));
    }

    #[test]
    fn capabilities_are_read_from_the_status_file() {
        let status = "Name:\tx\nCapEff:\t000001ffffffffff\nCapBnd:\t0\n";
        assert_eq!(effective_capabilities(status), Some(0x1ff_ffff_ffff));
    }
}
