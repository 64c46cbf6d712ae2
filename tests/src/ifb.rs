//! An `ifb` device in a pod: frames that it sends again skip tc and netfilter's ingress hook on the node.

use std::process::Command;

use crate::{Pod, rival::Rival};

/// Until this is dropped, everything that the pod sends passes such a device, including ARP.
#[derive(Debug)]
pub struct Ifb<'a> {
    pod: &'a Pod,
    /// The device sends each packet on the same interface again, and there it must not be redirected a second
    /// time: a filter's action would clear the flag (`tc_skip_classify`) for which the node skips its
    /// filters.
    _passes: Rival,
}

impl<'a> Ifb<'a> {
    /// Creates the device and redirects to it.
    #[track_caller]
    pub fn redirect(pod: &'a Pod) -> Self {
        pod.netns()
            .ip_batch("link add ifb0 type ifb\nlink set ifb0 up\n");
        let ifb = Self {
            pod,
            _passes: Rival::count_in_mark(pod.netns(), "eth0"),
        };
        ifb.tc(&["qdisc", "add", "dev", "eth0", "clsact"]);
        // Packets whose mark is 1: `ld mark; jeq #1; ret #-1; ret #0`.
        let first = [
            "bpf",
            "bytecode",
            "4,32 0 0 4294963220,21 0 1 1,6 0 0 4294967295,6 0 0 0",
        ];
        let add = ["filter", "add", "dev", "eth0", "egress", "prio", "1"];
        let redirect = ["action", "mirred", "egress", "redirect", "dev", "ifb0"];
        ifb.tc(&[&add[..], &first, &redirect].concat());
        ifb
    }

    #[track_caller]
    fn tc(&self, arguments: &[&str]) {
        let mut command = Command::new("tc");
        command.args(arguments);
        let status = self.pod.netns().run(|| command.status());
        let status = status.expect("tc, of the package iproute2");
        assert!(status.success(), "tc {arguments:?}: {status}");
    }
}

impl Drop for Ifb<'_> {
    fn drop(&mut self) {
        // A panic here would hide that of the test. Without the device the filter redirects to nothing.
        let netns = self.pod.netns().name();
        for program in [
            &["tc", "-n", netns, "qdisc", "del", "dev", "eth0", "clsact"][..],
            &["ip", "-n", netns, "link", "del", "ifb0"],
        ] {
            let _ = Command::new(program[0]).args(&program[1..]).status();
        }
    }
}
