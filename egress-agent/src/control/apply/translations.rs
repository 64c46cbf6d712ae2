//! Ends connections that the node still translates to what a Service has lost.
//!
//! A node goes on translating the connections that it knows. A connection to a denied endpoint that was cut would go on
//! when the Service is judged without this endpoint. So the node has to forget it before.

use std::{
    collections::HashSet,
    io,
    time::{Duration, Instant},
};

use egress_common::{address::Address, protocol};
use egress_policy::{
    Mode,
    prefix::to_mapped,
    services::{Addresses, Transport},
};

use super::Applier;
use crate::{
    control::{
        pace::Pace,
        plan::wanted::Wanted,
        publish::problems::{About, Problems},
        settings::{Over, Settings},
    },
    host::{Translated, forget_translated},
};

/// The table is read once in this time at most: it may be large, and others decide how often Services change.
const EVERY: Duration = Duration::from_secs(10);

/// How often [`Applier::end_translations`] may read the table.
pub(super) fn pace() -> Pace {
    Pace::new(EVERY, 1, Instant::now().into())
}

/// Connections of pods to addresses of a Service, or to a resolver.
struct Ending {
    pods: HashSet<Address>,
    to: Addresses,
}

impl Ending {
    fn concerns(&self, connection: &Translated) -> bool {
        let transport = match connection.protocol {
            protocol::TCP => Transport::Tcp,
            protocol::UDP => Transport::Udp,
            protocol::SCTP => Transport::Sctp,
            _ => return false,
        };
        self.pods.contains(&to_mapped(connection.from)) && self.to.contain(transport, connection.to)
    }
}

impl Applier {
    /// Lets the node forget the connections because of which what is over still counts. If that fails, it counts on.
    pub(in crate::control) async fn end_translations(
        &mut self,
        settings: &mut Settings,
    ) -> Problems {
        let mut problems = Problems::default();
        let now = Instant::now();
        let over = settings.over(now);
        if over.services.is_empty() && over.resolvers.is_empty() {
            return problems;
        }
        let endings = self.endings(settings, &over);
        if !endings.is_empty() {
            if self.translations_read.take(now.into()).is_err() {
                return problems;
            }
            let forgotten = tokio::task::spawn_blocking(move || {
                forget_translated(|to| endings.iter().any(|ending| ending.concerns(to)))
            });
            match forgotten
                .await
                .unwrap_or_else(|error| Err(io::Error::other(error)))
            {
                Ok(0) => {}
                Ok(connections) => tracing::info!(
                    connections,
                    "the node has forgotten connections to what Services have lost"
                ),
                Err(error) => {
                    let what = "cannot end connections to what Services have lost, so it counts on";
                    let about = About::node("connection tracking");
                    problems.set(about, format!("{what}: {error}"));
                    return problems;
                }
            }
        }
        settings.forget(&over, now);
        problems
    }

    fn endings(&self, settings: &Settings, over: &Over) -> Vec<Ending> {
        let services = over.services.iter().map(|name| Ending {
            pods: self.addresses_of(|wanted| wanted.compiled.denies_service(name)),
            to: settings.losses.addresses(name),
        });
        let resolvers = over.resolvers.iter().map(|resolver| Ending {
            pods: self.addresses_of(|_| true),
            to: Addresses::of_resolver(resolver),
        });
        let endings = services.chain(resolvers);
        endings.filter(|ending| !ending.pods.is_empty()).collect()
    }

    /// The addresses of the enforced pods that are `chosen`.
    fn addresses_of(&self, chosen: impl Fn(&Wanted) -> bool) -> HashSet<Address> {
        let wanted = self.enforced.values().map(|enforced| &*enforced.wanted);
        wanted
            .filter(|wanted| wanted.compiled.mode == Mode::Enforce && chosen(wanted))
            .flat_map(Wanted::own)
            .copied()
            .collect()
    }
}
