use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::symlink,
};

use tempfile::TempDir;

use super::*;

/// How long a test waits for a snapshot: much longer than it takes.
const PATIENCE: Duration = Duration::from_secs(20);

struct Watched {
    dir: TempDir,
    receiver: watch::Receiver<Arc<Snapshot>>,
    thread: DirectoryThread,
}

fn pod(name: &str, allow: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  annotations:\n    \
         egress-agent.dev/interface: veth-{name}\n    egress-agent.dev/allow: {allow}\n"
    )
}

impl Watched {
    /// Watches the directory `pods` below a temporary one.
    fn new(prepare: impl FnOnce(&Path)) -> Self {
        let dir = TempDir::new().unwrap();
        let pods = dir.path().join("pods");
        fs::create_dir(&pods).unwrap();
        prepare(&pods);
        let (receiver, thread) = Directory::watch(&pods).unwrap();
        Self {
            dir,
            receiver,
            thread,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("pods").join(name)
    }

    /// Waits for a snapshot that fulfils the condition.
    fn wait(&mut self, expected: impl Fn(&Snapshot) -> bool) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let waited = runtime.block_on(async {
            let wait = self.receiver.wait_for(|snapshot| expected(snapshot));
            tokio::time::timeout(PATIENCE, wait)
                .await
                .map(|found| found.is_ok())
        });
        assert!(waited == Ok(true), "still {:?}", self.receiver.borrow());
    }

    /// Waits until the snapshot has these pods with these allow lists.
    fn wait_for(&mut self, pods: &[(&str, &str)]) {
        self.wait(|snapshot| allows(snapshot) == pods);
    }
}

fn allows(snapshot: &Snapshot) -> Vec<(&str, &str)> {
    let pods = snapshot.pods.values();
    pods.map(|pod| (&*pod.name, &*pod.annotations["egress-agent.dev/allow"]))
        .collect()
}

#[test]
fn the_first_snapshot_is_there_at_once() {
    let watched = Watched::new(|pods| fs::write(pods.join("a.yaml"), pod("a", "x")).unwrap());
    assert_eq!(allows(&watched.receiver.borrow()), [("a", "x")]);
    watched.thread.close();
}

#[test]
fn added_changed_renamed_and_removed_files_are_noticed() {
    let mut watched = Watched::new(|_| {});
    fs::write(watched.path("a.yaml"), pod("a", "one")).unwrap();
    watched.wait_for(&[("a", "one")]);
    fs::write(watched.path("a.yaml"), pod("a", "two")).unwrap();
    watched.wait_for(&[("a", "two")]);
    fs::write(watched.path(".tmp"), pod("a", "six")).unwrap();
    fs::rename(watched.path(".tmp"), watched.path("a.yaml")).unwrap();
    watched.wait_for(&[("a", "six")]);
    fs::rename(watched.path("a.yaml"), watched.path("a.off")).unwrap();
    watched.wait_for(&[]);
    fs::rename(watched.path("a.off"), watched.path("b.yaml")).unwrap();
    watched.wait_for(&[("a", "six")]);
    fs::remove_file(watched.path("b.yaml")).unwrap();
    watched.wait_for(&[]);
    watched.thread.close();
}

#[test]
fn a_half_written_file_does_not_count_until_it_is_closed() {
    let mut watched = Watched::new(|pods| fs::write(pods.join("a.yaml"), pod("a", "x")).unwrap());
    let path = watched.path("a.yaml");
    let mut file = OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(path)
        .unwrap();
    file.write_all(b"---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n")
        .unwrap();
    // Another change makes the thread read the directory in between.
    fs::write(watched.path("b.yaml"), pod("b", "y")).unwrap();
    watched.wait_for(&[("a", "x"), ("b", "y")]);
    file.write_all(
        pod("", "")
            .split_once("name: \n")
            .unwrap()
            .1
            .replace("allow: ", "allow: z")
            .as_bytes(),
    )
    .unwrap();
    drop(file);
    watched.wait_for(&[("a", "z"), ("b", "y")]);
    watched.thread.close();
}

#[test]
fn a_broken_edit_is_reported_and_changes_nothing() {
    let mut watched = Watched::new(|pods| fs::write(pods.join("a.yaml"), pod("a", "x")).unwrap());
    fs::write(watched.path("a.yaml"), "kind: [").unwrap();
    watched.wait(|snapshot| !snapshot.problems.is_empty());
    assert_eq!(allows(&watched.receiver.borrow()), [("a", "x")]);
    watched.thread.close();
}

#[test]
fn a_directory_that_disappears_and_comes_back_is_followed() {
    let mut watched = Watched::new(|pods| fs::write(pods.join("a.yaml"), pod("a", "x")).unwrap());
    let pods = watched.dir.path().join("pods");
    fs::rename(&pods, watched.dir.path().join("gone")).unwrap();
    watched.wait(|snapshot| snapshot.problems.len() == 1);
    assert_eq!(allows(&watched.receiver.borrow()), [("a", "x")]);
    fs::create_dir(&pods).unwrap();
    fs::write(pods.join("b.yaml"), pod("b", "y")).unwrap();
    watched.wait_for(&[("b", "y")]);
    fs::write(pods.join("b.yaml"), pod("b", "z")).unwrap();
    watched.wait_for(&[("b", "z")]);
    watched.thread.close();
}

#[test]
fn a_mounted_config_map_that_swaps_its_data_link_is_followed() {
    let version = |pods: &Path, name: &str, allow: &str| {
        fs::create_dir(pods.join(name)).unwrap();
        fs::write(pods.join(name).join("a.yaml"), pod("a", allow)).unwrap();
    };
    let mut watched = Watched::new(|pods| {
        version(pods, "..1", "one");
        symlink("..1", pods.join("..data")).unwrap();
        symlink("..data/a.yaml", pods.join("a.yaml")).unwrap();
    });
    assert_eq!(allows(&watched.receiver.borrow()), [("a", "one")]);
    version(&watched.dir.path().join("pods"), "..2", "two");
    symlink("..2", watched.path("..data_tmp")).unwrap();
    fs::rename(watched.path("..data_tmp"), watched.path("..data")).unwrap();
    watched.wait_for(&[("a", "two")]);
    watched.thread.close();
}

#[test]
fn a_missing_directory_is_a_problem_until_it_appears() {
    let dir = TempDir::new().unwrap();
    let (receiver, thread) = Directory::watch(dir.path().join("pods")).unwrap();
    let problems = receiver.borrow().problems.clone();
    assert_eq!(problems.len(), 1, "{problems:?}");
    let mut watched = Watched {
        dir,
        receiver,
        thread,
    };
    fs::create_dir(watched.path("")).unwrap();
    fs::write(watched.path("a.yaml"), pod("a", "x")).unwrap();
    watched.wait_for(&[("a", "x")]);
    watched.wait(|snapshot| snapshot.problems.is_empty());
    watched.thread.close();
}
