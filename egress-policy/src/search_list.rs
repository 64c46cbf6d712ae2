//! Names below a search suffix, for resolvers that walk search lists themselves.
//!
//! `CoreDNS`'s plugin `autopath` receives a query for a name below the first search suffix,
//! `<namespace>.svc.<cluster domain>`. It removes that suffix and queries the rest with each of the other
//! suffixes, and at last alone. So the servers of a public zone learn the name.

use egress_dns::Name;

/// Whether resolvers walk search lists, as `CoreDNS` does with its plugin `autopath`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Autopath {
    /// Yes, from the first response on that shows it.
    Auto,
    /// Yes.
    On,
    /// No.
    Off,
}

/// The form of a name below the cluster domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Form {
    /// Whether Services and Pods have names of this form. Also true if the part before the search suffix has
    /// the form: queried alone, it ends in the label `svc` or `pod`, which no public zone has.
    pub(super) is_own: bool,
    /// The part before the search suffix.
    pub(super) public: Option<Name>,
}

impl Form {
    /// The form of a name at or below the cluster domain; `None` for others.
    pub(super) fn of(name: &Name, cluster_domain: &Name) -> Option<Self> {
        if !name.is_within(cluster_domain) {
            return None;
        }
        let labels: Vec<&[u8]> = name.labels().collect();
        let below = &labels[..labels.len() - cluster_domain.labels().count()];
        let public = match below {
            [] | [b"svc"] | [_, b"svc"] => &[],
            // The part before the namespace.
            [public @ .., _, b"svc"] => public,
            all => all,
        };
        Some(Self {
            is_own: is_own(below) || is_own(public),
            public: Name::from_labels(public.iter().copied())
                .ok()
                .filter(|name| !name.as_wire().is_empty()),
        })
    }
}

/// Whether Services and Pods have names with these labels before the cluster domain
/// (<https://github.com/kubernetes/dns/blob/master/docs/specification.md>), or there is only one label, which
/// alone would be a public top-level domain.
fn is_own(below: &[&[u8]]) -> bool {
    match below {
        [] | [_] => true,
        // A namespace; a Service; one of its endpoints; one of its ports.
        [before @ .., b"svc"] => match before {
            [port, protocol, _, _] => port.starts_with(b"_") && protocol.starts_with(b"_"),
            others => others.len() <= 3,
        },
        // A namespace; a Pod, by its address.
        [before @ .., b"pod"] => before.len() <= 2,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exact_name;

    #[test]
    fn names_of_services_and_pods_are_distinguished_from_others() {
        let domain = exact_name("cluster.local").unwrap();
        let form = |text: &str| {
            let form = Form::of(&exact_name(text).unwrap(), &domain)?;
            Some((form.is_own, form.public.map(|name| name.to_string())))
        };
        let public = |text: &str| Some(text.to_owned());
        for (name, expected) in [
            ("cluster.local", (true, None)),
            ("svc.cluster.local", (true, None)),
            ("shop.svc.cluster.local", (true, None)),
            ("db.shop.svc.cluster.local", (true, public("db"))),
            ("db-0.db.shop.svc.cluster.local", (true, public("db-0.db"))),
            (
                "_pg._tcp.db.shop.svc.cluster.local",
                (true, public("_pg._tcp.db")),
            ),
            (
                "10-1-0-2.shop.pod.cluster.local",
                (true, public("10-1-0-2.shop.pod")),
            ),
            ("dns-version.cluster.local", (true, public("dns-version"))),
            (
                "db.shop.svc.shop.svc.cluster.local",
                (true, public("db.shop.svc")),
            ),
            (
                "a.evil.test.shop.svc.cluster.local",
                (false, public("a.evil.test")),
            ),
            (
                "_a.b.evil.test.shop.svc.cluster.local",
                (false, public("_a.b.evil.test")),
            ),
            ("evil.test.cluster.local", (false, public("evil.test"))),
            ("a.b.c.pod.cluster.local", (false, public("a.b.c.pod"))),
        ] {
            assert_eq!(form(name), Some(expected), "{name}");
        }
        assert_eq!(form("evil.test"), None);
        assert_eq!(form("mycluster.local"), None);
    }
}
