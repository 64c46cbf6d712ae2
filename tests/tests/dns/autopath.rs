//! A resolver that walks the search list itself, as `CoreDNS` does with its plugin `autopath`.
//!
//! `CoreDNS` does not run in the laboratory. The laboratory's server responds and queries upstream as the
//! source of `CoreDNS` does (`plugin/autopath/autopath.go`, `cname.go`; `plugin/kubernetes/autopath.go`): for
//! a name below `<namespace>.svc.<cluster domain>` that does not exist in the cluster, it tries the rest of
//! the search list, and at last queries upstream for the name without its search suffix. It returns the first
//! response that is not NXDOMAIN, behind a CNAME record from the queried name to the name that it found.

use std::sync::{Arc, Mutex};

use egress_tests::{
    Lab, SHORT,
    addresses::{RESOLVER, numbered, server},
    dns::{RecordType, ResponseCode, Send, address, cname},
};

const DOMAIN: &str = "cluster.test";
const SEARCH: &str = "shop.svc.cluster.test";

/// The names that a resolver with autopath has queried upstream.
#[derive(Clone, Debug, Default)]
struct Upstream(Arc<Mutex<Vec<String>>>);

impl Upstream {
    fn asked(&self) -> Vec<String> {
        self.0.lock().expect("no test has panicked").clone()
    }
}

/// Makes the laboratory's resolver walk the search list for names below [`SEARCH`]. The upstream server knows
/// `names`, each with an address.
fn walk_search_lists(lab: &Lab, names: &'static [(&'static str, u8)]) -> Upstream {
    let upstream = Upstream::default();
    let asked_upstream = upstream.clone();
    lab.dns().on(&format!("*.{SEARCH}"), move |asked| {
        let base = asked
            .name
            .strip_suffix(&format!(".{SEARCH}"))
            .expect("a name below the search domain");
        let mut asked_upstream = asked_upstream.0.lock().expect("no test has panicked");
        asked_upstream.push(base.to_owned());
        match names
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(base))
        {
            Some((name, host)) if asked.qtype == RecordType::A => {
                vec![Send::answer(asked, &[cname(name), address(server(*host))])]
            }
            // A response without records gets no alias.
            Some(_) => vec![Send::answer(asked, &[])],
            None => vec![Send::code(asked, ResponseCode::NXDomain)],
        }
    });
    for (name, host) in names {
        lab.dns().addresses(name, &[server(*host)]);
    }
    upstream
}

fn lab(autopath: &str) -> Lab {
    let lab = Lab::builder().config("dns.clusterDomain", DOMAIN);
    match autopath {
        "auto" => lab.build(),
        other => lab.config("dns.autopath", other).build(),
    }
}

const NAMES: &[(&str, u8)] = &[
    ("api.x.test", 10),
    ("evil.test", 66),
    ("secret.evil.test", 67),
];

#[test]
fn a_listed_name_queried_with_its_search_suffix_is_reached() {
    for autopath in ["auto", "on"] {
        let lab = lab(autopath);
        let _web = lab.serve_tcp(443);
        walk_search_lists(&lab, NAMES);
        let pod = lab.pod("shop", "cart");
        lab.write_pod(&pod, &[("allow", "api.x.test:443")]);
        let agent = lab.start_agent(&[&pod]);
        let asked = format!("api.x.test.{SEARCH}");
        assert_eq!(pod.lookup(&asked), [server(10)]);
        pod.talks_tcp((server(10), 443));
        assert_eq!(pod.syn_retransmissions(), 0);
        let denial = agent.denies_tcp(&pod, (server(10), 444), "port_not_allowed");
        assert_eq!(denial.dst_names, ["api.x.test"]);
    }
}

#[test]
fn an_alias_that_is_not_the_queried_name_without_its_suffix_is_not_learned() {
    let lab = lab("auto");
    let _web = lab.serve_tcp(443);
    let dns = lab.dns();
    let to_api = |host| [cname("api.x.test"), address(server(host))];
    // As `CoreDNS` responds for a Service of type `ExternalName`.
    dns.answer(&format!("external.{SEARCH}"), to_api(20));
    dns.answer(&format!("b.api.x.test.{SEARCH}"), to_api(21));
    dns.answer("api.x.test.elsewhere.test", to_api(22));
    let behind = [
        cname("other.test"),
        cname("api.x.test"),
        address(server(23)),
    ];
    dns.answer(&format!("api.x.test.{SEARCH}"), behind);
    let pod = lab.pod("shop", "cart");
    let resolve = ("resolve", "*.elsewhere.test");
    lab.write_pod(&pod, &[("allow", "api.x.test:443"), resolve]);
    let agent = lab.start_agent(&[&pod]);
    for (name, host) in [
        (format!("external.{SEARCH}"), 20),
        (format!("b.api.x.test.{SEARCH}"), 21),
        ("api.x.test.elsewhere.test".to_owned(), 22),
        (format!("api.x.test.{SEARCH}"), 23),
    ] {
        assert_eq!(pod.lookup(&name), [server(host)]);
        agent.denies_tcp(&pod, (server(host), 443), "address_not_learned");
    }
    // None of these responses shows that the resolver walks search lists.
    let name = format!("secret.evil.test.{SEARCH}");
    assert_eq!(
        pod.resolve(&name, RecordType::A).code,
        ResponseCode::NXDomain
    );
    assert_eq!(dns.queries_for(&name), 1);
}

#[test]
fn with_autopath_on_the_name_that_the_resolver_would_query_upstream_is_judged() {
    let lab = lab("on");
    let upstream = walk_search_lists(&lab, NAMES);
    let (guarded, open) = (lab.pod("shop", "guarded"), lab.pod("shop", "open"));
    lab.write_pod(&guarded, &[("allow", "api.x.test:443")]);
    lab.write_pod(&open, &[("deny", "evil.test *.evil.test")]);
    let agent = lab.start_agent(&[&guarded, &open]);
    for (pod, name) in [
        (&guarded, "secret.evil.test"),
        (&guarded, "a.b.c.d.evil.test"),
        (&open, "secret.evil.test"),
        (&open, "evil.test"),
    ] {
        agent.denies_name(pod, &format!("{name}.{SEARCH}"));
    }
    assert_eq!(upstream.asked(), Vec::<String>::new());
    let denied = format!("secret.evil.test.{SEARCH}");
    let denial = agent.wait_denial("the rule", |d| d.is_question(&open, &denied));
    assert_eq!(denial.rule.as_deref(), Some("*.evil.test"));

    // Names that a search list makes of allowed names and of Services are forwarded.
    for name in [
        format!("api.x.test.{SEARCH}"),
        format!("db.{SEARCH}"),
        format!("db-0.db.{SEARCH}"),
        format!("_pg._tcp.db.{SEARCH}"),
        format!("db.shop.svc.{SEARCH}"),
        format!("db-0.db.shop.svc.{SEARCH}"),
        format!("db.shop.svc.{DOMAIN}.{SEARCH}"),
        format!("10-1-0-2.shop.pod.{DOMAIN}"),
        format!("api.x.test.svc.{DOMAIN}"),
        format!("api.x.test.{DOMAIN}"),
        DOMAIN.to_owned(),
    ] {
        assert_forwarded(&lab, &guarded, &name);
    }
    // These are not names of Services, and their public part is not listed.
    for name in [
        format!("secret.evil.test.{DOMAIN}"),
        format!("secret.evil.test.pod.{DOMAIN}"),
        format!("secret.evil.test.{SEARCH}.{SEARCH}"),
    ] {
        agent.denies_name(&guarded, &name);
        assert_eq!(lab.dns().queries_for(&name), 0, "{name}");
    }
}

#[track_caller]
fn assert_forwarded(lab: &Lab, pod: &egress_tests::Pod, name: &str) {
    pod.resolve(name, RecordType::A);
    assert_eq!(lab.dns().queries_for(name), 1, "{name}");
}

#[test]
fn autopath_is_detected_from_the_first_response_that_shows_it() {
    let lab = lab("auto");
    let _web = lab.serve_tcp(443);
    let upstream = walk_search_lists(&lab, NAMES);
    let (cart, other) = (lab.pod("shop", "cart"), lab.pod("shop", "other"));
    lab.write_pod(&cart, &[("allow", "api.x.test:443")]);
    lab.write_pod(&other, &[("deny", "evil.test")]);
    let agent = lab.start_agent(&[&cart, &other]);
    agent.logs_after(
        "that the resolver walks search lists",
        || assert_eq!(cart.lookup(&format!("api.x.test.{SEARCH}")), [server(10)]),
        |line| line.contains("search list"),
    );
    // From then on it applies to all pods.
    agent.denies_name(&cart, &format!("secret.evil.test.{SEARCH}"));
    agent.denies_name(&other, &format!("evil.test.{SEARCH}"));
    assert_eq!(upstream.asked(), ["api.x.test"]);
    let (_, explained) = lab.explain(&cart, &format!("secret.evil.test.{SEARCH}:443"));
    assert_eq!(explained["reason"], "dns_name", "{explained}");
}

#[test]
fn the_first_response_that_shows_autopath_does_not_deliver_a_denied_name() {
    let lab = lab("auto");
    let upstream = walk_search_lists(&lab, NAMES);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("deny", "evil.test")]);
    let agent = lab.start_agent(&[&pod]);
    let name = format!("evil.test.{SEARCH}");
    let answer = pod.try_resolve(RESOLVER, &name, RecordType::A, SHORT);
    assert!(answer.is_none(), "{answer:?}");
    agent.wait_denial("the response", |d| {
        d.is_question(&pod, &name) && d.reason == "dns_name"
    });
    // The library repeats the query.
    agent.denies_name(&pod, &name);
    assert_eq!(upstream.asked(), ["evil.test"]);
}

#[test]
fn with_autopath_off_names_below_the_cluster_domain_are_forwarded() {
    let lab = lab("off");
    let _web = lab.serve_tcp(443);
    let upstream = walk_search_lists(&lab, NAMES);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(&pod, &[("allow", "api.x.test:443")]);
    let agent = lab.start_agent(&[&pod]);
    assert_eq!(pod.lookup(&format!("api.x.test.{SEARCH}")), [server(10)]);
    agent.denies_tcp(&pod, (server(10), 443), "address_not_learned");
    pod.resolve(&format!("secret.evil.test.{SEARCH}"), RecordType::A);
    assert_eq!(upstream.asked(), ["api.x.test", "secret.evil.test"]);
}

#[test]
fn a_search_alias_does_not_lead_to_internal_addresses() {
    let lab = Lab::builder()
        .config("dns.clusterDomain", DOMAIN)
        .config("ranges.internal", vec!["198.18.0.0/15"])
        .config("ranges.allowInternal", false)
        .build();
    let _web = lab.serve_tcp(443);
    let name = format!("api.x.test.{SEARCH}");
    lab.dns()
        .answer(&name, [cname("api.x.test"), address(numbered(1))]);
    let pod = lab.pod("shop", "cart");
    lab.write_pod(
        &pod,
        &[("allow", &format!("api.x.test:443 *.{DOMAIN}:443"))],
    );
    let agent = lab.start_agent(&[&pod]);
    assert_eq!(pod.lookup(&name), [numbered(1)]);
    agent.denies_tcp(&pod, (numbered(1), 443), "internal_answer");
}
