//! The agent's program.
fn main() {
    let mut d = egress_agent::datapath::Datapath::open(&egress_agent::datapath::Options {
        bpffs: "/tmp/bpfx".into(),
        allow_entries: 100,
        attach: Default::default(),
        trace: false,
    })
    .unwrap();
    let p = d.create_pod(1, "ns", "p.x", "uid").unwrap();
    let _a = d
        .create_policy(
            1,
            &egress_common::records::Policy::CLOSED,
            [([0u8; 16], 96u32, 1u64)].into_iter(),
        )
        .unwrap();
    d.pin_allow(1, &p).unwrap();
    std::process::Command::new("bpftool")
        .args(["map"])
        .status()
        .unwrap();
    std::process::Command::new("bpftool")
        .args(["prog"])
        .status()
        .unwrap();
}
