//! What the kernel programs and the agent share.
//!
//! Two kinds of things live here: the `repr(C)` records that both sides read and write through
//! BPF maps ([`records`]), and the pure functions both run: the header walk ([`packet`]) and the
//! verdict ([`verdict`]). Nothing here touches a kernel or the standard library, so everything is
//! tested on the host.
//!
//! Addresses are always 16 bytes in network byte order; an IPv4 address is written in its
//! IPv4-mapped form (RFC 4291, section 2.5.5.2). Ports are in host byte order everywhere.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_op_in_unsafe_fn)]

pub mod address;
pub mod flow;
pub mod limits;
pub mod meter;
pub mod packet;
pub mod protocol;
pub mod reason;
pub mod records;
pub mod translation;
pub mod verdict;
