//! Limits how much each pod may keep at the gate of one kind of thing. Each kind has its own unit: bytes for
//! connections, one for each query.
//!
//! Each pod has a part of its own, which no other pod can use. What a pod keeps beyond its own part counts
//! against a common part. Pods that keep much compete for the common part, and never take room from a pod
//! that keeps little.

/// The limits for one kind of thing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// The part that belongs to each pod.
    pub(super) own: usize,
    /// Most that one pod may keep.
    pub(super) pod: usize,
    /// The common part: what all pods together may keep beyond their own parts.
    pub(super) common: usize,
}

/// The amounts that all pods keep of one kind of thing.
#[derive(Debug)]
pub(super) struct Budget {
    limits: Limits,
    /// The amount beyond the pods' own parts.
    common: usize,
}

/// The amount that one pod keeps.
#[derive(Debug, Default)]
pub(super) struct Kept(usize);

impl Kept {
    /// The amount as a number.
    pub(super) fn amount(&self) -> usize {
        self.0
    }
}

impl Budget {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, common: 0 }
    }

    /// Whether a pod may keep `more` in addition.
    pub(super) fn has_room(&self, kept: &Kept, more: usize) -> bool {
        let after = kept.0.saturating_add(more);
        let common = self.common - self.beyond(kept.0) + self.beyond(after);
        after <= self.limits.pod && (after <= self.limits.own || common <= self.limits.common)
    }

    /// Whether a pod keeps more than it may.
    pub(super) fn is_over(&self, kept: &Kept) -> bool {
        !self.has_room(kept, 0)
    }

    /// Adds to what a pod keeps, even beyond the limits.
    pub(super) fn add(&mut self, kept: &mut Kept, more: usize) {
        self.set(kept, kept.0.saturating_add(more));
    }

    /// Subtracts from what a pod keeps.
    pub(super) fn take_back(&mut self, kept: &mut Kept, less: usize) {
        self.set(kept, kept.0.saturating_sub(less));
    }

    fn set(&mut self, kept: &mut Kept, after: usize) {
        self.common = self.common - self.beyond(kept.0) + self.beyond(after);
        kept.0 = after;
    }

    /// The part of this amount that counts against the common part.
    fn beyond(&self, kept: usize) -> usize {
        kept.saturating_sub(self.limits.own)
    }
}

#[cfg(any(test, fuzzing))]
impl Budget {
    /// The used amount of the common part.
    pub(super) fn common(&self) -> usize {
        self.common
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        own: 10,
        pod: 60,
        common: 80,
    };

    #[test]
    fn a_pod_has_its_own_part_whatever_others_keep() {
        let mut budget = Budget::new(LIMITS);
        let mut greedy: [Kept; 2] = std::array::from_fn(|_| Kept::default());
        for kept in &mut greedy {
            while budget.has_room(kept, 1) {
                budget.add(kept, 1);
            }
        }
        assert_eq!(greedy.each_ref().map(Kept::amount), [60, 40]);
        assert_eq!(budget.common(), 80);
        let mut modest = Kept::default();
        assert!(budget.has_room(&modest, 10));
        assert!(!budget.has_room(&modest, 11));
        budget.add(&mut modest, 10);
        assert!(!budget.is_over(&modest));
        budget.add(&mut modest, 1);
        assert!(budget.is_over(&modest));
    }

    #[test]
    fn a_part_that_one_pod_gives_back_is_free_for_others() {
        let mut budget = Budget::new(LIMITS);
        let (mut first, mut second) = (Kept::default(), Kept::default());
        budget.add(&mut first, 60);
        budget.add(&mut second, 40);
        assert!(!budget.has_room(&second, 1));
        budget.take_back(&mut first, 55);
        assert_eq!((first.amount(), budget.common()), (5, 30));
        assert!(budget.has_room(&second, 20));
        assert!(!budget.has_room(&second, 21), "more than one pod may keep");
        budget.take_back(&mut second, 40);
        budget.take_back(&mut first, 5);
        assert_eq!(budget.common(), 0);
    }
}
