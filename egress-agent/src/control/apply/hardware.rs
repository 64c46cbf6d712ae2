//! Binding ports of bridges to the hardware addresses of their pods.
//!
//! A port is bound to the address that the kernel has for the pod's end, unless somebody else has that address. A
//! network plugin may change it while it makes the network, so the binding follows it until a process of the pod is
//! found. After that it never changes, because a program with `CAP_NET_ADMIN` may have changed the address.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
    io,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use egress_common::{
    ids::IfIndex,
    records::{HARDWARE_REFUSED, HARDWARE_SETTLED, LinkHardware},
};

use crate::{
    control::observe::{Observed, machine::Machine},
    datapath::{Datapath, LinkHardwareMap},
    host::{HardwareAddress, Host, Link, Links},
};

/// How long the gateways' addresses are used without reading them again. A refused address is checked again in every
/// reconcile.
const GATEWAYS_FOR: Duration = Duration::from_secs(10);

/// The hardware addresses that ports of bridges are bound to.
pub(in crate::control) struct Hardware {
    map: LinkHardwareMap,
    /// By the index of the host end.
    ports: BTreeMap<IfIndex, Bound>,
    gateways: Option<(BTreeSet<HardwareAddress>, Instant)>,
    /// By the index of a port: its bridge, if the bridge is kept from learning from the port's frames to link-local
    /// addresses.
    protected: BTreeMap<IfIndex, IfIndex>,
}

/// The address that a port is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bound {
    address: HardwareAddress,
    /// Why nothing may be sent from this address.
    refused: Option<String>,
    /// Whether the binding is final.
    settled: bool,
}

impl Bound {
    fn entry(&self) -> LinkHardware {
        let refused = if self.refused.is_some() {
            HARDWARE_REFUSED
        } else {
            0
        };
        let settled = if self.settled { HARDWARE_SETTLED } else { 0 };
        LinkHardware {
            addr: self.address.0,
            flags: refused | settled,
        }
    }

    /// The binding by an earlier agent. A refused address is checked again.
    fn inherited(entry: LinkHardware) -> Option<Self> {
        (entry.flags & HARDWARE_REFUSED == 0).then_some(Self {
            address: HardwareAddress(entry.addr),
            refused: None,
            settled: entry.flags & HARDWARE_SETTLED != 0,
        })
    }
}

impl Hardware {
    /// Starts with the bindings of an earlier agent.
    ///
    /// # Errors
    ///
    /// When the map cannot be opened or read.
    pub(in crate::control) fn open(datapath: &Datapath) -> Result<Self> {
        let map = datapath.link_hardware()?;
        let entries = map.entries()?.into_iter();
        let ports = entries.filter_map(|(ifindex, entry)| {
            let bound = Bound::inherited(entry)?;
            Some((ifindex, bound))
        });
        Ok(Self {
            ports: ports.collect(),
            gateways: None,
            protected: BTreeMap::new(),
            map,
        })
    }

    /// Why nothing may be sent on one of these interfaces.
    pub(super) fn problem(&self, interfaces: &[IfIndex]) -> Option<String> {
        let mut ports = interfaces.iter().filter_map(|at| self.ports.get(at));
        ports.find_map(|bound| {
            let whose = bound.refused.as_ref()?;
            Some(format!(
                "the hardware address {} of its interface is {whose}: nothing leaves the pod there",
                bound.address
            ))
        })
    }

    /// Binds the ports of bridges among these interfaces. `running` are those behind which a pod's
    /// process was found.
    pub(super) fn bind(&mut self, machine: &mut Machine, running: &HashSet<IfIndex>) -> Result<()> {
        let Machine { host, links, .. } = machine;
        let links = &*links;
        let ports: BTreeMap<IfIndex, (&Link, IfIndex)> = links
            .iter()
            .filter(|link| link.is_host_end())
            .filter_map(|link| Some((link.ifindex, (link, link.bridge?))))
            .collect();
        self.ports.retain(|ifindex, _| ports.contains_key(ifindex));
        let gateways = self
            .gateways(host)
            .context("cannot find the gateways")?
            .clone();
        // A gateway's address may have become known only after a port was bound to it.
        let is_decided = |bound: &Bound| bound.settled && !gateways.contains(&bound.address);
        let mut undecided: VecDeque<IfIndex> = ports
            .keys()
            .copied()
            .filter(|ifindex| !self.ports.get(ifindex).is_some_and(is_decided))
            .collect();
        let mut given_up = HashSet::new();
        while let Some(ifindex) = undecided.pop_front() {
            let (link, bridge) = ports[&ifindex];
            let Some(peer) = link.peer else {
                continue;
            };
            // An address that cannot be read counts as none, and is read again in the next reconcile.
            let read = host.hardware_of(ifindex, peer).ok().flatten();
            let address = read.unwrap_or_default();
            let holder = self.ports.iter().find(|(other, bound)| {
                let on_bridge = ports.get(other).map(|(_, bridge)| *bridge);
                **other != ifindex && on_bridge == Some(bridge) && bound.address == address
            });
            let holder = holder.map(|(&other, _)| (other, ports[&other].0.peer));
            // If the port's pod has another address now, the port no longer holds this one.
            if let Some((other, Some(peer))) = holder
                && !given_up.contains(&other)
                && host
                    .hardware_of(other, peer)
                    .ok()
                    .flatten()
                    .is_some_and(|now| now != address)
            {
                self.ports.remove(&other);
                given_up.insert(other);
                undecided.push_back(other);
            }
            let refused = if gateways.contains(&address) {
                Some("that of a gateway".to_owned())
            } else {
                let others = self.ports.iter().filter(|(other, bound)| {
                    let on_bridge = ports.get(other).map(|(_, bridge)| *bridge);
                    **other != ifindex && on_bridge == Some(bridge) && bound.refused.is_none()
                });
                let others = others.map(|(other, bound)| (*other, bound.address));
                whose(address, links, others)
            };
            let settled = refused.is_none() && running.contains(&ifindex);
            let bound = Bound {
                address,
                refused,
                settled,
            };
            self.ports.insert(ifindex, bound);
        }
        self.write()?;
        self.protect(host, &ports)
    }

    /// Keeps bridges from learning addresses by frames that no netfilter hook sees.
    fn protect(
        &mut self,
        host: &mut Host,
        ports: &BTreeMap<IfIndex, (&Link, IfIndex)>,
    ) -> Result<()> {
        self.protected.retain(|port, _| ports.contains_key(port));
        for (&port, &(link, bridge)) in ports {
            if self.protected.get(&port) == Some(&bridge) {
                continue;
            }
            host.protect_bridge(bridge, port).with_context(|| {
                format!(
                    "the bridge of interface {} may learn from frames to link-local addresses",
                    link.name
                )
            })?;
            self.protected.insert(port, bridge);
        }
        Ok(())
    }

    /// The gateways' addresses, read again if they are old.
    fn gateways(&mut self, host: &mut Host) -> io::Result<&BTreeSet<HardwareAddress>> {
        let is_fresh = |(_, read): &(_, Instant)| read.elapsed() < GATEWAYS_FOR;
        let known = match self.gateways.take().filter(is_fresh) {
            Some(known) => known,
            None => (host.hardware_of_gateways()?, Instant::now()),
        };
        Ok(&self.gateways.insert(known).0)
    }

    fn write(&mut self) -> Result<()> {
        let written: BTreeMap<IfIndex, LinkHardware> = self.map.entries()?.into_iter().collect();
        for ifindex in written.keys() {
            if !self.ports.contains_key(ifindex) {
                self.map.unbind(*ifindex)?;
            }
        }
        for (ifindex, bound) in &self.ports {
            let entry = bound.entry();
            if written.get(ifindex) != Some(&entry) {
                self.map.bind(*ifindex, entry)?;
            }
        }
        Ok(())
    }
}

/// Who else has an address, if anybody does. `others` are the addresses that other ports of the bridge are bound to.
fn whose(
    address: HardwareAddress,
    links: &Links,
    mut others: impl Iterator<Item = (IfIndex, HardwareAddress)>,
) -> Option<String> {
    if !address.is_unicast() {
        return Some("that of no interface".to_owned());
    }
    let mut of_node = links.iter();
    if let Some(link) = of_node.find(|link| link.hardware == Some(address)) {
        return Some(format!("that of the node's interface {}", link.name));
    }
    let (other, _) = others.find(|(_, bound)| *bound == address)?;
    let name = links.get(other).map_or("", |link| link.name.as_str());
    Some(format!("that of the pod behind interface {name}"))
}

/// The interfaces behind which pods' processes were found.
pub(super) fn running(observed: &Observed<'_>) -> HashSet<IfIndex> {
    let identified = observed
        .pods
        .iter()
        .filter(|(subject, _)| !subject.is_interface());
    identified
        .flat_map(|(_, found)| found.location.interfaces().iter().copied())
        .collect()
}
