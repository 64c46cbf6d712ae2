//! The names of the addresses in a pod's allow map, kept for the next agent.
//!
//! Enforcement outlives the agent, because the kernel has the classes of each address. When the pod's policy
//! changes, the next agent also needs the names, by which it judges each address again. So the
//! gate writes them to a map that is pinned beside the allow map. No program reads it.
//!
//! The map belongs to the pod, not to a version of its policy. It needs no map of maps, because the next
//! agent finds it by its pin.

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData, MapError};
use egress_common::{
    address::Address,
    records::{NAME_BY_STRANGER, NameEntry, NameKey},
};

use super::{Datapath, PodPins, policies::ignore_missing};
use egress_dns::Name;

/// The name of the pin.
const PIN: &str = "names";

/// How many names an address can have on average before the map is full.
const NAMES_OF_ADDRESS: u32 = 2;

type Names = HashMap<MapData, NameKey, NameEntry>;

/// Handle on one pod's map of names. The gate thread is its only writer.
pub struct NameMap(Names);

/// A name that resolved to an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The address.
    pub address: Address,
    /// The name.
    pub name: Name,
    /// Whether a name of a stranger was in the chain; see [`egress_policy::NameRules::is_strangers`].
    pub by_stranger: bool,
    /// When the address expires for this name.
    pub expires_ns: u64,
}

/// Why a name could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum NamesError {
    /// The map is full.
    #[error("the map of names is full")]
    Full,
    /// Any other error.
    #[error("the map of names cannot be written: {0}")]
    Kernel(#[source] MapError),
}

impl NameMap {
    /// Inserts or replaces one name of an address.
    ///
    /// # Errors
    ///
    /// [`NamesError::Full`] when the map has no room (or the kernel no memory) for a new one.
    pub fn keep(
        &mut self,
        address: Address,
        name: &Name,
        by_stranger: bool,
        expires_ns: u64,
    ) -> Result<(), NamesError> {
        let Some(key) = NameKey::new(address, name.as_wire()) else {
            return Err(NamesError::Full);
        };
        let flags = if by_stranger { NAME_BY_STRANGER } else { 0 };
        let inserted = self.0.insert(key, NameEntry { expires_ns, flags }, 0);
        inserted.map_err(|error| match &error {
            MapError::SyscallError(syscall)
                if matches!(
                    syscall.io_error.raw_os_error(),
                    Some(libc::E2BIG | libc::ENOMEM)
                ) =>
            {
                NamesError::Full
            }
            _ => NamesError::Kernel(error),
        })
    }

    /// Removes one name of an address; a missing name is not an error.
    ///
    /// # Errors
    ///
    /// When the kernel rejects it.
    pub fn forget(&mut self, address: Address, name: &Name) -> Result<(), NamesError> {
        match NameKey::new(address, name.as_wire()) {
            Some(key) => ignore_missing(self.0.remove(&key)).map_err(NamesError::Kernel),
            None => Ok(()),
        }
    }

    /// Every name.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn entries(&self) -> Result<Vec<Kept>, NamesError> {
        let mut kept = Vec::new();
        for item in &self.0 {
            let (key, entry) = item.map_err(NamesError::Kernel)?;
            // No agent has written an entry that is not a name.
            let Some(name) = Name::from_wire(key.wire()) else {
                continue;
            };
            kept.push(Kept {
                address: key.addr,
                name,
                by_stranger: entry.flags & NAME_BY_STRANGER != 0,
                expires_ns: entry.expires_ns,
            });
        }
        Ok(kept)
    }
}

impl Datapath {
    /// A pod's map of names: the pinned one, or a new one. A pinned map of another size is replaced by a new
    /// one with as many of its names as fit.
    ///
    /// # Errors
    ///
    /// When it cannot be opened, created or pinned.
    pub fn names(&self, pins: &PodPins) -> Result<NameMap> {
        let entries = self.allow_entries.saturating_mul(NAMES_OF_ADDRESS);
        let earlier = earlier_names(pins)?;
        if let Some((names, of)) = earlier.as_ref().map(|(names, of)| (names, *of))
            && of == entries
        {
            return Ok(NameMap(open(names)?));
        }
        let made = self.templates.names(entries)?;
        let mut names = NameMap(open(&made)?);
        if let Some((earlier, _)) = earlier {
            let earlier: Names = open(&earlier)?;
            for item in &earlier {
                let (key, entry) = item.context("cannot read a pod's map of names")?;
                if names.0.insert(key, entry, 0).is_err() {
                    tracing::warn!(
                        pod = %pins.dir().display(),
                        "the pod's new map of names is too small for all names; the agent forgets the others"
                    );
                    break;
                }
            }
        }
        pins.replace(PIN, &made)?;
        Ok(names)
    }
}

/// The pinned map of names, and its capacity. A map with another shape is ignored.
fn earlier_names(pins: &PodPins) -> Result<Option<(MapData, u32)>> {
    let path = pins.path(PIN);
    if !path.exists() {
        return Ok(None);
    }
    let map = MapData::from_pin(&path);
    let map = map.with_context(|| format!("cannot open {}", path.display()))?;
    let info = map
        .info()
        .context("cannot read the kernel's description of a pod's map of names")?;
    let shape = (info.key_size() as usize, info.value_size() as usize);
    if shape != (size_of::<NameKey>(), size_of::<NameEntry>()) {
        return Ok(None);
    }
    Ok(Some((map, info.max_entries())))
}

fn open(map: &MapData) -> Result<Names> {
    Ok(Map::HashMap(super::outer::another(map)?).try_into()?)
}
