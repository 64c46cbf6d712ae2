//! Requests to nf_tables, and their replies.
//!
//! The numbers are from `include/uapi/linux/netfilter/nf_tables.h` and `nfnetlink.h`. All of netfilter's own
//! numbers are in network byte order; a value that is compared with a packet's field has the byte order of
//! the field.

use egress_common::ids::IfIndex;
use rtnetlink::packet_core::{NLM_F_APPEND, NLM_F_CREATE};

use super::{
    super::netlink::{Request, attributes, number},
    parts::{
        Attributes, CHAIN_NAME, Chain, ChainRule, DATA_VALUE, EXPRESSION_DATA, LIST_ELEMENT,
        RULE_CHAIN, SET_NAME, Set, TABLE, find, payload,
    },
};

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NEWTABLE: u16 = 0;
const GETTABLE: u16 = 1;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const GETCHAIN: u16 = 4;
const NEWRULE: u16 = 6;
const GETRULE: u16 = 7;
const NEWSET: u16 = 9;
const GETSET: u16 = 10;
const NEWSETELEM: u16 = 12;
const GETSETELEM: u16 = 13;
const DELSETELEM: u16 = 14;

const TABLE_FLAGS: u16 = 2;
const SET_ID: u16 = 10;
const SET_USERDATA: u16 = 13;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS: u16 = 3;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_EXPRESSION: u16 = 7;
const COUNTER_PACKETS: u16 = 2;

/// Userdata that tells nft that keys are in the machine's byte order: kind (`NFTNL_UDATA_SET_KEYBYTEORDER`
/// of libnftnl), length, and `BYTEORDER_HOST_ENDIAN`.
const KEY_BYTE_ORDER: [u8; 2] = [0, 4];
const MACHINES: u32 = 1;

/// The family of a table: netfilter has tables for each family of packets.
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

    /// nft's word for the family.
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

/// Requests about one table that the kernel executes together or not at all.
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
        reason = "a message consumes its parts"
    )]
    fn push(&mut self, kind: u16, flags: u16, attributes: Attributes) {
        let mut request = request(self.family, kind);
        request.add_all(&Attributes::default().text(TABLE, self.table).0);
        request.add_all(&attributes.0);
        self.requests.push((request, flags));
    }

    /// Adds the table; it may exist already.
    pub(super) fn add_table(&mut self) {
        self.push(NEWTABLE, NLM_F_CREATE, Attributes::default());
    }

    /// Deletes the table with everything in it; it must exist.
    pub(super) fn delete_table(&mut self) {
        self.push(DELTABLE, 0, Attributes::default());
    }

    /// Adds a chain that the table does not have.
    pub(super) fn add_chain(&mut self, chain: Chain) {
        self.push(NEWCHAIN, NLM_F_CREATE, chain.0);
    }

    /// Adds a rule at the end of its chain.
    pub(super) fn add_rule(&mut self, rule: ChainRule) {
        self.push(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, rule.0);
    }

    /// Adds a set that the table does not have.
    pub(super) fn add_set(&mut self, set: Set) {
        self.sets += 1;
        let order = [&KEY_BYTE_ORDER[..], &MACHINES.to_ne_bytes()].concat();
        let set = set.0.number(SET_ID, self.sets);
        self.push(NEWSET, NLM_F_CREATE, set.bytes(SET_USERDATA, &order));
    }

    /// Adds interfaces to a set; elements that exist keep their counters.
    pub(super) fn add_elements(&mut self, set: &str, interfaces: &[IfIndex]) {
        self.push_elements(NEWSETELEM, NLM_F_CREATE, set, interfaces);
    }

    /// Deletes interfaces that the set must have.
    pub(super) fn delete_elements(&mut self, set: &str, interfaces: &[IfIndex]) {
        self.push_elements(DELSETELEM, 0, set, interfaces);
    }

    fn push_elements(&mut self, kind: u16, flags: u16, set: &str, interfaces: &[IfIndex]) {
        // The length of an attribute has 16 bits.
        for some in interfaces.chunks(1024) {
            let list = some.iter().fold(Attributes::default(), |list, ifindex| {
                let key = Attributes::default().bytes(DATA_VALUE, &ifindex.get().to_ne_bytes());
                let element = Attributes::default().nested(ELEMENT_KEY, key);
                list.nested(LIST_ELEMENT, element)
            });
            let elements = Attributes::default()
                .text(ELEMENTS_SET, set)
                .nested(ELEMENTS, list);
            self.push(kind, flags, elements);
        }
    }

    /// Whether the batch has no requests.
    pub(super) fn is_empty(&self) -> bool {
        self.requests.len() == 1
    }

    /// The requests, and the end of the batch.
    pub(super) fn finish(self) -> (Vec<(Request, u16)>, Request) {
        (self.requests, control(BATCH_END))
    }
}

/// A request for a table.
pub(super) fn get_table(family: Family, table: &str) -> Request {
    let mut request = request(family, GETTABLE);
    request.add_all(&Attributes::default().text(TABLE, table).0);
    request
}

/// Whether the table in this reply has no flags: it is not dormant, and belongs to no process.
pub(super) fn has_no_flags(body: &[u8]) -> bool {
    find(payload(body), TABLE_FLAGS).is_none_or(|flags| number(flags) == 0)
}

/// A request for a chain.
pub(super) fn get_chain(family: Family, table: &str, chain: &str) -> Request {
    let mut request = request(family, GETCHAIN);
    let which = Attributes::default().text(TABLE, table);
    request.add_all(&which.text(CHAIN_NAME, chain).0);
    request
}

/// A request for a set, without its elements.
pub(super) fn get_set(family: Family, table: &str, set: &str) -> Request {
    let mut request = request(family, GETSET);
    let which = Attributes::default().text(TABLE, table);
    request.add_all(&which.text(SET_NAME, set).0);
    request
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

/// The interfaces and packet counters of the elements in this reply.
pub(super) fn read_elements(body: &[u8]) -> Vec<(IfIndex, u64)> {
    let list = find(payload(body), ELEMENTS).unwrap_or_default();
    let elements = attributes(list).filter(|(kind, _)| *kind == LIST_ELEMENT);
    elements
        .filter_map(|(_, element)| {
            let ifindex = IfIndex::new(number(find(find(element, ELEMENT_KEY)?, DATA_VALUE)?));
            let counter = find(element, ELEMENT_EXPRESSION)
                .and_then(|expression| find(expression, EXPRESSION_DATA))
                .and_then(|data| find(data, COUNTER_PACKETS))
                .and_then(|packets| packets.try_into().ok());
            Some((ifindex, counter.map_or(0, u64::from_be_bytes)))
        })
        .collect()
}

fn request(family: Family, kind: u16) -> Request {
    // nfgenmsg: family, version, and a number that is used only in the ends of a batch.
    Request::new(SUBSYSTEM << 8 | kind, &[family.number(), 0, 0, 0])
}

/// The beginning or the end of a batch.
fn control(kind: u16) -> Request {
    let [high, low] = SUBSYSTEM.to_be_bytes();
    Request::new(kind, &[0, 0, high, low])
}

#[cfg(test)]
mod tests {
    use super::{super::parts::expression, *};

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
        assert_eq!(
            read_elements(&body),
            [(IfIndex::new(7), 9), (IfIndex::new(8), 0)]
        );
        assert!(read_elements(&[]).is_empty());
    }
}
