//! The reconcile loop: the one task that owns the kernel.
//!
//! facts → plan → diff → apply, one pass at a time. Events that come during a pass are worked on together in the
//! next one. Doubt means full: at the start, some time after a failure, when others may have changed what is ours and
//! every `RECONCILIATION_INTERVAL` the kernel is read back; in between the agent trusts what it has confirmed.

use std::collections::BTreeSet;
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
use crate::kernel::{Drift, Kernel, StepError, executable};
use crate::lan::Lan;
use crate::pass::{self, Memory, Pass};
use crate::plan::Desired;
use crate::report::log::{self, Change, Log};
use crate::report::{Report, events};
use crate::settings::Settings;
use crate::state::{Observed, Step};

/// How often the node is searched for obstacles that the kernel does not notify of, such as settings of its own.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));

/// What a pass knows of the kernel before it begins.
#[derive(Debug, Default)]
enum Known {
    /// What the kernel holds.
    Confirmed(Observed),
    /// What it holds unless others have changed that.
    Suspected(Observed),
    #[default]
    Nothing,
}

impl Known {
    fn suspect(self) -> Known {
        match self {
            Known::Confirmed(observed) | Known::Suspected(observed) => Known::Suspected(observed),
            Known::Nothing => Known::Nothing,
        }
    }
}

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
    known: Known,
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
        known: Known::Nothing,
    };
    let mut reason = "start";
    let mut backoff = BACKOFF;
    let mut last_full = Instant::now();
    // When the kernel is read back after a failure. Events do not wait for that, and do not bring it forward.
    let mut retry_at = None;
    let mut next_look = Instant::now() + LOOK_INTERVAL;
    loop {
        let full = !matches!(agent.known, Known::Confirmed(_));
        let result = agent.pass(reason).await;
        if full {
            last_full = Instant::now();
            retry_at = None;
        }
        match result {
            Ok(_) if full => backoff.reset(),
            Ok(_) => {}
            Err(_) => retry_at = retry_at.or_else(|| Some(Instant::now() + backoff.pause())),
        }
        let next_full = last_full + settings.reconciliation_interval;
        let next_full = retry_at.map_or(next_full, |at| at.min(next_full));
        let changes_at = result.unwrap_or_default();
        let wake_at = changes_at.map_or(next_full, |at| at.min(next_full));
        // What could not be read at all a moment ago is not read for each event.
        let is_blind = retry_at.is_some() && matches!(agent.known, Known::Nothing);
        loop {
            tokio::select! {
                why = &mut shutdown => return why,
                () = cluster.changed(), if !is_blind => reason = "cluster",
                () = heard(lan), if !is_blind => reason = "lan",
                drift = agent.kernel.drifted(), if !is_blind => {
                    reason = "drift";
                    agent.known = match drift {
                        Drift::Possible => std::mem::take(&mut agent.known).suspect(),
                        Drift::Certain => Known::Nothing,
                    };
                }
                () = tokio::time::sleep_until(wake_at) => {
                    reason = "timer";
                    if Instant::now() >= next_full {
                        agent.known = Known::Nothing;
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
        let Known::Confirmed(confirmed) = &self.known else {
            return false;
        };
        let has_changed = self.kernel.look_again().await != confirmed.surroundings;
        if has_changed {
            // Rules of ours may depend on it.
            self.known = std::mem::take(&mut self.known).suspect();
        }
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
        let mut confirmed = match std::mem::take(&mut self.known) {
            Known::Confirmed(confirmed) => confirmed,
            before => self.observe(before).await?,
        };
        let heard = self.lan.map(Lan::heard).unwrap_or_default();
        let (facts, now) = (self.cluster.facts(), started.into_std());
        let asked = pass::to_look_up(&facts, &confirmed.interfaces);
        let looked_up = self.kernel.look_up(&asked, &mut confirmed).await;
        looked_up.map_err(|error| chain(&error))?;
        let memory = &mut self.memory;
        let pass = memory.plan(facts, &heard, &mut confirmed, self.settings, now);
        self.publish(&pass);
        let steps = diff(&confirmed.state, &pass.desired.kernel);
        for step in &steps {
            debug!(reason, "{step}");
        }
        let failed = self.apply(&steps, &pass).await;
        self.report.counters.steps(&steps, &failed);
        self.memory.keep(pass.desired, failed.is_empty());
        // By their words, because there may be thousands. Of two with the same words both are done again.
        let not_done = failed.iter().map(|failure| failure.step.to_string());
        let not_done: BTreeSet<String> = not_done.collect();
        for step in &steps {
            if not_done.is_empty() || !not_done.contains(&step.to_string()) {
                confirmed.state.apply(step);
            }
        }
        self.known = Known::Confirmed(confirmed);
        if !failed.is_empty() {
            return Err(log::failures(&failed));
        }
        if steps.iter().any(Step::is_change) {
            let ms = started.elapsed().as_millis();
            info!(reason, steps = steps.len(), ms, "kernel changed");
        }
        Ok(pass.changes_at.map(Instant::from_std))
    }

    /// Does what is to be done, and publishes what other nodes may rely on. They wait for a new gateway: it tells them when
    /// it guards and translates, before it looks at connections.
    async fn apply(&mut self, steps: &[Step], pass: &Pass) -> Vec<StepError> {
        let is_connection = |step: &Step| matches!(step, Step::Connection(_));
        let first = steps.iter().position(is_connection);
        let first = first.filter(|_| pass.becomes_gateway(&self.settings.node_name));
        let (guards, rest) = steps.split_at(first.unwrap_or_default());
        let mut failed = Vec::new();
        if !guards.is_empty() {
            failed = self.kernel.apply(guards).await;
            self.publish_programmed(&failed, pass);
        }
        // What was to close and could not, keeps closed what comes after it, as within one call.
        let rest = executable(&rest.iter().collect::<Vec<_>>(), &mut failed);
        let rest: Vec<Step> = rest.into_iter().cloned().collect();
        if !rest.is_empty() {
            failed.extend(self.kernel.apply(&rest).await);
        }
        self.publish_programmed(&failed, pass);
        failed
    }

    fn publish_programmed(&self, failed: &[StepError], pass: &Pass) {
        if !failed.iter().any(is_of_the_gateway) {
            let (desired, view) = (&pass.desired, &pass.view);
            self.report.programmed(desired, pass.is_gateway, view);
        }
    }

    /// Reads the kernel. Where others might have changed something and nothing of ours differs, no connection was opened
    /// under other rules either.
    async fn observe(&mut self, before: Known) -> Result<Observed, String> {
        let observed = self.kernel.observe().await;
        let mut observed = observed.map_err(|error| chain(&error))?;
        self.log.unseen(&observed.unseen);
        if let Known::Suspected(before) = before
            && before.state.families == observed.state.families
        {
            observed.state.doubt = before.state.doubt;
        }
        Ok(observed)
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

/// Whether a failure keeps this node from being a gateway. A failed route to another gateway does not, and what others
/// drop was dropped before.
fn is_of_the_gateway(failure: &StepError) -> bool {
    let is_of_others = matches!(failure.step, Step::Accept(..) | Step::RemoveRemnant(_));
    !is_of_others && !matches!(failure.step, Step::Route(_))
}

#[cfg(test)]
mod tests;
