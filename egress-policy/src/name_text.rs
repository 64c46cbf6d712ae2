//! The text of names and wildcards: parses a [`NamePattern`].

use super::{
    parse::{EntryError, Part},
    pattern::{LabelGlobs, NamePattern},
};
use egress_dns::{Name, name::NameError};

/// Parses a name, `*.name`, or a name with `*` as or inside its other labels.
pub(super) fn read_name(part: Part<'_>) -> Result<NamePattern, EntryError> {
    let text = part.text.strip_suffix('.').unwrap_or(part.text);
    let (below, text) = match text.strip_prefix("*.") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let ascii = to_ascii(part, text)?;
    let text = ascii.strip_suffix('.').unwrap_or(&ascii);
    check_labels(part, text)?;
    if text.contains('*') {
        // The length of the fixed bytes must not exceed that of the longest name.
        let fixed = text.replace('*', "");
        let labels = fixed
            .split('.')
            .filter(|label| !label.is_empty())
            .map(str::as_bytes);
        Name::from_labels(labels).map_err(|error| too_long(part, error))?;
        let labels = text.split('.').map(str::as_bytes);
        return Ok(NamePattern::Glob(LabelGlobs::new(below, labels)));
    }
    let name = Name::from_labels(text.split('.').map(str::as_bytes))
        .map_err(|error| too_long(part, error))?;
    Ok(if below {
        NamePattern::Below(name)
    } else {
        NamePattern::Exactly(name)
    })
}

/// Parses a name that is not a wildcard, in the grammar of entries.
///
/// # Errors
///
/// The message continues the text and says what the text is instead.
pub fn exact_name(text: &str) -> Result<Name, String> {
    match read_name(Part { text, at: 0 }) {
        Ok(NamePattern::Exactly(name)) => Ok(name),
        Ok(NamePattern::Below(_) | NamePattern::Glob(_)) => {
            Err("is a wildcard: expected a name".to_owned())
        }
        Err(error) => Err(error.message),
    }
}

/// Parses a name or a wildcard, in the grammar of entries.
///
/// # Errors
///
/// The message continues the text and says what the text is instead.
pub fn name_pattern(text: &str) -> Result<NamePattern, String> {
    read_name(Part { text, at: 0 }).map_err(|error| error.message)
}

fn too_long(part: Part<'_>, error: NameError) -> EntryError {
    part.error(format!("is not a DNS name: {error}"))
}

/// Converts a name that is not ASCII with IDNA (UTS 46).
fn to_ascii(part: Part<'_>, text: &str) -> Result<String, EntryError> {
    if text.is_ascii() {
        return Ok(text.to_owned());
    }
    if text.contains('*') {
        return Err(part.error(
            "has `*` after its beginning and characters outside ASCII: expected the `xn--` form of \
             its labels",
        ));
    }
    let ascii = idna::domain_to_ascii(text)
        .map_err(|_| part.error("is not a DNS name: IDNA (UTS 46) does not allow it"))?;
    // The compatibility mapping converts the full-width form of `*` to `*`.
    if ascii.contains('*') {
        return Err(part.error("is not a DNS name: write `*` in ASCII"));
    }
    Ok(ascii)
}

fn check_labels(part: Part<'_>, text: &str) -> Result<(), EntryError> {
    if let Some(found) = text.chars().find(|c| !is_name_character(*c)) {
        return Err(part.error(format!(
            "is not a DNS name: it has {found:?}; expected letters, digits, `-`, `_`, `*` and dots"
        )));
    }
    let last = text.rsplit('.').next().unwrap_or(text);
    if let Some(name) = text.strip_prefix('.').filter(|name| !name.is_empty()) {
        return Err(part.error(format!(
            "is not a DNS name: it begins with a dot; write `*.{name}` for the names below `{name}`, and \
             `{name}` for the name itself"
        )));
    }
    if text.split('.').any(str::is_empty) {
        return Err(part.error("is not a DNS name: a label is empty"));
    }
    // No top-level domain is a number, and programs parse such a text as an address (WHATWG URL,
    // section 3.5, "ends in a number").
    if looks_numeric(last) {
        return Err(part.error(
            "looks like an IP address but is not one: expected four numbers from 0 to 255, or a CIDR \
             such as `192.0.2.0/24` for a range of addresses",
        ));
    }
    if is_stars(last) {
        let mut others = text.split('.').filter(|label| !is_stars(label)).peekable();
        let is_address = others.peek().is_some() && others.all(looks_numeric);
        return Err(part.error(if is_address {
            "is not an IP address: expected a CIDR such as `192.0.2.0/24` for a range of addresses"
        } else {
            "ends with `*`, which would match every top-level domain: expected one, as in `*.com`"
        }));
    }
    if text
        .split('.')
        .any(|label| is_stars(label) && label.len() > 1)
    {
        return Err(part.error(
            "has a label of several `*`: expected one `*`, which stands for one or more labels at the \
             beginning, as in `*.example.com`, and for one label elsewhere, as in `s3.*.example.com`",
        ));
    }
    Ok(())
}

fn is_name_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '*' | '.')
}

fn is_stars(label: &str) -> bool {
    label.bytes().all(|byte| byte == b'*')
}

/// Digits (and `*`, with at least one digit), or a hexadecimal number.
fn looks_numeric(label: &str) -> bool {
    let decimal = label
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'*')
        && label.bytes().any(|byte| byte.is_ascii_digit());
    let hexadecimal = label
        .strip_prefix("0x")
        .or_else(|| label.strip_prefix("0X"))
        .is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
    decimal || hexadecimal
}
