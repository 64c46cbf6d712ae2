//! Rules about the sources that no compiler checks: which module may use which, and what a file may contain.
//!
//! The rules match names, not syntax: a name is a whole word outside comments and literals. That is
//! enough for names that nobody writes by accident.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use super::code::{self, is_word};
use crate::workspace;

/// The maximum length of a Rust file, in lines.
const LONGEST: usize = 600;

/// The agent's sources, to which the rules about modules apply.
const AGENT: &str = "egress-agent/src/";

/// Names that only one module of the agent may use.
struct Reserved {
    names: &'static [&'static str],
    /// The only directory in which they may be used.
    within: &'static str,
    reason: &'static str,
}

const RESERVED: [Reserved; 3] = [
    Reserved {
        names: &["aya", "aya_obj", "aya_log"],
        within: "egress-agent/src/datapath/",
        reason: "only datapath/ uses the kernel's BPF interface, so that everything else works without it",
    },
    Reserved {
        names: &["AF_PACKET", "PF_PACKET", "sockaddr_ll", "LinkAddr"],
        within: "egress-agent/src/gate/",
        reason: "only gate/ sends frames, so that nothing else can put a packet on a pod's interface",
    },
    Reserved {
        names: &["k8s_openapi", "kube"],
        within: "egress-agent/src/pods/",
        reason: "only pods/ knows Kubernetes, so that pods can come from anywhere",
    },
];

/// The siblings that a module of the agent may use.
enum Uses {
    /// Only these and itself; an entry may name a module within a module.
    Only(&'static [&'static str]),
    /// All except these.
    AllBut(&'static [&'static str]),
}

/// The dependencies between the agent's modules. A module that is not listed may use all except `cli`.
const ARROWS: [(&str, Uses, &str); 5] = [
    ("cli", Uses::AllBut(&[]), ""),
    (
        "config",
        Uses::Only(&[]),
        "config/ reads what an operator wrote; the other modules use it",
    ),
    (
        "host",
        Uses::Only(&[]),
        "host/ reads the state of the machine; it does not decide about pods",
    ),
    (
        "pods",
        Uses::Only(&["config::Cluster", "config::Nodes"]),
        "pods/ is a source of pods; it does not decide about them",
    ),
    (
        "report",
        Uses::AllBut(&["cli", "gate", "datapath"]),
        "report/ receives events; it does not fetch them",
    ),
];

/// The files that may contain `unsafe`.
const UNSAFE: [&str; 15] = [
    "egress-ebpf/src/",
    "egress-common/src/dns/message.rs",
    "egress-common/src/records.rs",
    "egress-agent/src/datapath/inner.rs",
    "egress-agent/src/datapath/open_flows.rs",
    "egress-agent/src/datapath/rings.rs",
    "egress-agent/src/datapath/take.rs",
    "egress-agent/src/gate/frame_sender/sending.rs",
    "egress-agent/src/host/notices.rs",
    "tests/src/features.rs",
    "tests/src/frames.rs",
    "tests/src/rewritten.rs",
    "tests/src/rival.rs",
    "tests/src/shared_page.rs",
    "tests/tests/connections/forged_inbound.rs",
];

/// Parts of addresses of package registries, split so that this file passes its own rule.
const REGISTRIES: [(&str, &str); 8] = [
    ("crates", ".io"),
    ("npmjs", ".org"),
    ("pypi", ".org"),
    ("deb.debian", ".org"),
    ("archive.ubuntu", ".com"),
    ("proxy.golang", ".org"),
    ("ghcr", ".io"),
    ("quay", ".io"),
];

/// Examples of what pods may reach name registries, too; nothing is built from there.
const MAY_NAME_REGISTRIES: &str = "manifests/examples/sets/";

/// Parts of paths of one person's machine, split like [`REGISTRIES`].
const MACHINE_PATHS: [(&str, &str); 4] = [
    ("/home", "/"),
    ("/root", "/"),
    ("/Users", "/"),
    ("/work", "/"),
];

/// Variables whose value the compiler embeds at build time, split like [`REGISTRIES`].
const BUILT_IN_PATHS: [(&str, &str); 2] = [
    ("env!(\"CARGO_MANIFEST", "_DIR"),
    ("env!(\"CARGO_TARGET", "_TMPDIR"),
];

/// Directories without files of the repository.
pub(super) const SKIPPED: [&str; 2] = ["target", ".git"];

/// Files that are written by a tool.
const GENERATED: [&str; 1] = ["Cargo.lock"];

/// A broken rule.
#[derive(Debug, PartialEq, Eq)]
struct Violation {
    path: String,
    line: usize,
    what: String,
    reason: &'static str,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            path,
            line,
            what,
            reason,
        } = self;
        write!(f, "{path}:{line}: {what}: {reason}")
    }
}

/// Checks every text file of the repository.
///
/// # Errors
///
/// Fails when a rule is broken, after printing every violation.
pub(super) fn run() -> Result<()> {
    let mut violations = Vec::new();
    let mut files = 0;
    visit(workspace::root(), "", &mut |path, text| {
        files += 1;
        violations.extend(check(path, text));
    })?;
    for violation in &violations {
        eprintln!("{violation}");
    }
    if !violations.is_empty() {
        bail!(
            "{} violations of the rules about the sources' structure",
            violations.len()
        );
    }
    println!("structure: {files} files, no violations");
    Ok(())
}

/// Calls `file` with the path within the repository and the text of every text file.
fn visit(directory: &Path, prefix: &str, file: &mut impl FnMut(&str, &str)) -> Result<()> {
    let entries = fs::read_dir(directory)
        .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
        .with_context(|| format!("cannot list {}", directory.display()))?;
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = format!("{prefix}{name}");
        if SKIPPED.contains(&name.as_str()) || GENERATED.contains(&name.as_str()) {
            continue;
        }
        let kind = entry
            .file_type()
            .with_context(|| format!("cannot read the type of {path}"))?;
        if kind.is_dir() {
            visit(&entry.path(), &format!("{path}/"), file)?;
        } else if kind.is_file() {
            let bytes = fs::read(entry.path()).with_context(|| format!("cannot read {path}"))?;
            if let Ok(text) = String::from_utf8(bytes) {
                file(&path, &text);
            }
        }
    }
    Ok(())
}

/// Every broken rule in one file.
fn check(path: &str, text: &str) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut report = |line, what, reason| {
        found.push(Violation {
            path: path.to_owned(),
            line,
            what,
            reason,
        });
    };
    for (number, line) in (1..).zip(text.lines()) {
        check_text(path, line, |what, reason| report(number, what, reason));
    }
    let is_rust = Path::new(path)
        .extension()
        .is_some_and(|extension| extension == "rs");
    if is_rust {
        let code = code::only(text);
        let lines = text.lines().count();
        if lines > LONGEST {
            let what = format!("{lines} lines, more than {LONGEST}");
            report(lines, what, "a file has one subject and stays easy to read");
        }
        for (number, line) in (1..).zip(code.lines()) {
            check_names(path, line, |what, reason| report(number, what, reason));
        }
        check_arrows(path, &code, &mut report);
    }
    found
}

/// The rules for every line of text.
fn check_text(path: &str, line: &str, mut report: impl FnMut(String, &'static str)) {
    for (start, end) in REGISTRIES {
        let name = [start, end].concat();
        if line.contains(&name) && !path.starts_with(MAY_NAME_REGISTRIES) {
            report(
                format!("`{name}`"),
                "the user decides which registry packages come from",
            );
        }
    }
    for (start, end) in BUILT_IN_PATHS {
        let name = [start, end].concat();
        if line.contains(&name) {
            report(
                format!("`{name}`"),
                "a moved or copied checkout would look in the old place: find it at run time",
            );
        }
    }
    for (start, end) in MACHINE_PATHS {
        let name = [start, end].concat();
        let is_path = |(at, _): (usize, &str)| {
            let before = line[..at].chars().next_back();
            !before.is_some_and(|c| c.is_alphanumeric() || "_-.}".contains(c))
        };
        if line.match_indices(&name).any(is_path) {
            report(
                format!("`{name}`"),
                "a path of one machine does not exist on others",
            );
        }
    }
}

/// The rules about names in a line of code.
fn check_names(path: &str, code: &str, mut report: impl FnMut(String, &'static str)) {
    if path.starts_with(AGENT) {
        for Reserved {
            names,
            within,
            reason,
        } in &RESERVED
        {
            if path.starts_with(within) {
                continue;
            }
            for name in names.iter().filter(|name| has_word(code, name)) {
                report(format!("`{name}` outside {within}"), reason);
            }
        }
    }
    if has_word(code, "unsafe") && !UNSAFE.iter().any(|allowed| path.starts_with(allowed)) {
        report(
            "`unsafe` in a file that may not have it".to_owned(),
            "only listed files may contain unsafe code, so that it can be reviewed",
        );
    }
}

/// The rules about dependencies between the agent's modules.
fn check_arrows(path: &str, code: &str, report: &mut impl FnMut(usize, String, &'static str)) {
    let Some(inside) = path.strip_prefix(AGENT) else {
        return;
    };
    let module = inside
        .split('/')
        .next()
        .unwrap_or(inside)
        .trim_end_matches(".rs");
    if module == "main" || module == "lib" {
        return;
    }
    let listed = ARROWS.iter().find(|(name, ..)| *name == module);
    let (uses, reason) = listed.map_or(
        (
            &Uses::AllBut(&["cli"]),
            "cli/ is on top: it uses everything, and nothing uses it",
        ),
        |(_, uses, reason)| (uses, *reason),
    );
    for (line, target) in siblings(code) {
        let is_in = |list: &[&str]| {
            list.iter().any(|entry| {
                target
                    .strip_prefix(entry)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
            })
        };
        let allowed = is_in(&[module])
            || match uses {
                Uses::Only(list) => is_in(list),
                Uses::AllBut(list) => !is_in(list),
            };
        if !allowed {
            report(line, format!("{module} uses {target}"), reason);
        }
    }
}

/// The paths below `crate::` in code, with their lines; groups are expanded.
fn siblings(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, start) in text.match_indices("crate::") {
        if text[..at].ends_with(is_word) {
            continue;
        }
        let line = 1 + text[..at].matches('\n').count();
        let mut paths = Vec::new();
        expand(&text[at + start.len()..], "", &mut paths);
        found.extend(paths.into_iter().map(|path| (line, path)));
    }
    found
}

/// Parses one path, or a group of paths in braces, and returns the rest of the text.
fn expand<'a>(text: &'a str, prefix: &str, paths: &mut Vec<String>) -> &'a str {
    let mut rest = text.trim_start();
    if let Some(group) = rest.strip_prefix('{') {
        rest = group.trim_start();
        while !rest.is_empty() && !rest.starts_with('}') {
            let before = rest.len();
            rest = expand(rest, prefix, paths).trim_start();
            rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
            if rest.len() == before {
                // Not a path but a macro's own syntax: stop here.
                return rest;
            }
        }
        return rest.strip_prefix('}').unwrap_or(rest);
    }
    let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
    let (word, mut rest) = rest.split_at(end);
    let path = if prefix.is_empty() {
        word.to_owned()
    } else {
        format!("{prefix}::{word}")
    };
    if let Some(more) = rest.strip_prefix("::") {
        return expand(more, &path, paths);
    }
    if !word.is_empty() {
        paths.push(path);
    }
    if let Some(renamed) = rest.trim_start().strip_prefix("as ") {
        rest = renamed.trim_start().trim_start_matches(is_word);
    }
    rest
}

/// Whether `code` contains `name` as a whole word.
fn has_word(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(at, _)| {
        !code[..at].ends_with(is_word) && !code[at + name.len()..].starts_with(is_word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The violations that `check` finds in a file, without the reasons.
    fn violations_in(path: &str, text: &str) -> Vec<String> {
        check(path, text)
            .into_iter()
            .map(
                |Violation {
                     path, line, what, ..
                 }| format!("{path}:{line}: {what}"),
            )
            .collect()
    }

    #[test]
    fn only_the_datapath_uses_aya() {
        let text = "// aya is named here\nuse aya::Ebpf;\n";
        assert_eq!(
            violations_in("egress-agent/src/gate/mod.rs", text),
            ["egress-agent/src/gate/mod.rs:2: `aya` outside egress-agent/src/datapath/"]
        );
        assert!(violations_in("egress-agent/src/datapath/load.rs", text).is_empty());
        assert!(violations_in("egress-common/src/records.rs", text).is_empty());
        assert!(violations_in("egress-agent/src/gate/mod.rs", "let papaya = kubelet;").is_empty());
    }

    #[test]
    fn only_the_gate_opens_packet_sockets_and_only_pods_knows_kubernetes() {
        let text = "let s = socket(libc::AF_PACKET);\nuse k8s_openapi::api;\n";
        assert_eq!(
            violations_in("egress-agent/src/gate/send.rs", text).len(),
            1
        );
        assert_eq!(
            violations_in("egress-agent/src/pods/directory.rs", text).len(),
            1
        );
        assert_eq!(
            violations_in("egress-agent/src/report/mod.rs", text).len(),
            2
        );
    }

    #[test]
    fn arrows_point_one_way() {
        for (path, text, count) in [
            ("egress-agent/src/pods/mod.rs", "use crate::pods::Pod;", 0),
            (
                "egress-agent/src/pods/mod.rs",
                "use crate::config::Nodes;",
                0,
            ),
            (
                "egress-agent/src/pods/mod.rs",
                "use crate::config::{Cluster, Config};",
                1,
            ),
            (
                "egress-agent/src/pods/mod.rs",
                "use crate::config::NodesToo;",
                1,
            ),
            (
                "egress-agent/src/host/cgroup.rs",
                "use crate::{pods, gate::{a as b, c}};",
                3,
            ),
            ("egress-agent/src/host/cgroup.rs", "pub(crate) fn a() {}", 0),
            (
                "egress-agent/src/host/cgroup.rs",
                "let a = $crate::host::b!();",
                0,
            ),
            (
                "egress-agent/src/report/mod.rs",
                "use crate::pods;\nuse crate::datapath;",
                1,
            ),
            ("egress-agent/src/control.rs", "use crate::{gate, cli};", 1),
            (
                "egress-agent/src/cli/mod.rs",
                "use crate::{gate, pods, cli};",
                0,
            ),
            ("egress-agent/src/main.rs", "use crate::cli;", 0),
            ("tests/src/lab.rs", "use crate::cli;", 0),
        ] {
            assert_eq!(violations_in(path, text).len(), count, "{path}: {text}");
        }
    }

    #[test]
    fn a_dependency_is_reported_at_its_line() {
        let text = "use crate::{\n    pods,\n};\nfn f() { crate::gate::g() }\n";
        assert_eq!(
            violations_in("egress-agent/src/host/cgroup.rs", text),
            [
                "egress-agent/src/host/cgroup.rs:1: host uses pods",
                "egress-agent/src/host/cgroup.rs:4: host uses gate::g"
            ]
        );
    }

    #[test]
    fn unsafe_is_in_listed_files_only() {
        let text = "#![deny(unsafe_code)]\nlet a = unsafe { b() };\n";
        assert_eq!(
            violations_in("egress-agent/src/report/mod.rs", text).len(),
            1
        );
        assert!(violations_in("egress-ebpf/src/main.rs", text).is_empty());
    }

    #[test]
    fn no_program_embeds_the_path_where_it_was_built() {
        for (start, end) in BUILT_IN_PATHS {
            let text = format!("let a = Path::new({start}{end}\"));\n");
            assert_eq!(
                violations_in("tests/src/a.rs", &text),
                [format!("tests/src/a.rs:1: `{start}{end}`")]
            );
        }
        assert!(
            violations_in("tests/src/a.rs", "let a = env!(\"CARGO_PKG_VERSION\");\n").is_empty()
        );
    }

    #[test]
    fn a_file_must_not_be_too_long() {
        assert!(violations_in("xtask/src/a.rs", &"\n".repeat(LONGEST)).is_empty());
        assert_eq!(
            violations_in("xtask/src/a.rs", &"\n".repeat(LONGEST + 1)).len(),
            1
        );
        assert!(violations_in("README.md", &"\n".repeat(LONGEST + 1)).is_empty());
    }

    #[test]
    fn text_names_no_registry_and_no_machine() {
        for (line, count) in [
            (["see ", "crates", ".io"].concat(), 1),
            (["cd ", "/home", "/me"].concat(), 1),
            (["(", "/work", "/x)"].concat(), 1),
            (["target", "/work", "/x"].concat(), 0),
            ("/sys/fs/bpf/egress-agent".to_owned(), 0),
        ] {
            assert_eq!(violations_in("README.md", &line).len(), count, "{line}");
        }
    }
}
