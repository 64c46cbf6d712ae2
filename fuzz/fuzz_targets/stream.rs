//! What a side of a connection with a resolver reads is what was decided, whatever the two send.
#![no_main]

use egress_agent::gate::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|recipe: &[u8]| fuzzing::follow(recipe));
