//! `/metrics`: counters of what happened, and gauges that are computed when they are scraped.

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
use prometheus_client::registry::{Registry, Unit};

use crate::kernel::StepError;
use crate::lan::{Anomaly, Lan};
use crate::report::Report;
use crate::state::{Executor, Step};

type Labels = Vec<(&'static str, &'static str)>;

/// What is counted since the agent started.
#[derive(Debug, Default)]
pub struct Counters {
    /// Passes by result: `unchanged`, `changed`, `failed`.
    pub passes: Labelled<Labels, Counter>,
    /// Steps by executor.
    pub steps: Labelled<Labels, Counter>,
    /// Steps that failed, by executor.
    pub failed_steps: Labelled<Labels, Counter>,
    /// Time spent in passes.
    pub pass_seconds: Counter<f64, std::sync::atomic::AtomicU64>,
}

impl Counters {
    /// Counts a pass.
    pub fn pass(&self, result: &'static str) {
        let labels = vec![("result", result)];
        self.passes.get_or_create(&labels).inc();
    }

    /// Counts the steps of a pass, and the pass unless one of them `failed`.
    pub fn steps(&self, steps: &[Step], failed: &[StepError]) {
        let by = |step: &Step| vec![("executor", executor(step))];
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

fn executor(step: &Step) -> &'static str {
    match step.executor() {
        Executor::Routes => "routes",
        Executor::Firewall => "firewall",
        Executor::Conntrack => "conntrack",
        Executor::Remnants => "remnants",
    }
}

/// The metrics endpoint.
pub fn router(report: Arc<Report>) -> Router {
    let mut registry = Registry::with_prefix("metaleg");
    let counters = &report.counters;
    registry.register(
        "passes",
        "Passes by result: unchanged, changed or failed",
        counters.passes.clone(),
    );
    registry.register(
        "steps",
        "Kernel changes by executor: routes, firewall, conntrack or remnants",
        counters.steps.clone(),
    );
    registry.register(
        "failed_steps",
        "Kernel changes that failed, by executor",
        counters.failed_steps.clone(),
    );
    registry.register_with_unit(
        "pass",
        "Time spent in passes",
        Unit::Seconds,
        counters.pass_seconds.clone(),
    );
    registry.register_collector(Box::new(Scrape(report)));
    Router::new()
        .route("/metrics", get(metrics))
        .with_state(Arc::new(registry))
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

fn gauge(value: usize) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX))
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let ready = gauge(usize::from(self.0.not_ready().is_none()));
        let kind = ready.metric_type();
        let one = encoder.encode_descriptor("ready", "1 when ready", None, kind)?;
        ready.encode(one)?;

        let summary = self.0.summary();
        let help =
            "Labelled Services by family and verdict: Active, or the reason that blocks them";
        let mut services = encoder.encode_descriptor("services", help, None, kind)?;
        for ((family, verdict), count) in &summary.services {
            let labels = [
                ("family", family.to_string()),
                ("verdict", (*verdict).to_owned()),
            ];
            gauge(*count).encode(services.encode_family(&labels)?)?;
        }
        let help = "Egress pods of the cluster by family";
        let mut pods = encoder.encode_descriptor("pods", help, None, kind)?;
        for (family, count) in &summary.pods {
            let labels = [("family", family.to_string())];
            gauge(*count).encode(pods.encode_family(&labels)?)?;
        }
        let help = "Services and endpoints that are left out";
        let ignored = encoder.encode_descriptor("ignored", help, None, kind)?;
        gauge(summary.ignored).encode(ignored)?;

        let watches = self.0.cluster.watches();
        let help = "1 for each watch that has its first list";
        let mut synced = encoder.encode_descriptor("watch_synced", help, None, kind)?;
        for (watch, state) in &watches {
            let labels = [("watch", watch.to_string())];
            gauge(usize::from(state.synced)).encode(synced.encode_family(&labels)?)?;
        }
        let zero = ConstCounter::new(0_u64);
        let help = "Failures of watches";
        let mut failures =
            encoder.encode_descriptor("watch_failures", help, None, zero.metric_type())?;
        for (watch, state) in &watches {
            let labels = [("watch", watch.to_string())];
            let count = ConstCounter::new(state.failures);
            count.encode(failures.encode_family(&labels)?)?;
        }
        let Some(counts) = self.0.lan.as_deref().map(Lan::anomaly_counts) else {
            return Ok(());
        };
        let help = "Claims on the LAN that are not believed, or contradict each other, by kind";
        let kind = zero.metric_type();
        let mut anomalies =
            encoder.encode_descriptor("announcement_anomalies", help, None, kind)?;
        for kind in Anomaly::KINDS {
            let count = ConstCounter::new(counts.get(kind).copied().unwrap_or_default());
            count.encode(anomalies.encode_family(&[("kind", kind)])?)?;
        }
        Ok(())
    }
}
