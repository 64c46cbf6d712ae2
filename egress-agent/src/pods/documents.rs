//! Splits a file into YAML documents, so that an error in one does not affect the others.

/// A document of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Document<'a> {
    /// Its text, including its `---` line if it has one.
    pub(super) text: &'a str,
    /// How many lines of the file precede `text`.
    pub(super) lines_before: usize,
    /// The line of the file with its first content, counted from 1.
    pub(super) first_line: usize,
}

/// The documents of a file that have content.
///
/// A line that begins with `---` or `...` and a space or its end is always a boundary, because no scalar may
/// contain it (YAML 1.2.2, section 9.1.2, `c-forbidden`).
pub(super) fn documents(file: &str) -> Vec<Document<'_>> {
    let mut documents = Vec::new();
    let (mut start, mut lines_before, mut first_content) = (0, 0, None);
    let mut at = 0;
    for (number, line) in file.split_inclusive('\n').enumerate() {
        let ends = is_marker(line, "...");
        if first_content.is_some() && (ends || is_marker(line, "---")) {
            documents.extend(document(file, start, at, lines_before, first_content));
            (start, lines_before, first_content) = (at, number, None);
        }
        at += line.len();
        if ends {
            (start, lines_before, first_content) = (at, number + 1, None);
        } else if first_content.is_none() && has_content(line) {
            first_content = Some(number + 1);
        }
    }
    documents.extend(document(file, start, at, lines_before, first_content));
    documents
}

fn document(
    file: &str,
    start: usize,
    end: usize,
    lines_before: usize,
    first_content: Option<usize>,
) -> Option<Document<'_>> {
    Some(Document {
        text: file.get(start..end)?,
        lines_before,
        first_line: first_content?,
    })
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}

/// Whether the line is more than blank, a comment, a directive or a bare marker.
fn has_content(line: &str) -> bool {
    let line = line.trim_start_matches('\u{feff}');
    if line.starts_with('%') {
        return false;
    }
    let rest = if is_marker(line, "---") {
        &line[3..]
    } else {
        line
    };
    let rest = rest.trim();
    !rest.is_empty() && !rest.starts_with('#')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(file: &str) -> Vec<(&str, usize, usize)> {
        documents(file)
            .iter()
            .map(|d| (d.text, d.lines_before, d.first_line))
            .collect()
    }

    #[test]
    fn markers_separate_documents() {
        assert_eq!(
            lines("a: 1\n---\nb: 2\n--- # third\n\nc: 3\n...\n"),
            [
                ("a: 1\n", 0, 1),
                ("---\nb: 2\n", 1, 3),
                ("--- # third\n\nc: 3\n", 3, 6)
            ]
        );
        assert_eq!(
            lines("a: 1\r\n---\r\nb: 2"),
            [("a: 1\r\n", 0, 1), ("---\r\nb: 2", 1, 3)]
        );
        assert_eq!(
            lines("a: 1\n...\nb: 2\n"),
            [("a: 1\n", 0, 1), ("b: 2\n", 2, 3)]
        );
    }

    #[test]
    fn documents_without_content_are_skipped() {
        for file in [
            "",
            "\n\n",
            "---\n",
            "---\n---\n...\n",
            "# a comment\n---\n  # another\n",
        ] {
            assert_eq!(lines(file), [], "{file:?}");
        }
    }

    #[test]
    fn directives_stay_with_their_document() {
        assert_eq!(
            lines("%YAML 1.2\n---\na: 1\n"),
            [("%YAML 1.2\n---\na: 1\n", 0, 3)]
        );
    }

    #[test]
    fn dashes_inside_a_line_or_before_text_are_not_markers() {
        assert_eq!(
            lines("a: |\n  ---\n---b: 1\n"),
            [("a: |\n  ---\n---b: 1\n", 0, 1)]
        );
        assert_eq!(lines("---  {a: 1}\n"), [("---  {a: 1}\n", 0, 1)]);
    }
}
