//! Features of interfaces, as `ethtool -K` sets them.

use std::{io, net::UdpSocket, os::fd::AsRawFd as _};

use nix::libc;

use crate::{Namespace, rewritten::interface_request};

/// Commands, include/uapi/linux/ethtool.h.
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_SFEATURES: u32 = 0x3b;
/// The set of strings with the names of features.
const ETH_SS_FEATURES: u32 = 4;
/// The length of a name.
const NAME: usize = 32;
/// An upper bound of the number of features in any kernel.
const FEATURES: usize = 128;

const SIOCETHTOOL: libc::c_ulong = 0x8946;

/// `struct ethtool_gstrings`.
#[repr(C)]
struct Names {
    command: u32,
    set: u32,
    len: u32,
    strings: [[u8; NAME]; FEATURES],
}

/// `struct ethtool_sfeatures`; each block has a bitmap of the features to change, and one of their new
/// values.
#[repr(C)]
struct Wanted {
    command: u32,
    blocks: u32,
    features: [[u32; 2]; FEATURES / 32],
}

/// Switches features of an interface on or off, by the names that `ethtool -k` shows.
#[track_caller]
pub fn set_features(netns: &Namespace, interface: &str, features: &[(&str, bool)]) {
    let set = netns.run(|| {
        let mut names = Names {
            command: ETHTOOL_GSTRINGS,
            set: ETH_SS_FEATURES,
            len: 0,
            strings: [[0; NAME]; FEATURES],
        };
        ask(interface, &mut names)?;
        let mut wanted = Wanted {
            command: ETHTOOL_SFEATURES,
            blocks: names.len.div_ceil(32),
            features: [[0; 2]; FEATURES / 32],
        };
        for (name, on) in features {
            let place = names.strings.iter().position(|known| is_name(known, name));
            let place = place.ok_or_else(|| io::Error::other(format!("no feature {name}")))?;
            let [meant, on_of] = &mut wanted.features[place / 32];
            *meant |= 1 << (place % 32);
            *on_of |= u32::from(*on) << (place % 32);
        }
        ask(interface, &mut wanted)
    });
    set.unwrap_or_else(|e: io::Error| panic!("set {features:?} of {interface}: {e}"));
}

fn is_name(known: &[u8; NAME], name: &str) -> bool {
    known
        .iter()
        .copied()
        .take_while(|byte| *byte != 0)
        .eq(name.bytes())
}

fn ask<T>(interface: &str, value: &mut T) -> io::Result<()> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    let mut request = interface_request(interface);
    request.ifr_ifru.ifru_data = core::ptr::from_mut(value).cast();
    // SAFETY: the request takes a struct ifreq whose data matches its command, with room for all features.
    match unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) } {
        result if result >= 0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
