//! The objects of one watch, reduced to what is needed.

use std::collections::BTreeMap;

use kube::{Resource, ResourceExt, runtime::watcher::Event};

/// Namespace (empty where there is none) and name.
pub(super) type Key = (String, String);

/// Objects by namespace and name, as the API server last told them.
///
/// While the server lists anew, what was known before stays; the list takes its place as a whole
/// when it is complete.
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
    /// Whether a whole list has been read.
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

    /// Takes in what the server says. An object of which `reduce` makes nothing is as good as
    /// deleted. True when what is known is different from before.
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
    fn a_list_counts_when_it_is_complete_and_not_before() {
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
    fn a_list_that_breaks_off_changes_nothing() {
        let mut table = Table::default();
        for event in [
            Event::Init,
            Event::InitApply(object("a")),
            Event::InitApply(object("b")),
            Event::InitDone,
            // The next list breaks off after its first object, and is begun again.
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
    fn an_object_of_which_nothing_is_needed_is_gone() {
        let mut table = Table::default();
        assert!(apply(&mut table, Event::Apply(object("a"))));
        assert!(!apply(&mut table, Event::Apply(object("a"))));
        assert!(!apply(&mut table, Event::Apply(object("nothing"))));
        assert!(apply(&mut table, Event::Delete(object("a"))));
        assert!(!apply(&mut table, Event::Delete(object("a"))));
        assert!(names(&table).is_empty());
    }
}
