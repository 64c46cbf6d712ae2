//! When events may start a reconcile before its second has passed.

pub(in crate::control) mod pace;
