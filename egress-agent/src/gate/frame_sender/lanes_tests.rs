use super::*;

const ONE: PodId = PodId::new(1);
const TWO: PodId = PodId::new(2);
const NINE: PodId = PodId::new(9);
const VETH: IfIndex = IfIndex::new(7);

const QUICK_NS: u64 = 5_000;
const SECOND_NS: u64 = 1_000_000_000;
const LATER_NS: u64 = 3600 * SECOND_NS;

fn pushed(pods: &[PodId], frames: u32) -> Lanes<u32> {
    let mut lanes = Lanes::new();
    for &pod in pods {
        lanes.open(pod, 0);
    }
    for number in 0..frames {
        for &pod in pods {
            lanes.push((pod, IfIndex::new(pod.get())), 100, number, LATER_NS);
        }
    }
    lanes
}

#[track_caller]
fn next(lanes: &mut Lanes<u32>, now_ns: u64) -> Job<u32> {
    match lanes.next(now_ns) {
        Next::Send(job) => job,
        Next::Wait(until) => panic!("nothing until {until:?}"),
    }
}

/// Lanes of pods that have been slow.
fn slow(pods: &[PodId], frames: u32) -> (Lanes<u32>, u64) {
    let mut lanes = pushed(pods, frames + 1);
    let jobs: Vec<_> = pods.iter().map(|_| next(&mut lanes, 0)).collect();
    for job in &jobs {
        lanes.end(job, SECOND_NS, None, SECOND_NS);
    }
    (lanes, SECOND_NS + PAUSE * SECOND_NS)
}

#[test]
fn one_thread_at_a_time_serves_a_pod_in_the_order_of_its_frames() {
    let mut lanes = pushed(&[ONE, TWO], 2);
    let first = next(&mut lanes, 0);
    let second = next(&mut lanes, 0);
    assert_eq!((first.pod, first.frame), (ONE, 0));
    assert_eq!((second.pod, second.frame), (TWO, 0));
    assert!(matches!(lanes.next(0), Next::Wait(None)));
    lanes.end(&second, QUICK_NS, None, 0);
    let third = next(&mut lanes, 0);
    assert_eq!((third.pod, third.frame), (TWO, 1));
    lanes.end(&first, QUICK_NS, None, 0);
    let fourth = next(&mut lanes, 0);
    assert_eq!((fourth.pod, fourth.frame), (ONE, 1));
}

#[test]
fn slow_pods_keep_one_thread_busy_and_pause() {
    let (mut lanes, from_ns) = slow(&[ONE, TWO, PodId::new(3)], 2);
    assert!(matches!(lanes.next(from_ns - 1), Next::Wait(Some(at)) if at == from_ns));
    let job = next(&mut lanes, from_ns);
    assert!(matches!(lanes.next(from_ns), Next::Wait(None)));
    // Another thread serves a quick pod meanwhile.
    lanes.open(NINE, from_ns);
    lanes.push((NINE, VETH), 100, 0, LATER_NS);
    assert_eq!(next(&mut lanes, from_ns).pod, NINE);
    lanes.end(&job, SECOND_NS, None, from_ns + SECOND_NS);
    assert!(matches!(
        lanes.next(from_ns + SECOND_NS),
        Next::Wait(Some(_))
    ));
    // The served pod is slower now, so it is another pod's turn.
    assert_ne!(next(&mut lanes, from_ns + 4 * SECOND_NS).pod, job.pod);
}

#[test]
fn a_pod_that_is_quick_again_is_no_longer_slow() {
    let (mut lanes, mut now_ns) = slow(&[ONE], 30);
    let mut frames = 0;
    loop {
        let job = next(&mut lanes, now_ns);
        if !job.is_slow {
            break;
        }
        lanes.end(&job, QUICK_NS, None, now_ns);
        now_ns += PAUSE * QUICK_NS;
        frames += 1;
    }
    assert!((10..20).contains(&frames), "{frames}");
    // One frame that was slightly slow does not change that.
    let mut lanes = pushed(&[ONE], 3);
    let job = next(&mut lanes, 0);
    lanes.end(&job, 5 * SLOW_NS, None, 0);
    assert!(!next(&mut lanes, 0).is_slow);
}

#[test]
fn a_lane_is_bounded_and_counts_what_it_drops() {
    for (len, most) in [(60, LIMITS.pod / FRAME_MIN), (65_536, LIMITS.pod / 65_536)] {
        let mut lanes = Lanes::new();
        lanes.open(ONE, 0);
        for _ in 0..most + 3 {
            lanes.push((ONE, VETH), len, (), LATER_NS);
        }
        assert_eq!(lanes.take_lost(ONE)[&VETH].frames, 3);
        assert!(lanes.take_lost(ONE).is_empty());
        lanes.drop_frames_of(ONE, VETH);
        assert_eq!(lanes.take_lost(ONE)[&VETH].frames, most as u64);
        assert_eq!(lanes.budget.common(), 0);
        assert!(matches!(lanes.next(0), Next::Wait(None)));
    }
}

#[test]
fn the_lane_of_a_removed_pod_closes_after_the_frame_in_progress() {
    let (mut lanes, now_ns) = slow(&[ONE, TWO], 1);
    let job = next(&mut lanes, now_ns);
    lanes.drop_frames_of(job.pod, job.ifindex);
    lanes.forget(job.pod);
    let error = io::Error::from(io::ErrorKind::NotFound);
    lanes.end(&job, SECOND_NS, Some(error), now_ns);
    assert!(!lanes.pods.contains_key(&job.pod));
    assert_ne!(next(&mut lanes, now_ns + 4 * SECOND_NS).pod, job.pod);
}

#[test]
fn a_lane_closes_after_a_quiet_time() {
    let mut lanes = pushed(&[ONE], 1);
    assert!(!lanes.close_if_quiet(ONE, 10, 100), "a frame waits");
    let job = next(&mut lanes, 100);
    assert!(!lanes.close_if_quiet(ONE, 10, 100), "one is being sent");
    lanes.end(&job, SECOND_NS, None, 100);
    assert!(!lanes.close_if_quiet(ONE, 10, 109), "it was slow");
    assert!(lanes.close_if_quiet(ONE, 10, 110));
}

#[test]
fn a_frame_that_has_waited_too_long_is_lost() {
    let mut lanes = pushed(&[ONE], 1);
    lanes.push((ONE, VETH), 100, 1, 10);
    lanes.push((ONE, VETH), 100, 2, 20);
    let job = next(&mut lanes, 5);
    lanes.end(&job, QUICK_NS, None, 15);
    assert_eq!(next(&mut lanes, 15).frame, 2);
    assert_eq!(lanes.take_lost(ONE)[&VETH].frames, 1);
    assert_eq!(lanes.budget.common(), 0);
    // The same for a frame that waits alone.
    let mut lanes = pushed(&[], 0);
    lanes.open(ONE, 0);
    lanes.push((ONE, VETH), 100, 1, 10);
    assert!(matches!(lanes.next(11), Next::Wait(None)));
    lanes.push((ONE, VETH), 100, 2, 20);
    assert_eq!(next(&mut lanes, 11).frame, 2);
}
