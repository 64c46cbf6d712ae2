//! The denial lines.

use std::{
    borrow::Cow,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use egress_common::{address::Address, protocol};
use jiff::Timestamp;
use serde::{
    Serialize, Serializer,
    ser::{Error, SerializeMap},
};

use super::{DecidedBy, Denied, PodIdentity, Verdict};

/// A line on standard output, serialised as a JSON object.
#[derive(Clone, Debug)]
pub enum Line {
    /// A series of equal denials: `denied` or `would_deny`.
    Denied {
        /// The first of them.
        first: Denied,
        /// How many packets.
        count: u64,
        /// How many flows these packets belong to, without those that an earlier line of the series has
        /// counted.
        connections: u64,
        /// When the last denial happened.
        last: SystemTime,
    },
    /// Denials without a line of their own: `denials_lost`.
    Lost {
        /// The pod; `None` if it is unknown.
        pod: Option<Arc<PodIdentity>>,
        /// How many packets.
        count: u64,
        /// Why they have no line.
        why: &'static str,
        /// When the first denial was lost.
        time: SystemTime,
    },
}

impl Line {
    /// How many denied packets the line represents.
    pub fn count(&self) -> u64 {
        match self {
            Self::Denied { count, .. } | Self::Lost { count, .. } => *count,
        }
    }

    /// The pod it is about.
    #[cfg(test)]
    pub(crate) fn pod(&self) -> Option<&Arc<PodIdentity>> {
        match self {
            Self::Denied { first, .. } => Some(&first.pod),
            Self::Lost { pod, .. } => pod.as_ref(),
        }
    }
}

impl Serialize for Line {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Denied {
                first,
                count,
                connections,
                last,
            } => serialize_denied(serializer, first, [*count, *connections], *last),
            Self::Lost {
                pod,
                count,
                why,
                time,
            } => {
                let mut map = serializer.serialize_map(None)?;
                map.serialize_entry("time", &rfc3339(*time).map_err(S::Error::custom)?)?;
                map.serialize_entry("event", "denials_lost")?;
                serialize_pod(&mut map, pod.as_deref())?;
                map.serialize_entry("count", count)?;
                map.serialize_entry("why", why)?;
                map.end()
            }
        }
    }
}

fn serialize_denied<S: Serializer>(
    serializer: S,
    denied: &Denied,
    [count, connections]: [u64; 2],
    last: SystemTime,
) -> Result<S::Ok, S::Error> {
    let first = rfc3339(denied.time).map_err(S::Error::custom)?;
    let last = rfc3339(last).map_err(S::Error::custom)?;
    let event = match denied.verdict {
        Verdict::Dropped | Verdict::Rejected => "denied",
        Verdict::Audited => "would_deny",
    };
    let mut map = serializer.serialize_map(None)?;
    map.serialize_entry("time", &first)?;
    map.serialize_entry("event", event)?;
    map.serialize_entry("verdict", denied.verdict.as_str())?;
    map.serialize_entry("reason", denied.reason.as_str())?;
    serialize_pod(&mut map, Some(&denied.pod))?;
    map.serialize_entry("protocol", &denied.protocol.map(protocol_name))?;
    map.serialize_entry("src_ip", &denied.src.map(|end| ip(end.address)))?;
    let with_ports = denied.icmp.is_none();
    if let Some(port) = denied.src.and_then(|end| end.port).filter(|_| with_ports) {
        map.serialize_entry("src_port", &port)?;
    }
    map.serialize_entry("dst_ip", &denied.dst.map(|end| ip(end.address)))?;
    if let Some((icmp_type, icmp_code)) = denied.icmp {
        map.serialize_entry("icmp_type", &icmp_type)?;
        map.serialize_entry("icmp_code", &icmp_code)?;
    }
    if let Some((name, record_type)) = &denied.dns {
        map.serialize_entry("dns_name", name)?;
        map.serialize_entry("dns_type", record_type)?;
    } else if let Some(port) = denied.dst.and_then(|end| end.port).filter(|_| with_ports) {
        map.serialize_entry("dst_port", &port)?;
    }
    map.serialize_entry("dst_names", &denied.dst_names)?;
    let rule = denied.rule.as_ref();
    map.serialize_entry("rule", &rule.map(|rule| &rule.text))?;
    map.serialize_entry("policy", &DecidedBy::of(denied))?;
    map.serialize_entry("closed_by", &DecidedBy::closers(denied))?;
    map.serialize_entry("count", &count)?;
    map.serialize_entry("connections", &connections)?;
    map.serialize_entry("first", &first)?;
    map.serialize_entry("last", &last)?;
    map.end()
}

fn serialize_pod<M: SerializeMap>(map: &mut M, pod: Option<&PodIdentity>) -> Result<(), M::Error> {
    map.serialize_entry("node", &pod.map(|pod| &pod.node))?;
    map.serialize_entry("namespace", &pod.map(|pod| &pod.namespace))?;
    map.serialize_entry("pod", &pod.map(|pod| &pod.name))?;
    map.serialize_entry("uid", &pod.map(|pod| &pod.uid))
}

/// The protocol's name, or its number.
pub(super) fn protocol_name(number: u8) -> Cow<'static, str> {
    Cow::Borrowed(match number {
        protocol::TCP => "tcp",
        protocol::UDP => "udp",
        protocol::SCTP => "sctp",
        protocol::ICMP => "icmp",
        protocol::ICMPV6 => "icmpv6",
        other => return Cow::Owned(other.to_string()),
    })
}

/// The address in its usual form: IPv4-mapped addresses as IPv4.
pub(super) fn ip(address: Address) -> IpAddr {
    Ipv6Addr::from(address).to_canonical()
}

/// UTC with milliseconds (RFC 3339).
///
/// # Errors
///
/// When the time is beyond the year 9999.
pub fn rfc3339(time: SystemTime) -> Result<String, jiff::Error> {
    // A clock before 1970 is wrong anyway, so print 1970.
    let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let millis = i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX);
    Ok(format!("{:.3}", Timestamp::from_millisecond(millis)?))
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use egress_common::{address::from_v4, reason::Reason};

    use super::*;
    use crate::report::Endpoint;
    use egress_policy::{Closer, EntrySource, Origin, annotations::At};

    /// 2026-11-20T10:11:12.345Z
    pub(in crate::report) fn wall(millis: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(1_795_169_472_345 + millis)
    }

    pub(in crate::report) fn denied() -> Denied {
        Denied {
            pod: Arc::new(PodIdentity::new("n1", "shop", "cart-7d9f", "u-1")),
            verdict: Verdict::Dropped,
            reason: Reason::NoRule,
            protocol: Some(protocol::TCP),
            src: Some(Endpoint {
                address: from_v4([10, 1, 2, 3]),
                port: Some(41234),
            }),
            dst: Some(Endpoint {
                address: from_v4([140, 82, 121, 3]),
                port: Some(443),
            }),
            icmp: None,
            dns: None,
            dst_names: vec!["github.com".into()],
            rule: None,
            closed_by: Arc::default(),
            time: wall(0),
            count: 1,
        }
    }

    fn json(first: Denied) -> String {
        serde_json::to_string(&Line::Denied {
            first,
            count: 3,
            connections: 2,
            last: wall(1655),
        })
        .unwrap()
    }

    #[test]
    fn a_denied_packet_is_printed_with_all_fields() {
        assert_eq!(
            json(denied()),
            concat!(
                r#"{"time":"2026-11-20T10:11:12.345Z","event":"denied","verdict":"dropped","#,
                r#""reason":"no_rule","node":"n1","namespace":"shop","pod":"cart-7d9f","#,
                r#""uid":"u-1","protocol":"tcp","src_ip":"10.1.2.3","src_port":41234,"#,
                r#""dst_ip":"140.82.121.3","dst_port":443,"dst_names":["github.com"],"#,
                r#""rule":null,"policy":null,"closed_by":[],"count":3,"connections":2,"first":"2026-11-20T10:11:12.345Z","#,
                r#""last":"2026-11-20T10:11:14.000Z"}"#
            )
        );
    }

    #[test]
    fn a_denied_query_has_its_name_in_place_of_the_port() {
        let question = Denied {
            protocol: Some(protocol::UDP),
            reason: Reason::DnsName,
            dst: Some(Endpoint {
                address: from_v4([10, 0, 0, 53]),
                port: Some(53),
            }),
            dns: Some(("a\"b.example".into(), "TYPE65280".into())),
            dst_names: Vec::new(),
            rule: Some(EntrySource {
                text: "gist.github.com".into(),
                origin: Origin::Namespace,
                at: At::default(),
            }),
            ..denied()
        };
        let line = json(question);
        assert!(
            line.contains(concat!(
                r#""dst_ip":"10.0.0.53","dns_name":"a\"b.example","dns_type":"TYPE65280","#,
                r#""dst_names":[],"rule":"gist.github.com","policy":{"kind":"Namespace","namespace":null,"#,
                r#""name":"shop","rule":null,"entry":"gist.github.com"},"closed_by":[],"count":3"#
            )),
            "{line}"
        );
    }

    #[test]
    fn a_packet_that_no_entry_allows_is_printed_with_what_closes_the_pod() {
        let closed = Denied {
            closed_by: [Closer::Written(Origin::Namespace), Closer::DefaultMode].into(),
            ..denied()
        };
        let line = json(closed);
        assert!(
            line.contains(concat!(
                r#""rule":null,"policy":{"kind":"Namespace","namespace":null,"name":"shop","rule":null,"entry":null},"#,
                r#""closed_by":[{"kind":"Namespace","namespace":null,"name":"shop","rule":null,"entry":null},"#,
                r#"{"kind":"Configuration","namespace":null,"name":"defaultMode","rule":null,"entry":null}],"count":3"#
            )),
            "{line}"
        );
        let protected = Denied {
            reason: Reason::Protected,
            closed_by: [Closer::DefaultMode].into(),
            ..denied()
        };
        let line = json(protected);
        assert!(
            line.contains(r#""kind":"Configuration","namespace":null,"name":"ranges.protected""#),
            "{line}"
        );
        assert!(line.contains(r#""closed_by":[]"#), "{line}");
    }

    #[test]
    fn icmp_has_type_and_code_in_place_of_ports() {
        let address = "2001:db8::7".parse::<Ipv6Addr>().unwrap().octets();
        let ping = Denied {
            protocol: Some(protocol::ICMPV6),
            src: Some(Endpoint {
                address,
                port: Some(1),
            }),
            dst: Some(Endpoint {
                address,
                port: Some(2),
            }),
            icmp: Some((128, 0)),
            verdict: Verdict::Audited,
            ..denied()
        };
        let line = json(ping);
        assert!(
            line.contains(r#""event":"would_deny","verdict":"audited""#),
            "{line}"
        );
        assert!(
            line.contains(concat!(
                r#""protocol":"icmpv6","src_ip":"2001:db8::7","dst_ip":"2001:db8::7","#,
                r#""icmp_type":128,"icmp_code":0,"dst_names""#
            )),
            "{line}"
        );
    }

    #[test]
    fn fields_that_could_not_be_parsed_are_null() {
        let frame = Denied {
            protocol: None,
            src: None,
            dst: None,
            reason: Reason::Malformed,
            dst_names: Vec::new(),
            ..denied()
        };
        let line = json(frame);
        assert!(
            line.contains(r#""protocol":null,"src_ip":null,"dst_ip":null,"dst_names":[]"#),
            "{line}"
        );
    }

    #[test]
    fn a_protocol_without_a_name_has_its_number() {
        let gre = Denied {
            protocol: Some(47),
            ..denied()
        };
        assert!(json(gre).contains(r#""protocol":"47""#));
    }

    #[test]
    fn lost_denials_are_printed_with_their_cause() {
        let lost = Line::Lost {
            pod: Some(denied().pod),
            count: 7,
            why: "too_many_lines",
            time: wall(0),
        };
        assert_eq!(
            serde_json::to_string(&lost).unwrap(),
            concat!(
                r#"{"time":"2026-11-20T10:11:12.345Z","event":"denials_lost","node":"n1","#,
                r#""namespace":"shop","pod":"cart-7d9f","uid":"u-1","count":7,"#,
                r#""why":"too_many_lines"}"#
            )
        );
    }
}
