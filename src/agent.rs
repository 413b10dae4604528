//! The reconcile loop: the one task that owns the kernel.
//!
//! view → plan → diff → apply, one pass at a time. Events that come during a pass are worked on together in the
//! next one. Doubt means full: at the start, after a failure, when others may have changed what is ours and every
//! `RECONCILIATION_INTERVAL` the kernel is read back; in between the agent trusts what it has confirmed.

mod lan;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::agent::lan::LanSide;
use crate::announcers::{Announcers, Resolved};
use crate::cluster::View;
use crate::cluster::watch::Cluster;
use crate::diff::diff;
use crate::error::chain;
use crate::kernel::{self, Kernel, StepError};
use crate::lan::Lan;
use crate::names::{Interface, NodeName};
use crate::plan::slots::Slots;
use crate::plan::{Desired, plan};
use crate::report::{Outcome, Report, events};
use crate::settings::Settings;
use crate::state::{Family, KernelState, RuleAction, Step, TableId};

/// First pause after a failed pass; it doubles up to [`LONGEST_PAUSE`].
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause after a failed pass.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How many failed steps are told one by one.
const TOLD_FAILURES: usize = 10;

/// The agent's state between passes.
#[derive(Debug)]
struct Agent<'a, K> {
    settings: &'a Settings,
    cluster: &'a Cluster,
    report: &'a Report,
    kernel: &'a mut K,
    lan: LanSide<'a>,
    announcers: Announcers,
    /// What the kernel holds as far as confirmed; `None` when in doubt.
    confirmed: Option<Confirmed>,
    /// The plan of the last pass.
    last: Option<Desired>,
    /// VIPs whose connections are to be taken up anew where this node is their gateway.
    interrupted: BTreeSet<IpAddr>,
    /// Rules of others that were told of.
    collisions: BTreeSet<String>,
}

#[derive(Debug)]
struct Confirmed {
    state: KernelState,
    links: Vec<Interface>,
    /// Tables that others use.
    occupied: BTreeSet<(Family, TableId)>,
}

/// How a pass went.
#[derive(Debug)]
struct Pass {
    failed: Vec<StepError>,
    /// When the view changes by itself.
    grace_ends: Option<Instant>,
}

/// Keeps the kernel what the cluster says it should be, until `shutdown` is ready. Leaves it as it is then.
pub async fn run<K: Kernel>(
    settings: &Settings,
    cluster: &Arc<Cluster>,
    report: &Report,
    kernel: &mut K,
    wire: Option<&Lan>,
    shutdown: impl Future<Output = ()>,
) {
    let mut shutdown = pin!(shutdown);
    // Nothing is changed before every watch has its first list: what is missing from half a view would be
    // removed from the kernel.
    while report.not_synced().is_some() {
        tokio::select! {
            () = &mut shutdown => return,
            () = cluster.changed() => {}
        }
    }
    let mut agent = Agent {
        settings,
        cluster,
        report,
        kernel,
        lan: LanSide::new(settings, report, wire),
        announcers: Announcers::new(settings.node_name.clone(), settings.grace),
        confirmed: None,
        last: None,
        interrupted: BTreeSet::new(),
        collisions: BTreeSet::new(),
    };
    let mut reason = "start";
    let mut pause = SHORTEST_PAUSE;
    let mut last_full = Instant::now();
    loop {
        let full = agent.confirmed.is_none();
        let wake_at = match agent.pass(reason).await {
            Ok(pass) if pass.failed.is_empty() => {
                pause = SHORTEST_PAUSE;
                pass.grace_ends
            }
            _ => {
                agent.confirmed = None;
                let retry = Instant::now() + pause;
                pause = LONGEST_PAUSE.min(pause * 2);
                Some(retry)
            }
        };
        if full {
            last_full = Instant::now();
        }
        let next_full = last_full + settings.reconciliation_interval;
        let wake_at = wake_at.map_or(next_full, |at| at.min(next_full));
        tokio::select! {
            () = &mut shutdown => return,
            () = cluster.changed() => reason = "cluster",
            () = agent.lan.changed() => reason = "wire",
            () = agent.kernel.drifted() => {
                reason = "drifted";
                agent.confirmed = None;
            }
            () = tokio::time::sleep_until(wake_at) => {
                reason = "timer";
                if Instant::now() >= next_full {
                    agent.confirmed = None;
                }
            }
        }
    }
}

impl<K: Kernel> Agent<'_, K> {
    async fn pass(&mut self, reason: &'static str) -> Result<Pass, kernel::Error> {
        let started = Instant::now();
        self.report.pass_started();
        let result = self.reconcile(reason, started).await;
        let counters = &self.report.counters;
        counters
            .pass_seconds
            .inc_by(started.elapsed().as_secs_f64());
        let outcome = match &result {
            Ok(pass) if pass.failed.is_empty() => Outcome::Done,
            Ok(pass) => Outcome::Failed(told(&pass.failed)),
            Err(error) => Outcome::Failed(chain(error)),
        };
        if let Outcome::Failed(why) = &outcome {
            counters
                .passes
                .get_or_create(&vec![("result", "failed")])
                .inc();
            warn!(reason, "pass failed, trying again: {why}");
        }
        self.report.pass_ended(outcome);
        result
    }

    async fn reconcile(
        &mut self,
        reason: &'static str,
        started: Instant,
    ) -> Result<Pass, kernel::Error> {
        let mut confirmed = match self.confirmed.take() {
            Some(confirmed) => confirmed,
            None => self.observe().await?,
        };
        if self.last.is_none() {
            self.adopt(&confirmed.state, started);
        }
        let (mut view, resolved) = self.look(started);
        view.links.clone_from(&confirmed.links);
        self.lan.listen(&view, &resolved);
        self.interrupted.extend(&resolved.interrupted);
        if self.last.is_none() {
            // Nobody listened before.
            self.interrupted.extend(resolved.announcers.keys());
        }
        confirmed.state.interrupt(&self.interrupted);
        let families: BTreeSet<Family> = confirmed.state.families.keys().copied().collect();
        let slots = match &self.last {
            Some(last) => last.slots.clone(),
            None => Slots::adopt(&confirmed.state, self.settings),
        };
        let slots = slots.avoiding(confirmed.occupied.clone());
        let desired = plan(&view, self.settings, &families, &slots);
        self.report.planned(&desired);
        tell(self.last.as_ref(), &desired);
        let nothing = Desired::default();
        let before = self.last.as_ref().unwrap_or(&nothing);
        let own = &self.settings.node_name;
        self.report
            .tell(events::changes(before, &desired, &view, own), &view);

        let steps = diff(&confirmed.state, &desired.kernel);
        for step in &steps {
            debug!(reason, "{step}");
        }
        let failed = if steps.is_empty() {
            Vec::new()
        } else {
            self.kernel.apply(&steps).await
        };
        self.count(&steps, &failed);
        if failed.is_empty() {
            if steps.iter().any(Step::is_change) {
                let ms = started.elapsed().as_millis();
                info!(reason, steps = steps.len(), ms, "kernel changed");
            }
            for step in &steps {
                confirmed.state.apply(step);
            }
            self.confirmed = Some(confirmed);
            self.interrupted.clear();
        }
        // A way to another gateway that cannot be had here makes this one no worse.
        let matters =
            |failure: &StepError| !matches!(failure.step, Step::Route(_) | Step::RemoveRemnant(_));
        if !failed.iter().any(matters) {
            self.report.programmed(&view);
        }
        self.last = Some(desired);
        Ok(Pass {
            failed,
            grace_ends: resolved.ends.map(Instant::from_std),
        })
    }

    async fn observe(&mut self) -> Result<Confirmed, kernel::Error> {
        let observed = self.kernel.observe().await?;
        for collision in observed.collisions.difference(&self.collisions) {
            warn!("{collision}");
        }
        self.collisions = observed.collisions;
        Ok(Confirmed {
            state: observed.state,
            links: self.kernel.links().await?,
            occupied: observed.occupied,
        })
    }

    /// Takes over who was the gateway of which Service before the agent was restarted.
    fn adopt(&mut self, observed: &KernelState, now: Instant) {
        let (view, _) = self.look(now);
        for (vip, node) in adopted_announcers(&view, observed, self.settings) {
            self.announcers.adopt(vip, node, now.into_std());
        }
    }

    /// The cluster as objects and wire tell it.
    fn look(&mut self, now: Instant) -> (View, Resolved) {
        self.cluster
            .view(&mut self.announcers, &self.lan.heard(), now.into_std())
    }

    fn count(&self, steps: &[Step], failed: &[StepError]) {
        let counters = &self.report.counters;
        if failed.is_empty() {
            let result = if steps.iter().any(Step::is_change) {
                "changed"
            } else {
                "unchanged"
            };
            counters
                .passes
                .get_or_create(&vec![("result", result)])
                .inc();
        }
        for step in steps {
            let label = vec![("executor", step.executor())];
            counters.steps.get_or_create(&label).inc();
        }
        for failure in failed {
            let label = vec![("executor", failure.step.executor())];
            counters.failed_steps.get_or_create(&label).inc();
        }
    }
}

/// The gateways that pods of each VIP are routed to in the kernel, as nodes.
pub(crate) fn adopted_announcers(
    view: &View,
    observed: &KernelState,
    settings: &Settings,
) -> BTreeMap<IpAddr, NodeName> {
    let mut announcers = BTreeMap::new();
    for state in observed.families.values() {
        for (pod, state) in &state.firewall.pods {
            let vip = state
                .vips
                .first()
                .filter(|vip| !announcers.contains_key(*vip));
            let node = || gateway_in(observed, *pod, view, settings);
            if let Some((vip, node)) = vip.and_then(|vip| Some((*vip, node()?))) {
                announcers.insert(vip, node);
            }
        }
    }
    announcers
}

fn gateway_in(
    observed: &KernelState,
    pod: IpAddr,
    view: &View,
    settings: &Settings,
) -> Option<NodeName> {
    let family = observed.families.get(&Family::of(pod))?;
    let state = family.firewall.pods.get(&pod)?;
    if state.gateway_here {
        return Some(settings.node_name.clone());
    }
    let mark = state.mark?;
    let table = family
        .routes
        .rules
        .iter()
        .find_map(|rule| match rule.action {
            RuleAction::Lookup(table)
                if rule.mark == Some(mark) && rule.from.is_none_or(|from| from == pod) =>
            {
                Some(table)
            }
            _ => None,
        })?;
    let via = family.routes.tables.get(&table)?.gateway.as_ref()?.via;
    let mut nodes = view.nodes.iter();
    nodes
        .find(|(_, node)| node.addresses.contains(&via))
        .map(|(name, _)| name.clone())
}

/// Says what became different for whom.
fn tell(before: Option<&Desired>, now: &Desired) {
    let nothing = Desired::default();
    let before = before.unwrap_or(&nothing);
    for (service, verdicts) in &now.services {
        for (family, verdict) in verdicts {
            let old = before.services.get(service).and_then(|v| v.get(family));
            if old != Some(verdict) {
                info!(%service, %family, "{verdict}");
            }
        }
    }
    for service in before.services.keys() {
        if !now.services.contains_key(service) {
            info!(%service, "no longer an egress Service");
        }
    }
    for (subject, reason) in &now.ignored {
        if before.ignored.get(subject) != Some(reason) {
            warn!("ignoring {subject}: {reason}");
        }
    }
    for (family, pod) in &now.unknown_networks {
        if !before.unknown_networks.contains_key(family) {
            warn!(
                %family, %pod,
                "pod is in no node's podCIDRs: all private networks are excluded from egress, \
                 set FIREWALL_EXCLUDE_DST_CIDRS to the cluster's networks"
            );
        }
    }
}

fn told(failed: &[StepError]) -> String {
    let mut text: Vec<String> = failed
        .iter()
        .take(TOLD_FAILURES)
        .map(|error| chain(error))
        .collect();
    if failed.len() > TOLD_FAILURES {
        text.push(format!("and {} more", failed.len() - TOLD_FAILURES));
    }
    text.join("; ")
}

#[cfg(test)]
mod tests;
