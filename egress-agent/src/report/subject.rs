//! The subject of an enforcement, a denial line, a problem or a row of `status`.

use std::fmt;

use crate::pods::NamespacedName;

/// The name of an interface of the host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfName(pub String);

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A pod, or an interface whose pod is not known yet.
///
/// Interfaces come first in the order of subjects, so `status` lists them first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// An interface in quarantine.
    Interface(IfName),
    /// A pod.
    Pod(NamespacedName),
}

impl Subject {
    /// The pod of this name.
    pub fn pod(namespace: &str, name: &str) -> Self {
        Self::Pod(NamespacedName::new(namespace, name))
    }

    /// The quarantined interface of this name.
    pub fn interface(name: &str) -> Self {
        Self::Interface(IfName(name.to_owned()))
    }

    /// The subject that two fields name: see [`Self::fields`].
    pub fn from_fields(namespace: &str, name: &str) -> Self {
        if namespace.is_empty() {
            Self::interface(name)
        } else {
            Self::pod(namespace, name)
        }
    }

    /// The namespace and the name, as the kernel's map `identities`, pins, denial lines and the JSON of `status`
    /// hold them. An interface in quarantine has an empty namespace there; a pod never has.
    pub fn fields(&self) -> (&str, &str) {
        match self {
            Self::Interface(name) => ("", &name.0),
            Self::Pod(pod) => (&pod.namespace, &pod.name),
        }
    }

    /// Whether this is an interface in quarantine.
    pub fn is_interface(&self) -> bool {
        matches!(self, Self::Interface(_))
    }
}

impl From<NamespacedName> for Subject {
    fn from(pod: NamespacedName) -> Self {
        Self::Pod(pod)
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Interface(name) => write!(f, "interface {name}"),
            Self::Pod(pod) => pod.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_survives_the_fields_that_the_kernel_and_lines_have() {
        for subject in [Subject::pod("shop", "cart"), Subject::interface("veth1")] {
            let (namespace, name) = subject.fields();
            assert_eq!(Subject::from_fields(namespace, name), subject);
        }
        assert_eq!(Subject::pod("shop", "cart").to_string(), "shop/cart");
        assert_eq!(Subject::interface("veth1").to_string(), "interface veth1");
    }
}
