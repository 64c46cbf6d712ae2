//! Running an agent: start, end, restart, upgrade, and machines that lack something.

mod bad_input;
mod blocked_output;
mod checking;
mod command_output;
mod importing;
mod lifecycle;
mod machine;
mod many_ranges;
mod outdated_state;
mod quiet;
mod restart_judges_again;
mod restart_keeps_names;
mod standby;
mod start_gate;
mod start_without_facts;
mod start_without_objects;
mod takeover;
