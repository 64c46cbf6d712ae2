//! The parts of a table in the form in which they are written, and their comparison with the kernel's
//! replies.
//!
//! The numbers are from the headers that `message.rs` names.

use super::super::netlink::{NESTED, add, attributes, flagged_attributes, number};

/// Length of `struct nfgenmsg`, which precedes the attributes.
const HEADER: usize = 4;

/// The attribute for the table in messages about chains, rules, sets and elements.
pub(super) const TABLE: u16 = 1;
pub(super) const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
pub(super) const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;
pub(super) const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_LEN: u16 = 5;
const SET_DESCRIPTION: u16 = 9;
const SET_DESCRIPTION_SIZE: u16 = 1;
const SET_EXPRESSION: u16 = 17;
pub(super) const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
pub(super) const EXPRESSION_DATA: u16 = 2;
pub(super) const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const META_INTO: u16 = 1;
const META_KEY: u16 = 2;
const META_FROM: u16 = 3;
const CMP_FROM: u16 = 1;
const CMP_OPERATOR: u16 = 2;
const CMP_DATA: u16 = 3;
const IMMEDIATE_INTO: u16 = 1;
const IMMEDIATE_DATA: u16 = 2;
const LOOKUP_SET: u16 = 1;
const LOOKUP_FROM: u16 = 2;
const LOOKUP_FLAGS: u16 = 5;

/// `NFT_REG_VERDICT` and `NFT_REG_1`.
const VERDICT: u32 = 0;
const REGISTER: u32 = 1;
/// `NFT_META_PRIORITY` and `NFT_META_IIF`.
const PRIORITY: u32 = 2;
const INTERFACE: u32 = 4;
/// `NFT_CMP_EQ`.
const EQUALS: u32 = 0;
/// `NF_DROP` and `NF_ACCEPT`.
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
/// nft's type number for interface indexes, with which it prints their names.
const INTERFACE_INDEX: u32 = 20;
/// The kind of userdata that nft prints as a comment.
const COMMENT: u8 = 0;

/// Attributes under construction.
#[derive(Default)]
pub(super) struct Attributes(pub(super) Vec<u8>);

impl Attributes {
    pub(super) fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        add(&mut self.0, kind, value);
        self
    }

    pub(super) fn number(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(super) fn text(self, kind: u16, value: &str) -> Self {
        self.bytes(kind, format!("{value}\0").as_bytes())
    }

    #[expect(
        clippy::needless_pass_by_value,
        reason = "a message consumes its parts"
    )]
    pub(super) fn nested(self, kind: u16, value: Self) -> Self {
        self.bytes(kind | NESTED, &value.0)
    }
}

/// An expression of a rule.
pub(super) fn expression(name: &str, data: Attributes) -> Attributes {
    Attributes::default()
        .text(EXPRESSION_NAME, name)
        .nested(EXPRESSION_DATA, data)
}

fn load(field: u32) -> Attributes {
    let data = Attributes::default().number(META_KEY, field);
    expression("meta", data.number(META_INTO, REGISTER))
}

/// Ends the evaluation of the rule unless the register has this value.
fn equals(value: u32) -> Attributes {
    let value = Attributes::default().bytes(DATA_VALUE, &value.to_ne_bytes());
    let data = Attributes::default()
        .number(CMP_FROM, REGISTER)
        .number(CMP_OPERATOR, EQUALS)
        .nested(CMP_DATA, value);
    expression("cmp", data)
}

/// Ends the evaluation of the rule unless the register's value is in the set; counts in its element.
fn is_in(set: &str) -> Attributes {
    let data = Attributes::default()
        .text(LOOKUP_SET, set)
        .number(LOOKUP_FROM, REGISTER)
        // Written explicitly, so that an inverted lookup does not compare as equal.
        .number(LOOKUP_FLAGS, 0);
    expression("lookup", data)
}

fn immediate(into: u32, value: Attributes) -> Attributes {
    let data = Attributes::default().number(IMMEDIATE_INTO, into);
    expression("immediate", data.nested(IMMEDIATE_DATA, value))
}

fn verdict(code: u32) -> Attributes {
    let code = Attributes::default().number(VERDICT_CODE, code);
    let value = Attributes::default().nested(DATA_VERDICT, code);
    immediate(VERDICT, value)
}

fn set_priority(priority: u32) -> [Attributes; 2] {
    let value = Attributes::default().bytes(DATA_VALUE, &priority.to_ne_bytes());
    let data = Attributes::default().number(META_KEY, PRIORITY);
    [
        immediate(REGISTER, value),
        expression("meta", data.number(META_FROM, REGISTER)),
    ]
}

/// The action of a rule.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rule<'a> {
    /// Accepts frames with this priority, and sets their priority to 0.
    Accept(u32),
    /// Drops frames from an interface in the set.
    Drop(&'a str),
    /// Counts frames from an interface in the set.
    Count(&'a str),
}

impl Rule<'_> {
    fn expressions(self) -> Attributes {
        let mut expressions = Vec::new();
        match self {
            Self::Accept(priority) => {
                expressions.extend([load(PRIORITY), equals(priority)]);
                expressions.extend(set_priority(0));
                expressions.push(verdict(ACCEPT));
            }
            Self::Drop(set) => expressions.extend([load(INTERFACE), is_in(set), verdict(DROP)]),
            Self::Count(set) => expressions.extend([load(INTERFACE), is_in(set)]),
        }
        let list = Attributes::default();
        expressions
            .into_iter()
            .fold(list, |list, each| list.nested(LIST_ELEMENT, each))
    }
}

/// A chain in the form in which it is written, for comparison with the kernel's.
pub(super) struct Chain(pub(super) Attributes);

impl Chain {
    /// A chain at the family's hook for received frames: prerouting, or ARP input.
    pub(super) fn new(name: &str, priority: i32) -> Self {
        // `NF_INET_PRE_ROUTING`, `NF_BR_PRE_ROUTING`, `NF_ARP_IN`: all are 0.
        let hook = Attributes::default()
            .number(HOOK_NUMBER, 0)
            .number(HOOK_PRIORITY, priority.cast_unsigned());
        let chain = Attributes::default()
            .text(CHAIN_NAME, name)
            .nested(CHAIN_HOOK, hook)
            .number(CHAIN_POLICY, ACCEPT)
            .text(CHAIN_TYPE, "filter");
        Self(chain)
    }

    /// Whether the kernel's reply describes this chain.
    pub(super) fn is(&self, body: &[u8]) -> bool {
        contains(payload(body), &self.0.0)
    }
}

/// A rule of a chain in the form in which it is written, for comparison with the kernel's.
pub(super) struct ChainRule(pub(super) Attributes);

impl ChainRule {
    pub(super) fn new(chain: &str, rule: Rule<'_>, comment: &str) -> Self {
        let rule = Attributes::default()
            .text(RULE_CHAIN, chain)
            .nested(RULE_EXPRESSIONS, rule.expressions())
            .bytes(RULE_USERDATA, &userdata(comment));
        Self(rule)
    }

    /// Whether the kernel's reply describes this rule.
    pub(super) fn is(&self, body: &[u8]) -> bool {
        contains(payload(body), &self.0.0)
    }
}

/// A set in the form in which it is written, for comparison with the kernel's.
pub(super) struct Set(pub(super) Attributes);

impl Set {
    /// A set of at most `size` interfaces, with a counter for each.
    pub(super) fn new(name: &str, size: u32) -> Self {
        let description = Attributes::default().number(SET_DESCRIPTION_SIZE, size);
        let set = Attributes::default()
            .text(SET_NAME, name)
            .number(SET_KEY_TYPE, INTERFACE_INDEX)
            .number(SET_KEY_LEN, 4)
            .nested(SET_DESCRIPTION, description)
            .nested(SET_EXPRESSION, expression("counter", Attributes::default()));
        Self(set)
    }

    /// Whether the kernel's reply describes this set.
    pub(super) fn is(&self, body: &[u8]) -> bool {
        let reply = payload(body);
        // The kernel omits the flags if there are none.
        find(reply, SET_FLAGS).is_none_or(|flags| number(flags) == 0) && contains(reply, &self.0.0)
    }
}

/// The attributes of a message.
pub(super) fn payload(body: &[u8]) -> &[u8] {
    body.get(HEADER..).unwrap_or_default()
}

/// Whether the kernel's reply contains what was written. The reply may contain attributes of other kinds,
/// such as a handle. Of each written kind, it must contain the same number in the same order.
fn contains(reply: &[u8], written: &[u8]) -> bool {
    flagged_attributes(written).all(|(kind, _)| {
        let of_kind = flagged_attributes(written).filter(|(other, _)| *other == kind);
        let mut reply = attributes(reply).filter(|(other, _)| *other == kind & !NESTED);
        let mut all = of_kind.map(|(_, written)| match reply.next() {
            Some((_, reply)) if kind & NESTED != 0 => contains(reply, written),
            Some((_, reply)) => reply == written,
            None => false,
        });
        all.all(|equal| equal) && reply.next().is_none()
    })
}

pub(super) fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut found = attributes(bytes);
    found.find_map(|(kind, value)| (kind == wanted).then_some(value))
}

/// A comment as nft writes it: kind, length, and text that ends with a zero.
fn userdata(comment: &str) -> Vec<u8> {
    let mut userdata = vec![COMMENT, comment.len() as u8 + 1];
    userdata.extend(comment.as_bytes());
    userdata.push(0);
    userdata
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_differs_if_any_part_of_it_differs() {
        let rule = || ChainRule::new("received", Rule::Drop("enforced"), "dropped");
        let reply = |rule: ChainRule| {
            let handle = Attributes::default().text(TABLE, "t").bytes(3, &[0; 8]);
            [&[1, 0, 0, 0][..], &handle.0, &rule.0.0].concat()
        };
        assert!(rule().is(&reply(rule())));
        assert!(!rule().is(&[]));
        for other in [
            ChainRule::new("received", Rule::Count("enforced"), "dropped"),
            ChainRule::new("received", Rule::Drop("audited"), "dropped"),
            ChainRule::new("received", Rule::Drop("enforced"), "drops"),
        ] {
            assert!(!rule().is(&reply(other)));
        }
        // The shorter rule is not equal to the longer one that begins like it.
        let count = ChainRule::new("received", Rule::Count("enforced"), "dropped");
        assert!(!count.is(&reply(rule())));
        let (one, other) = (Rule::Accept(7), Rule::Accept(8));
        let accept = |rule| ChainRule::new("received", rule, "judged");
        assert!(accept(one).is(&reply(accept(one))));
        assert!(!accept(one).is(&reply(accept(other))));
    }
}
