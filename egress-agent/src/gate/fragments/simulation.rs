//! Builds fragments, and simulates the pod's kernel that receives them: for tests and for the fuzz target
//! `fragments`.

use std::collections::{BTreeMap, HashMap};

use egress_common::{
    ids::IfIndex,
    packet::{Packet, Walked, walk},
    protocol,
};

use super::{Budget, Fragments, Held, Key, LIMITS, Whole, checksum};

/// A fragment to build.
#[derive(Clone, Debug)]
pub(in super::super) struct Part {
    pub(in super::super) version: u8,
    pub(in super::super) id: u16,
    pub(in super::super) protocol: u8,
    /// The offset of its content, in units of 8 bytes.
    pub(in super::super) units: u16,
    pub(in super::super) more: bool,
    pub(in super::super) content: Vec<u8>,
}

impl Part {
    /// Its frame, from a resolver to a pod.
    pub(in super::super) fn frame(&self) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        let len = self.content.len() as u16;
        let more = u16::from(self.more);
        if self.version == 4 {
            frame.extend([8, 0]);
            let mut header = vec![0x45, 0];
            header.extend((20 + len).to_be_bytes());
            header.extend(self.id.to_be_bytes());
            header.extend((self.units | more << 13).to_be_bytes());
            header.extend([64, self.protocol, 0, 0, 10, 99, 0, 53, 10, 1, 2, 3]);
            let sum = checksum::of_ipv4_header(&header);
            header[10..12].copy_from_slice(&sum);
            frame.extend(header);
        } else {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend((8 + len).to_be_bytes());
            frame.extend([protocol::FRAGMENT, 64]);
            frame.extend([0xfd, 0x99, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x53]);
            frame.extend([0xfd, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
            frame.extend([self.protocol, 0]);
            frame.extend((self.units << 3 | more).to_be_bytes());
            frame.extend([0, 0]);
            frame.extend(self.id.to_be_bytes());
        }
        frame.extend(&self.content);
        frame
    }
}

/// The fragments of one pod, and a simulated kernel of that pod.
pub(in super::super) struct Scene {
    pub(in super::super) fragments: Fragments,
    pub(in super::super) budget: Budget,
    pub(in super::super) now_ns: u64,
    pub(in super::super) lost: Vec<&'static str>,
    receiver: Receiver,
}

impl Scene {
    pub(in super::super) fn new() -> Self {
        Self {
            fragments: Fragments::new(),
            budget: Budget::new(LIMITS),
            now_ns: 1_000_000_000_000,
            lost: Vec::new(),
            receiver: Receiver::default(),
        }
    }

    /// Adds a fragment. Returns the content of its datagram if that is put back.
    pub(in super::super) fn add(&mut self, part: &Part) -> Option<Vec<u8>> {
        let whole = self.add_frame(&part.frame())?;
        Some(content(&whole).to_vec())
    }

    /// The same for a frame.
    ///
    /// # Panics
    ///
    /// When the pod's kernel would read other content than the gate judged.
    pub(in super::super) fn add_frame(&mut self, frame: &[u8]) -> Option<Whole> {
        let mut packet = Packet::EMPTY;
        if walk(&frame, &mut packet) != Walked::Ip {
            return None;
        }
        let held = Held {
            frame,
            packet: &packet,
            ifindex: IfIndex::new(7),
            is_taken: true,
        };
        let Self {
            fragments,
            budget,
            now_ns,
            lost,
            receiver,
        } = self;
        let whole = fragments.add(&held, *now_ns, budget, |_, why| lost.push(why));
        assert_eq!(budget.common(), beyond(fragments));
        assert!(fragments.kept.amount() <= LIMITS.pod);
        let whole = whole?;
        let mut read = Vec::new();
        for piece in &whole.pieces {
            let mut packet = Packet::EMPTY;
            assert_eq!(walk(&&*piece.frame, &mut packet), Walked::Ip);
            read.extend(receiver.receive(&packet, piece.start, piece.content(), piece.is_last));
        }
        assert_eq!(read, [content(&whole)], "the pod reads what was judged");
        assert!(
            receiver.waiting.is_empty(),
            "no fragment stays with the receiver"
        );
        Some(whole)
    }

    /// Advances the clock.
    pub(in super::super) fn advance(&mut self, seconds: u64) {
        self.now_ns += seconds * 1_000_000_000;
        let Self {
            fragments,
            budget,
            now_ns,
            lost,
            ..
        } = self;
        fragments.tick(*now_ns, budget, |_, why| lost.push(why));
        assert_eq!(budget.common(), beyond(fragments));
    }
}

fn content(whole: &Whole) -> &[u8] {
    &whole.frame[whole.packet.l4_offset as usize..]
}

#[derive(Default)]
struct PartialDatagram {
    parts: BTreeMap<usize, Vec<u8>>,
    end: Option<usize>,
}

/// The reassembly of a pod's kernel (`net/ipv4/inet_fragment.c`): it keeps the first of two fragments for the
/// same place, and drops a datagram whose fragments overlap otherwise.
#[derive(Default)]
struct Receiver {
    waiting: HashMap<Key, PartialDatagram>,
}

impl Receiver {
    fn receive(
        &mut self,
        packet: &Packet,
        start: usize,
        content: &[u8],
        is_last: bool,
    ) -> Option<Vec<u8>> {
        let key = Key::of(packet);
        let waiting = self.waiting.entry(key).or_default();
        let end = start + content.len();
        for (&other, bytes) in &waiting.parts {
            let is_apart = end <= other || other + bytes.len() <= start;
            if other <= start && end <= other + bytes.len() {
                return None;
            }
            if !is_apart {
                self.waiting.remove(&key);
                return None;
            }
        }
        waiting.parts.insert(start, content.to_vec());
        if is_last {
            waiting.end = Some(end);
        }
        let have: usize = waiting.parts.values().map(Vec::len).sum();
        if waiting.end != Some(have) {
            return None;
        }
        let waiting = self.waiting.remove(&key)?;
        Some(waiting.parts.into_values().flatten().collect())
    }
}

/// Most fragments of one recipe: enough for several datagrams with the most fragments.
const STEPS: usize = 300;

/// Adds fragments according to a recipe, five bytes each. Checks that the pod reads what is put back, and
/// that no fragment contradicts it. Returns how many datagrams were put back.
///
/// # Panics
///
/// When a check fails: fuzzing looks for that.
pub(in super::super) fn reassemble(recipe: &[u8]) -> usize {
    let mut scene = Scene::new();
    let mut put_back = 0;
    // The fragments of each incomplete datagram.
    let mut waiting: Vec<(Key, Part)> = Vec::new();
    for step in recipe.chunks_exact(5).take(STEPS) {
        let &[which, units, len, kind, salt] = step else {
            break;
        };
        if which == u8::MAX {
            scene.advance(u64::from(units));
            waiting.retain(|(key, _)| scene.waits(key));
        }
        let len = usize::from(len) * if kind & 0x40 == 0 { 1 } else { 8 };
        let units = u16::from(units) << if kind & 0x80 == 0 { 0 } else { 5 };
        let part = Part {
            version: if which & 1 == 0 { 4 } else { 6 },
            id: u16::from(which >> 1 & 3),
            protocol: if kind & 0x30 == 0x30 {
                salt
            } else {
                protocol::UDP
            },
            units,
            more: kind & 1 == 0,
            // Usually the same bytes for the same place.
            content: pattern(
                usize::from(units) * 8,
                len,
                if kind & 0x0e == 0 { salt } else { 0 },
            ),
        };
        let Some(key) = part.key() else {
            continue;
        };
        waiting.push((key, part.clone()));
        if let Some(content) = scene.add(&part) {
            put_back += 1;
            let parts = waiting.iter().filter(|(other, _)| *other == key);
            check_agreement(parts.map(|(_, part)| part), &content);
        }
        waiting.retain(|(key, _)| scene.waits(key));
    }
    scene.fragments.clear(&mut scene.budget);
    assert_eq!(
        (scene.budget.common(), scene.fragments.kept.amount()),
        (0, 0)
    );
    put_back
}

/// Checks that every fragment agrees with every byte of the datagram that was put back.
fn check_agreement<'a>(parts: impl Iterator<Item = &'a Part>, content: &[u8]) {
    let mut covered = vec![false; content.len()];
    for part in parts {
        let start = usize::from(part.units) * 8;
        let end = start + part.content.len();
        assert_eq!(content[start..end], part.content);
        assert_eq!(part.more, end != content.len());
        covered[start..end].fill(true);
    }
    assert!(covered.into_iter().all(|is_covered| is_covered));
}

fn pattern(start: usize, len: usize, salt: u8) -> Vec<u8> {
    let udp_header = [0, 53, 0, 7, 0, 64];
    (start..start + len)
        .map(|i| udp_header.get(i).copied().unwrap_or((i * 31) as u8 ^ salt))
        .collect()
}

impl Scene {
    fn waits(&self, key: &Key) -> bool {
        self.fragments.datagrams.contains(key)
    }
}

impl Part {
    /// `None` when its headers cannot be walked.
    fn key(&self) -> Option<Key> {
        let mut packet = Packet::EMPTY;
        let walked = walk(&self.frame().as_slice(), &mut packet);
        (walked == Walked::Ip).then(|| Key::of(&packet))
    }
}

/// The bytes that the fragments take of the common part.
fn beyond(fragments: &Fragments) -> usize {
    fragments.kept.amount().saturating_sub(LIMITS.own)
}
