//! Exits: interfaces of pods that the agent cannot enforce, because their traffic passes no host end.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use egress_common::ids::IfIndex;

use super::locations::{Location, PodLocation};
use crate::{
    config::UnenforcedInterfaces,
    host::{Exit, ExitFinder, Exits, LeadsTo, Link, Links},
    report::Subject,
};

/// A pod's networks are made one after the other, so it is checked often while it is young …
const YOUNG: Duration = Duration::from_secs(15);
const OFTEN: Duration = Duration::from_secs(1);
/// … and seldom afterwards. That also bounds how many problems a pod causes by changing its interfaces.
const SELDOM: Duration = Duration::from_secs(10);

/// How long `status` reports an interface that existed only for a moment. In that time it reports one such interface
/// of each pod.
const PASSED_REPORTED_FOR: Duration = Duration::from_secs(60);

/// Most interfaces of namespaces without a pod that one problem names.
const STRANGE_NAMED: usize = 4;

/// The exits of pods.
pub(in crate::control) struct PodExits {
    finder: ExitFinder,
    pods: BTreeMap<Subject, Known>,
    /// Host ends that are some pod's.
    ends: HashSet<IfIndex>,
    /// The number of the namespace behind each host end.
    behind: HashMap<IfIndex, i32>,
    /// The host's interfaces that belong to each other namespace.
    on_host: BTreeMap<i32, Vec<Exit>>,
    /// The host's interfaces that belong to a namespace which is no pod's.
    strange: Vec<Exit>,
    /// Interfaces that existed between two checks, or still do.
    seen: Vec<Link>,
    /// By pod: an interface that existed only for a moment, and when.
    passed: BTreeMap<Subject, (Exit, Instant)>,
}

struct Known {
    ends: Vec<IfIndex>,
    first: Instant,
    looked: Option<Instant>,
    /// The exits in the pod's own namespaces.
    inside: Exits,
    /// These, and those in the host's namespace.
    exits: Arc<Exits>,
    /// Why the last look failed.
    error: Option<String>,
}

impl Known {
    fn new(ends: Vec<IfIndex>, now: Instant) -> Self {
        Self {
            ends,
            first: now,
            looked: None,
            inside: Exits::default(),
            exits: Arc::default(),
            error: None,
        }
    }

    /// Whether it is time to check again.
    fn is_due(&self, now: Instant) -> bool {
        let every = if now.duration_since(self.first) < YOUNG {
            OFTEN
        } else {
            SELDOM
        };
        self.looked
            .is_none_or(|looked| now.duration_since(looked) >= every)
    }
}

impl PodExits {
    /// Opens a socket to the kernel.
    ///
    /// # Errors
    ///
    /// When it cannot be opened.
    pub(in crate::control) fn open() -> io::Result<Self> {
        Ok(Self {
            finder: ExitFinder::open()?,
            pods: BTreeMap::new(),
            ends: HashSet::new(),
            behind: HashMap::new(),
            on_host: BTreeMap::new(),
            strange: Vec::new(),
            seen: Vec::new(),
            passed: BTreeMap::new(),
        })
    }

    /// Records interfaces that existed since the last check.
    pub(in crate::control) fn note_seen(&mut self, seen: Vec<Link>) {
        self.seen.extend(seen);
    }

    /// Records where pods are, and forgets those that are gone.
    pub(in crate::control) fn begin(
        &mut self,
        locations: &BTreeMap<Subject, Location>,
        links: &Links,
    ) {
        self.pods
            .retain(|subject, _| locations.contains_key(subject));
        let ends_before = std::mem::take(&mut self.ends);
        for location in locations.values() {
            if let Location::Found(found) = location {
                self.ends.extend(&found.interfaces);
            }
        }
        let behind = links.iter().filter(|link| link.is_host_end());
        self.behind = behind
            .filter_map(|link| Some((link.ifindex, link.peer?.nsid)))
            .collect();
        let mut of_pods: HashMap<i32, &Subject> = HashMap::new();
        for (key, location) in locations {
            if let Location::Found(found) = location {
                let behind = found
                    .interfaces
                    .iter()
                    .filter_map(|end| self.behind.get(end));
                of_pods.extend(behind.map(|nsid| (*nsid, key)));
            }
        }
        let now = Instant::now();
        self.passed
            .retain(|_, (_, at)| now.duration_since(*at) < PASSED_REPORTED_FOR);
        for link in std::mem::take(&mut self.seen) {
            let is_known = ends_before.contains(&link.ifindex) || self.ends.contains(&link.ifindex);
            let pod = link.peer.and_then(|peer| of_pods.get(&peer.nsid));
            if let Some(pod) = pod
                && !is_known
                && links.get(link.ifindex).is_none()
            {
                let passed = self.passed.entry((*pod).clone());
                passed.or_insert_with(|| (Exit::on_host(&link), now));
            }
        }
        self.on_host.clear();
        self.strange.clear();
        for (nsid, link) in links.carriers() {
            if of_pods.contains_key(&nsid) {
                let exits = self.on_host.entry(nsid).or_default();
                exits.push(Exit::on_host(link));
            } else {
                self.strange.push(Exit::on_host(link));
            }
        }
    }

    /// The problem of interfaces of the host that belong to a namespace without a pod.
    pub(in crate::control) fn strange(&self) -> Option<String> {
        let named = self.strange.iter().take(STRANGE_NAMED);
        let named: Vec<String> = named.map(described).collect();
        (!named.is_empty()).then(|| {
            format!(
                "{} interfaces of the host take what is sent in network namespaces that are no pod's \
                 ({}): if a pod has made them, nothing judges what it sends there",
                self.strange.len(),
                named.join(", ")
            )
        })
    }

    /// The problem of a pod that had an interface only for a moment.
    pub(in crate::control) fn passed(&self, key: &Subject) -> Option<String> {
        let (Exit { name, kind, .. }, _) = self.passed.get(key)?;
        Some(format!(
            "an interface of the host that led into the pod's network, {name} ({kind}), was there for a \
             moment and is gone: nothing has judged what went through it"
        ))
    }

    /// The host's interfaces that belong to the namespaces behind these host ends.
    fn on_host_of(&self, ends: &[IfIndex]) -> Vec<Exit> {
        let behind: BTreeSet<&i32> = ends.iter().filter_map(|end| self.behind.get(end)).collect();
        let exits = behind.into_iter().filter_map(|nsid| self.on_host.get(nsid));
        exits.flatten().cloned().collect()
    }

    /// The exits of a pod, and why they are not known in full. `all_found` says that every pod on this machine is
    /// found; a pod is found with all its host ends at the latest by the next check.
    pub(in crate::control) fn of(
        &mut self,
        key: &Subject,
        found: &PodLocation,
        all_found: bool,
    ) -> (Arc<Exits>, Option<String>) {
        let now = Instant::now();
        let on_host = self.on_host_of(&found.interfaces);
        let known = self.pods.remove(key);
        let mut known = known
            .filter(|known| known.ends == found.interfaces)
            .unwrap_or_else(|| Known::new(found.interfaces.clone(), now));
        if known.is_due(now) {
            let looked = self.finder.exits(&found.interfaces, |end| {
                all_found || self.ends.contains(&end)
            });
            known.looked = Some(now);
            match looked {
                Ok(inside) => (known.inside, known.error) = (inside, None),
                Err(error) => {
                    let why = format!("its other interfaces cannot be looked at: {error}");
                    known.error = Some(why);
                }
            }
        }
        let exits = known.inside.with(on_host);
        if *known.exits != exits {
            known.exits = Arc::new(exits);
        }
        let result = (Arc::clone(&known.exits), known.error.clone());
        self.pods.insert(key.clone(), known);
        result
    }

    /// The exits that were last seen of a pod.
    pub(in crate::control) fn last(&self, key: &Subject) -> Option<&Arc<Exits>> {
        self.pods.get(key).map(|known| &known.exits)
    }
}

/// An exit as a problem names it.
fn described(exit: &Exit) -> String {
    let kind = if exit.kind.is_empty() {
        "device"
    } else {
        &exit.kind
    };
    let to = match exit.to {
        LeadsTo::Host => "to an interface of the host",
        LeadsTo::Namespace => "to another network namespace",
        LeadsTo::Hardware => "to hardware",
        LeadsTo::OnHost => "on the host, which receives the packets that the pod sends to it",
    };
    format!("{} ({kind}, {to})", exit.name)
}

/// The problem of a pod with exits, and what the agent does about it.
pub(in crate::control) fn problem(exits: &Exits, and: UnenforcedInterfaces) -> String {
    let mut interfaces: Vec<String> = exits.named.iter().map(described).collect();
    if exits.more > 0 {
        interfaces.push(format!("{} more", exits.more));
    }
    if exits.unseen {
        interfaces.push("some of more interfaces than are looked at".to_owned());
    }
    let done = match and {
        UnenforcedInterfaces::Report => "; its other interfaces are enforced",
        UnenforcedInterfaces::Refuse => {
            "; nothing else leaves the pod (unenforcedInterfaces: refuse)"
        }
    };
    format!(
        "partly enforced: {} cannot be enforced, because it passes no interface of the host that is \
         the pod's{done}",
        interfaces.join(", ")
    )
}
