//! The code that the kernel programs and the agent share.
//!
//! It has the `repr(C)` records that both read and write through BPF maps ([`records`]), and the pure
//! functions that both run: the header walk ([`packet`]) and the verdict ([`verdict`]). No code here uses a
//! kernel or the standard library, so all of it is tested on the host.
//!
//! Addresses are always 16 bytes in network byte order. An IPv4 address has its IPv4-mapped form (RFC 4291,
//! section 2.5.5.2). Ports are always in host byte order.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_op_in_unsafe_fn)]

pub mod address;
pub mod classes;
pub mod dns;
pub mod flow;
pub mod ids;
pub mod limits;
pub mod meter;
pub mod packet;
pub mod protocol;
pub mod reason;
pub mod records;
pub mod translation;
pub mod verdict;
