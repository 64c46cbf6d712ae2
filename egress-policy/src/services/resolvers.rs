//! Resolvers whose address a Service claims.
//!
//! Who writes a Service may choose its external addresses, also that of a resolver. The node then sends queries to the
//! Service's endpoints, which could give any address to an allowed name.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{Service, ServiceName, Services, Transport, closed::unknown_endpoint};
use crate::Resolver;

/// A Service that has the address and port of a resolver among its external ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The Service.
    pub service: Arc<ServiceName>,
    /// An endpoint of it that is no resolver.
    pub endpoint: SocketAddr,
}

impl Services {
    /// The claimed ones of these resolvers. A Service whose endpoints are all among the resolvers claims none, such as a
    /// second Service of the cluster's DNS. Of several Services the first by name is returned.
    pub fn claims(&self, resolvers: &[Resolver]) -> BTreeMap<Resolver, Claim> {
        claims(self.all(), resolvers)
    }

    /// The resolvers that Services claimed for a moment. (The Service of the cluster's DNS claims none: its endpoints of
    /// before were resolvers.)
    ///
    /// A Service that had more ports or endpoints than are known claims each resolver whose address it had. One that had
    /// more addresses than are known claims all of them.
    pub fn passed_claims(&self, resolvers: &[Resolver]) -> BTreeMap<Resolver, Claim> {
        let is_resolver = |ip: &IpAddr| resolvers.iter().any(|resolver| resolver.address == *ip);
        let passed = self.passed.iter();
        let others: Vec<_> = passed
            .filter(|passed| !passed.service.cluster.iter().any(is_resolver))
            .collect();
        let mut found = claims(others.iter().map(|passed| &passed.service), resolvers);
        let unsure = others.iter();
        for passed in unsure.filter(|passed| passed.had_more || passed.had_more_addresses) {
            let external: HashSet<&IpAddr> = passed.service.external.iter().collect();
            for resolver in resolvers {
                if passed.had_more_addresses || external.contains(&resolver.address) {
                    found.entry(*resolver).or_insert_with(|| Claim {
                        service: Arc::clone(&passed.service.name),
                        endpoint: unknown_endpoint(resolver.address),
                    });
                }
            }
        }
        found
    }
}

fn claims<'a>(
    services: impl Iterator<Item = &'a Arc<Service>>,
    resolvers: &[Resolver],
) -> BTreeMap<Resolver, Claim> {
    let mut ports_of: HashMap<_, Vec<u16>> = HashMap::new();
    for resolver in resolvers {
        ports_of
            .entry(resolver.address)
            .or_default()
            .push(resolver.port);
    }
    let is_resolver = |endpoint: &&SocketAddr| {
        let ports = ports_of.get(&endpoint.ip());
        ports.is_some_and(|ports| ports.contains(&endpoint.port()))
    };
    let mut claims = BTreeMap::new();
    for service in services {
        for &address in &service.external {
            let Some(ports) = ports_of.get(&address) else {
                continue;
            };
            let claiming = service
                .ports
                .iter()
                .filter(|port| ports.contains(&port.port) && port.transport != Transport::Sctp);
            for port in claiming {
                let of_family = |at: &&SocketAddr| at.is_ipv4() == address.is_ipv4();
                let mut endpoints = port.endpoints.iter().filter(of_family);
                let other = endpoints.find(|endpoint| !is_resolver(endpoint)).copied();
                let unknown = service.has_more.then(|| unknown_endpoint(address));
                let Some(endpoint) = other.or(unknown) else {
                    continue;
                };
                let resolver = Resolver {
                    address,
                    port: port.port,
                };
                claims.entry(resolver).or_insert_with(|| Claim {
                    service: Arc::clone(&service.name),
                    endpoint,
                });
            }
        }
    }
    claims
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::ServicePort;

    const DNS: &str = "10.96.0.10";

    fn resolvers() -> Vec<Resolver> {
        let all = [DNS, "10.1.0.2", "10.1.0.3:5353", "192.0.2.53", "fd96::a"];
        all.map(|text| text.parse().unwrap()).into()
    }

    fn service(external: &str, transport: Transport, port: u16, endpoints: &[&str]) -> Services {
        let endpoints = endpoints.iter().map(|endpoint| endpoint.parse().unwrap());
        let service = Service {
            name: Arc::new(ServiceName {
                namespace: "team".into(),
                name: "dns".into(),
            }),
            cluster: vec!["10.96.3.3".parse().unwrap()],
            external: vec![external.parse().unwrap()],
            ports: vec![ServicePort {
                transport,
                port,
                node_port: None,
                endpoints: endpoints.collect(),
            }],
            has_more: false,
        };
        Services::new([Arc::new(service)], Vec::new())
    }

    #[test]
    fn a_service_with_a_resolvers_address_claims_it() {
        for transport in [Transport::Udp, Transport::Tcp] {
            for address in [DNS, "192.0.2.53"] {
                let endpoints = ["10.1.0.2:53", "10.1.9.9:53"];
                let claims = service(address, transport, 53, &endpoints).claims(&resolvers());
                let [(resolver, claim)] = &claims.into_iter().collect::<Vec<_>>()[..] else {
                    panic!("{address} is claimed");
                };
                assert_eq!(resolver.to_string(), address);
                assert_eq!(claim.service.to_string(), "team/dns");
                assert_eq!(claim.endpoint.to_string(), "10.1.9.9:53");
            }
        }
    }

    #[test]
    fn a_service_that_leads_to_resolvers_claims_nothing() {
        let endpoints = ["10.1.0.2:53", "10.1.0.3:5353"];
        let services = service(DNS, Transport::Udp, 53, &endpoints);
        assert_eq!(services.claims(&resolvers()), BTreeMap::new());
    }

    #[test]
    fn another_port_address_or_family_claims_nothing() {
        let endpoints = ["10.1.9.9:53"];
        for (address, transport, port) in [
            (DNS, Transport::Udp, 443),
            (DNS, Transport::Sctp, 53),
            ("fd96::a", Transport::Udp, 53),
            ("10.1.0.3", Transport::Udp, 53),
            ("192.0.2.54", Transport::Udp, 53),
        ] {
            let services = service(address, transport, port, &endpoints);
            assert_eq!(services.claims(&resolvers()), BTreeMap::new());
        }
    }

    #[test]
    fn a_service_without_endpoints_claims_nothing() {
        let services = service(DNS, Transport::Udp, 53, &[]);
        assert_eq!(services.claims(&resolvers()), BTreeMap::new());
    }

    #[test]
    fn a_service_with_more_endpoints_than_are_known_claims() {
        let service = service("192.0.2.53", Transport::Udp, 53, &[]);
        let mut large = Service::clone(service.all().next().expect("a Service"));
        large.has_more = true;
        let claims = Services::new([Arc::new(large)], Vec::new()).claims(&resolvers());
        let claimed = claims.keys().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(claimed, ["192.0.2.53"]);
    }

    #[test]
    fn a_service_that_had_more_than_is_known_claims_what_it_may_have_claimed() {
        let claimed = |external: &str, had_more: bool, had_more_addresses: bool| {
            let service = service(external, Transport::Udp, 443, &["10.1.9.9:53"]);
            let service = service.all().next().expect("a Service");
            let mut services = Services::default();
            services.note_passed(vec![crate::services::Passed {
                service: Arc::clone(service),
                had_more,
                had_more_addresses,
            }]);
            let claims = services.passed_claims(&resolvers()).into_keys();
            claims
                .map(|resolver| resolver.address.to_string())
                .collect::<Vec<_>>()
        };
        assert!(claimed("192.0.2.53", false, false).is_empty());
        assert_eq!(claimed("192.0.2.53", true, false), ["192.0.2.53"]);
        assert!(claimed("192.0.2.54", true, false).is_empty());
        assert_eq!(claimed("192.0.2.54", false, true).len(), resolvers().len());
    }
}
