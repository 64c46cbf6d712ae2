//! Who can remove the tables by which frames that skip the programs do not leave.

use std::process::Command;

use egress_tests::{
    Lab, Namespace, SHORT, addresses::server, ifb::Ifb, observed::HTTP, rewritten::nft,
};

/// All tables of nf_tables, without their counters.
fn ruleset(netns: &Namespace) -> String {
    let mut command = Command::new("nft");
    command.args(["-s", "list", "ruleset"]);
    let output = netns.run(|| command.output());
    let output = output.expect("nft, of the package nftables");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn tables_that_were_removed_while_no_agent_ran_are_made_by_the_next_one() {
    let lab = Lab::new();
    let (web, pod) = lab.shop_and_cart("shop.test:443");
    let mut agent = lab.start_agent(&[&pod]);
    let before = ruleset(lab.node());
    assert_eq!(before.matches("table ").count(), 3, "{before}");
    agent.kill();
    nft(lab.node(), "flush ruleset\n");
    assert_eq!(ruleset(lab.node()), "");

    let agent = lab.start_agent(&[&pod]);
    assert_eq!(ruleset(lab.node()), before);
    let ifb = Ifb::redirect(&pod);
    assert!(pod.connect_tcp((server(99), 443), SHORT).is_err());
    assert_eq!(web.connections_to((server(99), 443).into()), 0);
    agent.wait_denial("frames that nobody judged", |denial| {
        denial.of(&pod) && denial.reason == "not_judged"
    });
    drop(ifb);
    pod.lookup("shop.test");
    pod.talks_tcp((server(10), 443));
}

#[test]
fn a_pod_does_not_reach_the_nodes_tables() {
    let lab = Lab::builder().config("http", HTTP).build();
    let (web, pod) = lab.shop_and_cart("shop.test:443");
    let _agent = lab.start_agent(&[&pod]);
    let before = ruleset(lab.node());
    // It has `CAP_NET_ADMIN` in its own network, and its own tables there.
    nft(pod.netns(), "flush ruleset\n");
    nft(
        pod.netns(),
        "table inet egress-agent {
            chain received {
                type filter hook prerouting priority -400
                accept
            }
        }
        table netdev egress-agent {
            chain sent {
                type filter hook egress device eth0 priority 0
                meta priority set 1:1
            }
        }
        ",
    );
    let ifb = Ifb::redirect(&pod);
    assert!(pod.connect_tcp((server(99), 443), SHORT).is_err());
    assert_eq!(web.connections_to((server(99), 443).into()), 0);
    drop(ifb);
    nft(pod.netns(), "flush ruleset\n");
    assert_eq!(ruleset(lab.node()), before);
    let restored = lab
        .metrics()
        .find("egress_agent_stamp_tables_restored_total");
    assert!((restored - 0.0).abs() < f64::EPSILON, "{restored}");
}
