//! Links of the documents: each relative link names a file, and each anchor a heading of it.
//!
//! Anchors are those that GitHub makes of headings: lower case, spaces as hyphens, no punctuation.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::workspace;

/// Checks the links of every document.
///
/// # Errors
///
/// Fails when a link leads nowhere, after printing each of them.
pub(super) fn check() -> Result<()> {
    let mut documents = BTreeMap::new();
    read(workspace::root(), "", &mut documents)?;
    let broken = broken_links(&documents, |path| workspace::root().join(path).exists());
    for link in &broken {
        eprintln!("{link}");
    }
    if !broken.is_empty() {
        bail!("{} links of documents lead nowhere", broken.len());
    }
    println!("links: {} documents, nothing to say", documents.len());
    Ok(())
}

/// Reads the documents below `directory`, by their paths in the repository.
fn read(directory: &Path, prefix: &str, documents: &mut BTreeMap<String, String>) -> Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {}", directory.display()))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if super::structure::SKIPPED.contains(&name.as_str()) {
            continue;
        }
        let path = format!("{prefix}{name}");
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            read(&entry.path(), &format!("{path}/"), documents)?;
        } else if Path::new(&name)
            .extension()
            .is_some_and(|ending| ending == "md")
        {
            let text =
                fs::read_to_string(entry.path()).with_context(|| format!("cannot read {path}"))?;
            documents.insert(path, text);
        }
    }
    Ok(())
}

/// Every link that leads nowhere, as `path:line: target`.
fn broken_links(
    documents: &BTreeMap<String, String>,
    exists: impl Fn(&str) -> bool,
) -> Vec<String> {
    let anchors: HashMap<&str, HashSet<String>> = documents
        .iter()
        .map(|(path, text)| (path.as_str(), anchors(text)))
        .collect();
    let mut broken = Vec::new();
    for (path, text) in documents {
        for (line, target) in links(text) {
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let file = if file.is_empty() {
                path.clone()
            } else {
                resolve(path, file)
            };
            let has_anchor = anchor.is_empty()
                || anchors
                    .get(file.as_str())
                    .is_none_or(|anchors| anchors.contains(anchor));
            if !exists(&file) || !has_anchor {
                broken.push(format!("{path}:{line}: {target}"));
            }
        }
    }
    broken
}

/// The relative links in a document, each with its line. Code blocks have none.
fn links(text: &str) -> impl Iterator<Item = (usize, &str)> {
    prose(text).flat_map(|(number, line)| {
        line.split("](").skip(1).filter_map(move |rest| {
            let (target, _) = rest.split_once(')')?;
            let is_relative = !target.contains("://") && !target.starts_with("mailto:");
            is_relative.then_some((number, target))
        })
    })
}

/// The lines outside code blocks, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut in_code = false;
    (1..).zip(text.lines()).filter(move |(_, line)| {
        let is_fence = line.trim_start().starts_with("```");
        in_code ^= is_fence;
        !in_code && !is_fence
    })
}

/// The anchors of a document's headings. Of equal headings, the second one's ends with `-1`.
fn anchors(text: &str) -> HashSet<String> {
    let mut times: HashMap<String, usize> = HashMap::new();
    let headings = prose(text).filter_map(|(_, line)| {
        let title = line.trim_start_matches('#');
        (title.len() < line.len())
            .then(|| title.strip_prefix(' '))
            .flatten()
    });
    headings
        .map(|title| {
            let anchor = anchor(title);
            let before = times.entry(anchor.clone()).or_default();
            *before += 1;
            match *before - 1 {
                0 => anchor,
                n => format!("{anchor}-{n}"),
            }
        })
        .collect()
}

/// The anchor of a heading.
fn anchor(title: &str) -> String {
    let lower = title.trim().to_lowercase();
    lower
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | ' '))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

/// The path in the repository of a link in the document `from`.
fn resolve(from: &str, link: &str) -> String {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in link.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_to_no_file_or_no_heading_is_reported_where_it_is() {
        let documents = BTreeMap::from([
            (
                "README.md".to_owned(),
                "# A title\n[a](docs/a.md#two-words) [b](docs/b.md)\n[c](#a-title) [d](#none)\n\
                 [e](https://example.com/#x)\n```\n[f](nowhere)\n```\n"
                    .to_owned(),
            ),
            (
                "docs/a.md".to_owned(),
                "## Two `words`\n## Two words\n[a](../README.md) [b](a.md#two-words-1) [c](#two)\n"
                    .to_owned(),
            ),
        ]);
        let broken = broken_links(&documents, |path| documents.contains_key(path));
        assert_eq!(
            broken,
            [
                "README.md:2: docs/b.md",
                "README.md:3: #none",
                "docs/a.md:3: #two"
            ]
        );
    }
}
