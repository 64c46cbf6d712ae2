//! Runs the gate's code on frames, fragments or a connection without a pod, a map or an interface: for the
//! fuzz targets `frame`, `fragments` and `stream`.

use egress_common::packet::{Packet, Walked, walk};

use super::{checksum::complete_udp, fragments, pod::udp_payload, reply, stream};
use egress_dns::{Refusal, read_answer, read_question, refuse};

/// Reads a held frame in every way that the gate has, and builds every frame that the gate may build from it.
///
/// # Panics
///
/// When a built frame cannot be read: fuzzing looks for that.
pub fn treat(frame: &[u8]) {
    let mut packet = Packet::EMPTY;
    if walk(&frame, &mut packet) != Walked::Ip {
        return;
    }
    if let Some(rejection) = reply::rejection(frame, &packet) {
        assert_walks(&rejection);
    }
    if let Some(message) = udp_payload(frame, &packet) {
        if let Ok(question) = read_question(message) {
            let refusal = refuse(&question, Refusal::NxDomain);
            if let Some(reply) = reply::udp(frame, &packet, &refusal) {
                let made = assert_walks(&reply);
                assert_eq!((made.src, made.dst), (packet.dst, packet.src));
                assert_eq!(udp_payload(&reply, &made), Some(&*refusal));
            }
        }
        let _ = read_answer(message);
    }
    let mut put_back = frame.to_vec();
    complete_udp(&mut put_back, &packet);
    assert_eq!(put_back.len(), frame.len());
}

/// Adds fragments according to a recipe, five bytes each.
///
/// # Panics
///
/// When the pod would read other content than the gate judged.
pub fn reassemble(recipe: &[u8]) {
    let _ = fragments::simulation::reassemble(recipe);
}

/// Follows a connection with a resolver whose two ends send according to a recipe.
///
/// # Panics
///
/// When an end would read what was not decided, when the gate keeps more than it may, or when two ends that
/// follow the protocol do not get everything across.
pub fn follow(recipe: &[u8]) {
    stream::fuzzing::follow(recipe);
}

fn assert_walks(frame: &[u8]) -> Packet {
    let mut packet = Packet::EMPTY;
    assert_eq!(walk(&frame, &mut packet), Walked::Ip);
    packet
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Runs a target on all of its seeds.
    fn seeds(target: &str, feed: fn(&[u8])) {
        // Cargo runs tests in the directory of their package.
        let seeds = Path::new("../fuzz/seeds");
        let mut count = 0;
        for seed in std::fs::read_dir(seeds.join(target)).unwrap() {
            feed(&std::fs::read(seed.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count > 0);
    }

    proptest::proptest! {
        #[test]
        fn each_end_of_a_connection_reads_only_what_was_decided(
            questions in proptest::collection::vec(0u8..195, 0..16),
            steps in proptest::collection::vec(proptest::prelude::any::<[u8; 6]>(), 0..60),
            is_honest: bool,
        ) {
            let count = u8::try_from(questions.len()).unwrap();
            // Without pauses, changed bytes, wrong positions and flags, both ends follow the protocol.
            let steps = steps.into_iter().map(|[what, high, low, len, flags, ack]| {
                if is_honest {
                    [what & 0b0110_0011, high, low, len, flags & 0x7f, ack]
                } else {
                    [what, high, low, len, flags, ack]
                }
            });
            let recipe = [count].into_iter().chain(questions).chain(steps.flatten());
            follow(&recipe.collect::<Vec<u8>>());
        }
    }

    #[test]
    fn no_seed_of_the_corpus_panics() {
        seeds("frame", treat);
        seeds("stream", follow);
    }

    #[test]
    fn the_fragment_seeds_yield_nine_datagrams() {
        let seeds = Path::new("../fuzz/seeds/fragments");
        let mut put_back = 0;
        for seed in std::fs::read_dir(seeds).unwrap() {
            let recipe = std::fs::read(seed.unwrap().path()).unwrap();
            put_back += fragments::simulation::reassemble(&recipe);
        }
        assert_eq!(put_back, 9);
    }
}
