//! What teams write about a pod, by definition: its annotations, its namespace's, and the `EgressPolicy` objects that
//! select it.

use std::{net::IpAddr, sync::Arc};

use egress_common::protocol::bits;

use super::plain::{Line, Packet, Where, Written};
use crate::{
    Mode, PodAnnotations, Prefix, Settings,
    objects::{NamespacePolicy, ObjectKind, ObjectName},
    prefix::from_mapped,
};

/// Everything that teams write.
#[derive(Clone, Debug, Default)]
pub(super) struct Teams {
    pub(super) pod: Written,
    pub(super) namespace: Written,
    pub(super) policies: Vec<Written>,
}

/// What becomes of all this together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stance {
    /// Whether there is a list about packets, or a mode.
    pub(super) is_spoken: bool,
    /// The mode, if it is spoken.
    pub(super) mode: Mode,
    /// Whether packets that no rule matches pass.
    pub(super) open: bool,
}

/// An entry that counts, under `narrow` only as far as an entry of the namespace covers it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Granted<'a> {
    pub(super) line: &'a Line,
    pub(super) within: Option<&'a Line>,
}

/// A list of [`Written`].
pub(super) type List = fn(&Written) -> &Option<Vec<Line>>;

impl Teams {
    /// The objects of the `EgressPolicy` kind.
    pub(super) fn objects(&self) -> Vec<Arc<NamespacePolicy>> {
        let texts = |lines: &Option<Vec<Line>>| {
            let lines = lines.as_ref()?;
            Some(lines.iter().map(Line::text).collect())
        };
        let object = |(number, written): (usize, &Written)| {
            Arc::new(NamespacePolicy {
                name: Arc::new(ObjectName {
                    kind: ObjectKind::EgressPolicy,
                    namespace: Some("shop".to_owned()),
                    name: format!("e{number}"),
                }),
                mode: written.mode.and_then(Mode::from_text),
                allow: texts(&written.allow),
                deny: texts(&written.deny),
                resolve: texts(&written.resolve),
            })
        };
        self.policies.iter().enumerate().map(object).collect()
    }

    /// Whether a policy closes the pod by being there.
    fn closes(policy: &Written) -> bool {
        policy.allow.is_none() && policy.deny.is_none() && policy.mode.is_none()
    }

    /// The namespace's word: its annotations and the policies.
    fn of_namespace(&self) -> impl Iterator<Item = &Written> {
        [&self.namespace].into_iter().chain(&self.policies)
    }

    fn of_all(&self) -> impl Iterator<Item = &Written> {
        [&self.pod].into_iter().chain(self.of_namespace())
    }

    /// Every entry.
    pub(super) fn all(&self) -> impl Iterator<Item = &Line> {
        let lists: [List; 3] = [
            |written| &written.allow,
            |written| &written.deny,
            |written| &written.resolve,
        ];
        lists
            .into_iter()
            .flat_map(|list| Self::lines(self.of_all(), list))
    }

    pub(super) fn stance(&self, settings: &Settings) -> Stance {
        let mode = |written: &Written| written.mode.and_then(Mode::from_text);
        let has_lists = |written: &Written| written.allow.is_some() || written.deny.is_some();
        let closed_by_policy = self.policies.iter().any(Self::closes);
        let of_namespace = self.of_namespace().filter_map(mode).max();
        let namespace_has_lists = closed_by_policy || self.of_namespace().any(has_lists);
        let pod_has_lists = has_lists(&self.pod);
        let pod_mode = mode(&self.pod);

        let allows = closed_by_policy || self.of_all().any(|written| written.allow.is_some());
        let only_denies = !allows && self.of_all().any(|written| written.deny.is_some());
        let is_spoken =
            namespace_has_lists || pod_has_lists || of_namespace.is_some() || pod_mode.is_some();
        let by_lists = |has_lists: bool| has_lists.then_some(Mode::Enforce);
        if settings.pod_annotations == PodAnnotations::Grant {
            let lists = by_lists(namespace_has_lists || pod_has_lists);
            let mode = pod_mode.or(of_namespace).or(lists);
            return Stance {
                is_spoken,
                mode: mode.unwrap_or(settings.default_mode),
                open: only_denies,
            };
        }
        // The pod only tightens the mode that it has without annotations.
        let without = of_namespace
            .or(by_lists(namespace_has_lists))
            .unwrap_or(settings.default_mode);
        let own = match (pod_mode, of_namespace) {
            (Some(own), _) => own,
            (None, None) if pod_has_lists => Mode::Enforce,
            (None, _) => without,
        };
        let closed_without = without != Mode::Off && !namespace_has_lists;
        Stance {
            is_spoken,
            mode: own.max(without),
            open: only_denies && !closed_without,
        }
    }

    /// The entries that deny.
    pub(super) fn denials(&self) -> Vec<&Line> {
        Self::lines(self.of_all(), |written| &written.deny)
    }

    /// The entries that allow.
    pub(super) fn grants(&self, settings: &Settings) -> Vec<Granted<'_>> {
        let list: List = |written| &written.allow;
        let own = self.pod.allow.as_deref().unwrap_or_default();
        let given = Self::lines(self.of_namespace(), list);
        match settings.pod_annotations {
            PodAnnotations::Narrow if self.pod.allow.is_some() => {
                Self::pairs(own, &self.covering(&given))
            }
            PodAnnotations::Narrow => whole(self.covering(&given)),
            PodAnnotations::Grant => whole(own.iter().chain(given)),
            PodAnnotations::Ignore => whole(given),
        }
    }

    /// The entries of names that may only be queried.
    pub(super) fn resolved(&self, settings: &Settings) -> Vec<Granted<'_>> {
        let list: List = |written| &written.resolve;
        let own = self.pod.resolve.as_deref().unwrap_or_default();
        let given = Self::lines(self.of_namespace(), list);
        match settings.pod_annotations {
            PodAnnotations::Grant => whole(own.iter().chain(given)),
            PodAnnotations::Ignore => whole(given),
            PodAnnotations::Narrow => {
                let allowed = Self::lines(self.of_namespace(), |written| &written.allow);
                let mut covering = self.covering(&allowed);
                covering.extend(&given);
                let mut resolved = whole(given);
                resolved.extend(Self::pairs(own, &covering));
                resolved
            }
        }
    }

    /// The namespace's entries that count under `narrow`: a `*` beside a denial of everything covers nothing.
    fn covering<'a>(&'a self, given: &[&'a Line]) -> Vec<&'a Line> {
        let denies_everything = Self::lines(self.of_namespace(), |written| &written.deny)
            .iter()
            .any(|line| line.is_everything());
        let counts = |line: &&&Line| !(denies_everything && line.is_anywhere());
        given.iter().filter(counts).copied().collect()
    }

    fn lines<'a>(written: impl Iterator<Item = &'a Written>, list: List) -> Vec<&'a Line> {
        written.flat_map(|one| list(one).iter().flatten()).collect()
    }

    fn pairs<'a>(own: &'a [Line], given: &[&'a Line]) -> Vec<Granted<'a>> {
        own.iter()
            .flat_map(|line| {
                given.iter().map(move |within| Granted {
                    line,
                    within: Some(within),
                })
            })
            .collect()
    }
}

fn whole<'a>(lines: impl IntoIterator<Item = &'a Line>) -> Vec<Granted<'a>> {
    lines
        .into_iter()
        .map(|line| Granted { line, within: None })
        .collect()
}

impl<'a> Granted<'a> {
    /// The entry that says which names and addresses are meant, and the one whose ports and protocol count besides. A
    /// pair without a common destination is none: of a name and an address, or of two wildcards of which neither
    /// covers the other.
    fn common(&self, settings: &Settings) -> Option<(&'a Line, &'a Line)> {
        let Some(within) = self.within else {
            return Some((self.line, self.line));
        };
        let (line_first, within_first) = ((self.line, within), (within, self.line));
        match (&self.line.to, &within.to) {
            (Where::Anywhere, _) => Some(within_first),
            (Where::Names(_), Where::Anywhere) => Some(line_first),
            (Where::Names(own), Where::Names(given)) if covers(given, own) => Some(line_first),
            (Where::Names(own), Where::Names(given)) if covers(own, given) => Some(within_first),
            // `*` covers no address that it does not open.
            (Where::Net(..), Where::Anywhere) => {
                (!opens_protected(self.line, settings)).then_some(line_first)
            }
            (Where::Net(net, len), _) if within.holds(*net, *len) => Some(line_first),
            (_, Where::Net(net, len)) if self.line.holds(*net, *len) => Some(within_first),
            (Where::Names(_) | Where::Net(..), _) => None,
        }
    }

    /// The entry whose destination counts, if its ports and protocols match the packet.
    pub(super) fn of(&self, packet: &Packet, settings: &Settings) -> Option<&'a Line> {
        let bare = bits::TCP | bits::UDP | bits::ICMP_ECHO;
        let (to, other) = self.common(settings)?;
        (to.matches_packet(packet, bare) && other.matches_packet(packet, bare)).then_some(to)
    }

    /// Whether it is an address that counts because its namespace allows any. It opens no more than that.
    pub(super) fn is_under_any(&self) -> bool {
        matches!(self.line.to, Where::Net(..)) && self.within.is_some_and(Line::is_anywhere)
    }

    pub(super) fn names(&self, name: &[Vec<u8>], settings: &Settings) -> bool {
        self.common(settings).is_some_and(|(to, _)| to.names(name))
    }

    pub(super) fn is_anywhere(&self, settings: &Settings) -> bool {
        self.common(settings)
            .is_some_and(|(to, _)| to.is_anywhere())
    }
}

/// Whether a prefix has addresses in common with a protected one, in the forms in which translators know its addresses.
fn opens_protected(line: &Line, settings: &Settings) -> bool {
    let Where::Net(net, len) = line.to else {
        return false;
    };
    let own = Prefix::containing(net, len);
    let forms = |protected: &Prefix| {
        let IpAddr::V4(v4) = from_mapped(&protected.network()) else {
            return vec![*protected];
        };
        let [a, b, c, d] = v4.octets().map(u16::from);
        let [high, low] = [a << 8 | b, c << 8 | d];
        let len = protected.prefix_len() - 96;
        let nat64 = IpAddr::from([0x64, 0xff9b, 0, 0, 0, 0, high, low]);
        let six_to_four = IpAddr::from([0x2002, high, low, 0, 0, 0, 0, 0]);
        vec![
            *protected,
            Prefix::containing(nat64, 96 + len),
            Prefix::containing(six_to_four, 16 + len),
        ]
    };
    let mut protected = settings.protected.iter().flat_map(forms);
    protected.any(|form| form.intersection(&own).is_some())
}

/// Whether a pattern matches every name that the other one matches: label by label from the end.
fn covers(outer: &[&str], inner: &[&str]) -> bool {
    let covers_label = |(outer, inner): (&&str, &&str)| {
        let (outer, inner) = (outer.to_ascii_lowercase(), inner.to_ascii_lowercase());
        match (outer.split_once('*'), inner.contains('*')) {
            (None, _) | (_, true) => outer == inner,
            (Some((head, tail)), false) => {
                inner.len() >= head.len() + tail.len()
                    && inner.starts_with(head)
                    && inner.ends_with(tail)
            }
        }
    };
    let each = |outer: &[&str], inner: &[&str]| outer.iter().zip(inner).all(covers_label);
    let Some((&"*", rest)) = outer.split_first() else {
        return inner.first() != Some(&"*") && outer.len() == inner.len() && each(outer, inner);
    };
    // At least one label precedes `rest`, whether it is written or stands for several.
    let Some(before) = inner.len().checked_sub(rest.len()) else {
        return false;
    };
    before > 0 && each(rest, &inner[before..])
}
