//! The file: its keys, and how an error of the YAML reader becomes one that names key, line and column.

use std::path::PathBuf;

use serde::Deserialize;
use serde_path_to_error::{Path, Segment, Track};
use serde_saphyr::{
    Location, Spanned, from_str_with_options, with_deserializer_from_str_with_options,
};

use super::{
    Cluster, ConfigError, ExistingConnections, Limits, OnDeny, Place, Quarantine, Ranges, Serve,
    UnenforcedInterfaces, WhenAgentDown, dns, read,
    written::{Written, section},
};
use egress_policy::{Mode, PodAnnotations};

/// The keys of the file, with their defaults. An error lists the known keys in this order.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct File {
    #[serde(deserialize_with = "read::some_text")]
    pub(super) node: Option<String>,
    #[serde(deserialize_with = "read::word")]
    pub(super) default_mode: Mode,
    #[serde(deserialize_with = "read::word")]
    pub(super) pod_annotations: PodAnnotations,
    #[serde(deserialize_with = "section")]
    pub(super) ranges: Ranges,
    #[serde(deserialize_with = "section")]
    pub(super) dns: dns::Section,
    #[serde(deserialize_with = "section")]
    pub(super) when_agent_down: WhenAgentDown,
    #[serde(deserialize_with = "read::word")]
    pub(super) on_deny: OnDeny,
    #[serde(deserialize_with = "read::word")]
    pub(super) unenforced_interfaces: UnenforcedInterfaces,
    #[serde(deserialize_with = "read::word")]
    pub(super) existing_connections: ExistingConnections,
    #[serde(deserialize_with = "read::absolute_path")]
    pub(super) state_dir: PathBuf,
    #[serde(deserialize_with = "read::absolute_path")]
    pub(super) bpffs: PathBuf,
    #[serde(deserialize_with = "section")]
    pub(super) limits: Limits,
    #[serde(deserialize_with = "section")]
    pub(super) cluster: Cluster,
    #[serde(deserialize_with = "section")]
    pub(super) quarantine: Quarantine,
    // `http` and `socket` are keys of the file itself.
    #[serde(deserialize_with = "read::some_socket_address")]
    pub(super) http: Option<std::net::SocketAddr>,
    #[serde(deserialize_with = "read::absolute_path")]
    pub(super) socket: PathBuf,
}

impl Default for File {
    fn default() -> Self {
        let serve = Serve::default();
        Self {
            node: None,
            default_mode: Mode::Off,
            pod_annotations: PodAnnotations::Grant,
            ranges: Ranges::default(),
            dns: dns::Section::default(),
            when_agent_down: WhenAgentDown::default(),
            on_deny: OnDeny::Drop,
            unenforced_interfaces: UnenforcedInterfaces::Report,
            existing_connections: ExistingConnections::Judge,
            state_dir: "/var/lib/egress-agent".into(),
            bpffs: "/sys/fs/bpf".into(),
            limits: Limits::default(),
            cluster: Cluster::default(),
            quarantine: Quarantine::default(),
            http: serve.http,
            socket: serve.socket,
        }
    }
}

impl File {
    pub(super) fn parse(text: &str) -> Result<Self, ConfigError> {
        // Otherwise `off` would be a boolean, as it was in YAML 1.1.
        let options = serde_saphyr::options! { strict_booleans: true };
        let mut track = Track::new();
        let read = with_deserializer_from_str_with_options(text, options.clone(), |deserializer| {
            section(serde_path_to_error::Deserializer::new(
                deserializer,
                &mut track,
            ))
        });
        read.map_err(|error| {
            let error = error.without_snippet();
            let place = error.location().or_else(|| {
                // The reader adds the place to an error of a value, but not to one of the whole document.
                let document = from_str_with_options::<Spanned<Written>>(text, options);
                document.ok().map(|document| document.referenced)
            });
            explained(error, place.map(Place::from), &track.path())
        })
    }
}

/// An error with the key at which it happened.
fn explained(error: &serde_saphyr::Error, place: Option<Place>, path: &Path) -> ConfigError {
    match (message(error), place) {
        (Some(message), Some(place)) => ConfigError::Value {
            key: key(path),
            place,
            message,
        },
        _ => ConfigError::Yaml {
            place,
            message: error.render_with_formatter(&serde_saphyr::UserMessageFormatter),
        },
    }
}

/// The error about a key or its value; `None` if the text is not YAML.
fn message(error: &serde_saphyr::Error) -> Option<String> {
    use serde_saphyr::Error;
    match error {
        // Of a value behind an anchor.
        Error::AliasError { error, .. } => message(error),
        Error::Message { msg, .. } => Some(msg.clone()),
        Error::SerdeUnknownField { expected, .. } => Some(format!(
            "is not a known key: expected one of {}",
            expected.join(", ")
        )),
        _ => None,
    }
}

/// The full key, such as `dns.minTtl`. Values of a list have the list's key.
fn key(path: &Path) -> String {
    let keys = path.iter().filter_map(|segment| match segment {
        Segment::Map { key } => Some(key.as_str()),
        _ => None,
    });
    let key = keys.collect::<Vec<_>>().join(".");
    if key.is_empty() {
        "the file".to_owned()
    } else {
        key
    }
}

impl From<Location> for Place {
    fn from(location: Location) -> Self {
        Self {
            line: location.line(),
            column: location.column(),
        }
    }
}
