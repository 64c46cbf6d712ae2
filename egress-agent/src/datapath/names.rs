//! By which names the addresses in a pod's allow map are there, for the next agent.
//!
//! Enforcement outlives the agent, because the kernel has the classes of each address. The names are
//! needed when the pod's policy changes: the next agent judges each address by its names then. So the
//! gate writes them to a map that is pinned beside the allow map. No program looks at it.
//!
//! It belongs to the pod, not to a version of its policy, and it needs no map of maps: the pin is how the
//! next agent finds it.

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData, MapError};
use egress_common::{
    address::Address,
    records::{NAME_BY_STRANGER, NameEntry, NameKey},
};

use super::{Datapath, PodPins, policies::gone};
use egress_dns::Name;

/// Name of the pin.
const PIN: &str = "names";

/// How many names an address may have on average before there is no room for more.
const NAMES_OF_ADDRESS: u32 = 2;

type Names = HashMap<MapData, NameKey, NameEntry>;

/// Handle on one pod's map of names. The gate thread is its only writer.
pub struct NameMap(Names);

/// A name that led to an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The address.
    pub address: Address,
    /// The name.
    pub name: Name,
    /// Whether a stranger's name stood on the way; see [`egress_policy::NameRules::is_strangers`].
    pub by_stranger: bool,
    /// When the address stops being allowed by this name.
    pub expires_ns: u64,
}

/// Why a name could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum NamesError {
    /// The map holds as many names as it may.
    #[error("the map of names is full")]
    Full,
    /// Anything else.
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

    /// Removes one name of an address; it is no error when it is not there.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn forget(&mut self, address: Address, name: &Name) -> Result<(), NamesError> {
        match NameKey::new(address, name.as_wire()) {
            Some(key) => gone(self.0.remove(&key)).map_err(NamesError::Kernel),
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
            // What is no name was not written by an agent.
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
    /// A pod's map of names: the one that is pinned, or a new one. A pinned one of another size is
    /// replaced by one with the same names, as far as they fit.
    ///
    /// # Errors
    ///
    /// When it cannot be opened, made or pinned.
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
                        "not all names of the pod's addresses fit into its smaller map of names"
                    );
                    break;
                }
            }
        }
        pins.replace(PIN, &made)?;
        Ok(names)
    }
}

/// The map of names that is pinned, and how many it has room for. One of another shape counts for nothing.
fn earlier_names(pins: &PodPins) -> Result<Option<(MapData, u32)>> {
    let path = pins.path(PIN);
    if !path.exists() {
        return Ok(None);
    }
    let map = MapData::from_pin(&path);
    let map = map.with_context(|| format!("cannot open {}", path.display()))?;
    let info = map.info().context("cannot look at a pod's map of names")?;
    let shape = (info.key_size() as usize, info.value_size() as usize);
    if shape != (size_of::<NameKey>(), size_of::<NameEntry>()) {
        return Ok(None);
    }
    Ok(Some((map, info.max_entries())))
}

fn open(map: &MapData) -> Result<Names> {
    Ok(Map::HashMap(super::outer::another(map)?).try_into()?)
}
