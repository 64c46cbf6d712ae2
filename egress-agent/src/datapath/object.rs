//! The datapath of a node: the loaded programs, and the maps that all pods share.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use aya::{
    Ebpf,
    maps::{Array, HashMap, LpmTrie, Map, MapData},
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
    util::KernelVersion,
};
use egress_common::{
    address::Address,
    ids::{IfIndex, PodId, PolicyId},
    limits::FlowLimits,
    records::{
        DnsPorts, Forged, Identity, InterfaceValue, Meter, Policy, Range, Tunnel, TunnelKey,
    },
};

use super::{
    Adoptable, Attach, CounterMap, DenialRing, HeldRing, InterfaceMap, NoteRing, ProbeMap, bpffs,
    frame_record::FrameRecord,
    inner::Templates,
    interfaces::text,
    loading::{
        Constants, GLOBAL_FUNCTIONS, Marks, OBJECT, check_kernel, check_shapes, load_object, take,
    },
    outer::OuterMaps,
    pins::{DirectoryId, Layout},
    stamp::Stamp,
    stamp_check::StampCheck,
};

/// A helper that the programs use if the kernel has it (5.11).
const COARSE_CLOCK: BpfHelper = BpfHelper::BPF_FUNC_ktime_get_coarse_ns;

/// The helper that reads the kernel's record of a frame. Every kernel has it, but may forbid its use.
const READ_KERNEL: BpfHelper = BpfHelper::BPF_FUNC_probe_read_kernel;

/// The options of the datapath.
#[derive(Clone, Debug)]
pub struct Options {
    /// Mount point of the BPF file system.
    pub bpffs: PathBuf,
    /// Capacity of one pod's allow map, in addresses.
    pub allow_entries: u32,
    /// How many flows of each kind one pod can have.
    pub flows: FlowLimits,
    /// How long a UDP flow that a pod opened may be idle.
    pub udp_idle: Duration,
    /// How programs are attached.
    pub attach: Attach,
    /// Whether the programs trace what they do.
    pub trace: bool,
    /// Whether the programs pass decided DNS on without the agent, on kernels that allow it.
    pub learns: bool,
}

/// The loaded programs and the maps that all pods share.
pub struct Datapath {
    pub(super) ebpf: Ebpf,
    pub(super) layout: Layout,
    pub(super) templates: Templates,
    pub(super) allow_entries: u32,
    pub(super) flow_limits: FlowLimits,
    pub(super) attach: Attach,
    pub(super) policies: HashMap<MapData, PolicyId, Policy>,
    pub(super) outer: Arc<OuterMaps>,
    pub(super) meters: HashMap<MapData, PodId, Meter>,
    pub(super) forged: HashMap<MapData, PodId, Forged>,
    pub(super) identities: HashMap<MapData, PodId, Identity>,
    pub(super) ranges: LpmTrie<MapData, Address, Range>,
    pub(super) dns_ports: Array<MapData, DnsPorts>,
    pub(super) tunnels: HashMap<MapData, TunnelKey, Tunnel>,
    bpffs: PathBuf,
    /// The directory of pins from which the maps were opened.
    pub(super) root: DirectoryId,
    pub(super) constants: Constants,
    /// The programs loaded a second time, for [`Datapath::stand_in`].
    stand_in: Option<Ebpf>,
    /// The check for frames that the programs have not judged.
    pub(super) stamp_check: Option<StampCheck>,
}

impl Datapath {
    /// Loads the programs and opens or creates the maps. Adopts the maps that an earlier agent left
    /// pinned.
    ///
    /// # Errors
    ///
    /// When the kernel or the privileges are insufficient, bpffs is missing, a pinned map has another
    /// shape, or the kernel rejects a program. Each message says what to do.
    pub fn open(options: &Options) -> Result<Self> {
        let kernel = KernelVersion::current().context("cannot read the kernel's version")?;
        check_kernel(kernel)?;
        bpffs::mount_if_missing(&options.bpffs)?;
        let layout = Layout::new(&options.bpffs);
        // Two agents that start at the same time must open the same maps and use the same stamp.
        let _opening = layout.lock_top()?;
        layout.create()?;
        let root = layout.identity()?;
        check_shapes(&layout)?;

        let marks = Marks {
            deliver: random_mark()?,
            bounce: random_mark()?,
            again: random_mark()?,
            probe: random_mark()?,
        };
        let coarse_clock = is_helper_supported(ProgramType::SchedClassifier, COARSE_CLOCK)
            .context("cannot find out which clocks the kernel has")?;
        let reads = is_helper_supported(ProgramType::SchedClassifier, READ_KERNEL)
            .context("cannot find out whether programs may read the kernel's memory")?;
        if !reads {
            bail!(
                "the kernel does not let programs read its memory, so they cannot find out which checksums \
                 are complete: its lockdown mode is `confidentiality` (/sys/kernel/security/lockdown); boot \
                 it with lockdown=integrity"
            );
        }
        let global_functions = kernel >= GLOBAL_FUNCTIONS;
        if options.learns && !global_functions {
            tracing::info!(
                %kernel,
                needed = %GLOBAL_FUNCTIONS,
                "the kernel is too old to read responses by itself (`dns.learn: kernel`): the agent reads all of them"
            );
        }
        let constants = Constants {
            marks,
            stamp: Stamp::kept_or_new(&layout)?,
            trace: options.trace,
            udp_idle_ns: options.udp_idle.as_nanos() as u64,
            coarse_clock,
            frame_record: FrameRecord::of_this_kernel()?,
            global_functions,
            learns: options.learns && global_functions,
        };
        let mut ebpf = load_object(&layout, &constants)?;
        constants.stamp.keep(take(&mut ebpf, "stamp")?)?;

        // Pinned maps have the type information of the build that created them, so use a map that is not
        // pinned.
        let unpinned: MapData = match take(&mut ebpf, "names")? {
            Map::HashMap(names) => names,
            _ => bail!("the map `names` of the eBPF object is not a hash map"),
        };
        let templates = Templates::new(OBJECT, &unpinned.info()?)?;
        Ok(Self {
            templates,
            allow_entries: options.allow_entries,
            flow_limits: options.flows,
            attach: options.attach.resolve(kernel),
            policies: HashMap::try_from(take(&mut ebpf, "policies")?)?,
            outer: Arc::new(OuterMaps::open(|name| open(&layout, name))?),
            meters: HashMap::try_from(take(&mut ebpf, "meters")?)?,
            forged: HashMap::try_from(take(&mut ebpf, "forged")?)?,
            identities: HashMap::try_from(take(&mut ebpf, "identities")?)?,
            ranges: LpmTrie::try_from(take(&mut ebpf, "ranges")?)?,
            dns_ports: Array::try_from(take(&mut ebpf, "dns_ports")?)?,
            tunnels: HashMap::try_from(take(&mut ebpf, "tunnels")?)?,
            bpffs: options.bpffs.clone(),
            root,
            layout,
            ebpf,
            constants,
            stand_in: None,
            stamp_check: None,
        })
    }

    /// Starts to look for frames without a stamp, or takes over an earlier agent's check. Call this while
    /// the pins are locked: a network namespace has only one check. A kernel without nf_tables has none.
    ///
    /// # Errors
    ///
    /// When the directory of links cannot be read.
    pub fn start_stamp_check(&mut self) -> Result<()> {
        let attached = self.attached()?;
        self.stamp_check = Some(StampCheck::open(self.constants.stamp, &attached));
        Ok(())
    }

    /// Marks of the frames that the gate sends.
    pub fn marks(&self) -> Marks {
        self.constants.marks
    }

    /// The same programs, loaded a second time, because the kernel does not attach one program twice to a
    /// hook. They stay loaded.
    pub(super) fn stand_in(&mut self) -> Result<&mut Ebpf> {
        let loaded = match self.stand_in.take() {
            Some(loaded) => loaded,
            None => load_object(&self.layout, &self.constants)?,
        };
        Ok(self.stand_in.insert(loaded))
    }

    /// A handle on the probe counters.
    ///
    /// # Errors
    ///
    /// When the pin cannot be opened.
    pub fn probes(&self) -> Result<ProbeMap> {
        let map = open(&self.layout, "probes")?;
        Ok(ProbeMap::new(HashMap::try_from(Map::HashMap(map))?))
    }

    /// Mount point of the BPF file system.
    pub fn bpffs(&self) -> &std::path::Path {
        &self.bpffs
    }

    /// The ring of held DNS messages. It can have only one reader.
    ///
    /// # Errors
    ///
    /// When it was taken before or cannot be mapped.
    pub fn take_held(&mut self) -> Result<HeldRing> {
        let ring = aya::maps::RingBuf::try_from(take(&mut self.ebpf, "held")?)?;
        let awake = aya::maps::Array::try_from(take(&mut self.ebpf, "gate_awake")?)?;
        HeldRing::new(ring, awake)
    }

    /// The ring of denials. It can have only one reader.
    ///
    /// # Errors
    ///
    /// When it was taken before or cannot be mapped.
    pub fn take_denials(&mut self) -> Result<DenialRing> {
        Ok(DenialRing::new(aya::maps::RingBuf::try_from(take(
            &mut self.ebpf,
            "denials",
        )?)?))
    }

    /// The ring of learned addresses. It can have only one reader.
    ///
    /// # Errors
    ///
    /// When it was taken before or cannot be mapped.
    pub fn take_notes(&mut self) -> Result<NoteRing> {
        let ring = aya::maps::RingBuf::try_from(take(&mut self.ebpf, "learned_notes")?)?;
        Ok(NoteRing::new(ring))
    }

    /// A handle on the `interfaces` map.
    ///
    /// # Errors
    ///
    /// When the pin cannot be opened.
    pub fn interfaces(&self) -> Result<InterfaceMap> {
        let map = open(&self.layout, "interfaces")?;
        let map: HashMap<MapData, IfIndex, InterfaceValue> = HashMap::try_from(Map::HashMap(map))?;
        Ok(InterfaceMap::new(map))
    }

    /// A handle on the counters and meters.
    ///
    /// # Errors
    ///
    /// When a pin cannot be opened.
    pub fn counters(&self) -> Result<CounterMap> {
        let counters = Map::PerCpuArray(open(&self.layout, "counters")?).try_into()?;
        let meters = open(&self.layout, "meters")?;
        let meters: HashMap<MapData, PodId, Meter> = Map::HashMap(meters).try_into()?;
        Ok(CounterMap::new(counters, meters))
    }

    /// Pods that an earlier agent enforced, by their id.
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    pub fn adoptable(&self) -> Result<std::collections::BTreeMap<PodId, Adoptable>> {
        let mut pods = std::collections::BTreeMap::new();
        for item in &self.identities {
            let (pod, identity) = item.context("cannot read the map `identities`")?;
            let adoptable = Adoptable {
                namespace: text(&identity.namespace),
                name: text(&identity.name),
                uid: text(&identity.uid),
                interfaces: Vec::new(),
            };
            pods.insert(pod, adoptable);
        }
        for (ifindex, entry) in self.interfaces()?.entries()? {
            if let Some(pod) = pods.get_mut(&entry.pod()) {
                pod.interfaces.push((ifindex, entry));
            }
        }
        Ok(pods)
    }

    /// Every policy id in the maps.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn policy_ids(&self) -> Result<Vec<PolicyId>> {
        self.policies
            .keys()
            .collect::<Result<_, _>>()
            .context("cannot read the map `policies`")
    }
}

/// Another handle on a map that all pods share.
pub(super) fn open(layout: &Layout, name: &str) -> Result<MapData> {
    MapData::from_pin(layout.map(name)).with_context(|| format!("cannot open the map `{name}`"))
}

/// A random mark, so that no other software on the node uses it except by chance. Zero is excluded, because
/// most frames have it.
fn random_mark() -> Result<u32> {
    random(u32::MAX)
}

/// A random number within these bits that is not zero.
pub(super) fn random(bits: u32) -> Result<u32> {
    use std::io::Read as _;
    let mut random = std::fs::File::open("/dev/urandom").context("cannot open /dev/urandom")?;
    loop {
        let mut bytes = [0; 4];
        random
            .read_exact(&mut bytes)
            .context("cannot read /dev/urandom")?;
        let number = u32::from_ne_bytes(bytes) & bits;
        if number != 0 {
            return Ok(number);
        }
    }
}
