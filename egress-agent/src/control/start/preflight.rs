//! Checking privileges and limits before anything is loaded.

use anyhow::{Context as _, Result, bail};
use egress_common::limits::INTERFACES;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::control::SourceOptions;

/// Capability numbers, `include/uapi/linux/capability.h`.
const NET_ADMIN: u32 = 12;
const NET_RAW: u32 = 13;
const SYS_PTRACE: u32 = 19;
const SYS_ADMIN: u32 = 21;
const BPF: u32 = 39;

/// Checks that the process has the privileges that the agent needs for pods from this source.
///
/// # Errors
///
/// Names each missing capability and what it is for.
pub(in crate::control) fn check_privileges(source: &SourceOptions) -> Result<()> {
    let status =
        std::fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let effective = effective_capabilities(&status).context("no CapEff in /proc/self/status")?;
    let in_cluster = matches!(source, SourceOptions::Cluster { .. });
    let missing = missing(effective, in_cluster);
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "missing privileges: {}; run the agent as root, or give it these capabilities",
        missing.join(", ")
    );
}

/// Open files that an enforced pod needs: its maps, the socket of its interface, and as many more while its policy
/// changes.
const FILES_PER_POD: u64 = 8;

/// Raises the limit of open files to what the maximum number of pods needs, or to the hard limit. Many systems start
/// with 1,024 and allow far more.
pub(in crate::control) fn raise_file_limit() {
    const WANTED: u64 = INTERFACES as u64 * FILES_PER_POD;
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, most)| {
        // The hard limit can be raised only with CAP_SYS_RESOURCE.
        if most < WANTED && setrlimit(Resource::RLIMIT_NOFILE, WANTED, WANTED).is_ok() {
            return Ok(WANTED);
        }
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        Ok(most)
    });
    match raised {
        Ok(files) if files < WANTED => tracing::warn!(
            files,
            wanted = WANTED,
            pods = files / FILES_PER_POD,
            "the limit of open files (ulimit -n) allows fewer pods than the agent can enforce"
        ),
        Ok(_) => {}
        Err(error) => {
            tracing::warn!(%error, "cannot raise the limit of open files; it limits how many pods fit");
        }
    }
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn missing(effective: u64, in_cluster: bool) -> Vec<&'static str> {
    let has = |capability: u32| effective & (1 << capability) != 0;
    let mut missing = Vec::new();
    // CAP_SYS_ADMIN implies CAP_BPF (bpf_capable, include/linux/bpf.h), but is needed besides it: a
    // map in a map of maps is found by its id (bpf_map_get_fd_by_id, kernel/bpf/syscall.c).
    if !has(SYS_ADMIN) {
        if !has(BPF) {
            missing.push("CAP_BPF (to load programs and maps)");
        }
        missing.push("CAP_SYS_ADMIN (to open pods' maps by their id, and to mount bpffs)");
    }
    if !has(NET_ADMIN) {
        missing
            .push("CAP_NET_ADMIN (to attach programs to interfaces, and for a table of nf_tables)");
    }
    if !has(NET_RAW) {
        missing.push("CAP_NET_RAW (to put held DNS messages back)");
    }
    // /proc/<pid>/ns/net of a process of another user, or of more capabilities, is opened only for who
    // might trace it (ptrace_may_access, kernel/ptrace.c). Manifests in a directory name interfaces
    // themselves.
    if in_cluster && !has(SYS_PTRACE) {
        missing.push(
            "CAP_SYS_PTRACE (to see which network namespace pods' processes are in, by \
             /proc/<pid>/ns/net)",
        );
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    const ON_ONE_MACHINE: u64 = 1 << SYS_ADMIN | 1 << NET_ADMIN | 1 << NET_RAW;

    #[test]
    fn missing_capabilities_are_named() {
        assert!(missing(u64::MAX, true).is_empty());
        assert!(missing(ON_ONE_MACHINE, false).is_empty());
        assert_eq!(missing(1 << NET_ADMIN, false).len(), 3);
        let without = missing(1 << BPF | 1 << NET_ADMIN | 1 << NET_RAW, false);
        assert!(without[0].contains("CAP_SYS_ADMIN"), "{without:?}");
        assert!(missing(0, false)[0].contains("CAP_BPF"));
    }

    #[test]
    fn a_cluster_takes_looking_at_other_users_processes_too() {
        let missing_one = missing(ON_ONE_MACHINE, true);
        assert_eq!(missing_one.len(), 1, "{missing_one:?}");
        assert!(missing_one[0].contains("CAP_SYS_PTRACE"));
        assert!(missing(ON_ONE_MACHINE | 1 << SYS_PTRACE, true).is_empty());
    }

    #[test]
    fn capabilities_are_read_from_the_status_file() {
        let status = "Name:\tx\nCapEff:\t000001ffffffffff\nCapBnd:\t0\n";
        assert_eq!(effective_capabilities(status), Some(0x1ff_ffff_ffff));
    }
}
