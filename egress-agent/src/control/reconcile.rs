//! Making what is enforced equal to what should be.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
    time::Instant,
};

use anyhow::Context as _;

use egress_common::records::INTERFACE_SOURCES;

use super::{
    bypass::Answers,
    denials::{Known, KnownPods},
    enforced::{Enforced, PodKey, RangesVersion},
    events,
    exits::PodExits,
    hardware::Hardware,
    hooks::Hooks,
    own::Owners,
    place::{Place, Places},
    plan::Plan,
    quarantine,
    readings::Readings,
    source::ClusterSide,
    stamps::Stamps,
    taps::SeenFirst,
    trust::Trust,
    unjudged::Unjudged,
    waiting::{Unfound, Waiting},
};
use crate::{
    config::Config,
    datapath::{Adoptable, Datapath, NodeAddressMap, Unused},
    gate::Gate,
    host::interface_name,
    pods::{Facts, Snapshot},
    policy::Compiled,
    report::{PodIdentity, Reporter},
    serve::{Board, Existing},
};

/// What the agent begins with.
pub(super) struct Settings {
    /// What the operator says.
    pub(super) configured: Config,
    /// What the cluster said last.
    pub(super) facts: Facts,
    /// Both together, which the kernel has been told.
    pub(super) together: Config,
}

/// Compares and changes.
pub(super) struct Reconciler {
    pub(super) datapath: Datapath,
    pub(super) gate: Gate,
    /// What the operator says.
    pub(super) configured: Config,
    /// What the cluster says besides.
    pub(super) facts: Facts,
    /// Both together.
    pub(super) config: Config,
    pub(super) places: Places,
    /// Whose addresses are known.
    pub(super) owners: Owners,
    /// Interfaces of pods that nobody can enforce.
    pub(super) exits: PodExits,
    /// What ports of bridges are bound to.
    pub(super) hardware: Hardware,
    /// The addresses that the node takes packets for.
    pub(super) node_addresses: NodeAddressMap,
    /// The ways to the cluster, if there is one.
    pub(super) cluster: Option<ClusterSide>,
    pub(super) waiting: Waiting,
    pub(super) hooks: Hooks,
    pub(super) stamps: Stamps,
    seen_first: SeenFirst,
    answers: Answers,
    /// Where pods may have connections that nobody judged.
    pub(super) unjudged: Unjudged,
    /// Whether those that pods have opened go on.
    pub(super) trust: Trust,
    /// Whether `trust` counts: until the pods have been dealt with that were there at the start.
    pub(super) trusting: bool,
    /// How many connections from before went on.
    pub(super) existing: Existing,
    /// Pods that ran before and begin to be enforced: of them only the sources are judged yet.
    pub(super) settling: Vec<PodKey>,
    /// The ranges that are in force.
    pub(super) ranges: RangesVersion,
    pub(super) known: Arc<KnownPods>,
    pub(super) enforced: BTreeMap<PodKey, Enforced>,
    pub(super) readings: Readings,
    /// What is in the kernel though no pod is enforced with it, by pod id: left by an earlier agent
    /// and not claimed yet, begun and not finished, or not wholly removed.
    pub(super) adoptable: BTreeMap<u32, Adoptable>,
    /// What denial lines say of the pods that an earlier agent left.
    left: HashMap<u32, Arc<Known>>,
    /// When this agent began.
    pub(super) began: Instant,
    /// What is in the kernel and of no use any more; it goes at the end of each reconcile.
    pub(super) unused: Vec<Unused>,
    /// What was last said about a pod or a file, so that it is not said again and again.
    pub(super) said: HashMap<String, String>,
    pub(super) next_pod: u32,
    pub(super) next_policy: u32,
    pub(super) next_swept: usize,
    /// Whether the gate reads messages.
    is_reading: bool,
    /// What is known of all this to [`crate::serve`].
    pub(super) board: Arc<Board>,
}

impl Reconciler {
    #[expect(
        clippy::too_many_arguments,
        reason = "each comes from another part of the agent's start"
    )]
    pub(super) fn new(
        datapath: Datapath,
        gate: Gate,
        settings: Settings,
        places: Places,
        cluster: Option<ClusterSide>,
        known: Arc<KnownPods>,
        adoptable: BTreeMap<u32, Adoptable>,
        reporter: Reporter,
    ) -> anyhow::Result<Self> {
        let next_pod = adoptable.keys().max().map_or(1, |last| last + 1);
        let next_policy = datapath
            .policy_ids()?
            .into_iter()
            .max()
            .map_or(1, |last| last + 1);
        let left = adoptable.values().flat_map(|left| &left.interfaces);
        // Where only sources were judged when that agent ended, the rest is unjudged.
        let left = left.filter(|(_, entry)| entry.flags & INTERFACE_SOURCES == 0);
        let left = left.map(|&(ifindex, _)| ifindex).collect();
        let unjudged = Unjudged::new(places.has_quarantine(), left);
        let trust = Trust::claim(&settings.configured);
        let readings = Readings::new(settings.together.policy_settings());
        let ranges = RangesVersion::first(&settings.together);
        let board = Arc::<Board>::default();
        let left = adoptable.iter().map(|(&id, left)| {
            let (namespace, name) = (left.namespace.as_str(), left.name.as_str());
            let node = settings.configured.node.as_str();
            let identity = PodIdentity::new(node, namespace, name, left.uid.as_str())
                .counted_in(board.denials_of(namespace));
            let known = Known {
                identity: Arc::new(identity),
                policy: None,
            };
            (id, Arc::new(known))
        });
        let left = left.collect();
        let hardware = Hardware::open(&datapath)?;
        let node_addresses = datapath.node_addresses()?;
        Ok(Self {
            hooks: Hooks::new(datapath.probes()?),
            stamps: Stamps::new(reporter),
            seen_first: SeenFirst::open()?,
            datapath,
            gate,
            configured: settings.configured,
            facts: settings.facts,
            config: settings.together,
            places,
            owners: Owners::default(),
            hardware,
            node_addresses,
            exits: PodExits::open().context("cannot look at pods' interfaces")?,
            cluster,
            waiting: Waiting::default(),
            answers: Answers::default(),
            unjudged,
            trust,
            trusting: true,
            existing: Existing::default(),
            settling: Vec::new(),
            ranges,
            known,
            enforced: BTreeMap::new(),
            readings,
            adoptable,
            left,
            began: Instant::now(),
            unused: Vec::new(),
            said: HashMap::new(),
            next_pod,
            next_policy,
            next_swept: 0,
            is_reading: false,
            board,
        })
    }

    /// How many pods are enforced.
    pub(super) fn enforced(&self) -> usize {
        self.enforced.len()
    }

    /// Makes what is enforced equal to what the snapshot says. A pod that cannot be brought there
    /// does not hinder the others; it is tried again the next time.
    pub(super) async fn reconcile(&mut self, source: &Snapshot) {
        let began = Instant::now();
        self.learn_facts(&source.facts).await;
        let (snapshot, places) = self.look_around(source);
        self.unjudged.look(self.places.there());
        let snapshot = &*snapshot;
        self.exits.begin(snapshot, &places, self.places.links());
        self.note_owners(snapshot, &places);
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
        let unseen = self.answers.problem(self.gate.stats());
        if let Some(what) = unseen {
            saying.insert("DNS".to_owned(), what.to_owned());
        }
        if let Some(problem) = self.settle_neighbours() {
            saying.insert("link-local addresses".to_owned(), problem);
        }
        if let Some(problem) = self.exits.strange() {
            saying.insert("interfaces of other namespaces".to_owned(), problem);
        }
        if let Some(problem) = self.settle_node_addresses() {
            saying.insert("the node's addresses".to_owned(), problem);
        }
        if let Some(problem) = self.bind_hardware(&places) {
            saying.insert("hardware addresses".to_owned(), problem);
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
        // What leaves quarantine does so only when its pod has taken it over.
        let (identified, gone): (Vec<_>, Vec<_>) =
            gone.into_iter().partition(quarantine::is_quarantined);
        for key in gone {
            self.remove(&key).await;
        }

        // Pods that hold an interface keep it; only then do others get theirs.
        let mut taken: HashMap<u32, PodKey> = self
            .enforced
            .iter()
            .filter(|(key, _)| !identified.contains(key))
            .flat_map(|(key, enforced)| {
                let interfaces = enforced.wanted.interfaces.iter();
                interfaces.map(|&ifindex| (ifindex, key.clone()))
            })
            .collect();
        let mut complaints: BTreeMap<&PodKey, String> = BTreeMap::new();
        let mut wanted = Vec::new();
        let mut leaving = Vec::new();
        // Interfaces that a pod is to be enforced on, whether or not it can be now.
        let mut claimed = HashSet::new();
        let mut unfound = BTreeMap::new();
        for (key, pod) in &snapshot.pods {
            let Some(place) = places.get(key) else {
                continue;
            };
            let complaint = match self.plan(key, pod, place, &mut taken) {
                Plan::Enforce(what, why) => {
                    claimed.extend(what.interfaces.iter().copied());
                    wanted.push((key.clone(), *what));
                    why
                }
                Plan::Leave(why) => {
                    leaving.push(key);
                    if let (None, Place::Found(found)) = (&why, place) {
                        self.unjudged.leave(&found.interfaces);
                    }
                    why
                }
                Plan::Keep(why) => {
                    if let Place::Found(found) = place {
                        claimed.extend(found.interfaces.iter().copied());
                    }
                    why
                }
                Plan::KeepFor(why) => {
                    unfound.insert(key.clone(), Unfound::new(why));
                    None
                }
                Plan::Wait(why) => {
                    unfound.insert(key.clone(), why);
                    None
                }
            };
            if quarantine::is_quarantined(key) {
                // Worth saying only if it lasts: so every pod begins and ends.
                let closed = quarantine::CLOSED.to_owned();
                let why = complaint.map_or(closed, |complaint| {
                    format!("{}; {complaint}", quarantine::CLOSED)
                });
                unfound.insert(key.clone(), Unfound::new(why));
            } else if let Some(complaint) = complaint {
                complaints.insert(key, complaint);
            }
        }
        complaints.extend(self.waiting.note(unfound, &snapshot.pods));
        // Changing a policy is quick, and so is taking over what an earlier agent has attached. Attaching to an
        // interface and detaching from it are not.
        let left: HashSet<String> = self
            .adoptable
            .values()
            .map(|left| left.uid.clone())
            .collect();
        wanted.sort_by_key(|(key, wanted)| {
            (
                !self.enforced.contains_key(key),
                !left.contains(&wanted.uid),
            )
        });
        let versions = self.prepare(&wanted);
        let leaving: Vec<&PodKey> = leaving.into_iter().chain(&identified).collect();
        self.release(&leaving, &claimed).await;
        // Pods that could not be enforced now and are tried again: what holds of them, holds on.
        let mut waiting = HashSet::new();
        for ((key, wanted), version) in wanted.into_iter().zip(versions) {
            let (uid, interfaces) = (wanted.uid.clone(), wanted.interfaces.clone());
            if !left.contains(&uid) {
                self.read_messages();
            }
            let done = match version {
                Ok(version) => self.enforce(&key, wanted, version).await,
                Err(error) => Err(error),
            };
            if let (Err(error), Some((key, _))) = (done, snapshot.pods.get_key_value(&key)) {
                // An interface that has gone since it was found fails too: so a pod may end. If it does not,
                // the next look says what is missing.
                if interfaces
                    .iter()
                    .all(|&ifindex| interface_name(ifindex).is_some())
                {
                    complaints.insert(key, format!("{error:#}"));
                }
                waiting.insert((key.clone(), uid));
            }
        }
        self.read_messages();
        for (key, error) in self.settle().await {
            if let Some((key, pod)) = snapshot.pods.get_key_value(&key) {
                complaints.insert(key, format!("not enforced yet: {error:#}"));
                waiting.insert((key.clone(), pod.uid.clone()));
            }
        }
        for key in leaving {
            let waits = self.enforced.get(key).is_some_and(|enforced| {
                let mut interfaces = enforced.wanted.interfaces.iter();
                quarantine::is_quarantined(key)
                    && interfaces.any(|ifindex| {
                        claimed.contains(ifindex) && !self.is_taken_over(enforced.pod, *ifindex)
                    })
            });
            if !waits {
                self.remove(key).await;
            }
        }
        self.check_hooks().await;
        self.check_stamps();
        if let Some(unsupported) = self.stamps.unsupported() {
            saying.insert("stamp check".to_owned(), unsupported);
        }
        self.seen_first.look();
        saying.extend(self.seen_first.of_node());
        for key in snapshot.pods.keys() {
            let problem = self.readings.problem(key);
            let unseen = unseen.filter(|_| self.enforced.contains_key(key));
            let complaints: Vec<String> = problem
                .into_iter()
                .chain(complaints.remove(key))
                .chain(unseen.map(str::to_owned))
                .chain(self.bypassed(key))
                .chain(self.seen_first(key))
                .chain(self.hardware_problem(key))
                .chain(self.exits.passed(key))
                .collect();
            if complaints.is_empty() {
                continue;
            }
            let (about, what) = (title(key), complaints.join("; "));
            if let (Some(cluster), Some(pod)) = (&self.cluster, snapshot.pods.get(key))
                && self.said.get(&about) != Some(&what)
                && let Some(event) = events::problem(key, pod, &what)
            {
                cluster.events.send(event);
            }
            saying.insert(about, what);
        }
        self.drop_leftovers(snapshot, &waiting, &mut saying).await;
        self.publish();
        if let Err(error) = self.drop_unused() {
            let about = "maps that nobody uses any more".to_owned();
            saying.insert(about, format!("cannot remove all of them yet: {error:#}"));
        }
        self.say(saying);
        self.tell(snapshot, began);
        // Until the source has said which pods there are, none of them was looked at.
        self.trusting &= source.unreadable;
    }

    /// Has the gate read messages, once it has all pods that an earlier agent left enforced.
    fn read_messages(&mut self) {
        if !self.is_reading {
            self.gate.read();
            self.is_reading = true;
        }
    }

    /// Pods that are to be free are so at once: detaching from their interfaces takes its time.
    /// What other pods claim is not let go of.
    async fn release(&mut self, leaving: &[&PodKey], claimed: &HashSet<u32>) {
        let free: Vec<u32> = leaving
            .iter()
            .filter_map(|key| self.enforced.get(*key))
            .filter(|enforced| {
                enforced.wanted.interfaces.iter().all(|ifindex| {
                    !claimed.contains(ifindex) && !self.is_anothers(enforced.pod, *ifindex)
                })
            })
            .map(|enforced| enforced.pod)
            .collect();
        if free.is_empty() {
            return;
        }
        let pods = free.len();
        match self.gate.release(free).await {
            Ok(()) => tracing::info!(pods, "let go"),
            Err(error) => tracing::error!(
                error = %format!("{error:#}"),
                "pods are free only when detached from"
            ),
        }
    }

    /// Detaches from every interface. Everything else goes with the pins.
    pub(super) fn detach_all(&mut self) {
        if let Err(error) = self.datapath.detach_all() {
            tracing::error!(error = %format!("{error:#}"), "cannot detach from every interface");
        }
    }

    /// Lets go of the programs; what is pinned stays. Returns the mount point of bpffs.
    pub(super) fn close(self) -> PathBuf {
        self.datapath.bpffs().to_owned()
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

    /// What sees an enforced pod's packets before they are judged.
    fn seen_first(&self, key: &PodKey) -> Vec<String> {
        let enforced = self.enforced.get(key);
        enforced.map_or_else(Vec::new, |enforced| {
            self.seen_first.of(&enforced.wanted.interfaces)
        })
    }

    /// Tells the denial reader of a pod, or of its new policy.
    pub(super) fn announce(
        &self,
        pod: u32,
        identity: &Arc<PodIdentity>,
        compiled: &Arc<Compiled>,
        policy: u32,
    ) {
        let known = Arc::new(Known {
            identity: Arc::clone(identity),
            policy: Some((policy, Arc::clone(compiled))),
        });
        self.known.rcu(|before| {
            let mut after = HashMap::clone(before);
            after.insert(pod, Arc::clone(&known));
            after
        });
    }

    fn publish(&self) {
        let known = self.enforced.values().map(|enforced| {
            let compiled = Arc::clone(&enforced.wanted.compiled);
            let known = Known {
                identity: Arc::clone(&enforced.identity),
                policy: Some((enforced.policy, compiled)),
            };
            (enforced.pod, Arc::new(known))
        });
        let left = self.adoptable.keys();
        let left = left.filter_map(|id| Some((*id, Arc::clone(self.left.get(id)?))));
        self.known.store(Arc::new(left.chain(known).collect()));
    }
}

pub(super) fn title(key: &PodKey) -> String {
    let (namespace, name) = key;
    if quarantine::is_quarantined(key) {
        return format!("interface {name}");
    }
    format!("{namespace}/{name}")
}
