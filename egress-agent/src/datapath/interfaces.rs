//! Maps each interface to its pod and policy.

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData, MapError};
use egress_common::{
    ids::{IfIndex, PodId},
    records::{Identity, Interface, InterfaceValue, MODE_RELEASED},
};

/// Handle on the `interfaces` map.
pub struct InterfaceMap(HashMap<MapData, IfIndex, InterfaceValue>);

/// A pod that an earlier agent enforced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adoptable {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's UID.
    pub uid: String,
    /// Its interfaces: ifindex and map entry.
    pub interfaces: Vec<(IfIndex, Interface)>,
}

impl InterfaceMap {
    pub(super) fn new(map: HashMap<MapData, IfIndex, InterfaceValue>) -> Self {
        Self(map)
    }

    /// Puts an interface under a policy, which applies from the next packet on.
    ///
    /// # Errors
    ///
    /// When the map is full or cannot be written.
    pub fn set(&mut self, ifindex: IfIndex, entry: Interface) -> Result<()> {
        self.0
            .insert(ifindex, InterfaceValue::new(ifindex, entry), 0)
            .with_context(|| format!("cannot put interface {ifindex} into the map `interfaces`"))
    }

    /// Releases an interface, so that everything passes, unless it belongs to another pod by now.
    ///
    /// # Errors
    ///
    /// When the map cannot be read or written.
    pub fn release(&mut self, ifindex: IfIndex, pod: PodId) -> Result<()> {
        let Some(mut entry) = self.entry_of(ifindex, pod)? else {
            return Ok(());
        };
        entry.mode = MODE_RELEASED;
        self.set(ifindex, entry)
    }

    /// Whether an interface belongs to this pod and has not been released.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn is_of(&self, ifindex: IfIndex, pod: PodId) -> Result<bool> {
        let entry = self.entry_of(ifindex, pod)?;
        Ok(entry.is_some_and(|entry| entry.mode != MODE_RELEASED))
    }

    /// The interface's entry, if it belongs to this pod.
    fn entry_of(&self, ifindex: IfIndex, pod: PodId) -> Result<Option<Interface>> {
        match self.0.get(&ifindex, 0) {
            Ok(value) => Ok(Some(value.interface()).filter(|entry| entry.pod() == pod)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => {
                Err(error).with_context(|| format!("cannot read {ifindex} in `interfaces`"))
            }
        }
    }

    /// Removes an interface, unless it belongs to another pod by now. Programs that are still attached to it
    /// drop everything from then on.
    ///
    /// # Errors
    ///
    /// When the map cannot be read or written.
    pub fn remove(&mut self, ifindex: IfIndex, pod: PodId) -> Result<()> {
        if self.entry_of(ifindex, pod)?.is_none() {
            return Ok(());
        }
        match self.0.remove(&ifindex) {
            Ok(()) => Ok(()),
            Err(MapError::SyscallError(syscall))
                if syscall.io_error.raw_os_error() == Some(libc::ENOENT) =>
            {
                Ok(())
            }
            Err(error) => {
                Err(error).with_context(|| format!("cannot remove {ifindex} from `interfaces`"))
            }
        }
    }

    /// The entry of an interface, if it has one.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    #[cfg(feature = "test-support")]
    pub fn entry(&self, ifindex: IfIndex) -> Result<Option<Interface>> {
        match self.0.get(&ifindex, 0) {
            Ok(value) => Ok(Some(value.interface())),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => {
                Err(error).with_context(|| format!("cannot read {ifindex} in `interfaces`"))
            }
        }
    }

    /// Every entry.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn entries(&self) -> Result<Vec<(IfIndex, Interface)>> {
        self.0
            .iter()
            .map(|item| item.map(|(ifindex, value)| (ifindex, value.interface())))
            .collect::<Result<_, _>>()
            .context("cannot read the map `interfaces`")
    }
}

/// The identity record of a pod.
///
/// # Errors
///
/// When a part is too long for the record.
pub(super) fn identity(namespace: &str, name: &str, uid: &str) -> Result<Identity> {
    Ok(Identity {
        namespace: padded(namespace, "namespace")?,
        name: padded(name, "name")?,
        uid: padded(uid, "UID")?,
    })
}

fn padded<const N: usize>(text: &str, what: &str) -> Result<[u8; N]> {
    let mut field = [0; N];
    field
        .get_mut(..text.len())
        .with_context(|| format!("the pod's {what} is longer than {N} bytes: {text}"))?
        .copy_from_slice(text.as_bytes());
    Ok(field)
}

pub(super) fn text(field: &[u8]) -> String {
    let end = field
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}
