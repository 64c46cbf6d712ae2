//! The agent's state in the kernel, as bpftool shows it to an operator.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    net::{IpAddr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Command,
};

use egress_common::classes::ClassSet;
use serde_json::Value;

use crate::{KernelObjects, Lab, Pod, eventually, holds};

/// Version directory of the pins.
const PINS: &str = "egress-agent/v2";

/// One address of a pod's allow map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// The classes.
    pub classes: ClassSet,
    /// The end of its lifetime, in nanoseconds of `CLOCK_BOOTTIME`.
    pub expires_ns: u64,
}

impl Lab {
    /// Directory of the agent's pins.
    pub fn pins(&self) -> PathBuf {
        self.bpffs().join(PINS)
    }

    /// Path of the pod's allow map.
    pub fn allow_pin(&self, pod: &Pod) -> PathBuf {
        self.pins()
            .join(format!("pods/{}_{}/allow", pod.namespace(), pod.name()))
    }

    /// The pod's allow map, read through its pin and by its field names, together with the addresses that the
    /// programs have learned.
    #[track_caller]
    pub fn allowed(&self, pod: &Pod) -> BTreeMap<IpAddr, Allowed> {
        let dump = |pin: &Path| entries(&dump(&text(pin)));
        let mut allowed = dump(&self.allow_pin(pod));
        let learned = self.allow_pin(pod).with_file_name("learned");
        if learned.exists() {
            let given = |entry: &Allowed| !entry.classes.is_empty();
            for (address, entry) in dump(&learned).into_iter().filter(|(_, entry)| given(entry)) {
                let known = allowed.entry(address).or_insert(entry);
                known.classes |= entry.classes;
                known.expires_ns = known.expires_ns.max(entry.expires_ns);
            }
        }
        allowed
    }

    /// The kernel's number of the pod's allow map.
    #[track_caller]
    pub fn allow_map(&self, pod: &Pod) -> u64 {
        let shown = bpftool(&["map", "show", "pinned", &text(&self.allow_pin(pod))]);
        shown["id"].as_u64().expect("the number of the map")
    }

    /// The kernel's numbers of the allow maps of all versions of policies, by the version.
    #[track_caller]
    pub fn allow_maps(&self) -> BTreeMap<u32, u64> {
        let entries = dump(&text(&self.pins().join("allow")));
        let number = |printed: &Value| {
            let bytes = bytes(printed).try_into().expect("four bytes");
            u32::from_ne_bytes(bytes)
        };
        let entry = |entry: &Value| (number(&entry["key"]), u64::from(number(&entry["value"])));
        entries.iter().map(entry).collect()
    }

    /// The entries of one of the pod's pinned maps, as bpftool formats them: objects with `key` and `value`.
    #[track_caller]
    pub fn pod_entries(&self, pod: &Pod, map: &str) -> Vec<Value> {
        formatted_entries(&self.allow_pin(pod).with_file_name(map))
    }

    /// The same of a map that all pods share.
    #[track_caller]
    pub fn shared_entries(&self, map: &str) -> Vec<Value> {
        formatted_entries(&self.pins().join(map))
    }

    /// Waits until each of these addresses is among the own addresses of some pod, known or not. Before, the programs deny
    /// every packet from it, also ARP and neighbour discovery.
    #[track_caller]
    pub fn wait_own(&self, addresses: &[IpAddr]) {
        let mapped = |address: &IpAddr| match address {
            IpAddr::V4(v4) => serde_json::json!(v4.to_ipv6_mapped().octets()),
            IpAddr::V6(v6) => serde_json::json!(v6.octets()),
        };
        eventually(&format!("{addresses:?} are pods' own"), || {
            let policies = self.shared_entries("policies");
            let own: Vec<&Value> = policies
                .iter()
                .filter_map(|entry| entry["value"]["own"].as_array())
                .flatten()
                .collect();
            let mut addresses = addresses.iter();
            holds(addresses.all(|address| own.contains(&&mapped(address))))
        });
    }

    /// Changes the values of one of the pod's pinned maps, for example to simulate the passage of time:
    /// `edit` gets the bytes of the key and of the value.
    #[track_caller]
    pub fn rewrite(&self, pod: &Pod, map: &str, edit: impl FnMut(&[u8], &mut [u8])) {
        rewrite(&text(&self.allow_pin(pod).with_file_name(map)), edit);
    }

    /// The same for a map that all pods share.
    #[track_caller]
    pub fn rewrite_shared(&self, map: &str, edit: impl FnMut(&[u8], &mut [u8])) {
        rewrite(&text(&self.pins().join(map)), edit);
    }

    /// Fills the map `ranges` with prefixes that mean nothing. So many entries stay free.
    #[track_caller]
    pub fn fill_ranges(&self, free: usize) {
        let pin = text(&self.pins().join("ranges"));
        let size = bpftool(&["map", "show", "pinned", &pin])["max_entries"]
            .as_u64()
            .expect("the size of the map");
        let known = dump(&pin);
        let value = vec!["0"; bytes(&known[0]["value"]).len()].join(" ");
        let lines = (0..size as usize - known.len() - free).map(|number| {
            let [high, low] = (number as u16).to_be_bytes();
            let host = format!("32 1 13 184 255 255 0 0 0 0 0 0 0 0 {high} {low}");
            format!("map update pinned {pin} key 128 0 0 0 {host} value {value}\n")
        });
        let batch = self.directory().join("ranges.batch");
        fs::write(&batch, lines.collect::<String>()).expect("write a batch");
        bpftool(&["batch", "file", &text(&batch)]);
    }

    /// Every path below the laboratory's BPF file system.
    pub fn all_pins(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        walk(&self.bpffs(), &mut found);
        found
    }
}

#[track_caller]
fn formatted_entries(pin: &Path) -> Vec<Value> {
    let entries = dump(&text(pin)).into_iter();
    entries.map(|entry| entry["formatted"].clone()).collect()
}

/// The entries of a pinned map. If one is removed while bpftool reads the map, bpftool prints an error in place of its value,
/// or begins anew and prints others twice: then it reads the map again.
#[track_caller]
fn dump(pin: &str) -> Vec<Value> {
    eventually("bpftool reads a map that does not change", || {
        let dump = bpftool(&["map", "dump", "pinned", pin]);
        let entries = dump
            .as_array()
            .unwrap_or_else(|| panic!("not a list of entries: {dump}"));
        let keys: HashSet<String> = entries
            .iter()
            .map(|entry| entry["key"].to_string())
            .collect();
        let is_read = |entry: &Value| entry["value"].get("error").is_none();
        let is_whole = keys.len() == entries.len() && entries.iter().all(is_read);
        is_whole.then(|| entries.clone())
    })
}

/// See [`Lab::rewrite`]; the pin identifies the map.
#[track_caller]
fn rewrite(pin: &str, mut edit: impl FnMut(&[u8], &mut [u8])) {
    for entry in dump(pin) {
        let (key, mut value) = (bytes(&entry["key"]), bytes(&entry["value"]));
        edit(&key, &mut value);
        let texts = |bytes: &[u8]| bytes.iter().map(u8::to_string).collect::<Vec<_>>();
        let (key, value) = (texts(&key), texts(&value));
        let mut arguments = vec!["map", "update", "pinned", pin, "key"];
        arguments.extend(key.iter().map(String::as_str));
        arguments.push("value");
        arguments.extend(value.iter().map(String::as_str));
        bpftool(&arguments);
    }
}

fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        // The kernel's own files in every bpffs (kernel/bpf/inode.c).
        if path.ends_with("progs.debug") || path.ends_with("maps.debug") {
            continue;
        }
        if path.is_dir() {
            walk(&path, found);
        }
        found.push(path);
    }
}

/// Bytes as bpftool prints them.
#[track_caller]
fn bytes(printed: &Value) -> Vec<u8> {
    let printed: Vec<String> = serde_json::from_value(printed.clone())
        .unwrap_or_else(|e| panic!("no bytes: {printed}: {e}"));
    let byte = |text: &String| u8::from_str_radix(text.trim_start_matches("0x"), 16);
    let bytes: Result<_, _> = printed.iter().map(byte).collect();
    bytes.unwrap_or_else(|e| panic!("no bytes: {printed:?}: {e}"))
}

fn text(path: &Path) -> String {
    path.to_str()
        .expect("the laboratory's paths are UTF-8")
        .to_owned()
}

/// The entries of a dumped allow map.
#[track_caller]
fn entries(dump: &[Value]) -> BTreeMap<IpAddr, Allowed> {
    dump.iter()
        .map(|entry| {
            let fields = &entry["formatted"];
            let number = |field: &str| {
                fields["value"][field].as_u64().unwrap_or_else(|| {
                    panic!("bpftool shows no field {field:?} in the value of {entry}")
                })
            };
            let bytes: Vec<u8> = serde_json::from_value(fields["key"]["addr"].clone())
                .unwrap_or_else(|e| {
                    panic!("bpftool shows no field \"addr\" in the key of {entry}: {e}")
                });
            let bytes: [u8; 16] = bytes.try_into().expect("an address has 16 bytes");
            let allowed = Allowed {
                classes: ClassSet {
                    words: serde_json::from_value(fields["value"]["classes"]["words"].clone())
                        .unwrap_or_else(|e| panic!("bpftool shows no classes of {entry}: {e}")),
                },
                expires_ns: number("expires_ns"),
            };
            (Ipv6Addr::from(bytes).to_canonical(), allowed)
        })
        .collect()
}

/// Runs `bpftool -j` and returns what it printed; panics when it fails.
#[track_caller]
pub fn bpftool(arguments: &[&str]) -> Value {
    let output = Command::new("bpftool").arg("-j").args(arguments).output();
    let output = output.expect("bpftool, of the package bpftool");
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "bpftool {}: {printed}",
        arguments.join(" ")
    );
    serde_json::from_str(&printed).unwrap_or_else(|e| panic!("bpftool printed no JSON: {e}"))
}

impl KernelObjects {
    /// The objects of these that still exist in the kernel.
    #[track_caller]
    #[must_use]
    pub fn existing(&self) -> Self {
        let ids = |kind| -> Vec<u32> {
            let listed = bpftool(&[kind, "show"]);
            let listed = listed.as_array().into_iter().flatten();
            listed
                .filter_map(|object| object["id"].as_u64()?.try_into().ok())
                .collect()
        };
        let (programs, maps) = (ids("prog"), ids("map"));
        Self {
            programs: self
                .programs
                .iter()
                .copied()
                .filter(|id| programs.contains(id))
                .collect(),
            maps: self
                .maps
                .iter()
                .copied()
                .filter(|id| maps.contains(id))
                .collect(),
        }
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.programs.is_empty() && self.maps.is_empty()
    }
}
