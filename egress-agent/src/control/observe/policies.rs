//! Reading pods' annotations and policy objects, and remembering the last readable policy.

use std::{collections::HashMap, sync::Arc};

use super::fallback::{self, Good, Parts, Present};
use crate::{pods::Pod, report::Subject, serve::Written};
use egress_policy::{
    Annotations, Compiled, Objects, Settings,
    services::{Known, Places, ServiceName, Services, judge::ByService, needed},
};

/// The policy of one pod, and its inputs.
struct Reading {
    uid: String,
    parts: Parts,
    /// Whether an entry uses a set, so that a change of the sets may change the policy.
    uses_sets: bool,
    /// The policy without its rules for Services.
    alone: Arc<Compiled>,
    /// The rules that it needs for Services.
    for_services: ByService,
    compiled: Arc<Compiled>,
    /// The problem with these rules.
    services_problem: Option<String>,
    /// The parts that could be read, now or earlier.
    good: Good,
    problem: Option<String>,
    /// What `compiled` was read from.
    written: Arc<Written>,
    /// Which parts of `compiled` are current.
    present: Present,
    /// Whether `compiled` was compiled with the present settings.
    current: bool,
}

impl Reading {
    /// Whether it was read from what the pod has now.
    fn is_of(&self, pod: &Pod) -> bool {
        self.current && self.parts.are_of(pod, self.uses_sets)
    }

    /// Puts the rules for Services into the policy.
    fn complete(&mut self, settings: &Settings, services: &Services) {
        let for_services = (&self.for_services, services);
        let (compiled, problem) = complete(&self.alone, for_services, settings);
        self.services_problem = problem;
        if *self.compiled != *compiled {
            self.compiled = compiled;
        }
    }
}

/// A policy with the rules that it needs for Services, and the problem with these.
fn complete(
    alone: &Arc<Compiled>,
    (for_services, all): (&ByService, &Services),
    settings: &Settings,
) -> (Arc<Compiled>, Option<String>) {
    alone.completed(settings, &needed(for_services), all)
}

/// The policies of all pods.
pub(in crate::control) struct Policies {
    settings: Settings,
    /// The Services of the cluster.
    services: Known,
    pods: HashMap<Subject, Reading>,
    /// The policy of interfaces in quarantine, with the objects that it comes from.
    unidentified: Option<(Arc<Objects>, Arc<Compiled>)>,
}

impl Policies {
    pub(in crate::control) fn new(settings: Settings) -> Self {
        Self {
            settings,
            services: Known::default(),
            pods: HashMap::new(),
            unidentified: None,
        }
    }

    /// The pod's policy, from its annotations and objects. For a part that cannot be read, the last readable version
    /// counts ([`fallback`](super::fallback)).
    pub(in crate::control) fn read(&mut self, key: &Subject, pod: &Pod) -> Arc<Compiled> {
        let before = self.pods.get(key).filter(|reading| reading.uid == pod.uid);
        if let Some(reading) = before
            && reading.is_of(pod)
        {
            return Arc::clone(&reading.compiled);
        }
        let good = before.map(|reading| reading.good.clone());
        let parts = Parts::of(pod);
        let read = fallback::read(&parts, good.unwrap_or_default(), &self.settings);
        let alone = Arc::new(read.compiled);
        let for_services = self.services.judge_all(&alone);
        let (compiled, services_problem) = complete(
            &alone,
            (&for_services, self.services.services()),
            &self.settings,
        );
        let reading = Reading {
            uid: pod.uid.clone(),
            uses_sets: parts.use_sets(),
            parts,
            alone,
            for_services,
            compiled: Arc::clone(&compiled),
            services_problem,
            good: read.good,
            problem: read.problem,
            written: read.written,
            present: read.present,
            current: true,
        };
        self.pods.insert(key.clone(), reading);
        compiled
    }

    /// Takes the Services of the cluster. Only policies change that name a Service which has changed.
    pub(in crate::control) fn take_services(
        &mut self,
        services: &Arc<Services>,
        places: &Arc<Places>,
    ) {
        let Some(again) = self.services.update(services, places) else {
            return;
        };
        for reading in self.pods.values_mut() {
            let before = &mut reading.for_services;
            if self.services.judge_again(&reading.alone, before, &again) {
                reading.complete(&self.settings, self.services.services());
            }
        }
    }

    /// The Services that policies name, and these.
    pub(in crate::control) fn services_in_force<'a>(
        &'a self,
        others: impl Iterator<Item = &'a Arc<ServiceName>>,
    ) -> Services {
        let all = self.pods.values();
        let named = all.flat_map(|reading| reading.for_services.keys());
        self.services.only(&named.chain(others).collect())
    }

    /// The Services, with the kinds of addresses on this node.
    pub(in crate::control) fn services(&self) -> &Known {
        &self.services
    }

    /// Compiles with other settings from now on.
    pub(in crate::control) fn change(&mut self, settings: Settings) {
        if settings != self.settings {
            self.settings = settings;
            self.unidentified = None;
            for reading in self.pods.values_mut() {
                reading.current = false;
            }
        }
    }

    /// The last reading of a pod: its policy, what it was read from, and which parts of that are current.
    pub(in crate::control) fn last(
        &self,
        key: &Subject,
    ) -> Option<(&Arc<Compiled>, &Arc<Written>, Present)> {
        let reading = self.pods.get(key)?;
        Some((&reading.compiled, &reading.written, reading.present))
    }

    /// The current settings.
    pub(in crate::control) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The policy of an interface in quarantine, under these objects.
    pub(in crate::control) fn unidentified(&mut self, objects: &Arc<Objects>) -> Arc<Compiled> {
        let compiled = match &self.unidentified {
            Some((known, compiled)) if known == objects => Arc::clone(compiled),
            _ => Arc::new(egress_policy::unidentified(objects, &self.settings)),
        };
        self.unidentified = Some((Arc::clone(objects), Arc::clone(&compiled)));
        self.with_services(&compiled)
    }

    /// The policy of a pod whose namespace is not known yet.
    pub(in crate::control) fn without_namespace(
        &self,
        pod: &Pod,
        quarantine: bool,
        objects: &Objects,
    ) -> Arc<Compiled> {
        let own = Annotations::from_map(&pod.annotations);
        let closed = egress_policy::without_namespace(&own, quarantine, objects, &self.settings);
        self.with_services(&Arc::new(closed))
    }

    fn with_services(&self, closed: &Arc<Compiled>) -> Arc<Compiled> {
        let for_services = self.services.judge_all(closed);
        let (closed, _) = complete(
            closed,
            (&for_services, self.services.services()),
            &self.settings,
        );
        closed
    }

    /// The errors or the warnings about the pod's annotations and objects.
    pub(in crate::control) fn problem(&self, key: &Subject) -> Option<String> {
        let reading = self.pods.get(key)?;
        let problems = [&reading.problem, &reading.services_problem];
        let problems: Vec<&str> = problems.into_iter().flatten().map(String::as_str).collect();
        (!problems.is_empty()).then(|| problems.join("; "))
    }

    /// Forgets pods that are gone.
    pub(super) fn retain(&mut self, is_there: impl Fn(&Subject) -> bool) {
        self.pods.retain(|subject, _| is_there(subject));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Config, control::plan::scene::pod};
    use egress_common::{
        classes::ClassSet,
        records::{POLICY_ALLOW_INTERNAL, POLICY_UNREADABLE},
    };
    use egress_policy::{
        Mode,
        objects::{
            NamespacePolicy, ObjectKind, ObjectName, Tier, TierAction, TierPolicy, TierRule,
        },
    };

    const ALLOW: &str = "egress-agent.dev/allow";

    fn settings(lines: &str) -> Settings {
        let text = format!("dns: {{resolvers: [10.0.0.53]}}\nnode: n1\n{lines}");
        let config = Config::from_yaml(&text).expect("a configuration");
        config.policy_settings()
    }

    fn allowing(list: &str) -> Pod {
        let mut pod = pod("cart");
        pod.annotations.insert(ALLOW.to_owned(), list.to_owned());
        pod
    }

    #[test]
    fn a_pod_keeps_its_last_good_policy_when_its_annotations_cannot_be_read() {
        let cart = Subject::pod("shop", "cart");
        let mut policies = Policies::new(settings(""));
        let good = policies.read(&cart, &allowing("a.test"));
        assert_eq!(policies.problem(&cart), None);
        assert_eq!(policies.read(&cart, &allowing("a.test:x")), good);
        let problem = policies.problem(&cart).expect("a problem");
        assert!(problem.ends_with("the last good policy stays"), "{problem}");
        let other = policies.read(&cart, &allowing("b.test"));
        assert_ne!(other, good);
        assert_eq!(policies.problem(&cart), None);
    }

    #[test]
    fn the_last_good_policy_is_compiled_anew_with_other_settings() {
        let cart = Subject::pod("shop", "cart");
        let mut policies = Policies::new(settings(""));
        let good = policies.read(&cart, &allowing("a.test"));
        policies.read(&cart, &allowing("a.test:x"));
        let others = settings("ranges: {allowInternal: false}\n");
        policies.change(others.clone());
        let again = policies.read(&cart, &allowing("a.test:x"));
        assert_ne!(again, good);
        let mut fresh = Policies::new(others);
        assert_eq!(again, fresh.read(&cart, &allowing("a.test")));
    }

    #[test]
    fn a_new_pod_whose_annotations_cannot_be_read_is_closed() {
        let cart = Subject::pod("shop", "cart");
        let mut policies = Policies::new(settings(""));
        let closed = policies.read(&cart, &allowing("a.test:x"));
        assert_eq!(closed.mode, Mode::Enforce);
        let problem = policies.problem(&cart).expect("a problem");
        assert!(
            problem.ends_with("everything external is denied"),
            "{problem}"
        );
        // Another pod of the same name has no last good policy.
        policies.read(&cart, &allowing("a.test"));
        let mut anew = allowing("a.test:x");
        anew.uid = "another".to_owned();
        assert_eq!(policies.read(&cart, &anew), closed);
    }

    /// An object with one ordered rule, which denies this.
    fn denying(priority: u32, entry: &str) -> Arc<TierPolicy> {
        Arc::new(TierPolicy {
            name: Arc::new(ObjectName {
                kind: ObjectKind::ClusterEgressPolicy,
                namespace: None,
                name: format!("p{priority}"),
            }),
            tier: Tier::Admin,
            priority,
            rules: vec![TierRule {
                name: None,
                index: 0,
                action: TierAction::Deny,
                entries: vec![entry.to_owned()],
            }],
        })
    }

    fn under(rules: &[Arc<TierPolicy>], list: &str) -> Pod {
        let mut pod = allowing(list);
        pod.objects.tiers = rules.to_vec();
        pod
    }

    fn denies(compiled: &Compiled, address: [u8; 4]) -> bool {
        let address = egress_common::address::from_v4(address);
        let classes = compiled
            .cidrs
            .iter()
            .filter(|cidr| cidr.prefix_len == 128 && cidr.network == address)
            .fold(ClassSet::EMPTY, |all, cidr| all.or(cidr.classes));
        classes.meets(compiled.record.deny)
    }

    #[test]
    fn lists_that_cannot_be_read_keep_no_ordered_rule_from_their_pod() {
        let cart = Subject::pod("shop", "cart");
        for settings in [settings(""), settings("podAnnotations: ignore\n")] {
            let rules = [denying(1, "10.1.2.2")];
            let mut policies = Policies::new(settings);
            // A new pod has no last good lists.
            let closed = policies.read(&cart, &under(&rules, "!"));
            assert!(denies(&closed, [10, 1, 2, 2]));
            assert_eq!(closed.mode, Mode::Enforce);
            assert_ne!(closed.record.flags & POLICY_UNREADABLE, 0);
            let problem = policies.problem(&cart).expect("a problem");
            assert!(
                problem.ends_with("that ordered rules do not allow"),
                "{problem}"
            );
            // A known pod is under the rules as they are now.
            let good = policies.read(&cart, &under(&[], "10.9.9.9"));
            assert!(!denies(&good, [10, 1, 2, 2]));
            let now = policies.read(&cart, &under(&rules, "10.9.9.9:x"));
            assert!(denies(&now, [10, 1, 2, 2]));
            let problem = policies.problem(&cart).expect("a problem");
            assert!(
                problem.ends_with("the last good annotations of the pod stay"),
                "{problem}"
            );
            // So it is if both parts are readable, but too large together.
            let ports: Vec<String> = (1..=128).map(|port| format!("10.9.9.9:{port}")).collect();
            policies.read(&cart, &under(&[], &ports.join(" ")));
            let now = policies.read(&cart, &under(&rules, &ports.join(" ")));
            assert!(denies(&now, [10, 1, 2, 2]));
        }
    }

    /// A pod that denies this itself, in a namespace that opens everything but this.
    fn denied(own: &str, namespace: &str, policies: &[Arc<NamespacePolicy>]) -> Pod {
        let mut pod = pod("cart");
        let list = |key: &str, list: &str| (format!("egress-agent.dev/{key}"), list.to_owned());
        pod.annotations = [list("deny", own)].into();
        pod.namespace_annotations = [list("allow", "*"), list("deny", namespace)].into();
        pod.objects.namespace = policies.to_vec();
        pod
    }

    fn policy(deny: &str) -> Arc<NamespacePolicy> {
        Arc::new(NamespacePolicy {
            name: Arc::new(ObjectName {
                kind: ObjectKind::EgressPolicy,
                namespace: Some("shop".to_owned()),
                name: "team".to_owned(),
            }),
            mode: None,
            allow: None,
            deny: Some(vec![deny.to_owned()]),
            resolve: None,
        })
    }

    #[test]
    fn annotations_that_cannot_be_read_keep_no_list_of_the_namespace_from_their_pod() {
        let cart = Subject::pod("shop", "cart");
        for lines in ["", "podAnnotations: narrow\n", "podAnnotations: ignore\n"] {
            let mut policies = Policies::new(settings(lines));
            let policy = [policy("10.3.3.3")];
            // A new pod has no last good annotations.
            let closed = policies.read(&cart, &denied("!", "10.2.2.2", &policy));
            assert!(denies(&closed, [10, 2, 2, 2]));
            assert!(denies(&closed, [10, 3, 3, 3]));
            assert_ne!(closed.record.flags & POLICY_UNREADABLE, 0);
            assert!(closed.record.any.is_empty());
            // A known pod is under the lists of its namespace as they are now.
            let good = policies.read(&cart, &denied("10.1.1.1", "10.9.9.9", &[]));
            assert!(!denies(&good, [10, 2, 2, 2]));
            let now = policies.read(&cart, &denied("10.1.1.1 !", "10.2.2.2", &policy));
            let mut fresh = Policies::new(settings(lines));
            let expected = fresh.read(&cart, &denied("10.1.1.1", "10.2.2.2", &policy));
            assert_eq!(now, expected, "only the pod's annotations are earlier ones");
            let problem = policies.problem(&cart).expect("a problem");
            assert!(
                problem.ends_with("the last good annotations of the pod stay"),
                "{problem}"
            );
        }
    }

    #[test]
    fn annotations_take_effect_while_lists_of_the_namespace_cannot_be_read() {
        let cart = Subject::pod("shop", "cart");
        let mut policies = Policies::new(settings(""));
        policies.read(&cart, &denied("10.1.1.1", "10.2.2.2", &[]));
        let now = policies.read(&cart, &denied("10.4.4.4", "10.2.2.2 !", &[]));
        let mut fresh = Policies::new(settings(""));
        let expected = fresh.read(&cart, &denied("10.4.4.4", "10.2.2.2", &[]));
        assert_eq!(now, expected);
        let problem = policies.problem(&cart).expect("a problem");
        assert!(
            problem.ends_with("the last good lists of its namespace stay"),
            "{problem}"
        );
        // Without earlier lists of the namespace, annotations that can be read open nothing.
        let closed = fresh.read(&Subject::pod("shop", "till"), &denied("10.4.4.4", "!", &[]));
        assert_ne!(closed.record.flags & POLICY_UNREADABLE, 0);
        assert!(closed.record.any.is_empty());
    }

    #[test]
    fn each_part_uses_the_sets_of_its_time() {
        let cart = Subject::pod("shop", "cart");
        let with = |mut pod: Pod, members: &str| {
            let sets = [("s".to_owned(), vec![members.to_owned()])];
            pod.objects.sets = Arc::new(sets.into());
            pod
        };
        let mut policies = Policies::new(settings(""));
        let of_both = |own: &str| denied(own, "@s", &[]);
        policies.read(&cart, &with(of_both("@s"), "10.1.1.1"));
        // A set that the namespace uses is as it is now.
        let now = policies.read(&cart, &with(of_both("@s !"), "10.2.2.2"));
        assert!(denies(&now, [10, 2, 2, 2]));
        assert!(!denies(&now, [10, 1, 1, 1]));
        let of_pod = |own: &str| denied(own, "10.9.9.9", &[]);
        policies.read(&cart, &with(of_pod("@s"), "10.1.1.1"));
        let now = policies.read(&cart, &with(of_pod("@s !"), "10.2.2.2"));
        assert!(denies(&now, [10, 1, 1, 1]));
    }

    #[test]
    fn ordered_rules_that_cannot_be_read_stay_as_they_last_were() {
        let cart = Subject::pod("shop", "cart");
        let mut policies = Policies::new(settings(""));
        let bad = [denying(1, "@missing")];
        let closed = policies.read(&cart, &under(&bad, "10.9.9.9"));
        assert_eq!(closed.record.flags & POLICY_ALLOW_INTERNAL, 0);
        let problem = policies.problem(&cart).expect("a problem");
        assert!(problem.ends_with("internal addresses too"), "{problem}");
        policies.read(&cart, &under(&[denying(1, "10.1.2.2")], "10.9.9.9"));
        let now = policies.read(&cart, &under(&bad, "10.8.8.8"));
        assert!(denies(&now, [10, 1, 2, 2]));
        let mut fresh = Policies::new(settings(""));
        let expected = fresh.read(&cart, &under(&[denying(1, "10.1.2.2")], "10.8.8.8"));
        assert_eq!(now, expected, "the lists are those of now");
    }

    #[test]
    fn peers_that_are_too_many_close_the_pod_instead_of_getting_old() {
        let cart = Subject::pod("shop", "cart");
        let mut policies = Policies::new(settings(""));
        let of_peers = |count: usize| {
            let mut policy = TierPolicy::clone(&denying(1, "10.1.2.2"));
            policy.name = Arc::new(ObjectName {
                kind: ObjectKind::ClusterNetworkPolicy,
                ..ObjectName::clone(&policy.name)
            });
            let peers = (0..count).map(|n| format!("10.2.{}.{}", n / 128, n % 128 * 2));
            policy.rules[0].entries.extend(peers);
            Arc::new(policy)
        };
        let good = policies.read(&cart, &under(&[of_peers(4095)], "a.test"));
        assert!(denies(&good, [10, 1, 2, 2]));
        let closed = policies.read(&cart, &under(&[of_peers(4096)], "a.test"));
        assert_eq!(closed.record.flags & POLICY_ALLOW_INTERNAL, 0);
        assert_ne!(closed.record.flags & POLICY_UNREADABLE, 0);
    }
}
