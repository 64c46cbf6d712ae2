//! What the `Sidecar` objects of Istio let pods reach.

use std::fmt::Write as _;

use proptest::prelude::*;

use crate::{
    Block, addresses, block, imported_in_part,
    names::{matches, names, pattern},
    written::{Packet, Written},
};

const NAMESPACES: [&str; 2] = ["m", "n"];

/// A `ServiceEntry`.
#[derive(Clone, Debug)]
struct Service {
    namespace: usize,
    hosts: Vec<String>,
    addresses: Vec<Block>,
    ports: Vec<u16>,
    protocol: &'static str,
    location: &'static str,
    /// A field of another release, which may restrict it.
    extra: bool,
    export_to: Vec<&'static str>,
}

impl Service {
    fn text(&self, name: usize) -> String {
        let addresses: Vec<String> = self.addresses.iter().map(|block| block.text()).collect();
        let ports: Vec<String> = self
            .ports
            .iter()
            .map(|port| format!("{{number: {port}, protocol: {}}}", self.protocol))
            .collect();
        let extra = if self.extra { "\n  restrict: x" } else { "" };
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: s{name}, namespace: {}}}\n\
             spec:\n  hosts: ['{}']\n  addresses: [{}]\n  ports: [{}]\n  location: {}\n  exportTo: ['{}']{extra}\n",
            NAMESPACES[self.namespace],
            self.hosts.join("', '"),
            addresses.join(", "),
            ports.join(", "),
            self.location,
            self.export_to.join("', '"),
        )
    }

    fn is_visible_in(&self, namespace: usize) -> bool {
        self.export_to.iter().any(|to| match *to {
            "*" => true,
            "." => self.namespace == namespace,
            other => other == NAMESPACES[namespace],
        })
    }
}

/// A host of a `Sidecar`: a namespace, or `*`, `.` or `~`, and a name, a wildcard or `*`.
#[derive(Clone, Debug)]
struct Host {
    from: &'static str,
    name: String,
}

impl Host {
    /// Whether it selects a host of a `ServiceEntry` of a namespace: every name of that host is one of its own.
    fn selects(&self, service: &Service, host: &str, namespace: usize) -> bool {
        let is_from = match self.from {
            "*" => true,
            "." => service.namespace == namespace,
            "~" => false,
            other => other == NAMESPACES[service.namespace],
        };
        let end = self.name.strip_prefix('*');
        is_from
            && (self.name == host
                || end.is_some_and(|end| host.strip_prefix('*').unwrap_or(host).ends_with(end)))
    }
}

/// A `Sidecar`.
#[derive(Clone, Debug)]
struct Sidecar {
    namespace: usize,
    /// The labels of the selector; none select every pod of the namespace.
    labels: Vec<(&'static str, &'static str)>,
    mode: &'static str,
    /// The hosts of each listener, and whether the listener is for one port.
    listeners: Vec<(Vec<Host>, bool)>,
}

impl Sidecar {
    fn text(&self, name: usize) -> String {
        let mut text = format!(
            "---\napiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{name: c{name}, namespace: {}}}\nspec:\n",
            NAMESPACES[self.namespace]
        );
        if !self.labels.is_empty() {
            let labels: Vec<String> = self
                .labels
                .iter()
                .map(|(key, value)| format!("{key}: {value}"))
                .collect();
            let _ = writeln!(
                text,
                "  workloadSelector: {{labels: {{{}}}}}",
                labels.join(", ")
            );
        }
        let _ = writeln!(
            text,
            "  outboundTrafficPolicy: {{mode: {}}}\n  egress:",
            self.mode
        );
        for (hosts, has_port) in &self.listeners {
            let hosts: Vec<String> = hosts
                .iter()
                .map(|host| format!("'{}/{}'", host.from, host.name))
                .collect();
            let _ = writeln!(text, "  - hosts: [{}]", hosts.join(", "));
            if *has_port {
                text.push_str("    port: {number: 80, protocol: HTTP}\n");
            }
        }
        text
    }

    fn selects(&self, pod: &Pod) -> bool {
        self.namespace == pod.namespace
            && self.labels.iter().all(|label| pod.labels.contains(label))
    }

    /// Whether the pods reach a destination that the services of the registry have. Packets of a listener for one port
    /// may not come to it, so what only such a listener opens is not counted.
    fn opens(&self, services: &[Service], has: impl Fn(&Service, &str) -> bool, port: u16) -> bool {
        services
            .iter()
            .filter(|service| {
                service.location == "MESH_EXTERNAL"
                    && service.protocol != "UDP"
                    && service.ports.contains(&port)
                    && service.is_visible_in(self.namespace)
                    && !service.extra
            })
            .any(|service| {
                service.hosts.iter().any(|host| {
                    let listed = self.listeners.iter().filter(|(_, has_port)| !has_port);
                    has(service, host)
                        && listed
                            .flat_map(|(hosts, _)| hosts)
                            .any(|listed| listed.selects(service, host, self.namespace))
                })
            })
    }
}

/// A pod.
#[derive(Clone, Debug)]
struct Pod {
    namespace: usize,
    labels: Vec<(&'static str, &'static str)>,
}

fn service() -> impl Strategy<Value = Service> {
    (
        0..2_usize,
        prop::collection::vec(pattern(), 1..3),
        prop::collection::vec(block(), 0..2),
        prop::collection::vec(1_u16..4, 0..3),
        prop::sample::select(vec!["TLS", "TCP", "HTTP", "UDP"]),
        prop::sample::select(vec![
            "MESH_EXTERNAL",
            "MESH_EXTERNAL",
            "MESH_EXTERNAL",
            "MESH_INTERNAL",
        ]),
        prop::bool::weighted(0.1),
        prop::collection::vec(prop::sample::select(vec!["*", "*", ".", "m", "n"]), 1..3),
    )
        .prop_map(
            |(namespace, hosts, addresses, ports, protocol, location, extra, export_to)| Service {
                namespace,
                hosts,
                addresses,
                ports,
                protocol,
                location,
                extra,
                export_to,
            },
        )
}

fn labels() -> impl Strategy<Value = Vec<(&'static str, &'static str)>> {
    let label = |key, values: [&'static str; 2]| {
        prop::option::of(prop::sample::select(values.to_vec()).prop_map(move |value| (key, value)))
    };
    (label("app", ["a", "b"]), label("tier", ["x", "y"]))
        .prop_map(|(app, tier)| app.into_iter().chain(tier).collect())
}

fn sidecar() -> impl Strategy<Value = Sidecar> {
    let host = (
        prop::sample::select(vec!["*", ".", "m", "n", "~"]),
        prop_oneof![2 => Just("*".to_owned()), 3 => pattern()],
    )
        .prop_map(|(from, name)| Host { from, name });
    (
        0..2_usize,
        labels(),
        prop::sample::select(vec!["REGISTRY_ONLY", "REGISTRY_ONLY", "ALLOW_ANY"]),
        prop::collection::vec(
            (prop::collection::vec(host, 1..4), prop::bool::weighted(0.2)),
            0..3,
        ),
    )
        .prop_map(|(namespace, labels, mode, listeners)| Sidecar {
            namespace,
            labels,
            mode,
            listeners,
        })
}

/// The `Sidecar` that counts for a pod: one with a selector before one without. Of several with a selector, or without
/// one, Istio does not say which counts.
fn counts<'a>(sidecars: &'a [Sidecar], pod: &Pod) -> Vec<&'a Sidecar> {
    let selecting = |has_labels: bool| {
        let sidecars = sidecars.iter().filter(|sidecar| sidecar.selects(pod));
        sidecars
            .filter(|sidecar| sidecar.labels.is_empty() != has_labels)
            .collect::<Vec<_>>()
    };
    let with_labels = selecting(true);
    if with_labels.is_empty() {
        selecting(false)
    } else {
        with_labels
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn hosts_of_sidecars(
        services in prop::collection::vec(service(), 1..5),
        sidecars in prop::collection::vec(sidecar(), 1..4),
        (of, more) in (any::<prop::sample::Index>(), labels()),
        addresses in addresses(),
        names in names(),
        port in 1_u16..4,
    ) {
        let services_text = services.iter().enumerate().map(|(i, service)| service.text(i));
        let sidecars_text = sidecars.iter().enumerate().map(|(i, sidecar)| sidecar.text(i));
        let text: String = services_text.chain(sidecars_text).collect();
        // A pod that one of them selects.
        let of = of.get(&sidecars);
        let more = more.into_iter().filter(|(key, _)| !of.labels.iter().any(|(own, _)| own == key));
        let pod = Pod { namespace: of.namespace, labels: of.labels.iter().copied().chain(more).collect() };
        let counting = counts(&sidecars, &pod);
        // Without one that restricts it, the pod reaches everything.
        if counting.iter().all(|sidecar| sidecar.mode == "ALLOW_ANY") {
            return Ok(());
        }
        let (_, findings) = imported_in_part(&text);
        if counting.len() > 1 {
            let about_several = |text: &str| text.contains("does not say which of them counts");
            prop_assert!(findings.iter().any(|finding| about_several(&finding.text)), "{:?}\n{}", findings, text);
            return Ok(());
        }
        let yaml = imported_yaml(&text);
        let written = Written::of_pod(&yaml, NAMESPACES[pod.namespace], &pod.labels);
        for name in &names {
            let has = |_: &Service, host: &str| matches(host, name, 1..=usize::MAX);
            let theirs = counting[0].opens(&services, has, port);
            let ours = written.allows(&Packet::to_name(name, port));
            prop_assert!(theirs || !ours, "{} {} of {:?}\n{}\n{}", name, port, pod, text, yaml);
            prop_assert!(ours || !theirs || !findings.is_empty(), "{} {} of {:?}\n{}", name, port, pod, text);
        }
        for address in &addresses {
            let has = |service: &Service, _: &str| service.addresses.iter().any(|block| block.contains(*address));
            let theirs = counting[0].opens(&services, has, port);
            let ours = written.allows(&Packet::to(*address, port));
            prop_assert!(theirs || !ours, "{} {} of {:?}\n{}\n{}", address, port, pod, text, yaml);
            prop_assert!(ours || !theirs || !findings.is_empty(), "{} {} of {:?}\n{}", address, port, pod, text);
        }
    }
}

fn imported_yaml(text: &str) -> String {
    let input = egress_import::Input {
        name: "random.yaml".to_owned(),
        text: text.to_owned(),
    };
    egress_import::import(&[input], &egress_import::Options::default()).yaml
}
