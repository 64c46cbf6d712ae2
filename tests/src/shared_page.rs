//! Datagrams whose payload is in a page to which their sender can still write.
//!
//! vmsplice(2) and splice(2) put the page itself into the packet instead of a copy.

use std::{
    io::{self, pipe},
    net::UdpSocket,
    os::fd::AsRawFd as _,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use nix::libc;

/// A page of this process that packets can carry.
#[derive(Debug)]
#[repr(align(4096))]
pub struct SharedPage([AtomicU64; 512]);

impl SharedPage {
    /// A page that begins with these bytes; the rest is zero.
    #[track_caller]
    pub fn new(bytes: &[u8]) -> Box<Self> {
        let page = Self([const { AtomicU64::new(0) }; 512]);
        assert!(bytes.len() <= size_of::<Self>(), "longer than a page");
        for (word, bytes) in page.0.iter().zip(bytes.chunks(8)) {
            word.store(word_of(bytes), Ordering::Relaxed);
        }
        Box::new(page)
    }

    /// Writes the two values alternately to the eight bytes at `8 * word`, until `stop`.
    pub fn flip(&self, word: usize, between: [&[u8]; 2], stop: &AtomicBool) {
        let between = between.map(word_of);
        while !stop.load(Ordering::Relaxed) {
            for value in between {
                self.0[word].store(value, Ordering::Relaxed);
                for _ in 0..40 {
                    std::hint::spin_loop();
                }
            }
        }
    }

    /// Sends the first `len` bytes of the page as one datagram of a connected socket, without a copy.
    pub fn send(&self, len: usize, socket: &UdpSocket) -> io::Result<()> {
        assert!(len <= size_of::<Self>(), "longer than the page");
        let (from, to) = pipe()?;
        let part = libc::iovec {
            iov_base: (&raw const self.0).cast_mut().cast(),
            iov_len: len,
        };
        // SAFETY: the part lies within the page, from which the kernel only reads; it keeps the page as long
        // as a packet refers to it.
        let spliced = unsafe { libc::vmsplice(to.as_raw_fd(), &raw const part, 1, 0) };
        is_all(spliced, len)?;
        let none = std::ptr::null_mut();
        // SAFETY: both descriptors are open, and neither has an offset.
        let sent =
            unsafe { libc::splice(from.as_raw_fd(), none, socket.as_raw_fd(), none, len, 0) };
        is_all(sent, len)
    }
}

/// Makes the socket send UDP over IPv6 without a checksum, for which the kernel would have to read the
/// payload, and accept such datagrams.
pub fn without_checksums(socket: &UdpSocket) -> io::Result<()> {
    // include/uapi/linux/udp.h
    const UDP_NO_CHECK6_TX: libc::c_int = 101;
    const UDP_NO_CHECK6_RX: libc::c_int = 102;
    let on: libc::c_int = 1;
    for option in [UDP_NO_CHECK6_TX, UDP_NO_CHECK6_RX] {
        // SAFETY: the option takes an int, which pointer and length describe.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_UDP,
                option,
                (&raw const on).cast(),
                size_of_val(&on).try_into().unwrap_or_default(),
            )
        };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn word_of(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_ne_bytes(word)
}

fn is_all(result: isize, len: usize) -> io::Result<()> {
    match usize::try_from(result) {
        Ok(done) if done == len => Ok(()),
        Ok(done) => Err(io::Error::other(format!("{done} bytes of {len}"))),
        Err(_) => Err(io::Error::last_os_error()),
    }
}
