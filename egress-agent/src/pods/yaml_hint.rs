//! Hints for an annotation whose value is not a string in YAML.

use egress_policy::annotations::PREFIX;

/// A hint for the annotation at this line of a document (counted from 1), or at the nearest one before it, if
/// its value is not a string.
pub(super) fn hint(document: &str, line: usize) -> Option<String> {
    let lines: Vec<&str> = document.lines().collect();
    let before = lines.get(..line.min(lines.len()))?;
    let (at, (key, value)) = before
        .iter()
        .enumerate()
        .rev()
        .find_map(|(at, line)| Some((at, annotation(line)?)))?;
    let is_list = |line: &&str| line.trim_start().starts_with("- ");
    match value.chars().next() {
        Some('[') => Some(format!(
            "`[` begins a list there: write the value of {key} as one text, in quotes if it begins with an IPv6 \
             address in brackets"
        )),
        Some(first @ ('*' | '&' | '!' | '{' | '%' | '@' | '`')) => Some(format!(
            "`{first}` at the beginning means something else in YAML: put the value of {key} in quotes"
        )),
        None | Some('#') if lines.get(at + 1).is_some_and(is_list) => Some(format!(
            "{key} is a list: write one text, its entries separated by spaces, or by lines below `|`"
        )),
        _ => None,
    }
}

/// One of the agent's annotations, and its value.
fn annotation(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once(':')?;
    let key = key.trim().trim_matches(['"', '\'']);
    key.starts_with(PREFIX).then_some((key, value.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint_of(value: &str) -> String {
        let document = format!("metadata:\n  annotations:\n    egress-agent.dev/allow:{value}\n");
        hint(&document, document.lines().count()).unwrap_or_default()
    }

    #[test]
    fn a_value_that_is_not_a_string_gets_a_hint() {
        for (value, expected) in [
            (
                " *.github.com",
                "put the value of egress-agent.dev/allow in quotes",
            ),
            (
                " [2001:db8::7]:443",
                "in quotes if it begins with an IPv6 address",
            ),
            (" [a.com, b.com]", "as one text"),
            (
                "\n      - a.com\n      - b.com",
                "egress-agent.dev/allow is a list: write one text",
            ),
        ] {
            assert!(
                hint_of(value).contains(expected),
                "{value}: {}",
                hint_of(value)
            );
        }
    }

    #[test]
    fn a_string_needs_no_hint() {
        for value in [" a.com", " \"*.a.com\"", " |\n      a.com\n      b.com", ""] {
            assert_eq!(hint_of(value), "", "{value}");
        }
        assert_eq!(hint("metadata:\n  name: *a\n", 2), None);
        assert_eq!(hint("", 7), None);
    }
}
