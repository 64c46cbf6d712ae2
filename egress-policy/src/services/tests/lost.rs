//! What Services have lost counts for a while.

use std::time::{Duration, Instant};

use super::*;

const MINUTE: Duration = Duration::from_secs(60);
const SERVICE: &str = "10.96.0.7:80";

/// A cluster whose Services change, and a policy.
struct Scene {
    losses: Losses,
    places: Arc<Places>,
    policy: Compiled,
    settings: Settings,
    began: Instant,
}

impl Scene {
    fn new(
        list: Option<&str>,
        rules: &[(TierAction, &str)],
        settings: Settings,
        first: &Arc<Service>,
    ) -> Self {
        let services = Services::new([Arc::clone(first)], Vec::new());
        Self {
            losses: Losses::new(Arc::new(services)),
            places: places(),
            policy: compiled(list, rules, &settings),
            settings,
            began: Instant::now(),
        }
    }

    fn denying(rules: &str, first: &Arc<Service>) -> Self {
        Self::new(None, &[(TierAction::Deny, rules)], settings(), first)
    }

    fn take(&mut self, services: &[&Arc<Service>]) {
        let services = services.iter().map(|service| Arc::clone(service));
        let services = Arc::new(Services::new(services, Vec::new()));
        self.losses.take(&services, &self.places, self.began);
    }

    #[track_caller]
    fn passes(&self, to: &str) -> bool {
        let mut known = Known::default();
        known.update(self.losses.services(), &self.places);
        let policy = with(&self.policy, &known, &self.settings);
        verdict(&policy, to, Transport::Tcp) == Verdict::Pass
    }

    /// Lets this time pass, and forgets the parts that were lost a minute before.
    fn pass_time(&mut self, time: Duration) {
        let now = self.began + time;
        self.losses.forget(now);
    }
}

#[test]
fn a_lost_endpoint_denies_for_a_minute() {
    let mut scene = Scene::denying("10.1.0.2", &web(&["10.1.0.2:80"]));
    assert!(!scene.passes(SERVICE));
    for after in [vec![web(&["10.1.0.3:80"])], vec![web(&[])], Vec::new()] {
        scene.take(&after.iter().collect::<Vec<_>>());
        assert!(!scene.passes(SERVICE), "{after:?}");
        scene.pass_time(Duration::from_secs(59));
        assert!(!scene.passes(SERVICE), "{after:?}");
    }
    assert!(scene.losses.are_due(scene.began + MINUTE));
    scene.pass_time(MINUTE);
    assert!(scene.passes(SERVICE));
    assert!(!scene.losses.are_due(scene.began + 2 * MINUTE));
}

#[test]
fn lost_ports_and_external_addresses_deny_as_well() {
    let with_address = |ip: &str| {
        let mut service = Service::clone(&web(&["10.1.0.2:80"]));
        service.external = vec![ip.parse().unwrap()];
        service.ports[0].node_port = Some(30_080);
        Arc::new(service)
    };
    let mut scene = Scene::denying("10.1.0.2", &with_address("10.9.0.7"));
    scene.take(&[&with_address("10.9.0.8")]);
    for to in ["10.9.0.7:80", "10.9.0.8:80"] {
        assert!(!scene.passes(to), "{to}");
    }
    let elsewhere = service("web", CLUSTER_IP, &[port(81, &["10.1.0.3:80"])]);
    scene.take(&[&elsewhere]);
    for to in ["10.9.0.7:80", "10.9.0.8:80", "10.9.0.1:30080", SERVICE] {
        assert!(!scene.passes(to), "{to}");
    }
    scene.pass_time(MINUTE);
    for to in ["10.9.0.7:80", "10.9.0.8:80", "10.9.0.1:30080", SERVICE] {
        assert!(scene.passes(to), "{to}");
    }
}

#[test]
fn an_endpoint_that_is_back_is_not_lost() {
    let mut scene = Scene::denying("10.1.0.2", &web(&["10.1.0.2:80"]));
    scene.take(&[&web(&[])]);
    scene.take(&[&web(&["10.1.0.2:80"])]);
    assert!(!scene.losses.are_due(scene.began + MINUTE));
    scene.pass_time(MINUTE);
    assert!(!scene.passes(SERVICE));
}

#[test]
fn a_node_that_is_gone_denies_nothing() {
    // Without its node, the address of the API server's endpoint counts as outside.
    let mut scene = Scene::new(Some(""), &[], settings(), &web(&["203.0.113.9:6443"]));
    scene.places = with_ranges(&["203.0.113.9/32"]);
    assert!(scene.passes(SERVICE));
    scene.take(&[&web(&["10.9.0.1:6443"])]);
    scene.places = places();
    assert!(scene.passes(SERVICE));
    // An endpoint that was outside is different.
    scene.take(&[&web(&["203.0.113.8:6443"])]);
    scene.take(&[&web(&["10.9.0.1:6443"])]);
    assert!(!scene.passes(SERVICE));
}

#[test]
fn a_pod_that_is_gone_closes_no_service() {
    let settings = Settings {
        allow_internal: false,
        ..settings()
    };
    // The entry of a pod that is gone is gone, too.
    let mut scene = Scene::new(
        Some("10.1.0.3"),
        &[],
        settings,
        &web(&["10.1.0.2:80", "10.1.0.3:80"]),
    );
    assert!(!scene.passes(SERVICE));
    scene.take(&[&web(&["10.1.0.3:80"])]);
    assert!(scene.passes(SERVICE));
    // Nothing is opened at an address that the Service has not any more.
    scene.take(&[&service("web", "10.96.0.9", &[port(80, &["10.1.0.3:80"])])]);
    assert!(scene.passes("10.96.0.9:80"));
    assert!(!scene.passes(SERVICE));
}

#[test]
fn nothing_else_opens_what_a_service_has_lost() {
    let rules = [
        (TierAction::Allow, "10.1.0.3"),
        (TierAction::Deny, "10.1.0.2"),
        (TierAction::Deny, "10.0.0.0/8"),
    ];
    let with_node_port = |endpoints: &[&str], node_port: u16| {
        let mut service = Service::clone(&web(endpoints));
        service.ports[0].node_port = Some(node_port);
        Arc::new(service)
    };
    let first = with_node_port(&["10.1.0.2:80", "10.1.0.3:80"], 30_080);
    let mut scene = Scene::new(None, &rules, settings(), &first);
    assert!(!scene.passes(SERVICE));
    // The same port with another node port, and another Service of the same address.
    scene.take(&[&with_node_port(&["10.1.0.3:80"], 30_081)]);
    assert!(!scene.passes(SERVICE));
    scene.take(&[&service("other", CLUSTER_IP, &[port(80, &["10.1.0.3:80"])])]);
    assert!(!scene.passes(SERVICE));
    scene.pass_time(MINUTE);
    assert!(scene.passes(SERVICE));
}

/// A Service with endpoints from 10.2.0.0 on, and an external address.
fn wide(name: &str, ip: &str, endpoints: u32) -> Service {
    let endpoints =
        (0..endpoints).map(|number| SocketAddr::from(((0x0a02_0000 + number).to_be_bytes(), 80)));
    let mut of_port = port(80, &[]);
    of_port.endpoints = endpoints.collect();
    let mut service = Service::clone(&service(name, ip, &[of_port]));
    service.external = vec!["198.51.100.7".parse().unwrap()];
    service
}

const WIDE: [&str; 2] = [SERVICE, "198.51.100.7:80"];

#[test]
fn a_service_that_loses_more_than_is_remembered_is_closed_for_a_minute() {
    for endpoints in [10, 600, 9_000] {
        let mut first = wide("web", CLUSTER_IP, endpoints);
        first.ports[0]
            .endpoints
            .push("10.1.0.2:80".parse().unwrap());
        let other = web(&["10.1.0.3:80"]);
        let other = Arc::new(Service {
            name: service("other", "10.96.0.9", &[]).name.clone(),
            cluster: vec!["10.96.0.9".parse().unwrap()],
            ..Service::clone(&other)
        });
        let mut scene = Scene::denying("10.1.0.2", &Arc::new(first));
        scene.take(&[&other]);
        let closed = scene.losses.overflown().closed;
        assert_eq!(closed.len(), usize::from(endpoints > 8_192));
        for to in WIDE {
            assert!(!scene.passes(to), "{to} of {endpoints}");
        }
        assert!(scene.passes("10.96.0.9:80"));
        scene.pass_time(Duration::from_secs(59));
        assert!(!scene.passes(SERVICE));
        assert!(scene.losses.are_due(scene.began + MINUTE));
        scene.pass_time(MINUTE);
        assert!(scene.passes(SERVICE));
        assert_eq!(scene.losses.overflown(), Overflown::default());
        assert!(!scene.losses.are_due(scene.began + 2 * MINUTE));
    }
}

#[test]
fn connections_through_a_deleted_service_with_many_endpoints_end() {
    let bad = "10.1.0.2:80";
    for endpoints in [600, 9_000] {
        let mut first = wide("web", CLUSTER_IP, endpoints);
        first.ports[0].endpoints.push(bad.parse().unwrap());
        let mut scene = Scene::denying("10.1.0.2", &Arc::new(first));
        scene.take(&[]);
        let mut known = Known::default();
        known.update(scene.losses.services(), &scene.places);
        let led = WIDE.map(|to| Led {
            from: "10.1.0.5".parse().unwrap(),
            transport: Transport::Tcp,
            to: to.parse().unwrap(),
            endpoint: bad.parse().unwrap(),
        });
        let connections = Connections::new(&known, &Through::default(), led.into_iter());
        let judged = led.map(|led| (led, Learned::default()));
        let denied = connections.denied(&scene.policy, judged.into_iter());
        assert_eq!(denied, led, "{endpoints}");
    }
}

#[test]
fn an_entry_for_a_closed_service_does_not_open_it() {
    let first = Arc::new(wide("web", CLUSTER_IP, 9_000));
    let mut scene = Scene::new(
        Some("10.96.0.7:80 198.51.100.7:80"),
        &[(TierAction::Deny, "10.1.0.2")],
        settings(),
        &first,
    );
    assert!(scene.passes(SERVICE));
    scene.take(&[&web(&["10.1.0.3:80"])]);
    for to in WIDE {
        assert!(!scene.passes(to), "{to}");
    }
    scene.pass_time(MINUTE);
    for to in WIDE {
        assert!(scene.passes(to), "{to}");
    }
}

#[test]
fn node_ports_of_a_closed_service_are_denied() {
    let mut first = wide("web", CLUSTER_IP, 9_000);
    first.ports[0].node_port = Some(30_080);
    let mut scene = Scene::denying("10.1.0.2", &Arc::new(first));
    assert!(scene.passes("10.9.0.1:30080"));
    scene.take(&[]);
    assert!(!scene.passes("10.9.0.1:30080"));
    assert!(scene.passes("10.9.0.1:30081"));
}

#[test]
fn many_node_ports_of_a_closed_service_leave_those_of_others_open() {
    let mut first = wide("web", CLUSTER_IP, 9_000);
    first.ports.extend((0..200).map(|number| ServicePort {
        node_port: Some(30_000 + 10 * number),
        ..port(100 + number, &["10.1.0.3:80"])
    }));
    let mut other = Service::clone(&service(
        "other",
        "10.96.0.9",
        &[port(80, &["10.1.0.3:80"])],
    ));
    other.name = Arc::new(ServiceName {
        namespace: "other".into(),
        name: "other".into(),
    });
    other.ports[0].node_port = Some(31_015);
    let mut scene = Scene::denying("10.1.0.2", &Arc::new(first));
    scene.take(&[&Arc::new(other)]);
    for to in ["10.9.0.1:30000", "10.9.0.1:31010", "10.9.0.1:31990"] {
        assert!(!scene.passes(to), "{to}");
    }
    assert!(scene.passes("10.9.0.1:31015"));
}

#[test]
fn what_cannot_be_forgotten_does_not_become_ever_more() {
    let first = web(&["10.1.0.2:80"]);
    let mut scene = Scene::denying("10.1.0.2", &first);
    scene.take(&[]);
    for round in 0..40_u32 {
        let services: Vec<Arc<Service>> = (0..1_000)
            .map(|number| {
                let ip = IpAddr::from((0x0a60_8000 | round << 10 | number).to_be_bytes());
                let name = format!("s{round}-{number}");
                service(&name, &ip.to_string(), &[])
            })
            .collect();
        scene.take(&services.iter().collect::<Vec<_>>());
        scene.began += MINUTE / 4;
    }
    assert!(scene.losses.services().names().len() < 16_000);
    // What may still be led to the endpoint is remembered.
    scene.take(&[&first]);
    scene.take(&[]);
    assert!(!scene.passes(SERVICE));
}

#[test]
fn a_closed_service_stays_closed_over_a_restart() {
    let first = wide("web", CLUSTER_IP, 9_000);
    let now = web(&["10.1.0.3:80"]);
    let mut scene = Scene::denying("10.1.0.2", &Arc::new(first));
    scene.take(&[&now]);
    let kept = {
        let mut known = Known::default();
        known.update(scene.losses.services(), &scene.places);
        known.only(&BTreeSet::from([&now.name]))
    };
    scene.losses = Losses::new(Arc::new(kept));
    scene.take(&[&now]);
    assert!(!scene.passes(SERVICE));
    scene.pass_time(MINUTE);
    assert!(scene.passes(SERVICE));
}

#[test]
fn services_of_a_namespace_share_what_is_remembered() {
    let services: Vec<Arc<Service>> = (0..6)
        .map(|number| {
            Arc::new(wide(
                &format!("s{number}"),
                &format!("10.96.1.{number}"),
                8_000,
            ))
        })
        .collect();
    let mut of_another = wide("small", "10.96.2.1", 10);
    of_another.name = Arc::new(ServiceName {
        namespace: "other".into(),
        name: "small".into(),
    });
    let of_another = Arc::new(of_another);
    let mut scene = Scene::denying("10.1.0.2", &of_another);
    scene.take(&services.iter().chain([&of_another]).collect::<Vec<_>>());
    scene.take(&[]);
    let closed = scene.losses.overflown().closed;
    assert_eq!(closed.len(), 2, "{closed:?}");
    assert!(closed.iter().all(|name| &*name.namespace == "shop"));
    assert!(scene.passes("10.96.2.1:80"));
}

#[test]
fn a_service_that_had_more_than_is_known_for_a_moment_is_closed() {
    let good = web(&["10.1.0.3:80"]);
    let mut scene = Scene::denying("10.1.0.2", &good);
    assert!(scene.passes(SERVICE));
    let mut services = Services::new([Arc::clone(&good)], Vec::new());
    services.note_passed(vec![Passed {
        had_more: true,
        ..web(&[]).into()
    }]);
    scene
        .losses
        .take(&Arc::new(services), &scene.places, scene.began);
    assert!(!scene.passes(SERVICE));
    assert!(!scene.passes("10.96.0.7:81"));
    assert!(scene.passes("10.96.0.8:80"));
    scene.pass_time(MINUTE);
    assert!(scene.passes(SERVICE));
}

#[test]
fn what_a_service_had_for_a_moment_counts_as_lost() {
    let good = web(&["10.1.0.3:80"]);
    let mut scene = Scene::denying("10.1.0.2", &good);
    let mut services = Services::new([Arc::clone(&good)], Vec::new());
    services.note_passed(vec![
        web(&["10.1.0.2:80", "10.1.0.3:80"]).into(),
        service("gone", "10.96.0.9", &[port(80, &["10.1.0.2:80"])]).into(),
    ]);
    let services = Arc::new(services);
    scene.losses.take(&services, &scene.places, scene.began);
    for to in [SERVICE, "10.96.0.9:80"] {
        assert!(!scene.passes(to), "{to}");
    }
    // It is there for a moment again.
    let again = Services::new([Arc::clone(&good)], Vec::new());
    let again = Arc::new(Services {
        passed: services.passed.clone(),
        ..again
    });
    let later = scene.began + MINUTE / 2;
    scene.losses.take(&again, &scene.places, later);
    scene.pass_time(MINUTE);
    assert!(!scene.passes(SERVICE));
    let services = again;
    scene.pass_time(2 * MINUTE);
    // The same snapshot again is nothing new.
    scene.losses.take(&services, &scene.places, scene.began);
    for to in [SERVICE, "10.96.0.9:80"] {
        assert!(scene.passes(to), "{to}");
    }
}
