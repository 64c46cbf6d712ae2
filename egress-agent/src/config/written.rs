//! Values as they are written in the file.
//!
//! Serde's own messages name types of Rust. The messages of this module show the value that was found, and what
//! its key takes. `file` adds the key, the line and the column.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{
        DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer,
    },
};

/// What YAML makes of a value. Lists and mappings are named only; their content is not kept.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Written {
    Nothing,
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    List,
    Mapping,
}

/// The value as an error shows it.
impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("nothing"),
            Self::Bool(value) => write!(f, "`{value}`"),
            Self::Integer(value) => write!(f, "`{value}`"),
            Self::Float(value) => write!(f, "`{value}`"),
            Self::Text(value) => write!(f, "`{}`", value.escape_debug()),
            Self::List => f.write_str("a list"),
            Self::Mapping => f.write_str("a mapping"),
        }
    }
}

impl Written {
    /// The text.
    pub(super) fn text(&self) -> Result<&str, String> {
        match self {
            Self::Text(text) => Ok(text),
            Self::Bool(_) | Self::Integer(_) | Self::Float(_) => {
                Err("is not a text: put it in quotes".into())
            }
            Self::Nothing | Self::List | Self::Mapping => Err("is not a text".into()),
        }
    }
}

impl<'de> Deserialize<'de> for Written {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        value(deserializer, |written| Ok(written.clone()))
    }
}

/// Reads a value that is neither a list nor a mapping. An error of `read` is the end of a sentence that begins
/// with the value, such as "is not an absolute path".
pub(super) fn value<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    read: impl FnOnce(&Written) -> Result<T, String>,
) -> Result<T, D::Error> {
    deserializer.deserialize_any(ShapeVisitor(Value(read)))
}

/// Reads a list, and each of its values with `read`. A key with nothing behind it is an empty list.
pub(super) fn list<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    read: impl FnMut(&Written) -> Result<T, String>,
) -> Result<Vec<T>, D::Error> {
    let other =
        |_: &Written| Err("is not a list: expected values in brackets or behind dashes".into());
    list_or(deserializer, read, other)
}

/// The same. `other` reads a value that is not a list.
pub(super) fn list_or<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    read: impl FnMut(&Written) -> Result<T, String>,
    other: impl FnOnce(&Written) -> Result<Vec<T>, String>,
) -> Result<Vec<T>, D::Error> {
    deserializer.deserialize_any(ShapeVisitor(List { read, other }))
}

/// Reads a mapping. A key with nothing behind it, and an empty file, have every default.
pub(super) fn section<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    deserializer.deserialize_any(ShapeVisitor(Section(PhantomData)))
}

/// The form of a key's value: one value, a list or a mapping.
trait Shape<'de>: Sized {
    type Value;

    /// Takes a single value, and refuses [`Written::List`] and [`Written::Mapping`].
    fn single(self, written: &Written) -> Result<Self::Value, String>;

    fn list<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        shown(&Written::List, |written| self.single(written))
    }

    fn mapping<A: MapAccess<'de>>(self, mut mapping: A) -> Result<Self::Value, A::Error> {
        while mapping.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        shown(&Written::Mapping, |written| self.single(written))
    }
}

struct Value<F>(F);

impl<T, F: FnOnce(&Written) -> Result<T, String>> Shape<'_> for Value<F> {
    type Value = T;

    fn single(self, written: &Written) -> Result<T, String> {
        self.0(written)
    }
}

struct List<F, G> {
    read: F,
    other: G,
}

impl<'de, T, F, G> Shape<'de> for List<F, G>
where
    F: FnMut(&Written) -> Result<T, String>,
    G: FnOnce(&Written) -> Result<Vec<T>, String>,
{
    type Value = Vec<T>;

    fn single(self, written: &Written) -> Result<Vec<T>, String> {
        match written {
            Written::Nothing => Ok(Vec::new()),
            other => (self.other)(other),
        }
    }

    fn list<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(Element(&mut self.read))? {
            values.push(value);
        }
        Ok(values)
    }
}

/// One value of a list.
struct Element<'a, F>(&'a mut F);

impl<'de, T, F: FnMut(&Written) -> Result<T, String>> DeserializeSeed<'de> for Element<'_, F> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        value(deserializer, self.0)
    }
}

struct Section<T>(PhantomData<T>);

impl<'de, T: Default + Deserialize<'de>> Shape<'de> for Section<T> {
    type Value = T;

    fn single(self, written: &Written) -> Result<T, String> {
        match written {
            Written::Nothing => Ok(T::default()),
            _ => Err("is not a mapping of keys to values".into()),
        }
    }

    fn mapping<A: MapAccess<'de>>(self, mapping: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(mapping))
    }
}

/// Puts the value in front of its problem.
fn shown<T, E: serde::de::Error>(
    written: &Written,
    read: impl FnOnce(&Written) -> Result<T, String>,
) -> Result<T, E> {
    read(written).map_err(|problem| E::custom(format_args!("{written} {problem}")))
}

struct ShapeVisitor<S>(S);

impl<'de, S: Shape<'de>> ShapeVisitor<S> {
    fn single<E: serde::de::Error>(self, written: &Written) -> Result<S::Value, E> {
        shown(written, |written| self.0.single(written))
    }
}

impl<'de, S: Shape<'de>> Visitor<'de> for ShapeVisitor<S> {
    type Value = S::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<S::Value, E> {
        self.single(&Written::Nothing)
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<S::Value, E> {
        self.single(&Written::Nothing)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<S::Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<S::Value, E> {
        self.single(&Written::Bool(value))
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<S::Value, E> {
        self.single(&Written::Integer(value.into()))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<S::Value, E> {
        self.single(&Written::Integer(value.into()))
    }

    fn visit_i128<E: serde::de::Error>(self, value: i128) -> Result<S::Value, E> {
        self.single(&Written::Integer(value))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<S::Value, E> {
        self.single(&Written::Float(value))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<S::Value, E> {
        self.single(&Written::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<S::Value, A::Error> {
        self.0.list(list)
    }

    fn visit_map<A: MapAccess<'de>>(self, mapping: A) -> Result<S::Value, A::Error> {
        self.0.mapping(mapping)
    }
}
