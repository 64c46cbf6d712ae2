//! Pods with interfaces that nobody can enforce, beside those that are.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    enforced::PodKey,
    place::{Found, Place},
};
use crate::{
    config::UnenforcedInterfaces,
    host::{ExitFinder, Exits, LeadsTo},
    pods::Snapshot,
};

/// A pod's networks are made one after the other: in its first time it is looked at often …
const YOUNG: Duration = Duration::from_secs(15);
const OFTEN: Duration = Duration::from_secs(1);
/// … and then this seldom, which also bounds what a pod that changes its interfaces has us say.
const SELDOM: Duration = Duration::from_secs(10);

/// What is known of the exits of pods.
pub(super) struct PodExits {
    finder: ExitFinder,
    pods: BTreeMap<PodKey, Known>,
    /// Host ends that are some pod's.
    ends: HashSet<u32>,
}

struct Known {
    ends: Vec<u32>,
    first: Instant,
    looked: Instant,
    exits: Arc<Exits>,
    /// Why the last look was in vain.
    error: Option<String>,
}

impl PodExits {
    /// Opens a socket to the kernel.
    ///
    /// # Errors
    ///
    /// When it cannot be opened.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self {
            finder: ExitFinder::open()?,
            pods: BTreeMap::new(),
            ends: HashSet::new(),
        })
    }

    /// Takes note of where pods are, and forgets those that are gone.
    pub(super) fn begin(&mut self, snapshot: &Snapshot, places: &BTreeMap<PodKey, Place>) {
        self.pods.retain(|key, _| snapshot.pods.contains_key(key));
        self.ends.clear();
        for place in places.values() {
            if let Place::Found(found) = place {
                self.ends.extend(&found.interfaces);
            }
        }
    }

    /// The exits of a pod, and why they are not known whole if they are not. A pod that is found on
    /// this machine (`all_found`) is found with all its host ends, at the latest by the next look.
    pub(super) fn of(
        &mut self,
        key: &PodKey,
        found: &Found,
        all_found: bool,
    ) -> (Arc<Exits>, Option<String>) {
        let now = Instant::now();
        let before = self
            .pods
            .get(key)
            .filter(|known| known.ends == found.interfaces);
        if let Some(known) = before {
            let every = if now.duration_since(known.first) < YOUNG {
                OFTEN
            } else {
                SELDOM
            };
            if now.duration_since(known.looked) < every {
                return (Arc::clone(&known.exits), known.error.clone());
            }
        }
        let looked = self.finder.exits(&found.interfaces, |end| {
            all_found || self.ends.contains(&end)
        });
        let (exits, error) = match looked {
            Ok(exits) => (Arc::new(exits), None),
            Err(error) => {
                let exits = before.map_or_else(Arc::default, |known| Arc::clone(&known.exits));
                let why = format!("its other interfaces cannot be looked at: {error}");
                (exits, Some(why))
            }
        };
        let known = Known {
            ends: found.interfaces.clone(),
            first: before.map_or(now, |known| known.first),
            looked: now,
            exits: Arc::clone(&exits),
            error: error.clone(),
        };
        self.pods.insert(key.clone(), known);
        (exits, error)
    }

    /// What was last seen of a pod.
    pub(super) fn last(&self, key: &PodKey) -> Option<&Arc<Exits>> {
        self.pods.get(key).map(|known| &known.exits)
    }
}

/// What to say of a pod with exits, and what is done about it.
pub(super) fn problem(exits: &Exits, and: UnenforcedInterfaces) -> String {
    let mut interfaces: Vec<String> = exits
        .named
        .iter()
        .map(|exit| {
            let kind = if exit.kind.is_empty() {
                "device"
            } else {
                &exit.kind
            };
            let to = match exit.to {
                LeadsTo::Host => "to an interface of the host",
                LeadsTo::Namespace => "to another network namespace",
                LeadsTo::Hardware => "to hardware",
            };
            format!("{} ({kind}, {to})", exit.name)
        })
        .collect();
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
