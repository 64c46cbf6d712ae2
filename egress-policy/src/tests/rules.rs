use egress_common::{
    classes::ClassSet,
    protocol::bits,
    records::{POLICY_ALLOW_INTERNAL, POLICY_SPEAKS_OF_NAMES, POLICY_UNREADABLE, PortClass},
};

use super::{compiled, name, question};
use egress_dns::Name;

use crate::{
    Annotations, Mode, Objects, QuestionRule, Settings, prefix::to_mapped, reference::settings,
    unreadable,
};

#[test]
fn five_hundred_names_on_one_port_are_one_class() {
    let list: Vec<String> = (0..500)
        .map(|n| format!("host{n}.example.com:443"))
        .collect();
    let policy = compiled(&[("allow", &list.join(" "))], &[], &settings());
    assert_eq!(
        policy.record.classes[0],
        PortClass {
            port_min: 443,
            port_max: 443,
            protocols: bits::TCP | bits::UDP,
            pad: [0; 3],
        }
    );
    assert_eq!(policy.record.classes[1], PortClass::NONE);
    assert_eq!(policy.record.named, ClassSet::one(0));
    assert_eq!(
        policy.names.classes(&name("host499.example.com")),
        ClassSet::one(0)
    );
    assert_eq!(
        policy.names.classes(&name("host500.example.com")),
        ClassSet::EMPTY
    );
}

#[test]
fn queries_for_a_denied_name_are_refused_whoever_allows_it() {
    let policy = compiled(
        &[
            ("allow", "*.example.com db.cluster.local"),
            ("resolve", "x.example.com"),
        ],
        &[("deny", "x.example.com *.bad.example.com db.cluster.local")],
        &settings(),
    );
    for denied in ["x.example.com", "a.b.bad.example.com", "db.cluster.local"] {
        assert_eq!(question(&policy, denied), QuestionRule::Denied, "{denied}");
        assert_eq!(
            policy.names.classes(&name(denied)),
            ClassSet::EMPTY,
            "{denied}"
        );
    }
    assert_eq!(
        policy
            .names
            .explain_denied(&name("a.bad.example.com"))
            .map(|entry| &*entry.text),
        Some("*.bad.example.com")
    );
    assert_eq!(policy.names.explain_denied(&name("bad.example.com")), None);
    assert_ne!(
        policy.names.classes(&name("bad.example.com")),
        ClassSet::EMPTY
    );
    assert_eq!(policy.record.deny, ClassSet::EMPTY);
}

#[test]
fn names_that_an_entry_could_allow_and_names_of_the_cluster_may_be_queried() {
    let policy = compiled(
        &[("allow", "github.com:443"), ("resolve", "db.net")],
        &[],
        &settings(),
    );
    assert_eq!(question(&policy, "GitHub.com"), QuestionRule::Allowed);
    assert_eq!(question(&policy, "db.net"), QuestionRule::Allowed);
    assert_eq!(policy.names.classes(&name("db.net")), ClassSet::EMPTY);
    assert_eq!(
        question(&policy, "kubernetes.default.svc.cluster.local"),
        QuestionRule::Allowed
    );
    assert_eq!(question(&policy, "api.github.com"), QuestionRule::NotListed);
    assert_eq!(
        question(&policy, "github.com.cluster.localx"),
        QuestionRule::NotListed
    );
}

#[test]
fn open_pods_and_those_that_may_go_anywhere_may_query_any_name() {
    for pod in [("allow", "*:443"), ("deny", "192.0.2.1"), ("resolve", "*")] {
        let policy = compiled(&[pod, ("mode", "enforce")], &[], &settings());
        assert_eq!(
            question(&policy, "any.example"),
            QuestionRule::Allowed,
            "{pod:?}"
        );
    }
    let unguarded = Settings {
        guard: false,
        ..settings()
    };
    let policy = compiled(&[("allow", "a.com"), ("deny", "b.com")], &[], &unguarded);
    assert_eq!(question(&policy, "any.example"), QuestionRule::Allowed);
    assert_eq!(question(&policy, "b.com"), QuestionRule::Denied);
}

#[test]
fn a_pod_that_is_denied_everything_cannot_carry_data_out_in_queries() {
    let policy = compiled(&[("deny", "*")], &[("allow", "*")], &settings());
    assert_eq!(
        question(&policy, "secret.evil.example"),
        QuestionRule::NotListed
    );
    assert_eq!(
        policy.record.classes[policy.record.deny.first() as usize].protocols,
        bits::ALL
    );
    let ports = compiled(&[("deny", "*:25")], &[], &settings());
    assert_eq!(question(&ports, "mail.example"), QuestionRule::Allowed);
}

#[test]
fn the_default_protocols_of_an_entry_depend_on_its_list() {
    let protocols = |list: &str, entry: &str| {
        let policy = compiled(&[(list, entry)], &[], &settings());
        assert_eq!(policy.record.classes[1], PortClass::NONE);
        policy.record.classes[0].protocols
    };
    assert_eq!(
        protocols("allow", "192.0.2.1"),
        bits::TCP | bits::UDP | bits::ICMP_ECHO
    );
    assert_eq!(protocols("allow", "192.0.2.1:80"), bits::TCP | bits::UDP);
    assert_eq!(
        protocols("allow", "192.0.2.1/icmp"),
        bits::ICMP_ECHO | bits::ICMP_OTHER
    );
    assert_eq!(protocols("allow", "192.0.2.1/sctp"), bits::SCTP);
    assert_eq!(protocols("deny", "192.0.2.1"), bits::ALL);
    assert_eq!(protocols("deny", "192.0.2.1:80"), bits::TCP | bits::UDP);
}

#[test]
fn a_denial_is_explained_by_its_most_specific_entry() {
    let policy = compiled(
        &[("deny", "* 192.0.2.0/24 192.0.2.7 198.51.100.0/24:25")],
        &[],
        &settings(),
    );
    let explain = |address: [u8; 4], class| {
        let entry = policy.deciding_entry(&to_mapped(address.into()), class)?;
        Some(entry.text.to_string())
    };
    let everything = policy.record.any.first();
    assert_eq!(
        explain([192, 0, 2, 7], everything).as_deref(),
        Some("192.0.2.7")
    );
    assert_eq!(
        explain([192, 0, 2, 8], everything).as_deref(),
        Some("192.0.2.0/24")
    );
    assert_eq!(explain([203, 0, 113, 1], everything).as_deref(), Some("*"));
    let mail = policy.record.deny.without(policy.record.any).first();
    assert_eq!(
        explain([198, 51, 100, 1], mail).as_deref(),
        Some("198.51.100.0/24:25")
    );
    assert_eq!(explain([203, 0, 113, 1], mail), None);
}

#[test]
fn an_unreadable_policy_denies_everything_external_with_a_reason_of_its_own() {
    let none = Annotations::default();
    let policy = unreadable(&none, &none, &Objects::default(), &settings());
    assert_eq!(policy.mode, Mode::Enforce);
    assert_eq!(
        policy.record.flags,
        POLICY_UNREADABLE | POLICY_ALLOW_INTERNAL | POLICY_SPEAKS_OF_NAMES
    );
    assert_eq!(question(&policy, "a.com"), QuestionRule::NotListed);
    assert_eq!(
        question(&policy, "a.svc.cluster.local"),
        QuestionRule::Allowed
    );
}

#[test]
fn a_label_with_a_dot_inside_is_not_two_labels() {
    let policy = compiled(
        &[("allow", "github.com *.example.com api-*.test.com")],
        &[],
        &settings(),
    );
    for labels in [
        [b"github.com".as_slice()].as_slice(),
        &[b"a.example", b"com"],
        &[b"api-x.test", b"com"],
    ] {
        let name = Name::from_labels(labels.iter().copied()).unwrap();
        assert_eq!(
            policy.names.question(&name, false),
            QuestionRule::NotListed,
            "{name}"
        );
    }
}

#[test]
fn a_protocol_without_ports_is_identified_by_its_number() {
    let class = |entry| {
        compiled(&[("allow", entry)], &[], &settings())
            .record
            .classes[0]
    };
    for (entry, number) in [
        ("192.0.2.1/esp", 50),
        ("192.0.2.1/ip-50", 50),
        ("192.0.2.1/GRE", 47),
        ("192.0.2.1/ip-89", 89),
    ] {
        let class = class(entry);
        assert_eq!(class.protocols, bits::OTHER, "{entry}");
        assert_eq!(
            (class.port_min, class.port_max),
            (number, number),
            "{entry}"
        );
    }
    assert_eq!(class("192.0.2.1/ip-6"), class("192.0.2.1/tcp"));
    assert_eq!(class("192.0.2.1/any").protocols, bits::ALL);
    let warnings = compiled(&[("allow", "192.0.2.1/ip-44")], &[], &settings()).warnings;
    assert_eq!(
        warnings,
        [
            "the pod's entry `192.0.2.1/ip-44` matches nothing: 44 is an IPv6 extension header, and \
          the packet's protocol follows after it"
        ]
    );
}

#[test]
fn an_entry_that_opens_tunnels_says_so() {
    let warnings = |key, list| compiled(&[(key, list)], &[], &settings()).warnings;
    let opens = |text: &str, what: &str| {
        format!(
            "the pod's allow entry `{text}` opens {what}: who unpacks it may send what is in it to anywhere, \
             and no policy judges that"
        )
    };
    let not_inside =
        ". To internal addresses and the node it opens none: that takes an entry with the address";
    for (text, what) in [
        ("192.0.2.1/gre", "a tunnel (gre)"),
        ("192.0.2.0/24/esp", "a tunnel (esp)"),
        ("192.0.2.1/ip-50", "a tunnel (esp)"),
        ("192.0.2.1/ip-97", "a tunnel (ip-97)"),
        ("192.0.2.1/any", "tunnels (gre, esp, ipip and others)"),
    ] {
        assert_eq!(warnings("allow", text), [opens(text, what)]);
    }
    for (text, what) in [
        ("*/any", "tunnels (gre, esp, ipip and others)"),
        ("*/ipip", "a tunnel (ipip)"),
        ("vpn.example.com/esp", "a tunnel (esp)"),
    ] {
        let expected = opens(text, what) + not_inside;
        assert_eq!(warnings("allow", text), [expected]);
    }
    for text in [
        "192.0.2.1",
        "*",
        "192.0.2.1/ip-89",
        "192.0.2.1/icmp",
        "192.0.2.1/udp",
    ] {
        assert_eq!(warnings("allow", text), [""; 0], "{text}");
    }
    assert_eq!(warnings("deny", "192.0.2.1/gre"), [""; 0]);
}

#[test]
fn a_star_before_a_name_is_not_a_suffix() {
    let warnings = |list| compiled(&[("allow", list)], &[], &settings()).warnings;
    assert_eq!(
        warnings("*example.com:443"),
        [
            "the pod's entry `*example.com:443` is not a suffix: it matches `example.com` and, with anything \
             before it in the same label, names such as `xexample.com`; for the names below \
             `example.com` write `*.example.com`"
        ]
    );
    for list in [
        "*.example.com",
        "api-*.example.com",
        "*-api-*.example.com",
        "*",
    ] {
        assert!(warnings(list).is_empty(), "{list}");
    }
}

#[test]
fn entries_with_a_surprising_meaning_cause_a_warning() {
    let warning = |list| {
        let warnings = compiled(&[("allow", list)], &[], &settings()).warnings;
        assert!(warnings.len() <= 1, "{warnings:?}");
        warnings.into_iter().next().unwrap_or_default()
    };
    assert!(warning("-x.com").contains("is not a host name: `-x` begins or ends with `-`"));
    assert!(warning("*.com:443").contains("where anybody can register one"));
    assert!(warning("2001:db8::7:443").contains("write `[2001:db8::7]:443`"));
    for list in [
        "*.example.com",
        "x-y.com",
        "[2001:db8::7]:443",
        "2001:db8::7",
        "2001:db8::/32",
    ] {
        assert_eq!(warning(list), "", "{list}");
    }
}
