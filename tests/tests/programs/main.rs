//! The eBPF programs alone, run by the kernel on one packet at a time (`BPF_PROG_TEST_RUN`).

mod accepted;
mod dns;
mod flows;
mod fragments;
mod headers;
mod openings;
mod replaced;
mod sources;
mod tunnels;
