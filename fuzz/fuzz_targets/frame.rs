//! No frame makes the gate panic, whatever it is.
#![no_main]

use egress_agent::gate::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|frame: &[u8]| fuzzing::treat(frame));
