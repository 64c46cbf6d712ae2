//! Other programs on a pod's interface, as network plugins attach them.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    process::Command,
};

use nix::{libc, net::if_::if_nametoindex};

use crate::{Lab, Namespace, Pod};

/// Commands of bpf(2) and numbers of `include/uapi/linux/bpf.h`.
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_F_BEFORE: u32 = 1 << 3;
/// `XDP_FLAGS_SKB_MODE`, `include/uapi/linux/if_link.h`.
const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;

/// A hook that a program can be attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// tcx, for packets that the interface receives.
    TcxIngress,
    /// tcx, for packets that the interface sends.
    TcxEgress,
    /// XDP, for packets that the interface receives.
    Xdp,
}

impl Place {
    /// Program type, attach type and flags.
    const fn numbers(self) -> (u32, u32, u32) {
        match self {
            Self::TcxIngress => (3, 46, BPF_F_BEFORE),
            Self::TcxEgress => (3, 47, BPF_F_BEFORE),
            Self::Xdp => (6, 37, XDP_FLAGS_SKB_MODE),
        }
    }
}

/// A program in front of all others on its hook that returns the same value for every packet. It is detached
/// when this is dropped.
#[derive(Debug)]
pub struct Rival {
    _link: OwnedFd,
}

impl Rival {
    /// tc's `TC_ACT_OK`: the packet goes on, and no other program sees it.
    pub const OK: i32 = 0;
    /// `XDP_DROP`.
    pub const XDP_DROP: i32 = 1;
    /// `XDP_PASS`.
    pub const XDP_PASS: i32 = 2;

    /// Attaches a program that returns this value to an interface of `namespace`.
    #[track_caller]
    pub fn attach(namespace: &Namespace, interface: &str, place: Place, returns: i32) -> Self {
        let [a, b, c, d] = returns.to_ne_bytes();
        // mov64 r0, <number>; exit
        let code = [0xb7, 0, 0, 0, a, b, c, d, 0x95, 0, 0, 0, 0, 0, 0, 0];
        Self::attach_code(namespace, interface, place, &code)
    }

    /// Attaches a program that adds one to the mark of each packet that an interface sends.
    #[track_caller]
    pub fn count_in_mark(namespace: &Namespace, interface: &str) -> Self {
        let code = [
            [0x61, 0x12, 8, 0, 0, 0, 0, 0],             // r2 = mark
            [0x07, 0x02, 0, 0, 1, 0, 0, 0],             // r2 += 1
            [0x63, 0x21, 8, 0, 0, 0, 0, 0],             // mark = r2
            [0xb7, 0x00, 0, 0, 0xff, 0xff, 0xff, 0xff], // r0 = -1: `TCX_NEXT`
            [0x95, 0x00, 0, 0, 0, 0, 0, 0],             // exit
        ];
        Self::attach_code(namespace, interface, Place::TcxEgress, code.as_flattened())
    }

    #[track_caller]
    fn attach_code(namespace: &Namespace, interface: &str, place: Place, code: &[u8]) -> Self {
        let attached = namespace.run(|| {
            let ifindex = if_nametoindex(interface)?;
            let program = load(place, code)?;
            link(&program, ifindex, place)
        });
        let link = attached.unwrap_or_else(|e: io::Error| panic!("a rival on {interface}: {e}"));
        Self { _link: link }
    }
}

/// `union bpf_attr` as `BPF_PROG_LOAD` reads it, up to the attach type.
#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    kind: u32,
    instructions: u32,
    instruction: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    attach_type: u32,
}

/// The same as `BPF_LINK_CREATE` reads it.
#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    program: u32,
    ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    pad: u32,
    revision: u64,
}

/// Loads instructions of eight bytes each.
fn load(place: Place, code: &[u8]) -> io::Result<OwnedFd> {
    let (kind, attach_type, _) = place.numbers();
    let mut attr = ProgramLoad {
        kind,
        instructions: (code.len() / 8) as u32,
        instruction: code.as_ptr().expose_provenance() as u64,
        license: c"GPL".as_ptr().expose_provenance() as u64,
        attach_type,
        ..ProgramLoad::default()
    };
    attr.name[..5].copy_from_slice(b"rival");
    bpf(BPF_PROG_LOAD, &mut attr)
}

fn link(program: &OwnedFd, ifindex: u32, place: Place) -> io::Result<OwnedFd> {
    let (_, attach_type, flags) = place.numbers();
    let mut attr = LinkCreate {
        program: program.as_raw_fd().cast_unsigned(),
        ifindex,
        attach_type,
        flags,
        ..LinkCreate::default()
    };
    bpf(BPF_LINK_CREATE, &mut attr)
}

/// Runs a command that creates a file descriptor.
#[expect(unsafe_code, reason = "no safe wrapper loads plain instructions")]
fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel gets the size of `attr`, and the pointers in it are to memory that lives until the
    // call returns.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

impl Lab {
    /// Runs `tc` on the node.
    #[track_caller]
    pub fn tc(&self, arguments: &str) -> String {
        self.tc_with(arguments, &[])
    }

    /// Runs `tc` on the node, with last arguments that may contain spaces.
    #[track_caller]
    pub fn tc_with(&self, arguments: &str, last: &[&str]) -> String {
        let mut command = Command::new("tc");
        command.args(arguments.split(' ')).args(last);
        let output = self.node().run(|| command.output());
        let output = output.expect("tc, of the package iproute2");
        assert!(
            output.status.success(),
            "tc {arguments}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Adds a filter to one side of the pod's interface, as the newest of priority 1. It returns `TC_ACT_OK`,
    /// so later filters do not see the packet.
    #[track_caller]
    pub fn add_rival_filter(&self, pod: &Pod, side: &str, handle: u32) {
        let interface = pod.interface();
        self.tc_with(
            &format!("filter add dev {interface} {side} prio 1 handle {handle} bpf bytecode"),
            &["1,6 0 0 4294967295"],
        );
    }
}
