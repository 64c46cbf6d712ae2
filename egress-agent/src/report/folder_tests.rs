use egress_common::address::from_v4;

use super::{
    super::{
        Endpoint,
        line::tests::{denied, wall},
    },
    *,
};

const SECOND: Duration = Duration::from_secs(1);

fn to(port: u16) -> Denied {
    let dst = Some(Endpoint {
        address: from_v4([192, 0, 2, 1]),
        port: Some(port),
    });
    Denied { dst, ..denied() }
}

fn of_pod(name: &str, port: u16) -> Denied {
    Denied {
        pod: Arc::new(PodIdentity::new("n1", "shop", name, name)),
        ..to(port)
    }
}

fn counts(lines: &[Line]) -> Vec<u64> {
    lines.iter().map(Line::count).collect()
}

#[test]
fn the_first_line_comes_within_a_second_and_counts_repeats() {
    let (mut folder, start) = (Folder::default(), Instant::now());
    folder.add(
        start,
        Denied {
            time: wall(0),
            ..to(443)
        },
    );
    let other_source = Some(Endpoint {
        address: from_v4([10, 1, 2, 3]),
        port: Some(50_000),
    });
    folder.add(
        start + SECOND / 10,
        Denied {
            time: wall(100),
            src: other_source,
            ..to(443)
        },
    );
    folder.add(
        start + SECOND / 5,
        Denied {
            time: wall(200),
            count: 5,
            ..to(443)
        },
    );
    assert!(folder.due(start + FIRST_LINE_AFTER * 9 / 10).is_empty());

    let lines = folder.due(start + FIRST_LINE_AFTER);
    let [
        Line::Denied {
            first,
            count,
            connections,
            last,
        },
    ] = &lines[..]
    else {
        panic!("{lines:?}")
    };
    assert_eq!((*count, *connections), (7, 2));
    assert_eq!((first.time, *last), (wall(0), wall(200)));
    assert_eq!(
        first.src.unwrap().port,
        Some(41234),
        "the source port is the first packet's"
    );
    assert!(folder.due(start + SECOND).is_empty());
}

#[test]
fn a_connection_that_continues_counts_in_the_first_line_only() {
    let (mut folder, start) = (Folder::default(), Instant::now());
    let connections = |lines: &[Line]| match lines {
        [
            Line::Denied {
                count, connections, ..
            },
        ] => (*count, *connections),
        _ => panic!("{lines:?}"),
    };
    folder.add(start, to(443));
    folder.add(start, to(443));
    assert_eq!(connections(&folder.due(start + SECOND)), (2, 1));
    folder.add(start + 2 * SECOND, to(443));
    assert_eq!(connections(&folder.due(start + 12 * SECOND)), (1, 0));
}

#[test]
fn a_series_that_continues_has_a_line_every_ten_seconds() {
    let (mut folder, start) = (Folder::default(), Instant::now());
    let mut lines = Vec::new();
    for tenth in 0..300u32 {
        let now = start + SECOND / 10 * tenth;
        folder.add(now, to(443));
        lines.extend(
            folder
                .due(now)
                .into_iter()
                .map(|line| (tenth, line.count())),
        );
    }
    assert_eq!(lines, [(8, 9), (108, 100), (208, 100)]);
    assert_eq!(counts(&folder.flush()), [91]);
}

#[test]
fn after_a_pause_a_series_has_a_line_within_a_second_again() {
    let (mut folder, start) = (Folder::default(), Instant::now());
    folder.add(start, to(443));
    assert_eq!(folder.due(start + SECOND).len(), 1);
    let later = start + SECOND + SERIES_EVERY;
    assert!(folder.due(later).is_empty());
    assert!(folder.is_empty());
    folder.add(later, to(443));
    assert_eq!(folder.due(later + FIRST_LINE_AFTER).len(), 1);
}

#[test]
fn denials_that_differ_have_separate_lines() {
    let (mut folder, start) = (Folder::default(), Instant::now());
    let question = |name: &str, record_type: &str| Denied {
        dns: Some((name.into(), record_type.into())),
        ..to(53)
    };
    let different = [
        to(443),
        to(80),
        Denied {
            protocol: Some(17),
            ..to(443)
        },
        Denied {
            reason: Reason::Expired,
            ..to(443)
        },
        Denied {
            verdict: Verdict::Audited,
            ..to(443)
        },
        Denied {
            dst: None,
            ..to(443)
        },
        Denied {
            icmp: Some((8, 0)),
            ..to(443)
        },
        question("a.test", "A"),
        question("b.test", "A"),
        question("a.test", "AAAA"),
        of_pod("other", 443),
    ];
    for denied in &different {
        folder.add(start, denied.clone());
        folder.add(start, denied.clone());
    }
    assert_eq!(counts(&folder.due(start + SECOND)), [2; 11]);
}

#[test]
fn a_flood_of_destinations_is_limited_and_counted_and_hides_no_other_pod() {
    let (mut folder, start) = (Folder::default(), Instant::now());
    for port in 0..1000 {
        folder.add(start, of_pod("loud", port));
    }
    folder.add(start, of_pod("quiet", 443));

    let lines = folder.due(start + SECOND);
    let of = |name: &'static str| {
        lines
            .iter()
            .filter(move |line| line.pod().is_some_and(|pod| pod.name == name))
    };
    assert_eq!(of("quiet").count(), 1);
    assert_eq!(of("loud").count(), SERIES_PER_POD + 1);
    assert_eq!(of("loud").map(Line::count).sum::<u64>(), 1000);
    let lost = of("loud").find_map(|line| match line {
        Line::Lost { count, why, .. } => Some((*count, *why)),
        Line::Denied { .. } => None,
    });
    assert_eq!(
        lost,
        Some((1000 - SERIES_PER_POD as u64, TOO_MANY_DESTINATIONS))
    );
}

#[test]
fn lines_are_limited_in_the_long_run_and_every_packet_is_counted() {
    let (mut folder, start) = (Folder::default(), Instant::now());
    let mut lines = Vec::new();
    let (ticks, per_tick) = (200, 100);
    for tick in 0..ticks {
        let now = start + SECOND / 10 * tick;
        for port in 0..per_tick {
            folder.add(now, to(u16::try_from(tick * per_tick + port).unwrap()));
        }
        lines.extend(folder.due(now));
    }
    let is_lost = |line: &&Line| matches!(line, Line::Lost { .. });
    let (lost, printed): (Vec<_>, Vec<_>) = lines.iter().partition(is_lost);
    let limit = (LINE_BURST + LINES_PER_SECOND * ticks / 10) as usize;
    assert!(
        printed.len() <= limit,
        "{} lines of at most {limit}",
        printed.len()
    );
    assert!(
        printed.len() > limit / 2,
        "{} lines of at most {limit}",
        printed.len()
    );
    // Two kinds of losses, each at most once in FIRST_LINE_AFTER.
    assert!(lost.len() <= 2 * 25, "{} lines of losses", lost.len());

    lines.extend(folder.flush());
    assert_eq!(
        counts(&lines).iter().sum::<u64>(),
        u64::from(ticks * per_tick)
    );
}

#[test]
fn losses_reported_by_others_are_added_up() {
    let (mut folder, start) = (Folder::default(), Instant::now());
    let pod = denied().pod;
    folder.add_lost(start, wall(0), &pod, 3, "ring_full");
    folder.add_lost(start + SECOND / 2, wall(500), &pod, 4, "ring_full");
    assert!(folder.due(start + SECOND / 2).is_empty());
    let lines = folder.due(start + FIRST_LINE_AFTER);
    let [
        Line::Lost {
            count: 7,
            why: "ring_full",
            time,
            ..
        },
    ] = &lines[..]
    else {
        panic!("{lines:?}")
    };
    assert_eq!(*time, wall(0));
    assert!(folder.is_empty());
}

#[test]
fn a_flush_returns_everything_that_is_pending() {
    let (mut folder, start) = (Folder::default(), Instant::now());
    folder.add(start, to(443));
    folder.add(start, to(443));
    folder.add_lost(start, wall(0), &denied().pod, 5, "ring_full");
    assert_eq!(counts(&folder.flush()), [2, 5]);
    assert!(folder.is_empty());
}
