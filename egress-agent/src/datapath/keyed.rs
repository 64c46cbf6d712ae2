//! Reads entries that the programs write and that repeat their key ([`egress_common::records::FlowValue`]).

use aya::maps::{HashMap, MapData, MapError};

/// How often an entry is read until its value is its own.
const READINGS: usize = 16;

/// A value that repeats its key.
pub(super) trait Keyed: aya::Pod {
    /// Its key.
    type Key: aya::Pod + PartialEq;

    fn key(&self) -> Self::Key;
}

/// The value of a key, or `None` if the map does not have it.
///
/// The kernel may give the memory of an entry to another key while it copies the value; then the value is read again. One
/// that is replaced all the time counts as removed.
pub(super) fn read<V: Keyed>(
    map: &HashMap<MapData, V::Key, V>,
    key: &V::Key,
) -> Result<Option<V>, MapError> {
    for _ in 0..READINGS {
        match map.get(key, 0) {
            Ok(value) if value.key() == *key => return Ok(Some(value)),
            Ok(_) => {}
            Err(MapError::KeyNotFound) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// The values of a map. One that is removed meanwhile may be missing.
pub(super) fn values<V: Keyed>(
    map: &HashMap<MapData, V::Key, V>,
) -> impl Iterator<Item = Result<V, MapError>> {
    map.keys()
        .filter_map(|key| key.and_then(|key| read(map, &key)).transpose())
}
