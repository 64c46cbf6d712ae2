//! A summary of a denial for people.

use std::fmt;

use super::{
    Denied,
    line::{ip, protocol_name},
};

/// The denied attempt of a pod: `tcp to 140.82.121.3:443 (github.com)`, `query for example.org (A)`.
#[derive(Clone, Copy, Debug)]
pub struct Summary<'a>(pub &'a Denied);

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let denied = self.0;
        if let Some((name, record_type)) = &denied.dns {
            return write!(f, "query for {name} ({record_type})");
        }
        match denied.protocol {
            Some(protocol) => f.write_str(&protocol_name(protocol))?,
            None => return f.write_str("a packet that cannot be parsed"),
        }
        if let Some(end) = denied.dst {
            let address = ip(end.address);
            match end.port {
                Some(port) if denied.icmp.is_none() => {
                    write!(f, " to {}", std::net::SocketAddr::new(address, port))?;
                }
                _ => write!(f, " to {address}")?,
            }
        }
        if !denied.dst_names.is_empty() {
            write!(f, " ({})", denied.dst_names.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use egress_common::protocol;

    use super::*;
    use crate::report::line::tests::denied;

    #[test]
    fn a_summary_names_protocol_destination_and_names() {
        let tcp = denied();
        assert_eq!(
            Summary(&tcp).to_string(),
            "tcp to 140.82.121.3:443 (github.com)"
        );
        let icmp = Denied {
            protocol: Some(protocol::ICMP),
            icmp: Some((8, 0)),
            dst_names: Vec::new(),
            ..denied()
        };
        assert_eq!(Summary(&icmp).to_string(), "icmp to 140.82.121.3");
        let question = Denied {
            dns: Some(("evil.example".into(), "TXT".into())),
            ..denied()
        };
        assert_eq!(
            Summary(&question).to_string(),
            "query for evil.example (TXT)"
        );
        let unreadable = Denied {
            protocol: None,
            dst: None,
            ..denied()
        };
        assert_eq!(
            Summary(&unreadable).to_string(),
            "a packet that cannot be parsed"
        );
    }
}
