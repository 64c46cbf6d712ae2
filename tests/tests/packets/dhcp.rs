//! A pod that gets its address by DHCP, as a virtual machine behind a tap device does.

use std::process::Command;

use egress_tests::{Agent, Lab, Pod, Running};

/// A DHCP server on the node's end of the pod's interface.
fn serve(lab: &Lab, pod: &Pod) -> Running {
    let interface = pod.interface();
    lab.node()
        .ip_batch(&format!("addr add 10.123.0.1/24 dev {interface}\n"));
    lab.run_on_node(Command::new("dnsmasq").args([
        "--conf-file=/dev/null",
        "--no-daemon",
        "--user=root",
        "--port=0",
        &format!("--interface={interface}"),
        "--dhcp-range=10.123.0.50,10.123.0.60,255.255.255.0",
        "--dhcp-authoritative",
        "--leasefile-ro",
        "--no-ping",
    ]))
}

/// True if a DHCP client in the pod gets a lease within this many attempts, one a second.
fn gets_a_lease(pod: &Pod, times: u32) -> bool {
    let mut command = Command::new("busybox");
    command.args(["udhcpc", "-i", "eth0", "-n", "-q", "-f", "-s", "/bin/true"]);
    command.args(["-t", &times.to_string(), "-T", "1"]);
    let output = pod.netns().run(|| command.output());
    output.expect("busybox runs").status.success()
}

fn scene(allow: &str) -> (Agent, Running, Pod, Lab) {
    let lab = Lab::new();
    let pod = lab.pod("shop", "vm");
    lab.write_pod(&pod, &[("allow", allow)]);
    let agent = lab.start_agent(&[&pod]);
    let server = serve(&lab, &pod);
    (agent, server, pod, lab)
}

#[test]
fn a_dhcp_client_gets_an_address_with_an_entry() {
    let (_agent, _server, pod, _lab) = scene("255.255.255.255:67/udp");
    assert!(gets_a_lease(&pod, 30));
}

#[test]
fn without_an_entry_a_dhcp_client_gets_no_address() {
    let (agent, _server, pod, _lab) = scene("shop.test:443");
    assert!(!gets_a_lease(&pod, 2));
    let broadcast = [255, 255, 255, 255].into();
    agent.wait_denial("the DHCP request", |denial| {
        denial.is(&pod, "protected", broadcast, 67)
    });
}
