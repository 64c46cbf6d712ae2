//! The line of an annotation in which something is wrong, with carets under the mistake: for `egress-agent
//! check`.

use unicode_width::UnicodeWidthStr as _;

use super::{
    Annotations,
    error::{Origin, Problem, visible},
};

/// Columns of the line that are shown before what is wrong, and after its beginning.
const AROUND: usize = 60;

/// Columns that a tab takes.
const TAB: &str = "    ";

/// A line of an annotation's value, as a terminal shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excerpt {
    /// The line's number in the annotation's value, counted from 1.
    pub line: usize,
    /// The line. Control characters are escaped, a tab is four spaces, and the ends of a long line are left out.
    pub text: String,
    /// Columns of a terminal before what is wrong.
    pub before: usize,
    /// Columns of a terminal that what is wrong takes, at least one.
    pub width: usize,
}

impl Problem {
    /// The line in which the problem is, of the annotations of the pod or its namespace. `None` if the problem is
    /// not in the value of an annotation.
    pub fn excerpt(&self, pod: &Annotations, namespace: &Annotations) -> Option<Excerpt> {
        let Self::Value { origin, key, what } = self else {
            return None;
        };
        let annotations = match origin {
            Origin::Pod => pod,
            Origin::Namespace => namespace,
            Origin::Policy(_) | Origin::Rule(_) | Origin::Service(_) => return None,
        };
        let value = annotations.value(key)?;
        let line = value.split('\n').nth(what.line.checked_sub(1)?)?;
        let found = what.found.lines().next().unwrap_or_default();
        Some(Excerpt::of(what.line, line, what.column - 1, found))
    }
}

impl Excerpt {
    /// `found` is the text after `skipped` characters of the line. Where something is missing, another text is
    /// found, and one caret shows the place.
    fn of(number: usize, line: &str, skipped: usize, found: &str) -> Self {
        let start = line
            .char_indices()
            .nth(skipped)
            .map_or(line.len(), |(at, _)| at);
        let (before, rest) = line.split_at(start);
        let marked = if rest.starts_with(found) {
            found.len()
        } else {
            0
        };
        let before = last_columns(before);
        let width = first_columns(&rest[..marked]).width().max(1);
        Self {
            line: number,
            before: before.width(),
            text: format!("{before}{}", first_columns(rest)),
            width,
        }
    }
}

/// A character as a terminal shows it.
fn shown(c: char) -> String {
    if c == '\t' {
        TAB.to_owned()
    } else {
        visible([c])
    }
}

/// The beginning of a text, in at most [`AROUND`] columns.
fn first_columns(text: &str) -> String {
    let mut first = String::new();
    let mut columns = 0;
    for piece in text.chars().map(shown) {
        columns += piece.width();
        if columns > AROUND {
            first.push('…');
            break;
        }
        first.push_str(&piece);
    }
    first
}

/// The end of a text, in at most [`AROUND`] columns.
fn last_columns(text: &str) -> String {
    let mut pieces = Vec::new();
    let mut columns = 0;
    for piece in text.chars().rev().map(shown) {
        columns += piece.width();
        if columns > AROUND {
            pieces.push("…".to_owned());
            break;
        }
        pieces.push(piece);
    }
    pieces.reverse();
    pieces.concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Inputs;
    use crate::{compile, reference::settings};

    /// The excerpts of the mistakes in an `allow`, with their carets.
    fn marked(allow: &str) -> Vec<String> {
        let pod = Annotations {
            allow: Some(allow.to_owned()),
            ..Annotations::default()
        };
        let namespace = Annotations::default();
        let error = compile(Inputs::annotations(&pod, &namespace), &settings()).unwrap_err();
        let problems = error.problems().iter();
        let excerpts = problems.map(|problem| problem.excerpt(&pod, &namespace).unwrap());
        excerpts
            .map(
                |Excerpt {
                     line,
                     text,
                     before,
                     width,
                 }| {
                    format!(
                        "{line}|{text}\n |{}{}",
                        " ".repeat(before),
                        "^".repeat(width)
                    )
                },
            )
            .collect()
    }

    #[test]
    fn the_carets_are_under_the_part_that_is_wrong() {
        assert_eq!(
            marked("shop.test:443\n  shop.test:none, 192.0.2.1/33  # a comment"),
            [
                "\
2|  shop.test:none, 192.0.2.1/33  # a comment
 |            ^^^^",
                "\
2|  shop.test:none, 192.0.2.1/33  # a comment
 |                  ^^^^^^^^^^^^",
            ]
        );
    }

    #[test]
    fn tabs_and_wide_characters_do_not_shift_the_carets() {
        assert_eq!(
            marked("\ta.test\tb.test:x"),
            ["1|    a.test    b.test:x\n |                     ^"]
        );
        // Each of the two characters takes two columns.
        assert_eq!(
            marked("日本.test b.test:x"),
            ["1|日本.test b.test:x\n |                 ^"]
        );
        assert_eq!(
            marked("bücher.test b.test:x"),
            ["1|bücher.test b.test:x\n |                   ^"]
        );
    }

    #[test]
    fn characters_that_a_terminal_would_obey_are_escaped() {
        assert_eq!(
            marked("a\u{1b}[2J.test b.test:x"),
            [
                "\
1|a\\u{1b}[2J.test b.test:x
 |^^^^^^^^^^^^^^^",
                "\
1|a\\u{1b}[2J.test b.test:x
 |                       ^",
            ]
        );
    }

    #[test]
    fn a_missing_part_has_one_caret() {
        assert_eq!(marked("a.test: b.test"), ["1|a.test: b.test\n |       ^"]);
    }

    #[test]
    fn a_long_line_is_cut_around_the_problem() {
        let many = "a.test ".repeat(40);
        let excerpt = marked(&format!("{many}b.test:x {many}"));
        let [text, carets] = excerpt[0].split('\n').collect::<Vec<_>>()[..] else {
            panic!("{excerpt:?}");
        };
        assert!(text.starts_with("1|…") && text.ends_with('…'), "{text}");
        assert_eq!(
            carets.chars().count() - 1,
            text.chars().take_while(|&c| c != 'x').count()
        );
    }
}
