//! Judges the connections that the node translates by where they lead.
//!
//! The node knows connections that are older than what the agent knows of the Services: from before an edit that the agent
//! has read late, from before an endpoint was taken out of a Service, or from an edit that was undone before the agent has
//! seen it. The node goes on translating them. So the agent reads them from the node's connection tracking every ten
//! seconds, and makes the node forget those to endpoints that the pod's policy denies.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    io,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::Result;
use egress_common::{address::Address, ids::PolicyId, records::RANGE_NODE};
use egress_policy::{
    Compiled, Mode, Resolver,
    prefix::to_mapped,
    services::{Connections, Learned, Led, Through, Transport},
};

use super::{Applier, enforced::Enforced};
use crate::{
    control::{
        observe::policies::Policies,
        publish::problems::{About, Problems},
        settings::Settings,
    },
    datapath::{View, boottime_ns},
    host::{Translated, forget_translated, translated},
    report::Subject,
};

/// How often the table is read at most.
const EVERY: Duration = Duration::from_secs(10);
/// The pause after it was read, in multiples of the time that this has taken: the table may be large.
const PAUSE: u32 = 50;
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(60);

/// The last time that the connections were judged.
pub(super) struct Judged {
    /// When it is due again.
    due: Instant,
    /// When it is due again if there are other pods in mode `enforce`.
    due_for_others: Instant,
    /// The pods in mode `enforce` then.
    pods: HashSet<Subject>,
    /// The connections of pods in any mode that went through addresses of Services.
    through: Through,
    /// Why it failed.
    problem: Option<String>,
}

impl Judged {
    /// Not yet.
    pub(super) fn never() -> Self {
        Self {
            due: Instant::now(),
            due_for_others: Instant::now(),
            pods: HashSet::new(),
            through: Through::default(),
            problem: None,
        }
    }
}

impl Enforced {
    fn is_enforcing(&self) -> bool {
        self.wanted.compiled.mode == Mode::Enforce
    }
}

impl Applier {
    /// Makes the node forget translated connections of pods to endpoints that their policies deny. After that, what
    /// Services have lost for long enough counts no more; if it fails, it counts on.
    pub(in crate::control) async fn judge_translations(
        &mut self,
        settings: &mut Settings,
        policies: &Policies,
    ) -> Problems {
        let began = Instant::now();
        // A pod that has just begun to be enforced may have connections from before.
        let is_due = began >= self.translations.due
            || began >= self.translations.due_for_others
                && self
                    .enforcing()
                    .any(|(subject, _)| !self.translations.pods.contains(subject));
        if is_due {
            let unclaimed = settings.unclaimed(began);
            let mut through = std::mem::take(&mut self.translations.through);
            let ending = self.end_denied(settings, policies, &unclaimed, &mut through);
            let done = ending.await;
            if done.is_ok() {
                settings.forget(&unclaimed, began);
            }
            let pause = (began.elapsed() * PAUSE).min(LONGEST);
            self.translations = Judged {
                due: Instant::now() + pause.max(EVERY),
                due_for_others: Instant::now() + pause,
                pods: self
                    .enforcing()
                    .map(|(subject, _)| subject.clone())
                    .collect(),
                through,
                problem: done.err().map(|error| format!("{error:#}")),
            };
        }
        let mut problems = Problems::default();
        if let Some(error) = &self.translations.problem {
            let what = "cannot end connections to endpoints of Services that policies deny";
            let about = About::node("connection tracking");
            problems.set(about, format!("{what}: {error}"));
        }
        problems
    }

    async fn end_denied(
        &self,
        settings: &Settings,
        policies: &Policies,
        unclaimed: &[Resolver],
        through: &mut Through,
    ) -> Result<()> {
        if policies.services().are_none() && unclaimed.is_empty() && through.is_empty() {
            return Ok(());
        }
        let pods = self.pods_by_address();
        if pods.is_empty() {
            return Ok(());
        }
        let addresses: HashSet<Address> = pods.keys().copied().collect();
        let connections =
            in_background(move || translated(|from| addresses.contains(&to_mapped(from))));
        let connections = connections.await?;
        let mut of_pods: HashMap<&Subject, Vec<(Translated, Led)>> = HashMap::new();
        for connection in connections {
            let subject = pods.get(&to_mapped(connection.from));
            if let (Some(subject), Some(led)) = (subject, led(&connection)) {
                of_pods.entry(subject).or_default().push((connection, led));
            }
        }
        let present = of_pods.values().flatten().map(|(_, led)| *led);
        let judge = Connections::new(policies.services(), through, present);
        let view = self.datapath.view()?;
        let mut denied: BTreeSet<Translated> = BTreeSet::new();
        let mut ended: Vec<Led> = Vec::new();
        for (subject, connections) in of_pods {
            let enforced = self.enforced.get(subject);
            let enforcing = enforced.filter(|enforced| enforced.is_enforcing());
            let Some(enforced) = enforcing else {
                continue;
            };
            let compiled = &enforced.wanted.compiled;
            let mut judged = Vec::new();
            for (_, led) in &connections {
                let learned = learned(&view, enforced.policy, led.to.ip())?;
                judged.push((*led, without_services(learned, compiled)));
            }
            let of_pod: HashSet<Led> = judge
                .denied(compiled.without_services(), judged.into_iter())
                .into_iter()
                .collect();
            for (connection, led) in &connections {
                let is_denied = of_pod.contains(led)
                    || is_elsewhere(led, unclaimed, settings)
                    || judge.leads_elsewhere(led, &settings.config.dns.resolvers)
                        && !is_of_node(&view, enforced.policy, led.endpoint.ip())?;
                if is_denied {
                    denied.insert(*connection);
                    ended.push(*led);
                }
            }
        }
        *through = judge.into_through();
        if denied.is_empty() {
            return Ok(());
        }
        let forgotten = in_background(move || forget_translated(&denied)).await?;
        for led in &ended {
            through.forget(led);
        }
        tracing::warn!(
            connections = forgotten,
            "ended connections that the node led to endpoints which the pods' policies deny"
        );
        Ok(())
    }

    /// The pods in mode `enforce`.
    fn enforcing(&self) -> impl Iterator<Item = (&Subject, &Enforced)> {
        let enforced = self.enforced.iter();
        enforced.filter(|(_, enforced)| enforced.is_enforcing())
    }

    /// The pods by their addresses, in any mode: one may be enforced later.
    fn pods_by_address(&self) -> HashMap<Address, Subject> {
        self.enforced
            .iter()
            .flat_map(|(subject, enforced)| {
                let own = enforced.wanted.own().iter();
                own.map(move |address| (*address, subject.clone()))
            })
            .collect()
    }
}

fn led(connection: &Translated) -> Option<Led> {
    let canonical = |at: SocketAddr| SocketAddr::new(at.ip().to_canonical(), at.port());
    Some(Led {
        from: connection.from.to_canonical(),
        transport: Transport::of_protocol(connection.protocol)?,
        to: canonical(connection.to),
        endpoint: canonical(connection.endpoint),
    })
}

/// The classes of names that a pod has resolved to an address, expired or not: open connections stay.
fn learned(view: &View, policy: PolicyId, address: IpAddr) -> Result<Learned> {
    let Some(record) = view.policy(policy)? else {
        return Ok(Learned::default());
    };
    let (destination, _) =
        view.destination((policy, &record), &to_mapped(address), boottime_ns())?;
    Ok(Learned {
        all: destination.learned,
        internal: destination.learned_internal,
    })
}

/// Whether the node itself receives packets to this address. What answers there is trusted, such as a DNS cache of the
/// node.
fn is_of_node(view: &View, policy: PolicyId, address: IpAddr) -> Result<bool> {
    let Some(record) = view.policy(policy)? else {
        return Ok(false);
    };
    let (destination, _) =
        view.destination((policy, &record), &to_mapped(address), boottime_ns())?;
    Ok(destination.ranges & RANGE_NODE != 0)
}

/// The same classes in the policy without its rules for Services.
fn without_services(learned: Learned, policy: &Compiled) -> Learned {
    Learned {
        all: policy.classes_without_services(learned.all),
        internal: policy.classes_without_services(learned.internal),
    }
}

/// Whether the node leads queries to a resolver that is claimed no more to another server.
fn is_elsewhere(led: &Led, unclaimed: &[Resolver], settings: &Settings) -> bool {
    let of = |at: SocketAddr| Resolver {
        address: at.ip(),
        port: at.port(),
    };
    led.transport != Transport::Sctp
        && unclaimed.contains(&of(led.to))
        && !settings.config.dns.resolvers.contains(&of(led.endpoint))
}

/// Runs this on a thread that may wait.
async fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(io::Error::other(error)))
}
