//! The kernel side: programs, maps, pins and links. Nothing else in the agent uses aya.

mod allow;
mod bpffs;
mod clsact;
mod counters;
#[cfg(feature = "test-support")]
mod dry_run;
mod flow_map;
mod frame_record;
mod ingress;
mod inner;
mod interfaces;
mod kernel_types;
mod keyed;
mod learning;
mod link_hardware;
mod link_owners;
mod links;
mod loading;
mod names;
mod netlink;
mod node_addresses;
mod object;
mod open_flows;
mod outer;
mod pins;
mod policies;
mod probes;
mod ranges;
mod rings;
mod stamp;
mod stamp_check;
mod take;
mod tcx;
mod trace;
mod traffic_control;
mod unused;
mod view;

use std::time::Duration;

pub use allow::{AllowError, AllowMap};
pub use bpffs::mount_if_missing;
pub use counters::CounterMap;
#[cfg(feature = "test-support")]
pub use dry_run::{Action, DryRun};
pub use flow_map::{FlowMap, Seed, SeedState, SweepResult};
pub use interfaces::{Adoptable, InterfaceMap};
pub use learning::{Decided, DnsTimesMap, LearningMaps, PendingMap};
pub use link_hardware::LinkHardwareMap;
pub use link_owners::LinkOwners;
pub use links::{Attach, Hook, Position};
pub use loading::Marks;
pub use names::{Kept, NameMap, NamesError};
pub use node_addresses::NodeAddressMap;
pub use object::{Datapath, Options};
pub use open_flows::OpenFlows;

pub use pins::{Lock, PodPins, TryLock, cleanup};
pub use policies::{NewMaps, NewPod, NewPolicy, PolicyPrefix};
pub use probes::ProbeMap;
pub use ranges::{RangeEntry, prefix_of};
pub use rings::{DenialRing, HeldFrame, HeldRing, NoteRing};
pub use stamp_check::{Looked, TABLE as STAMP_TABLE, Unstamped, WithoutStamp};
pub use trace::TraceLog;
pub use unused::{Removal, Unused};
pub use view::View;

/// Whether a BPF program with this prefix in its name is loaded on this machine.
pub fn is_loaded(prefix: &str) -> bool {
    aya::programs::loaded_programs().flatten().any(|program| {
        program
            .name_as_str()
            .is_some_and(|name| name.starts_with(prefix))
    })
}

/// Now, in nanoseconds of `CLOCK_BOOTTIME`: the clock of every `_ns` field in the maps.
///
/// # Panics
///
/// On a kernel without that clock, which came with 2.6.39.
pub fn boottime_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .expect("every kernel that loads the programs has CLOCK_BOOTTIME");
    Duration::from(now).as_nanos() as u64
}
