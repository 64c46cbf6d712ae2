//! Schemas of fields that need more than their types say: bounds, and expressions (CEL) by which the API server refuses
//! an entry that cannot be read, with its place in the list.
//!
//! An entry that the parser of entries accepts is never refused here. What is refused here and could only be found
//! out by reading the whole policy is left to the agents.
//!
//! The API server estimates the cost of every expression from these bounds, and refuses a definition that may be too
//! expensive (k8s.io/apiextensions-apiserver: 10,000,000 for one expression, 100,000,000 for all). A regular expression
//! counts a quarter of its length for every ten bytes of the text, and a text four times its longest length. So lists
//! and entries have limits, and an entry has several short expressions. docs/kubernetes.md has how much of the budgets
//! is used; the tests in tests/tests/admission/served.rs fail when a definition exceeds them.

use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

/// Longest entry in bytes: a name of 253 bytes, `*.`, a range of ports and a protocol.
const ENTRY_MAX: usize = 280;
/// Most entries of a list of an `EgressPolicy`, and of an `EgressSet`.
const LIST_MAX: usize = 400;
/// Most rules of a `ClusterEgressPolicy`, and most entries of each.
pub(crate) const RULES_MAX: usize = 25;
const RULE_ENTRIES_MAX: usize = 25;

/// An entry that begins like an IPv6 address: in brackets, or with two colons before any slash.
const IS_V6: &str = r"^(?:\[|[^/]*:[^/]*:)";
/// An entry that begins like an IPv4 address.
const IS_V4: &str = r"^[0-9]+[.][0-9]+[.][0-9]+[.][0-9]+(?:[:/]|$)";
/// `*`, perhaps with a port or protocol.
const IS_ANYWHERE: &str = "^[*](?:[:/]|$)";
/// An entry that is not to be a name, or has a character outside ASCII.
const IS_NO_NAME: &str = r"^@|^\[|^[^/]*:[^/]*:|^[*](?:[:/]|$)|^[0-9]+[.][0-9]+[.][0-9]+[.][0-9]+(?:[:/]|$)|[^\x00-\x7F]";
const PORTS: &str = ":0*[0-9]{1,5}(?:-0*[0-9]{1,5})?";
const WITH_PORTS: &str = "(?i:tcp|udp|sctp)";
const WITHOUT_PORTS: &str =
    "(?i:icmp|any|ah|esp|gre|ipip|ip-0*(?:25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9]))";
/// A number from 0 to 128.
const LENGTH: &str = "0*(?:12[0-8]|1[01][0-9]|[1-9]?[0-9])";
const LABEL: &str =
    "[0-9A-Za-z_-]{1,63}|[0-9A-Za-z_*-]*(?:[*][0-9A-Za-z_-]|[0-9A-Za-z_-][*])[0-9A-Za-z_*-]*";

/// `spec.allow` of an `EgressPolicy`.
pub(crate) fn allow(_: &mut SchemaGenerator) -> Schema {
    entries(LIST_MAX, &entry_rules())
}

/// `spec.deny`.
pub(crate) fn deny(_: &mut SchemaGenerator) -> Schema {
    let mut rules = entry_rules();
    rules.push(rule(
        r"!self.matches(r'[:/]')
|| self.matches(r'^(?:@|\[|[^/]*:[^/]*:|[*][:/]|[0-9]+[.][0-9]+[.][0-9]+[.][0-9]+[:/])')",
        "a denied name takes no port or protocol: leave it out, or deny the address",
    ));
    entries(LIST_MAX, &rules)
}

/// `spec.resolve`.
pub(crate) fn resolve(_: &mut SchemaGenerator) -> Schema {
    let mut rules = entry_rules();
    rules.push(rule(
        r"!self.matches(r'[:/]') && !self.matches(r'^[0-9]+[.][0-9]+[.][0-9]+[.][0-9]+$')",
        "expected a name alone, without port or protocol, and no address",
    ));
    entries(LIST_MAX, &rules)
}

/// `entries` of a rule.
pub(crate) fn rule_entries(_: &mut SchemaGenerator) -> Schema {
    entries(RULE_ENTRIES_MAX, &entry_rules())
}

/// `spec.destinations` of an `EgressSet`.
pub(crate) fn destinations(_: &mut SchemaGenerator) -> Schema {
    let mut rules = entry_rules();
    rules.push(rule(
        r"self.matches(r'^[0-9A-Fa-f]*:[0-9A-Fa-f:.]*(?:/[0-9]+)?$')
|| self.matches(r'^[^:/@]*$') || self.matches(r'^[0-9./!]+/[0-9]+$') || self.matches(r'^\[[^\]]*!')",
        "expected a name, an address or a CIDR, without port, protocol and brackets",
    ));
    entries(LIST_MAX, &rules)
}

/// `spec.priority`.
pub(crate) fn priority(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "integer", "format": "int32", "minimum": 0, "maximum": 1000})
}

/// A label selector that the agents can read.
pub(crate) fn selector(_: &mut SchemaGenerator) -> Schema {
    let name = "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$";
    let value = json!({"type": "string", "maxLength": 63, "pattern": name});
    let key = r"(?:[a-z0-9](?:[-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?";
    let values = rule(
        "self.operator in ['In', 'NotIn'] ? has(self.values) && size(self.values) > 0 \
         : !has(self.values) || size(self.values) == 0",
        "In and NotIn need values, Exists and DoesNotExist take none",
    );
    let keys = rule(
        &format!("self.all(key, size(key) <= 317 && key.matches(r'^{key}$'))"),
        "expected keys of labels, such as app or example.com/tier",
    );
    json_schema!({
        "type": "object",
        "properties": {
            "matchLabels": {
                "description": "Labels that the objects must have.",
                "type": "object",
                "maxProperties": 50,
                "additionalProperties": value,
                "x-kubernetes-validations": [keys],
            },
            "matchExpressions": {
                "description": "Further requirements. All of them must hold.",
                "type": "array",
                "maxItems": 50,
                "items": {
                    "type": "object",
                    "required": ["key", "operator"],
                    "properties": {
                        "key": {
                            "description": "The label's key.",
                            "type": "string",
                            "maxLength": 317,
                            "pattern": format!("^{key}$"),
                        },
                        "operator": {
                            "description": "How the label's value relates to the values.",
                            "type": "string",
                            "enum": ["In", "NotIn", "Exists", "DoesNotExist"],
                        },
                        "values": {
                            "description": "The values, for In and NotIn.",
                            "type": "array",
                            "maxItems": 100,
                            "items": value,
                        },
                    },
                    "x-kubernetes-validations": [values],
                },
            },
        },
    })
}

fn entries(max: usize, rules: &[Value]) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": max,
        "items": {
            "type": "string",
            "minLength": 1,
            "maxLength": ENTRY_MAX,
            "x-kubernetes-validations": rules,
        },
    })
}

fn rule(rule: &str, message: &str) -> Value {
    json!({"rule": rule, "message": message})
}

/// A rule whose message repeats the entry: the API server shows only its place.
fn rule_about(rule: &str, what: &str, expected: &str) -> Value {
    let message = format!("{what}: expected {expected}");
    let expression = format!("'`' + self + '` {what}: expected {expected}'");
    json!({"rule": rule, "message": message, "messageExpression": expression})
}

/// The rules of an entry. Their parts are those of the admission policy for annotations.
fn entry_rules() -> Vec<Value> {
    const FORM: &str = "destination[:port or range][/protocol], such as github.com:443, *.example.com, \
                        10.20.0.0/16:5432/tcp or [2001:db8::7]:443";
    let mut rules: Vec<Value> = [
        v6_form(),
        v6_address(),
        v4_form(),
        name_form(),
        name_is_no_number(),
        name_outside_ascii(),
    ]
    .map(|form| rule_about(&or_has_exceptions(&form), "cannot be read", FORM))
    .into();
    rules.push(rule_about(
        &exceptions_form(),
        "cannot be read",
        "CIDRs, such as 10.0.0.0/8!10.1.0.0/16:443 or [2001:db8::/32!2001:db8:1::/48]",
    ));
    rules.push(rule_about(
        &ports_form(),
        "has a wrong port",
        "a number from 1 to 65535, or a range such as 8000-8100",
    ));
    rules.push(rule_about(
        &or_has_exceptions(&host_bits()),
        "has bits set outside its prefix",
        "the network, such as 10.20.0.0/16",
    ));
    rules
}

/// A rule that only entries without exceptions need to satisfy.
fn or_has_exceptions(form: &str) -> String {
    format!("self.contains('!') || ({form})")
}

/// A CIDR with exceptions. Whether each is a CIDR within the first is left to the agent.
fn exceptions_form() -> String {
    let (v4, v6) = ("[0-9./]+", "[0-9A-Fa-f:./]+");
    let tail = tail();
    format!(r"!self.contains('!') || self.matches(r'^(?:{v4}(?:!{v4})+|\[{v6}(?:!{v6})+\]){tail}')")
}

/// What may follow a destination.
fn tail() -> String {
    format!("(?:(?:{PORTS})?(?:/{WITH_PORTS})?|/{WITHOUT_PORTS})$")
}

fn v6_form() -> String {
    let any_protocol = format!("(?:/(?:{WITH_PORTS}|{WITHOUT_PORTS}))?");
    let bare = format!("[0-9A-Fa-f:.]+(?:/{LENGTH})?{any_protocol}$");
    let bracketed = format!(
        r"\[[0-9A-Fa-f:.]+(?:/{LENGTH}\]|\](?:/{LENGTH})?){}",
        tail()
    );
    format!("!self.matches(r'{IS_V6}') || self.matches(r'^(?:{bare}|{bracketed})')")
}

fn v6_address() -> String {
    let group = "[0-9A-Fa-f]{1,4}";
    let v4 = "[0-9]+(?:[.][0-9]+){3}";
    let whole = format!("(?:{group}:){{7}}{group}|(?:{group}:){{6}}{v4}");
    let short =
        format!("(?:{group}(?::{group}){{0,6}})?::(?:(?:{group}:){{0,6}}(?:{group}|{v4}))?");
    let mapped = format!("^(?:::|(?:0{{1,4}}:){{5}})[Ff]{{4}}:(?:{group}:{group}|{v4})$");
    format!(
        "!self.matches(r'{IS_V6}') || [self.find(r'[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*')].all(address,\
         \naddress.matches(r'^(?:{whole}|{short})$') && !address.matches(r'{mapped}')\
         \n&& (!address.contains('::') || size(address.findAll(r'[0-9A-Fa-f]+')) <= (address.contains('.') ? 9 : 7)))"
    )
}

/// IPv4, anywhere, and sets.
fn v4_form() -> String {
    let tail = tail();
    let byte = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])";
    let v4 = format!("^(?:{byte}[.]){{3}}{byte}(?:/0*(?:3[0-2]|[12]?[0-9]))?{tail}");
    let set = format!("^@[0-9a-z](?:[0-9a-z.-]*[0-9a-z])?{tail}");
    format!(
        "self.matches(r'{IS_V6}') ? true\
         \n: self.startsWith('@') ? self.matches(r'{set}')\
         \n: self.matches(r'{IS_V4}') ? self.matches(r'{v4}')\
         \n: !self.matches(r'{IS_ANYWHERE}') || self.matches(r'^[*]{tail}')"
    )
}

fn name_form() -> String {
    let tail = tail();
    let name = format!("^(?:[*][.])?(?:(?:[*]|{LABEL})[.])*(?:{LABEL})[.]{{0,2}}{tail}");
    format!("self.matches(r'{IS_NO_NAME}') || self.matches(r'{name}')")
}

fn name_is_no_number() -> String {
    let number = "(?:^|[.])(?:[0-9*]+|0[xX][0-9A-Fa-f]*)[.]{0,2}(?:[:/]|$)";
    let long = "^(?:[*][.])?[0-9A-Za-z_.-]{256}";
    format!(
        "self.matches(r'{IS_NO_NAME}') || !self.matches(r'{number}') && !self.matches(r'{long}')"
    )
}

fn name_outside_ascii() -> String {
    let tail = tail();
    format!(
        r"!self.matches(r'[^\x00-\x7F]') || self.matches(r'^(?:[*][.])?[^:/*\s]*[^\x00-\x7F][^:/*\s]*{tail}')"
    )
}

fn ports_form() -> String {
    let ports = ":[0-9-]+(?:/[A-Za-z]+)?$";
    format!(
        r"self.matches(r'^[^\[/]*:[^/]*:') || !self.matches(r'{ports}')
|| [self.find(r'{ports}').findAll(r'[0-9]+')].all(port, size(port) > 0
&& int(port[0]) >= 1 && int(port[size(port) - 1]) <= 65535 && int(port[0]) <= int(port[size(port) - 1]))"
    )
}

fn host_bits() -> String {
    let sizes: Vec<String> = (0..=32)
        .map(|length| (1u64 << (32 - length)).to_string())
        .collect();
    let sizes = sizes.join(", ");
    format!(
        r"self.matches(r'^[0-9.]+/[0-9]')
? [self.findAll(r'[0-9]+')].all(part, size(part) < 5 || int(part[4]) > 32
|| (int(part[0]) * 16777216 + int(part[1]) * 65536 + int(part[2]) * 256 + int(part[3]))
% [{sizes}][int(part[4])] == 0)
: !self.matches(r':[0-9A-Fa-f]*[1-9A-Fa-f][0-9A-Fa-f]*\]?/0*(?:[0-9]|[1-9][0-9]|10[0-9]|11[0-2])(?:[^0-9]|$)')"
    )
}
