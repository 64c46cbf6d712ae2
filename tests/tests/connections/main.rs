//! Connections: who opened them, and how long they go on.

mod called_back;
mod callers;
mod existing;
mod flow_limits;
mod forged_inbound;
mod inbound;
mod joined_handshakes;
mod later_interface;
mod pod_sockets;
mod trusted;
