//! Hand-made packets of a pod, and their effect on the node and on other pods.

mod dhcp;
mod floods;
mod hardware_addresses;
mod kinds;
mod late_checksums;
mod link_layer;
mod looped_back;
mod neighbours;
mod packet_lists;
mod protocols;
mod shared_pages;
mod spoofing;
mod stamps;
mod tunnels;
