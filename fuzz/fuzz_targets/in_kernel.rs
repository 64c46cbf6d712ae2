//! The programs decline a message, or find in it what the agent finds.
#![no_main]

use egress_dns::in_kernel::{compare_query, compare_response};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|message: &[u8]| {
    compare_query(message);
    compare_response(message);
});
