//! Policies with their inner maps, and pods with their flows.

use std::{collections::BTreeMap, panic::resume_unwind, sync::Arc, thread};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, LpmTrie, Map, MapData, MapError, lpm_trie::Key};
use egress_common::{
    address::Address,
    classes::ClassSet,
    ids::{IfIndex, PodId, PolicyId},
    records::{AllowKey, AllowValue, CidrEntry, Forged, Policy},
};

use super::{
    AllowMap, Datapath, FlowMap, Hook, LearningMaps, PendingMap, PodPins, boottime_ns, interfaces,
    outer::{Change, Outer, another},
};

/// A pod whose own maps (flows, meter, identity) are to be created.
#[derive(Clone, Copy, Debug)]
pub struct NewPod<'a> {
    /// Its id in the maps.
    pub id: PodId,
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Its UID.
    pub uid: &'a str,
}

/// A version of a policy whose maps are to be created. It applies once the entry of an interface refers to
/// it.
#[derive(Clone, Debug)]
pub struct NewPolicy<'a> {
    /// Its id in the maps, which must be new.
    pub id: PolicyId,
    /// Its record in the map `policies`.
    pub record: &'a Policy,
    /// Its prefixes.
    pub cidrs: Vec<PolicyPrefix>,
    /// The version whose allow map it takes; an empty one is created if there is none. The gate goes on writing to
    /// that map, and it stays when the other version is removed.
    pub allow_of: Option<PolicyId>,
}

/// A prefix of a policy: network, prefix length in bits of the 128-bit form, classes.
pub type PolicyPrefix = (Address, u32, ClassSet);

/// The CIDR tries that one call creates, by what is in them: policies with the same prefixes share one, because none
/// is written to later.
type Tries = BTreeMap<Vec<PolicyPrefix>, MapData>;

/// The maps to be created for one pod.
#[derive(Clone, Debug, Default)]
pub struct NewMaps<'a> {
    /// Its own maps.
    pub pod: Option<NewPod<'a>>,
    /// A version of its policy.
    pub policy: Option<NewPolicy<'a>>,
}

impl Datapath {
    /// Creates the maps of many pods together, which takes little longer than for one. Returns for each
    /// pod the allow map of its new policy, if it gets one.
    ///
    /// While the kernel waits for grace periods, `to_pod` is attached to as many of the interfaces of new
    /// pods as the time allows. It lets everything pass until the interface has its entry. Later,
    /// [`Self::attach`] finds it attached, or returns the error.
    ///
    /// A failure affects only one pod. Some of the pod's maps may exist nevertheless: they
    /// can be created again, or removed.
    pub fn make(
        &mut self,
        wanted: &[NewMaps<'_>],
        attach: &[IfIndex],
    ) -> Vec<Result<Option<AllowMap>>> {
        let mut inner = Vec::new();
        let mut owners = Vec::new();
        let mut tries = Tries::new();
        let mut made: Vec<Result<Option<AllowMap>>> = Vec::with_capacity(wanted.len());
        for (i, wanted) in wanted.iter().enumerate() {
            made.push(self.make_inner(wanted, &mut tries, &mut inner));
            owners.resize(inner.len(), i);
        }
        let outer = Arc::clone(&self.outer);
        let results = thread::scope(|scope| {
            let waiting = scope.spawn(|| outer.change(inner));
            for &ifindex in attach {
                if waiting.is_finished() {
                    break;
                }
                let _ = self.attach_one(ifindex, Hook::ToPod);
            }
            waiting.join()
        });
        let results = results.unwrap_or_else(|panic| resume_unwind(panic));
        for (owner, result) in owners.into_iter().zip(results) {
            if let Err(error) = result {
                made[owner] = Err(error);
            }
        }
        made
    }

    /// Creates everything except the entries in the maps of maps, which are added to `inner`.
    fn make_inner(
        &mut self,
        wanted: &NewMaps<'_>,
        tries: &mut Tries,
        inner: &mut Vec<Change>,
    ) -> Result<Option<AllowMap>> {
        if let Some(pod) = wanted.pod {
            self.make_flows(pod, inner)?;
        }
        let Some(policy) = &wanted.policy else {
            return Ok(None);
        };
        // Written first and removed last, so that this map lists everything that may be left over.
        self.policies
            .insert(policy.id, policy.record, 0)
            .context("cannot write the map `policies`")?;
        if !policy.cidrs.is_empty() {
            let trie = match tries.get(&policy.cidrs) {
                Some(trie) => another(trie)?,
                None => {
                    let trie = self.make_trie(&policy.cidrs)?;
                    tries.insert(policy.cidrs.clone(), another(&trie)?);
                    trie
                }
            };
            inner.push(Change::Insert(Outer::Cidrs(policy.id), trie));
        }
        let allow = match policy.allow_of {
            Some(other) => self
                .outer
                .get(Outer::Allow(other))?
                .with_context(|| format!("policy {other} has no allow map"))?,
            None => self.templates.allow(self.allow_entries)?,
        };
        let handle = another(&allow)?;
        inner.push(Change::Insert(Outer::Allow(policy.id), allow));
        let mut learning = None;
        if self.constants.learns {
            let decisions = self.templates.decisions()?;
            // What the programs have learned belongs to the allow map.
            let shared = match policy.allow_of {
                Some(other) => self.outer.get(Outer::Learned(other))?,
                None => None,
            };
            let learned = match shared {
                Some(learned) => learned,
                None => self.templates.learned(self.allow_entries)?,
            };
            learning = Some(LearningMaps::new(another(&decisions)?, another(&learned)?)?);
            inner.push(Change::Insert(Outer::Decisions(policy.id), decisions));
            inner.push(Change::Insert(Outer::Learned(policy.id), learned));
        }
        self.allow_map(handle, learning).map(Some)
    }

    fn make_trie(&self, cidrs: &[PolicyPrefix]) -> Result<MapData> {
        let trie = self.templates.cidrs(cidrs.len() as u32)?;
        let mut entries = trie_of(another(&trie)?)?;
        for &(network, prefix_len, classes) in cidrs {
            entries
                .insert(&Key::new(prefix_len, network), CidrEntry { classes }, 0)
                .context("cannot write a policy's CIDR trie")?;
        }
        Ok(trie)
    }

    /// Creates a pod's flow maps, whose entries in the maps of maps are added to `inner`.
    fn make_flows(&mut self, pod: NewPod<'_>, inner: &mut Vec<Change>) -> Result<()> {
        // Written first and removed last, so that this map lists everything that may be left over.
        let identity = interfaces::identity(pod.namespace, pod.name, pod.uid)?;
        self.identities
            .insert(pod.id, identity, 0)
            .context("cannot write the map `identities`")?;
        self.meters
            .insert(pod.id, egress_common::records::Meter::default(), 0)
            .context("cannot write the map `meters`")?;
        let pins = self.layout.pod(pod.namespace, pod.name);
        let limits = self.flow_limits;
        let places = Outer::of_pod(pod.id);
        let mut maps = Vec::with_capacity(places.len());
        for outer in places {
            let name = outer.name();
            maps.push(match outer {
                Outer::OrderFromPod(_) => self.templates.order(limits.opening_from_pod)?,
                Outer::OrderToPod(_) => self.templates.order(limits.opening_to_pod)?,
                Outer::Opening(_) => self.templates.flows(name, limits.opening_entries())?,
                Outer::Called(_) => self.templates.called(limits.called)?,
                _ => self.templates.flows(name, limits.established)?,
            });
        }
        // Remove the old pins only now that their replacements exist.
        pins.remove()?;
        for (outer, map) in places.into_iter().zip(maps) {
            let name = outer.name();
            // A queue is not pinned, because it cannot be read without emptying it.
            if !matches!(outer, Outer::OrderFromPod(_) | Outer::OrderToPod(_)) {
                pins.replace(name, &map)?;
            }
            inner.push(Change::Insert(outer, map));
        }
        if self.constants.learns {
            let pending = self.templates.pending()?;
            inner.push(Change::Insert(Outer::Pending(pod.id), pending));
        }
        Ok(())
    }

    /// Records the start of the enforcement of a pod whose sources were not judged before.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn note_unjudged(&mut self, pod: PodId) -> Result<()> {
        let known = self.forged.get(&pod, 0);
        let forged = Forged {
            sent_ns: known.map_or(0, |known| known.sent_ns),
            unjudged_ns: boottime_ns(),
        };
        self.forged
            .insert(pod, forged, 0)
            .context("cannot write the map `forged`")
    }

    /// Records that the pod may have sent frames with forged sources until now.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn note_forged(&mut self, pod: PodId) -> Result<()> {
        let now_ns = boottime_ns();
        let forged = Forged {
            sent_ns: now_ns,
            unjudged_ns: now_ns,
        };
        self.forged
            .insert(pod, forged, 0)
            .context("cannot write the map `forged`")
    }

    /// The pins of an adopted pod.
    pub fn pins_of(&self, namespace: &str, name: &str) -> PodPins {
        self.layout.pod(namespace, name)
    }

    /// Pins a policy's allow map as the pod's, and what its programs have learned.
    ///
    /// # Errors
    ///
    /// When the map is unknown or cannot be pinned.
    pub fn pin_allow(&self, id: PolicyId, pins: &PodPins) -> Result<()> {
        let allow = self
            .outer
            .get(Outer::Allow(id))?
            .with_context(|| format!("policy {id} has no allow map"))?;
        pins.replace("allow", &allow)?;
        for outer in [Outer::Learned(id), Outer::Decisions(id)] {
            match self.outer.get(outer)? {
                Some(map) => pins.replace(outer.name(), &map)?,
                None => pins.remove_one(outer.name())?,
            }
        }
        Ok(())
    }

    /// A policy's record; `None` if it does not exist.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn policy(&self, id: PolicyId) -> Result<Option<Policy>> {
        match self.policies.get(&id, 0) {
            Ok(policy) => Ok(Some(policy)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("cannot read the map `policies`"),
        }
    }

    /// The allow map of a policy that an earlier agent created, if that policy equals this one.
    ///
    /// # Errors
    ///
    /// When the maps cannot be read.
    pub fn adopt_policy(
        &self,
        id: PolicyId,
        policy: &Policy,
        cidrs: impl ExactSizeIterator<Item = PolicyPrefix>,
    ) -> Result<Option<AllowMap>> {
        match self.policies.get(&id, 0) {
            Ok(found) if found == *policy => {}
            Ok(_) | Err(MapError::KeyNotFound) => return Ok(None),
            Err(error) => return Err(error).context("cannot read the map `policies`"),
        }
        let mut expected: Vec<_> = cidrs.collect();
        expected.sort_unstable();
        let mut found: Vec<PolicyPrefix> = Vec::new();
        if let Some(trie) = self.outer.get(Outer::Cidrs(id))? {
            for item in &trie_of(trie)? {
                let (key, entry) = item.context("cannot read a policy's CIDR trie")?;
                found.push((key.data(), key.prefix_len(), entry.classes));
            }
        }
        found.sort_unstable();
        if found != expected {
            return Ok(None);
        }
        let Some(allow) = self.outer.get(Outer::Allow(id))? else {
            return Ok(None);
        };
        if allow
            .info()
            .context("cannot read the kernel's description of an allow map")?
            .max_entries()
            != self.allow_entries
        {
            return Ok(None);
        }
        let learning = self.learning_of(id)?;
        if self.constants.learns && learning.is_none() {
            return Ok(None);
        }
        self.allow_map(allow, learning).map(Some)
    }

    /// The maps by which the programs learn under a policy; `None` if it has none.
    fn learning_of(&self, id: PolicyId) -> Result<Option<LearningMaps>> {
        let decisions = self.outer.get(Outer::Decisions(id))?;
        let learned = self.outer.get(Outer::Learned(id))?;
        match (decisions, learned) {
            (Some(decisions), Some(learned)) => LearningMaps::new(decisions, learned).map(Some),
            _ => Ok(None),
        }
    }

    /// The open queries of a pod; `None` if the programs keep none. Creates the map if an earlier agent has not.
    ///
    /// # Errors
    ///
    /// When the map cannot be read or created.
    pub fn pending_map(&self, pod: PodId) -> Result<Option<PendingMap>> {
        if !self.constants.learns {
            return Ok(None);
        }
        if let Some(map) = self.outer.get(Outer::Pending(pod))? {
            return PendingMap::new(map).map(Some);
        }
        let map = self.templates.pending()?;
        let handle = PendingMap::new(another(&map)?)?;
        let made = self
            .outer
            .change(vec![Change::Insert(Outer::Pending(pod), map)]);
        made.into_iter().collect::<Result<()>>()?;
        Ok(Some(handle))
    }

    /// Creates policies with the allow maps and prefixes of others, all together. Each copy names the id of
    /// the other policy, the new id and the new record. Returns the result for each.
    pub fn copy_policies(&mut self, copies: &[(PolicyId, PolicyId, Policy)]) -> Vec<Result<()>> {
        let mut changes = Vec::new();
        let mut owners = Vec::new();
        let mut made: Vec<Result<()>> = Vec::with_capacity(copies.len());
        for (i, (from, to, record)) in copies.iter().enumerate() {
            made.push(self.copy_policy(*from, *to, record, &mut changes));
            owners.resize(changes.len(), i);
        }
        for (owner, result) in owners.into_iter().zip(self.outer.change(changes)) {
            if result.is_err() {
                made[owner] = result;
            }
        }
        made
    }

    /// Creates everything except the entries in the maps of maps, which are added to `inner`.
    fn copy_policy(
        &mut self,
        from: PolicyId,
        to: PolicyId,
        record: &Policy,
        inner: &mut Vec<Change>,
    ) -> Result<()> {
        // Written first and removed last, so that this map lists everything that may be left over.
        self.policies
            .insert(to, record, 0)
            .context("cannot write the map `policies`")?;
        for outer in [Outer::Allow, Outer::Cidrs, Outer::Decisions, Outer::Learned] {
            let map = self.outer.get(outer(from))?;
            inner.extend(map.map(|map| Change::Insert(outer(to), map)));
        }
        Ok(())
    }

    /// The allow map of a policy that an earlier agent created, whatever its size; `None` if there is none.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn allow_of(&self, policy: PolicyId) -> Result<Option<AllowMap>> {
        let allow = self.outer.get(Outer::Allow(policy))?;
        let Some(allow) = allow else {
            return Ok(None);
        };
        self.allow_map(allow, self.learning_of(policy)?).map(Some)
    }

    /// The flows of a pod; `None` if its maps were not all created.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn flow_map(&self, pod: PodId) -> Result<Option<FlowMap>> {
        let maps = Outer::of_pod(pod).map(|outer| self.outer.get(outer));
        let [flows, inbound, opening, called, from_pod, to_pod] = maps;
        // The agent may have been killed while it created them.
        match (flows?, inbound?, opening?, called?, from_pod?, to_pod?) {
            (Some(flows), Some(inbound), Some(opening), Some(called), Some(_), Some(_)) => {
                let constants = (self.constants.udp_idle_ns, self.constants.stamp.0);
                FlowMap::new(flows, inbound, opening, called, constants).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn allow_map(&self, allow: MapData, learning: Option<LearningMaps>) -> Result<AllowMap> {
        let id = allow
            .info()
            .context("cannot read the kernel's description of an allow map")?
            .id();
        let map: HashMap<MapData, AllowKey, AllowValue> = HashMap::try_from(Map::HashMap(allow))?;
        let capacity = self.allow_entries as usize;
        Ok(AllowMap::new(map, id, capacity, learning))
    }
}

pub(super) fn trie_of(map: MapData) -> Result<LpmTrie<MapData, Address, CidrEntry>> {
    Ok(LpmTrie::try_from(Map::LpmTrie(map))?)
}

/// Treats the error that an entry to be removed is missing as success.
pub(super) fn ignore_missing(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::SyscallError(syscall))
            if syscall.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(())
        }
        other => other,
    }
}
