//! `/metrics`; `docs/metrics.md` describes each metric.
#![expect(
    clippy::cast_precision_loss,
    reason = "metrics are floating-point numbers"
)]

use std::{
    collections::BTreeMap,
    fmt::Error,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use egress_common::records::Counters;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, text::encode},
    registry::{Registry, Unit},
};

use super::{ClusterState, Sources, page::Page, process::Usage, status::mode_of};
use crate::{
    gate::{Direction, Outcome, Stats, Transport},
    report::log,
};

/// The content type of the text.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All metrics as text.
pub(super) fn text(sources: &Arc<Sources>) -> Result<String> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Scrape {
        sources: Arc::clone(sources),
        kernel: sources.counters.counters()?,
    }));
    let mut text = String::new();
    encode(&mut text, &registry).context("cannot write the metrics")?;
    Ok(text)
}

struct Scrape {
    sources: Arc<Sources>,
    kernel: Counters,
}

impl std::fmt::Debug for Scrape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scrape").finish_non_exhaustive()
    }
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder) -> Result<(), Error> {
        let mut page = Page(encoder);
        self.agent(&mut page)?;
        self.pods(&mut page)?;
        dns(&mut page, self.sources.gate.stats())?;
        self.denials(&mut page)?;
        self.packets(&mut page)?;
        self.control(&mut page)?;
        process(&mut page, self.sources.published.began())
    }
}

impl Scrape {
    fn agent(&self, page: &mut Page<'_>) -> Result<(), Error> {
        page.info(
            "egress_agent_build",
            "The agent's version, and how its programs are attached",
            &vec![
                ("version", env!("CARGO_PKG_VERSION").to_owned()),
                ("hook", self.sources.hook.to_owned()),
            ],
        )
    }

    fn pods(&self, page: &mut Page<'_>) -> Result<(), Error> {
        let node = self.sources.published.snapshot();
        let mut modes: BTreeMap<&str, u64> = [
            "audit",
            "enforce",
            "host_network",
            "missing",
            "off",
            "partly_enforced",
            "quarantined",
            "waiting",
        ]
        .map(|mode| (mode, 0))
        .into();
        let mut unreadable = 0;
        for pod in node.pods.values() {
            *modes.entry(mode_of(pod)).or_default() += 1;
            unreadable += u64::from(pod.unreadable);
        }
        page.gauges(
            "egress_agent_pods",
            "Pods of the node by mode or state",
            modes
                .into_iter()
                .map(|(mode, count)| (vec![("mode", mode.to_owned())], count)),
        )?;
        page.gauge(
            "egress_agent_pods_bypassed",
            "Pods whose packets may pass unjudged, because another program processes them first",
            node.pods.values().filter(|pod| pod.is_bypassed()).count() as u64,
        )?;
        page.gauge(
            "egress_agent_pods_unreadable",
            "Pods whose annotations, or their namespace's, cannot be read",
            unreadable,
        )?;
        let stats = self.sources.gate.stats();
        page.gauge(
            "egress_agent_allow_map_entries",
            "Addresses in the allow maps of all pods",
            stats.addresses.get(),
        )?;
        page.gauge(
            "egress_agent_dns_walks_search_lists",
            "Whether the resolvers are known to walk search lists",
            stats.walks_search_lists.get(),
        )?;
        page.gauge(
            "egress_agent_slow_pods",
            "Pods that receive frames slowly, so that threads of their own send to them",
            stats.slow_pods.get(),
        )?;
        let room = f64::from(self.sources.addresses_per_pod);
        page.unit_gauge(
            "egress_agent_allow_map_fill",
            "Part of the fullest pod's allow map that is in use",
            Some(&Unit::Ratios),
            stats.fullest.get() as f64 / room,
        )?;
        page.gauge(
            "egress_agent_flows",
            "Tracked flows of all pods, at the last count of each pod",
            self.sources.published.flows() as u64,
        )
    }

    fn denials(&self, page: &mut Page<'_>) -> Result<(), Error> {
        let namespaces = self.sources.published.namespaces();
        let series = namespaces.iter().flat_map(|(namespace, counts)| {
            let denied = counts.denied().map(|of| ("denied", of));
            let audited = counts.audited().map(|of| ("would_deny", of));
            denied.chain(audited).map(|(event, (reason, count))| {
                let labels = vec![
                    ("event", event.to_owned()),
                    ("namespace", namespace.clone()),
                    ("reason", reason.as_str().to_owned()),
                ];
                (labels, count)
            })
        });
        page.counters(
            "egress_agent_denials",
            "Packets and DNS messages that did not pass (denied), or would not in enforce mode \
             (would_deny)",
            series,
        )?;
        let by_policy = namespaces.iter().flat_map(|(namespace, counts)| {
            counts
                .policies
                .each()
                .flat_map(move |(kind, name, counts)| {
                    let events = ["denied", "would_deny"].into_iter().zip(counts);
                    events
                        .filter(|(_, count)| *count > 0)
                        .map(move |(event, count)| {
                            let labels = vec![
                                ("event", event.to_owned()),
                                ("kind", kind.to_owned()),
                                ("namespace", namespace.clone()),
                                ("policy", name.to_owned()),
                            ];
                            (labels, count)
                        })
                })
        });
        page.counters(
            "egress_agent_policy_denials",
            "Packets that did not pass, or would not in enforce mode, by the policy that decided; `namespace` is the pod's",
            by_policy,
        )?;
        let lost = self.sources.reporter.lost().by_why();
        page.counters(
            "egress_agent_denials_unreported",
            "Denied packets without a line of their own",
            lost.map(|(why, count)| (vec![("why", why.to_owned())], count)),
        )?;
        page.counter(
            "egress_agent_denial_lines_failed",
            "Lines that could not be written to standard output",
            self.sources.reporter.failed_lines(),
        )?;
        page.counter(
            "egress_agent_log_lines_lost",
            "Log lines that could not be written to standard error",
            log::lost_lines(),
        )
    }

    fn packets(&self, page: &mut Page<'_>) -> Result<(), Error> {
        // Destructuring the record makes a missing counter a compile error.
        let Counters {
            passed_packets,
            passed_bytes,
            passed_by_flow,
            denied_packets,
            denied_bytes,
            audited_packets,
            held_questions,
            held_answers,
            held_lost,
            held_limited,
            held_too_long,
            rejects_lost,
            denials_limited,
            denials_lost,
            flows_full,
            openings_evicted,
            flows_evicted,
            no_policy,
            passed_questions,
            passed_answers,
            unread_questions,
            unread_answers,
        } = self.kernel;
        let direction = |direction: &str| vec![("direction", direction.to_owned())];
        page.counters(
            "egress_agent_dns_held",
            "DNS messages that the kernel passed to the agent; over TCP, segments",
            [
                (direction("question"), held_questions),
                (direction("answer"), held_answers),
            ],
        )?;
        page.counters(
            "egress_agent_dns_passed",
            "DNS messages over UDP that the kernel passed without the agent",
            [
                (direction("question"), passed_questions),
                (direction("answer"), passed_answers),
            ],
        )?;
        page.counters(
            "egress_agent_dns_unread",
            "DNS messages that passed unread because no agent ran (`whenAgentDown.undecided: deliver`); over TCP, segments",
            [
                (direction("question"), unread_questions),
                (direction("answer"), unread_answers),
            ],
        )?;
        let why = |why: &str| vec![("why", why.to_owned())];
        page.counters(
            "egress_agent_dns_not_held",
            "DNS messages dropped before the agent saw them",
            [
                (why("ring_full"), held_lost),
                (why("over_pod_share"), held_limited),
                (why("too_long"), held_too_long),
                (
                    why("backlog_full"),
                    self.sources.gate.stats().backlog_full.get(),
                ),
            ],
        )?;
        page.counters(
            "egress_agent_denial_records_lost",
            "Denials for which the kernel made no record",
            [
                (why("over_pod_share"), denials_limited),
                (why("ring_full"), denials_lost),
            ],
        )?;
        let evicted_by_agent = self.sources.published.flows_evicted.get();
        page.counters(
            "egress_agent_flows_evicted",
            "Flows that were evicted in favour of others of their pod",
            [
                (why("not_established"), openings_evicted),
                (why("over_pod_share"), flows_evicted + evicted_by_agent),
            ],
        )?;
        for (name, help, value) in [
            (
                "passed_packets",
                "Packets from pods that passed",
                passed_packets,
            ),
            ("passed_bytes", "Bytes from pods that passed", passed_bytes),
            (
                "passed_by_flow_packets",
                "Packets from pods that passed because their flow was known",
                passed_by_flow,
            ),
            (
                "denied_packets",
                "Packets dropped, in either direction, other than held DNS messages",
                denied_packets,
            ),
            ("denied_bytes", "Bytes of dropped packets", denied_bytes),
            (
                "audited_packets",
                "Packets that passed in audit mode and would have been denied",
                audited_packets,
            ),
            (
                "rejects_lost",
                "Denied packets that were not answered with a rejection",
                rejects_lost,
            ),
            (
                "flows_lost",
                "Flows not remembered: no memory, or too many at the same time",
                flows_full,
            ),
            (
                "destinations_evicted",
                "Evicted destinations: addresses and ports to which a pod has connected",
                self.sources.published.destinations_evicted.get(),
            ),
            (
                "no_policy_packets",
                "Packets on an interface that has no policy yet, or no longer has one",
                no_policy,
            ),
        ] {
            page.counter(&format!("egress_agent_{name}"), help, value)?;
        }
        Ok(())
    }

    fn control(&self, page: &mut Page<'_>) -> Result<(), Error> {
        let published = &self.sources.published;
        page.histogram(
            "egress_agent_reconcile",
            "Duration of reconciles",
            &published.reconciles,
        )?;
        page.unit_gauge(
            "egress_agent_last_reconcile_timestamp",
            "When the last reconcile ended",
            Some(&Unit::Seconds),
            published.last_reconciled().map_or(0.0, unix),
        )?;
        page.counter(
            "egress_agent_hooks_moved",
            "Times that a program was moved back in front of another one",
            published.hooks_moved.get(),
        )?;
        page.counter(
            "egress_agent_stamp_tables_restored",
            "Times that a removed or changed table of nf_tables was restored",
            published.stamp_tables_restored.get(),
        )?;
        page.counter(
            "egress_agent_probes_missed",
            "Probes that did not reach the programs of their interface",
            published.probes_missed.get(),
        )?;
        match &published.snapshot().cluster {
            Some(cluster) => follow(page, cluster),
            None => Ok(()),
        }
    }
}

fn follow(page: &mut Page<'_>, cluster: &ClusterState) -> Result<(), Error> {
    let labelled = |of: &str, count: u64| (vec![("watch", of.to_owned())], count);
    let watches = &cluster.watches;
    page.gauge(
        "egress_agent_api_server_reachable",
        "Whether the API server answers: 1 or 0",
        u64::from(cluster.reachable),
    )?;
    page.counters(
        "egress_agent_watch_restarts",
        "Watches of the API server that started again with a list",
        watches
            .iter()
            .map(|watch| labelled(watch.of, watch.restarts)),
    )?;
    page.counters(
        "egress_agent_watch_errors",
        "Lists and watches of the API server that failed",
        watches.iter().map(|watch| labelled(watch.of, watch.errors)),
    )?;
    page.counter(
        "egress_agent_events",
        "Events written on pods, repetitions included",
        cluster.events_sent,
    )?;
    page.counter(
        "egress_agent_events_lost",
        "Events that exceeded the limit or were rejected by the API server",
        cluster.events_lost,
    )?;
    page.counter(
        "egress_agent_node_reports",
        "Times that the node's report was written",
        cluster.reports_written,
    )?;
    page.counter(
        "egress_agent_node_report_errors",
        "Times that the node's report could not be written",
        cluster.reports_failed,
    )
}

fn dns(page: &mut Page<'_>, stats: &Stats) -> Result<(), Error> {
    let series = stats
        .messages()
        .map(|(transport, direction, outcome, count)| {
            let transport = match transport {
                Transport::Udp => "udp",
                Transport::Tcp => "tcp",
            };
            let direction = match direction {
                Direction::Question => "question",
                Direction::Answer => "answer",
            };
            let outcome = match outcome {
                Outcome::Delivered => "delivered",
                Outcome::Refused => "refused",
                Outcome::Undeliverable => "undeliverable",
            };
            let labels = vec![
                ("direction", direction.to_owned()),
                ("outcome", outcome.to_owned()),
                ("transport", transport.to_owned()),
            ];
            (labels, count)
        });
    page.counters(
        "egress_agent_dns_messages",
        "DNS messages by outcome",
        series,
    )?;
    page.histogram(
        "egress_agent_dns_hold",
        "Time from the kernel taking a DNS message to its delivery or refusal",
        &stats.hold,
    )?;
    for (name, help, value) in [
        (
            "dns_connections_reset",
            "Connections with a resolver that could not be followed",
            stats.connections_lost.get(),
        ),
        (
            "dns_segments_damaged",
            "TCP segments to and from resolvers dropped because they are unreadable",
            stats.segments_damaged.get(),
        ),
        (
            "dns_fragments_late",
            "Fragments from resolvers dropped because their datagram had ended",
            stats.fragments_late.get(),
        ),
        (
            "dns_unclaimed",
            "DNS messages dropped because their pods are gone, or not taken over yet",
            stats.unclaimed.get(),
        ),
        (
            "dns_stale",
            "DNS messages dropped because they were taken while no agent ran",
            stats.stale.get(),
        ),
        (
            "frames_unsent",
            "Frames that could not be put back on an interface",
            stats.unsent.get(),
        ),
        (
            "names_not_kept",
            "Names of allowed addresses that could not be kept for the next agent",
            stats.names_not_kept.get(),
        ),
        (
            "notes_without_room",
            "Addresses that the programs have learned and for which the pod's allow map has no room",
            stats.notes_without_room.get(),
        ),
    ] {
        page.counter(&format!("egress_agent_{name}"), help, value)?;
    }
    Ok(())
}

fn process(page: &mut Page<'_>, began: SystemTime) -> Result<(), Error> {
    let usage = Usage::now();
    page.unit_gauge(
        "process_resident_memory",
        "Memory that the agent uses",
        Some(&Unit::Bytes),
        usage.resident as f64,
    )?;
    page.seconds_counter("process_cpu", "CPU time that the agent has used", usage.cpu)?;
    page.gauge(
        "process_open_fds",
        "Files that the agent has open",
        usage.files,
    )?;
    page.gauge(
        "process_max_fds",
        "Files that the agent may have open",
        usage.files_max,
    )?;
    page.unit_gauge(
        "process_start_time",
        "When the agent was started",
        Some(&Unit::Seconds),
        unix(began),
    )
}

fn unix(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}
