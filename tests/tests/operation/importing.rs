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
    let result = import(&["-"], CILIUM);
    assert_eq!(result.code, Some(0), "{}", result.errors);
    for line in [
        "kind: EgressPolicy",
        "  namespace: shop",
        "      app: web",
        "  - github.com:443/tcp",
        // The wildcard is wider here than there.
        "  # - \"*.example.com:443/tcp\"",
    ] {
        assert!(
            result.output.lines().any(|other| other == line),
            "{line}: {}",
            result.output
        );
    }
    assert!(
        result.errors.starts_with(
            "standard input:1: CiliumNetworkPolicy shop/web: left out: `*.example.com`"
        ),
        "{}",
        result.errors
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
    let result = import(&["-"], "kind: NetworkPolicy\nspec: [\n");
    assert_eq!(result.code, Some(1));
    assert!(
        result.errors.contains("standard input:"),
        "{}",
        result.errors
    );
    assert!(
        result.errors.contains("the file cannot be read"),
        "{}",
        result.errors
    );
    let missing = import(&["no/such/file.yaml"], "");
    assert_eq!(missing.code, Some(1));
    assert!(
        missing.errors.contains("no/such/file.yaml: cannot be read"),
        "{}",
        missing.errors
    );
}
