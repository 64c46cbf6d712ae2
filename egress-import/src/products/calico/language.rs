//! Calico's selectors: `app == 'web' && has(tier) && zone in {'a', 'b'}`.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::object::{NAMESPACE_NAME, Subject, require, require_label};

/// The deepest nesting that is read.
const DEEPEST: usize = 32;

/// A selector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Expression {
    /// `all()`
    All,
    /// `global()`
    Global,
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Has(String),
    HasNot(String),
    /// `contains`, `starts with` or `ends with`.
    Text(Test, String, String),
    Not(Box<Expression>),
    And(Vec<Expression>),
    Or(Vec<Expression>),
}

/// A comparison of a part of a label's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Test {
    Contains,
    StartsWith,
    EndsWith,
}

impl Expression {
    /// Reads a selector; an empty text selects everything.
    pub(super) fn read(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Ok(Self::All);
        }
        let wrong = |why: &str| format!("the selector `{text}` cannot be read: {why}");
        let tokens = tokens(text).map_err(|why| wrong(&why))?;
        let mut reader = Reader {
            tokens: &tokens,
            depth: 0,
        };
        let read = reader.or().map_err(|why| wrong(&why))?;
        if reader.tokens.is_empty() {
            Ok(read)
        } else {
            Err(wrong("something follows its end"))
        }
    }

    /// Whether labels fulfil it.
    pub(super) fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        match self {
            Self::All => true,
            Self::Global => false,
            Self::In(key, values) => labels.get(key).is_some_and(|value| values.contains(value)),
            Self::NotIn(key, values) => {
                !labels.get(key).is_some_and(|value| values.contains(value))
            }
            Self::Has(key) => labels.contains_key(key),
            Self::HasNot(key) => !labels.contains_key(key),
            Self::Text(test, key, part) => labels.get(key).is_some_and(|value| match test {
                Test::Contains => value.contains(part),
                Test::StartsWith => value.starts_with(part),
                Test::EndsWith => value.ends_with(part),
            }),
            Self::Not(inner) => !inner.matches(labels),
            Self::And(all) => all.iter().all(|one| one.matches(labels)),
            Self::Or(any) => any.iter().any(|one| one.matches(labels)),
        }
    }

    /// As a selector of pods. Labels that Calico derives from a pod's namespace select namespaces.
    pub(super) fn subject(&self) -> Result<Subject, String> {
        let mut subject = Subject::default();
        self.add_to(&mut subject, &pod_label)?;
        Ok(subject)
    }

    /// As a selector of namespaces.
    pub(super) fn namespaces(&self) -> Result<LabelSelector, String> {
        let mut subject = Subject::default();
        self.add_to(&mut subject, &|key| Ok(namespace_label(key)))?;
        Ok(subject.namespaces)
    }

    fn add_to(&self, subject: &mut Subject, place: &Places) -> Result<(), String> {
        match self.simplified()? {
            Self::And(all) => {
                for one in all {
                    one.add_to(subject, place)?;
                }
                Ok(())
            }
            Self::All => Ok(()),
            Self::In(key, values) => add(subject, place(&key)?, "In", values),
            Self::NotIn(key, values) => add(subject, place(&key)?, "NotIn", values),
            Self::Has(key) => add(subject, place(&key)?, "Exists", Vec::new()),
            Self::HasNot(key) => add(subject, place(&key)?, "DoesNotExist", Vec::new()),
            Self::Global => Err("global() selects no pods".to_owned()),
            Self::Text(..) => Err(
                "a selector of labels compares whole values: `contains`, `starts with` and `ends with` have no \
                 counterpart"
                    .to_owned(),
            ),
            Self::Or(_) => Err(
                "a selector of labels has no `||`, but for values of one label; write one policy for each side"
                    .to_owned(),
            ),
            Self::Not(_) => Err("the negation has no counterpart".to_owned()),
        }
    }

    /// Moves `!` inwards, and joins values of one label.
    fn simplified(&self) -> Result<Self, String> {
        match self {
            Self::Not(inner) => inner.negated()?.simplified(),
            Self::Or(any) => {
                let mut joined: Option<(String, Vec<String>)> = None;
                for one in any {
                    let Self::In(key, values) = one.simplified()? else {
                        return Ok(self.clone());
                    };
                    match &mut joined {
                        None => joined = Some((key, values)),
                        Some((first, all)) if *first == key => all.extend(values),
                        Some(_) => return Ok(self.clone()),
                    }
                }
                Ok(joined.map_or(self.clone(), |(key, values)| Self::In(key, values)))
            }
            other => Ok(other.clone()),
        }
    }

    fn negated(&self) -> Result<Self, String> {
        let all = |list: &[Self]| {
            list.iter()
                .map(Self::negated)
                .collect::<Result<Vec<_>, _>>()
        };
        Ok(match self {
            Self::In(key, values) => Self::NotIn(key.clone(), values.clone()),
            Self::NotIn(key, values) => Self::In(key.clone(), values.clone()),
            Self::Has(key) => Self::HasNot(key.clone()),
            Self::HasNot(key) => Self::Has(key.clone()),
            Self::Not(inner) => (**inner).clone(),
            Self::And(list) => Self::Or(all(list)?),
            Self::Or(list) => Self::And(all(list)?),
            Self::All | Self::Global | Self::Text(..) => {
                return Err("the negation has no counterpart".to_owned());
            }
        })
    }
}

/// Whose label it is, and its name there.
enum Place {
    Pod(String),
    Namespace(String),
    /// Every pod has it, with the value `k8s`.
    Orchestrator,
}

/// Says whose label a key of a selector is.
type Places = dyn Fn(&str) -> Result<Place, String>;

fn pod_label(key: &str) -> Result<Place, String> {
    if let Some(label) = key.strip_prefix("pcns.") {
        return Ok(Place::Namespace(label.to_owned()));
    }
    match key {
        "projectcalico.org/namespace" => Ok(Place::Namespace(NAMESPACE_NAME.to_owned())),
        "projectcalico.org/orchestrator" => Ok(Place::Orchestrator),
        _ if key.starts_with("projectcalico.org/") || key.starts_with("pcsa.") => Err(format!(
            "`{key}` is a label that Calico makes; pods do not have it"
        )),
        _ => Ok(Place::Pod(key.to_owned())),
    }
}

fn namespace_label(key: &str) -> Place {
    Place::Namespace(match key {
        "projectcalico.org/name" => NAMESPACE_NAME.to_owned(),
        _ => key.to_owned(),
    })
}

fn add(
    subject: &mut Subject,
    place: Place,
    operator: &str,
    mut values: Vec<String>,
) -> Result<(), String> {
    let (selector, key) = match place {
        Place::Pod(key) => (&mut subject.pods, key),
        Place::Namespace(key) => (&mut subject.namespaces, key),
        Place::Orchestrator => {
            let is_pod = operator == "Exists"
                || (operator == "In" && values.iter().any(|value| value == "k8s"));
            return if is_pod {
                Ok(())
            } else {
                Err("it selects endpoints that are no pods".to_owned())
            };
        }
    };
    values.dedup();
    match (operator, values.as_slice()) {
        ("In", []) => Err("it selects nothing (`in {}`)".to_owned()),
        ("NotIn", []) => Ok(()),
        ("In", [only]) => {
            require_label(selector, key, only.clone());
            Ok(())
        }
        _ => {
            require(selector, &key, operator, values);
            Ok(())
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    /// A label's key, or a word such as `in`.
    Word(String),
    /// A value in quotes.
    Value(String),
    Symbol(&'static str),
}

const SYMBOLS: [&str; 11] = ["&&", "||", "==", "!=", "!", "(", ")", "{", "}", ",", "="];

fn tokens(text: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        if first == '\'' || first == '"' {
            let inner = &rest[1..];
            let end = inner.find(first).ok_or("a quote is not closed")?;
            tokens.push(Token::Value(inner[..end].to_owned()));
            rest = inner[end + 1..].trim_start();
            continue;
        }
        if let Some(symbol) = SYMBOLS.iter().find(|symbol| rest.starts_with(**symbol)) {
            tokens.push(Token::Symbol(symbol));
            rest = rest[symbol.len()..].trim_start();
            continue;
        }
        let end = rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || "._-/".contains(c)))
            .unwrap_or(rest.len());
        if end == 0 {
            return Err(format!("`{first}` is not expected"));
        }
        tokens.push(Token::Word(rest[..end].to_owned()));
        rest = rest[end..].trim_start();
    }
    Ok(tokens)
}

struct Reader<'a> {
    tokens: &'a [Token],
    depth: usize,
}

impl Reader<'_> {
    fn next(&mut self) -> Result<Token, String> {
        let (first, rest) = self.tokens.split_first().ok_or("it ends too early")?;
        self.tokens = rest;
        Ok(first.clone())
    }

    fn take(&mut self, symbol: &str) -> bool {
        let is_next = matches!(self.tokens.first(), Some(Token::Symbol(next)) if *next == symbol);
        if is_next {
            self.tokens = &self.tokens[1..];
        }
        is_next
    }

    fn take_word(&mut self, word: &str) -> bool {
        let is_next = matches!(self.tokens.first(), Some(Token::Word(next)) if next == word);
        if is_next {
            self.tokens = &self.tokens[1..];
        }
        is_next
    }

    fn expect(&mut self, symbol: &str) -> Result<(), String> {
        if self.take(symbol) {
            Ok(())
        } else {
            Err(format!("`{symbol}` is missing"))
        }
    }

    fn or(&mut self) -> Result<Expression, String> {
        let mut any = vec![self.and()?];
        while self.take("||") {
            any.push(self.and()?);
        }
        Ok(if any.len() == 1 {
            any.remove(0)
        } else {
            Expression::Or(any)
        })
    }

    fn and(&mut self) -> Result<Expression, String> {
        let mut all = vec![self.one()?];
        while self.take("&&") {
            all.push(self.one()?);
        }
        Ok(if all.len() == 1 {
            all.remove(0)
        } else {
            Expression::And(all)
        })
    }

    fn one(&mut self) -> Result<Expression, String> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(format!("it is nested more than {DEEPEST} times"));
        }
        let read = if self.take("!") {
            Expression::Not(Box::new(self.one()?))
        } else if self.take("(") {
            let inner = self.or()?;
            self.expect(")")?;
            inner
        } else {
            self.comparison()?
        };
        self.depth -= 1;
        Ok(read)
    }

    fn comparison(&mut self) -> Result<Expression, String> {
        let Token::Word(key) = self.next()? else {
            return Err("a label is expected".to_owned());
        };
        if self.take("(") {
            let argument = match self.tokens.first() {
                Some(Token::Word(_)) => Some(self.next()?),
                _ => None,
            };
            self.expect(")")?;
            return match (key.as_str(), argument) {
                ("all", None) => Ok(Expression::All),
                ("global", None) => Ok(Expression::Global),
                ("has", Some(Token::Word(label))) => Ok(Expression::Has(label)),
                _ => Err(format!("`{key}(…)` is not known")),
            };
        }
        if self.take("==") || self.take("=") {
            return Ok(Expression::In(key, vec![self.value()?]));
        }
        if self.take("!=") {
            return Ok(Expression::NotIn(key, vec![self.value()?]));
        }
        if self.take_word("in") {
            return Ok(Expression::In(key, self.values()?));
        }
        if self.take_word("not") && self.take_word("in") {
            return Ok(Expression::NotIn(key, self.values()?));
        }
        for (word, second, test) in [
            ("contains", None, Test::Contains),
            ("starts", Some("with"), Test::StartsWith),
            ("ends", Some("with"), Test::EndsWith),
        ] {
            if self.take_word(word) && second.is_none_or(|second| self.take_word(second)) {
                return Ok(Expression::Text(test, key, self.value()?));
            }
        }
        Err(format!("an operator is expected behind `{key}`"))
    }

    fn value(&mut self) -> Result<String, String> {
        match self.next()? {
            Token::Value(value) => Ok(value),
            _ => Err("a value in quotes is expected".to_owned()),
        }
    }

    fn values(&mut self) -> Result<Vec<String>, String> {
        self.expect("{")?;
        let mut values = Vec::new();
        while !self.take("}") {
            values.push(self.value()?);
            if !self.take(",") {
                self.expect("}")?;
                break;
            }
        }
        Ok(values)
    }
}

#[cfg(test)]
#[path = "language_tests.rs"]
mod tests;
