//! The interfaces that no program has judged until now. Their pods may have connections from before.

use std::collections::HashSet;

use egress_common::ids::IfIndex;

/// The interfaces that no program has judged until now.
///
/// With quarantine, interfaces are judged from the moment they appear. Then only those count that were there
/// before the agent, and those of pods that were left alone. A new pod has no connections worth keeping, and the
/// sockets that its program shows could open what its policy denies.
#[derive(Clone, Debug)]
pub(in crate::control) struct Unjudged {
    /// Whether new interfaces are in quarantine.
    quarantine: bool,
    /// Interfaces on which an earlier agent left a policy in force.
    left: HashSet<IfIndex>,
    /// Interfaces that are not judged, where new ones are in quarantine.
    free: HashSet<IfIndex>,
    /// Whether the first observation has been made.
    looked: bool,
}

impl Unjudged {
    /// `left` are the interfaces that an earlier agent judged.
    pub(in crate::control) fn new(quarantine: bool, left: HashSet<IfIndex>) -> Self {
        Self {
            quarantine,
            left,
            free: HashSet::new(),
            looked: false,
        }
    }

    /// Records the interfaces that are there now.
    pub(in crate::control) fn look(&mut self, there: &HashSet<IfIndex>) {
        if self.looked {
            self.free.retain(|ifindex| there.contains(ifindex));
        } else {
            self.free.clone_from(there);
        }
        self.looked = true;
    }

    /// Records that these interfaces are not judged from now on.
    pub(in crate::control) fn leave(&mut self, interfaces: &[IfIndex]) {
        self.free.extend(interfaces);
    }

    /// Records that these interfaces are judged from now on.
    pub(in crate::control) fn judge(&mut self, interfaces: &[IfIndex]) {
        for ifindex in interfaces {
            self.free.remove(ifindex);
            self.left.remove(ifindex);
        }
    }

    /// Whether packets have passed this interface without a verdict.
    pub(in crate::control) fn contains(&self, ifindex: IfIndex) -> bool {
        !self.left.contains(&ifindex) && (!self.quarantine || self.free.contains(&ifindex))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: IfIndex = IfIndex::new(1);
    const TWO: IfIndex = IfIndex::new(2);
    const THREE: IfIndex = IfIndex::new(3);

    #[test]
    fn with_quarantine_what_was_there_before_and_what_was_left_alone_is_unjudged() {
        let mut unjudged = Unjudged::new(true, HashSet::from([TWO]));
        unjudged.look(&HashSet::from([ONE, TWO]));
        assert!(unjudged.contains(ONE));
        assert!(!unjudged.contains(TWO), "an earlier agent's");
        unjudged.look(&HashSet::from([ONE, TWO, THREE]));
        assert!(
            !unjudged.contains(THREE),
            "it was closed from its beginning"
        );
        unjudged.leave(&[THREE]);
        assert!(unjudged.contains(THREE));
        unjudged.judge(&[ONE, THREE]);
        assert!(!unjudged.contains(ONE) && !unjudged.contains(THREE));
        unjudged.leave(&[ONE]);
        unjudged.look(&HashSet::from([THREE]));
        assert!(
            !unjudged.contains(ONE),
            "the number may be another's by now"
        );
    }

    #[test]
    fn without_quarantine_all_is_unjudged_but_what_an_earlier_agent_has_left() {
        let mut unjudged = Unjudged::new(false, HashSet::from([TWO]));
        unjudged.look(&HashSet::from([ONE, TWO]));
        assert!(unjudged.contains(ONE) && unjudged.contains(THREE));
        assert!(!unjudged.contains(TWO));
        unjudged.judge(&[TWO]);
        assert!(unjudged.contains(TWO), "its pod may be made anew on it");
    }
}
