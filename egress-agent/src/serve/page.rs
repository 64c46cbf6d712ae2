//! Writing metrics in the `OpenMetrics` text format.
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

/// The text as it grows.
pub(super) struct Page<'a>(pub(super) DescriptorEncoder<'a>);

impl Page<'_> {
    /// A number that only grows; its name ends in `_total`, which is not written here.
    pub(super) fn counter(&mut self, name: &str, help: &str, value: u64) -> Result<(), Error> {
        self.0
            .encode_descriptor(name, help, None, MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    /// As [`Self::counter`], one for each set of labels.
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

    /// Seconds that only grow.
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

    /// A number that is as it is.
    pub(super) fn gauge(&mut self, name: &str, help: &str, value: u64) -> Result<(), Error> {
        self.unit_gauge(name, help, None, value as f64)
    }

    /// As [`Self::gauge`], with a unit that its name ends in and that is not written here.
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

    /// As [`Self::gauge`], one for each set of labels.
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

    /// How often something took how long; its name ends in `_seconds`, which is not written here.
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

    /// Facts in labels; the name ends in `_info`, which is not written here.
    pub(super) fn info(&mut self, name: &str, help: &str, labels: &Labels) -> Result<(), Error> {
        self.0
            .encode_descriptor(name, help, None, MetricType::Info)?
            .encode_info(labels)
    }
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}
