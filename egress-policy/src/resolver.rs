//! The address and port of a resolver.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use egress_common::protocol::DNS_PORT;
use serde::{Deserialize, Serialize};

/// An address and a port to which pods may send queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Resolver {
    /// The address.
    pub address: IpAddr,
    /// The port, for UDP and TCP.
    pub port: u16,
}

impl From<IpAddr> for Resolver {
    fn from(address: IpAddr) -> Self {
        Self {
            address,
            port: DNS_PORT,
        }
    }
}

/// The error for a text that is not a resolver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is not the address of a resolver")]
pub struct NotAResolver;

impl From<Resolver> for String {
    fn from(resolver: Resolver) -> Self {
        resolver.to_string()
    }
}

impl TryFrom<String> for Resolver {
    type Error = NotAResolver;

    fn try_from(text: String) -> Result<Self, NotAResolver> {
        text.parse()
    }
}

/// An address alone means [`DNS_PORT`]; with another port it is `10.1.0.2:5353` or `[fd00::1]:5353`.
impl FromStr for Resolver {
    type Err = NotAResolver;

    fn from_str(text: &str) -> Result<Self, NotAResolver> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(address.into());
        }
        match text.parse::<SocketAddr>() {
            Ok(SocketAddr::V6(v6)) if v6.scope_id() != 0 => Err(NotAResolver),
            Ok(at) if at.port() != 0 => Ok(Self {
                address: at.ip(),
                port: at.port(),
            }),
            _ => Err(NotAResolver),
        }
    }
}

impl fmt::Display for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.port == DNS_PORT {
            write!(f, "{}", self.address)
        } else {
            write!(f, "{}", SocketAddr::new(self.address, self.port))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolver_is_read_back_as_it_was_written() {
        for text in ["10.1.0.2", "fd00::1", "10.1.0.2:5353", "[fd00::1]:5353"] {
            let read: Resolver = text.parse().unwrap();
            assert_eq!(read.to_string(), text);
        }
        let plain: Resolver = "[fd00::1]:53".parse().unwrap();
        assert_eq!(plain.to_string(), "fd00::1");
        for text in [
            "",
            "a.test",
            "10.1.0.2:0",
            "10.1.0.2:70000",
            "fd00::1:x",
            "[fe80::1%1]:53",
        ] {
            assert_eq!(text.parse::<Resolver>(), Err(NotAResolver), "{text}");
        }
    }
}
