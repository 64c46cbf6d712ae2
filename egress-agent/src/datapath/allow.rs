//! A pod's allow map: the addresses that its names have resolved to.

use super::LearningMaps;
use aya::maps::{HashMap, MapData, MapError};
use egress_common::{
    address::Address,
    records::{AllowEntry, AllowKey, AllowValue},
};

/// Handle on one pod's allow map under one version of its policy, or under several. The gate thread is its only
/// writer.
pub struct AllowMap {
    map: HashMap<MapData, AllowKey, AllowValue>,
    /// The kernel's number of the map.
    id: u32,
    capacity: usize,
    learning: Option<LearningMaps>,
}

/// Why an address could not be inserted.
#[derive(Debug, thiserror::Error)]
pub enum AllowError {
    /// The map is full.
    #[error("the allow map is full")]
    Full,
    /// Any other error.
    #[error("the allow map cannot be written: {0}")]
    Kernel(#[source] MapError),
}

impl AllowMap {
    pub(super) fn new(
        map: HashMap<MapData, AllowKey, AllowValue>,
        id: u32,
        capacity: usize,
        learning: Option<LearningMaps>,
    ) -> Self {
        Self {
            map,
            id,
            capacity,
            learning,
        }
    }

    /// The maps by which the programs learn under the same policy; `None` if they do not.
    pub fn learning(&mut self) -> Option<&mut LearningMaps> {
        self.learning.as_mut()
    }

    /// Whether there are such maps.
    pub fn has_learning(&self) -> bool {
        self.learning.is_some()
    }

    /// Whether both are handles on the same map.
    pub fn is_same(&self, other: &Self) -> bool {
        self.id == other.id
    }

    /// How many addresses fit into the map.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Inserts or replaces one address.
    ///
    /// # Errors
    ///
    /// [`AllowError::Full`] when the map has no room (or the kernel no memory) for a new address.
    pub fn insert(&mut self, addr: Address, entry: AllowEntry) -> Result<(), AllowError> {
        self.map
            .insert(AllowKey { addr }, AllowValue::new(addr, entry), 0)
            .map_err(|error| match &error {
                MapError::SyscallError(syscall)
                    if matches!(
                        syscall.io_error.raw_os_error(),
                        Some(libc::E2BIG | libc::ENOMEM)
                    ) =>
                {
                    AllowError::Full
                }
                _ => AllowError::Kernel(error),
            })
    }

    /// Removes one address; a missing address is not an error.
    ///
    /// # Errors
    ///
    /// When the kernel rejects it for another reason.
    pub fn remove(&mut self, addr: Address) -> Result<(), AllowError> {
        match self.map.remove(&AllowKey { addr }) {
            Ok(()) | Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
            Err(MapError::SyscallError(syscall))
                if syscall.io_error.raw_os_error() == Some(libc::ENOENT) =>
            {
                Ok(())
            }
            Err(error) => Err(AllowError::Kernel(error)),
        }
    }

    /// Every address with its entry.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn entries(&self) -> Result<Vec<(Address, AllowEntry)>, AllowError> {
        self.map
            .iter()
            .map(|item| {
                item.map(|(key, value)| (key.addr, value.entry()))
                    .map_err(AllowError::Kernel)
            })
            .collect()
    }
}
