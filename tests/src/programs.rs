//! Runs the programs of a pod's interface on frames, without an interface (`BPF_PROG_TEST_RUN`).

mod flows;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use egress_agent::datapath::{
    Action, AllowMap, Attach, Datapath, DenialRing, DryRun, HeldRing, Hook, InterfaceMap, Marks,
    NewMaps, NewPod, NewPolicy, Options,
};
use egress_common::{
    address::{Address, from_v4},
    classes::{ClassSet, PortTable},
    ids::{IfIndex, PodId, PolicyId},
    protocol::bits,
    reason::Reason,
    records::{
        AllowEntry, Counters, Denial, Held, Interface, MODE_AUDIT, MODE_ENFORCE, Policy, PortClass,
        Probes, RANGE_INTERNAL, RANGE_PROTECTED, RANGE_RESOLVER, Range, TunnelKey,
    },
};

use crate::{
    Lab, Pod, StopAtEnd,
    addresses::{RESOLVER, RESOLVER6, server, server6},
    raw::Ip,
};

/// The port that the policy allows on [`server`]`(1)` and [`server6`]`(1)`.
pub const PORT: u16 = 4000;
/// The bit of the class that allows TCP and UDP [`PORT`].
pub const TO_PORT: ClassSet = ClassSet::one(0);
/// The bit of the class that allows SCTP [`PORT`], and ping.
pub const OTHERS: ClassSet = ClassSet::one(1);
/// The bit of the class that allows, or denies, everything.
pub const ANYTHING: ClassSet = ClassSet::one(2);

/// UDP to this port, and every protocol but TCP, UDP, SCTP and ICMP, are tunnels.
pub const VXLAN: u16 = 8472;
/// Internal addresses, as those of nodes.
pub const INTERNAL: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 1, 200, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd01, 0xff, 0, 0, 0, 0, 0, 1)),
];

/// The pod's id in the maps.
pub const POD: PodId = PodId::new(7);
const FIRST_POLICY: PolicyId = PolicyId::new(100);

/// A time in the distant future.
const NEVER_NS: u64 = u64::MAX;

/// The programs, their maps, and one pod with a policy.
pub struct Programs {
    datapath: Datapath,
    interfaces: InterfaceMap,
    allow: AllowMap,
    held: HeldRing,
    denials: DenialRing,
    ifindex: IfIndex,
    interface: Interface,
    policy: Policy,
    pod: Pod,
    lab: Lab,
}

/// The outcome of a run.
#[derive(Debug)]
pub struct Outcome {
    /// The program's result.
    pub run: DryRun,
    /// The denials that it reported.
    pub denials: Vec<Denial>,
    /// The frames that it passed to the agent.
    pub held: Vec<(Held, Vec<u8>)>,
}

impl Programs {
    /// A pod with an IPv4 and an IPv6 address. It may send TCP, UDP and SCTP to port [`PORT`] of
    /// [`server`]`(1)` and [`server6`]`(1)`, and ping them.
    #[track_caller]
    #[expect(clippy::new_without_default, reason = "it changes the machine")]
    pub fn new() -> Self {
        let lab = Lab::builder().without_dns().build();
        let pod = lab.pod("shop", "cart");
        let options = Options {
            bpffs: lab.bpffs(),
            allow_entries: 16,
            flows: egress_common::limits::FlowLimits::of(egress_common::limits::FLOW_ENTRIES),
            udp_idle: std::time::Duration::from_nanos(egress_common::flow::UDP_NS),
            attach: Attach::Auto,
            trace: false,
            learns: true,
        };
        let mut datapath = Datapath::open(&options).expect("the kernel takes the programs");
        let ifindex = lab.ifindex(pod.interface());
        let tunnels = [
            TunnelKey::new(bits::OTHER, 0),
            TunnelKey::new(bits::UDP, VXLAN),
        ];
        let ranges = [
            (address(RESOLVER), 128, kind(RANGE_RESOLVER)),
            (address(RESOLVER6), 128, kind(RANGE_RESOLVER)),
            (from_v4([10, 1, 0, 0]), 112, kind(RANGE_INTERNAL)),
            (address("fd01:ff::"), 32, kind(RANGE_INTERNAL)),
            (from_v4([169, 254, 0, 0]), 112, kind(RANGE_PROTECTED)),
            (address("fe80::"), 10, kind(RANGE_PROTECTED)),
            (address("ff00::"), 8, kind(RANGE_PROTECTED)),
        ];
        datapath
            .put_in_force(&tunnels, &ranges)
            .expect("the maps of ranges and tunnels");
        let policy = policy(&pod);
        let interface = Interface::new(POD, FIRST_POLICY, MODE_ENFORCE);
        let new_pod = NewPod {
            id: POD,
            namespace: pod.namespace(),
            name: pod.name(),
            uid: "uid",
        };
        let allow = make(&mut datapath, Some(new_pod), FIRST_POLICY, &policy);
        let mut programs = Self {
            interfaces: datapath.interfaces().expect("the map of interfaces"),
            held: datapath.take_held().expect("the ring of held frames"),
            denials: datapath.take_denials().expect("the ring of denials"),
            datapath,
            allow,
            ifindex,
            interface,
            policy,
            pod,
            lab,
        };
        programs.write_interface();
        for allowed in [server(1), server6(1)] {
            programs.allow(allowed, TO_PORT.or(OTHERS), NEVER_NS);
        }
        programs
    }

    /// The pod's IPv4 address.
    pub fn own(&self) -> Ipv4Addr {
        self.pod.ipv4()
    }

    /// The pod's IPv6 address.
    pub fn own6(&self) -> Ipv6Addr {
        self.pod.ipv6()
    }

    /// A packet of the pod, from its address of the same family.
    pub fn to(&self, dst: impl Into<IpAddr>) -> Ip {
        let dst = dst.into();
        Ip::new(self.pod.address_for(dst), dst)
    }

    /// A packet to the pod's address of the same family.
    pub fn by(&self, src: impl Into<IpAddr>) -> Ip {
        let src = src.into();
        Ip::new(src, self.pod.address_for(src))
    }

    fn next_policy(&self) -> PolicyId {
        PolicyId::new(self.interface.policy().get() + 1)
    }

    fn write_interface(&mut self) {
        self.interfaces
            .set(self.ifindex, self.interface)
            .expect("the map of interfaces can be written");
    }

    /// Changes the interface's entry.
    pub fn set_interface(&mut self, change: impl FnOnce(&mut Interface)) {
        change(&mut self.interface);
        self.write_interface();
    }

    /// Sets audit mode: denials are only reported.
    pub fn audit(&mut self) {
        self.set_interface(|interface| interface.mode = MODE_AUDIT);
    }

    /// Assigns the interface to another pod, which has its own limit in the rings.
    pub fn becomes_another_pods(&mut self) {
        let other = PodId::new(self.interface.pod().get() + 1);
        let policy = self.next_policy();
        let flags = self.interface.flags;
        self.interface = Interface::new(other, policy, self.interface.mode);
        self.interface.flags = flags;
        let name = format!("other-{other}");
        let new_pod = NewPod {
            id: other,
            namespace: self.pod.namespace(),
            name: &name,
            uid: "uid",
        };
        self.allow = make(&mut self.datapath, Some(new_pod), policy, &self.policy);
        self.write_interface();
    }

    /// Removes the interface's entry from the map.
    pub fn forget_interface(&mut self) {
        self.interfaces
            .remove(self.ifindex, self.interface.pod())
            .expect("the map of interfaces can be written");
    }

    /// Runs `from_pod` `times` times on a frame. Meanwhile the interface's entry is replaced without a pause, and so is that
    /// of a neighbour's interface, from which everything passes.
    #[track_caller]
    pub fn flood_amid_changes(&mut self, frame: &[u8], times: u32) {
        let neighbour = PodId::new(self.interface.pod().get() + 1);
        let policy = self.next_policy();
        let new_pod = NewPod {
            id: neighbour,
            namespace: self.pod.namespace(),
            name: "neighbour",
            uid: "uid",
        };
        make(&mut self.datapath, Some(new_pod), policy, &self.policy);
        let entries = [
            (self.ifindex, self.interface),
            (
                IfIndex::new(self.ifindex.get() + 1_000_000),
                Interface::new(neighbour, policy, MODE_AUDIT),
            ),
        ];
        let mut interfaces = self.datapath.interfaces().expect("the map of interfaces");
        let ends = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !ends.load(Ordering::Relaxed) {
                    for (ifindex, entry) in entries {
                        interfaces
                            .set(ifindex, entry)
                            .expect("the map of interfaces");
                    }
                }
            });
            let _ends = StopAtEnd(&ends);
            self.flood(Hook::FromPod, [frame.to_vec()].into_iter(), times);
        });
    }

    /// Inserts an address into the allow map.
    #[track_caller]
    pub fn allow(&mut self, to: impl Into<IpAddr>, classes: ClassSet, expires_ns: u64) {
        let entry = AllowEntry {
            classes,
            internal_classes: ClassSet::EMPTY,
            expires_ns,
        };
        self.allow
            .insert(address(to.into()), entry)
            .expect("the allow map has room");
    }

    /// Gives the pod a new version of its policy, with an empty allow map.
    #[track_caller]
    pub fn change_policy(&mut self, change: impl FnOnce(&mut Policy)) {
        change(&mut self.policy);
        let next = self.next_policy();
        self.interface = self.interface.under(next);
        self.allow = make(&mut self.datapath, None, next, &self.policy);
        self.write_interface();
    }

    /// Changes the entries of one of the pod's maps ([`Lab::rewrite`]).
    #[track_caller]
    pub fn rewrite(&self, map: &str, edit: impl FnMut(&[u8], &mut [u8])) {
        self.lab.rewrite(&self.pod, map, edit);
    }

    /// Changes the values of a map that all pods share ([`Lab::rewrite_shared`]).
    #[track_caller]
    pub fn rewrite_shared(&self, map: &str, edit: impl FnMut(&[u8], &mut [u8])) {
        self.lab.rewrite_shared(map, edit);
    }

    /// Pins the pod's allow map, so that it can be changed by [`Self::rewrite`].
    #[track_caller]
    pub fn pin_allow(&self) {
        let pins = self.datapath.pins_of(self.pod.namespace(), self.pod.name());
        self.datapath
            .pin_allow(self.interface.policy(), &pins)
            .expect("the pod's allow map");
    }

    /// The node's counters.
    #[track_caller]
    pub fn counters(&self) -> Counters {
        let counters = self.datapath.counters().expect("the map of counters");
        counters.counters().expect("the counters")
    }

    /// The number of instructions that the verifier processed.
    #[track_caller]
    pub fn verified_instructions(&mut self, hook: Hook) -> u32 {
        self.datapath
            .verified_instructions(hook)
            .expect("the kernel describes the program")
            .expect("kernels since 5.16 report it")
    }

    /// The number of probes that `from_pod` has counted on the pod's interface.
    #[track_caller]
    pub fn probes(&self) -> Probes {
        let mut probes = self.datapath.probes().expect("the map of probes");
        probes.count(self.ifindex).expect("the map is readable")
    }

    /// The marks of frames that the agent sends.
    pub fn marks(&self) -> Marks {
        self.datapath.marks()
    }

    /// Runs a program on a frame with this mark.
    #[track_caller]
    pub fn run_marked(&mut self, hook: Hook, mark: u32, frame: &[u8]) -> Outcome {
        let Self {
            datapath,
            lab,
            ifindex,
            ..
        } = self;
        let run = lab
            .node()
            .run(|| datapath.dry_run(hook, *ifindex, mark, frame, 1))
            .unwrap_or_else(|e| panic!("{e:#}"));
        let denials = std::iter::from_fn(|| self.denials.take()).collect();
        let mut held = Vec::new();
        while self.held.next(|h| held.push((h.head, h.frame.to_vec()))) {}
        Outcome { run, denials, held }
    }

    /// Runs a program `times` times on each of these frames, and leaves the reported denials and held frames
    /// in the rings.
    #[track_caller]
    pub fn flood(&mut self, hook: Hook, frames: impl Iterator<Item = Vec<u8>> + Send, times: u32) {
        let Self {
            datapath,
            lab,
            ifindex,
            ..
        } = self;
        lab.node().run(|| {
            for frame in frames {
                datapath
                    .dry_run(hook, *ifindex, 0, &frame, times)
                    .unwrap_or_else(|e| panic!("{e:#}"));
            }
        });
    }

    /// Empties the rings; returns the number of held frames and of denials.
    pub fn drain(&mut self) -> (usize, usize) {
        let denials = std::iter::from_fn(|| self.denials.take()).count();
        let mut held = 0;
        while self.held.next(|_| held += 1) {}
        (held, denials)
    }

    /// Runs `from_pod` on a frame.
    #[track_caller]
    pub fn sends(&mut self, frame: &[u8]) -> Outcome {
        self.run_marked(Hook::FromPod, 0, frame)
    }

    /// Runs `to_pod` on a frame.
    #[track_caller]
    pub fn receives(&mut self, frame: &[u8]) -> Outcome {
        self.run_marked(Hook::ToPod, 0, frame)
    }

    /// Asserts that a frame of the pod passes, neither reported nor held.
    #[track_caller]
    pub fn leaves(&mut self, frame: &[u8]) {
        self.sends(frame).passed();
    }

    /// Asserts that a frame to the pod passes, neither reported nor held.
    #[track_caller]
    pub fn arrives(&mut self, frame: &[u8]) {
        self.receives(frame).passed();
    }

    /// Asserts that a frame of the pod is dropped and reported once, with this reason.
    #[track_caller]
    pub fn stays(&mut self, frame: &[u8], reason: Reason) -> Denial {
        self.sends(frame).denied(reason)
    }
}

impl Outcome {
    /// Asserts that the frame passed, neither reported nor held.
    #[track_caller]
    pub fn passed(&self) {
        assert_eq!(self.run.action, Action::Pass, "{self:?}");
        assert!(self.denials.is_empty() && self.held.is_empty(), "{self:?}");
    }

    /// Asserts that the frame was dropped and reported once.
    #[track_caller]
    pub fn denied(&self, reason: Reason) -> Denial {
        assert_eq!(self.run.action, Action::Drop, "{self:?}");
        assert!(self.held.is_empty(), "{self:?}");
        self.reported(reason)
    }

    /// Asserts that the frame was reported once.
    #[track_caller]
    pub fn reported(&self, reason: Reason) -> Denial {
        let [denial] = self.denials[..] else {
            panic!("one denial: {self:?}");
        };
        assert_eq!(Reason::from_u8(denial.reason), Some(reason), "{self:?}");
        denial
    }

    /// Asserts that the frame was held, and returns it.
    #[track_caller]
    pub fn taken(&self) -> &(Held, Vec<u8>) {
        assert_eq!(self.run.action, Action::Drop, "{self:?}");
        assert!(self.denials.is_empty(), "{self:?}");
        let [held] = &self.held[..] else {
            panic!("one held frame: {self:?}");
        };
        held
    }
}

/// Creates the maps of a policy, and of a pod if there is one.
#[track_caller]
fn make(
    datapath: &mut Datapath,
    pod: Option<NewPod<'_>>,
    policy: PolicyId,
    record: &Policy,
) -> AllowMap {
    let policy = NewPolicy {
        id: policy,
        record,
        cidrs: Vec::new(),
        allow_of: None,
    };
    let wanted = NewMaps {
        pod,
        policy: Some(policy),
    };
    let made = datapath.make(&[wanted], &[]).pop();
    let made = made.expect("a result for each").expect("the maps");
    made.expect("an allow map")
}

fn policy(pod: &Pod) -> Policy {
    let class = |protocols, port_min, port_max| PortClass {
        port_min,
        port_max,
        protocols,
        pad: [0; 3],
    };
    let mut policy = Policy::CLOSED;
    policy.classes[0] = class(bits::TCP | bits::UDP, PORT, PORT);
    policy.classes[1] = class(bits::SCTP | bits::ICMP_ECHO, PORT, PORT);
    policy.classes[2] = class(bits::ALL, 0, u16::MAX);
    policy.ports = PortTable::of(&policy.classes).expect("few intervals");
    policy.own[0] = address(IpAddr::from(pod.ipv4()));
    policy.own[1] = address(IpAddr::from(pod.ipv6()));
    policy.own_len = 2;
    policy
}

/// The entry of a range in the map of ranges; a resolver has port 53.
fn kind(kinds: u64) -> Range {
    let port = if kinds & RANGE_RESOLVER == 0 { 0 } else { 53 };
    Range {
        kinds,
        resolver_ports: [port, 0, 0, 0],
    }
}

/// An address in the format of the maps.
#[track_caller]
pub fn address(address: impl Into<AnyAddress>) -> Address {
    match address.into().0 {
        IpAddr::V4(address) => from_v4(address.octets()),
        IpAddr::V6(address) => address.octets(),
    }
}

/// An address, or the text of one.
#[derive(Debug)]
pub struct AnyAddress(IpAddr);

impl From<IpAddr> for AnyAddress {
    fn from(address: IpAddr) -> Self {
        Self(address)
    }
}

impl From<&str> for AnyAddress {
    #[track_caller]
    fn from(text: &str) -> Self {
        Self(text.parse().expect("an address"))
    }
}
