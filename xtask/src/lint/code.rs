//! Removes comments and the contents of literals from Rust source.

/// `text` without its line comments and the contents of its string and character literals.
/// Line numbers stay the same. Block comments are kept: the sources have none.
pub(super) fn only(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if let Some(length) = raw_string(rest).filter(|_| !code.ends_with(is_word)) {
            length
        } else if c == '"' {
            string(rest)
        } else if c == '\'' {
            character(rest)
        } else {
            0
        };
        let (literal, after) = rest.split_at(skipped);
        code.extend(literal.chars().filter(|c| *c == '\n'));
        rest = after;
        if skipped == 0 {
            code.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    code
}

/// The length of the string literal at the beginning of `text`.
fn string(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => (),
        }
    }
    text.len()
}

/// The length of the raw string literal at the beginning of `text`, if there is one.
fn raw_string(text: &str) -> Option<usize> {
    let hashes = text.strip_prefix('r')?;
    let content = hashes.trim_start_matches('#');
    let hashes = hashes.len() - content.len();
    let content = content.strip_prefix('"')?;
    let end = ["\"", &"#".repeat(hashes)].concat();
    let start = text.len() - content.len();
    Some(
        content
            .find(&end)
            .map_or(text.len(), |at| start + at + end.len()),
    )
}

/// The length of the character literal at the beginning of `text`; 0 for a lifetime.
fn character(text: &str) -> usize {
    let mut characters = text.char_indices().skip(1);
    let Some((_, first)) = characters.next() else {
        return 0;
    };
    if first == '\\' {
        // The escaped character may itself be a quote.
        return text[1..]
            .char_indices()
            .skip(2)
            .find(|(_, c)| *c == '\'')
            .map_or(0, |(at, _)| at + 2);
    }
    characters
        .next()
        .filter(|(_, c)| *c == '\'')
        .map_or(0, |(at, _)| at + 1)
}

/// Whether `c` may be part of a name.
pub(super) fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_removed() {
        for (text, code) in [
            ("a // b\nc", "a \nc"),
            ("a(\"b // c\") // d", "a() "),
            (r#"a("b \" c", d)"#, "a(, d)"),
            ("a(\"b\nc\", d)", "a(\n, d)"),
            ("a(r#\"b \" c\"#, d)", "a(, d)"),
            ("a('\"', b)", "a(, b)"),
            (r"a('\'', b)", "a(, b)"),
            (r"a('\u{1f}', b)", "a(, b)"),
            ("fn a<'b>(c: &'b str)", "fn a<'b>(c: &'b str)"),
            ("for\"a\"", "for"),
        ] {
            assert_eq!(only(text), code, "{text}");
        }
    }
}
