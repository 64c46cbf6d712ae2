//! The uplinks of this machine.
//!
//! A node may itself be in a namespace behind a veth, as the nodes of kind and k3d are. That veth looks
//! exactly like a pod's, except that the default route leads through it.

use std::{collections::HashSet, fs, io, path::Path};

/// The names of the interfaces of default routes, in the main tables of both families.
pub(super) fn uplinks(proc: &Path) -> io::Result<HashSet<String>> {
    let net = proc.join("thread-self/net");
    let mut names: HashSet<String> = v4(&fs::read_to_string(net.join("route"))?).collect();
    match fs::read_to_string(net.join("ipv6_route")) {
        Ok(table) => names.extend(v6(&table)),
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    Ok(names)
}

/// `net/ipv4/fib_trie.c`, `fib_route_seq_show`: interface, destination, …, mask in the eighth column.
fn v4(table: &str) -> impl Iterator<Item = String> + '_ {
    table.lines().skip(1).filter_map(|line| {
        let columns: Vec<&str> = line.split_ascii_whitespace().collect();
        match columns[..] {
            [name, "00000000", _, _, _, _, _, "00000000", ..] => Some(name.to_owned()),
            _ => None,
        }
    })
}

/// `net/ipv6/ip6_fib.c`, `ipv6_route_native_seq_show`: destination, its prefix length, …, interface in
/// the last column. Rejecting routes are on the loopback interface.
fn v6(table: &str) -> impl Iterator<Item = String> + '_ {
    table.lines().filter_map(|line| {
        let mut columns = line.split_ascii_whitespace();
        let destination = columns.next()?;
        let is_default = destination.bytes().all(|digit| digit == b'0') && columns.next()? == "00";
        let name = columns.next_back()?;
        (is_default && name != "lo").then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_routes_name_their_interfaces() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                     eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                     veth1\t0001010A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        assert_eq!(v4(table).collect::<Vec<_>>(), ["eth0"]);
        let zeros = "0".repeat(32);
        let table = format!(
            "fd{rest} 40 {zeros} 00 {zeros} 00000100 00000001 00000000 00000001     veth1\n\
             {zeros} 00 {zeros} 00 fd{rest} 00000400 00000002 00000000 00000003     eth1\n\
             {zeros} 00 {zeros} 00 {zeros} ffffffff 00000001 00000000 00200200       lo\n",
            rest = "0".repeat(30)
        );
        assert_eq!(v6(&table).collect::<Vec<_>>(), ["eth1"]);
    }
}
