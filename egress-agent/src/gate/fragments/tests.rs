use proptest::prelude::*;

use egress_common::ids::IfIndex;

use super::{
    simulation::{Part, Scene, reassemble},
    *,
};

const UDP: u8 = egress_common::protocol::UDP;
const TCP: u8 = egress_common::protocol::TCP;

/// A UDP datagram with these ports and a distinctive payload.
fn datagram(from: u16, to: u16, payload: usize) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(from.to_be_bytes());
    datagram.extend(to.to_be_bytes());
    datagram.extend((8 + payload as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend((0..payload).map(|i| (i * 31 + i / 251) as u8));
    datagram
}

/// Splits the datagram into parts of `size` bytes; the last one has the rest.
fn split(version: u8, id: u16, datagram: &[u8], size: usize) -> Vec<Part> {
    let last = datagram.chunks(size).count() - 1;
    let parts = datagram.chunks(size).enumerate();
    parts
        .map(|(i, content)| Part {
            version,
            id,
            protocol: UDP,
            units: (i * size / 8) as u16,
            more: i < last,
            content: content.to_vec(),
        })
        .collect()
}

/// A response in three fragments.
fn three(version: u8, id: u16) -> (Vec<u8>, Vec<Part>) {
    let whole = datagram(53, 7, 3000);
    let parts = split(version, id, &whole, 1400);
    assert_eq!(parts.len(), 3);
    (whole, parts)
}

#[test]
fn a_datagram_is_reassembled_in_any_order_of_its_fragments() {
    for version in [4, 6] {
        for (id, order) in [
            [0, 1, 2],
            [0, 2, 1],
            [1, 0, 2],
            [1, 2, 0],
            [2, 0, 1],
            [2, 1, 0],
        ]
        .into_iter()
        .enumerate()
        {
            let mut scene = Scene::new();
            let (whole, parts) = three(version, id as u16);
            assert_eq!(scene.add(&parts[order[0]]), None);
            assert_eq!(scene.add(&parts[order[1]]), None);
            assert_eq!(scene.add(&parts[order[2]]), Some(whole));
            assert!(scene.lost.is_empty());
        }
    }
}

#[test]
fn a_repeated_fragment_is_ignored_and_not_put_back() {
    for version in [4, 6] {
        let mut scene = Scene::new();
        let (whole, parts) = three(version, 1);
        for part in [0, 0, 1, 1, 0] {
            assert_eq!(scene.add(&parts[part]), None);
        }
        assert_eq!(scene.add(&parts[2]), Some(whole));
        // If it were put back again, it would wait at the pod for another datagram.
        for part in &parts {
            assert_eq!(scene.add(part), None);
        }
        assert!(scene.lost.is_empty());
        assert_eq!(scene.fragments.kept.amount(), 0);
    }
}

#[test]
fn an_identification_is_used_once_a_minute() {
    let mut scene = Scene::new();
    let (whole, parts) = three(4, 1);
    let come = |scene: &mut Scene| parts.iter().find_map(|part| scene.add(part));
    assert_eq!(come(&mut scene), Some(whole.clone()));
    scene.advance(59);
    assert_eq!(come(&mut scene), None);
    scene.advance(2);
    assert_eq!(come(&mut scene), Some(whole));
}

/// A change that makes the second of three fragments contradict the others.
type Change = fn(&mut Part);

#[test]
fn contradictory_fragments_end_the_datagram() {
    let changes: [(&str, Change); 6] = [
        ("fragments overlap", |part| part.units -= 1),
        ("fragments overlap", |part| part.units += 1),
        ("a fragment is empty", |part| part.content.clear()),
        ("the length of a fragment is not a multiple of 8", |part| {
            part.content.pop();
        }),
        ("fragments disagree about where the datagram ends", |part| {
            part.more = false;
        }),
        ("fragments overlap", |part| part.units = 0),
    ];
    for version in [4, 6] {
        for (why, change) in changes {
            let mut scene = Scene::new();
            let (_, parts) = three(version, 1);
            let mut second = parts[1].clone();
            change(&mut second);
            for part in [&parts[0], &parts[2], &second, &parts[1], &parts[0]] {
                assert_eq!(scene.add(part), None, "{why}");
            }
            assert_eq!(scene.lost, [why]);
            assert_eq!(scene.fragments.kept.amount(), 0);
        }
    }
}

#[test]
fn other_bytes_in_the_same_place_end_the_datagram() {
    for version in [4, 6] {
        let mut scene = Scene::new();
        let (_, parts) = three(version, 1);
        let mut other = parts[2].clone();
        other.content[9] ^= 1;
        for part in [&other, &parts[0], &parts[2], &parts[1]] {
            assert_eq!(scene.add(part), None);
        }
        assert_eq!(scene.lost, ["fragments overlap"]);
    }
}

#[test]
fn a_fragment_beyond_the_end_ends_the_datagram() {
    for is_known in [true, false] {
        let mut scene = Scene::new();
        let (_, parts) = three(4, 1);
        let mut beyond = parts[2].clone();
        beyond.units += 400;
        beyond.more = is_known;
        beyond.content.truncate(8);
        for part in [&parts[0], &beyond, &parts[2], &parts[1]] {
            assert_eq!(scene.add(part), None);
        }
        assert_eq!(
            scene.lost,
            ["fragments disagree about where the datagram ends"]
        );
    }
}

#[test]
fn over_ipv6_the_protocol_does_not_separate_datagrams() {
    let mut scene = Scene::new();
    let (_, mut parts) = three(6, 1);
    parts[1].protocol = TCP;
    for part in &parts {
        assert_eq!(scene.add(part), None);
    }
    assert_eq!(
        scene.lost,
        ["fragments differ in interface, link header or protocol"]
    );
    // Over IPv4 the protocol separates datagrams.
    let (whole, parts) = three(4, 1);
    let mut other = parts[1].clone();
    other.protocol = TCP;
    assert_eq!(scene.add(&other), None);
    assert_eq!(parts.iter().find_map(|part| scene.add(part)), Some(whole));
}

#[test]
fn a_fragment_that_the_receiver_may_discard_ends_the_datagram() {
    let (_, parts) = three(4, 1);
    let first = parts[0].frame();
    let mut damaged = first.clone();
    damaged[14 + 8] ^= 1;
    let mut elsewhere = first.clone();
    elsewhere[5] ^= 1;
    let mut with_options = first.clone();
    with_options[14] = 0x46;
    with_options[16..18].copy_from_slice(&1424u16.to_be_bytes());
    with_options.splice(34..34, [1, 1, 1, 0]);
    with_options[24..26].fill(0);
    let sum = checksum::of_ipv4_header(&with_options[14..38]);
    with_options[24..26].copy_from_slice(&sum);
    for (frame, why) in [
        (damaged, "the header checksum of a fragment is wrong"),
        (
            elsewhere,
            "fragments differ in interface, link header or protocol",
        ),
        (
            with_options,
            "a fragment has options or further extension headers",
        ),
    ] {
        let mut scene = Scene::new();
        for part in &parts[1..] {
            assert_eq!(scene.add(part), None);
        }
        assert!(scene.add_frame(&frame).is_none());
        assert_eq!(scene.lost, [why]);
        assert_eq!(scene.add(&parts[0]), None, "{why}");
    }
}

#[test]
fn a_datagram_longer_than_any_packet_is_not_reassembled() {
    for (version, units) in [(4, 8190), (6, 8191)] {
        let mut scene = Scene::new();
        let (_, mut parts) = three(version, 1);
        parts[2].units = units;
        for part in &parts {
            assert_eq!(scene.add(part), None);
        }
        assert_eq!(
            scene.lost,
            ["the datagram is longer than the protocol allows"]
        );
    }
    // The longest possible datagrams are reassembled.
    for (version, longest) in [(4, 65_515), (6, 65_535)] {
        let whole = datagram(53, 7, longest - 8);
        let parts = split(version, 1, &whole, 1232);
        let mut scene = Scene::new();
        assert_eq!(parts.iter().find_map(|part| scene.add(part)), Some(whole));
    }
}

#[test]
fn a_datagram_has_a_bounded_number_of_fragments() {
    let mut scene = Scene::new();
    for part in split(4, 1, &datagram(53, 7, 3000), 8) {
        assert_eq!(scene.add(&part), None);
    }
    assert_eq!(scene.lost, ["the datagram has too many fragments"]);
    assert_eq!(scene.fragments.kept.amount(), 0);
}

#[test]
fn a_datagram_with_a_missing_fragment_times_out() {
    let mut scene = Scene::new();
    let (_, parts) = three(4, 1);
    scene.add(&parts[0]);
    scene.advance(1);
    scene.add(&parts[1]);
    assert!(scene.lost.is_empty());
    scene.advance(2);
    assert_eq!(scene.lost, ["a fragment is missing"]);
    assert_eq!(
        (scene.fragments.kept.amount(), scene.budget.common()),
        (0, 0)
    );
    assert_eq!(scene.add(&parts[2]), None);
}

#[test]
fn a_flood_of_first_fragments_does_not_stop_a_datagram_that_arrives_at_once() {
    let mut scene = Scene::new();
    for id in 1000..21_000 {
        let (_, parts) = three(4, id);
        assert_eq!(scene.add(&parts[0]), None);
        if id % 1000 == 0 {
            let (whole, parts) = three(4, id / 1000);
            assert_eq!(parts.iter().find_map(|part| scene.add(part)), Some(whole));
        }
    }
    assert!(scene.fragments.datagrams.len() <= DATAGRAMS);
    assert!(
        scene
            .lost
            .iter()
            .all(|why| *why == "no room is left for fragments")
    );
}

#[test]
fn ended_datagrams_take_bounded_memory() {
    let mut scene = Scene::new();
    for id in 0..5000 {
        let (whole, parts) = three(6, id);
        assert_eq!(parts.iter().find_map(|part| scene.add(part)), Some(whole));
    }
    assert_eq!(scene.fragments.ended.len(), ENDED);
    scene.advance(61);
    assert!(scene.fragments.ended.is_empty());
}

#[test]
fn when_memory_is_full_a_pod_drops_its_own_datagrams() {
    let mut scene = Scene::new();
    let (_, parts) = three(4, 1);
    scene.add(&parts[0]);
    // The budget is used up by other pods, and by what this pod has already.
    let mut others = Kept::default();
    let mut budget = Budget::new(LIMITS);
    budget.add(&mut others, LIMITS.own + LIMITS.common);
    let before = scene.fragments.kept.amount();
    budget.add(&mut scene.fragments.kept, LIMITS.own - before);
    let mut lost = Vec::new();
    let mut packet = Packet::EMPTY;
    let frame = three(4, 2).1[0].frame();
    egress_common::packet::walk(&frame.as_slice(), &mut packet);
    let held = Held {
        frame: &frame,
        packet: &packet,
        ifindex: IfIndex::new(7),
        is_taken: true,
    };
    let fragments = &mut scene.fragments;
    let added = fragments.add(&held, 0, &mut budget, |_, why| lost.push(why));
    assert!(added.is_none());
    assert_eq!(lost, ["no room is left for fragments"]);
    assert_eq!(budget.common(), LIMITS.common);
    assert_eq!(fragments.datagrams.len(), 1);
}

/// The lengths of the parts, in units of 8 bytes.
fn cuts() -> impl Strategy<Value = Vec<u16>> {
    prop::collection::vec(1u16..400, 1..20)
}

proptest! {
    #[test]
    fn any_split_in_any_order_gives_back_the_datagram(
        version in prop::sample::select(vec![4u8, 6]),
        payload in 100usize..4000,
        cuts in cuts(),
        order in prop::collection::vec(any::<prop::sample::Index>(), 0..60),
    ) {
        let whole = datagram(53, 7, payload);
        let mut parts = Vec::new();
        let mut at = 0;
        for len in cuts.iter().map(|units| usize::from(*units) * 8) {
            if at + len >= whole.len() {
                break;
            }
            parts.push((at, at + len));
            at += len;
        }
        parts.push((at, whole.len()));
        let parts: Vec<Part> = parts
            .iter()
            .map(|&(start, end)| Part {
                version,
                id: 1,
                protocol: UDP,
                units: (start / 8) as u16,
                more: end < whole.len(),
                content: whole[start..end].to_vec(),
            })
            .collect();
        prop_assume!(parts.len() > 1);
        let mut scene = Scene::new();
        // First any parts, any number of times; then each part.
        let some = order.iter().map(|index| index.get(&parts));
        let put_back: Vec<Vec<u8>> = some.chain(&parts).filter_map(|part| scene.add(part)).collect();
        prop_assert_eq!(put_back, vec![whole]);
        prop_assert!(scene.lost.is_empty());
    }

    #[test]
    fn an_overlap_anywhere_drops_the_datagram(
        version in prop::sample::select(vec![4u8, 6]),
        size in (1usize..20).prop_map(|units| units * 64),
        units in 1u16..300,
        len in (1usize..40).prop_map(|units| units * 8),
        order in any::<prop::sample::Index>(),
    ) {
        let whole = datagram(53, 7, 3000);
        let mut parts = split(version, 1, &whole, size);
        let start = usize::from(units) * 8;
        prop_assume!(start + len < whole.len());
        let overlap = Part { units, more: true, content: whole[start..start + len].to_vec(), ..parts[0].clone() };
        prop_assume!(!parts.iter().any(|part| part.units == units && part.content.len() == len));
        // Before the last part: after it the datagram is complete without the overlap.
        parts.insert(order.index(parts.len()), overlap);
        let mut scene = Scene::new();
        for part in &parts {
            prop_assert_eq!(scene.add(part), None);
        }
        prop_assert_eq!(scene.lost.len(), 1);
    }

    #[test]
    fn the_pod_reads_what_was_judged_for_any_recipe(recipe in prop::collection::vec(any::<u8>(), 0..400)) {
        reassemble(&recipe);
    }
}
