//! Pods that change their interfaces constantly.

use std::time::{Duration, Instant};

use egress_tests::{Lab, observed::HTTP};

/// The maximum number of reconciliations: a burst at once, one each tenth of a second, one each second in any
/// case, and a few while the test begins and ends.
fn max_rounds(elapsed: Duration) -> f64 {
    16.0 + 10.0 * elapsed.as_secs_f64() + elapsed.as_secs_f64() + 4.0
}

#[test]
fn pods_that_flap_their_interfaces_do_not_keep_the_agent_busy() {
    let lab = Lab::builder().config("http", HTTP).build();
    let (_web, pod) = lab.shop_and_cart("shop.test:443");
    let others = ["a", "b", "c"].map(|name| lab.pod("shop", name));
    let _agent = lab.start_agent(&[&pod]);
    let rounds = || lab.metrics().get("egress_agent_reconcile_seconds_count");
    let (start, before) = (Instant::now(), rounds());
    let flaps = "link set eth0 down\nlink set eth0 up\n".repeat(200);
    std::thread::scope(|scope| {
        for pod in others.iter().chain([&pod]) {
            scope.spawn(|| pod.netns().ip_batch(&flaps));
        }
    });
    let more = rounds() - before;
    let most = max_rounds(start.elapsed());
    assert!(more >= 1.0, "the agent does not reconcile");
    assert!(
        more <= most,
        "{more} rounds in {:?}, at most {most} expected",
        start.elapsed()
    );
    // The pod is still enforced.
    pod.netns().ip_batch("route add default via 10.1.1.1\n");
    assert_eq!(pod.lookup("shop.test").len(), 1);
}
