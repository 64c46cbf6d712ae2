//! Pods that change their interfaces all the time.

use std::time::{Duration, Instant};

use egress_tests::{Lab, observed::HTTP};

/// What the agent does at most: so many rounds at once, one each tenth of a second, one each second
/// whatever happens, and a few while this test begins and ends.
fn most(elapsed: Duration) -> f64 {
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
    let most = most(start.elapsed());
    assert!(more >= 1.0, "the agent looks at all");
    assert!(
        more <= most,
        "{more} rounds in {:?}, and {most} are enough",
        start.elapsed()
    );
    // What is enforced is so as before.
    pod.netns().ip_batch("route add default via 10.1.1.1\n");
    assert_eq!(pod.lookup("shop.test").len(), 1);
}
