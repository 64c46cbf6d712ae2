//! Making what is enforced equal to what should be.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
    time::Instant,
};

use anyhow::Context as _;

use egress_common::records::INTERFACE_SOURCES;

use crate::control::{
    apply::hardware::Hardware,
    apply::hooks::Hooks,
    apply::stamps::Stamps,
    apply::unjudged::Unjudged,
    observe::answers::Answers,
    observe::exits::PodExits,
    observe::locations::{Place, Places},
    observe::policies::Readings,
    observe::quarantine,
    observe::taps::SeenFirst,
    observe::unlocated::Waiting,
    plan::own_addresses::Owners,
    plan::pod::Plan,
    plan::wanted::{Enforced, RangesVersion},
    publish::denials::{Known, KnownPods},
    publish::events,
    publish::problems::{About, Problems},
    start::source::ClusterSide,
    state_dir::trust::Trust,
};
use crate::{
    config::Config,
    datapath::{Adoptable, Datapath, NodeAddressMap, Unused},
    gate::Gate,
    host::interface_name,
    pods::{Facts, Snapshot},
    report::{PodIdentity, Reporter, Subject},
    serve::{Board, Existing},
};
use egress_policy::Compiled;

/// What the agent begins with.
pub(in crate::control) struct Settings {
    /// What the operator says.
    pub(in crate::control) configured: Config,
    /// What the cluster said last.
    pub(in crate::control) facts: Facts,
    /// Both together, which the kernel has been told.
    pub(in crate::control) together: Config,
}

/// Compares and changes.
pub(in crate::control) struct Reconciler {
    pub(in crate::control) datapath: Datapath,
    pub(in crate::control) gate: Gate,
    /// What the operator says.
    pub(in crate::control) configured: Config,
    /// What the cluster says besides.
    pub(in crate::control) facts: Facts,
    /// Both together.
    pub(in crate::control) config: Config,
    pub(in crate::control) places: Places,
    /// Whose addresses are known.
    pub(in crate::control) owners: Owners,
    /// Interfaces of pods that nobody can enforce.
    pub(in crate::control) exits: PodExits,
    /// What ports of bridges are bound to.
    pub(in crate::control) hardware: Hardware,
    /// The addresses that the node takes packets for.
    pub(in crate::control) node_addresses: NodeAddressMap,
    /// The ways to the cluster, if there is one.
    pub(in crate::control) cluster: Option<ClusterSide>,
    pub(in crate::control) waiting: Waiting,
    pub(in crate::control) hooks: Hooks,
    pub(in crate::control) stamps: Stamps,
    seen_first: SeenFirst,
    answers: Answers,
    /// Where pods may have connections that nobody judged.
    pub(in crate::control) unjudged: Unjudged,
    /// Whether those that pods have opened go on.
    pub(in crate::control) trust: Trust,
    /// Whether `trust` counts: until the pods have been dealt with that were there at the start.
    pub(in crate::control) trusting: bool,
    /// How many connections from before went on.
    pub(in crate::control) existing: Existing,
    /// Pods that ran before and begin to be enforced: of them only the sources are judged yet.
    pub(in crate::control) settling: Vec<Subject>,
    /// The ranges that are in force.
    pub(in crate::control) ranges: RangesVersion,
    pub(in crate::control) known: Arc<KnownPods>,
    pub(in crate::control) enforced: BTreeMap<Subject, Enforced>,
    pub(in crate::control) readings: Readings,
    /// What is in the kernel though no pod is enforced with it, by pod id: left by an earlier agent
    /// and not claimed yet, begun and not finished, or not wholly removed.
    pub(in crate::control) adoptable: BTreeMap<u32, Adoptable>,
    /// What denial lines say of the pods that an earlier agent left.
    left: HashMap<u32, Arc<Known>>,
    /// When this agent began.
    pub(in crate::control) began: Instant,
    /// What is in the kernel and of no use any more; it goes at the end of each reconcile.
    pub(in crate::control) unused: Vec<Unused>,
    /// The problems of the last reconcile, so that each is logged once.
    pub(in crate::control) problems: Problems,
    pub(in crate::control) next_pod: u32,
    pub(in crate::control) next_policy: u32,
    pub(in crate::control) next_swept: usize,
    /// Whether the gate reads messages.
    is_reading: bool,
    /// What is known of all this to [`crate::serve`].
    pub(in crate::control) board: Arc<Board>,
}

impl Reconciler {
    #[expect(
        clippy::too_many_arguments,
        reason = "each comes from another part of the agent's start"
    )]
    pub(in crate::control) fn new(
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
            problems: Problems::default(),
            next_pod,
            next_policy,
            next_swept: 0,
            is_reading: false,
            board,
        })
    }

    /// How many pods are enforced.
    pub(in crate::control) fn enforced(&self) -> usize {
        self.enforced.len()
    }

    /// Makes what is enforced equal to what the snapshot says. A pod that cannot be brought there
    /// does not hinder the others; it is tried again the next time.
    pub(in crate::control) async fn reconcile(&mut self, source: &Snapshot) {
        let began = Instant::now();
        self.learn_facts(&source.facts).await;
        let (pods, places) = self.look_around(source);
        self.unjudged.look(self.places.there());
        self.exits.begin(&pods, &places, self.places.links());
        self.note_owners(&pods, &places);
        let mut problems = Problems::default();
        for problem in &source.problems {
            problems.add(About::node(&*problem.origin), &problem.message);
        }
        let unseen = self.answers.problem(self.gate.stats());
        if let Some(what) = unseen {
            problems.set(About::node("DNS"), what.to_owned());
        }
        if let Some(problem) = self.settle_neighbours() {
            problems.set(About::node("link-local addresses"), problem);
        }
        if let Some(problem) = self.exits.strange() {
            problems.set(About::node("interfaces of other namespaces"), problem);
        }
        if let Some(problem) = self.settle_node_addresses() {
            problems.set(About::node("the node's addresses"), problem);
        }
        if let Some(problem) = self.bind_hardware(&places) {
            problems.set(About::node("hardware addresses"), problem);
        }
        self.readings.retain(&pods);
        let gone: Vec<Subject> = self
            .enforced
            .iter()
            .filter(|(key, enforced)| {
                pods.get(*key)
                    .is_none_or(|pod| pod.uid != enforced.wanted.uid)
            })
            .map(|(key, _)| key.clone())
            .collect();
        // What leaves quarantine does so only when its pod has taken it over.
        let (identified, gone): (Vec<_>, Vec<_>) =
            gone.into_iter().partition(Subject::is_interface);
        for key in gone {
            self.remove(&key).await;
        }

        // Pods that hold an interface keep it; only then do others get theirs.
        let mut taken: HashMap<u32, Subject> = self
            .enforced
            .iter()
            .filter(|(key, _)| !identified.contains(key))
            .flat_map(|(key, enforced)| {
                let interfaces = enforced.wanted.interfaces.iter();
                interfaces.map(|&ifindex| (ifindex, key.clone()))
            })
            .collect();
        let mut complaints: BTreeMap<&Subject, String> = BTreeMap::new();
        let mut wanted = Vec::new();
        let mut leaving = Vec::new();
        // Interfaces that a pod is to be enforced on, whether or not it can be now.
        let mut claimed = HashSet::new();
        let mut unfound = BTreeMap::new();
        for (key, pod) in &pods {
            let Some(place) = places.get(key) else {
                continue;
            };
            if key.is_interface() {
                unfound.insert(key.clone(), quarantine::CLOSED.to_owned());
            }
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
                    unfound.insert(key.clone(), why);
                    None
                }
                Plan::Wait(why) => {
                    unfound.insert(key.clone(), format!("not enforced yet: {why}"));
                    None
                }
            };
            if let Some(complaint) = complaint {
                complaints.insert(key, complaint);
            }
        }
        complaints.extend(self.waiting.note(unfound, &pods));
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
        let leaving: Vec<&Subject> = leaving.into_iter().chain(&identified).collect();
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
            if let (Err(error), Some((key, _))) = (done, pods.get_key_value(&key)) {
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
            if let Some((key, pod)) = pods.get_key_value(&key) {
                complaints.insert(key, format!("not enforced yet: {error:#}"));
                waiting.insert((key.clone(), pod.uid.clone()));
            }
        }
        for key in leaving {
            let waits = self.enforced.get(key).is_some_and(|enforced| {
                let mut interfaces = enforced.wanted.interfaces.iter();
                key.is_interface()
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
            problems.set(About::node("stamp check"), unsupported);
        }
        self.seen_first.look();
        if let Some((about, what)) = self.seen_first.of_node() {
            problems.set(About::Node(about), what);
        }
        for key in pods.keys() {
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
            let what = complaints.join("; ");
            if let (Some(cluster), Some(pod)) = (&self.cluster, pods.get(key))
                && self.problems.of(key) != Some(&what)
                && let Some(event) = events::problem(key, pod, &what)
            {
                cluster.events.send(event);
            }
            problems.set(key.clone(), what);
        }
        self.drop_leftovers(source.unreadable, &pods, &waiting, &mut problems)
            .await;
        self.publish();
        if let Err(error) = self.drop_unused() {
            let about = About::node("maps that nobody uses any more");
            problems.set(about, format!("cannot remove all of them yet: {error:#}"));
        }
        problems.log_changes(&self.problems);
        self.problems = problems;
        self.tell(source.unreadable, &pods, began);
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
    async fn release(&mut self, leaving: &[&Subject], claimed: &HashSet<u32>) {
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
    pub(in crate::control) fn detach_all(&mut self) {
        if let Err(error) = self.datapath.detach_all() {
            tracing::error!(error = %format!("{error:#}"), "cannot detach from every interface");
        }
    }

    /// Lets go of the programs; what is pinned stays. Returns the mount point of bpffs.
    pub(in crate::control) fn close(self) -> PathBuf {
        self.datapath.bpffs().to_owned()
    }

    /// What sees an enforced pod's packets before they are judged.
    fn seen_first(&self, key: &Subject) -> Vec<String> {
        let enforced = self.enforced.get(key);
        enforced.map_or_else(Vec::new, |enforced| {
            self.seen_first.of(&enforced.wanted.interfaces)
        })
    }

    /// Tells the denial reader of a pod, or of its new policy.
    pub(in crate::control) fn announce(
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
