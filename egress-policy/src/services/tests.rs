//! Services under policies: addresses that are denied or opened because of endpoints.

mod coarse;
mod large;
mod led;
mod lost;

use std::{collections::BTreeMap, net::IpAddr};

use egress_common::{
    classes::ClassSet,
    protocol::bits,
    reason::Reason,
    records::{Policy, RANGE_INTERNAL, RANGE_PROTECTED, RANGE_SERVICES, Range, TunnelKey},
    verdict::{Verdict, judge as verdict_on},
};
use proptest::prelude::*;

use super::{judge::Again, *};
use crate::{
    Annotations, Compiled, Inputs, Objects, Origin, Settings, compile,
    objects::{ObjectKind, ObjectName, Tier, TierAction, TierPolicy, TierRule},
    prefix::{inherit, to_mapped},
    reference::settings,
};

const CLUSTER_IP: &str = "10.96.0.7";

/// Services are in 10.96.0.0/16, pods in 10.1.0.0/16 and `fd01::/16`, nodes in 10.9.0.0/24.
fn places() -> Arc<Places> {
    with_ranges(&[])
}

/// The same with these internal ranges besides.
fn with_ranges(more: &[&str]) -> Arc<Places> {
    let prefix = |text: &str| Prefix::parse(text).unwrap();
    let internal = ["10.1.0.0/16", "fd01::/16", "10.9.0.0/24"].into_iter();
    let internal: Vec<Prefix> = internal.chain(more.iter().copied()).map(prefix).collect();
    let kinds = internal
        .iter()
        .map(|internal| (*internal, RANGE_INTERNAL))
        .chain([
            (prefix("10.96.0.0/16"), RANGE_INTERNAL | RANGE_SERVICES),
            (prefix("fd96::/16"), RANGE_INTERNAL | RANGE_SERVICES),
            (prefix("169.254.0.0/16"), RANGE_PROTECTED),
        ]);
    let ranges = inherit(kinds).into_iter().map(|(prefix, kinds)| {
        let range = Range {
            kinds,
            ..Range::default()
        };
        (prefix.network(), prefix.prefix_len(), range)
    });
    let tunnels = vec![TunnelKey::new(bits::UDP, 4789)];
    Arc::new(Places::new(ranges.collect(), tunnels, internal))
}

fn port(port: u16, endpoints: &[&str]) -> ServicePort {
    let endpoints = endpoints.iter().map(|endpoint| endpoint.parse().unwrap());
    ServicePort {
        transport: Transport::Tcp,
        port,
        node_port: None,
        endpoints: endpoints.collect(),
    }
}

fn service(name: &str, ip: &str, ports: &[ServicePort]) -> Arc<Service> {
    Arc::new(Service {
        name: Arc::new(ServiceName {
            namespace: "shop".into(),
            name: name.into(),
        }),
        cluster: vec![ip.parse().unwrap()],
        external: Vec::new(),
        ports: ports.to_vec(),
        has_more: false,
    })
}

fn web(endpoints: &[&str]) -> Arc<Service> {
    service("web", CLUSTER_IP, &[port(80, endpoints)])
}

fn known(services: &[Arc<Service>]) -> Known {
    let places = places();
    let mut known = Known::default();
    let services = Services::new(services.iter().cloned(), Vec::new());
    known.update(&Arc::new(services), &places);
    known
}

fn compiled(list: Option<&str>, rules: &[(TierAction, &str)], settings: &Settings) -> Compiled {
    let mut own = BTreeMap::new();
    own.extend(list.map(|list| ("egress-agent.dev/allow".to_owned(), list.to_owned())));
    let rules = rules.iter().enumerate();
    let rules: Vec<TierRule> = rules
        .map(|(index, (action, entries))| TierRule {
            name: None,
            index,
            action: *action,
            entries: entries.split_whitespace().map(str::to_owned).collect(),
        })
        .collect();
    let policy = TierPolicy {
        name: Arc::new(ObjectName {
            kind: ObjectKind::ClusterEgressPolicy,
            namespace: None,
            name: "guard".to_owned(),
        }),
        tier: Tier::Admin,
        priority: 1,
        rules,
    };
    let objects = Objects {
        tiers: (!policy.rules.is_empty())
            .then(|| Arc::new(policy))
            .into_iter()
            .collect(),
        ..Objects::default()
    };
    let inputs = Inputs {
        pod: &Annotations::from_map(&own),
        namespace: &Annotations::default(),
        objects: &objects,
    };
    compile(inputs, settings).unwrap()
}

fn with(policy: &Compiled, known: &Known, settings: &Settings) -> Compiled {
    let added = needed(&known.judge_all(policy));
    let (policy, problem) = policy.with_services(settings, &added, known.services());
    assert_eq!(problem, None);
    policy
}

fn verdict(policy: &Compiled, to: &str, transport: Transport) -> Verdict {
    let to: SocketAddr = to.parse().unwrap();
    let cidrs = places::Trie::<ClassSet>::of_cidrs(&policy.cidrs);
    let at = (transport, to.port());
    let places = places();
    let range = places.range(to.ip());
    let address = to_mapped(to.ip());
    let destination = places.destination(&policy.record, &cidrs, &address, range, at);
    verdict_on(&policy.record, &destination, transport.bit(), to.port())
}

/// Whether packets to the Service's port 80 pass.
fn passes(list: Option<&str>, rules: &[(TierAction, &str)], service: &Arc<Service>) -> bool {
    let settings = settings();
    let policy = with(
        &compiled(list, rules, &settings),
        &known(&[Arc::clone(service)]),
        &settings,
    );
    verdict(&policy, &format!("{CLUSTER_IP}:80"), Transport::Tcp) == Verdict::Pass
}

#[test]
fn a_closed_pod_reaches_no_outside_host_through_a_service() {
    assert!(passes(Some(""), &[], &web(&["10.1.0.2:8080"])));
    for endpoints in [
        &["203.0.113.9:25"][..],
        &["10.1.0.2:8080", "203.0.113.9:25"],
        &["169.254.169.254:80"],
        &["10.1.0.2:53"],
    ] {
        assert!(!passes(Some(""), &[], &web(endpoints)), "{endpoints:?}");
    }
}

#[test]
fn an_entry_for_every_outside_endpoint_or_for_the_service_opens_it() {
    let outside = web(&["203.0.113.9:25", "203.0.113.10:25"]);
    for (list, is_open) in [
        ("203.0.113.9:25", false),
        ("203.0.113.9:25 203.0.113.10:25", true),
        ("203.0.113.0/24", true),
        ("10.96.0.7:80", true),
        ("10.96.0.7:81", false),
        // Neither was written for this Service.
        ("10.96.0.0/16:80", false),
        ("*:80", false),
        ("*:80 *:25", true),
    ] {
        assert_eq!(passes(Some(list), &[], &outside), is_open, "{list}");
    }
}

#[test]
fn a_rule_that_denies_pods_denies_the_services_in_front_of_them() {
    use TierAction::{Allow, Deny, Pass};
    let of_pod = web(&["10.1.0.2:8080"]);
    for (rules, is_open) in [
        (&[(Deny, "10.1.0.2")][..], false),
        (&[(Deny, "10.1.0.2:8080/tcp")], false),
        (&[(Deny, "10.1.0.2:80/tcp")], true),
        (&[(Deny, "*:8080")], false),
        (&[(Deny, "*:80")], false),
        (&[(Pass, "10.1.0.2"), (Deny, "10.1.0.0/16")], true),
        (&[(Allow, "10.1.0.2"), (Deny, "10.1.0.0/16")], true),
        (&[(Allow, "10.96.0.7:80"), (Deny, "10.1.0.2")], true),
        (&[(Deny, "10.1.0.2"), (Allow, "10.96.0.7:80")], false),
        (&[(Allow, "10.96.0.0/16"), (Deny, "10.1.0.2")], false),
        (&[(Allow, "*:80"), (Deny, "10.1.0.2")], false),
        // A rule about everything that the Service's own address precedes says nothing of the pod.
        (&[(Allow, "10.96.0.0/16"), (Deny, "*")], true),
        (
            &[(Allow, "10.96.0.0/16"), (Deny, "10.1.0.2"), (Deny, "*")],
            false,
        ),
        // All endpoints are allowed, so the Service is.
        (&[(Allow, "10.1.0.2"), (Deny, "*")], true),
        (&[(Allow, "10.1.0.3"), (Deny, "*")], false),
    ] {
        assert_eq!(passes(None, rules, &of_pod), is_open, "{rules:?}");
    }
}

#[test]
fn a_service_is_denied_because_of_one_of_several_endpoints() {
    let both = web(&["10.1.0.2:8080", "10.1.0.3:8080"]);
    let rules = [(TierAction::Deny, "10.1.0.3")];
    assert!(!passes(None, &rules, &both));
    let rules = [(TierAction::Allow, "10.1.0.3"), (TierAction::Deny, "*")];
    assert!(!passes(None, &rules, &both));
}

#[test]
fn only_the_ports_that_lead_to_a_denied_endpoint_are_denied() {
    let settings = settings();
    let two = [port(80, &["10.1.0.2:8080"]), port(90, &["10.1.0.2:9090"])];
    let known = known(&[service("web", CLUSTER_IP, &two)]);
    let rules = [(TierAction::Deny, "10.1.0.2:9090")];
    let policy = with(&compiled(None, &rules, &settings), &known, &settings);
    let passes = |to: &str| verdict(&policy, to, Transport::Tcp) == Verdict::Pass;
    assert!(passes("10.96.0.7:80"));
    assert!(!passes("10.96.0.7:90"));
    let address = to_mapped([10, 96, 0, 7].into());
    let Verdict::Deny { class, .. } = verdict(&policy, "10.96.0.7:90", Transport::Tcp) else {
        panic!("it passes");
    };
    let entry = policy.deciding_entry(&address, class).expect("an entry");
    let about = policy.denied_service(&address, (bits::TCP, 90), entry);
    let about = about.expect("a Service");
    assert_eq!(about.service.to_string(), "shop/web");
    assert_eq!(about.endpoint_entry(), "10.1.0.2:9090/tcp");
}

#[test]
fn a_denial_names_the_rule_or_else_the_service() {
    let settings = settings();
    let decides = |policy: &Compiled| {
        let Verdict::Deny { reason, class } = verdict(policy, "10.96.0.7:80", Transport::Tcp)
        else {
            panic!("it passes");
        };
        assert_eq!(reason, Reason::DenyRule);
        let entry = policy.deciding_entry(&to_mapped([10, 96, 0, 7].into()), class);
        let entry = entry.expect("an entry");
        (entry.text.to_string(), entry.origin.clone())
    };
    let known_outside = known(&[web(&["203.0.113.9:25"])]);
    let closed = with(
        &compiled(Some(""), &[], &settings),
        &known_outside,
        &settings,
    );
    let (text, origin) = decides(&closed);
    assert_eq!(text, "203.0.113.9:25/tcp");
    assert!(matches!(origin, Origin::Service(name) if name.to_string() == "shop/web"));
    let rules = [(TierAction::Deny, "10.1.0.0/16")];
    let known = known(&[web(&["10.1.0.2:8080"])]);
    let denied = with(&compiled(None, &rules, &settings), &known, &settings);
    let (text, origin) = decides(&denied);
    assert_eq!(text, "10.1.0.0/16");
    assert!(matches!(origin, Origin::Rule(_)));
}

#[test]
fn external_addresses_and_node_ports_are_denied_and_never_opened() {
    let settings = settings();
    let mut of_nodes = Service::clone(&web(&["10.1.0.2:8080"]));
    of_nodes.ports[0].node_port = Some(30080);
    of_nodes.external = vec!["198.51.100.7".parse().unwrap()];
    let known = known(&[Arc::new(of_nodes)]);
    let rules = [(TierAction::Deny, "10.1.0.2")];
    let policy = with(&compiled(None, &rules, &settings), &known, &settings);
    for (to, is_open) in [
        ("198.51.100.7:80", false),
        ("198.51.100.7:443", true),
        ("10.9.0.1:30080", false),
        ("10.1.7.1:30080", false),
        ("10.9.0.1:80", true),
    ] {
        let passes = verdict(&policy, to, Transport::Tcp) == Verdict::Pass;
        assert_eq!(passes, is_open, "{to}");
    }
    let rules = [(TierAction::Allow, "10.1.0.2"), (TierAction::Deny, "*")];
    let policy = with(&compiled(None, &rules, &settings), &known, &settings);
    let passes = |to: &str| verdict(&policy, to, Transport::Tcp) == Verdict::Pass;
    assert!(passes("10.96.0.7:80"));
    assert!(!passes("198.51.100.7:80") && !passes("10.9.0.1:30080"));
}

/// Who writes a Service chooses its external addresses, also such as a pod's entries are about.
#[test]
fn an_entry_for_an_outside_host_does_not_open_a_service_that_takes_its_address() {
    let settings = settings();
    let mut taking = Service::clone(&web(&["203.0.113.66:80"]));
    taking.external = vec!["198.51.100.7".parse().unwrap()];
    let known = known(&[Arc::new(taking)]);
    let passes = |list: &str| {
        let policy = with(&compiled(Some(list), &[], &settings), &known, &settings);
        verdict(&policy, "198.51.100.7:80", Transport::Tcp) == Verdict::Pass
    };
    assert!(!passes("198.51.100.7:80"));
    assert!(!passes("198.51.100.0/24:80"));
    assert!(passes("198.51.100.7:80 203.0.113.66:80"));
    // A name that leads there.
    let policy = with(
        &compiled(Some("shop.test:80"), &[], &settings),
        &known,
        &settings,
    );
    let at = (Transport::Tcp, 80);
    let cidrs = places::Trie::<ClassSet>::of_cidrs(&policy.cidrs);
    let ip: IpAddr = "198.51.100.7".parse().unwrap();
    let places = places();
    let range = places.range(ip);
    let mut destination = places.destination(&policy.record, &cidrs, &to_mapped(ip), range, at);
    destination.learned = policy.record.named;
    assert_ne!(
        verdict_on(&policy.record, &destination, bits::TCP, 80),
        Verdict::Pass
    );
}

#[test]
fn an_entry_for_outside_hosts_does_not_lead_to_a_denied_pod() {
    let mut taking = Service::clone(&web(&["10.1.0.2:80"]));
    taking.external = vec!["198.51.100.7".parse().unwrap()];
    let known = known(&[Arc::new(taking)]);
    let passes = |list: Option<&str>, rules: &[(TierAction, &str)], settings: &Settings| {
        let policy = with(&compiled(list, rules, settings), &known, settings);
        verdict(&policy, "198.51.100.7:80", Transport::Tcp) == Verdict::Pass
    };
    let open = settings();
    let closed = Settings {
        allow_internal: false,
        ..settings()
    };
    for entry in ["198.51.100.7:80", "198.51.100.0/24"] {
        assert!(passes(Some(entry), &[], &open), "the pod is not denied");
        assert!(!passes(Some(entry), &[], &closed));
        let rules = [(TierAction::Allow, entry), (TierAction::Deny, "0.0.0.0/0")];
        assert!(!passes(None, &rules, &open));
    }
    assert!(passes(Some("198.51.100.7:80 10.1.0.2:80"), &[], &closed));
}

#[test]
fn a_tunnel_behind_another_port_is_denied() {
    let settings = settings();
    let mut service = Service::clone(&web(&["10.9.0.1:4789"]));
    service.ports[0].transport = Transport::Udp;
    let known = known(&[Arc::new(service)]);
    let policy = with(&compiled(Some(""), &[], &settings), &known, &settings);
    assert_ne!(
        verdict(&policy, "10.96.0.7:80", Transport::Udp),
        Verdict::Pass
    );
}

#[test]
fn endpoints_of_the_other_family_do_not_count() {
    assert!(passes(
        Some(""),
        &[],
        &web(&["10.1.0.2:80", "[2001:db8::9]:25"])
    ));
    let settings = settings();
    let dual = Service {
        cluster: vec![CLUSTER_IP.parse().unwrap(), "fd96::7".parse().unwrap()],
        ..Service::clone(&web(&["10.1.0.2:80", "[2001:db8::9]:25"]))
    };
    let known = known(&[Arc::new(dual)]);
    let policy = with(&compiled(Some(""), &[], &settings), &known, &settings);
    let passes = |to: &str| verdict(&policy, to, Transport::Tcp) == Verdict::Pass;
    assert!(passes("10.96.0.7:80"));
    assert!(!passes("[fd96::7]:80"));
}

#[test]
fn a_policy_without_rules_is_closed_to_services_with_outside_endpoints_too() {
    let settings = settings();
    let policy = crate::unidentified(&crate::Objects::default(), &settings);
    let policy = with(&policy, &known(&[web(&["203.0.113.9:25"])]), &settings);
    assert_ne!(
        verdict(&policy, "10.96.0.7:80", Transport::Tcp),
        Verdict::Pass
    );
    assert_eq!(
        verdict(&policy, "10.96.0.8:80", Transport::Tcp),
        Verdict::Pass
    );
}

#[test]
fn an_edit_of_one_service_is_judged_alone_and_with_the_same_result() {
    let places = places();
    let mut known = known(&[web(&["10.1.0.2:80"]), service("other", "10.96.0.8", &[])]);
    let settings = settings();
    let policy = compiled(Some(""), &[], &settings);
    let mut of_policy = known.judge_all(&policy);
    assert!(of_policy.is_empty());
    let edited = web(&["203.0.113.9:25"]);
    let services = Services::new([edited, service("other", "10.96.0.8", &[])], Vec::new());
    let services = Arc::new(services);
    let again = known.update(&services, &places).expect("a change");
    assert!(matches!(&again, Again::These(names) if names.len() == 1));
    assert!(known.judge_again(&policy, &mut of_policy, &again));
    assert_eq!(of_policy, known.judge_all(&policy));
    assert!(!known.judge_again(&policy, &mut of_policy, &again));
    assert_eq!(known.update(&services, &places), None);
    assert!(known.update(&Arc::default(), &places).is_some());
    assert!(known.judge_again(&policy, &mut of_policy, &again));
    assert!(of_policy.is_empty());
}

fn endpoint() -> impl Strategy<Value = String> {
    let host = prop_oneof![
        Just("10.1.0.2"),
        Just("10.1.0.3"),
        Just("10.1.1.2"),
        Just("203.0.113.9")
    ];
    let port = prop_oneof![Just(80), Just(81), Just(53)];
    (host, port).prop_map(|(host, port)| format!("{host}:{port}"))
}

fn entry() -> impl Strategy<Value = String> {
    let host = prop_oneof![
        Just("*"),
        Just("10.0.0.0/8"),
        Just("10.96.0.0/16"),
        Just("10.96.0.7"),
        Just("10.1.0.0/24"),
        Just("10.1.0.2"),
        Just("203.0.113.9")
    ];
    let port = prop_oneof![Just(""), Just(":80"), Just(":81"), Just(":70-80")];
    (host, port).prop_map(|(host, port)| format!("{host}{port}"))
}

fn rule() -> impl Strategy<Value = (TierAction, String)> {
    let action = prop_oneof![
        Just(TierAction::Allow),
        Just(TierAction::Deny),
        Just(TierAction::Pass)
    ];
    (action, entry())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn a_service_passes_only_what_its_endpoints_do(
        list in prop::option::of(prop::collection::vec(entry(), 0..3)),
        rules in prop::collection::vec(rule(), 0..5),
        endpoints in prop::collection::vec(endpoint(), 1..4),
        others in prop::collection::vec(endpoint(), 8),
        allow_internal: bool,
    ) {
        let settings = Settings { allow_internal, ..settings() };
        let list = list.map(|list| list.join(" "));
        let written: Vec<_> = rules.iter().map(|(action, text)| (*action, text.as_str())).collect();
        let base = compiled(list.as_deref(), &written, &settings);
        let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
        let known = known(&[web(&endpoints)]);
        let policy = with(&base, &known, &settings);
        // No Service that needs a rule is left out.
        let mut by_name = BTreeMap::new();
        let name = Arc::clone(&web(&[]).name);
        known.judge_again(&base, &mut by_name, &Again::These([name].into()));
        prop_assert_eq!(known.judge_all(&base), by_name);
        // Each class of before is still there, in the same order.
        let classes = base.own.iter().zip(policy.own.iter());
        prop_assert_eq!(base.own.iter().count(), policy.own.iter().count());
        for (alone, class) in classes {
            let of = |record: &Policy, class: u8| (
                record.classes[usize::from(class)],
                [record.deny, record.pass, record.admin, record.baseline].map(|set| set.meets(ClassSet::one(class))),
            );
            prop_assert_eq!(of(&base.record, alone), of(&policy.record, class));
        }
        let service = format!("{CLUSTER_IP}:80");
        let before = verdict(&base, &service, Transport::Tcp);
        let after = verdict(&policy, &service, Transport::Tcp);

        // Nothing else changes.
        for other in &others {
            let verdicts = [&base, &policy].map(|policy| verdict(policy, other, Transport::Tcp) == Verdict::Pass);
            prop_assert_eq!(verdicts[0], verdicts[1], "{}", other);
        }

        let of_endpoints: Vec<(IpAddr, Verdict)> = endpoints
            .iter()
            .map(|endpoint| {
                let ip = endpoint.parse::<SocketAddr>().unwrap().ip();
                (ip, verdict(&base, endpoint, Transport::Tcp))
            })
            .collect();
        let all_pass = of_endpoints.iter().all(|(_, verdict)| *verdict == Verdict::Pass);
        if all_pass && before == Verdict::Pass {
            prop_assert_eq!(after, Verdict::Pass);
        }
        let texts = list.iter().flat_map(|list| list.split(' '));
        let mut entries = texts.chain(written.iter().map(|(_, text)| *text));
        let names_service = entries.any(|text| text.starts_with(CLUSTER_IP));
        if names_service {
            return Ok(());
        }
        let outside: IpAddr = "203.0.113.9".parse().unwrap();
        for (ip, verdict) in of_endpoints {
            let Verdict::Deny { reason, class } = verdict else { continue };
            // A rule about everything also decides about the Service itself.
            let is_alone = reason == Reason::DenyRule && {
                let text = &base.deciding_entry(&to_mapped(ip), class).unwrap().text;
                !(text.starts_with('*') || text.starts_with("10.0.0.0/8"))
            };
            if ip == outside || is_alone {
                prop_assert_ne!(after, Verdict::Pass, "{} is denied", ip);
            }
        }
    }
}
