use super::*;
use crate::pattern::{LabelGlobs, NamePattern};
use egress_dns::Name;

fn entry(text: &str) -> Entry {
    match read_entry(text) {
        Ok(entry) => entry,
        Err(error) => panic!("{text}: {error:?}"),
    }
}

fn name(text: &str) -> Name {
    Name::from_labels(text.split('.').map(str::as_bytes)).unwrap()
}

fn exactly(text: &str) -> Destination {
    Destination::Names(NamePattern::Exactly(name(text)))
}

fn addresses(text: &str) -> Destination {
    Destination::Addresses(Prefix::parse(text).unwrap())
}

fn plain(destination: Destination) -> Entry {
    Entry {
        destination,
        ports: None,
        protocol: None,
    }
}

fn error(text: &str) -> String {
    let EntryError { at, found, message } = read_entry(text).unwrap_err();
    assert!(
        text[at..].starts_with(&found),
        "{text}: `{found}` is not at {at}"
    );
    format!("{at} `{found}` {message}")
}

#[test]
fn an_entry_has_a_destination_ports_and_a_protocol() {
    let ports = |min, max| Some(Ports { min, max });
    for (text, destination, ports, protocol) in [
        ("github.com", exactly("github.com"), None, None),
        (
            "github.com:443",
            exactly("github.com"),
            ports(443, 443),
            None,
        ),
        (
            "github.com:22/tcp",
            exactly("github.com"),
            ports(22, 22),
            Some(Protocol::Tcp),
        ),
        (
            "github.com/UDP",
            exactly("github.com"),
            None,
            Some(Protocol::Udp),
        ),
        (
            "github.com/icmp",
            exactly("github.com"),
            None,
            Some(Protocol::Icmp),
        ),
        ("*:443", Destination::Any, ports(443, 443), None),
        ("*", Destination::Any, None, None),
        (
            "203.0.113.7:22/tcp",
            addresses("203.0.113.7"),
            ports(22, 22),
            Some(Protocol::Tcp),
        ),
        (
            "203.0.113.7/tcp",
            addresses("203.0.113.7"),
            None,
            Some(Protocol::Tcp),
        ),
        (
            "10.20.0.0/16:5432",
            addresses("10.20.0.0/16"),
            ports(5432, 5432),
            None,
        ),
        (
            "10.20.0.0/16/sctp",
            addresses("10.20.0.0/16"),
            None,
            Some(Protocol::Sctp),
        ),
        (
            "10.0.0.0/8:1-9/udp",
            addresses("10.0.0.0/8"),
            ports(1, 9),
            Some(Protocol::Udp),
        ),
        ("0.0.0.0/0", addresses("0.0.0.0/0"), None, None),
        ("::/0", addresses("::/0"), None, None),
        ("2001:db8::7", addresses("2001:db8::7"), None, None),
        (
            "2001:db8::/32/tcp",
            addresses("2001:db8::/32"),
            None,
            Some(Protocol::Tcp),
        ),
        ("[2001:db8::7]", addresses("2001:db8::7"), None, None),
        (
            "[2001:db8::7]:8000-8100/udp",
            addresses("2001:db8::7"),
            ports(8000, 8100),
            Some(Protocol::Udp),
        ),
        (
            "[2001:db8::/32]:443",
            addresses("2001:db8::/32"),
            ports(443, 443),
            None,
        ),
        (
            "[2001:db8::]/32:443",
            addresses("2001:db8::/32"),
            ports(443, 443),
            None,
        ),
        (
            "[2001:db8::7]/tcp",
            addresses("2001:db8::7"),
            None,
            Some(Protocol::Tcp),
        ),
    ] {
        assert_eq!(
            entry(text),
            Entry {
                destination,
                ports,
                protocol
            },
            "{text}"
        );
    }
}

#[test]
fn names_are_equal_regardless_of_case_trailing_dot_and_idna_spelling() {
    assert_eq!(entry("GitHub.COM."), entry("github.com"));
    assert_eq!(entry("bücher.example"), entry("xn--bcher-kva.example"));
    assert_eq!(
        entry("*.BÜCHER.example:80"),
        entry("*.xn--bcher-kva.example:80")
    );
    assert_eq!(entry("bücher。example"), entry("xn--bcher-kva.example"));
    assert_eq!(
        entry("_dmarc.my_host.example"),
        plain(exactly("_dmarc.my_host.example"))
    );
    assert_eq!(entry("localhost"), plain(exactly("localhost")));
}

#[test]
fn stars_stand_for_labels_or_parts_of_a_label() {
    let below = Destination::Names(NamePattern::Below(name("example.com")));
    assert_eq!(entry("*.example.com"), plain(below));
    let globs = |below, labels: &[&str]| {
        let labels = labels.iter().map(|label| label.as_bytes());
        plain(Destination::Names(NamePattern::Glob(LabelGlobs::new(
            below, labels,
        ))))
    };
    assert_eq!(
        entry("api-*.example.com"),
        globs(false, &["api-*", "example", "com"])
    );
    assert_eq!(
        entry("*.S3-*.*x*.com"),
        globs(true, &["s3-*", "*x*", "com"])
    );
}

#[test]
fn the_error_for_an_entry_names_the_part_its_place_and_what_was_expected() {
    for (text, expected) in [
        (
            "https://github.com/x",
            "0 `https://github.com/x` is a URL: expected only the host name, with its port after \
             a colon, such as `example.com:443`",
        ),
        (
            "github.com:0",
            "11 `0` is not a port: expected a number from 1 to 65535, or a range such as 8000-8100",
        ),
        (
            "github.com:70000",
            "11 `70000` is not a port: expected a number from 1 to 65535, or a range such as \
             8000-8100",
        ),
        (
            "github.com:+80",
            "11 `+80` is not a port: expected a number from 1 to 65535, or a range such as \
             8000-8100",
        ),
        (
            "github.com:",
            "11 `` is not a port: expected a number from 1 to 65535, or a range such as 8000-8100",
        ),
        (
            "github.com:90-80",
            "11 `90-80` is a range that ends before it begins: expected 80-90",
        ),
        (
            "github.com:443/https",
            "15 `https` is not a protocol: expected tcp, udp, sctp, icmp, ah, esp, gre, ipip, any, or ip- \
             and a number from 0 to 255, such as ip-89",
        ),
        (
            "github.com:80/icmp",
            "11 `80` is a port, and icmp has no ports: omit one of them",
        ),
        (
            "443",
            "0 `443` is a number without a destination: expected `destination:port`, with one port or \
             range in each entry",
        ),
        (
            ":443",
            "0 `:443` has no destination: write `*` for anywhere",
        ),
        (
            "10.1.2.3/16",
            "0 `10.1.2.3/16` has bits set outside its prefix: the network is 10.1.0.0/16",
        ),
        (
            "10.0.0.0/64",
            "0 `10.0.0.0/64` has a wrong prefix length: expected a number from 0 to 32",
        ),
        (
            "10.0.0.0:443/8",
            "13 `8` is after the port: in a CIDR the prefix length comes first, as in \
             `10.0.0.0/8:443`",
        ),
        (
            "example.com/24",
            "12 `24` follows something that is not an IP address: expected a CIDR such as \
             `10.20.0.0/16`, or a protocol (tcp, udp, sctp, icmp)",
        ),
        (
            "256.1.1.1",
            "0 `256.1.1.1` looks like an IP address but is not one: expected four numbers from 0 to \
             255, or a CIDR such as `192.0.2.0/24` for a range of addresses",
        ),
        (
            "1.2.3",
            "0 `1.2.3` looks like an IP address but is not one: expected four numbers from 0 to 255, \
             or a CIDR such as `192.0.2.0/24` for a range of addresses",
        ),
        (
            "192.168.1.*:80",
            "0 `192.168.1.*` is not an IP address: expected a CIDR such as `192.0.2.0/24` for a \
             range of addresses",
        ),
        (
            "api.**.example.com",
            "0 `api.**.example.com` has a label of several `*`: expected one `*`, which stands for one \
             or more labels at the beginning, as in `*.example.com`, and for one label elsewhere, as in \
             `s3.*.example.com`",
        ),
        (
            "github.*",
            "0 `github.*` ends with `*`, which would match every top-level domain: expected one, as in \
             `*.com`",
        ),
        (
            "bü*.example.com",
            "0 `bü*.example.com` has `*` after its beginning and characters outside ASCII: expected \
             the `xn--` form of its labels",
        ),
        (
            "＊.example.com",
            "0 `＊.example.com` is not a DNS name: write `*` in ASCII",
        ),
        (
            ".example.com",
            "0 `.example.com` is not a DNS name: it begins with a dot; write `*.example.com` for the \
             names below `example.com`, and `example.com` for the name itself",
        ),
        (
            "a..example.com",
            "0 `a..example.com` is not a DNS name: a label is empty",
        ),
        (
            "user@example.com",
            "0 `user@example.com` is not a DNS name: it has '@'; expected letters, digits, `-`, \
             `_`, `*` and dots",
        ),
        (
            "2001:db8::/32:443",
            "14 `443` is a port after an IPv6 CIDR without brackets: expected \
             `[2001:db8::/32]:443`",
        ),
        (
            "[::ffff:10.0.0.1]:80",
            "1 `::ffff:10.0.0.1` is an IPv4-mapped IPv6 address: write the IPv4 address",
        ),
        (
            "fe80::1%eth0",
            "0 `fe80::1%eth0` has an IPv6 zone: zones mean nothing outside the pod, omit it",
        ),
        (
            "[2001:db8::7",
            "0 `[2001:db8::7` has no closing bracket: expected `[IPv6 address]:port`",
        ),
        (
            "[10.0.0.1]:80",
            "1 `10.0.0.1` is not an IPv6 address: brackets are for IPv6 addresses only",
        ),
        (
            "[2001:db8::7]443",
            "13 `443` follows a bracket: expected `:port` or `/protocol`",
        ),
        (
            "github.com:80:81",
            "0 `github.com:80:81` is not an IPv6 address: expected one such as `2001:db8::7`, in \
             brackets when a port follows (a name or an IPv4 address takes one port or range)",
        ),
    ] {
        assert_eq!(error(text), expected, "{text}");
    }
}

#[test]
fn a_name_that_exceeds_the_limits_of_dns_is_an_error() {
    let long = "a".repeat(64);
    assert!(error(&format!("{long}.com")).ends_with("a label is longer than 63 bytes"));
    assert!(error(&format!("{long}*.com")).ends_with("a label is longer than 63 bytes"));
    let name = vec!["a".repeat(62); 5].join(".");
    assert!(error(&name).ends_with("the name is longer than 255 bytes"));
}

#[test]
fn texts_that_look_like_addresses_are_not_names() {
    for text in [
        "0x7f.1",
        "127.0.0.0x1",
        "１２７.０.０.1",
        "10.1*",
        "*.1.2.3",
        "0127.0.0.1",
    ] {
        assert!(error(text).contains("IP address"), "{text}");
    }
}
