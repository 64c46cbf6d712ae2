//! Writes the definitions of the policy kinds to standard output, for `cargo xtask crds`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for definition in egress_api::definitions() {
        print!("---\n{}", serde_saphyr::to_string(&definition)?);
    }
    Ok(())
}
