//! Finds the places of annotations and of list items in manifests, for messages.
//!
//! What cannot be found has the place of its object. No decision depends on a place.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::Spanned;

use super::documents::{Document, documents};

/// A place in a file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The file's name.
    pub file: String,
    /// The line, from 1; `None` if the message is about the whole file.
    pub line: Option<usize>,
    /// The column in characters, from 1.
    pub column: Option<usize>,
}

impl Place {
    /// The place that `file`, `file:line` or `file:line:column` names.
    pub fn of_origin(origin: &str) -> Self {
        let split = |text: &str| -> Option<(String, usize)> {
            let (rest, number) = text.rsplit_once(':')?;
            Some((rest.to_owned(), number.parse().ok()?))
        };
        let (file, line, column) = match split(origin) {
            None => (origin.to_owned(), None, None),
            Some((rest, last)) => match split(&rest) {
                None => (rest, Some(last), None),
                Some((file, line)) => (file, Some(line), Some(last)),
            },
        };
        Self { file, line, column }
    }
}

/// `file`, `file:line` or `file:line:column`
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        for number in [self.line, self.column].into_iter().flatten() {
            write!(f, ":{number}")?;
        }
        Ok(())
    }
}

/// The texts of files, to find places in.
#[derive(Debug, Default)]
pub struct Places<'a> {
    texts: BTreeMap<&'a str, &'a str>,
}

/// Where annotations are in a manifest: of the object itself, or of the template of its pods.
const ANNOTATIONS: [&str; 3] = [
    "metadata.annotations",
    "spec.template.metadata.annotations",
    "spec.jobTemplate.spec.template.metadata.annotations",
];

impl<'a> Places<'a> {
    /// Of files with these names and texts.
    pub fn new(texts: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self {
            texts: texts.into_iter().collect(),
        }
    }

    /// The place of this line and column of an annotation's value. `origin` is the place of the pod, the
    /// workload or the namespace; without line and column, the place of the value.
    pub fn annotation(&self, origin: &str, key: &str, at: Option<(usize, usize)>) -> Place {
        let found = self.in_object(origin, |object, lines| {
            let is_template = matches!(
                object.get("kind").and_then(Node::text),
                Some(kind) if kind != "Pod" && kind != "Namespace"
            );
            let (own, templates) = ANNOTATIONS.split_at(1);
            let paths = if is_template { templates } else { own };
            let annotations = paths.iter().find_map(|path| object.at(path));
            let value = annotations?.value.entry(key)?;
            Some(within(value, lines, at))
        });
        found.unwrap_or_else(|| Place::of_origin(origin))
    }

    /// The place of the field that a path such as `spec.allow` or `spec.rules[1].entries` names in an object, or of the item with
    /// this number in that list, from this column on. If the path leads to nothing, the longest part of it that leads
    /// to something has the place.
    pub fn field(&self, origin: &str, path: &str, item: Option<(usize, usize)>) -> Place {
        let found = self.in_object(origin, |object, lines| {
            let is_upstream =
                object.get("kind").and_then(Node::text) == Some("ClusterNetworkPolicy");
            let path = if is_upstream {
                // Its rules are read as rules with entries.
                path.replacen("spec.rules", "spec.egress", 1)
            } else {
                path.to_owned()
            };
            let field = object.longest(&path)?;
            let item = item.and_then(|(number, column)| {
                let item = field.value.item(number.checked_sub(1)?)?;
                Some(within(item, lines, Some((1, column))))
            });
            Some(item.unwrap_or_else(|| within(field, lines, None)))
        });
        found.unwrap_or_else(|| Place::of_origin(origin))
    }

    /// What `find` finds in the object at this place, with the lines of its document.
    fn in_object(
        &self,
        origin: &str,
        find: impl FnOnce(&Node, &[&str]) -> Option<(usize, usize)>,
    ) -> Option<Place> {
        let Place { file, line, .. } = Place::of_origin(origin);
        let (text, line) = (self.texts.get(&*file)?, line?);
        let mut before = documents(text).into_iter().rev();
        let document = before.find(|document| document.first_line <= line)?;
        let Document {
            text, lines_before, ..
        } = document;
        let root: Spanned<Node> = serde_saphyr::from_str(text).ok()?;
        let is_object = |item: &&Spanned<Node>| lines_before + line_of(item) == line;
        let items = root.value.get("items").map(|items| match items {
            Node::List(items) => items.as_slice(),
            _ => &[],
        });
        let object = match items {
            Some(items) => &items.iter().find(is_object)?.value,
            None => &root.value,
        };
        let lines: Vec<&str> = text.lines().collect();
        let (line, column) = find(object, &lines)?;
        Some(Place {
            file,
            line: Some(lines_before + line),
            column: Some(column),
        })
    }
}

fn line_of(node: &Spanned<Node>) -> usize {
    usize::try_from(node.defined.line()).unwrap_or_default()
}

/// The line and column in the document of this line and column of a scalar.
fn within(scalar: &Spanned<Node>, lines: &[&str], at: Option<(usize, usize)>) -> (usize, usize) {
    let start = line_of(scalar);
    let first = usize::try_from(scalar.defined.column())
        .unwrap_or_default()
        .max(1);
    let whole = (start, first);
    let Some((line, column)) = at else {
        return whole;
    };
    let source = |line: usize| line.checked_sub(1).and_then(|at| lines.get(at)).copied();
    let Some(beginning) = source(start).and_then(|text| text.chars().nth(first - 1)) else {
        return whole;
    };
    let found = match (beginning, block_header(start, source)) {
        (_, Some((header, '|'))) => (header + line, first + column - 1),
        ('"' | '\'', None) if line == 1 => (start, first + column),
        (_, None) if line == 1 => (start, first + column - 1),
        _ => whole,
    };
    // A scalar with escapes or folded lines has other columns than its source.
    let has_escapes = beginning == '"' && source(start).is_some_and(|text| text.contains('\\'));
    let is_in_file = source(found.0).is_some_and(|text| found.1 <= text.chars().count() + 1);
    if has_escapes || !is_in_file {
        whole
    } else {
        found
    }
}

/// The line of the header of a block scalar whose first text is in this line, with its sign.
fn block_header<'a>(
    start: usize,
    source: impl Fn(usize) -> Option<&'a str>,
) -> Option<(usize, char)> {
    let mut above = (1..start).rev().map(|line| (line, source(line)));
    let (line, text) = above.find_map(|(line, text)| {
        let text = text?.trim();
        (!text.is_empty()).then_some((line, text))
    })?;
    let text = text.split(" #").next().unwrap_or(text).trim_end();
    let header = text.rsplit([' ', '\t']).next()?;
    let sign = header
        .chars()
        .next()
        .filter(|sign| ['|', '>'].contains(sign))?;
    let is_header = header[1..]
        .chars()
        .all(|c| c == '+' || c == '-' || c.is_ascii_digit());
    is_header.then_some((line, sign))
}

/// A YAML node, with the places of its contents.
#[derive(Debug)]
enum Node {
    Map(Vec<(String, Spanned<Node>)>),
    List(Vec<Spanned<Node>>),
    Text(String),
    Other,
}

impl Node {
    fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    fn entry(&self, key: &str) -> Option<&Spanned<Self>> {
        match self {
            Self::Map(entries) => entries
                .iter()
                .find(|(known, _)| known == key)
                .map(|(_, value)| value),
            _ => None,
        }
    }

    fn get(&self, key: &str) -> Option<&Self> {
        self.entry(key).map(|entry| &entry.value)
    }

    fn item(&self, index: usize) -> Option<&Spanned<Self>> {
        match self {
            Self::List(items) => items.get(index),
            _ => None,
        }
    }

    /// The node at a path of keys.
    fn at(&self, path: &str) -> Option<&Spanned<Self>> {
        let mut keys = path.split('.');
        let first = self.entry(keys.next()?)?;
        keys.try_fold(first, |node, key| node.value.entry(key))
    }

    /// The node at the longest part of a path of keys and indices that leads to one.
    fn longest(&self, path: &str) -> Option<&Spanned<Self>> {
        let mut found = None;
        let mut at = self;
        for part in path.split('.') {
            let (key, indices) = part.split_once('[').unwrap_or((part, ""));
            let Some(entry) = at.entry(key) else { break };
            (found, at) = (Some(entry), &entry.value);
            let index = indices.trim_end_matches(']').parse::<usize>();
            if let Some(item) = index.ok().and_then(|index| entry.value.item(index)) {
                (found, at) = (Some(item), &item.value);
            }
        }
        found
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML node")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Node::Map(entries))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Node::List(list))
    }

    fn visit_str<E>(self, text: &str) -> Result<Node, E> {
        Ok(Node::Text(text.to_owned()))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Other)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "\
# A comment.
---
apiVersion: apps/v1
kind: Deployment
metadata:
  annotations: {egress-agent.dev/allow: not-this}
spec:
  template:
    metadata:
      annotations:
        egress-agent.dev/allow: |
          a.test:443

          b.test:x
        egress-agent.dev/deny: 'c.test d.test:1'
        egress-agent.dev/resolve: e.test f.test
        folded: >-
          g.test
          h.test
        egress-agent.dev/mode: \"au\\x64it\"
---
apiVersion: v1
kind: List
items:
- {kind: EgressPolicy, spec: {allow: [a.test, 'b.test:x']}}
- kind: ClusterNetworkPolicy
  spec:
    egress:
    - action: Deny
    - action: Allow
      to: []
";

    fn places() -> Places<'static> {
        Places::new([("a:b.yaml", FILE)])
    }

    #[track_caller]
    fn character(place: &Place) -> String {
        assert_eq!(place.file, "a:b.yaml");
        let line = FILE.lines().nth(place.line.unwrap() - 1).unwrap();
        line.chars()
            .skip(place.column.unwrap() - 1)
            .take(6)
            .collect()
    }

    #[test]
    fn a_part_of_an_annotation_has_its_place_in_the_file() {
        let at = |key: &str, line, column| {
            let key = format!("egress-agent.dev/{key}");
            let found = places().annotation("a:b.yaml:3", &key, Some((line, column)));
            character(&found)
        };
        assert_eq!(at("allow", 1, 1), "a.test");
        assert_eq!(at("allow", 3, 8), "x");
        assert_eq!(at("deny", 1, 8), "d.test");
        assert_eq!(at("resolve", 1, 8), "f.test");
        let folded = places().annotation("a:b.yaml:3", "folded", Some((1, 8)));
        assert_eq!(character(&folded), "g.test");
        // With an escape, only the beginning of the value is certain.
        assert_eq!(at("mode", 1, 3), "\"au\\x6");
        // A missing key has the place of its object.
        let found = places().annotation("a:b.yaml:3", "egress-agent.dev/x", None);
        assert_eq!(found.to_string(), "a:b.yaml:3");
    }

    #[test]
    fn an_item_of_a_list_has_its_place_in_the_file() {
        let field = |line, path, item| {
            let found = places().field(&format!("a:b.yaml:{line}"), path, item);
            character(&found)
        };
        assert_eq!(field(25, "spec.allow", Some((1, 1))), "a.test");
        assert_eq!(field(25, "spec.allow", Some((2, 8))), "x']}}");
        assert_eq!(field(25, "spec.allow.x", None), "[a.tes");
        assert_eq!(field(26, "spec.rules[1].entries", Some((1, 1))), "action");
    }

    #[test]
    fn a_place_is_read_back_as_it_is_written() {
        for text in ["a.yaml", "a.yaml:3", "a:b.yaml:3:4", "standard input:1"] {
            assert_eq!(Place::of_origin(text).to_string(), text);
        }
        assert_eq!(Place::of_origin("a:b.yaml:3").line, Some(3));
    }
}
