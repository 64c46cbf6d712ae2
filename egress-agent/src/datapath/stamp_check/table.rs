//! The contents of the tables, and changes to them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    time::Duration,
};

use egress_common::{ids::IfIndex, limits::INTERFACES};
use rtnetlink::{packet_core::NLM_F_DUMP, sys::protocols::NETLINK_NETFILTER};

use super::{
    TABLE, WithoutStamp,
    message::{self, Batch, Family},
    parts::{Chain, ChainRule, Rule, Set},
};
use crate::datapath::{
    netlink::{Netlink, Request},
    stamp::Stamp,
};

const CHAIN: &str = "received";
/// Before everything else at the hook, including conntrack's defragmentation (`NF_IP_PRI_FIRST`,
/// `include/uapi/linux/netfilter_ipv4.h`). Of two chains with one priority the newer comes first
/// (`nf_hook_entries_grow`, net/netfilter/core.c), so replacing a table drops nothing in between.
const PRIORITY: i32 = i32::MIN;

/// How long the kernel may take; it waits for others that change rules.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a list is requested again after it changed during the dump.
const ATTEMPTS: usize = 4;

/// The elements of both sets of a table, and the packet counter of each.
pub(super) type Elements = BTreeMap<(IfIndex, WithoutStamp), u64>;

impl WithoutStamp {
    /// The name of its set of interfaces.
    const fn set(self) -> &'static str {
        match self {
            Self::Drop => "enforced",
            Self::Count => "audited",
        }
    }
}

pub(super) struct Tables {
    stamp: Stamp,
    /// Opened again after an error, because replies of the failed exchange may be left in the old socket.
    netlink: Option<Netlink>,
}

impl Tables {
    pub(super) fn new(stamp: Stamp) -> Self {
        Self {
            stamp,
            netlink: None,
        }
    }

    fn with<T>(&mut self, action: impl FnOnce(&mut Netlink) -> io::Result<T>) -> io::Result<T> {
        let mut netlink = match self.netlink.take() {
            Some(netlink) => netlink,
            None => open()?,
        };
        let done = action(&mut netlink)?;
        self.netlink = Some(netlink);
        Ok(done)
    }

    /// The rules, in order. A comment contains the stamp, for people who read the rules.
    fn rules(&self) -> [ChainRule; 3] {
        let stamp = self.stamp.0;
        [
            (
                Rule::Accept(stamp),
                format!("judged: has the stamp 0x{stamp:08x}"),
            ),
            (
                Rule::Drop(WithoutStamp::Drop.set()),
                "not judged: dropped".to_owned(),
            ),
            (
                Rule::Count(WithoutStamp::Count.set()),
                "not judged: counted".to_owned(),
            ),
        ]
        .map(|(rule, comment)| ChainRule::new(CHAIN, rule, &comment))
    }

    /// Whether a table is as [`Self::install`] creates it: in force, with the chain at its hook, both sets,
    /// and exactly these rules. Others may have added chains and sets to it.
    pub(super) fn is_whole(&mut self, family: Family) -> io::Result<bool> {
        match self.compare(family) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            compared => compared,
        }
    }

    fn compare(&mut self, family: Family) -> io::Result<bool> {
        let mut same = self.ask(message::get_table(family, TABLE), message::has_no_flags)?;
        let chain = chain();
        same &= self.ask(message::get_chain(family, TABLE, CHAIN), |body| {
            chain.is(body)
        })?;
        for what in WithoutStamp::ALL {
            let set = set(what);
            same &= self.ask(message::get_set(family, TABLE, what.set()), |body| {
                set.is(body)
            })?;
        }
        let rules = self.list(
            || message::get_rules(family, TABLE, CHAIN),
            |body| [body.to_vec()],
        )?;
        let expected = self.rules();
        same &= rules.len() == expected.len();
        let mut pairs = expected.iter().zip(&rules);
        Ok(same && pairs.all(|(rule, reply)| rule.is(reply)))
    }

    /// Whether the kernel's reply about one object is the expected one.
    fn ask(&mut self, request: Request, is_right: impl Fn(&[u8]) -> bool) -> io::Result<bool> {
        let mut right = false;
        self.with(|netlink| netlink.exchange(request, 0, |body| right = is_right(body)))?;
        Ok(right)
    }

    /// The elements of an existing table.
    pub(super) fn elements(&mut self, family: Family) -> io::Result<Elements> {
        let mut elements = Elements::new();
        for what in WithoutStamp::ALL {
            let listed = self.list(
                || message::get_elements(family, TABLE, what.set()),
                message::read_elements,
            )?;
            let listed = listed.into_iter();
            elements.extend(listed.map(|(ifindex, packets)| ((ifindex, what), packets)));
        }
        Ok(elements)
    }

    fn list<T, I: IntoIterator<Item = T>>(
        &mut self,
        request: impl Fn() -> Request,
        read: impl Fn(&[u8]) -> I,
    ) -> io::Result<Vec<T>> {
        for _ in 0..ATTEMPTS {
            let mut listed = Vec::new();
            let whole = self.with(|netlink| {
                netlink.exchange(request(), NLM_F_DUMP, |body| listed.extend(read(body)))
            })?;
            if whole {
                return Ok(listed);
            }
        }
        Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "the rules of nf_tables changed during every attempt to list them",
        ))
    }

    /// Creates the table, and replaces an existing one of its name.
    pub(super) fn install(
        &mut self,
        family: Family,
        elements: &BTreeSet<(IfIndex, WithoutStamp)>,
    ) -> io::Result<()> {
        let mut batch = Batch::new(family, TABLE);
        // Deleting a table that does not exist is an error, so add it first.
        batch.add_table();
        batch.delete_table();
        batch.add_table();
        for what in WithoutStamp::ALL {
            batch.add_set(set(what));
            batch.add_elements(what.set(), &interfaces(elements, what));
        }
        batch.add_chain(chain());
        for rule in self.rules() {
            batch.add_rule(rule);
        }
        self.transact(batch)?;
        if self.is_whole(family)? {
            return Ok(());
        }
        // Without this check, each later check would create the table again.
        Err(io::Error::other(
            "the table differs from what was just written: another program changes it, or the kernel \
             describes it differently",
        ))
    }

    /// Changes the elements of a table to the wanted ones. Returns whether any differed.
    pub(super) fn change_elements(
        &mut self,
        family: Family,
        is: &BTreeSet<(IfIndex, WithoutStamp)>,
        wanted: &BTreeSet<(IfIndex, WithoutStamp)>,
    ) -> io::Result<bool> {
        let mut batch = Batch::new(family, TABLE);
        let new = wanted.difference(is).copied().collect();
        let stale = is.difference(wanted).copied().collect();
        for what in WithoutStamp::ALL {
            batch.add_elements(what.set(), &interfaces(&new, what));
            batch.delete_elements(what.set(), &interfaces(&stale, what));
        }
        if batch.is_empty() {
            return Ok(false);
        }
        self.transact(batch)?;
        Ok(true)
    }

    fn transact(&mut self, batch: Batch<'_>) -> io::Result<()> {
        let (requests, end) = batch.finish();
        self.with(|netlink| netlink.transact(requests, end))
    }
}

fn chain() -> Chain {
    Chain::new(CHAIN, PRIORITY)
}

fn set(of: WithoutStamp) -> Set {
    Set::new(of.set(), INTERFACES)
}

fn open() -> io::Result<Netlink> {
    let mut netlink = Netlink::open(NETLINK_NETFILTER)?;
    netlink.set_patience(PATIENCE)?;
    Ok(netlink)
}

fn interfaces(elements: &BTreeSet<(IfIndex, WithoutStamp)>, of: WithoutStamp) -> Vec<IfIndex> {
    let elements = elements.iter().filter(|(_, what)| *what == of);
    elements.map(|(ifindex, _)| *ifindex).collect()
}

/// Removes a table. Returns whether it existed; a kernel without such tables has none.
pub(super) fn remove(family: Family) -> io::Result<bool> {
    let mut batch = Batch::new(family, TABLE);
    batch.delete_table();
    let (requests, end) = batch.finish();
    let done = open().and_then(|mut netlink| netlink.transact(requests, end));
    match done {
        Ok(()) => Ok(true),
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::EOPNOTSUPP | libc::EAFNOSUPPORT | libc::EPROTONOSUPPORT)
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}
