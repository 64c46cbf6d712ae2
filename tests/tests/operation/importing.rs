//! `egress-agent import` as a pipeline uses it.

use std::path::Path;

use crate::command_output::CommandOutput;

const CILIUM: &str = "\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: web}}
  egress:
  - toFQDNs: [{matchName: github.com}, {matchPattern: '*.example.com'}]
    toPorts: [{ports: [{port: '443', protocol: TCP}]}]
";

#[track_caller]
fn import(arguments: &[&str], input: &str) -> CommandOutput {
    CommandOutput::of("import", Path::new("/"), arguments, input)
}

#[test]
fn a_policy_of_another_product_becomes_a_policy_object_with_comments() {
    let said = import(&["-"], CILIUM);
    assert_eq!(said.code, Some(0), "{}", said.errors);
    for line in [
        "kind: EgressPolicy",
        "  namespace: shop",
        "      app: web",
        "  - github.com:443/tcp",
        // The wildcard is wider here than there.
        "  # - \"*.example.com:443/tcp\"",
    ] {
        assert!(
            said.output.lines().any(|other| other == line),
            "{line}: {}",
            said.output
        );
    }
    assert!(
        said.errors.starts_with(
            "standard input:1: CiliumNetworkPolicy shop/web: left out: `*.example.com`"
        ),
        "{}",
        said.errors
    );
}

#[test]
fn strict_fails_if_something_is_left_out() {
    assert_eq!(import(&["--strict", "-"], CILIUM).code, Some(1));
    let deep = import(&["--strict", "--deep-wildcards", "-"], CILIUM);
    assert_eq!(deep.code, Some(0), "{}", deep.errors);
    assert!(
        deep.output.contains("\n  - \"*.example.com:443/tcp\"\n"),
        "{}",
        deep.output
    );
}

#[test]
fn an_unreadable_file_has_its_place_in_the_error() {
    let said = import(&["-"], "kind: NetworkPolicy\nspec: [\n");
    assert_eq!(said.code, Some(1));
    assert!(said.errors.contains("standard input:"), "{}", said.errors);
    assert!(
        said.errors.contains("the file cannot be read"),
        "{}",
        said.errors
    );
    let missing = import(&["no/such/file.yaml"], "");
    assert_eq!(missing.code, Some(1));
    assert!(
        missing.errors.contains("no/such/file.yaml: cannot be read"),
        "{}",
        missing.errors
    );
}
