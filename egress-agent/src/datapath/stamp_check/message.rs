//! Writing requests to nf_tables, and reading what it tells.
//!
//! Numbers are of `include/uapi/linux/netfilter/nf_tables.h` and `nfnetlink.h`. All of netfilter's own are in
//! network byte order; what is compared with a packet's fields is in the order that the field has.

use rtnetlink::packet_core::{NLM_F_APPEND, NLM_F_CREATE};

use super::super::netlink::{NESTED, Request, add, attributes, number};

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NEWTABLE: u16 = 0;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const NEWRULE: u16 = 6;
const GETRULE: u16 = 7;
const NEWSET: u16 = 9;
const NEWSETELEM: u16 = 12;
const GETSETELEM: u16 = 13;
const DELSETELEM: u16 = 14;

/// Length of `struct nfgenmsg`, which is in front of the attributes.
const HEADER: usize = 4;

/// In messages about chains, rules, sets and elements alike: the table that they are in.
const TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;
const SET_NAME: u16 = 2;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_LEN: u16 = 5;
const SET_DESCRIPTION: u16 = 9;
const SET_DESCRIPTION_SIZE: u16 = 1;
const SET_ID: u16 = 10;
const SET_USERDATA: u16 = 13;
const SET_EXPRESSION: u16 = 17;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS: u16 = 3;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_EXPRESSION: u16 = 7;
const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
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
const COUNTER_PACKETS: u16 = 2;

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
/// nft's number for indexes of interfaces, so that it prints their names.
const INTERFACE_INDEX: u32 = 20;
/// Userdata by which nft knows that keys are in the machine's byte order: kind (`NFTNL_UDATA_SET_KEYBYTEORDER`
/// of libnftnl), length, and `BYTEORDER_HOST_ENDIAN`.
const KEY_BYTE_ORDER: [u8; 2] = [0, 4];
const MACHINES: u32 = 1;
/// The kind of userdata that nft prints as a comment.
const COMMENT: u8 = 0;

/// Whose table it is: netfilter has one for each family of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Family {
    /// IPv4 and IPv6.
    Inet,
    /// Every frame that a port of a bridge receives.
    Bridge,
    /// ARP that the node itself receives.
    Arp,
}

impl Family {
    pub(super) const ALL: [Self; 3] = [Self::Inet, Self::Bridge, Self::Arp];

    /// The word that nft has for it.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Inet => "inet",
            Self::Bridge => "bridge",
            Self::Arp => "arp",
        }
    }

    /// `NFPROTO_INET`, `NFPROTO_BRIDGE`, `NFPROTO_ARP`.
    const fn number(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::Bridge => 7,
            Self::Arp => 3,
        }
    }
}

/// Attributes that are being written.
#[derive(Default)]
struct Attributes(Vec<u8>);

impl Attributes {
    fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        add(&mut self.0, kind, value);
        self
    }

    fn number(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    fn text(self, kind: u16, value: &str) -> Self {
        self.bytes(kind, format!("{value}\0").as_bytes())
    }

    #[expect(
        clippy::needless_pass_by_value,
        reason = "a message takes in its parts"
    )]
    fn nested(self, kind: u16, value: Self) -> Self {
        self.bytes(kind | NESTED, &value.0)
    }
}

/// An expression of a rule.
fn expression(name: &str, data: Attributes) -> Attributes {
    Attributes::default()
        .text(EXPRESSION_NAME, name)
        .nested(EXPRESSION_DATA, data)
}

fn load(field: u32) -> Attributes {
    let data = Attributes::default().number(META_KEY, field);
    expression("meta", data.number(META_INTO, REGISTER))
}

/// Ends the rule here unless the register has this value.
fn equals(value: u32) -> Attributes {
    let value = Attributes::default().bytes(DATA_VALUE, &value.to_ne_bytes());
    let data = Attributes::default()
        .number(CMP_FROM, REGISTER)
        .number(CMP_OPERATOR, EQUALS)
        .nested(CMP_DATA, value);
    expression("cmp", data)
}

/// Ends the rule here unless the register's value is in the set; counts in its element.
fn is_in(set: &str) -> Attributes {
    let data = Attributes::default().text(LOOKUP_SET, set);
    expression("lookup", data.number(LOOKUP_FROM, REGISTER))
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

/// What a rule does.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rule<'a> {
    /// Lets go on what has this priority, with priority 0.
    Accept(u32),
    /// Drops what comes from an interface in the set.
    Drop(&'a str),
    /// Counts what comes from an interface in the set.
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

/// Requests about one table, that are carried out together or not at all.
pub(super) struct Batch<'a> {
    family: Family,
    table: &'a str,
    requests: Vec<(Request, u16)>,
    sets: u32,
}

impl<'a> Batch<'a> {
    pub(super) fn new(family: Family, table: &'a str) -> Self {
        Self {
            family,
            table,
            requests: vec![(control(BATCH_BEGIN), 0)],
            sets: 0,
        }
    }

    #[expect(
        clippy::needless_pass_by_value,
        reason = "a message takes in its parts"
    )]
    fn push(&mut self, kind: u16, flags: u16, attributes: Attributes) {
        let mut request = request(self.family, kind);
        request.add_all(&Attributes::default().text(TABLE, self.table).0);
        request.add_all(&attributes.0);
        self.requests.push((request, flags));
    }

    /// The table; there may be one already.
    pub(super) fn add_table(&mut self) {
        self.push(NEWTABLE, NLM_F_CREATE, Attributes::default());
    }

    /// The table with everything in it; there must be one.
    pub(super) fn delete_table(&mut self) {
        self.push(DELTABLE, 0, Attributes::default());
    }

    /// A chain at the family's hook for what is received: prerouting, or of ARP input.
    pub(super) fn add_chain(&mut self, name: &str, priority: i32) {
        // `NF_INET_PRE_ROUTING`, `NF_BR_PRE_ROUTING`, `NF_ARP_IN`: all are 0.
        let hook = Attributes::default()
            .number(HOOK_NUMBER, 0)
            .number(HOOK_PRIORITY, priority.cast_unsigned());
        let chain = Attributes::default()
            .text(CHAIN_NAME, name)
            .nested(CHAIN_HOOK, hook)
            .number(CHAIN_POLICY, ACCEPT)
            .text(CHAIN_TYPE, "filter");
        self.push(NEWCHAIN, NLM_F_CREATE, chain);
    }

    /// A rule behind those that the chain has.
    pub(super) fn add_rule(&mut self, chain: &str, rule: Rule<'_>, comment: &str) {
        let rule = Attributes::default()
            .text(RULE_CHAIN, chain)
            .nested(RULE_EXPRESSIONS, rule.expressions())
            .bytes(RULE_USERDATA, &userdata(comment));
        self.push(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, rule);
    }

    /// A set of at most so many interfaces, with a counter for each.
    pub(super) fn add_set(&mut self, name: &str, size: u32) {
        self.sets += 1;
        let order = [&KEY_BYTE_ORDER[..], &MACHINES.to_ne_bytes()].concat();
        let description = Attributes::default().number(SET_DESCRIPTION_SIZE, size);
        let set = Attributes::default()
            .text(SET_NAME, name)
            .number(SET_KEY_TYPE, INTERFACE_INDEX)
            .number(SET_KEY_LEN, 4)
            .number(SET_ID, self.sets)
            .nested(SET_DESCRIPTION, description)
            .bytes(SET_USERDATA, &order)
            .nested(SET_EXPRESSION, expression("counter", Attributes::default()));
        self.push(NEWSET, NLM_F_CREATE, set);
    }

    /// Interfaces of a set; those that it has keep their counters.
    pub(super) fn add_elements(&mut self, set: &str, interfaces: &[u32]) {
        self.push_elements(NEWSETELEM, NLM_F_CREATE, set, interfaces);
    }

    /// Interfaces that the set must have.
    pub(super) fn delete_elements(&mut self, set: &str, interfaces: &[u32]) {
        self.push_elements(DELSETELEM, 0, set, interfaces);
    }

    fn push_elements(&mut self, kind: u16, flags: u16, set: &str, interfaces: &[u32]) {
        // The length of an attribute has 16 bits.
        for some in interfaces.chunks(1024) {
            let list = some.iter().fold(Attributes::default(), |list, ifindex| {
                let key = Attributes::default().bytes(DATA_VALUE, &ifindex.to_ne_bytes());
                let element = Attributes::default().nested(ELEMENT_KEY, key);
                list.nested(LIST_ELEMENT, element)
            });
            let elements = Attributes::default()
                .text(ELEMENTS_SET, set)
                .nested(ELEMENTS, list);
            self.push(kind, flags, elements);
        }
    }

    /// Whether nothing is asked for.
    pub(super) fn is_empty(&self) -> bool {
        self.requests.len() == 1
    }

    /// What is to be sent, and the end of it.
    pub(super) fn finish(self) -> (Vec<(Request, u16)>, Request) {
        (self.requests, control(BATCH_END))
    }
}

/// A request for the rules of a chain.
pub(super) fn get_rules(family: Family, table: &str, chain: &str) -> Request {
    let mut request = request(family, GETRULE);
    let which = Attributes::default().text(TABLE, table);
    request.add_all(&which.text(RULE_CHAIN, chain).0);
    request
}

/// A request for the elements of a set.
pub(super) fn get_elements(family: Family, table: &str, set: &str) -> Request {
    let mut request = request(family, GETSETELEM);
    let which = Attributes::default().text(TABLE, table);
    request.add_all(&which.text(ELEMENTS_SET, set).0);
    request
}

/// The comment of a rule that is told of; empty when it has none.
pub(super) fn read_comment(body: &[u8]) -> String {
    let userdata = find(body.get(HEADER..).unwrap_or_default(), RULE_USERDATA);
    let text = userdata
        .filter(|userdata| userdata.first() == Some(&COMMENT))
        .and_then(|userdata| userdata.get(2..));
    text.map_or_else(String::new, super::super::netlink::text)
}

/// Interfaces and their packets, of the elements that are told of.
pub(super) fn read_elements(body: &[u8]) -> Vec<(u32, u64)> {
    let list = find(body.get(HEADER..).unwrap_or_default(), ELEMENTS).unwrap_or_default();
    let elements = attributes(list).filter(|(kind, _)| *kind == LIST_ELEMENT);
    elements
        .filter_map(|(_, element)| {
            let ifindex = number(find(find(element, ELEMENT_KEY)?, DATA_VALUE)?);
            let counter = find(element, ELEMENT_EXPRESSION)
                .and_then(|expression| find(expression, EXPRESSION_DATA))
                .and_then(|data| find(data, COUNTER_PACKETS))
                .and_then(|packets| packets.try_into().ok());
            Some((ifindex, counter.map_or(0, u64::from_be_bytes)))
        })
        .collect()
}

fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut found = attributes(bytes);
    found.find_map(|(kind, value)| (kind == wanted).then_some(value))
}

fn request(family: Family, kind: u16) -> Request {
    // nfgenmsg: family, version, and a number that only the ends of a batch have.
    Request::new(SUBSYSTEM << 8 | kind, &[family.number(), 0, 0, 0])
}

/// The beginning or the end of a batch.
fn control(kind: u16) -> Request {
    let [high, low] = SUBSYSTEM.to_be_bytes();
    Request::new(kind, &[0, 0, high, low])
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
    fn elements_are_read_with_their_counters() {
        let counter = Attributes::default().bytes(COUNTER_PACKETS, &9u64.to_be_bytes());
        let key = |ifindex: u32| {
            let value = Attributes::default().bytes(DATA_VALUE, &ifindex.to_ne_bytes());
            Attributes::default().nested(ELEMENT_KEY, value)
        };
        let first = key(7).nested(ELEMENT_EXPRESSION, expression("counter", counter));
        let list = Attributes::default()
            .nested(LIST_ELEMENT, first)
            .nested(LIST_ELEMENT, key(8));
        let body = Attributes::default()
            .text(TABLE, "t")
            .nested(ELEMENTS, list);
        let body = [&[1, 0, 0, 0][..], &body.0].concat();
        assert_eq!(read_elements(&body), [(7, 9), (8, 0)]);
        assert!(read_elements(&[]).is_empty());
    }

    #[test]
    fn a_comment_is_read_as_it_was_written() {
        let rule = Attributes::default().bytes(RULE_USERDATA, &userdata("not judged"));
        let body = [&[1, 0, 0, 0][..], &rule.0].concat();
        assert_eq!(read_comment(&body), "not judged");
        assert_eq!(read_comment(&[1, 0, 0, 0]), "");
    }
}
