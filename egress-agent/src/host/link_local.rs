//! The link-local addresses of this machine and of its gateways.

use std::{collections::BTreeSet, fs, io, net::Ipv6Addr, path::Path};

/// The most bytes of a route table that are read. A router of the internet has a far longer table, of which
/// only the first gateways are known.
const TABLE_MAX: u64 = 1 << 20;

/// The link-local addresses of this machine's interfaces, and those of gateways in its routes.
///
/// # Errors
///
/// When the kernel's tables cannot be read.
pub fn taken_link_locals() -> io::Result<BTreeSet<Ipv6Addr>> {
    let net = Path::new("/proc/thread-self/net");
    let mut taken = BTreeSet::new();
    let addresses = column(&table(&net.join("if_inet6"))?, ADDRESS);
    taken.extend(addresses.into_iter().chain(gateways_v6()?));
    taken.retain(Ipv6Addr::is_unicast_link_local);
    Ok(taken)
}

/// The next hops of this machine's IPv6 routes.
pub(super) fn gateways_v6() -> io::Result<Vec<Ipv6Addr>> {
    let table = table(Path::new("/proc/thread-self/net/ipv6_route"))?;
    let mut gateways = column(&table, NEXT_HOP);
    gateways.retain(|address| !address.is_unspecified());
    Ok(gateways)
}

pub(super) fn table(path: &Path) -> io::Result<String> {
    use io::Read as _;
    let mut text = String::new();
    match fs::File::open(path) {
        Ok(file) => file.take(TABLE_MAX).read_to_string(&mut text).map(|_| text),
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(text),
        Err(error) => Err(error),
    }
}

/// `net/ipv6/addrconf.c`, `if6_seq_show`: the address in the first column.
const ADDRESS: usize = 0;
/// `net/ipv6/ip6_fib.c`, `ipv6_route_native_seq_show`: the next hop in the fifth column.
const NEXT_HOP: usize = 4;

fn column(table: &str, number: usize) -> Vec<Ipv6Addr> {
    let text = move |line: &'_ str| {
        let text = line.split_ascii_whitespace().nth(number)?;
        u128::from_str_radix(text, 16).ok()
    };
    table
        .lines()
        .filter_map(text)
        .map(Ipv6Addr::from_bits)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_gateways_are_read_from_the_kernels_tables() {
        let table = "fe8000000000000000000000000000aa 02 40 20 80     eth0\n\
                     fd010001000000000000000000000001 04 40 00 80     veth1\n\
                     00000000000000000000000000000001 01 80 10 80       lo\n";
        let expected: Ipv6Addr = "fe80::aa".parse().unwrap();
        assert_eq!(column(table, ADDRESS)[0], expected);
        assert_eq!(column(table, ADDRESS).len(), 3);
        let zeros = "0".repeat(32);
        let table = format!(
            "{zeros} 00 {zeros} 00 fe80{rest}01 00000400 00000002 00000000 00000003     eth1\n\
             fd{rest}0000 40 {zeros} 00 {zeros} 00000100 00000001 00000000 00000001     veth1\n",
            rest = "0".repeat(26)
        );
        let expected: Ipv6Addr = "fe80::1".parse().unwrap();
        assert_eq!(column(&table, NEXT_HOP), [expected, Ipv6Addr::UNSPECIFIED]);
    }
}
