//! Readers of an interface's packets that run before tc: XDP programs and packet sockets.
//!
//! In the kernel's order (`__netif_receive_skb_core`, `net/core/dev.c`) both come before the hooks of
//! tc. A packet socket only reads, but its program can forward what it has read, as Open vSwitch's netdev
//! datapath does. An XDP program can redirect the packets that it sees.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::PathBuf,
};

use egress_common::ids::IfIndex;

use super::netlink::Netlink;

/// Protocols, as EtherTypes, of sockets that read IP: every one (`ETH_P_ALL`), IPv4, IPv6. A socket of
/// protocol 0 reads nothing; those of other protocols, such as LLDP's, see no packet that is judged.
const READ_IP: [u16; 3] = [0x0003, 0x0800, 0x86dd];

/// A snapshot of the readers before tc.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Taps {
    /// Indexes of the interfaces that packet sockets are bound to.
    sockets: BTreeSet<IfIndex>,
    /// How many packet sockets are bound to no interface, so that they read on all.
    pub on_all: usize,
    /// Ids of XDP programs, by interface.
    xdp: BTreeMap<IfIndex, u32>,
}

impl Taps {
    /// Whether a packet socket is bound to this interface.
    pub fn has_socket(&self, ifindex: IfIndex) -> bool {
        self.sockets.contains(&ifindex)
    }

    /// The id of the XDP program on this interface.
    pub fn xdp(&self, ifindex: IfIndex) -> Option<u32> {
        self.xdp.get(&ifindex).copied()
    }

    /// Reads a table like /proc/net/packet (`packet_seq_show`, `net/packet/af_packet.c`).
    fn read_sockets(&mut self, table: &str) {
        for line in table.lines().skip(1) {
            let columns: Vec<&str> = line.split_ascii_whitespace().collect();
            let [_, _, _, protocol, ifindex, ..] = columns[..] else {
                continue;
            };
            let reads_ip =
                u16::from_str_radix(protocol, 16).is_ok_and(|protocol| READ_IP.contains(&protocol));
            match ifindex.parse() {
                Ok(0) if reads_ip => self.on_all += 1,
                Ok(ifindex) if reads_ip => _ = self.sockets.insert(IfIndex::new(ifindex)),
                _ => {}
            }
        }
    }
}

/// Finds the readers before tc, in the network namespace of the thread that opened this.
pub struct TapWatch {
    netlink: Netlink,
    sockets: PathBuf,
}

impl TapWatch {
    /// Opens a socket to the kernel.
    ///
    /// # Errors
    ///
    /// When netlink is not available.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            netlink: Netlink::open()?,
            sockets: "/proc/thread-self/net/packet".into(),
        })
    }

    /// Takes a snapshot.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub fn look(&mut self) -> io::Result<Taps> {
        let mut taps = Taps::default();
        taps.read_sockets(&fs::read_to_string(&self.sockets)?);
        for link in self.netlink.links()? {
            if let Some(program) = link.xdp {
                taps.xdp.insert(IfIndex::new(link.index), program);
            }
        }
        Ok(taps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_that_read_ip_are_distinguished_from_others() {
        let table = "sk               RefCnt Type Proto  Iface R Rmem   User   Inode\n\
                     0000000000000000 3      3    0003   7     1 0      0      100   \n\
                     0000000000000000 3      3    0000   8     1 0      0      101   \n\
                     0000000000000000 3      3    88cc   9     1 0      0      102   \n\
                     0000000000000000 3      2    86dd   10    1 0      0      103   \n\
                     0000000000000000 3      3    0003   0     1 0      0      104   \n";
        let mut taps = Taps::default();
        taps.read_sockets(table);
        let bound: Vec<IfIndex> = taps.sockets.iter().copied().collect();
        assert_eq!(
            (bound, taps.on_all),
            (vec![IfIndex::new(7), IfIndex::new(10)], 1)
        );
        assert!(taps.has_socket(IfIndex::new(7)) && !taps.has_socket(IfIndex::new(8)));
    }
}
