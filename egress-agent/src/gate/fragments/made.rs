//! Fragments made to measure, and what a receiver makes of those that reach it: for tests and for the
//! fuzz target `fragments`.

use std::collections::{BTreeMap, HashMap};

use egress_common::{
    packet::{Packet, Walked, walk},
    protocol,
};

use super::{Budget, Fragments, Held, Key, LIMITS, Whole, checksum};

/// One fragment that is to be made.
#[derive(Clone, Debug)]
pub(in super::super) struct Part {
    pub(in super::super) version: u8,
    pub(in super::super) id: u16,
    pub(in super::super) protocol: u8,
    /// Where its content is, in units of 8 bytes.
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

/// The fragments of one pod, and the pod's kernel behind them.
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

    /// A fragment comes. What its datagram is, if it is put back.
    pub(in super::super) fn comes(&mut self, part: &Part) -> Option<Vec<u8>> {
        let whole = self.comes_as(&part.frame())?;
        Some(content(&whole).to_vec())
    }

    /// The same for a frame.
    ///
    /// # Panics
    ///
    /// When the pod's kernel would read something else than was judged.
    pub(in super::super) fn comes_as(&mut self, frame: &[u8]) -> Option<Whole> {
        let mut packet = Packet::EMPTY;
        if walk(&frame, &mut packet) != Walked::Ip {
            return None;
        }
        let held = Held {
            frame,
            packet: &packet,
            ifindex: 7,
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
        assert!(receiver.waiting.is_empty(), "nothing stays behind");
        Some(whole)
    }

    /// Time passes.
    pub(in super::super) fn passes(&mut self, seconds: u64) {
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

/// What a pod's kernel does with fragments (`net/ipv4/inet_fragment.c`): of two for the same place it
/// keeps the first, and it gives up those that overlap otherwise.
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

/// Most fragments of one recipe: some datagrams of as many as one may have.
const STEPS: usize = 300;

/// Lets fragments come as a recipe says, five bytes each, and looks whether what is put back is what
/// the pod reads, and whether nothing that was said about it differs. Returns how many datagrams were
/// put back.
///
/// # Panics
///
/// When it is not so: that is what fuzzing looks for.
pub(in super::super) fn reassemble(recipe: &[u8]) -> usize {
    let mut scene = Scene::new();
    let mut put_back = 0;
    // What came of each datagram that waits.
    let mut came: Vec<(Key, Part)> = Vec::new();
    for step in recipe.chunks_exact(5).take(STEPS) {
        let &[which, units, len, kind, salt] = step else {
            break;
        };
        if which == u8::MAX {
            scene.passes(u64::from(units));
            came.retain(|(key, _)| scene.waits(key));
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
            // Mostly what everybody says is in this place.
            content: pattern(
                usize::from(units) * 8,
                len,
                if kind & 0x0e == 0 { salt } else { 0 },
            ),
        };
        let Some(key) = part.key() else {
            continue;
        };
        came.push((key, part.clone()));
        if let Some(content) = scene.comes(&part) {
            put_back += 1;
            let parts = came.iter().filter(|(other, _)| *other == key);
            agree(parts.map(|(_, part)| part), &content);
        }
        came.retain(|(key, _)| scene.waits(key));
    }
    scene.fragments.clear(&mut scene.budget);
    assert_eq!(
        (scene.budget.common(), scene.fragments.kept.amount()),
        (0, 0)
    );
    put_back
}

/// Every fragment that came says of every byte what was put back.
fn agree<'a>(parts: impl Iterator<Item = &'a Part>, content: &[u8]) {
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

/// What the fragments take of the part that all pods share.
fn beyond(fragments: &Fragments) -> usize {
    fragments.kept.amount().saturating_sub(LIMITS.own)
}
