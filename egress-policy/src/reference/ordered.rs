//! Ordered rules, by definition, and the check that the compiled form gives the same results.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use egress_common::{protocol::bits, reason::Reason, verdict::Verdict};
use proptest::prelude::*;

use super::{
    plain::{Line, Packet, Where, to_name},
    properties::{compiled_answer, compiled_verdict},
    random::{denied_line, line, packet, packets_of, queried, teams, written},
    settings,
    teams::{Granted, Stance, Teams},
};
use crate::{
    Annotations, Inputs, Mode, Objects, PodAnnotations, QuestionRule, Settings, compile,
    objects::{ObjectKind, ObjectName, Tier, TierAction, TierPolicy, TierRule},
    prefix::to_mapped,
    unidentified,
};

/// The rules of one object.
#[derive(Clone, Debug)]
struct Ordered {
    kind: ObjectKind,
    name: String,
    tier: Tier,
    priority: u32,
    rules: Vec<(TierAction, Vec<Line>)>,
}

fn objects(policies: &[Ordered], teams: &Teams) -> Objects {
    let policy = |policy: &Ordered| {
        let rule = |(index, (action, lines)): (usize, &(TierAction, Vec<Line>))| TierRule {
            name: None,
            index,
            action: *action,
            entries: lines.iter().map(Line::text).collect(),
        };
        Arc::new(TierPolicy {
            name: Arc::new(ObjectName {
                kind: policy.kind,
                namespace: None,
                name: policy.name.clone(),
            }),
            tier: policy.tier,
            priority: policy.priority,
            rules: policy.rules.iter().enumerate().map(rule).collect(),
        })
    };
    Objects {
        namespace: teams.objects(),
        tiers: policies.iter().map(policy).collect(),
        sets: Arc::new(BTreeMap::new()),
    }
}

/// All that concerns a pod.
struct World<'a> {
    policies: &'a [Ordered],
    allow: Vec<Granted<'a>>,
    deny: Vec<&'a Line>,
    resolve: Vec<Granted<'a>>,
    /// Whether packets that no rule matches pass.
    open: bool,
    /// Whether the teams' lists close the pod.
    selected: bool,
    settings: &'a Settings,
}

/// The verdict on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Passes,
    DeniedByRule,
    Denied,
}

impl<'a> World<'a> {
    fn new(teams: &'a Teams, policies: &'a [Ordered], settings: &'a Settings) -> Self {
        let Stance {
            is_spoken,
            mode,
            open,
        } = teams.stance(settings);
        // Under ordered rules, lists of a looser mode do not count.
        let counts = !is_spoken || policies.is_empty() || mode == Mode::Enforce;
        let mut world = Self {
            policies,
            allow: Vec::new(),
            deny: Vec::new(),
            resolve: Vec::new(),
            open: match (counts, is_spoken) {
                (false, _) => true,
                (true, true) => open,
                (true, false) => settings.default_mode == Mode::Off,
            },
            selected: counts && is_spoken && !open,
            settings,
        };
        if counts {
            world.allow = teams.grants(settings);
            world.deny = teams.denials();
            world.resolve = teams.resolved(settings);
        }
        world
    }

    /// The rules of a tier, in order: by priority; of one priority first the denials with which a policy begins; then
    /// by kind, name and place.
    fn tier(&self, tier: Tier) -> Vec<&'a (TierAction, Vec<Line>)> {
        let mut rules = Vec::new();
        for policy in self.policies.iter().filter(|policy| policy.tier == tier) {
            let mut is_later = false;
            for (place, rule) in policy.rules.iter().enumerate() {
                is_later |= rule.0 != TierAction::Deny;
                let order = (policy.priority, is_later, policy.kind, &policy.name, place);
                rules.push((order, rule));
            }
        }
        rules.sort_by_key(|(order, _)| *order);
        rules.into_iter().map(|(_, rule)| rule).collect()
    }

    /// Whether an entry matches. `address`: whether the packet goes to its address, and not to one of which only the
    /// family and the name are known.
    fn matches(&self, line: &Line, packet: &Packet, allows: bool, address: bool) -> bool {
        let in_net = if address {
            line.contains(packet.to)
        } else {
            matches!(line.to, Where::Net(net, 0) if net.is_ipv4() == packet.to.is_ipv4())
        };
        let reaches = in_net
            || (line.is_anywhere() && self.anywhere(packet, allows))
            || packet.through.as_ref().is_some_and(|name| {
                let is_elsewhere = allows && self.is_elsewhere(packet);
                let may_be_internal = self.settings.allow_internal || !packet.internal;
                let is_by_name = !packet.expired && !Self::by_address(packet);
                line.names(name) && is_by_name && may_be_internal && !is_elsewhere
            });
        let bare = if allows {
            bits::TCP | bits::UDP | bits::ICMP_ECHO
        } else {
            bits::ALL
        };
        reaches && line.matches_packet(packet, bare)
    }

    /// Whether an entry that a team may allow matches.
    fn granted(&self, granted: &Granted<'_>, packet: &Packet, address: bool) -> bool {
        let Some(line) = granted.of(packet, self.settings) else {
            return false;
        };
        let opens_more = granted.is_under_any() && !self.anywhere(packet, true);
        !opens_more && self.matches(line, packet, true, address)
    }

    /// Whether some packet has the ports and protocol of an entry.
    fn opens_some(&self, granted: &Granted<'_>) -> bool {
        Self::kinds(None).any(|packet| granted.of(&packet, self.settings).is_some())
    }

    /// Whether an entry that means every destination means that of the packet.
    fn anywhere(&self, packet: &Packet, allows: bool) -> bool {
        !(allows && (Self::by_address(packet) || self.is_elsewhere(packet)))
    }

    /// Whether only an entry with the address opens it.
    fn by_address(packet: &Packet) -> bool {
        packet.protected || (packet.tunnel && packet.internal)
    }

    /// Whether it may be a query to a server that is no resolver, of a pod whose names are restricted.
    fn is_elsewhere(&self, packet: &Packet) -> bool {
        let dns = (packet.port == 53 || packet.port == 853)
            && packet.protocol & (bits::TCP | bits::UDP) != 0;
        dns && self.speaks_of_names()
    }

    /// Whether an entry that denies matches a packet that answers. The denial of a name counts wherever the name
    /// leads, and after its time; internal addresses are not meant by a denial of every destination.
    fn denies_answer(line: &Line, packet: &Packet) -> bool {
        let named = packet.through.as_ref().is_some_and(|name| line.names(name));
        let reaches = line.contains(packet.to) || named || (line.is_anywhere() && !packet.internal);
        reaches && line.matches_packet(packet, bits::ALL)
    }

    /// The decision of the rules; `None` if none decides.
    fn decided(&self, packet: &Packet, address: bool) -> Option<bool> {
        self.decided_by(packet, address, |line, action| {
            self.matches(line, packet, action == TierAction::Allow, address)
        })
    }

    /// Whether the packet passes as the answer to a flow that the other side opened.
    fn answers(&self, packet: &Packet) -> bool {
        let packet = &self.learned(packet);
        let decided = self.decided_by(packet, true, |line, action| match action {
            TierAction::Deny => !self.spares_answers(line) && Self::denies_answer(line, packet),
            TierAction::Allow => self.matches(line, packet, true, true),
            TierAction::Pass => self.matches(line, packet, false, true),
        });
        if decided == Some(false) {
            return false;
        }
        if !(packet.tunnel && packet.internal) {
            return true;
        }
        let mut ordered = self.tier(Tier::Admin);
        if self.asks_last_tier(packet) {
            ordered.extend(self.tier(Tier::Baseline));
        }
        let ordered = ordered
            .into_iter()
            .filter(|(action, _)| *action == TierAction::Allow)
            .flat_map(|(_, lines)| lines);
        let of_teams = self.allow.iter();
        let of_teams = of_teams
            .filter(|granted| !granted.is_under_any())
            .filter_map(|granted| granted.of(packet, self.settings));
        ordered.chain(of_teams).any(|line| {
            line.contains(packet.to)
                && line.matches_packet(packet, bits::TCP | bits::UDP | bits::ICMP_ECHO)
        })
    }

    /// Whether this line is of a policy whose denials are about what pods open.
    fn spares_answers(&self, line: &Line) -> bool {
        let kind = ObjectKind::ClusterNetworkPolicy;
        let policies = self.policies.iter().filter(|policy| policy.kind == kind);
        let mut lines = policies
            .flat_map(|policy| &policy.rules)
            .flat_map(|(_, lines)| lines);
        lines.any(|other| std::ptr::eq(other, line))
    }

    /// The packet as the kernel sees it: no name is learned that may not be queried.
    fn learned(&self, packet: &Packet) -> Packet {
        let refused = |name: &Vec<Vec<u8>>| self.question(name) == QuestionRule::Denied;
        Packet {
            through: packet.through.clone().filter(|name| !refused(name)),
            ..packet.clone()
        }
    }

    fn asks_last_tier(&self, packet: &Packet) -> bool {
        !self.selected || (packet.internal && self.settings.allow_internal)
    }

    fn decided_by(
        &self,
        packet: &Packet,
        address: bool,
        matches: impl Fn(&Line, TierAction) -> bool,
    ) -> Option<bool> {
        let first = |tier| {
            self.tier(tier).into_iter().find_map(|(action, lines)| {
                let hit = lines.iter().any(|line| matches(line, *action));
                hit.then_some(*action)
            })
        };
        match first(Tier::Admin) {
            Some(TierAction::Allow) => return Some(true),
            Some(TierAction::Deny) => return Some(false),
            Some(TierAction::Pass) | None => {}
        }
        if self.deny.iter().any(|line| matches(line, TierAction::Deny)) {
            return Some(false);
        }
        let granted = |granted: &Granted<'_>| self.granted(granted, packet, address);
        if self.allow.iter().any(granted) {
            return Some(true);
        }
        if !self.asks_last_tier(packet) {
            return None;
        }
        match first(Tier::Baseline) {
            Some(TierAction::Allow) => Some(true),
            Some(TierAction::Deny) => Some(false),
            Some(TierAction::Pass) | None => None,
        }
    }

    fn fate(&self, packet: &Packet) -> Fate {
        let packet = &self.learned(packet);
        match self.decided(packet, true) {
            Some(true) => return Fate::Passes,
            Some(false) => return Fate::DeniedByRule,
            None => {}
        }
        let dns = (packet.port == 53 || packet.port == 853)
            && packet.protocol & (bits::TCP | bits::UDP) != 0;
        let internal = packet.internal && self.settings.allow_internal && !dns;
        let open = self.open && !self.is_elsewhere(packet);
        if !Self::by_address(packet) && (internal || open) {
            Fate::Passes
        } else {
            Fate::Denied
        }
    }

    fn speaks_of_names(&self) -> bool {
        let mut ordered = self.policies.iter().flat_map(|policy| &policy.rules);
        let denies = ordered.any(|(action, lines)| {
            *action == TierAction::Deny
                && lines.iter().any(|line| matches!(line.to, Where::Names(_)))
        });
        let mut of_teams = self.deny.iter();
        let teams_deny = of_teams.any(|line| matches!(line.to, Where::Names(_)));
        denies || teams_deny || self.unlisted() == QuestionRule::NotListed
    }

    /// Packets of every kind to external addresses that the pod has by this name, or by none.
    fn kinds(name: Option<&Vec<Vec<u8>>>) -> impl Iterator<Item = Packet> {
        let ports = [
            0, 1, 79, 80, 81, 442, 443, 444, 46, 47, 48, 49, 50, 51, 7999, 8000, 8001, 8079, 8080,
            8081, 65534, 65535,
        ];
        let families: [IpAddr; 2] = [[0; 4].into(), [0; 16].into()];
        let name = name.cloned();
        let kinds = families
            .into_iter()
            .flat_map(move |to| (0..6).flat_map(move |bit| ports.map(|port| (to, bit, port))));
        kinds.map(move |(to, bit, port)| Packet {
            to,
            through: name.clone(),
            expired: false,
            protocol: 1 << bit,
            port,
            protected: false,
            internal: false,
            tunnel: false,
        })
    }

    /// Whether some packet to an external address passes that the pod has by this name, or by none.
    fn opens(&self, name: Option<&Vec<Vec<u8>>>) -> bool {
        Self::kinds(name).any(|packet| self.decided(&packet, false).unwrap_or(self.open))
    }

    /// Whether the first tier denies every such packet.
    fn is_closed(&self, name: Option<&Vec<Vec<u8>>>) -> bool {
        Self::kinds(name).all(|packet| {
            let mut rules = self.tier(Tier::Admin).into_iter();
            let first = rules.find(|(action, lines)| {
                let allows = *action == TierAction::Allow;
                let mut lines = lines.iter();
                lines.any(|line| self.matches(line, &packet, allows, false))
            });
            first.is_some_and(|(action, _)| *action == TierAction::Deny)
        })
    }

    fn unlisted(&self) -> QuestionRule {
        let mut resolve = self.resolve.iter();
        let asks_any = resolve.any(|granted| granted.is_anywhere(self.settings));
        let may_ask = asks_any && !self.is_closed(None);
        let opens = if self.policies.is_empty() {
            // Without ordered rules only `*` opens names, and a prefix does not, whatever its length.
            let mut allow = self.allow.iter();
            let anywhere = self.open
                || allow
                    .any(|granted| granted.is_anywhere(self.settings) && self.opens_some(granted));
            anywhere && !self.deny.iter().any(|line| line.is_everything())
        } else {
            self.opens(None)
        };
        if !self.settings.guard || may_ask || opens {
            QuestionRule::Allowed
        } else {
            QuestionRule::NotListed
        }
    }

    fn question(&self, name: &Vec<Vec<u8>>) -> QuestionRule {
        let mut ordered = self.policies.iter().flat_map(|policy| &policy.rules);
        let named = |lines: &[Line]| lines.iter().any(|line| line.names(name));
        let granted = |granted: &Granted<'_>| granted.names(name, self.settings);
        let allowed = |one: &Granted<'_>| granted(one) && self.opens_some(one);
        let is_named = ordered.clone().any(|(_, lines)| named(lines))
            || self.allow.iter().any(allowed)
            || self.deny.iter().any(|line| line.names(name));
        let denied = ordered.any(|(action, lines)| *action == TierAction::Deny && named(lines))
            || self.deny.iter().any(|line| line.names(name));
        let in_cluster = name.ends_with(&[b"cluster".to_vec(), b"local".to_vec()]);
        let is_resolved = self.resolve.iter().any(granted);
        // Without ordered rules the lists alone say which names may be asked for.
        let by_lists = self.policies.is_empty() && !denied;
        if is_named && (by_lists || self.opens(Some(name))) {
            QuestionRule::Allowed
        } else if denied {
            QuestionRule::Denied
        } else if in_cluster || (is_resolved && !self.is_closed(Some(name))) {
            QuestionRule::Allowed
        } else {
            self.unlisted()
        }
    }
}

fn ordered() -> impl Strategy<Value = Vec<Ordered>> {
    let rule = prop_oneof![
        (Just(TierAction::Allow), prop::collection::vec(line(), 0..3)),
        (
            Just(TierAction::Deny),
            prop::collection::vec(denied_line(), 0..3)
        ),
        (Just(TierAction::Pass), prop::collection::vec(line(), 0..3)),
    ];
    let kind = prop_oneof![
        Just(ObjectKind::ClusterEgressPolicy),
        Just(ObjectKind::ClusterNetworkPolicy),
    ];
    let tier = prop_oneof![Just(Tier::Admin), Just(Tier::Baseline)];
    // Often two policies have one priority.
    let policy = (kind, tier, 0..3_u32, prop::collection::vec(rule, 1..4));
    prop::collection::vec(policy, 1..4).prop_map(|policies| {
        let numbered = policies.into_iter().enumerate();
        numbered
            .map(|(number, (kind, tier, priority, rules))| Ordered {
                kind,
                name: format!("p{}", 9 - number),
                tier,
                priority,
                rules,
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn the_compiled_policy_judges_according_to_the_order_of_tiers(
        (teams, packets) in teams().prop_flat_map(|teams| {
            let packets = packets_of(&teams);
            (Just(teams), packets)
        }),
        policies in prop_oneof![5 => ordered(), 1 => Just(Vec::new())],
        allow_internal: bool,
        guard in prop::bool::weighted(0.8),
        default_mode in prop_oneof![Just(Mode::Off), Just(Mode::Enforce)],
        pod_annotations in prop_oneof![
            2 => Just(PodAnnotations::Narrow),
            2 => Just(PodAnnotations::Grant),
            1 => Just(PodAnnotations::Ignore),
        ],
    ) {
        let settings = Settings { default_mode, pod_annotations, guard, allow_internal, ..settings() };
        // Nothing is enforced of a pod about which nothing is written.
        if policies.is_empty() && !teams.stance(&settings).is_spoken {
            return Ok(());
        }
        let objects = objects(&policies, &teams);
        let (of_pod, of_namespace) = (teams.pod.annotations(), teams.namespace.annotations());
        let inputs = Inputs { pod: &of_pod, namespace: &of_namespace, objects: &objects };
        let compiled = compile(inputs, &settings).unwrap();
        let world = World::new(&teams, &policies, &settings);
        for packet in &packets {
            if let Some(name) = &packet.through {
                let question = compiled.names.question(&to_name(name), false);
                prop_assert_eq!(question, world.question(name), "{:?}", name);
            }
            let fate = match compiled_verdict(&compiled, packet) {
                Verdict::Pass => Fate::Passes,
                Verdict::Deny { reason: Reason::DenyRule, class } => {
                    prop_assert!(compiled.deciding_entry(&to_mapped(packet.to), class).is_some());
                    Fate::DeniedByRule
                }
                Verdict::Deny { .. } => Fate::Denied,
            };
            prop_assert_eq!(fate, world.fate(packet), "{:?}", packet);
            let answers = compiled_answer(&compiled, packet) == Verdict::Pass;
            prop_assert_eq!(answers, world.answers(packet), "{:?}", packet);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn policies_with_alike_names_grant_the_same_to_the_addresses_of_every_name(
        pod in written(),
        policies in ordered(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), line()), 1..4),
        names in prop::collection::vec(queried(), 16),
    ) {
        let settings = settings();
        let annotations = pod.annotations();
        let none = Annotations::default();
        let of = |policies: &[Ordered]| {
            let objects = objects(policies, &Teams::default());
            let inputs = Inputs { pod: &annotations, namespace: &none, objects: &objects };
            compile(inputs, &settings)
        };
        let mut edited = policies.clone();
        let mut lines: Vec<&mut Line> = edited
            .iter_mut()
            .flat_map(|policy| policy.rules.iter_mut().flat_map(|(_, lines)| lines))
            .collect();
        if lines.is_empty() {
            return Ok(());
        }
        for (place, line) in edits {
            place.get_mut(&mut lines[..]).to = line.to;
        }
        let before = of(&policies).unwrap();
        // A denied name with ports is an error.
        let Ok(after) = of(&edited) else {
            return Ok(());
        };
        if before.names.grants_alike(&after.names) {
            for name in names.iter().map(|name| to_name(name)) {
                prop_assert_eq!(before.names.grant(&name), after.names.grant(&name));
            }
        }
    }

    #[test]
    fn a_pod_that_is_not_known_reaches_no_more_than_when_it_is_known(
        policies in prop::collection::vec((ordered(), any::<bool>(), any::<bool>()), 1..4),
        packets in prop::collection::vec(packet(), 16),
        allow_internal: bool,
    ) {
        let settings = Settings { allow_internal, default_mode: Mode::Enforce, ..settings() };
        let numbered = policies.into_iter().enumerate().flat_map(|(n, (policies, every, selects))| {
            let renamed = policies.into_iter().map(move |policy| Ordered {
                name: format!("{n}{}", policy.name),
                ..policy
            });
            renamed.map(move |policy| (policy, every, selects))
        });
        let (mut unknown, mut known) = (Vec::new(), Vec::new());
        for (policy, every, selects) in numbered {
            if every || selects {
                known.push(policy.clone());
            }
            let taking_away = |(action, lines): &(TierAction, Vec<Line>)| {
                (*action != TierAction::Allow).then(|| (TierAction::Deny, lines.clone()))
            };
            unknown.push(if every {
                policy
            } else {
                let rules = policy.rules.iter().filter_map(taking_away).collect();
                Ordered { rules, ..policy }
            });
        }
        let none = Annotations::default();
        let closing = Annotations { allow: Some(String::new()), ..Annotations::default() };
        let known = objects(&known, &Teams::default());
        let inputs = Inputs { pod: &none, namespace: &closing, objects: &known };
        let known = compile(inputs, &settings).unwrap();
        let unknown = unidentified(&objects(&unknown, &Teams::default()), &settings);
        for packet in packets.iter().map(|packet| Packet { through: None, ..packet.clone() }) {
            if compiled_verdict(&unknown, &packet) == Verdict::Pass {
                prop_assert_eq!(compiled_verdict(&known, &packet), Verdict::Pass, "{:?}", packet);
            }
        }
    }
}
