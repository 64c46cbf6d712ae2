//! Pods of a cluster, with a real API server.

mod addresses;
mod conformance;
mod edited_services;
mod large_services;
mod lost_endpoints;
mod manifests;
mod peers;
mod pods;
mod policies;
mod reports;
mod rights;
mod services;
mod source;
mod status;
mod translated;
mod unknown_pods;
