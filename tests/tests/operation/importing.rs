//! `egress-agent import` as a pipeline uses it.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use egress_tests::Agent;

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

/// What the program said: its exit status, standard output and standard error.
struct Said {
    code: Option<i32>,
    output: String,
    errors: String,
}

/// Runs `egress-agent import` with this standard input.
#[track_caller]
fn import(arguments: &[&str], input: &str) -> Said {
    let mut child = Command::new(Agent::program())
        .arg("import")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the agent's program runs");
    let mut stdin = child.stdin.take().expect("it is a pipe");
    stdin
        .write_all(input.as_bytes())
        .expect("the program reads its input");
    drop(stdin);
    let output = child.wait_with_output().expect("the program ends");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the output is UTF-8");
    Said {
        code: output.status.code(),
        output: text(output.stdout),
        errors: text(output.stderr),
    }
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
