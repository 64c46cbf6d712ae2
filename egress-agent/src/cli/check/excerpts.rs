//! The line of an annotation, with carets under what is wrong.

use egress_policy::Excerpt;

use super::text::Style;

pub(super) fn excerpt_text(excerpt: &Excerpt, style: Style) -> String {
    let Excerpt {
        line,
        text,
        before,
        width,
    } = excerpt;
    let number = line.to_string();
    let (margin, indent) = (" ".repeat(number.len()), " ".repeat(*before));
    let carets = style.red(&"^".repeat(*width));
    format!("  {number} | {text}\n  {margin} | {indent}{carets}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_carets_have_a_colour() {
        let excerpt = Excerpt {
            line: 10,
            text: "a.test:x".to_owned(),
            before: 7,
            width: 1,
        };
        assert_eq!(
            excerpt_text(&excerpt, Style::Plain),
            "  10 | a.test:x\n     |        ^\n"
        );
        assert_eq!(
            excerpt_text(&excerpt, Style::Colour),
            "  10 | a.test:x\n     |        \u{1b}[1;31m^\u{1b}[0m\n"
        );
    }
}
