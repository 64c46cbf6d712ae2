//! DNS: which queries a pod may send, and which addresses the responses allow.

mod agent_down;
mod answers;
mod autopath;
mod clients;
mod dnssec;
mod elsewhere;
mod fragments;
mod guard;
mod hostile_answers;
mod hostile_tcp;
mod internal_answers;
mod learned_in_kernel;
mod lifetimes;
mod lossy_link;
mod moved_interface;
mod multipath_tcp;
mod names;
mod over_tcp;
mod real_resolvers;
mod resolver_libraries;
mod resolver_ports;
mod resolvers;
mod silent_programs;
mod slow_receivers;
mod tcp_goes_on;
mod translated_addresses;
