//! Connections on which a query was refused.

use super::*;

#[test]
fn a_refused_query_splits_the_connection() {
    let mut scene = Scene::new();
    let (refused, allowed) = (asking("no"), asking("ask"));
    let asked = [refused.as_slice(), &allowed, &refused].concat();
    let seen = scene.asks(0, &asked);
    // The resolver does not get the refused queries; the pod gets refusals.
    assert_eq!(stream(&seen, To::Resolver, ISN), allowed);
    let refusals = [framed(b"refused"), framed(b"refused")].concat();
    assert_eq!(stream(&seen, To::Pod, ISS), refusals);
    let (.., ack, _) = seen.last().unwrap();
    assert_eq!(
        *ack,
        place(ISN, asked.len()),
        "all of them are acknowledged"
    );
    // Without an acknowledgment, everything is sent again.
    let seen = scene.ticks(1);
    assert_eq!(stream(&seen, To::Pod, ISS), refusals);
    assert_eq!(stream(&seen, To::Resolver, ISN), allowed);
    // The response follows the refusals, and only when it is complete.
    let answer = framed(b"an answer");
    let seen = scene.answers(0, &answer[..5], allowed.len());
    let end = place(ISN, allowed.len());
    let pure = (To::Resolver, TCP_ACK, end, place(ISS, 5), Vec::new());
    assert_eq!(seen, [pure]);
    scene.rules.turns_left = 2;
    let seen = scene.answers(5, &answer[5..], allowed.len());
    let places: Vec<_> = seen
        .iter()
        .map(|(to, _, seq, ack, _)| (*to, *seq, *ack))
        .collect();
    let resolver = (To::Resolver, end, place(ISS, answer.len()));
    let pod = (To::Pod, place(ISS, refusals.len()), place(ISN, asked.len()));
    assert_eq!(places, [resolver, pod]);
    assert_eq!(seen[1].4, answer);
    // The pod acknowledges, and both ends close the connection.
    let read = refusals.len() + answer.len();
    let fin = TCP_ACK | TCP_FIN;
    let seen = scene.step(
        To::Resolver,
        fin,
        place(ISN, asked.len()),
        place(ISS, read),
        b"",
    );
    let ended = seen.iter().find(|(to, ..)| *to == To::Resolver).unwrap();
    assert_eq!((ended.1 & TCP_FIN, ended.2), (TCP_FIN, end));
    let end = end.wrapping_add(1);
    let seen = scene.step(To::Pod, fin, place(ISS, answer.len()), end, b"");
    let ended = seen.iter().find(|(to, ..)| *to == To::Pod).unwrap();
    assert_eq!((ended.1 & TCP_FIN, ended.2), (TCP_FIN, place(ISS, read)));
    let (seq, ack) = (place(ISN, asked.len() + 1), place(ISS, read + 1));
    assert!(scene.step(To::Resolver, TCP_ACK, seq, ack, b"").is_empty());
    assert!(scene.streams.flows.is_empty());
    assert_eq!(scene.streams.kept.amount(), 0);
}

#[test]
fn a_refusal_during_a_response_follows_the_response() {
    let mut scene = Scene::new();
    let (allowed, refused) = (asking("ask"), asking("no"));
    scene.asks(0, &allowed);
    let answer = framed(b"an answer");
    scene.answers(0, &answer[..5], allowed.len());
    let seen = scene.asks(allowed.len(), &refused);
    assert_eq!(stream(&seen, To::Pod, ISS), &answer[..0]);
    let seen = scene.answers(5, &answer[5..], allowed.len());
    let delivered = [&answer[5..], &framed(b"refused")].concat();
    assert_eq!(stream(&seen, To::Pod, ISS.wrapping_add(5)), delivered);
    // A refusal cannot follow the beginning of a response whose rest is not delivered.
    let mut scene = Scene::new();
    scene.asks(0, &allowed);
    scene.answers(0, &answer[..1], allowed.len());
    scene.asks(allowed.len(), &refused);
    let seen = scene.answers(1, &framed(b"n answer")[1..], allowed.len());
    scene.is_reset(&seen);
}

#[test]
fn an_undelivered_response_is_left_out_of_a_split_connection() {
    let mut scene = Scene::new();
    scene.asks(0, &asking("no"));
    let refusal = framed(b"refused");
    let answers = [framed(b"no answer at all"), framed(b"an answer")].concat();
    let seen = scene.answers(0, &answers, 0);
    let answer = framed(b"an answer");
    let behind = ISS.wrapping_add(refusal.len() as u32);
    assert_eq!(stream(&seen, To::Pod, behind), answer);
}

#[test]
fn a_refusal_after_the_end_of_the_resolvers_stream_resets_both_ends() {
    let mut scene = Scene::new();
    scene.step(
        To::Pod,
        TCP_FIN | TCP_ACK,
        place(ISS, 0),
        place(ISN, 0),
        b"",
    );
    let seen = scene.asks(0, &asking("no"));
    scene.is_reset(&seen);
}

#[test]
fn a_reset_passes_a_split_connection_with_the_sequence_numbers_of_its_streams() {
    for to in [To::Resolver, To::Pod] {
        let mut scene = Scene::new();
        let (refused, allowed) = (asking("no"), asking("ask"));
        scene.asks(0, &[refused.as_slice(), &allowed].concat());
        let seen = match to {
            To::Resolver => {
                let seq = place(ISN, refused.len() + allowed.len());
                scene.step(to, TCP_RST, seq, 0, b"")
            }
            To::Pod => scene.step(to, TCP_RST, place(ISS, 0), 0, b""),
        };
        let [(sent, flags, seq, ..)] = seen.as_slice() else {
            panic!("{seen:?}");
        };
        let place = match to {
            To::Resolver => place(ISN, allowed.len()),
            To::Pod => place(ISS, framed(b"refused").len()),
        };
        assert_eq!((*sent, flags & TCP_RST, *seq), (to, TCP_RST, place));
        assert!(scene.streams.flows.is_empty());
    }
}

#[test]
fn the_connection_is_reset_if_nobody_acknowledges_a_refusal() {
    let mut scene = Scene::new();
    scene.asks(0, &asking("no"));
    let mut last = Vec::new();
    for _ in 0..8 {
        last = scene.ticks(40);
        if scene.streams.flows.is_empty() {
            break;
        }
    }
    scene.is_reset(&last);
}

#[test]
fn a_connection_counts_the_memory_of_what_its_ends_have_acknowledged() {
    let mut scene = Scene::new();
    let (refused, allowed) = (asking("no"), asking("ask"));
    scene.asks(0, &refused);
    scene.asks(refused.len(), &allowed);
    let answer = framed(&vec![b'a'; 60_000]);
    let mut seen = Vec::new();
    for (at, part) in answer.chunks(1000).enumerate() {
        seen.extend(scene.answers(at * 1000, part, allowed.len()));
    }
    assert!(scene.streams.kept.amount() > 60_000);
    // The pod acknowledges what the agent sends, except for the last byte.
    let asked = refused.len() + allowed.len();
    let len = framed(b"refused").len() + answer.len();
    let mut read = 0;
    while read + 1 < len {
        let parts = seen.iter().filter(|(to, ..)| *to == To::Pod);
        let ends = parts.map(|(_, _, seq, _, payload)| {
            seq.wrapping_sub(place(ISS, 0)) as usize + payload.len()
        });
        let end = ends.max().expect("the agent sends on");
        read = end.min(len - 1);
        let ack = place(ISS, read);
        seen = scene.step(To::Resolver, TCP_ACK, place(ISN, asked), ack, b"");
    }
    let kept = scene.streams.kept.amount();
    let allocated = scene.streams.flows.iter().next().unwrap().1.allocated();
    assert_eq!(kept, allocated);
    assert!(kept < 20_000, "{kept}");
}

#[test]
fn messages_that_are_no_responses_end_a_split_connection() {
    // Shorter than a DNS header.
    for message in [b"n".as_slice(), b"no", b"no messages"] {
        let mut scene = Scene::new();
        scene.asks(0, &asking("no"));
        let seen = scene.answers(0, &framed(message).repeat(3), 0);
        scene.is_reset(&seen);
        assert_eq!(scene.rules.answers.len(), 1, "no further one is decided");
    }
}

#[test]
fn many_messages_in_one_segment_of_a_split_connection_take_several_turns() {
    let mut scene = Scene::new();
    let refusal = framed(b"refused");
    let refused = asking("no").len();
    let before = scene.turns;
    // As many as the resolver's window takes.
    let questions = [asking("no"), asking("ask").repeat(19)].concat();
    let seen = scene.asks(0, &questions);
    assert_eq!(stream(&seen, To::Resolver, ISN), questions[refused..]);
    assert_eq!(scene.turns - before, 3);

    let behind = ISS.wrapping_add(refusal.len() as u32);
    let answers = [framed(b"no answer at all").repeat(39), framed(b"an answer")].concat();
    let before = scene.turns;
    let seen = scene.answers(0, &answers, questions.len() - refused);
    assert_eq!(stream(&seen, To::Pod, behind), framed(b"an answer"));
    assert_eq!(scene.turns - before, 5);
}
