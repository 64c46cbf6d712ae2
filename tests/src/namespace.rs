//! One network namespace.

use std::{
    fs::{self, File},
    io::Write as _,
    panic,
    path::Path,
    process::{Command, Stdio},
    sync::{Mutex, Once, PoisonError},
    thread,
};

use egress_common::ids::IfIndex;
use nix::{
    mount::{MntFlags, umount2},
    net::if_::if_nametoindex,
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// The prefix of every namespace and temporary directory of a laboratory; the id of the process that created
/// it follows.
pub(crate) const PREFIX: &str = "eg-";

const NAMED: &str = "/run/netns";

/// A named network namespace, deleted when dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: File,
}

impl Namespace {
    /// Creates a namespace with loopback up, forwarding as requested, and IPv6 addresses usable at once.
    pub(crate) fn create(name: &str, forwards: bool) -> Self {
        static ADDING: Mutex<()> = Mutex::new(());
        {
            // The first `ip netns add` on a machine makes /run/netns a shared mount.
            let _one_at_a_time = ADDING.lock().unwrap_or_else(PoisonError::into_inner);
            ip(&["netns", "add", name]);
        }
        let file = File::open(Path::new(NAMED).join(name)).expect("a namespace that was just made");
        let namespace = Self {
            name: name.to_owned(),
            file,
        };
        namespace.run(|| {
            for (key, value) in [
                ("ipv4/conf/all/rp_filter", "0"),
                ("ipv4/conf/default/rp_filter", "0"),
                ("ipv4/ping_group_range", "0 2147483647"),
                ("ipv4/icmp_ratelimit", "0"),
                ("ipv6/icmp/ratelimit", "0"),
                ("ipv6/conf/all/disable_ipv6", "0"),
                ("ipv6/conf/default/disable_ipv6", "0"),
                ("ipv6/conf/default/accept_dad", "0"),
                // Only with this can an IPv6 address of a local range be bound; an IPv4 address always can.
                ("ipv6/ip_nonlocal_bind", "1"),
                ("ipv6/conf/default/accept_ra", "0"),
                ("ipv6/conf/default/router_solicitations", "0"),
                ("ipv4/ip_forward", if forwards { "1" } else { "0" }),
                ("ipv6/conf/all/forwarding", if forwards { "1" } else { "0" }),
            ] {
                let path = format!("/proc/sys/net/{key}");
                fs::write(&path, value).unwrap_or_else(|e| panic!("write {value} to {path}: {e}"));
            }
        });
        namespace.ip_batch("link set lo up\n");
        namespace
    }

    /// The name under `/run/netns`, for `ip netns exec`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `action` on a new thread in this namespace. Sockets created there stay in the namespace;
    /// processes started there run in it.
    pub fn run<T: Send>(&self, action: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let worker = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET).expect("setns(2) to a namespace");
                action()
            });
            worker
                .join()
                .unwrap_or_else(|payload| panic::resume_unwind(payload))
        })
    }

    /// The index of an interface in this namespace.
    #[track_caller]
    pub fn ifindex(&self, interface: &str) -> IfIndex {
        let index = self.run(|| if_nametoindex(interface));
        IfIndex::new(index.unwrap_or_else(|e| panic!("no interface {interface}: {e}")))
    }

    /// A counter of `/proc/net/netstat`, which has a line of names and a line of values with the same prefix.
    #[track_caller]
    pub fn counter(&self, prefix: &str, name: &str) -> u64 {
        let netstat = self
            .run(|| fs::read_to_string("/proc/thread-self/net/netstat"))
            .expect("the namespace's counters");
        let mut lines = netstat.lines().filter(|line| line.starts_with(prefix));
        let names = lines.next().unwrap_or_default().split_whitespace();
        let values = lines.next().unwrap_or_default().split_whitespace();
        names
            .zip(values)
            .find(|(found, _)| *found == name)
            .and_then(|(_, value)| value.parse().ok())
            .unwrap_or_else(|| panic!("the kernel has no counter {prefix}{name}"))
    }

    /// Runs lines of `ip -batch` in this namespace.
    #[track_caller]
    pub fn ip_batch(&self, lines: &str) {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("ip, of the package iproute2");
        let mut stdin = child.stdin.take().expect("stdin is piped");
        stdin
            .write_all(lines.as_bytes())
            .expect("ip reads its batch");
        drop(stdin);
        let output = child.wait_with_output().expect("ip ends");
        assert!(
            output.status.success(),
            "ip -n {} failed: {}\n{lines}",
            self.name,
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // A failure here cannot be handled, and a panic would hide that of the test.
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

#[track_caller]
fn ip(args: &[&str]) {
    let output = Command::new("ip")
        .args(args)
        .output()
        .expect("ip, of the package iproute2");
    assert!(
        output.status.success(),
        "ip {} failed: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The names of existing namespaces that process `pid` created.
pub fn leftovers(pid: u32) -> Vec<String> {
    named()
        .into_iter()
        .filter(|(_, owner)| *owner == pid)
        .map(|(name, _)| name)
        .collect()
}

fn named() -> Vec<(String, u32)> {
    let Ok(entries) = fs::read_dir(NAMED) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            let owner = owner(&name)?;
            Some((name, owner))
        })
        .collect()
}

/// The id of the process that created a thing of this name.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

/// True if the process does not exist any more.
pub(crate) fn is_dead(pid: u32) -> bool {
    // A zombie has a directory, but no executable.
    fs::read_link(format!("/proc/{pid}/exe")).is_err()
}

/// Removes leftovers of killed processes. Once per process.
pub(crate) fn sweep() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for (name, _) in named().into_iter().filter(|(_, pid)| is_dead(*pid)) {
            if let Ok(output) = Command::new("ip").args(["netns", "pids", &name]).output() {
                for pid in String::from_utf8_lossy(&output.stdout).lines() {
                    if let Ok(pid) = pid.trim().parse() {
                        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                    }
                }
            }
            let _ = Command::new("ip").args(["netns", "del", &name]).status();
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for target in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
            let directory = Path::new(target).parent().and_then(|d| d.file_name());
            if directory
                .and_then(|d| owner(d.to_str()?))
                .is_some_and(is_dead)
            {
                let _ = umount2(target, MntFlags::MNT_DETACH);
            }
        }
        for entry in fs::read_dir(std::env::temp_dir())
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry
                .file_name()
                .to_str()
                .and_then(owner)
                .is_some_and(is_dead)
            {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    });
}
