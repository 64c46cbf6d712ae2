//! A laboratory of network namespaces.
