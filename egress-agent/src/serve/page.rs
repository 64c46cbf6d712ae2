//! Writes metrics in the `OpenMetrics` text format.
#![expect(
    clippy::cast_precision_loss,
    reason = "metrics are floating-point numbers"
)]

use std::fmt::Error;

use prometheus_client::{
    encoding::{DescriptorEncoder, NoLabelSet},
    metrics::MetricType,
    registry::Unit,
};

use crate::report::Histogram;

/// Labels of one series.
pub(super) type Labels = Vec<(&'static str, String)>;

/// The text under construction.
pub(super) struct Page<'a>(pub(super) DescriptorEncoder<'a>);

impl Page<'_> {
    /// A counter; its name gets the suffix `_total`, which is not part of `name`.
    pub(super) fn counter(&mut self, name: &str, help: &str, value: u64) -> Result<(), Error> {
        self.0
            .encode_descriptor(name, help, None, MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    /// A counter with one series for each set of labels.
    pub(super) fn counters(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels, u64)>,
    ) -> Result<(), Error> {
        let mut metric = self
            .0
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in series {
            metric
                .encode_family(&labels)?
                .encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
        Ok(())
    }

    /// A counter of seconds.
    pub(super) fn seconds_counter(
        &mut self,
        name: &str,
        help: &str,
        value: f64,
    ) -> Result<(), Error> {
        self.0
            .encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    /// A gauge.
    pub(super) fn gauge(&mut self, name: &str, help: &str, value: u64) -> Result<(), Error> {
        self.unit_gauge(name, help, None, value as f64)
    }

    /// A gauge with a unit, which becomes the suffix of its name and is not part of `name`.
    pub(super) fn unit_gauge(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        value: f64,
    ) -> Result<(), Error> {
        self.0
            .encode_descriptor(name, help, unit, MetricType::Gauge)?
            .encode_gauge(&value)
    }

    /// A gauge with one series for each set of labels.
    pub(super) fn gauges(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels, u64)>,
    ) -> Result<(), Error> {
        let mut metric = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in series {
            metric.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    /// A histogram of durations; its name gets the suffix `_seconds`, which is not part of `name`.
    pub(super) fn histogram<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        histogram: &Histogram<N>,
    ) -> Result<(), Error> {
        let buckets: Vec<(f64, u64)> = histogram
            .buckets()
            .map(|(bound_ns, count)| (bound_ns.map_or(f64::INFINITY, seconds), count))
            .collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        self.0
            .encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?
            .encode_histogram::<NoLabelSet>(seconds(histogram.sum_ns()), count, &buckets, None)
    }

    /// Facts as labels; the name gets the suffix `_info`, which is not part of `name`.
    pub(super) fn info(&mut self, name: &str, help: &str, labels: &Labels) -> Result<(), Error> {
        self.0
            .encode_descriptor(name, help, None, MetricType::Info)?
            .encode_info(labels)
    }
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}
