//! A pod's control group: its path, and the processes in it.
//!
//! ```text
//! cgroupfs  <root>/kubepods[/burstable|/besteffort]/pod<uid>/<container>
//! systemd   <root>/kubepods.slice[/kubepods-burstable.slice|/kubepods-besteffort.slice]
//!                 /kubepods[-burstable|-besteffort]-pod<uid, - as _>.slice/<container>
//! ```
//!
//! The name of a container's own group depends on the runtime, so it is ignored.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::uid::Uid;

/// How many levels of groups below a pod's group are read.
const DEPTH: usize = 8;
/// How many groups of one pod are read.
const GROUPS: usize = 1024;
/// How many processes of one group are read. The kernel lists the first processes of a container, which are
/// in the pod's own network, before those that a program in it starts later.
const PROCESSES_OF_GROUP: usize = 256;
/// How many bytes of a list of processes are read.
const LIST: u64 = 64 * 1024;

const QOS: [&str; 2] = ["burstable", "besteffort"];

/// The cgroup driver of a kubelet, and the group under which it creates pods' groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// The cgroupfs driver.
    Cgroupfs {
        /// Path of `kubepods` from the root of the hierarchy, without a slash in front.
        top: PathBuf,
    },
    /// The systemd driver.
    Systemd {
        /// Path of the slice that contains `kubepods.slice`.
        parent: PathBuf,
        /// Name of that slice with its levels (`kubepods`, `kubelet-kubepods`).
        slice: String,
    },
}

impl Layout {
    /// The kubelet's default layouts, and those of kind's nodes.
    pub(super) fn known() -> Vec<Self> {
        let cgroupfs = |top: &str| Self::Cgroupfs { top: top.into() };
        let systemd = |parent: &str, slice: &str| Self::Systemd {
            parent: parent.into(),
            slice: slice.into(),
        };
        vec![
            systemd("", "kubepods"),
            cgroupfs("kubepods"),
            systemd("kubelet.slice", "kubelet-kubepods"),
            cgroupfs("kubelet/kubepods"),
        ]
    }

    /// The common parent of all pods' groups.
    fn top(&self) -> PathBuf {
        match self {
            Self::Cgroupfs { top } => top.clone(),
            Self::Systemd { parent, slice } => parent.join(format!("{slice}.slice")),
        }
    }

    /// The possible paths of the pod's group: one for each quality-of-service class.
    fn groups(&self, uid: &Uid) -> [PathBuf; 3] {
        [None, Some(QOS[0]), Some(QOS[1])].map(|qos| match self {
            Self::Cgroupfs { top } => {
                let class = qos.map_or_else(|| top.clone(), |qos| top.join(qos));
                class.join(format!("pod{uid}"))
            }
            Self::Systemd { slice, .. } => {
                let mut path = self.top();
                let mut name = slice.clone();
                if let Some(qos) = qos {
                    name = format!("{slice}-{qos}");
                    path.push(format!("{name}.slice"));
                }
                path.join(format!("{name}-pod{}.slice", uid.in_slice()))
            }
        })
    }
}

/// The first pod's group on a path, from the root on, and its layout. Groups that the pod creates within its
/// own come later on the path, whatever their names are.
pub(super) fn pod_of(path: &str) -> Option<(Uid, Option<Layout>)> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    parts.iter().enumerate().find_map(|(at, part)| {
        let before = &parts[..at];
        if let Some(uid) = part.strip_prefix("pod").and_then(Uid::new) {
            let above = match before {
                [above @ .., last] if QOS.contains(last) => above,
                above => above,
            };
            let top = whole_path(above);
            return Some((uid, top.map(|top| Layout::Cgroupfs { top })));
        }
        let (name, uid) = part.strip_suffix(".slice")?.rsplit_once("-pod")?;
        let uid = Uid::from_slice(uid)?;
        Some((uid, systemd_layout(before, name)))
    })
}

fn systemd_layout(before: &[&str], name: &str) -> Option<Layout> {
    let within = |name: &str, path: &mut &[&str]| {
        let (last, above) = path.split_last()?;
        *path = above;
        (last.strip_suffix(".slice")? == name).then_some(())
    };
    let mut above = before;
    let mut top = name;
    if let Some((rest, qos)) = name.rsplit_once('-')
        && QOS.contains(&qos)
    {
        within(name, &mut above)?;
        top = rest;
    }
    within(top, &mut above)?;
    Some(Layout::Systemd {
        parent: whole_path(above)?,
        slice: top.to_owned(),
    })
}

/// The path from the root. A reader in a cgroup namespace sees a path relative to its own group, with `..` in
/// front, from which the groups above cannot be known.
fn whole_path(parts: &[&str]) -> Option<PathBuf> {
    (!parts.contains(&"..")).then(|| parts.iter().collect())
}

/// The mount points of control groups, version 2 first.
pub(super) fn mounts(table: &str) -> Vec<PathBuf> {
    let mut found: Vec<(u8, PathBuf)> = table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (point, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
            let has = |controller: &str| options.split(',').any(|option| option == controller);
            // The kubelet creates a pod's group in each hierarchy of version 1. These always exist.
            let order = match kind {
                "cgroup2" => 0,
                "cgroup" if has("name=systemd") => 1,
                "cgroup" if has("pids") || has("memory") => 2,
                _ => return None,
            };
            Some((order, PathBuf::from(unescaped(point))))
        })
        .collect();
    found.sort_by_key(|(order, _)| *order);
    found.into_iter().map(|(_, point)| point).collect()
}

/// In /proc/mounts, blanks and backslashes of a path are three octal digits.
fn unescaped(text: &str) -> String {
    let mut plain = text.to_owned();
    for (code, character) in [("\\040", " "), ("\\011", "\t"), ("\\134", "\\")] {
        plain = plain.replace(code, character);
    }
    plain
}

/// The processes in a pod's group.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Members {
    /// Ids of processes (of threads in a threaded group): first the first process of each group, then the
    /// second of each, and so on.
    pub(super) pids: Vec<u32>,
    /// Whether there are processes without an id in this PID namespace, because they are in one that this one
    /// cannot see into.
    pub(super) foreign: bool,
}

/// The control groups of this machine.
#[derive(Debug)]
pub(super) struct Cgroups {
    mounts: Vec<PathBuf>,
    layouts: Vec<Layout>,
    /// Whether a pod has been found in one of the known layouts.
    pub(super) settled: bool,
}

impl Cgroups {
    pub(super) fn new(mounts: Vec<PathBuf>) -> Self {
        Self {
            mounts,
            layouts: Layout::known(),
            settled: false,
        }
    }

    /// Adds a layout to those that are tried.
    pub(super) fn learn(&mut self, layout: Layout) {
        if !self.layouts.contains(&layout) {
            tracing::info!(
                ?layout,
                "discovered a non-standard pod cgroup layout; pods are looked up there too"
            );
            self.layouts.push(layout);
        }
    }

    /// The processes in the pod's group; `None` if the group does not exist.
    ///
    /// On a machine with both cgroup versions, the group may exist in a hierarchy that no process is assigned
    /// to, so all hierarchies are tried until one has a process.
    pub(super) fn members(&mut self, uid: &Uid) -> Option<Members> {
        let mut found = None;
        for mount in 0..self.mounts.len() {
            for layout in 0..self.layouts.len() {
                if !self.mounts[mount].join(self.layouts[layout].top()).is_dir() {
                    continue;
                }
                for group in self.layouts[layout].groups(uid) {
                    let Some(members) = members(&self.mounts[mount].join(group)) else {
                        continue;
                    };
                    if !members.pids.is_empty() {
                        // The next pod's group is likely to be in the same place.
                        self.mounts.swap(0, mount);
                        self.layouts.swap(0, layout);
                        self.settled = true;
                        return Some(members);
                    }
                    let foreign = members.foreign;
                    found.get_or_insert(members).foreign |= foreign;
                }
            }
        }
        found
    }
}

/// Walks the tree breadth first, so that a deep subtree hides nothing above it.
fn members(top: &Path) -> Option<Members> {
    let mut groups = Vec::new();
    let mut foreign = false;
    groups.push(processes(top, &mut foreign).ok()?);
    let mut waiting = VecDeque::from([(top.to_owned(), 0)]);
    let mut seen = 1;
    while let Some((directory, depth)) = waiting.pop_front() {
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            if seen == GROUPS {
                break;
            }
            seen += 1;
            // A group that was removed meanwhile has no process.
            groups.extend(processes(&entry.path(), &mut foreign));
            // A directory has two links and one for each directory in it; most have none.
            let is_leaf = entry.metadata().is_ok_and(|group| group.nlink() == 2);
            if depth + 1 < DEPTH && !is_leaf {
                waiting.push_back((entry.path(), depth + 1));
            }
        }
    }
    let longest = groups.iter().map(Vec::len).max().unwrap_or_default();
    let pids = (0..longest)
        .flat_map(|nth| groups.iter().filter_map(move |group| group.get(nth)))
        .copied()
        .collect();
    Some(Members { pids, foreign })
}

/// The processes in one group, without those of its subgroups.
fn processes(group: &Path, foreign: &mut bool) -> io::Result<Vec<u32>> {
    let list = match read(&group.join("cgroup.procs")) {
        // A threaded group: its processes are listed further up, its threads here. A thread identifies a
        // network namespace as well as a process does.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            read(&group.join("cgroup.threads")).unwrap_or_default()
        }
        list => list?,
    };
    let ids = list.lines().filter_map(|line| line.parse::<u32>().ok());
    let (hidden, mut pids): (Vec<u32>, Vec<u32>) = ids.partition(|&pid| pid == 0);
    *foreign |= !hidden.is_empty();
    pids.truncate(PROCESSES_OF_GROUP);
    Ok(pids)
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(LIST).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0f3a2c1d-11aa-4bcd-8e6f-0123456789ab";

    #[test]
    fn groups_are_where_the_kubelet_makes_them() {
        let uid = Uid::new(UID).unwrap();
        let layouts = Layout::known();
        let paths = |layout: &Layout| layout.groups(&uid).map(|path| path.display().to_string());
        assert_eq!(
            paths(&layouts[1]),
            [
                format!("kubepods/pod{UID}"),
                format!("kubepods/burstable/pod{UID}"),
                format!("kubepods/besteffort/pod{UID}"),
            ]
        );
        let escaped = UID.replace('-', "_");
        let of = |at: &str, name: &str| format!("{at}/{name}-pod{escaped}.slice");
        assert_eq!(
            paths(&layouts[0]),
            [
                of("kubepods.slice", "kubepods"),
                of(
                    "kubepods.slice/kubepods-burstable.slice",
                    "kubepods-burstable"
                ),
                of(
                    "kubepods.slice/kubepods-besteffort.slice",
                    "kubepods-besteffort"
                ),
            ]
        );
        assert_eq!(
            paths(&layouts[2])[1],
            of(
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice",
                "kubelet-kubepods-burstable"
            )
        );
    }

    #[test]
    fn a_path_gives_the_pod_and_the_layout() {
        let uid = Uid::new(UID).unwrap();
        let mut layouts = Layout::known();
        layouts.push(Layout::Cgroupfs {
            top: "a/b/kubepods".into(),
        });
        layouts.push(Layout::Systemd {
            parent: "my.slice/my-own.slice".into(),
            slice: "my-own-kubepods".into(),
        });
        for layout in layouts {
            for group in layout.groups(&uid) {
                let path = format!("/{}/cri-containerd-0a.scope", group.display());
                assert_eq!(
                    pod_of(&path),
                    Some((uid.clone(), Some(layout.clone()))),
                    "{path}"
                );
            }
        }
        let escaped = UID.replace('-', "_");
        let relative = format!("/../../kubepods-burstable-pod{escaped}.slice/crio-0a.scope");
        assert_eq!(pod_of(&relative), Some((uid.clone(), None)));
        assert_eq!(pod_of(&format!("/../pod{UID}/0a")), Some((uid, None)));
    }

    #[test]
    fn a_group_made_within_a_pod_is_not_another_pod() {
        let own = "11111111111111111111111111111111";
        let (uid, _) = pod_of(&format!("/kubepods/pod{own}/0a/kubepods/pod{UID}/0b")).unwrap();
        assert_eq!(uid, Uid::new(own).unwrap());
    }

    #[test]
    fn other_groups_are_not_pods() {
        for path in [
            "/",
            "",
            "/system.slice/sshd.service",
            "/kubepods.slice/kubepods-burstable.slice",
            "/machine.slice/libpod-0a1b.scope",
            "/podman.slice/pod..",
            "/kubepods/pod",
            "/kubepods.slice/kubepods-pod0a-1b.slice",
        ] {
            assert_eq!(pod_of(path), None, "{path}");
        }
    }

    #[test]
    fn mounts_are_read_from_the_table() {
        let table = "proc /proc proc rw 0 0\n\
                     tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                     cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                     cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0\n\
                     cgroup /sys/fs/cgroup/systemd cgroup rw,xattr,name=systemd 0 0\n\
                     cgroup2 /sys/fs/my\\040cgroup cgroup2 rw 0 0\n";
        let expected = [
            "/sys/fs/my cgroup",
            "/sys/fs/cgroup/systemd",
            "/sys/fs/cgroup/pids",
        ];
        assert_eq!(mounts(table), expected.map(PathBuf::from));
    }
}
