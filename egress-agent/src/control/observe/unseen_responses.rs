//! Noticing that DNS responses bypass the agent's programs.
//!
//! Cilium with BPF host routing hands packets to a pod with `bpf_redirect_peer`, which puts them into the
//! pod's end of its interface: `to_pod`, on the host's end, never sees them (net/core/filter.c,
//! pod's end of its interface: `to_pod`, on the host's end, never sees them (net/core/filter.c, `skb_do_redirect`).
//! Then responses arrive without being held, the agent learns nothing from them, and

use std::time::{Duration, Instant};

use crate::{
    datapath,
    gate::{Direction, Stats},
};

/// So many queries without any response are no coincidence …
const QUESTIONS: u64 = 20;
/// … if they took at least this long: a stub resolver gives up on a query after 5 seconds.
const AT_LEAST: Duration = Duration::from_secs(10);
/// The names of Cilium's programs begin with this.
const CILIUM: &str = "cil_";

/// The responses that were seen, and the queries since the last of them.
#[derive(Default)]
pub(in crate::control) struct UnseenResponses {
    seen: u64,
    questions: u64,
    since: Option<Instant>,
    problem: Option<&'static str>,
}

impl UnseenResponses {
    /// The problem, if queries go out and no response is seen. `passed` counts the queries and the responses that the
    /// programs passed without the gate.
    pub(in crate::control) fn problem(
        &mut self,
        stats: &Stats,
        passed: (u64, u64),
    ) -> Option<&'static str> {
        let (mut questions, mut seen) = passed;
        for (_, direction, outcome, count) in stats.messages() {
            match direction {
                Direction::Question if outcome.is_delivered() => questions += count,
                Direction::Question => {}
                Direction::Answer => seen += count,
            }
        }
        if seen != self.seen || self.since.is_none() {
            *self = Self {
                seen,
                questions,
                since: Some(Instant::now()),
                problem: None,
            };
        }
        let waited = self.since.is_some_and(|since| since.elapsed() >= AT_LEAST);
        if self.problem.is_none() && waited && questions - self.questions >= QUESTIONS {
            self.problem = Some(if datapath::is_loaded(CILIUM) {
                "queries leave for the resolvers, but no response arrives on the pods' interfaces, so \
                 nothing is learned: Cilium is on this node, and with BPF host routing it delivers past \
                 these interfaces; set Cilium's bpf.hostLegacyRouting to true"
            } else {
                "queries leave for the resolvers, but no response arrives on the pods' interfaces: the \
                 resolvers do not respond, or something delivers past these interfaces"
            });
        }
        self.problem
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::{Outcome, Transport};

    #[test]
    fn queries_without_any_response_are_a_problem_until_a_response_arrives() {
        let stats = Stats::default();
        let mut responses = UnseenResponses::default();
        let ask = |outcome| {
            for _ in 0..QUESTIONS {
                stats.count(Transport::Udp, Direction::Question, outcome);
            }
        };
        assert_eq!(responses.problem(&stats, (0, 0)), None);
        ask(Outcome::Refused);
        let long_ago = Instant::now().checked_sub(2 * AT_LEAST);
        responses.since = long_ago;
        assert_eq!(
            responses.problem(&stats, (0, 0)),
            None,
            "refused ones need no answer"
        );
        ask(Outcome::Delivered);
        assert!(responses.problem(&stats, (0, 0)).is_some());
        assert!(
            responses.problem(&stats, (0, 0)).is_some(),
            "the problem stays"
        );
        stats.count(Transport::Udp, Direction::Answer, Outcome::Delivered);
        assert_eq!(responses.problem(&stats, (0, 0)), None);

        responses.since = long_ago;
        assert!(responses.problem(&stats, (QUESTIONS, 0)).is_some());
        assert_eq!(responses.problem(&stats, (QUESTIONS, 1)), None);
    }
}
