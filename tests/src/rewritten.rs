//! Packets of a pod's sockets that the pod rewrites with nftables on their way out.
//!
//! A socket leaves its checksum to a later stage, and the kernel remembers where the sum belongs. Rewriting
//! the headers does not change that offset, so the kernel writes the sum over other bytes.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    process::{Command, Stdio},
    time::Duration,
};

use nix::libc;

use crate::{
    Namespace, Pod,
    addresses::server,
    raw::{ETHERNET, IPV4, ether},
};

/// The start and the place of the checksum of a UDP datagram over IPv4.
pub const UDP_SUM: Sum = Sum {
    from: IPV4,
    at: IPV4 + 6,
};
/// The same for a TCP segment that passed an interface without hardware addresses, where it had no Ethernet
/// header.
pub const SHIFTED_TCP_SUM: Sum = Sum {
    from: IPV4 - ETHERNET,
    at: IPV4 - ETHERNET + 16,
};

/// The offset in a frame from which a checksum is computed, and the offset at which it is written.
#[derive(Clone, Copy, Debug)]
pub struct Sum {
    from: usize,
    at: usize,
}

impl Sum {
    /// The checksum of a UDP datagram with this many bytes of IP options that passed an interface without
    /// hardware addresses; see [`send_by_tun_udp`].
    pub const fn of_tun_udp(options: usize) -> Self {
        let from = IPV4 - ETHERNET + options;
        Self { from, at: from + 6 }
    }

    /// Changes two bytes of `frame`, at the even offset `free`, so that its checksum is `wanted`.
    pub fn arrange(self, frame: &mut [u8], free: usize, wanted: u16) {
        frame[free..free + 2].fill(0);
        let rest = ones_sum(&frame[self.from..]);
        let word = ones_sum(&[(!wanted).to_be_bytes(), (!rest).to_be_bytes()].concat());
        frame[free..free + 2].copy_from_slice(&word.to_be_bytes());
        assert_eq!(!ones_sum(&frame[self.from..]), wanted);
    }

    /// Changes the two bytes of `frame` that the checksum will replace, so that the checksum is `wanted`.
    pub fn arrange_in_place(self, frame: &mut [u8], wanted: u16) {
        self.arrange(frame, self.at, wanted);
    }

    /// The frame after its checksum was written.
    pub fn with_checksum_written(self, frame: &[u8]) -> Vec<u8> {
        let sum = !ones_sum(&frame[self.from..]);
        let mut landed = frame.to_vec();
        landed[self.at..self.at + 2].copy_from_slice(&sum.to_be_bytes());
        landed
    }
}

/// The ones' complement sum of 16-bit words (RFC 1071).
fn ones_sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for word in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([
            word[0],
            word.get(1).copied().unwrap_or(0),
        ]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).expect("it was folded")
}

/// Sets the frame's hardware addresses, from the pod to the node, and the checksum of an IPv4 header.
pub fn finish(pod: &Pod, frame: &mut [u8]) {
    frame[..6].copy_from_slice(&pod.gateway_hardware());
    frame[6..12].copy_from_slice(&pod.hardware());
    if frame[12..14] == ether::IPV4.to_be_bytes() {
        let end = ETHERNET + usize::from(frame[ETHERNET] & 0xf) * 4;
        frame[ETHERNET + 10..ETHERNET + 12].fill(0);
        let sum = !ones_sum(&frame[ETHERNET..end]);
        frame[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&sum.to_be_bytes());
    }
}

const PORT: u16 = 4444;

/// Sends a datagram from a UDP socket of the pod over IPv4, and rewrites it to `frame` on its way out of the
/// pod.
#[track_caller]
pub fn send_by_udp(pod: &Pod, frame: &[u8]) {
    let head = IPV4 + 8;
    let mut rule = format!("udp dport {PORT}");
    rewrite(&mut rule, "ll", 0, &frame[..ETHERNET]);
    rewrite(&mut rule, "nh", 0, &frame[ETHERNET..head]);
    hook(pod.netns(), "eth0", &rule);
    let to = SocketAddr::new(server(1), PORT);
    let sent = pod.netns().run(|| {
        let socket = UdpSocket::bind((pod.ipv4(), 0))?;
        socket.send_to(&frame[head..], to)
    });
    assert_eq!(sent.expect("send a datagram"), frame.len() - head);
    unhook(pod.netns());
}

/// As [`send_by_tun`], with a UDP socket whose datagrams have this many bytes of IP options.
#[track_caller]
pub fn send_by_tun_udp(pod: &Pod, frame: &[u8], options: usize) {
    let head = IPV4 - ETHERNET + options + 8;
    let netns = pod.netns();
    let _tun = netns.run(|| tun("tun0")).expect("a tun interface");
    netns.ip_batch(&format!(
        "link set tun0 up\nroute add {}/32 dev tun0 src {}\n",
        server(1),
        pod.ipv4()
    ));
    let mut rule = format!("udp dport {PORT}");
    rewrite(&mut rule, "nh", 0, &frame[..head]);
    rule.push_str(" fwd to eth0");
    hook(netns, "tun0", &rule);
    let to = SocketAddr::new(server(1), PORT);
    let sent = netns.run(|| {
        let socket = UdpSocket::bind((pod.ipv4(), 0))?;
        let options = vec![1_u8; options];
        // SAFETY: pointer and length are those of the options.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_IP,
                libc::IP_OPTIONS,
                options.as_ptr().cast(),
                libc::socklen_t::try_from(options.len()).unwrap_or_default(),
            )
        };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
        socket.send_to(&frame[head..], to)
    });
    assert_eq!(sent.expect("send a datagram"), frame.len() - head);
    unhook(netns);
    netns.ip_batch("link del tun0\n");
}

/// Sends a SYN from a TCP socket of the pod through an interface without hardware addresses, and rewrites it
/// to `frame` on its way from there to the pod's interface.
#[track_caller]
pub fn send_by_tun(pod: &Pod, frame: &[u8]) {
    let netns = pod.netns();
    let _tun = netns.run(|| tun("tun0")).expect("a tun interface");
    netns.ip_batch(&format!(
        "link set tun0 up\nroute add {}/32 dev tun0 src {}\n",
        server(1),
        pod.ipv4()
    ));
    // A SYN is an IP header and 40 bytes.
    assert_eq!(frame.len(), 60, "the length of a SYN");
    let mut rule = format!("tcp dport {PORT}");
    rewrite(&mut rule, "nh", 0, frame);
    rule.push_str(" fwd to eth0");
    hook(netns, "tun0", &rule);
    let to = SocketAddr::new(server(1), PORT);
    let connected =
        netns.run(|| TcpStream::connect_timeout(&to, Duration::from_millis(300)).map(drop));
    connected.expect_err("nobody sees a SYN");
    unhook(netns);
    netns.ip_batch("link del tun0\n");
}

/// Adds statements that write `bytes` into a header.
fn rewrite(rule: &mut String, base: &str, from: usize, bytes: &[u8]) {
    // The size of an nftables register.
    for (i, part) in bytes.chunks(16).enumerate() {
        let (bit, bits) = ((from + 16 * i) * 8, part.len() * 8);
        let _ = write!(rule, " @{base},{bit},{bits} set 0x");
        for byte in part {
            let _ = write!(rule, "{byte:02x}");
        }
    }
}

/// Runs an action while a rule applies to everything that leaves through an interface.
#[track_caller]
pub fn with_rule(netns: &Namespace, interface: &str, rule: &str, action: impl FnOnce()) {
    hook(netns, interface, rule);
    action();
    unhook(netns);
}

/// Adds a rule for everything that leaves through an interface.
#[track_caller]
fn hook(netns: &Namespace, interface: &str, rule: &str) {
    nft(
        netns,
        &format!(
            "table netdev rewritten {{\n\
               chain out {{\n\
                 type filter hook egress device {interface} priority 0; policy accept;\n\
                 {rule}\n\
               }}\n\
             }}\n"
        ),
    );
}

#[track_caller]
fn unhook(netns: &Namespace) {
    nft(netns, "delete table netdev rewritten\n");
}

/// Runs these commands with nft in a namespace; panics when they fail.
#[track_caller]
pub fn nft(netns: &Namespace, commands: &str) {
    let output = netns.run(|| {
        let mut child = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(commands.as_bytes())?;
        }
        child.wait_with_output()
    });
    let output = output.expect("nft, of the package nftables");
    assert!(
        output.status.success(),
        "nft: {}\n{commands}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// An interface without hardware addresses that accepts packets with checksums still to be computed. It
/// exists as long as the file is open.
fn tun(name: &str) -> io::Result<std::fs::File> {
    // include/uapi/linux/if_tun.h
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
    const TUN_F_CSUM: libc::c_ulong = 1;
    const IFF_TUN: libc::c_short = 1;
    const IFF_NO_PI: libc::c_short = 0x1000;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut request = interface_request(name);
    request.ifr_ifru.ifru_flags = IFF_TUN | IFF_NO_PI;
    // SAFETY: the first request takes a struct ifreq, to which the pointer leads; the second takes a number.
    let set = unsafe {
        libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) == 0
            && libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, TUN_F_CSUM) == 0
    };
    if set {
        Ok(file)
    } else {
        Err(io::Error::last_os_error())
    }
}

pub(crate) fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: every field of the structure is a number, an array of numbers or a pointer, for all of which
    // zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request
}

/// Makes the kernel compute the checksums of packets that leave through an interface, as for hardware that
/// cannot.
#[track_caller]
pub fn compute_checksums(netns: &Namespace, interface: &str) {
    /// `struct ethtool_value`, include/uapi/linux/ethtool.h.
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    const ETHTOOL_STXCSUM: u32 = 0x17;
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    let set = netns.run(|| {
        let socket = UdpSocket::bind((IpAddr::from([0; 4]), 0))?;
        let mut value = Value {
            command: ETHTOOL_STXCSUM,
            data: 0,
        };
        let mut request = interface_request(interface);
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        // SAFETY: the request takes a struct ifreq whose data is a struct ethtool_value.
        match unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    });
    set.unwrap_or_else(|e: io::Error| panic!("switch off the checksums of {interface}: {e}"));
}
