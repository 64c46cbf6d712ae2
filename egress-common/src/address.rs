//! Addresses as in the maps: 16 bytes in network byte order, IPv4 in its mapped form.

/// An IPv6 address, or an IPv4 address in IPv4-mapped form (`::ffff:a.b.c.d`).
pub type Address = [u8; 16];

/// Length in bits of the prefix of all IPv4-mapped addresses.
pub const V4_MAPPED_PREFIX_LEN: u32 = 96;

/// `::`
pub const UNSPECIFIED: Address = [0; 16];

/// `255.255.255.255`, all hosts on the link
pub const BROADCAST_V4: Address = from_v4([255; 4]);
/// `0.0.0.0`
pub const UNSPECIFIED_V4: Address = from_v4([0; 4]);

/// The IPv4-mapped form of an IPv4 address (network byte order).
#[inline(always)]
pub const fn from_v4(octets: [u8; 4]) -> Address {
    let [a, b, c, d] = octets;
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// Whether this is the mapped form of an IPv4 address.
#[inline(always)]
pub const fn is_v4(address: &Address) -> bool {
    let mut i = 0;
    while i < 10 {
        if address[i] != 0 {
            return false;
        }
        i += 1;
    }
    address[10] == 0xff && address[11] == 0xff
}

/// Whether this is an IPv6 link-local unicast address, `fe80::/10`.
#[inline(always)]
pub const fn is_v6_link_local(address: &Address) -> bool {
    address[0] == 0xfe && address[1] & 0xc0 == 0x80
}

/// The upper half of every link-local address that a host generates (RFC 4291, section 2.5.6).
const LINK_LOCAL_PREFIX: [u8; 8] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0];

/// Whether this is a link-local address as hosts generate them: only zeros between the prefix and the lower
/// half.
#[inline(always)]
pub const fn is_host_link_local(address: &Address) -> bool {
    let mut differing = 0;
    let mut i = 0;
    while i < LINK_LOCAL_PREFIX.len() {
        differing |= address[i] ^ LINK_LOCAL_PREFIX[i];
        i += 1;
    }
    differing == 0
}

/// Whether the lower half of an address is derived from a hardware address (EUI-64; RFC 4291, appendix A).
#[inline(always)]
pub const fn is_of_hardware(address: &Address) -> bool {
    address[11] == 0xff && address[12] == 0xfe
}

/// The link-local address that is derived from this hardware address (RFC 4291, appendix A).
#[inline(always)]
pub const fn link_local_of(hardware: [u8; 6]) -> Address {
    [
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        hardware[0] ^ 0x02,
        hardware[1],
        hardware[2],
        0xff,
        0xfe,
        hardware[3],
        hardware[4],
        hardware[5],
    ]
}

/// Whether this is an IPv6 multicast address, `ff00::/8`.
#[inline(always)]
pub const fn is_v6_multicast(address: &Address) -> bool {
    address[0] == 0xff
}

/// Whether this is an IPv6 multicast address of link-local scope, `ff02::/16` (RFC 4291,
/// section 2.7). The flag bits are ignored, as routers ignore them.
#[inline(always)]
pub const fn is_v6_link_local_multicast(address: &Address) -> bool {
    address[0] == 0xff && address[1] & 0x0f == 0x02
}

/// Whether two addresses are equal. Compares two words: the compiler would turn a comparison of slices into a
/// call of a function that the kernel does not have.
#[inline(always)]
pub const fn same(a: &Address, b: &Address) -> bool {
    u128::from_ne_bytes(*a) == u128::from_ne_bytes(*b)
}
