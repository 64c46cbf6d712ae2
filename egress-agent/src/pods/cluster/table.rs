//! The objects of one watch, reduced to the fields that the agent uses.

use std::collections::BTreeMap;

use kube::{Resource, ResourceExt, runtime::watcher::Event};

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
}

impl<R> Default for Table<R> {
    fn default() -> Self {
        Self {
            current: BTreeMap::new(),
            listed: BTreeMap::new(),
            complete: false,
        }
    }
}

impl<R: PartialEq> Table<R> {
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

    /// Applies an event of the server. An object that `reduce` drops counts as deleted. Returns true if the
    /// table has changed.
    pub(super) fn apply<K: Resource>(
        &mut self,
        event: Event<K>,
        reduce: impl FnOnce(K) -> Option<R>,
    ) -> bool {
        match event {
            Event::Init => {
                self.listed.clear();
                false
            }
            Event::InitApply(object) => {
                let key = key(&object);
                self.listed
                    .extend(reduce(object).map(|reduced| (key, reduced)));
                false
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut self.listed);
                let changed = !self.complete || listed != self.current;
                self.complete = true;
                self.current = listed;
                changed
            }
            Event::Apply(object) => {
                let key = key(&object);
                match reduce(object) {
                    None => self.current.remove(&key).is_some(),
                    Some(reduced) if self.current.get(&key) == Some(&reduced) => false,
                    Some(reduced) => {
                        self.current.insert(key, reduced);
                        true
                    }
                }
            }
            Event::Delete(object) => self.current.remove(&key(&object)).is_some(),
        }
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
        table.apply(event, |object| {
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
}
