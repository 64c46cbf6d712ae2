//! Whatever fragments come, the pod's kernel puts together what was judged, and nothing else.
//!
//! The input is how to make the fragments, five bytes each: of which datagram, where, how long, what
//! follows, and what they contain.
#![no_main]

use egress_agent::gate::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|recipe: &[u8]| fuzzing::reassemble(recipe));
