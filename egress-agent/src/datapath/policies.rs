//! Policies and their inner maps, pods and their flows.

use std::collections::HashSet;

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, LpmTrie, Map, MapData, MapError, lpm_trie::Key};
use egress_common::{
    address::Address,
    flow::{is_alive, is_open},
    limits::FLOW_ENTRIES,
    records::{AllowEntry, AllowKey, CidrEntry, Flow, FlowKey, Policy},
};

use super::{AllowError, AllowMap, Datapath, PodPins, interfaces};

impl Datapath {
    /// Makes a pod's own maps: flows, meter, identity. `pod` must be new.
    ///
    /// # Errors
    ///
    /// When a map cannot be made or written.
    pub fn create_pod(
        &mut self,
        pod: u32,
        namespace: &str,
        name: &str,
        uid: &str,
    ) -> Result<PodPins> {
        let identity = interfaces::identity(namespace, name, uid)?;
        let pins = self.layout.pod(namespace, name);
        pins.remove()?;
        let flows = self.templates.flows()?;
        pins.replace("flows", &flows)?;
        self.flows
            .insert(pod, &flows, 0)
            .context("cannot write the map `flows`")?;
        self.meters
            .insert(pod, egress_common::records::Meter::default(), 0)
            .context("cannot write the map `meters`")?;
        self.identities
            .insert(pod, identity, 0)
            .context("cannot write the map `identities`")?;
        Ok(pins)
    }

    /// Where the pins of an adopted pod are.
    pub fn pins_of(&self, namespace: &str, name: &str) -> PodPins {
        self.layout.pod(namespace, name)
    }

    /// Removes a pod's own maps and pins, but for its meter (see [`super::CounterMap::forget`]).
    /// Its interfaces must be detached and its policy dropped.
    ///
    /// # Errors
    ///
    /// When a pin or an entry cannot be removed.
    pub fn remove_pod(&mut self, pod: u32, pins: &PodPins) -> Result<()> {
        pins.remove()?;
        self.remove_pod_maps(pod)
    }

    /// Removes a pod's own maps and leaves the pins, which are another pod's by now.
    ///
    /// # Errors
    ///
    /// When an entry cannot be removed.
    pub fn remove_pod_maps(&mut self, pod: u32) -> Result<()> {
        gone(self.flows.remove(&pod)).context("cannot write the map `flows`")?;
        gone(self.identities.remove(&pod)).context("cannot write the map `identities`")
    }

    /// Makes a version of a policy. Nothing is under it until an interface says so.
    ///
    /// # Errors
    ///
    /// When a map cannot be made or written.
    pub fn create_policy(
        &mut self,
        id: u32,
        policy: &Policy,
        cidrs: impl ExactSizeIterator<Item = (Address, u32, u64)>,
    ) -> Result<AllowMap> {
        // First and last of all in this map, so that it knows of everything that may be left.
        self.policies
            .insert(id, policy, 0)
            .context("cannot write the map `policies`")?;
        let allow = self.templates.allow(self.allow_entries)?;
        self.allow
            .insert(id, &allow, 0)
            .context("cannot write the map `allow`")?;
        if cidrs.len() > 0 {
            let trie = self.templates.cidrs(cidrs.len() as u32)?;
            self.cidrs
                .insert(id, &trie, 0)
                .context("cannot write the map `cidrs`")?;
            let mut trie = trie_of(trie)?;
            for (network, prefix_len, classes) in cidrs {
                trie.insert(&Key::new(prefix_len, network), CidrEntry { classes }, 0)
                    .context("cannot write a policy's CIDR trie")?;
            }
        }
        self.allow_map(allow)
    }

    /// Pins a policy's allow map as the pod's.
    ///
    /// # Errors
    ///
    /// When the map is unknown or cannot be pinned.
    pub fn pin_allow(&self, id: u32, pins: &PodPins) -> Result<()> {
        let allow: MapData = self
            .allow
            .get(&id, 0)
            .with_context(|| format!("policy {id} has no allow map"))?;
        pins.replace("allow", &allow)
    }

    /// A policy that an earlier agent made, when it is exactly this one.
    ///
    /// # Errors
    ///
    /// When the maps cannot be read.
    pub fn adopt_policy(
        &self,
        id: u32,
        policy: &Policy,
        cidrs: impl ExactSizeIterator<Item = (Address, u32, u64)>,
    ) -> Result<Option<AllowMap>> {
        match self.policies.get(&id, 0) {
            Ok(found) if found == *policy => {}
            Ok(_) | Err(MapError::KeyNotFound) => return Ok(None),
            Err(error) => return Err(error).context("cannot read the map `policies`"),
        }
        let mut expected: Vec<_> = cidrs.collect();
        expected.sort_unstable();
        let mut found: Vec<(Address, u32, u64)> = Vec::new();
        match self.cidrs.get(&id, 0) {
            Ok(trie) => {
                for item in &trie_of(trie)? {
                    let (key, entry) = item.context("cannot read a policy's CIDR trie")?;
                    found.push((key.data(), key.prefix_len(), entry.classes));
                }
            }
            Err(MapError::KeyNotFound) => {}
            Err(error) => return Err(error).context("cannot read the map `cidrs`"),
        }
        found.sort_unstable();
        if found != expected {
            return Ok(None);
        }
        let allow: MapData = match self.allow.get(&id, 0) {
            Ok(allow) => allow,
            Err(MapError::KeyNotFound) => return Ok(None),
            Err(error) => return Err(error).context("cannot read the map `allow`"),
        };
        if allow
            .info()
            .context("cannot look at an allow map")?
            .max_entries()
            != self.allow_entries
        {
            return Ok(None);
        }
        self.allow_map(allow).map(Some)
    }

    /// Forgets a version of a policy. No interface may be under it.
    ///
    /// # Errors
    ///
    /// When an entry cannot be removed.
    pub fn drop_policy(&mut self, id: u32) -> Result<()> {
        gone(self.allow.remove(&id)).context("cannot write the map `allow`")?;
        gone(self.cidrs.remove(&id)).context("cannot write the map `cidrs`")?;
        gone(self.policies.remove(&id)).context("cannot write the map `policies`")
    }

    /// The flows of a pod.
    ///
    /// # Errors
    ///
    /// When the pod has no flow map.
    pub fn flow_map(&self, pod: u32) -> Result<FlowMap> {
        let map: MapData = self
            .flows
            .get(&pod, 0)
            .with_context(|| format!("pod {pod} has no flow map"))?;
        Ok(FlowMap(HashMap::try_from(Map::HashMap(map))?))
    }

    fn allow_map(&self, allow: MapData) -> Result<AllowMap> {
        let map: HashMap<MapData, AllowKey, AllowEntry> = HashMap::try_from(Map::HashMap(allow))?;
        Ok(AllowMap::new(map, self.allow_entries as usize))
    }
}

/// The flows that a pod has open.
#[derive(Debug, Default)]
pub struct OpenFlows {
    /// Where they lead.
    pub to: HashSet<Address>,
    /// How many flows were looked at, open or not.
    pub flows: usize,
}

/// Handle on one pod's flows.
pub struct FlowMap(HashMap<MapData, FlowKey, Flow>);

impl FlowMap {
    /// Every flow and every fragmented packet that is remembered.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn entries(&self) -> Result<Vec<(FlowKey, Flow)>> {
        self.0
            .iter()
            .collect::<Result<_, _>>()
            .context("cannot read a pod's flows")
    }

    /// The flows that the pod has open.
    ///
    /// # Errors
    ///
    /// When the map cannot be read; [`AllowError::Full`] when it changes too fast for that.
    pub fn open(&self, now_ns: u64) -> Result<OpenFlows, AllowError> {
        let mut open = OpenFlows::default();
        for item in &self.0 {
            let (key, flow) = item.map_err(AllowError::Kernel)?;
            if is_open(&key, &flow, now_ns) {
                open.to.insert(key.peer_addr);
            }
            // Where the entry last seen is removed, the kernel begins again with the first.
            open.flows += 1;
            if open.flows > 2 * FLOW_ENTRIES as usize {
                return Err(AllowError::Full);
            }
        }
        Ok(open)
    }

    /// Forgets flows that have been idle for too long, and gives each destination of a flow that
    /// the pod has open to `open`.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn sweep(&mut self, now_ns: u64, mut open: impl FnMut(Address)) -> Result<()> {
        let mut idle = Vec::new();
        for item in &self.0 {
            let (key, flow) = item.context("cannot read a pod's flows")?;
            if !is_alive(&key, &flow, now_ns) {
                idle.push(key);
            } else if is_open(&key, &flow, now_ns) {
                open(key.peer_addr);
            }
        }
        for key in idle {
            gone(self.0.remove(&key)).context("cannot forget a flow")?;
        }
        Ok(())
    }
}

fn trie_of(map: MapData) -> Result<LpmTrie<MapData, Address, CidrEntry>> {
    Ok(LpmTrie::try_from(Map::LpmTrie(map))?)
}

/// That an entry is not there is no error when it is to be removed.
pub(super) fn gone(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::SyscallError(syscall))
            if syscall.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(())
        }
        other => other,
    }
}
