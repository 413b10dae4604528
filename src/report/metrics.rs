//! `/metrics`: counters of what happened, and gauges that are computed when they are scraped.

use std::fmt::Error;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family as Labelled;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::{Registry, Unit};

use crate::cluster::index::Watch;
use crate::kernel::StepError;
use crate::lan::{Anomaly, Lan};
use crate::report::Report;
use crate::state::{Family, Step};

type Labels = Vec<(&'static str, &'static str)>;

/// What is counted since the agent started; steps by their executor.
#[derive(Debug, Default)]
pub struct Counters {
    /// Passes by result: `unchanged`, `changed`, `failed`.
    pub passes: Labelled<Labels, Counter>,
    pub steps: Labelled<Labels, Counter>,
    pub failed_steps: Labelled<Labels, Counter>,
    pub pass_seconds: Counter<f64, std::sync::atomic::AtomicU64>,
}

impl Counters {
    pub fn pass(&self, result: &'static str) {
        let labels = vec![("result", result)];
        self.passes.get_or_create(&labels).inc();
    }

    /// Counts the steps of a pass, and the pass unless one of them `failed`.
    pub fn steps(&self, steps: &[Step], failed: &[StepError]) {
        let by = |step: &Step| vec![("executor", step.executor())];
        for step in steps {
            self.steps.get_or_create(&by(step)).inc();
        }
        for failure in failed {
            let label = by(&failure.step);
            self.failed_steps.get_or_create(&label).inc();
        }
        if failed.is_empty() {
            let is_change = steps.iter().any(Step::is_change);
            self.pass(if is_change { "changed" } else { "unchanged" });
        }
    }
}

pub fn router(report: Arc<Report>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .with_state(Arc::new(registry(report)))
}

fn registry(report: Arc<Report>) -> Registry {
    let mut registry = Registry::with_prefix("metaleg");
    let counters = &report.counters;
    let help = "Passes by result: unchanged, changed or failed";
    registry.register("passes", help, counters.passes.clone());
    let help = "Kernel changes by executor: routes, firewall, conntrack, filter or remnants";
    registry.register("steps", help, counters.steps.clone());
    let help = "Kernel changes that failed, by executor";
    registry.register("failed_steps", help, counters.failed_steps.clone());
    let seconds = counters.pass_seconds.clone();
    registry.register_with_unit("pass", "Time spent in passes", Unit::Seconds, seconds);
    registry.register_collector(Box::new(Scrape(report)));
    registry
}

async fn metrics(State(registry): State<Arc<Registry>>) -> impl IntoResponse {
    let mut body = String::new();
    // Writing into a String cannot fail.
    let _ = text::encode(&mut body, &registry);
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, kind)], body)
}

/// What is read when metrics are scraped: the last plan, the watches, anomalies of the LAN.
#[derive(Debug)]
struct Scrape(Arc<Report>);

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let encoder = &mut encoder;
        let (summary, watches) = (self.0.summary(), self.0.cluster.watches());
        let is_ready = usize::from(self.0.not_ready().is_none());
        let help = "Services and endpoints that are ignored";
        for (name, help, value) in [
            ("ready", "1 when ready", is_ready),
            ("ignored", help, summary.ignored),
        ] {
            let one = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            gauge(value).encode(one)?;
        }
        let by = |family: &Family| ("family", family.to_string());
        let help =
            "Labelled Services by family and verdict: Active, or the reason that blocks them";
        let rows = summary.services.iter().map(|((family, verdict), count)| {
            let labels = [by(family), ("verdict", (*verdict).to_owned())];
            (labels, gauge(*count))
        });
        labelled(encoder, "services", help, rows)?;
        let help =
            "Labelled Services that something on this node is in the way of, by family and kind";
        let rows = summary.obstacles.iter().map(|((family, kind), count)| {
            let labels = [by(family), ("kind", (*kind).to_owned())];
            (labels, gauge(*count))
        });
        labelled(encoder, "obstacles", help, rows)?;
        let help = "Egress pods of the cluster by family";
        let rows = summary.pods.iter();
        let rows = rows.map(|(family, count)| ([by(family)], gauge(*count)));
        labelled(encoder, "pods", help, rows)?;

        let of = |watch: &Watch| [("watch", watch.to_string())];
        let help = "1 for each watch that has its first list";
        let rows = watches.iter();
        let rows = rows.map(|(watch, state)| (of(watch), gauge(usize::from(state.synced))));
        labelled(encoder, "watch_synced", help, rows)?;
        let rows = watches.iter();
        let rows = rows.map(|(watch, state)| (of(watch), ConstCounter::new(state.failures)));
        labelled(encoder, "watch_failures", "Failures of watches", rows)?;

        let counts = self.0.lan.as_deref().map(Lan::anomaly_counts);
        let help = "Claims on the LAN that are not believed, or contradict each other, by kind";
        let rows = counts.iter().flat_map(|counts| {
            let count = |kind| counts.get(kind).copied().unwrap_or_default();
            Anomaly::KINDS.map(|kind| ([("kind", kind.to_owned())], ConstCounter::new(count(kind))))
        });
        labelled(encoder, "announcement_anomalies", help, rows)?;
        let (sent, failed) = (self.0.challenges.sent(), self.0.challenges.failures());
        let help = "SYNs by which pods are made to send a challenge ACK after their path changed, and rounds that failed";
        let rows = [("sent", sent), ("failed", failed)];
        let rows = rows.map(|(result, n)| ([("result", result.to_owned())], ConstCounter::new(n)));
        labelled(encoder, "challenges", help, rows)
    }
}

fn gauge(value: usize) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX))
}

/// Metrics of one name that differ by labels.
fn labelled<const N: usize, M: EncodeMetric + TypedMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    rows: impl IntoIterator<Item = ([(&'static str, String); N], M)>,
) -> Result<(), Error> {
    let mut family = encoder.encode_descriptor(name, help, None, M::TYPE)?;
    for (labels, metric) in rows {
        metric.encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::leases::BootId;
    use crate::cluster::watch::Cluster;
    use crate::names::NodeName;
    use crate::plan::Desired;
    use crate::state::Obstacle;

    #[test]
    fn what_is_scraped_says_how_the_agent_is() {
        let node = NodeName("node1".to_owned());
        let cluster = Arc::new(Cluster::default());
        let (report, _) = Report::recorded(cluster, node, BootId("first".to_owned()));
        report.counters.pass("failed");
        let key = crate::names::ObjectKey {
            namespace: "shop".to_owned(),
            name: "a".to_owned(),
        };
        let obstacles = [Obstacle::StrictTracking].into();
        report.planned(&Desired {
            obstacles: [(key, [(Family::V6, obstacles)].into())].into(),
            ..Desired::default()
        });
        let mut body = String::new();
        text::encode(&mut body, &registry(Arc::new(report))).unwrap();
        for line in [
            "metaleg_ready 0",
            "metaleg_ignored 0",
            "metaleg_obstacles{family=\"IPv6\",kind=\"StrictTracking\"} 1",
            "metaleg_passes_total{result=\"failed\"} 1",
            "metaleg_watch_synced{watch=\"Services\"} 0",
            "metaleg_watch_failures_total{watch=\"CiliumNodes\"} 0",
            "metaleg_challenges_total{result=\"sent\"} 0",
        ] {
            assert!(body.lines().any(|l| l == line), "no `{line}` in:\n{body}");
        }
    }
}
