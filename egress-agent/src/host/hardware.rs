//! Hardware addresses of Ethernet.

use std::{
    collections::{BTreeSet, HashSet},
    fmt, io,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use super::{
    link_local::{gateways_v6, table},
    netlink::Netlink,
};

/// The hardware address of an Ethernet interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HardwareAddress(pub [u8; 6]);

impl HardwareAddress {
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Whether an interface can have this address: neither a group address nor zero.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for HardwareAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = self.0;
        write!(f, "{first:02x}")?;
        rest.iter().try_for_each(|byte| write!(f, ":{byte:02x}"))
    }
}

/// The hardware addresses of the gateways in this machine's routes, as far as the neighbour table has them.
pub(super) fn of_gateways(netlink: &mut Netlink) -> io::Result<BTreeSet<HardwareAddress>> {
    let gateways = gateways()?;
    let neighbours = netlink.neighbours()?.into_iter();
    let known = neighbours.filter(|(address, _)| gateways.contains(address));
    Ok(known.map(|(_, hardware)| hardware).collect())
}

/// The addresses of the gateways in this machine's routes, of both families.
///
/// # Errors
///
/// When the route tables cannot be read.
pub fn gateways() -> io::Result<HashSet<IpAddr>> {
    let table = table(Path::new("/proc/thread-self/net/route"))?;
    let mut gateways: HashSet<IpAddr> = gateways_v4(&table).map(IpAddr::V4).collect();
    gateways.extend(gateways_v6()?.into_iter().map(IpAddr::V6));
    Ok(gateways)
}

/// `net/ipv4/fib_trie.c`, `fib_route_seq_show`: the next hop in the third column, zero if there is none.
fn gateways_v4(table: &str) -> impl Iterator<Item = Ipv4Addr> + '_ {
    let lines = table.lines().skip(1);
    let gateway = |line: &str| {
        let text = line.split_ascii_whitespace().nth(2)?;
        let address = u32::from_str_radix(text, 16).ok()?;
        (address != 0).then(|| Ipv4Addr::from(address.to_ne_bytes()))
    };
    lines.filter_map(gateway)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hardware_address_is_written_as_usual() {
        let address = HardwareAddress::read(&[2, 0, 0, 0xab, 1, 0x0f]).unwrap();
        assert_eq!(address.to_string(), "02:00:00:ab:01:0f");
        assert!(address.is_unicast());
        assert!(!HardwareAddress([1, 0, 0x5e, 0, 0, 1]).is_unicast());
        assert!(!HardwareAddress([0; 6]).is_unicast());
        assert_eq!(HardwareAddress::read(&[1, 2, 3, 4]), None);
    }

    #[test]
    fn gateways_are_read_from_the_kernels_table() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                     eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                     veth1\t0001010A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        let expected = [Ipv4Addr::new(192, 0, 2, 1)];
        assert_eq!(gateways_v4(table).collect::<Vec<_>>(), expected);
    }
}
