//! Making what is enforced equal to what should be.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::Result;

use super::{
    denials::{Known, KnownPods},
    enforced::{Enforced, PodKey, Wanted},
    readings::Readings,
};
use crate::{
    config::{Config, OnDeny},
    datapath::{Adoptable, Datapath, boottime_ns},
    gate::Gate,
    pods::{NO_ADDRESS, Pod, Snapshot},
    policy::Mode,
};

/// What should be done with one pod.
enum Plan {
    /// Put it under this.
    Enforce(Box<Wanted>),
    /// Leave it alone, for now or for good; the text says why when it is worth saying.
    Leave(Option<String>),
    /// Keep what is, because what should be cannot be found out.
    Keep(String),
}

/// Compares and changes.
pub(super) struct Reconciler {
    pub(super) datapath: Datapath,
    pub(super) gate: Gate,
    pub(super) on_deny: OnDeny,
    pub(super) node: String,
    pub(super) known: Arc<KnownPods>,
    pub(super) enforced: BTreeMap<PodKey, Enforced>,
    readings: Readings,
    /// What an earlier agent left and nobody has claimed yet, by pod id.
    pub(super) adoptable: BTreeMap<u32, Adoptable>,
    /// What was last said about a pod or a file, so that it is not said again and again.
    said: HashMap<String, String>,
    pub(super) next_pod: u32,
    pub(super) next_policy: u32,
    next_swept: usize,
}

impl Reconciler {
    pub(super) fn new(
        datapath: Datapath,
        gate: Gate,
        config: &Config,
        known: Arc<KnownPods>,
        adoptable: BTreeMap<u32, Adoptable>,
    ) -> Result<Self> {
        let next_pod = adoptable.keys().max().map_or(1, |last| last + 1);
        let next_policy = datapath
            .policy_ids()?
            .into_iter()
            .max()
            .map_or(1, |last| last + 1);
        Ok(Self {
            datapath,
            gate,
            on_deny: config.on_deny,
            node: config.node.clone(),
            known,
            enforced: BTreeMap::new(),
            readings: Readings::new(config.policy_settings()),
            adoptable,
            said: HashMap::new(),
            next_pod,
            next_policy,
            next_swept: 0,
        })
    }

    /// How many pods are enforced.
    pub(super) fn enforced(&self) -> usize {
        self.enforced.len()
    }

    /// Makes what is enforced equal to what the snapshot says. A pod that cannot be brought there
    /// does not hinder the others; it is tried again the next time.
    pub(super) async fn reconcile(&mut self, snapshot: &Snapshot) {
        let mut saying = HashMap::new();
        for problem in &snapshot.problems {
            let said = saying
                .entry(problem.origin.clone())
                .or_insert_with(String::new);
            if !said.is_empty() {
                said.push_str("; ");
            }
            said.push_str(&problem.message);
        }
        self.readings.retain(snapshot);
        let gone: Vec<PodKey> = self
            .enforced
            .iter()
            .filter(|(key, enforced)| {
                snapshot
                    .pods
                    .get(*key)
                    .is_none_or(|pod| pod.uid != enforced.wanted.uid)
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in gone {
            self.remove(&key).await;
        }

        // Pods that hold an interface keep it; only then do others get theirs.
        let mut taken: HashMap<u32, PodKey> = self
            .enforced
            .iter()
            .map(|(key, enforced)| (enforced.wanted.ifindex, key.clone()))
            .collect();
        for (key, pod) in &snapshot.pods {
            let title = title(key);
            let complaint = match self.plan(key, pod, &mut taken) {
                Plan::Enforce(wanted) => match self.enforce(key, *wanted).await {
                    Ok(()) => pod.addresses.is_empty().then(|| NO_ADDRESS.to_owned()),
                    Err(error) => Some(format!("{error:#}")),
                },
                Plan::Leave(why) => {
                    if self.enforced.contains_key(key) {
                        self.remove(key).await;
                    }
                    why
                }
                Plan::Keep(why) => Some(why),
            };
            let problem = self.readings.problem(key);
            let complaints: Vec<String> = problem.into_iter().chain(complaint).collect();
            if !complaints.is_empty() {
                saying.insert(title, complaints.join("; "));
            }
        }
        self.say(saying);
        self.publish();
    }

    /// Removes what an earlier agent left and the first snapshot does not claim.
    pub(super) fn drop_leftovers(&mut self, snapshot: &Snapshot) {
        let waiting: HashSet<PodKey> = snapshot.pods.keys().cloned().collect();
        for (pod, left) in std::mem::take(&mut self.adoptable) {
            let key = (left.namespace.clone(), left.name.clone());
            let title = title(&key);
            // Its pod is there but could not be enforced yet: what holds, holds on.
            if waiting.contains(&key)
                && !self.enforced.contains_key(&key)
                && left
                    .interfaces
                    .iter()
                    .any(|&(ifindex, _)| is_there(ifindex))
                && snapshot.pods[&key].uid == left.uid
            {
                self.adoptable.insert(pod, left);
                continue;
            }
            if let Err(error) = self.drop_leftover(pod, &left) {
                tracing::error!(pod = %title, error = %format!("{error:#}"), "cannot remove leftovers");
            } else {
                tracing::info!(pod = %title, "removed what an earlier agent had left");
            }
        }
    }

    fn drop_leftover(&mut self, pod: u32, left: &Adoptable) -> Result<()> {
        for &(ifindex, entry) in &left.interfaces {
            self.datapath.detach(ifindex)?;
            self.datapath.interfaces()?.remove(ifindex)?;
            self.datapath.drop_policy(entry.policy)?;
        }
        self.datapath.counters()?.forget(pod)?;
        let key = (left.namespace.clone(), left.name.clone());
        let pins = self.datapath.pins_of(&left.namespace, &left.name);
        if self.enforced.contains_key(&key) {
            // The pins are those of a newer pod with the same name by now.
            return self.datapath.remove_pod_maps(pod);
        }
        self.datapath.remove_pod(pod, &pins)
    }

    /// Forgets idle flows and expired addresses of the pods whose turn it is.
    pub(super) fn sweep(&mut self, round: Duration, every: Duration) {
        let turns = (round.as_millis() / every.as_millis()).max(1) as usize;
        let pods = self.enforced.len();
        let count = pods.div_ceil(turns);
        let now_ns = boottime_ns();
        let turn = |i: usize| (i + pods - self.next_swept % pods.max(1)) % pods.max(1) < count;
        for (i, enforced) in self.enforced.values_mut().enumerate() {
            if !turn(i) {
                continue;
            }
            let mut open = HashSet::new();
            if let Err(error) = enforced.flows.sweep(now_ns, |address| {
                open.insert(address);
            }) {
                tracing::error!(error = %format!("{error:#}"), "cannot sweep a pod's flows");
                continue;
            }
            self.gate.sweep(enforced.pod, open);
        }
        self.next_swept = self.next_swept.wrapping_add(count);
    }

    /// Stops enforcing everything.
    pub(super) async fn remove_all(&mut self) {
        let keys: Vec<PodKey> = self.enforced.keys().cloned().collect();
        for key in keys {
            self.remove(&key).await;
        }
        self.publish();
    }

    /// Lets go of the programs; what is pinned stays. Returns the mount point of bpffs.
    pub(super) fn close(self) -> PathBuf {
        self.datapath.bpffs().to_owned()
    }

    fn plan(&mut self, key: &PodKey, pod: &Pod, taken: &mut HashMap<u32, PodKey>) -> Plan {
        if pod.host_network {
            return Plan::Leave(Some(
                "not enforced: the pod is in the host's network (hostNetwork)".into(),
            ));
        }
        let compiled = self.readings.read(key, pod);
        if compiled.mode == Mode::Off {
            return Plan::Leave(None);
        }
        let Some(name) = &pod.interface else {
            return Plan::Leave(Some(format!(
                "not enforced: the pod has no annotation {}",
                crate::pods::INTERFACE_ANNOTATION
            )));
        };
        let Ok(ifindex) = nix::net::if_::if_nametoindex(name.as_str()) else {
            return Plan::Leave(Some(format!(
                "not enforced yet: there is no interface {name}; it will be when it appears"
            )));
        };
        match taken.get(&ifindex) {
            Some(other) if other != key => {
                let why = format!("interface {name} is already that of pod {}", title(other));
                return if self.enforced.contains_key(key) {
                    Plan::Keep(format!("{why}; enforced on its earlier interface"))
                } else {
                    Plan::Leave(Some(format!("not enforced: {why}")))
                };
            }
            _ => {
                taken.insert(ifindex, key.clone());
            }
        }
        match Wanted::new(pod, ifindex, compiled, self.on_deny) {
            Ok(wanted) => Plan::Enforce(Box::new(wanted)),
            Err(error) if self.enforced.contains_key(key) => {
                Plan::Keep(format!("{error:#}; the last good policy stays"))
            }
            Err(error) => Plan::Leave(Some(format!("not enforced: {error:#}"))),
        }
    }

    /// Says what is new, and what is no longer so.
    fn say(&mut self, saying: HashMap<String, String>) {
        for (about, what) in &saying {
            if self.said.get(about) != Some(what) {
                tracing::error!(%about, "{what}");
            }
        }
        for about in self.said.keys() {
            if !saying.contains_key(about) {
                tracing::info!(%about, "the problem is gone");
            }
        }
        self.said = saying;
    }

    /// Makes one pod known to the reader of denials.
    pub(super) fn introduce(&self, pod: u32, known: Known) {
        let mut pods = HashMap::clone(&self.known.load());
        pods.insert(pod, Arc::new(known));
        self.known.store(Arc::new(pods));
    }

    fn publish(&self) {
        let known = self
            .enforced
            .values()
            .map(|enforced| {
                let known = Known {
                    identity: Arc::clone(&enforced.identity),
                    compiled: Arc::clone(&enforced.wanted.compiled),
                    policy: enforced.policy,
                };
                (enforced.pod, Arc::new(known))
            })
            .collect();
        self.known.store(Arc::new(known));
    }
}

pub(super) fn title((namespace, name): &PodKey) -> String {
    format!("{namespace}/{name}")
}

fn is_there(ifindex: u32) -> bool {
    nix::net::if_::if_indextoname(ifindex).is_ok()
}
