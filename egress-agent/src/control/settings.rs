//! The settings of the operator and of the cluster, and both combined.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{apply::ranges, inherited_ranges::Inherited, plan::wanted::RangesVersion};
use crate::{
    config::Config,
    pods::{Facts, Snapshot},
};
use egress_policy::{
    Resolver,
    services::{Claim, Losses, Overflown, Places, ServiceName, Services},
};

/// The settings that are in force.
pub(super) struct Settings {
    /// The operator's configuration.
    pub(super) configured: Config,
    /// The facts that the cluster reported last.
    pub(super) facts: Facts,
    /// Entries that an earlier agent left in force, until the cluster has reported everything.
    pub(super) inherited: Inherited,
    /// The cluster's Services, and what these have lost lately.
    pub(super) losses: Losses,
    /// Resolvers that are not trusted, because a Service claims their address or has done so lately.
    pub(super) claims: Claims,
    /// Claims that have ended and still count, also those that no snapshot has, and on resolvers that are not configured
    /// any more.
    ended: BTreeMap<Resolver, Ended>,
    /// Whether the claims in force are not the present ones, because these could not be put in force.
    pub(super) are_claims_late: bool,
    /// All combined, as the kernel and the gate have them.
    pub(super) config: Config,
    /// The ranges that are in force.
    pub(super) ranges: RangesVersion,
    /// The kinds of addresses that `config` has.
    pub(super) places: Arc<Places>,
}

/// The end of a claim.
struct Ended {
    claim: Claim,
    since: Instant,
    /// Whether the node translates nothing any more because of it.
    is_over: bool,
}

impl Ended {
    fn new(claim: Claim, since: Instant) -> Self {
        Self {
            claim,
            since,
            is_over: false,
        }
    }
}

/// Claimed resolvers.
pub(super) type Claims = BTreeMap<Resolver, Claim>;

/// How long a claim counts after its end at least. Nodes translate to a Service's endpoints for some seconds longer than
/// the API server has it.
const CLAIMED_FOR: Duration = Duration::from_secs(60);

/// How many Services a log line names.
const NAMED: usize = 4;

impl Settings {
    /// The settings that the agent starts with. `earlier` are the Services that an earlier agent has judged by: what these
    /// have lost since then counts as lost now.
    pub(super) fn new(
        configured: Config,
        first: &Snapshot,
        inherited: Inherited,
        earlier: Arc<Services>,
    ) -> Self {
        let (facts, services) = (first.facts.clone(), &first.services);
        let config = ranges::with_facts(&configured, &facts, &inherited);
        let mut claims = earlier.claims(&config.dns.resolvers);
        claims.extend(services.claims(&config.dns.resolvers));
        let mut losses = Losses::new(earlier);
        losses.take(services, &config.places(), Instant::now());
        tell_of(&Overflown::default(), &losses.overflown());
        Self {
            ranges: RangesVersion::first(&config),
            places: Arc::new(config.places()),
            configured,
            facts,
            inherited,
            claims,
            ended: BTreeMap::new(),
            // Some may have ended since then.
            are_claims_late: true,
            losses,
            config,
        }
    }

    /// Takes the Services that the cluster reports.
    pub(super) fn take_services(&mut self, services: &Arc<Services>, now: Instant) {
        if !Arc::ptr_eq(self.losses.present(), services) {
            // The facts that came with the Services may name other resolvers than those in force.
            let mut resolvers = self.with(&self.configured).dns.resolvers;
            resolvers.extend(&self.config.dns.resolvers);
            for (resolver, claim) in services.passed_claims(&resolvers) {
                // A claim that has ended again counts anew.
                self.ended.insert(resolver, Ended::new(claim, now));
            }
        }
        let before = self.losses.overflown();
        self.losses.take(services, &self.places, now);
        tell_of(&before, &self.losses.overflown());
    }

    /// The same with another configuration of the operator.
    pub(super) fn with(&self, configured: &Config) -> Config {
        ranges::with_facts(configured, &self.facts, &self.inherited)
    }

    /// The claims on the resolvers of a configuration, with those that have ended and still count. The same again until the
    /// configuration is in force, so that a failure loses none.
    pub(super) fn claims_on(&mut self, config: &Config, now: Instant) -> Claims {
        let mut claims = self.losses.present().claims(&config.dns.resolvers);
        for (resolver, claim) in &self.claims {
            let ended = self.ended.entry(*resolver);
            ended.or_insert_with(|| Ended::new(claim.clone(), now));
        }
        self.ended
            .retain(|resolver, ended| !claims.contains_key(resolver) && !ended.is_over);
        for (resolver, ended) in &self.ended {
            if config.dns.resolvers.contains(resolver) {
                claims.insert(*resolver, ended.claim.clone());
            }
        }
        claims
    }

    /// The resolvers whose claims ended so long ago that they need not count any more.
    pub(super) fn unclaimed(&self, now: Instant) -> Vec<Resolver> {
        let is_over = |(_, ended): &(&Resolver, &Ended)| {
            !ended.is_over && now.duration_since(ended.since) >= CLAIMED_FOR
        };
        let resolvers = self.ended.iter().filter(is_over);
        resolvers.map(|(resolver, _)| *resolver).collect()
    }

    /// Lets nothing count any more that was lost or claimed, and is not so any more for long enough at this time.
    pub(super) fn forget(&mut self, unclaimed: &[Resolver], now: Instant) {
        if self.losses.are_due(now) {
            self.losses.forget(now);
        }
        for resolver in unclaimed {
            if let Some(ended) = self.ended.get_mut(resolver) {
                ended.is_over = true;
            }
        }
    }

    /// Whether claims count that have ended.
    pub(super) fn has_ended_claims(&self) -> bool {
        !self.ended.is_empty()
    }

    /// The Services that claim resolvers.
    pub(super) fn claiming(&self) -> impl Iterator<Item = &Arc<ServiceName>> {
        self.claims.values().map(|claim| &claim.service)
    }
}

/// Logs which Services have lost more now than the agent remembers.
fn tell_of(before: &Overflown, after: &Overflown) {
    let new = |before: &BTreeSet<Arc<ServiceName>>, after: &BTreeSet<Arc<ServiceName>>| {
        let new: Vec<String> = after.difference(before).map(ToString::to_string).collect();
        (!new.is_empty()).then(|| (new.len(), new[..new.len().min(NAMED)].join(", ")))
    };
    if let Some((count, first)) = new(&before.closed, &after.closed) {
        tracing::warn!(
            count,
            services = %first,
            "Services lost more ports and endpoints within a minute than the agent remembers; all packets to their \
             addresses and node ports are denied for a minute"
        );
    }
    if let Some((count, first)) = new(&before.too_large, &after.too_large) {
        tracing::warn!(
            count,
            services = %first,
            "Services have more ports and endpoints than the agent reads; all packets to their addresses and node ports \
             are denied"
        );
    }
    let addresses = (
        &before.with_forgotten_addresses,
        &after.with_forgotten_addresses,
    );
    if let Some((count, first)) = new(addresses.0, addresses.1) {
        tracing::warn!(
            count,
            services = %first,
            "Services lost more external addresses within a minute than the agent remembers; those that were lost \
             first do not deny any more"
        );
    }
}

#[cfg(test)]
mod tests {
    use egress_policy::services::{Service, ServicePort, Transport};

    use super::*;

    fn snapshot(services: Services) -> Snapshot {
        Snapshot {
            services: Arc::new(services),
            ..Snapshot::default()
        }
    }

    fn claiming() -> Services {
        let service = Service {
            name: Arc::new(ServiceName {
                namespace: "team".into(),
                name: "dns".into(),
            }),
            cluster: vec!["10.96.0.9".parse().expect("an address")],
            external: vec!["10.0.0.53".parse().expect("an address")],
            ports: vec![ServicePort {
                transport: Transport::Udp,
                port: 53,
                node_port: None,
                endpoints: vec!["203.0.113.9:53".parse().expect("an endpoint")],
            }],
            has_more: false,
        };
        Services::new([Arc::new(service)], Vec::new())
    }

    #[test]
    fn a_claim_counts_for_a_minute_after_its_end() {
        let text = "dns: {resolvers: [10.0.0.53]}\nnode: n1\n";
        let config = Config::from_yaml(text).expect("a configuration");
        let first = snapshot(claiming());
        let mut settings =
            Settings::new(config.clone(), &first, Inherited::default(), Arc::default());
        let resolver = config.dns.resolvers[0];
        assert!(settings.claims.contains_key(&resolver));

        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let none: Arc<Services> = Arc::default();
        let take = |settings: &mut Settings, services: &Arc<Services>| {
            settings.take_services(services, began);
        };
        take(&mut settings, &none);
        assert!(settings.claims_on(&config, at(0)).contains_key(&resolver));
        assert!(settings.has_ended_claims());
        assert_eq!(settings.unclaimed(at(59)), []);
        // Another claim ends later.
        take(&mut settings, &Arc::new(claiming()));
        settings.claims_on(&config, at(59));
        assert!(!settings.has_ended_claims());
        take(&mut settings, &none);
        assert!(settings.claims_on(&config, at(60)).contains_key(&resolver));
        assert_eq!(settings.unclaimed(at(119)), []);
        assert_eq!(settings.unclaimed(at(120)), [resolver]);
        // It counts until the node has forgotten what it translates.
        assert!(settings.claims_on(&config, at(120)).contains_key(&resolver));
        settings.forget(&[resolver], at(120));
        settings.claims = settings.claims_on(&config, at(120));
        assert_eq!(settings.claims, Claims::new());
        assert!(!settings.has_ended_claims());
    }

    #[test]
    fn a_claim_that_no_snapshot_has_counts_for_a_minute() {
        let text = "dns: {resolvers: [10.0.0.53]}\nnode: n1\n";
        let config = Config::from_yaml(text).expect("a configuration");
        let first = Snapshot::default();
        let inherited = Inherited::default();
        let mut settings = Settings::new(config.clone(), &first, inherited, Arc::default());
        let resolver = config.dns.resolvers[0];
        assert_eq!(settings.claims, Claims::new());

        let began = Instant::now();
        let mut services = Services::default();
        services.note_passed(claiming().all().cloned().map(Into::into).collect());
        let services = Arc::new(services);
        settings.take_services(&services, began);
        settings.claims = settings.claims_on(&config, began);
        assert!(settings.claims.contains_key(&resolver));
        // It comes and goes once more.
        let again = began + CLAIMED_FOR / 2;
        let mut services = Services::default();
        services.note_passed(claiming().all().cloned().map(Into::into).collect());
        let services = Arc::new(services);
        settings.take_services(&services, again);
        settings.claims = settings.claims_on(&config, again);
        assert_eq!(settings.unclaimed(began + CLAIMED_FOR), []);
        let later = again + CLAIMED_FOR;
        settings.take_services(&services, later);
        assert_eq!(settings.unclaimed(later), [resolver]);
        settings.forget(&[resolver], later);
        assert_eq!(settings.claims_on(&config, later), Claims::new());
    }

    #[test]
    fn a_claim_counts_also_if_it_cannot_be_put_in_force_at_first() {
        let text = "dns: {resolvers: [10.0.0.53]}\nnode: n1\n";
        let config = Config::from_yaml(text).expect("a configuration");
        let other = Config::from_yaml("dns: {resolvers: [10.0.0.54]}\nnode: n1\n");
        let other = other.expect("a configuration");
        let first = Snapshot::default();
        let inherited = Inherited::default();
        let mut settings = Settings::new(config.clone(), &first, inherited, Arc::default());
        let resolver = config.dns.resolvers[0];
        let began = Instant::now();
        let mut services = Services::default();
        services.note_passed(claiming().all().cloned().map(Into::into).collect());
        settings.take_services(&Arc::new(services), began);
        // Neither these claims nor another configuration get in force.
        assert!(settings.claims_on(&config, began).contains_key(&resolver));
        assert_eq!(settings.claims_on(&other, began), Claims::new());
        let claims = settings.claims_on(&config, began);
        assert!(claims.contains_key(&resolver));
        // They do now.
        settings.claims = claims;
        let later = began + CLAIMED_FOR;
        assert_eq!(settings.unclaimed(later), [resolver]);
        settings.forget(&[resolver], later);
        assert_eq!(settings.claims_on(&config, later), Claims::new());
    }

    #[test]
    fn what_services_have_lost_since_an_earlier_agent_counts() {
        let text = "dns: {resolvers: [10.0.0.53]}\nnode: n1\n";
        let config = Config::from_yaml(text).expect("a configuration");
        let earlier = Arc::new(claiming());
        let first = Snapshot::default();
        let mut settings = Settings::new(config.clone(), &first, Inherited::default(), earlier);
        let resolver = config.dns.resolvers[0];
        assert!(settings.are_claims_late);
        let now = Instant::now();
        assert!(settings.claims_on(&config, now).contains_key(&resolver));
        assert_eq!(settings.unclaimed(now + CLAIMED_FOR), [resolver]);
        assert!(settings.losses.are_due(now + CLAIMED_FOR));
    }
}
