//! Resolvers, and how their responses are handled: `dns`.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

use egress_common::{limits::DNS_PORTS, protocol::DNS_PORT};
use serde::{Deserialize, Deserializer, de::Error as _};
use serde_saphyr::Spanned;

use super::{
    ConfigError, Place,
    read::{self, Word},
    written::{Written, list, list_or, value},
};
use egress_dns::Name;
use egress_policy::{Autopath, InternalAnswers, Resolver, exact_name, name_pattern};

/// Most names that may lead to internal addresses: each response is compared with all of them.
const INTERNAL_ANSWERS: usize = 256;

/// Resolvers, and how their responses are handled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dns {
    /// The resolvers that pods may ask, besides those that the cluster names. Without a cluster there is at
    /// least one (see [`super::Config::check_resolvers`]).
    pub resolvers: Vec<Resolver>,
    /// Pods may always query names at or below it.
    pub cluster_domain: Name,
    /// A shorter TTL counts as this.
    pub min_ttl: Duration,
    /// A longer TTL counts as this.
    pub max_ttl: Duration,
    /// How long an address is allowed beyond its TTL.
    pub grace: Duration,
    /// Which names may lead to internal addresses, besides those of the cluster.
    pub internal_answers: Arc<InternalAnswers>,
    /// Whether queries for names that no entry could allow are refused.
    pub guard: bool,
    /// Whether resolvers walk search lists.
    pub autopath: Autopath,
    /// The response to a refused query.
    pub refusal: Refusal,
    /// Who reads the responses to names that are decided.
    pub learn: Learn,
}

/// Who reads the responses to names that the agent has decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learn {
    /// The agent, all of them.
    Agent,
    /// The programs in the kernel, those that are plain.
    Kernel,
}

impl Word for Learn {
    const WORDS: &'static [(&'static str, Self)] =
        &[("agent", Self::Agent), ("kernel", Self::Kernel)];
}

/// The response to a refused query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// NXDOMAIN: search lists go on to the next name, on glibc and musl alike.
    NxDomain,
    /// REFUSED.
    Refused,
}

impl Word for Refusal {
    const WORDS: &'static [(&'static str, Self)] =
        &[("nxdomain", Self::NxDomain), ("refused", Self::Refused)];
}

impl Word for Autopath {
    const WORDS: &'static [(&'static str, Self)] =
        &[("auto", Self::Auto), ("on", Self::On), ("off", Self::Off)];
}

impl Dns {
    /// Adds resolvers. Returns those that cannot be added, because resolvers would be asked on too many ports.
    pub fn add_resolvers(&mut self, more: impl IntoIterator<Item = Resolver>) -> Vec<Resolver> {
        let mut ports: BTreeSet<u16> = self.resolvers.iter().map(|known| known.port).collect();
        let mut left_out = Vec::new();
        let mut more: Vec<Resolver> = more.into_iter().collect();
        // The usual port comes before others.
        more.sort_by_key(|resolver| resolver.port != DNS_PORT);
        for resolver in more {
            if ports.len() >= DNS_PORTS && !ports.contains(&resolver.port) {
                left_out.push(resolver);
            } else {
                ports.insert(resolver.port);
                self.resolvers.push(resolver);
            }
        }
        self.resolvers.sort_unstable();
        self.resolvers.dedup();
        left_out
    }
}

/// The section as it is written. The TTLs keep their places, because an error can be in the two together.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Section {
    #[serde(deserialize_with = "resolvers")]
    resolvers: Vec<Resolver>,
    #[serde(deserialize_with = "domain")]
    cluster_domain: Name,
    #[serde(deserialize_with = "ttl")]
    min_ttl: Option<Ttl>,
    #[serde(deserialize_with = "ttl")]
    max_ttl: Option<Ttl>,
    #[serde(deserialize_with = "grace")]
    grace: Duration,
    #[serde(deserialize_with = "internal_answers")]
    internal_answers: InternalAnswers,
    #[serde(deserialize_with = "read::boolean")]
    guard: bool,
    #[serde(deserialize_with = "read::word")]
    autopath: Autopath,
    #[serde(deserialize_with = "read::word")]
    refusal: Refusal,
    #[serde(deserialize_with = "read::word")]
    learn: Learn,
}

struct Ttl {
    written: Written,
    place: Place,
    duration: Duration,
}

impl Default for Section {
    fn default() -> Self {
        Self {
            resolvers: Vec::new(),
            cluster_domain: exact_name("cluster.local").expect("the default is a name"),
            min_ttl: None,
            max_ttl: None,
            grace: Duration::from_secs(30),
            internal_answers: InternalAnswers::Names(Vec::new()),
            guard: true,
            autopath: Autopath::Auto,
            refusal: Refusal::NxDomain,
            learn: Learn::Kernel,
        }
    }
}

impl TryFrom<Section> for Dns {
    type Error = ConfigError;

    fn try_from(section: Section) -> Result<Self, ConfigError> {
        let or = |ttl: &Option<Ttl>, default| ttl.as_ref().map_or(default, |ttl| ttl.duration);
        let min_ttl = or(&section.min_ttl, Duration::from_secs(60));
        let max_ttl = or(&section.max_ttl, Duration::from_secs(24 * 3600));
        if min_ttl > max_ttl {
            let (key, ttl) = match (section.min_ttl, section.max_ttl) {
                (Some(min), _) => ("dns.minTtl", min),
                (None, Some(max)) => ("dns.maxTtl", max),
                (None, None) => unreachable!("the defaults are in order"),
            };
            return Err(ConfigError::Value {
                key: key.to_owned(),
                place: ttl.place,
                message: format!(
                    "{} makes dns.minTtl ({} s) longer than dns.maxTtl ({} s)",
                    ttl.written,
                    min_ttl.as_secs(),
                    max_ttl.as_secs()
                ),
            });
        }
        Ok(Self {
            resolvers: section.resolvers,
            cluster_domain: section.cluster_domain,
            min_ttl,
            max_ttl,
            grace: section.grace,
            internal_answers: Arc::new(section.internal_answers),
            guard: section.guard,
            autopath: section.autopath,
            refusal: section.refusal,
            learn: section.learn,
        })
    }
}

fn resolvers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Resolver>, D::Error> {
    let mut ports = BTreeSet::new();
    let mut resolvers = list(deserializer, |written| {
        let resolver = resolver(written)?;
        ports.insert(resolver.port);
        if ports.len() > DNS_PORTS {
            return Err(format!(
                "is one port too many: resolvers can be asked on {DNS_PORTS} different ports"
            ));
        }
        Ok(resolver)
    })?;
    resolvers.sort_unstable();
    resolvers.dedup();
    Ok(resolvers)
}

fn resolver(written: &Written) -> Result<Resolver, String> {
    let Ok(resolver) = written.text()?.parse::<Resolver>() else {
        return Err(
            "is not an IP address: expected one, alone or with a port, such as 10.1.0.2:5353 or \
             '[fd00::1]:5353', and no name"
                .into(),
        );
    };
    let problem = match resolver.address {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            "is an IPv4-mapped IPv6 address: write the IPv4 address"
        }
        address if address.is_unspecified() || address.is_multicast() => {
            "is not the address of a machine"
        }
        address if address.is_loopback() => {
            "is a loopback address, which is each pod's own: expected the address that the pods' \
             resolv.conf has"
        }
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            "is a link-local address, which pods cannot ask from their own addresses: expected one that is \
             routed"
        }
        _ => return Ok(resolver),
    };
    Err(problem.into())
}

fn domain<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Name, D::Error> {
    value(deserializer, |written| exact_name(written.text()?))
}

fn grace<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    value(deserializer, read::duration)
}

fn ttl<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Ttl>, D::Error> {
    let Spanned {
        value: written,
        referenced,
        ..
    } = Spanned::<Written>::deserialize(deserializer)?;
    match read::duration(&written) {
        Ok(duration) => Ok(Some(Ttl {
            written,
            place: referenced.into(),
            duration,
        })),
        Err(problem) => Err(D::Error::custom(format_args!("{written} {problem}"))),
    }
}

/// `all`, or names and wildcards.
fn internal_answers<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<InternalAnswers, D::Error> {
    let mut all = false;
    let mut count = 0;
    let mut patterns = list_or(
        deserializer,
        |written| {
            count += 1;
            if count > INTERNAL_ANSWERS {
                return Err(format!(
                    "is one name too many: the limit is {INTERNAL_ANSWERS}"
                ));
            }
            name_pattern(written.text()?)
        },
        |written| {
            if matches!(written, Written::Text(text) if text == "all") {
                all = true;
                return Ok(Vec::new());
            }
            Err("is not a list: expected `all`, or a list of names such as [corp.example, '*.corp.example']".into())
        },
    )?;
    if all {
        return Ok(InternalAnswers::All);
    }
    patterns.sort_unstable();
    patterns.dedup();
    Ok(InternalAnswers::Names(patterns))
}
