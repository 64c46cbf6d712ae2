//! The wanted enforcement of a pod: a policy, on interfaces.

use std::{net::IpAddr, sync::Arc};

use egress_common::{
    address::{self, Address},
    classes::ClassSet,
    ids::{IfIndex, PodId, PolicyId},
    limits::OWN_ADDRESSES,
    records::{INTERFACE_REJECT, Interface, MODE_AUDIT, MODE_ENFORCE, POLICY_OWN_UNSURE, Policy},
};

use crate::control::{digest, observe::locations::PodLocation};
use crate::{
    config::{Config, OnDeny},
    host::Network,
    pods::Pod,
};
use egress_policy::{Compiled, Mode};

/// The wanted enforcement of a pod.
#[derive(Clone, Debug)]
pub(in crate::control) struct Wanted {
    pub(in crate::control) uid: String,
    /// Its interfaces' indexes, in order; never empty.
    pub(in crate::control) interfaces: Vec<IfIndex>,
    /// The network namespaces on the other ends, where they are known.
    pub(in crate::control) networks: Vec<Network>,
    pub(in crate::control) compiled: Arc<Compiled>,
    /// `compiled.record` with the pod's own addresses.
    pub(in crate::control) record: Policy,
    pub(in crate::control) mode: u32,
    pub(in crate::control) flags: u32,
    /// The number of the ranges that it is under. Different ranges make a new version.
    ranges: u64,
}

/// Which ranges and tunnels verdicts are under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::control) struct RangesVersion {
    /// Counted since the agent started. Flows that passed under earlier ranges are judged again.
    number: u64,
    /// The same for every agent with these ranges.
    fingerprint: u64,
}

impl RangesVersion {
    /// The ranges that the agent starts with.
    pub(in crate::control) fn first(config: &Config) -> Self {
        Self {
            number: Wanted::NO_RANGES + 1,
            fingerprint: digest::of_ranges(config),
        }
    }

    /// The same for every agent with these ranges.
    pub(in crate::control) fn fingerprint(self) -> u64 {
        self.fingerprint
    }

    /// Other ranges are in force from now on.
    pub(in crate::control) fn change(&mut self, config: &Config) {
        self.number += 1;
        self.fingerprint = digest::of_ranges(config);
    }
}

impl Wanted {
    /// The number of no ranges: they are counted from 1 on.
    const NO_RANGES: u64 = 0;

    /// Of the pod's own addresses the first [`OWN_ADDRESSES`] count.
    pub(in crate::control) fn new(
        pod: &Pod,
        own: &[IpAddr],
        location: &PodLocation,
        compiled: Arc<Compiled>,
        on_deny: OnDeny,
        ranges: RangesVersion,
    ) -> Self {
        let mut record = compiled.record;
        record.ranges = ranges.fingerprint;
        for (slot, ip) in record.own.iter_mut().zip(own) {
            *slot = mapped(*ip);
        }
        record.own_len = own.len().min(OWN_ADDRESSES) as u32;
        let is_sure = |ip: &IpAddr| pod.addresses.contains(ip) || location.first.made.contains(ip);
        if !own.iter().all(is_sure) {
            record.flags |= POLICY_OWN_UNSURE;
        }
        Self {
            uid: pod.uid.clone(),
            interfaces: location.interfaces.clone(),
            networks: location.networks.clone(),
            record,
            mode: mode_of(&compiled),
            flags: match on_deny {
                OnDeny::Drop => 0,
                OnDeny::Reject => INTERFACE_REJECT,
            },
            compiled,
            ranges: ranges.number,
        }
    }

    /// Another policy of the same pod, on the same interfaces and with the same own addresses.
    pub(in crate::control) fn under(&self, compiled: Arc<Compiled>, ranges: RangesVersion) -> Self {
        let mut record = compiled.record;
        record.ranges = ranges.fingerprint;
        (record.own, record.own_len) = (self.record.own, self.record.own_len);
        record.flags |= self.record.flags & POLICY_OWN_UNSURE;
        Self {
            record,
            mode: mode_of(&compiled),
            compiled,
            ranges: ranges.number,
            ..self.clone()
        }
    }

    /// The pod's own addresses that count.
    pub(in crate::control) fn own(&self) -> &[Address] {
        self.record
            .own
            .get(..self.record.own_len as usize)
            .unwrap_or_default()
    }

    /// The prefixes of the policy, as the datapath takes them.
    pub(in crate::control) fn cidrs(
        &self,
    ) -> impl ExactSizeIterator<Item = (Address, u32, ClassSet)> + '_ {
        self.compiled
            .cidrs
            .iter()
            .map(|cidr| (cidr.network, cidr.prefix_len, cidr.classes))
    }

    /// The entry of the pod's interfaces under this version.
    pub(in crate::control) fn entry(&self, pod: PodId, policy: PolicyId) -> Interface {
        let mut entry = Interface::new(pod, policy, self.mode);
        entry.flags = self.flags;
        entry
    }

    /// The same policy where the other one is in force.
    pub(in crate::control) fn on_interfaces_of(self, other: &Self) -> Self {
        Self {
            interfaces: other.interfaces.clone(),
            networks: other.networks.clone(),
            ..self
        }
    }

    /// The same policy on those of these interfaces, and in those of these networks, that are new. `None` when the
    /// networks are known and none is new.
    pub(in crate::control) fn only_new(
        &self,
        interfaces: &[IfIndex],
        networks: &[Network],
    ) -> Option<Self> {
        let is_known = |network: &Network| {
            let mut known = self.networks.iter();
            known.any(|known| known.inode == network.inode)
        };
        let mut wanted = self.on_new(interfaces, networks);
        wanted.networks.retain(|network| !is_known(network));
        (networks.is_empty() || !wanted.networks.is_empty()).then_some(wanted)
    }

    /// The same policy on those of these interfaces that are new, in these networks.
    pub(in crate::control) fn on_new(&self, interfaces: &[IfIndex], networks: &[Network]) -> Self {
        let new = |ifindex: &IfIndex| !self.interfaces.contains(ifindex);
        Self {
            interfaces: interfaces.iter().copied().filter(new).collect(),
            networks: networks.to_vec(),
            ..self.clone()
        }
    }

    /// Makes the next plan give the pod a new version of its policy, so that its flows are judged again.
    pub(in crate::control) fn judge_again(&mut self) {
        self.ranges = Self::NO_RANGES;
    }

    /// Whether every entry of the pod's allow map under the other version is right under this one, and none is
    /// missing: names give addresses the same classes, and the classes mean the same.
    pub(in crate::control) fn has_allow_map_of(&self, other: &Self) -> bool {
        self.record.names_alike(&other.record)
            && self.compiled.names.grants_alike(&other.compiled.names)
    }

    /// Whether this is the same policy, wherever it is attached.
    pub(in crate::control) fn same_policy(&self, other: &Self) -> bool {
        self.compiled == other.compiled
            && self.record == other.record
            && self.mode == other.mode
            && self.flags == other.flags
            && self.ranges == other.ranges
    }
}

/// The mode of an interface under this policy.
fn mode_of(compiled: &Compiled) -> u32 {
    match compiled.mode {
        Mode::Audit => MODE_AUDIT,
        Mode::Enforce | Mode::Off => MODE_ENFORCE,
    }
}

/// An address as the maps hold it.
pub(in crate::control) fn mapped(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(ip) => address::from_v4(ip.octets()),
        IpAddr::V6(ip) => ip.octets(),
    }
}
