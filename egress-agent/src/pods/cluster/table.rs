//! The objects of one watch, reduced to the fields that the agent uses.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use kube::{Resource, ResourceExt, runtime::watcher::Event};

use super::moments::Moments;

/// How long a table that remembers keeps deleted objects.
const REMEMBERED: Duration = Duration::from_secs(5);

/// Namespace (empty if it has none) and name.
pub(super) type Key = (String, String);

/// Objects by namespace and name, as the API server last sent them.
///
/// While the server sends a new list, the former objects stay. The complete list replaces them.
#[derive(Debug)]
pub(super) struct Table<R> {
    current: BTreeMap<Key, R>,
    listed: BTreeMap<Key, R>,
    complete: bool,
    /// Counts changes.
    revision: u64,
    /// Whether nothing changes the table now.
    frozen: bool,
    /// Objects that were deleted lately, if the table remembers them.
    deleted: Option<Vec<(Instant, Key, R)>>,
    /// What objects had that were replaced or deleted lately, if the table notes it.
    replaced: Option<Replaced<R>>,
    limit: Limit,
}

#[derive(Debug)]
struct Replaced<R> {
    moments: Moments,
    note: fn(&R, &mut Moments, Instant),
}

/// Most objects of a table.
#[derive(Clone, Copy, Debug)]
struct Limit {
    objects: usize,
    /// Whether objects were left out.
    is_exceeded: bool,
    /// Whether objects of the list that is being read were left out.
    is_list_over: bool,
}

impl Limit {
    const NONE: Self = Self::of(usize::MAX);

    const fn of(objects: usize) -> Self {
        Self {
            objects,
            is_exceeded: false,
            is_list_over: false,
        }
    }
}

impl<R> Default for Table<R> {
    fn default() -> Self {
        Self {
            current: BTreeMap::new(),
            listed: BTreeMap::new(),
            complete: false,
            revision: 0,
            frozen: false,
            deleted: None,
            replaced: None,
            limit: Limit::NONE,
        }
    }
}

impl<R> Table<R> {
    /// A table that can be frozen: it remembers what was deleted just before.
    pub(super) fn remembering() -> Self {
        Self {
            deleted: Some(Vec::new()),
            ..Self::default()
        }
    }

    /// A table that notes what replaced and deleted objects had.
    pub(super) fn noting_replaced(note: fn(&R, &mut Moments, Instant)) -> Self {
        Self {
            replaced: Some(Replaced {
                moments: Moments::default(),
                note,
            }),
            ..Self::default()
        }
    }

    /// A table of at most so many objects.
    pub(super) fn limited(limit: usize) -> Self {
        Self {
            limit: Limit::of(limit),
            ..Self::default()
        }
    }
}

impl<R> Table<R> {
    /// Notes what an object had that was replaced or deleted, if the table does so.
    fn note_replaced(&mut self, object: &R) {
        if let Some(Replaced { moments, note }) = &mut self.replaced {
            note(object, moments, Instant::now());
        }
    }

    /// What replaced and deleted objects had.
    pub(super) fn moments(&self) -> Option<&Moments> {
        self.replaced.as_ref().map(|replaced| &replaced.moments)
    }

    /// Forgets what objects had too long ago at this time.
    pub(super) fn forget_moments(&mut self, now: Instant) {
        if let Some(Replaced { moments, .. }) = &mut self.replaced {
            moments.forget(now);
        }
    }
}

impl<R: PartialEq> Table<R> {
    /// Changes with every change of the table.
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn len(&self) -> usize {
        self.current.len()
    }

    /// The limit, if objects were left out because of it.
    pub(super) fn exceeded(&self) -> Option<usize> {
        self.limit.is_exceeded.then_some(self.limit.objects)
    }

    /// Begins or ends to ignore the server's events. What was deleted just before is restored. Returns true if
    /// events were ignored until now, so that a new list is necessary.
    pub(super) fn freeze(&mut self, frozen: bool) -> bool {
        // A kind that was never listed has nothing to keep.
        let frozen = frozen && self.complete;
        if frozen && !self.frozen {
            self.listed.clear();
            for (at, key, object) in self.deleted.iter_mut().flat_map(std::mem::take) {
                if at.elapsed() < REMEMBERED && !self.current.contains_key(&key) {
                    self.current.insert(key, object);
                    self.revision += 1;
                }
            }
        }
        std::mem::replace(&mut self.frozen, frozen) && !frozen
    }

    pub(super) fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Removes everything, as if the server had sent nothing.
    pub(super) fn clear(&mut self) {
        self.current.clear();
        self.listed.clear();
        self.complete = false;
        self.limit.is_exceeded = false;
        self.revision += 1;
    }

    /// The objects with their names.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&str, &R)> {
        let entries = self.current.iter();
        entries.map(|((_, name), value)| (name.as_str(), value))
    }

    /// Whether a complete list has been read.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    pub(super) fn get(&self, namespace: &str, name: &str) -> Option<&R> {
        self.current.get(&(namespace.to_owned(), name.to_owned()))
    }

    /// All objects but one.
    pub(super) fn values_but(&self, namespace: &str, name: &str) -> impl Iterator<Item = &R> {
        let others = self
            .current
            .iter()
            .filter(move |((of, one), _)| of != namespace || one != name);
        others.map(|(_, value)| value)
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &R> {
        self.current.values()
    }

    /// Applies an event of the server. `reduce` gets the object in force with the same name, too. An object that it
    /// drops counts as deleted. Returns true if the table has changed.
    pub(super) fn apply<K: Resource>(
        &mut self,
        event: Event<K>,
        reduce: impl FnOnce(K, Option<&R>) -> Option<R>,
    ) -> bool {
        if self.frozen {
            return false;
        }
        let changed = match event {
            Event::Init => {
                self.listed.clear();
                self.limit.is_list_over = false;
                false
            }
            Event::InitApply(object) => {
                let key = key(&object);
                let reduced = reduce(object, self.current.get(&key));
                if self.listed.len() < self.limit.objects {
                    self.listed.extend(reduced.map(|reduced| (key, reduced)));
                } else {
                    self.limit.is_list_over |= reduced.is_some();
                }
                false
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut self.listed);
                let changed = !self.complete || listed != self.current;
                self.complete = true;
                self.limit.is_exceeded = self.limit.is_list_over;
                for (key, before) in std::mem::replace(&mut self.current, listed) {
                    if self.current.get(&key) != Some(&before) {
                        self.note_replaced(&before);
                    }
                }
                changed
            }
            Event::Apply(object) => {
                let key = key(&object);
                match reduce(object, self.current.get(&key)) {
                    None => match self.current.remove(&key) {
                        Some(removed) => {
                            self.note_replaced(&removed);
                            true
                        }
                        None => false,
                    },
                    Some(reduced) if self.current.get(&key) == Some(&reduced) => false,
                    Some(_)
                        if self.current.len() >= self.limit.objects
                            && !self.current.contains_key(&key) =>
                    {
                        !std::mem::replace(&mut self.limit.is_exceeded, true)
                    }
                    Some(reduced) => {
                        if let Some(before) = self.current.insert(key, reduced) {
                            self.note_replaced(&before);
                        }
                        true
                    }
                }
            }
            Event::Delete(object) => {
                let key = key(&object);
                let removed = self.current.remove(&key);
                let is_removed = removed.is_some();
                match (&mut self.deleted, removed) {
                    (Some(deleted), Some(removed)) => {
                        deleted.retain(|(at, ..)| at.elapsed() < REMEMBERED);
                        deleted.push((Instant::now(), key, removed));
                    }
                    (None, Some(removed)) => self.note_replaced(&removed),
                    (_, None) => {}
                }
                is_removed
            }
        };
        self.revision += u64::from(changed);
        changed
    }
}

fn key<K: Resource>(object: &K) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{api::core::v1::ConfigMap, apimachinery::pkg::apis::meta::v1::ObjectMeta};

    use super::*;

    fn object(name: &str) -> ConfigMap {
        ConfigMap {
            metadata: ObjectMeta {
                name: Some(name.into()),
                ..ObjectMeta::default()
            },
            ..ConfigMap::default()
        }
    }

    fn names(table: &Table<String>) -> Vec<&str> {
        table.values().map(String::as_str).collect()
    }

    fn apply(table: &mut Table<String>, event: Event<ConfigMap>) -> bool {
        table.apply(event, |object, _| {
            Some(object.name_any()).filter(|name| name != "nothing")
        })
    }

    #[test]
    fn a_list_counts_only_when_it_is_complete() {
        let mut table = Table::default();
        assert!(!apply(&mut table, Event::Init));
        assert!(!apply(&mut table, Event::InitApply(object("a"))));
        assert!(!table.is_complete());
        assert!(names(&table).is_empty());
        assert!(apply(&mut table, Event::InitApply(object("b"))) || !table.is_complete());
        assert!(apply(&mut table, Event::InitDone));
        assert_eq!(names(&table), ["a", "b"]);
    }

    #[test]
    fn an_interrupted_list_changes_nothing() {
        let mut table = Table::default();
        for event in [
            Event::Init,
            Event::InitApply(object("a")),
            Event::InitApply(object("b")),
            Event::InitDone,
            // The next list is interrupted after its first object, and starts again.
            Event::Init,
            Event::InitApply(object("a")),
            Event::Init,
        ] {
            apply(&mut table, event);
        }
        assert_eq!(names(&table), ["a", "b"]);
        apply(&mut table, Event::InitApply(object("b")));
        assert!(apply(&mut table, Event::InitDone));
        assert_eq!(names(&table), ["b"]);
    }

    #[test]
    fn an_object_that_reduces_to_nothing_counts_as_deleted() {
        let mut table = Table::default();
        assert!(apply(&mut table, Event::Apply(object("a"))));
        assert!(!apply(&mut table, Event::Apply(object("a"))));
        assert!(!apply(&mut table, Event::Apply(object("nothing"))));
        assert!(apply(&mut table, Event::Delete(object("a"))));
        assert!(!apply(&mut table, Event::Delete(object("a"))));
        assert!(names(&table).is_empty());
    }

    #[test]
    fn a_frozen_table_stays_and_has_what_was_deleted_just_before() {
        let mut table = Table::<String>::remembering();
        for event in [
            Event::Init,
            Event::InitApply(object("a")),
            Event::InitApply(object("b")),
            Event::InitDone,
            Event::Delete(object("a")),
        ] {
            apply(&mut table, event);
        }
        let before = table.revision();
        table.freeze(true);
        assert_ne!(table.revision(), before);
        for event in [Event::Delete(object("b")), Event::Init, Event::InitDone] {
            assert!(!apply(&mut table, event));
        }
        assert_eq!(names(&table), ["a", "b"]);
        assert!(table.freeze(false));
        assert!(apply(&mut table, Event::Init) || apply(&mut table, Event::InitDone));
        assert!(names(&table).is_empty());
    }

    #[test]
    fn a_table_that_was_never_listed_is_not_frozen() {
        let mut table = Table::<String>::remembering();
        table.freeze(true);
        assert!(!table.is_frozen());
    }

    #[test]
    fn objects_over_the_limit_are_left_out_until_there_are_fewer() {
        let mut table = Table::limited(1);
        let list = |names: &[&str]| {
            let mut events = vec![Event::Init];
            events.extend(names.iter().map(|name| Event::InitApply(object(name))));
            events.push(Event::InitDone);
            events
        };
        for event in list(&["a", "b"]) {
            apply(&mut table, event);
        }
        assert_eq!((names(&table).len(), table.exceeded()), (1, Some(1)));
        for event in list(&["b"]) {
            apply(&mut table, event);
        }
        assert_eq!((names(&table), table.exceeded()), (vec!["b"], None));
        assert!(apply(&mut table, Event::Apply(object("c"))));
        assert_eq!((names(&table), table.exceeded()), (vec!["b"], Some(1)));
    }
}
