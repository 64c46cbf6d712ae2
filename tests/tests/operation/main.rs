//! Running an agent: start, end, restart, upgrade, and a machine that is not as it should be.

mod bad_input;
mod blocked_output;
mod lifecycle;
mod machine;
mod outdated_state;
mod quiet;
mod restart_judges_again;
mod restart_keeps_names;
mod standby;
mod start_gate;
mod takeover;
