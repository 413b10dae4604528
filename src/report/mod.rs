//! What the agent tells: health probes, metrics and Events.

pub mod events;
pub mod health;
mod lease;
pub mod metrics;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use kube::Client;
use tokio::net::TcpListener;
use tokio::sync::mpsc::UnboundedSender;

use crate::cluster::View;
use crate::cluster::leases::BootId;
use crate::cluster::watch::Cluster;
use crate::names::NodeName;
use crate::plan::{Desired, Verdict};
use crate::report::events::Told;
use crate::report::lease::Holder;
use crate::report::metrics::Counters;
use crate::state::Family;

/// A pass that takes longer hangs: every tool it runs has a deadline far below.
const PASS_HANGS_AFTER: Duration = Duration::from_secs(300);

/// What probes and metrics are answered from. The agent writes it, the servers read it.
#[derive(Debug)]
pub struct Report {
    cluster: Arc<Cluster>,
    /// What has happened so often.
    pub counters: Counters,
    state: Mutex<State>,
    /// Where Events go, with the UID of the Service; none in commands and tests.
    events: Option<UnboundedSender<(Told, String)>>,
    /// The Lease that tells other nodes of this one; none in commands and tests.
    lease: Option<Holder>,
}

#[derive(Debug, Default)]
struct State {
    pass_started: Option<Instant>,
    outcome: Outcome,
    /// The node is programmed, and the other nodes do not know.
    is_untold: bool,
    summary: Summary,
}

/// How the last pass ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Outcome {
    /// There was none yet.
    #[default]
    None,
    /// The kernel is what it should be.
    Done,
    /// It is not; the text says why.
    Failed(String),
}

/// The last plan in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Services by family and by verdict: `Active`, or the reason that blocks them.
    pub services: BTreeMap<(Family, &'static str), usize>,
    /// Egress pods of the cluster by family.
    pub pods: BTreeMap<Family, usize>,
    /// Services and endpoints that are left out.
    pub ignored: usize,
}

impl Summary {
    /// The numbers of a plan.
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
        for (family, state) in &desired.kernel.families {
            let pods = state.firewall.pods.values();
            let egress = pods.filter(|pod| pod.egress).count();
            summary.pods.insert(*family, egress);
        }
        summary
    }
}

impl Report {
    /// A report about an agent that has done nothing yet.
    #[must_use]
    pub fn new(cluster: Arc<Cluster>) -> Report {
        Report {
            cluster,
            counters: Counters::default(),
            state: Mutex::default(),
            events: None,
            lease: None,
        }
    }

    /// The same, with Events sent to a publisher.
    #[must_use]
    pub fn with_events(mut self, events: UnboundedSender<(Told, String)>) -> Report {
        self.events = Some(events);
        self
    }

    /// The same, with a Lease for this node; the task that writes it ends with the report.
    pub fn with_lease(
        mut self,
        client: Client,
        namespace: &str,
        node: NodeName,
        boot: BootId,
    ) -> (Report, impl Future<Output = ()> + Send + use<>) {
        let (holder, writer) = lease::hold(client, namespace, node, boot);
        self.lease = Some(holder);
        (self, writer)
    }

    /// The kernel is what it should be: tells the other nodes, if they do not know yet.
    pub fn programmed(&self, view: &View) {
        if let Some(lease) = &self.lease {
            let is_known = lease.programmed(view);
            self.state().is_untold = !is_known;
        }
    }

    /// Publishes Events about Services of a view.
    pub fn tell(&self, told: Vec<Told>, view: &View) {
        let Some(events) = &self.events else {
            return;
        };
        for event in told {
            if let Some(service) = view.services.get(&event.service) {
                // The publisher lives as long as the agent.
                let _ = events.send((event, service.uid.clone()));
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Fields are replaced one by one: a panic elsewhere leaves no half of one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pass begins.
    pub fn pass_started(&self) {
        self.state().pass_started = Some(Instant::now());
    }

    /// A pass has made a plan.
    pub fn planned(&self, desired: &Desired) {
        self.state().summary = Summary::of(desired);
    }

    /// A pass ends.
    pub fn pass_ended(&self, outcome: Outcome) {
        let mut state = self.state();
        state.pass_started = None;
        state.outcome = outcome;
    }

    /// The watches that have not delivered their first list, with the reasons; `None` when all have.
    #[must_use]
    pub fn not_synced(&self) -> Option<String> {
        let mut text = String::new();
        for (watch, state) in self.cluster.watches() {
            if state.synced {
                continue;
            }
            let separator = if text.is_empty() { "" } else { "; " };
            let why = state.failure.as_deref().unwrap_or("not listed yet");
            // Writing into a String cannot fail.
            let _ = write!(text, "{separator}{watch}: {why}");
        }
        (!text.is_empty()).then_some(text)
    }

    /// Why the agent is not ready; `None` when it is.
    #[must_use]
    pub fn not_ready(&self) -> Option<String> {
        if let Some(watches) = self.not_synced() {
            return Some(format!("waiting for watches: {watches}"));
        }
        let state = self.state();
        match &state.outcome {
            Outcome::Done if state.is_untold => Some(
                "the Lease that tells the other nodes of this one is not written yet".to_owned(),
            ),
            Outcome::None => Some("the kernel has not been programmed yet".to_owned()),
            Outcome::Done => None,
            Outcome::Failed(why) => Some(format!("the last pass failed: {why}")),
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

/// Opens a listening socket; `[::]` falls back to `0.0.0.0` on a node without IPv6.
///
/// # Errors
/// When the address cannot be bound.
pub async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(_) if address.ip().is_unspecified() && address.is_ipv6() => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}

/// Serves until the process ends.
pub async fn serve(listener: TcpListener, router: Router) {
    // axum's server never returns an error.
    let _ = axum::serve(listener, router).await;
}
