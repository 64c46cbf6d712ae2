//! A plain evaluation of the rules, entry by entry and without bitmaps, and the check that the compiled
//! form gives the same results.

mod ordered;
mod plain;
mod properties;
mod random;
mod teams;

use std::sync::Arc;

use super::{InternalAnswers, Mode, PodAnnotations, Prefix, Settings, Translators};
use egress_dns::Name;

/// The agent's default settings.
pub(super) fn settings() -> Settings {
    Settings {
        default_mode: Mode::Off,
        pod_annotations: PodAnnotations::Grant,
        cluster_domain: Name::from_labels([b"cluster".as_slice(), b"local"]).unwrap(),
        guard: true,
        allow_internal: true,
        internal_answers: Arc::new(InternalAnswers::Names(Vec::new())),
        protected: ["169.254.0.0/16", "127.0.0.0/8"]
            .map(|text| Prefix::parse(text).unwrap())
            .into(),
        translators: Translators::well_known(),
    }
}
