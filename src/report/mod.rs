//! What others learn of the agent: log, Events, metrics, health probes, and the Lease that other agents read.

pub mod events;
pub mod health;
mod lease;
pub mod log;
pub mod metrics;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kube::Client;
use tokio::net::TcpListener;
use tokio::sync::mpsc::{self, UnboundedSender};

use crate::cluster::View;
use crate::cluster::leases::BootId;
use crate::cluster::watch::Cluster;
use crate::kernel::Challenges;
use crate::lan::Lan;
use crate::plan::{Desired, Verdict};
use crate::report::events::ServiceEvent;
use crate::report::lease::Holder;
#[cfg(test)]
pub(crate) use crate::report::lease::Wanted;
use crate::report::metrics::Counters;
use crate::settings::Settings;
use crate::state::{Family, Obstacle, Skeleton};
use crate::tasks::Tasks;

/// A pass that takes longer hangs: every tool that it runs has a deadline far below this.
const PASS_HANGS_AFTER: Duration = Duration::from_secs(300);

/// What probes and metrics are answered from. The agent writes it, the servers read it.
#[derive(Debug)]
pub struct Report {
    cluster: Arc<Cluster>,
    /// None where announcements are read from objects only.
    lan: Option<Arc<Lan>>,
    challenges: Challenges,
    pub counters: Counters,
    state: Mutex<State>,
    /// Where Events go, with the UID of the Service.
    events: UnboundedSender<(ServiceEvent, String)>,
    lease: Holder,
}

#[derive(Debug, Default)]
struct State {
    pass_started: Option<Instant>,
    /// How the last pass ended; none at the start.
    outcome: Option<Result<(), String>>,
    /// The node is programmed, and the Lease that says so is not written yet.
    is_lease_missing: bool,
    summary: Summary,
}

/// The last plan in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Services by family and by verdict: `Active`, or the reason that blocks them.
    pub services: BTreeMap<(Family, &'static str), usize>,
    /// Egress pods of the cluster by family.
    pub pods: BTreeMap<Family, usize>,
    pub ignored: usize,
    /// Services that something on this node is in the way of, by family and kind.
    pub obstacles: BTreeMap<(Family, &'static str), usize>,
}

impl Summary {
    #[must_use]
    pub fn of(desired: &Desired) -> Summary {
        let mut summary = Summary {
            ignored: desired.ignored.len(),
            ..Summary::default()
        };
        for verdicts in desired.services.values() {
            for (family, verdict) in verdicts {
                let label = match verdict {
                    Verdict::Active { .. } => "Active",
                    Verdict::Blocked(reason) => reason.label(),
                    Verdict::Released(_) => "Released",
                };
                *summary.services.entry((*family, label)).or_default() += 1;
            }
        }
        for (family, obstacles) in desired.obstacles.values().flatten() {
            let kinds: BTreeSet<_> = obstacles.iter().map(Obstacle::label).collect();
            for kind in kinds {
                *summary.obstacles.entry((*family, kind)).or_default() += 1;
            }
        }
        for (family, state) in &desired.kernel.families {
            let pods = state.firewall.pods.values();
            let egress = pods.filter(|pod| pod.egress).count();
            summary.pods.insert(*family, egress);
        }
        summary
    }
}

impl Report {
    /// Starts the tasks that publish Events and write this node's Lease.
    #[must_use]
    pub fn start(
        cluster: &Arc<Cluster>,
        lan: Option<Arc<Lan>>,
        challenges: Challenges,
        client: &Client,
        settings: &Settings,
        boot: BootId,
        tasks: &mut Tasks,
    ) -> Arc<Report> {
        let (events, received) = mpsc::unbounded_channel();
        let publisher = events::publish(client.clone(), settings.node_name.clone(), received);
        tasks.spawn("publisher of Events", publisher);
        let (lease, writer) = lease::hold(client.clone(), settings, boot);
        tasks.spawn("writer of the Lease", writer);
        let cluster = cluster.clone();
        Arc::new(Report::new(cluster, lan, challenges, events, lease))
    }

    fn new(
        cluster: Arc<Cluster>,
        lan: Option<Arc<Lan>>,
        challenges: Challenges,
        events: UnboundedSender<(ServiceEvent, String)>,
        lease: Holder,
    ) -> Report {
        Report {
            cluster,
            lan,
            challenges,
            counters: Counters::default(),
            state: Mutex::default(),
            events,
            lease,
        }
    }

    /// A report that nobody reads; the receiver gets what its Lease is to say.
    #[cfg(test)]
    pub(crate) fn recorded(
        cluster: Arc<Cluster>,
        node: crate::names::NodeName,
        boot: BootId,
    ) -> (Report, tokio::sync::watch::Receiver<Option<Wanted>>) {
        let (lease, recorded) = Holder::new(node, boot);
        let (events, _) = mpsc::unbounded_channel();
        (
            Report::new(cluster, None, Challenges::default(), events, lease),
            recorded,
        )
    }

    /// The kernel is what it should be for other nodes' pods, as far as `is_gateway` goes, or holds nothing: publishes it by
    /// the Lease, unless that says so already.
    pub fn programmed(&self, desired: &Desired, is_gateway: bool, view: &View) {
        let mut families = desired.kernel.families.values();
        let programmed = families.any(|family| family.firewall.skeleton != Skeleton::Absent);
        self.state().is_lease_missing = !self.lease.say(programmed, is_gateway, view) && programmed;
    }

    /// Publishes Events about Services of a view.
    pub fn publish(&self, news: Vec<ServiceEvent>, view: &View) {
        for event in news {
            if let Some(service) = view.services.get(&event.service) {
                // The publisher lives as long as the agent.
                let _ = self.events.send((event, service.uid.clone()));
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Fields are replaced one by one: a panic elsewhere leaves no half of one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn pass_started(&self) {
        self.state().pass_started = Some(Instant::now());
    }

    pub fn planned(&self, desired: &Desired) {
        self.state().summary = Summary::of(desired);
    }

    pub fn pass_ended(&self, outcome: Result<(), String>, took: Duration) {
        self.counters.pass_seconds.inc_by(took.as_secs_f64());
        if outcome.is_err() {
            self.counters.pass("failed");
        }
        let mut state = self.state();
        state.pass_started = None;
        state.outcome = Some(outcome);
    }

    /// Why the agent is not ready; `None` when it is.
    #[must_use]
    pub fn not_ready(&self) -> Option<String> {
        if let Some(watches) = self.cluster.not_synced() {
            return Some(format!("waiting for watches: {watches}"));
        }
        let state = self.state();
        match &state.outcome {
            None => Some("the kernel has not been programmed yet".to_owned()),
            Some(Ok(())) => state.is_lease_missing.then(|| {
                "the Lease that tells the other nodes of this one is not written yet".to_owned()
            }),
            Some(Err(why)) => Some(format!("the last pass failed: {why}")),
        }
    }

    /// Why the agent is not alive; `None` when it is.
    #[must_use]
    pub fn not_alive(&self) -> Option<String> {
        let running = self.state().pass_started?.elapsed();
        (running > PASS_HANGS_AFTER)
            .then(|| format!("a pass has been running for {} s", running.as_secs()))
    }

    fn summary(&self) -> Summary {
        self.state().summary.clone()
    }
}

/// Starts the servers of probes and metrics, where the operator wants them.
///
/// # Errors
/// When an address cannot be bound.
pub async fn serve(
    report: &Arc<Report>,
    settings: &Settings,
    tasks: &mut Tasks,
) -> Result<(), ListenError> {
    let health = health::router(report.clone());
    let metrics = metrics::router(report.clone());
    for (setting, address, router) in [
        ("HEALTH_PROBE_BIND_ADDRESS", settings.health_address, health),
        ("METRICS_BIND_ADDRESS", settings.metrics_address, metrics),
    ] {
        let Some(address) = address else {
            continue;
        };
        let listener = listen(address).await;
        let listener = listener.map_err(|error| ListenError(setting, address, error))?;
        tasks.spawn(format!("server of {setting}"), async {
            // axum's server never returns an error.
            let _ = axum::serve(listener, router).await;
        });
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
#[error("{0}: cannot listen on {1}")]
pub struct ListenError(&'static str, SocketAddr, #[source] std::io::Error);

/// Opens a listening socket; `[::]` falls back to `0.0.0.0` on a node without IPv6.
async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(_) if address.ip().is_unspecified() && address.is_ipv6() => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}
