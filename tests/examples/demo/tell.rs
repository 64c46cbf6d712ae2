//! What the demonstration prints.

use crate::Step;

/// Begins a step.
pub(crate) fn title(text: &str) {
    println!("\n── {text}");
}

/// Says something in between.
pub(crate) fn say(text: &str) {
    println!("   {text}");
}

/// Shows a command as typed where it runs.
pub(crate) fn typed(place: &str, command: &str) {
    println!("   {place}$ {command}");
}

/// Shows what a program printed.
pub(crate) fn output(text: &str) {
    for line in text.trim_end().lines() {
        println!("   │ {line}");
    }
}

/// Tells a result that was checked; it is an error when it is not so.
pub(crate) fn check(is_so: bool, what: &str) -> Step {
    if is_so {
        println!("   ✓ {what}");
        Ok(())
    } else {
        println!("   ✗ NOT SO: {what}");
        Err(format!("it is not so that {what}"))
    }
}
