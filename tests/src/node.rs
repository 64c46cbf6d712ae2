//! A node as its kubelet and container runtime lay it out: cgroups with pods' processes in them.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Instant,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{DEADLINE, Lab, Pod, Running, eventually, namespace::is_dead};

/// The beginning of the ids of containers in tests; the test's process id follows.
const MARK: &str = "e9e55e";

/// The cgroup hierarchy of pods' processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hierarchy {
    /// Version 2.
    V2,
    /// Version 1: the hierarchy of the controller `pids`.
    V1,
}

/// The kubelet's cgroup driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// Slices of systemd.
    Systemd,
    /// The kubelet itself.
    Cgroupfs,
}

/// A pod's class of quality of service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qos {
    /// Requests equal to limits.
    Guaranteed,
    /// Some requests.
    Burstable,
    /// None.
    BestEffort,
}

/// The container runtime, which determines the names of containers' cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// `cri-containerd-<id>.scope`, or `<id>` without systemd.
    Containerd,
    /// `crio-<id>.scope`, or `crio-<id>` without systemd.
    Crio,
}

/// The layout of a node.
#[derive(Clone, Debug)]
pub struct Node {
    /// The hierarchy.
    pub hierarchy: Hierarchy,
    /// The driver.
    pub driver: Driver,
    /// The container runtime.
    pub runtime: Runtime,
    /// The kubelet's `--cgroup-root`, one level: empty, or a name (`kubelet` on nodes of kind).
    pub root: String,
}

impl Default for Node {
    /// The most common layout.
    fn default() -> Self {
        Self {
            hierarchy: Hierarchy::V2,
            driver: Driver::Systemd,
            runtime: Runtime::Containerd,
            root: String::new(),
        }
    }
}

impl Node {
    /// The mount point of the hierarchy on this machine.
    #[track_caller]
    pub fn mount(&self) -> PathBuf {
        let mounts = fs::read_to_string("/proc/self/mounts").expect("the table of mounts");
        let found = mounts.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let is_it = match self.hierarchy {
                Hierarchy::V2 => fields[2] == "cgroup2",
                Hierarchy::V1 => fields[2] == "cgroup" && fields[3].split(',').any(|o| o == "pids"),
            };
            is_it.then(|| fields[1].into())
        });
        found.unwrap_or_else(|| panic!("control groups are mounted: {:?}", self.hierarchy))
    }

    /// The path of a pod's cgroup, whether it exists or not.
    #[track_caller]
    pub fn group(&self, uid: &str, qos: Qos) -> PathBuf {
        let class = match qos {
            Qos::Guaranteed => None,
            Qos::Burstable => Some("burstable"),
            Qos::BestEffort => Some("besteffort"),
        };
        let mut path = self.mount();
        match self.driver {
            Driver::Cgroupfs => {
                path.extend([self.root.as_str(), "kubepods"]);
                path.extend(class);
                path.join(format!("pod{uid}"))
            }
            Driver::Systemd => {
                let mut slice = String::new();
                let names = [self.root.as_str(), "kubepods"];
                let levels = names.into_iter().filter(|name| !name.is_empty());
                for level in levels.chain(class) {
                    if !slice.is_empty() {
                        slice.push('-');
                    }
                    slice.push_str(level);
                    path.push(format!("{slice}.slice"));
                }
                path.join(format!("{slice}-pod{}.slice", uid.replace('-', "_")))
            }
        }
    }

    /// Creates a pod with an interface, and a process in its network and its cgroup.
    #[track_caller]
    pub fn run_pod(&self, lab: &Lab, name: &str, uid: &str, qos: Qos) -> NodePod {
        let pod = lab.pod("shop", name);
        let mut running = self.pod_without_processes(pod, uid, qos);
        running.start_container();
        running
    }

    /// Creates the cgroup of a pod in which nothing runs yet.
    #[track_caller]
    pub fn pod_without_processes(&self, pod: Pod, uid: &str, qos: Qos) -> NodePod {
        sweep();
        let group = Group::create(self.mount(), self.group(uid, qos));
        NodePod {
            node: self.clone(),
            uid: uid.to_owned(),
            containers: Vec::new(),
            group,
            pod,
        }
    }

    fn container(&self) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let id = format!("{MARK}{:010x}{number:048x}", std::process::id());
        match (self.runtime, self.driver) {
            (Runtime::Containerd, Driver::Systemd) => format!("cri-containerd-{id}.scope"),
            (Runtime::Crio, Driver::Systemd) => format!("crio-{id}.scope"),
            (Runtime::Containerd, Driver::Cgroupfs) => id,
            (Runtime::Crio, Driver::Cgroupfs) => format!("crio-{id}"),
        }
    }
}

/// A pod of a [`Node`]: its namespace, its cgroup and its processes. All of it is removed when this is
/// dropped.
#[derive(Debug)]
pub struct NodePod {
    node: Node,
    uid: String,
    // Dropped in this order: a cgroup with a process in it cannot be removed.
    containers: Vec<Container>,
    group: Group,
    pod: Pod,
}

/// A process in a cgroup of its own.
#[derive(Debug)]
struct Container {
    process: Running,
    group: Group,
}

impl NodePod {
    /// `metadata.uid`.
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// Its namespace, and methods of programs in it.
    pub fn pod(&self) -> &Pod {
        &self.pod
    }

    /// Starts a container in the pod's network. Returns the id of its process.
    #[track_caller]
    pub fn start_container(&mut self) -> u32 {
        let pause = self.pod.start(&mut pause());
        self.adopt(pause)
    }

    /// Moves a process into a new container of the pod, whatever network it is in. Returns its id.
    #[track_caller]
    pub fn adopt(&mut self, process: Running) -> u32 {
        let pid = process.id();
        let within = &self.group.path;
        let group = Group::create(within.clone(), within.join(self.node.container()));
        group.put(pid).expect("a process is put into its group");
        self.containers.push(Container { process, group });
        pid
    }

    /// The cgroup of the container that was started last.
    #[track_caller]
    pub fn container_group(&self) -> &Path {
        &self.containers.last().expect("a container").group.path
    }

    /// Ends every container and removes their cgroups; the pod's own cgroup stays.
    pub fn stop_containers(&mut self) {
        self.containers.clear();
    }

    /// Adds another interface to the pod. Returns the name of its host end.
    #[track_caller]
    pub fn add_interface(&self, lab: &Lab, name: &str) -> String {
        let number = self.pod.ipv4().octets()[2];
        let host = format!("{}{name}", self.pod.interface());
        lab.node().ip_batch(&format!(
            "link add {host} type veth peer name {name} netns {netns}\n\
             addr add 10.2.{number}.1/30 dev {host}\n\
             link set {host} up\n",
            netns = self.pod.netns().name()
        ));
        self.pod.netns().ip_batch(&format!(
            "addr add 10.2.{number}.2/30 dev {name}\n\
             addr add fd02:{number:x}::2/64 dev {name} nodad\n\
             link set {name} up\n"
        ));
        host
    }

    /// Moves the pod to another network, as when its sandbox is recreated. Returns the pod with its old
    /// network.
    pub fn change_sandbox(&mut self, pod: Pod) -> Pod {
        std::mem::replace(&mut self.pod, pod)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.process.stop();
    }
}

/// A program that does nothing until it is killed.
pub fn pause() -> Command {
    let mut command = Command::new("sleep");
    command.arg("infinity");
    command
}

/// A cgroup. When this is dropped, it is removed together with the cgroups above it that are then empty,
/// except `top`.
#[derive(Debug)]
struct Group {
    top: PathBuf,
    path: PathBuf,
}

impl Group {
    #[track_caller]
    fn create(top: PathBuf, path: PathBuf) -> Self {
        // Another test may remove the cgroups above while they are empty.
        eventually("a control group is made", || fs::create_dir_all(&path).ok());
        Self { top, path }
    }

    fn put(&self, pid: u32) -> io::Result<()> {
        fs::write(self.path.join("cgroup.procs"), pid.to_string())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        remove(&self.top, &self.path);
    }
}

/// Removes a cgroup, and the cgroups above it that are then empty.
fn remove(top: &Path, group: &Path) {
    let start = Instant::now();
    // A killed process may stay in the cgroup for a moment after wait(2). The check for leftovers finds a
    // cgroup that stays; a panic would hide that of the test.
    while let Err(error) = fs::remove_dir(group)
        && error.kind() != io::ErrorKind::NotFound
        && start.elapsed() < DEADLINE
    {
        thread::yield_now();
    }
    remove_empty(top, group.parent());
}

/// Removes this cgroup and those above it, up to the first that is not empty.
fn remove_empty(top: &Path, mut group: Option<&Path>) {
    while let Some(path) = group.filter(|path| *path != top && path.starts_with(top)) {
        if fs::remove_dir(path).is_err() {
            return;
        }
        group = path.parent();
    }
}

/// Removes leftovers of killed tests. Once per process.
fn sweep() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for hierarchy in [Hierarchy::V2, Hierarchy::V1] {
            let node = Node {
                hierarchy,
                ..Node::default()
            };
            let mount = node.mount();
            sweep_below(&mount, &mount);
        }
    });
}

fn sweep_below(mount: &Path, group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        let path = entry.path();
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        sweep_below(mount, &path);
        let name = entry.file_name().to_string_lossy().into_owned();
        let maker = name
            .split_once(MARK)
            .and_then(|(_, rest)| u32::from_str_radix(rest.get(..10)?, 16).ok());
        if maker.is_some_and(is_dead) {
            let pids = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
            for pid in pids.lines().filter_map(|pid| pid.parse().ok()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            remove(mount, &path);
        }
    }
}
