//! The system call that sends frames.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    ptr,
};

use super::{Frame, socket::Socket};

/// Most frames that one system call sends.
const BATCH: usize = 32;

/// A control message that gives one frame its mark (`sock_cmsg_send`, net/core/sock.c), so that one socket
/// serves all marks.
#[repr(C)]
struct MarkMessage {
    head: libc::cmsghdr,
    mark: u32,
}

/// The buffers to which one message of the call points.
struct Parts {
    to: libc::sockaddr_ll,
    content: libc::iovec,
    mark: MarkMessage,
}

/// Sends frames, each on its interface and with its mark, until one fails. Returns how many went out: at
/// least one.
///
/// # Errors
///
/// When the first one fails.
#[expect(
    unsafe_code,
    reason = "no safe wrapper sends to a sockaddr_ll with a mark"
)]
pub(super) fn send_some(socket: &Socket, frames: &[Frame], bytes: &[u8]) -> io::Result<usize> {
    let frames = frames.get(..BATCH).unwrap_or(frames);
    let mut parts: Vec<Parts> = frames.iter().map(|frame| parts(frame, bytes)).collect();
    let mut messages: Vec<libc::mmsghdr> = parts
        .iter_mut()
        .map(|parts| {
            // SAFETY: all bytes zero is a valid `mmsghdr`.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            message.msg_hdr.msg_name = ptr::from_mut(&mut parts.to).cast();
            message.msg_hdr.msg_namelen = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            message.msg_hdr.msg_iov = &raw mut parts.content;
            message.msg_hdr.msg_iovlen = 1;
            message.msg_hdr.msg_control = ptr::from_mut(&mut parts.mark).cast();
            // The type differs between C libraries.
            message.msg_hdr.msg_controllen = size_of::<MarkMessage>() as _;
            message
        })
        .collect();
    // SAFETY: each message points to an address, a control message and a content that live until
    // the call returns, and each content to a frame, which the kernel only reads.
    let sent = unsafe {
        libc::sendmmsg(
            socket.as_fd().as_raw_fd(),
            messages.as_mut_ptr(),
            messages.len() as u32,
            0,
        )
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

#[expect(unsafe_code, reason = "no safe wrapper makes these records")]
fn parts(frame: &Frame, bytes: &[u8]) -> Parts {
    let content = bytes
        .get(frame.starts_at..frame.ends_at)
        .unwrap_or_default();
    // SAFETY: all bytes zero is a valid `sockaddr_ll`.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    // The `EtherType`, in network byte order.
    to.sll_protocol = content
        .get(12..14)
        .map_or(0, |bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
    // No interface has an index that does not fit; the kernel returns an error for it.
    to.sll_ifindex = frame.ifindex.get().cast_signed();
    // SAFETY: all bytes zero is a valid `cmsghdr`.
    let mut head: libc::cmsghdr = unsafe { std::mem::zeroed() };
    head.cmsg_level = libc::SOL_SOCKET;
    head.cmsg_type = libc::SO_MARK;
    // The type differs between C libraries; the mark stands right behind the header (cmsg(3)).
    head.cmsg_len = (std::mem::offset_of!(MarkMessage, mark) + size_of::<u32>()) as _;
    Parts {
        to,
        content: libc::iovec {
            iov_base: content.as_ptr().cast_mut().cast(),
            iov_len: content.len(),
        },
        mark: MarkMessage {
            head,
            mark: frame.mark,
        },
    }
}
