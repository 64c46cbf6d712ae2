//! Configurations that are refused, and their error messages.

use super::*;

#[test]
fn missing_resolvers_are_explained() {
    let expected = "dns.resolvers is missing: a pod learns addresses only from the answers of the \
                    resolvers listed here; list the addresses in the pods' /etc/resolv.conf, such \
                    as the cluster IP of kube-dns";
    for text in [
        "",
        "# nothing\n",
        "dns:\n",
        "dns: {}",
        "dns: {resolvers: []}",
    ] {
        let error = config(text).check_resolvers().expect_err("no resolvers");
        assert_eq!(error.to_string(), expected, "{text:?}");
    }
}

#[test]
fn an_error_names_the_key_and_the_place() {
    for (text, expected) in [
        (
            "node: n1\ndefautMode: off\n",
            "line 2, column 1: defautMode: is not a known key: expected one of node, defaultMode, \
             podAnnotations, ranges, dns, whenAgentDown, onDeny, unenforcedInterfaces, existingConnections, \
             stateDir, bpffs, limits, cluster, quarantine, http, socket",
        ),
        (
            "dns:\n  resolvers: [10.0.0.1]\n  ttl: 5\n",
            "line 3, column 3: dns.ttl: is not a known key: expected one of resolvers, \
             clusterDomain, minTtl, maxTtl, grace, internalAnswers, guard, autopath, refusal, learn",
        ),
        (
            "dns:\n  resolvers:\n  - 10.0.0.1\n  - dns.example\n",
            "line 4, column 5: dns.resolvers: `dns.example` is not an IP address: expected one, \
             alone or with a port, such as 10.1.0.2:5353 or '[fd00::1]:5353', and no name",
        ),
        (
            "dns: {resolvers: ['10.0.0.1:0']}",
            "line 1, column 19: dns.resolvers: `10.0.0.1:0` is not an IP address: expected one, \
             alone or with a port, such as 10.1.0.2:5353 or '[fd00::1]:5353', and no name",
        ),
        (
            "dns: {resolvers: [10.0.0.1, 10.0.0.1:1, 10.0.0.2:2, 10.0.0.3:3, 10.0.0.4:4]}",
            "line 1, column 65: dns.resolvers: `10.0.0.4:4` is one port too many: resolvers can be \
             asked on 4 different ports",
        ),
        (
            "dns: {resolvers: 10.0.0.1}",
            "line 1, column 18: dns.resolvers: `10.0.0.1` is not a list: expected values in \
             brackets or behind dashes",
        ),
        (
            "dns: {resolvers: [0.0.0.0]}",
            "line 1, column 19: dns.resolvers: `0.0.0.0` is not the address of a machine",
        ),
        (
            "defaultMode: on",
            "line 1, column 14: defaultMode: `on` is not one of off, audit, enforce",
        ),
        (
            "defaultMode: no",
            "line 1, column 14: defaultMode: `no` is not one of off, audit, enforce",
        ),
        (
            "onDeny: [drop]",
            "line 1, column 9: onDeny: a list is not one of drop, reject",
        ),
        (
            "unenforcedInterfaces: close",
            "line 1, column 23: unenforcedInterfaces: `close` is not one of report, refuse",
        ),
        (
            "existingConnections: allow",
            "line 1, column 22: existingConnections: `allow` is not one of judge, trust, end",
        ),
        (
            "stateDir: state",
            "line 1, column 11: stateDir: `state` is not an absolute path",
        ),
        (
            "ranges:\n  internal:\n    - 10.0.0.1/8\n",
            "line 3, column 7: ranges.internal: `10.0.0.1/8` has bits set outside its prefix: the \
             network is 10.0.0.0/8",
        ),
        (
            "ranges: {nat64: ['2001:db8::/33']}",
            "line 1, column 18: ranges.nat64: `2001:db8::/33` is not a NAT64 prefix: expected an \
             IPv6 prefix of 32, 40, 48, 56, 64 or 96 bits (RFC 6052, section 2.2)",
        ),
        (
            "ranges: {nat64: ['2001:db8:0:0:100::/96']}",
            "line 1, column 18: ranges.nat64: `2001:db8:0:0:100::/96` is not a NAT64 prefix: bits \
             64 to 71 must be zero (RFC 6052, section 2.2)",
        ),
        (
            "ranges: {nat64: ['2001:db8::/32', '2001:db8:64::/96']}",
            "line 1, column 35: ranges.nat64: `2001:db8:64::/96` overlaps 2001:db8::/32, the prefix of \
             another translator",
        ),
        (
            "ranges: {allowInternal: maybe}",
            "line 1, column 25: ranges.allowInternal: `maybe` is neither true nor false",
        ),
        (
            "dns: {resolvers: [10.0.0.1], grace: 30 seconds}",
            "line 1, column 37: dns.grace: `30 seconds` is not a duration: expected seconds, or a \
             number with s, m, h or d, of at most 2147483647 seconds",
        ),
        (
            "dns: {resolvers: [10.0.0.1], maxTtl: -1}",
            "line 1, column 38: dns.maxTtl: `-1` is not a duration: expected seconds, or a number \
             with s, m, h or d, of at most 2147483647 seconds",
        ),
        (
            "dns: {resolvers: [10.0.0.1], minTtl: 2d}",
            "line 1, column 38: dns.minTtl: `2d` makes dns.minTtl (172800 s) longer than dns.maxTtl \
             (86400 s)",
        ),
        (
            "dns: {resolvers: [10.0.0.1], maxTtl: 30}",
            "line 1, column 38: dns.maxTtl: `30` makes dns.minTtl (60 s) longer than dns.maxTtl (30 s)",
        ),
        (
            "whenAgentDown: {resolveFor: soon}",
            "line 1, column 29: whenAgentDown.resolveFor: `soon` is not a duration: expected seconds, or a number \
             with s, m, h or d, of at most 2147483647 seconds",
        ),
        (
            "whenAgentDown: {undecided: pass}",
            "line 1, column 28: whenAgentDown.undecided: `pass` is not one of hold, deliver",
        ),
        (
            "dns: {resolvers: [10.0.0.1], autopath: yes}",
            "line 1, column 40: dns.autopath: `yes` is not one of auto, on, off",
        ),
        (
            "dns: {resolvers: [10.0.0.1], internalAnswers: some}",
            "line 1, column 47: dns.internalAnswers: `some` is not a list: expected `all`, or a list \
             of names such as [corp.example, '*.corp.example']",
        ),
        (
            "dns: {resolvers: [10.0.0.1], internalAnswers: [corp.example, 'a b']}",
            "line 1, column 62: dns.internalAnswers: `a b` is not a DNS name: it has ' '; expected \
             letters, digits, `-`, `_`, `*` and dots",
        ),
        (
            "dns: {resolvers: [10.0.0.1], clusterDomain: '*.local'}",
            "line 1, column 45: dns.clusterDomain: `*.local` is a wildcard: expected a name",
        ),
        (
            "dns: {resolvers: [10.0.0.1]}\nlimits: {addressesPerPod: 0}",
            "line 2, column 27: limits.addressesPerPod: `0` is not a number from 1 to 1048576",
        ),
        (
            "dns: {resolvers: ['fe80::1']}",
            "line 1, column 19: dns.resolvers: `fe80::1` is a link-local address, which pods cannot ask from \
             their own addresses: expected one that is routed",
        ),
        (
            "dns: {resolvers: [127.0.0.53]}",
            "line 1, column 19: dns.resolvers: `127.0.0.53` is a loopback address, which is each pod's own: \
             expected the address that the pods' resolv.conf has",
        ),
        (
            "dns: {resolvers: [10.0.0.1]}\nlimits: {flowsPerPod: 63}",
            "line 2, column 23: limits.flowsPerPod: `63` is not a number from 64 to 1048576",
        ),
        (
            "dns: {resolvers: [10.0.0.1]}\nlimits: {udpIdle: 30s}",
            "line 2, column 19: limits.udpIdle: `30s` is not a duration from 1m to 24h",
        ),
        (
            "dns: {resolvers: [10.0.0.1]}\nlimits: {udpIdle: 2d}",
            "line 2, column 19: limits.udpIdle: `2d` is not a duration from 1m to 24h",
        ),
        (
            "bpffs: sys/fs/bpf",
            "line 1, column 8: bpffs: `sys/fs/bpf` is not an absolute path",
        ),
        (
            "ranges: {tunnels: [4789]}",
            "line 1, column 20: ranges.tunnels: `4789` is not a text: put it in quotes",
        ),
        (
            "ranges: {tunnels: [other, gre]}",
            "line 1, column 27: ranges.tunnels: `gre` is not a tunnel: expected a port and its protocol, \
             such as 4789/udp, with udp, tcp or sctp; or `other` for every other protocol",
        ),
        (
            "node: 12",
            "line 1, column 7: node: `12` is not a text: put it in quotes",
        ),
        (
            "- a",
            "line 1, column 1: the file: a list is not a mapping of keys to values",
        ),
    ] {
        let text = if text.contains("resolvers") || text.starts_with('-') {
            text.to_owned()
        } else {
            format!("{text}\n{RESOLVERS}")
        };
        assert_eq!(error(&text), expected, "{text:?}");
    }
}

#[test]
fn an_error_names_the_place_where_a_value_is_used() {
    for (text, expected) in [
        (
            "node: &name n1\nstateDir: *name\n",
            "line 2, column 11: stateDir: `n1` is not an absolute path",
        ),
        ("node: [n1]", "line 1, column 7: node: a list is not a text"),
        (
            "node: {name: [n1], zone: {a: b}}",
            "line 1, column 7: node: a mapping is not a text",
        ),
        ("node:", "line 1, column 5: node: nothing is not a text"),
        ("node: ' '", "line 1, column 7: node: ` ` is empty"),
        (
            "limits: 4096",
            "line 1, column 9: limits: `4096` is not a mapping of keys to values",
        ),
        (
            "limits: {addressesPerPod: 1.5}",
            "line 1, column 27: limits.addressesPerPod: `1.5` is not a number from 1 to 1048576",
        ),
        (
            "limits: {addressesPerPod: 100000000000000000000}",
            "line 1, column 27: limits.addressesPerPod: `100000000000000000000` is not a number from 1 to 1048576",
        ),
        (
            "dns: {minTtl: 5, minTtl: 6}",
            "duplicate mapping key: minTtl not allowed here at line 1, column 18",
        ),
        (
            "ranges:\n  internal:\n  - [10.0.0.0/8]\n",
            "line 3, column 5: ranges.internal: a list is not a text",
        ),
        (
            "quarantine: {exclude: docker0}",
            "line 1, column 23: quarantine.exclude: `docker0` is not a list: expected values in brackets or \
             behind dashes",
        ),
        (
            "1: a",
            "line 1, column 1: 1: is not a known key: expected one of node, defaultMode, podAnnotations, \
             ranges, dns, whenAgentDown, onDeny, unenforcedInterfaces, existingConnections, stateDir, bpffs, \
             limits, cluster, quarantine, http, socket",
        ),
        (
            "# a comment\ntext",
            "line 2, column 1: the file: `text` is not a mapping of keys to values",
        ),
    ] {
        assert_eq!(error(text), expected, "{text:?}");
    }
}

#[test]
fn there_may_be_256_names_with_internal_answers_and_no_more() {
    let text = |count: usize| {
        let names: Vec<String> = (0..count).map(|n| format!("n{n}.example")).collect();
        format!("dns: {{internalAnswers: [{}]}}", names.join(", "))
    };
    let InternalAnswers::Names(names) = &*config(&text(256)).dns.internal_answers else {
        panic!("not a list");
    };
    assert_eq!(names.len(), 256);
    let error = error(&text(257));
    assert!(
        error.ends_with("`n256.example` is one name too many: the limit is 256"),
        "{error}"
    );
    let all = config("dns: {internalAnswers: all}").dns.internal_answers;
    assert_eq!(*all, InternalAnswers::All);
}

#[test]
fn there_may_be_64_tunnels_and_no_more() {
    let text = |count: usize| {
        let ports: Vec<String> = (1..=count).map(|port| format!("{port}/udp")).collect();
        format!("ranges: {{tunnels: [{}]}}\n{RESOLVERS}", ports.join(", "))
    };
    assert_eq!(config(&text(64)).tunnels().len(), 64);
    let error = error(&text(65));
    assert!(
        error.ends_with("`65/udp` is one too many: the limit is 64"),
        "{error}"
    );
    assert!(
        config(&format!("ranges: {{tunnels: []}}\n{RESOLVERS}"))
            .tunnels()
            .is_empty()
    );
}

#[test]
fn text_that_is_no_yaml_names_the_place() {
    for (text, expected) in [
        (
            "dns: {resolvers: [10.0.0.1]\nnode: x",
            "while parsing a flow mapping, did not find expected ',' or '}' at line 2, column 1",
        ),
        (
            "node: a\nnode: b\n",
            "duplicate mapping key: node not allowed here at line 2, column 1",
        ),
        (
            "node: a\n---\nnode: b\n",
            "only single YAML document expected but multiple found at line 3, column 1",
        ),
    ] {
        assert_eq!(error(text), expected, "{text:?}");
    }
}
