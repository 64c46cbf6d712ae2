//! Embeds the eBPF object that `cargo xtask build` has made.
use std::{env, fs, path::PathBuf};

fn main() {
    let object = env::var_os("EGRESS_EBPF_OBJECT").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/ebpf/egress-ebpf"),
        PathBuf::from,
    );
    println!("cargo::rerun-if-env-changed=EGRESS_EBPF_OBJECT");
    println!("cargo::rerun-if-changed={}", object.display());
    let out =
        PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("egress-ebpf");
    fs::copy(&object, out)
        .unwrap_or_else(|error| panic!("{}: {error}: run `cargo xtask build`", object.display()));
}
