//! The maps by which the programs pass DNS on without the agent: decided names, learned addresses and open queries.

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use egress_common::{
    address::Address,
    records::{AllowKey, Decision, DecisionKey, DnsTimes, LearnedEntry, PendingKey, PendingQuery},
};

use super::{
    Datapath,
    keyed::{Keyed, read, values},
    object::open,
    policies::ignore_missing,
};
use egress_dns::Name;

/// Handle on the decided names and the learned addresses of one policy. The gate thread alone writes decisions; the
/// programs alone write addresses.
pub struct LearningMaps {
    decisions: HashMap<MapData, DecisionKey, Decision>,
    learned: HashMap<MapData, AllowKey, LearnedEntry>,
}

/// Whether a decision could be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decided {
    /// Yes.
    Written,
    /// The map is full, or the kernel has no memory.
    Full,
}

impl LearningMaps {
    pub(super) fn new(decisions: MapData, learned: MapData) -> Result<Self> {
        Ok(Self {
            decisions: HashMap::try_from(Map::HashMap(decisions))?,
            learned: HashMap::try_from(Map::HashMap(learned))?,
        })
    }

    /// Tells the programs that the pod may query a name.
    ///
    /// # Errors
    ///
    /// When the map cannot be written for another reason than a lack of room.
    pub fn decide(&mut self, name: &Name, decision: Decision) -> Result<Decided> {
        let Some(key) = DecisionKey::of_wire(name.as_wire()) else {
            return Ok(Decided::Full);
        };
        match self.decisions.insert(key, decision, 0) {
            Ok(()) => Ok(Decided::Written),
            Err(MapError::SyscallError(error))
                if matches!(
                    error.io_error.raw_os_error(),
                    Some(libc::E2BIG | libc::ENOMEM)
                ) =>
            {
                Ok(Decided::Full)
            }
            Err(error) => Err(error).context("cannot write a map `decisions`"),
        }
    }

    /// Removes all decisions. No interface may learn meanwhile.
    ///
    /// # Errors
    ///
    /// When the map cannot be read or written.
    pub fn forget_decisions(&mut self) -> Result<()> {
        let keys: Vec<DecisionKey> = self
            .decisions
            .keys()
            .collect::<Result<_, _>>()
            .context("cannot read a map `decisions`")?;
        for key in keys {
            ignore_missing(self.decisions.remove(&key))
                .context("cannot write a map `decisions`")?;
        }
        Ok(())
    }

    /// The entry of an address that the programs have learned.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn learned(&self, addr: Address) -> Result<Option<LearnedEntry>> {
        read(&self.learned, &AllowKey { addr }).context("cannot read a map `learned`")
    }

    /// When each address expires that the programs have learned, and the id of the name that resolved to it.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn lifetimes(&self) -> Result<Vec<(Address, (u64, u64))>> {
        values(&self.learned)
            .map(|entry| {
                let entry = entry.context("cannot read a map `learned`")?;
                Ok((entry.addr, (entry.expires_ns, entry.id)))
            })
            .collect()
    }

    /// Removes the addresses that expired before this time, in nanoseconds of `CLOCK_BOOTTIME`. No interface may learn
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// When the map cannot be read or written.
    pub fn forget_expired(&mut self, now_ns: u64) -> Result<()> {
        let mut expired = Vec::new();
        for entry in values(&self.learned) {
            let entry = entry.context("cannot read a map `learned`")?;
            if entry.expires_ns <= now_ns {
                expired.push(entry.key());
            }
        }
        for key in expired {
            ignore_missing(self.learned.remove(&key)).context("cannot write a map `learned`")?;
        }
        Ok(())
    }
}

impl Keyed for LearnedEntry {
    type Key = AllowKey;

    fn key(&self) -> AllowKey {
        AllowKey { addr: self.addr }
    }
}

/// Handle on the queries of one pod that the programs have let pass.
pub struct PendingMap(HashMap<MapData, PendingKey, PendingQuery>);

impl PendingMap {
    pub(super) fn new(map: MapData) -> Result<Self> {
        Ok(Self(HashMap::try_from(Map::HashMap(map))?))
    }

    /// Takes a query out, unless a program has taken it at the same time.
    ///
    /// # Errors
    ///
    /// When the map cannot be read or written.
    pub fn take(&mut self, key: &PendingKey) -> Result<Option<PendingQuery>> {
        let query = match self.0.get(key, 0) {
            Ok(query) => query,
            Err(MapError::KeyNotFound) => return Ok(None),
            Err(error) => return Err(error).context("cannot read a map `pending`"),
        };
        match self.0.remove(key) {
            Ok(()) => Ok(Some(query)),
            Err(MapError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
            {
                Ok(None)
            }
            Err(error) => Err(error).context("cannot write a map `pending`"),
        }
    }

    /// Removes the queries that were sent before this time, in nanoseconds of `CLOCK_BOOTTIME`.
    ///
    /// # Errors
    ///
    /// When the map cannot be read or written.
    pub fn forget_before(&mut self, time_ns: u64) -> Result<()> {
        let mut old = Vec::new();
        for item in &self.0 {
            let (key, query) = item.context("cannot read a map `pending`")?;
            if query.time_ns < time_ns {
                old.push(key);
            }
        }
        for key in old {
            ignore_missing(self.0.remove(&key)).context("cannot write a map `pending`")?;
        }
        Ok(())
    }
}

/// The settings by which the programs learn.
pub struct DnsTimesMap(Array<MapData, DnsTimes>);

impl DnsTimesMap {
    /// Replaces them.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn set(&mut self, times: DnsTimes) -> Result<()> {
        self.0
            .set(0, times, 0)
            .context("cannot write the map `dns_times`")
    }

    /// The settings in force.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn get(&self) -> Result<DnsTimes> {
        self.0.get(&0, 0).context("cannot read the map `dns_times`")
    }
}

impl Datapath {
    /// Whether the programs pass decided DNS on without the agent.
    pub fn learns(&self) -> bool {
        self.constants.learns
    }

    /// A handle on the settings by which the programs learn.
    ///
    /// # Errors
    ///
    /// When the pin cannot be opened.
    pub fn dns_times(&self) -> Result<DnsTimesMap> {
        let map = open(&self.layout, "dns_times")?;
        Ok(DnsTimesMap(Array::try_from(Map::Array(map))?))
    }
}
