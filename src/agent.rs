//! The reconcile loop: the one task that owns the kernel.
//!
//! facts → plan → diff → apply, one pass at a time. Events that come during a pass are worked on together in the
//! next one. Doubt means full: at the start, after a failure, when others may have changed what is ours and every
//! `RECONCILIATION_INTERVAL` the kernel is read back; in between the agent trusts what it has confirmed.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::backoff::Backoff;
use crate::cluster::watch::Cluster;
use crate::diff::diff;
use crate::error::chain;
use crate::kernel::{Kernel, StepError};
use crate::lan::Lan;
use crate::pass::{Memory, Pass};
use crate::plan::Desired;
use crate::report::log::{self, Change, Log};
use crate::report::{Report, events};
use crate::settings::Settings;
use crate::state::{Observed, Step};

/// How often the node is searched for obstacles that the kernel does not notify of, such as settings of its own.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));

#[derive(Debug)]
struct Agent<'a, K> {
    settings: &'a Settings,
    cluster: &'a Cluster,
    report: &'a Report,
    kernel: &'a mut K,
    /// None where announcements are read from objects only.
    lan: Option<&'a Lan>,
    memory: Memory,
    log: Log,
    /// What the kernel holds; `None` when in doubt.
    confirmed: Option<Observed>,
}

/// Keeps the kernel what the cluster says it should be, until `shutdown` is ready, and returns what that says. Leaves
/// the kernel as it is then.
pub async fn run<K: Kernel, T>(
    settings: &Settings,
    cluster: &Arc<Cluster>,
    report: &Report,
    kernel: &mut K,
    lan: Option<&Lan>,
    shutdown: impl Future<Output = T>,
) -> T {
    let mut shutdown = pin!(shutdown);
    // Nothing is changed before every watch has its first list: what is missing from half a view would be
    // removed from the kernel.
    tokio::select! {
        why = &mut shutdown => return why,
        () = cluster.synced() => {}
    }
    let mut agent = Agent {
        settings,
        cluster,
        report,
        kernel,
        lan,
        memory: Memory::new(settings),
        log: Log::default(),
        confirmed: None,
    };
    let mut reason = "start";
    let mut backoff = BACKOFF;
    let mut last_full = Instant::now();
    let mut next_look = Instant::now() + LOOK_INTERVAL;
    loop {
        let full = agent.confirmed.is_none();
        let wake_at = match agent.pass(reason).await {
            Ok(changes_at) => {
                backoff.reset();
                changes_at
            }
            Err(_) => {
                agent.confirmed = None;
                Some(Instant::now() + backoff.pause())
            }
        };
        if full {
            last_full = Instant::now();
        }
        let next_full = last_full + settings.reconciliation_interval;
        let wake_at = wake_at.map_or(next_full, |at| at.min(next_full));
        loop {
            tokio::select! {
                why = &mut shutdown => return why,
                () = cluster.changed() => reason = "cluster",
                () = heard(lan) => reason = "lan",
                () = agent.kernel.drifted() => {
                    reason = "drift";
                    agent.confirmed = None;
                }
                () = tokio::time::sleep_until(wake_at) => {
                    reason = "timer";
                    if Instant::now() >= next_full {
                        agent.confirmed = None;
                    }
                }
                () = tokio::time::sleep_until(next_look) => {
                    next_look = Instant::now() + LOOK_INTERVAL;
                    if !agent.look_again().await {
                        continue;
                    }
                    reason = "surroundings";
                }
            }
            break;
        }
    }
}

/// Waits for news of the LAN; for ever where nobody listens.
async fn heard(lan: Option<&Lan>) {
    match lan {
        Some(lan) => lan.changed().await,
        None => std::future::pending().await,
    }
}

impl<K: Kernel> Agent<'_, K> {
    /// Looks for obstacles; returns whether something has changed.
    async fn look_again(&mut self) -> bool {
        let Some(confirmed) = &mut self.confirmed else {
            return false;
        };
        let found = self.kernel.look_again().await;
        let has_changed = found != confirmed.surroundings;
        confirmed.surroundings = found;
        has_changed
    }

    /// One pass: when the next one is due by itself, or what went wrong.
    async fn pass(&mut self, reason: &'static str) -> Result<Option<Instant>, String> {
        let started = Instant::now();
        self.report.pass_started();
        let result = self.reconcile(reason, started).await;
        if let Err(why) = &result {
            warn!(reason, "pass failed, trying again: {why}");
        }
        let outcome = result.clone().map(drop);
        self.report.pass_ended(outcome, started.elapsed());
        result
    }

    async fn reconcile(
        &mut self,
        reason: &'static str,
        started: Instant,
    ) -> Result<Option<Instant>, String> {
        let mut confirmed = match self.confirmed.take() {
            Some(confirmed) => confirmed,
            None => {
                let observed = self.kernel.observe().await;
                observed.map_err(|error| chain(&error))?
            }
        };
        let heard = self.lan.map(Lan::heard).unwrap_or_default();
        let (facts, now) = (self.cluster.facts(), started.into_std());
        let memory = &mut self.memory;
        let pass = memory.plan(facts, &heard, &mut confirmed, self.settings, now);
        self.publish(&pass);
        let steps = diff(&confirmed.state, &pass.desired.kernel);
        for step in &steps {
            debug!(reason, "{step}");
        }
        let failed = match steps.is_empty() {
            true => Vec::new(),
            false => self.kernel.apply(&steps).await,
        };
        self.report.counters.steps(&steps, &failed);
        if !failed.iter().any(is_of_the_gateway) {
            self.report.programmed(&pass.view);
        }
        self.memory.keep(pass.desired, failed.is_empty());
        if !failed.is_empty() {
            return Err(log::failures(&failed));
        }
        if steps.iter().any(Step::is_change) {
            let ms = started.elapsed().as_millis();
            info!(reason, steps = steps.len(), ms, "kernel changed");
        }
        for step in &steps {
            confirmed.state.apply(step);
        }
        self.confirmed = Some(confirmed);
        Ok(pass.changes_at.map(Instant::from_std))
    }

    /// Tells the LAN listener what is wanted, and publishes what is new.
    fn publish(&mut self, pass: &Pass) {
        let own = &self.settings.node_name;
        let mut news = Vec::new();
        if let Some(lan) = self.lan {
            lan.want(pass.wanted.clone());
            let anomalies = lan.anomalies();
            for notice in self.log.notices(anomalies, &pass.disagreements) {
                warn!("{}", notice.text);
                news.extend(events::of_notice(&notice, &pass.view, own));
            }
        }
        self.report.planned(&pass.desired);
        let nothing = Desired::default();
        let before = self.memory.last().unwrap_or(&nothing);
        let changes = log::changes(before, &pass.desired);
        changes.iter().for_each(Change::log);
        news.extend(events::of_changes(&changes, &pass.view, own));
        self.report.publish(news, &pass.view);
    }
}

/// Whether a failure keeps this node from being a gateway. A failed route to another gateway does not.
fn is_of_the_gateway(failure: &StepError) -> bool {
    !matches!(failure.step, Step::Route(_) | Step::RemoveRemnant(_))
}

#[cfg(test)]
mod tests;
