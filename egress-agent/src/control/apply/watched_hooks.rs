//! The state of one interface's hooks: probes on their way, and attempts to put the programs in front.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use egress_common::records::Probes;

use crate::gate::Probe;

/// How long a probe may be on its way.
const UNDER_WAY: Duration = Duration::from_millis(200);
/// How often an interface's programs are put in front again …
pub(super) const MOVES: usize = 5;
/// … within this time. Otherwise a program that insists on being first would keep the agent busy.
pub(super) const MOVES_WITHIN: Duration = Duration::from_secs(20);

/// The hooks of one interface.
#[derive(Default)]
pub(super) struct Watched {
    pub(super) looked: Option<Instant>,
    /// The last probes, if their arrival has not been checked yet.
    pub(super) sent: Option<Sent>,
    pub(super) missed: u32,
    pub(super) moves: VecDeque<Instant>,
    /// Why the last attempt to put the programs in front failed.
    pub(super) failed: Option<String>,
    /// Whether another program insisted on being first a short time ago.
    pub(super) contested: bool,
    /// Why packets may not pass the programs.
    pub(super) problem: Option<String>,
}

#[derive(Clone, Copy)]
pub(super) struct Sent {
    pub(super) at: Instant,
    pub(super) before: Probes,
    pub(super) probe: Probe,
}

impl Watched {
    /// Compares the probes that have arrived with those that were sent. Returns whether the next may be sent.
    pub(super) fn receive(&mut self, now: Probes) -> bool {
        let Some(Sent { at, before, probe }) = self.sent else {
            return true;
        };
        let v4 = probe.v4.is_none() || now.v4 > before.v4;
        let v6 = probe.v6.is_none() || now.v6 > before.v6;
        if v4 && v6 {
            self.missed = 0;
        } else if at.elapsed() < UNDER_WAY {
            return false;
        } else {
            self.missed = self.missed.saturating_add(1);
        }
        self.sent = None;
        true
    }

    /// Whether the programs may be put in front once more.
    pub(super) fn may_move(&mut self, now: Instant) -> bool {
        self.moves
            .retain(|at| now.duration_since(*at) < MOVES_WITHIN);
        let may = self.moves.len() < MOVES;
        if may {
            self.moves.push_back(now);
        }
        // If putting the programs in front fails, the other program does not insist.
        self.contested |= !may && self.failed.is_none();
        may
    }

    /// Whether another program insisted on being first a short time ago.
    pub(super) fn is_contested(&mut self, now: Instant) -> bool {
        let recently = |at: &Instant| now.duration_since(*at) < MOVES_WITHIN;
        self.contested &= self.moves.iter().any(recently);
        self.contested
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use egress_common::ids::IfIndex;

    use super::*;

    fn sent(ago: Duration) -> Watched {
        let at = Instant::now().checked_sub(ago).unwrap();
        let probe = Probe {
            ifindex: IfIndex::new(7),
            v4: Some(Ipv4Addr::LOCALHOST),
            v6: Some(Ipv6Addr::LOCALHOST),
        };
        Watched {
            sent: Some(Sent {
                at,
                before: Probes { v4: 3, v6: 3 },
                probe,
            }),
            ..Watched::default()
        }
    }

    #[test]
    fn a_probe_counts_as_missed_when_one_family_does_not_come() {
        for (now, missed) in [((4, 4), 0), ((4, 3), 1), ((3, 4), 1), ((3, 3), 1)] {
            let mut watched = sent(UNDER_WAY);
            let (v4, v6) = now;
            assert!(watched.receive(Probes { v4, v6 }));
            assert_eq!(watched.missed, missed, "{now:?}");
        }
    }

    #[test]
    fn a_probe_that_may_still_come_is_waited_for() {
        let mut watched = sent(Duration::ZERO);
        assert!(!watched.receive(Probes { v4: 3, v6: 3 }));
        assert!(watched.receive(Probes { v4: 4, v6: 4 }));
        assert_eq!(watched.missed, 0);
    }

    #[test]
    fn the_programs_are_put_in_front_a_few_times_only_in_a_while() {
        let mut watched = Watched::default();
        let now = Instant::now();
        for _ in 0..MOVES {
            assert!(watched.may_move(now));
        }
        assert!(!watched.is_contested(now));
        assert!(!watched.may_move(now));
        assert!(watched.is_contested(now), "until a while has passed");
        let later = now + MOVES_WITHIN;
        assert!(watched.may_move(later));
        assert!(!Watched::default().is_contested(later));
    }
}
