//! The records for names that resolved to addresses.

use crate::address::Address;

/// The longest name in a [`NameKey`]: the longest one on the wire (RFC 1035, section 2.3.4).
pub const NAME_BYTES: usize = 255;

/// Key of a pod's map `names`: an address in the allow map, and a name that resolved to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct NameKey {
    /// The address.
    pub addr: Address,
    /// The number of used bytes of `name`.
    pub len: u8,
    /// The name's labels, each after its length byte, in lower case and without the root; then zeros.
    pub name: [u8; NAME_BYTES],
}

impl NameKey {
    /// The key of an address and a name in wire form; `None` if the name is too long.
    pub fn new(addr: Address, wire: &[u8]) -> Option<Self> {
        let mut name = [0; NAME_BYTES];
        name.get_mut(..wire.len())?.copy_from_slice(wire);
        Some(Self {
            addr,
            len: wire.len() as u8,
            name,
        })
    }

    /// The name in wire form.
    pub fn wire(&self) -> &[u8] {
        self.name.get(..usize::from(self.len)).unwrap_or_default()
    }
}

/// Value of a pod's map `names`. No program reads it: it tells a restarted agent which names resolved to the
/// addresses in the allow map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct NameEntry {
    /// When this name stops allowing the address, in nanoseconds of `CLOCK_BOOTTIME`.
    pub expires_ns: u64,
    /// Bits of the `NAME_*` constants.
    pub flags: u64,
}

/// A name in the chain of aliases was neither the cluster's nor one that may lead to internal addresses.
pub const NAME_BY_STRANGER: u64 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_the_name_that_it_was_made_of() {
        let wire = b"\x04shop\x04test";
        let key = NameKey::new([7; 16], wire).unwrap();
        assert_eq!(key.wire(), wire);
        assert!(NameKey::new([7; 16], &[1; NAME_BYTES]).is_some());
        assert!(NameKey::new([7; 16], &[1; NAME_BYTES + 1]).is_none());
        assert_eq!(NameKey::new([7; 16], b"").unwrap().wire(), b"");
    }
}
