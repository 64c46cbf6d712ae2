//! What a DNS message says.

pub mod name;

pub use name::Name;
