//! Effects: reads what of ours is in the kernel and executes steps, in the order given.
//!
//! Knows nothing of Kubernetes and decides nothing: which steps, and in which order, is `diff`'s matter.

mod backend;
mod challenge;
mod connections;
mod conntrack;
mod drift;
mod error;
mod firewall;
mod interfaces;
mod iptables;
#[cfg(feature = "kill-points")]
mod kill_point;
pub(crate) mod neighbours;
mod netfilter;
mod nftables;
mod obstacles;
mod ours;
mod remnants;
mod routes;
mod tag;
#[cfg(test)]
mod tests;
mod tool;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;

use crate::error::chain;
pub use crate::kernel::challenge::Challenges;
use crate::kernel::challenge::Unheard;
use crate::kernel::drift::DriftListener;
use crate::kernel::error::executable;
pub use crate::kernel::error::{Error, StepError};
use crate::kernel::firewall::Firewall;
use crate::kernel::iptables::forward;
use crate::kernel::obstacles::Obstacles;
use crate::kernel::ours::Ranges;
use crate::kernel::routes::Routes;
use crate::settings::Settings;
use crate::state::{
    ConnectionStep, Family, FamilyState, FirewallStep, KernelState, NetSet, Observed, Remnant,
    RouteStep, Rule, Step, Surroundings,
};
use ipnet::IpNet;

/// A node's kernel, as the agent sees it.
pub trait Kernel: Send {
    /// Reads everything of ours, and what of others is in its way.
    ///
    /// # Errors
    /// When any part cannot be read: a partial picture would make the agent repeat or remove the wrong things.
    fn observe(&mut self) -> impl Future<Output = Result<Observed, Error>> + Send;

    /// Looks again at what of the surroundings changes without a notice, at little cost.
    fn look_again(&mut self) -> impl Future<Output = BTreeMap<Family, Surroundings>> + Send;

    /// Waits until others may have changed what is ours. Cancel-safe.
    fn drifted(&mut self) -> impl Future<Output = ()> + Send;

    /// Executes the steps in order. Returns the steps that failed. A failed step keeps no other from being tried than
    /// those that rely on it ([`Step::needs`]).
    fn apply(&mut self, steps: &[Step]) -> impl Future<Output = Vec<StepError>> + Send;
}

/// Whether every step is to be executed by itself.
fn is_one_by_one() -> bool {
    #[cfg(feature = "kill-points")]
    return kill_point::is_armed();
    #[cfg(not(feature = "kill-points"))]
    false
}

#[derive(Debug)]
pub struct NodeKernel {
    firewall: Firewall,
    routes: Routes,
    drift: DriftListener,
    families: Vec<Family>,
    ranges: Ranges,
    /// Which backend, and why.
    choice: String,
    /// What was left by others than the present backend; looked for until there is nothing any more.
    remnants: Option<BTreeSet<Remnant>>,
    /// Destinations that are not egress, as far as confirmed: connections to them are never forgotten.
    excluded: BTreeSet<IpNet>,
    obstacles: Obstacles,
    /// Our routing rules, as read or confirmed last.
    rules: BTreeSet<(Family, Rule)>,
    /// Interfaces with IPv4 addresses, as read last: IPv6 has no settings of an interface that matter.
    interfaces: Vec<String>,
    challenges: Challenges,
}

impl NodeKernel {
    /// Finds out what this node has. Changes nothing.
    ///
    /// # Errors
    /// When a tool is missing, or the kernel cannot be asked, or cannot do what the wanted backend needs.
    pub async fn open(settings: &Settings) -> Result<NodeKernel, Error> {
        let mut families = vec![Family::V4];
        // Absent in a kernel without IPv6.
        let has_ipv6 = tokio::fs::try_exists("/proc/thread-self/net/if_inet6").await;
        if has_ipv6.unwrap_or(false) {
            families.push(Family::V6);
        }
        let ranges = Ranges {
            mask: settings.mask.bits(),
            slots: settings.mask.slots(),
            table_offset: settings.table_offset,
            priority: settings.rule_priority,
        };
        let routes = Routes::open(families.clone(), ranges)?;
        let (firewall, refusal) = Firewall::open(settings.firewall, ranges, &families).await?;
        let profile = firewall.profile();
        let mut choice = profile.name;
        let refusal = refusal.map(|error| chain(&error));
        if let Some(why) = &refusal {
            choice += &format!(", because nftables cannot be used: {why}");
        }
        let own_ports = [routes.port].into_iter().chain(profile.port).collect();
        let drift = DriftListener::open(
            own_ports,
            ranges,
            profile.watched,
            routes.watched.clone(),
            settings.forward_accept,
        )?;
        Ok(NodeKernel {
            firewall,
            routes,
            drift,
            obstacles: Obstacles::new(families.clone(), refusal),
            families,
            ranges,
            choice,
            remnants: None,
            excluded: BTreeSet::new(),
            rules: BTreeSet::new(),
            interfaces: Vec::new(),
            challenges: Challenges::default(),
        })
    }

    /// What was found, for the log.
    #[must_use]
    pub fn describe(&self) -> &str {
        &self.choice
    }

    /// How often pods are challenged, for metrics.
    #[must_use]
    pub fn challenges(&self) -> Challenges {
        self.challenges.clone()
    }

    /// Notes which of our routing rules are there, and whether others have removed all of a family.
    fn note_rules(&mut self, families: &BTreeMap<Family, FamilyState>) {
        for (family, state) in families {
            let had_any = self.rules.iter().any(|(of, _)| of == family);
            if had_any && state.routes.rules.is_empty() {
                self.obstacles.note_rules_removed(*family);
            }
        }
        let rules = families.iter();
        let rules = rules.flat_map(|(f, state)| state.routes.rules.iter().map(|r| (*f, *r)));
        self.rules = rules.collect();
    }

    fn confirm_rule(&mut self, step: &RouteStep) {
        match step {
            RouteStep::AddRule(family, rule) => drop(self.rules.insert((*family, *rule))),
            RouteStep::RemoveRule(family, rule) => drop(self.rules.remove(&(*family, *rule))),
            _ => {}
        }
    }

    /// Notes what a batch of firewall steps has changed of what is excluded.
    fn confirm(&mut self, steps: &[&FirewallStep], failed: &[StepError]) {
        for step in steps {
            let is_this = |f: &StepError| matches!(&f.step, Step::Firewall(s) if s == *step);
            let is_done = || !failed.iter().any(is_this);
            match step {
                FirewallStep::AddNet(NetSet::Excluded, net) if is_done() => {
                    self.excluded.insert(*net);
                }
                FirewallStep::RemoveNet(NetSet::Excluded, net) if is_done() => {
                    self.excluded.remove(net);
                }
                _ => {}
            }
        }
    }
}

impl Kernel for NodeKernel {
    async fn observe(&mut self) -> Result<Observed, Error> {
        let mut routes = self.routes.observe().await?;
        let firewall = self.firewall.observe().await?;
        let mut families = BTreeMap::new();
        for (family, firewall) in firewall {
            let routes = routes.states.remove(&family).unwrap_or_default();
            families.insert(family, FamilyState { routes, firewall });
        }
        let remnants = match &self.remnants {
            Some(none) if none.is_empty() => BTreeSet::new(),
            _ => remnants::find(&self.firewall, &self.families, routes.earlier).await?,
        };
        self.remnants = Some(remnants.clone());
        self.note_rules(&families);
        let interfaces = self.routes.interfaces().await?;
        let is_of_ipv4 = |net: &IpNet| Family::of_net(*net) == Family::V4;
        let with_nets = interfaces
            .iter()
            .filter(|interface| interface.nets.iter().any(is_of_ipv4));
        self.interfaces = with_nets.map(|interface| interface.name.clone()).collect();
        let obstacles = &mut self.obstacles;
        let surroundings = obstacles.look(&self.firewall, routes.surroundings, &self.interfaces);
        let surroundings = surroundings.await;
        let state = KernelState {
            families,
            accepted: forward::accepted(&self.families).await?,
            remnants,
            doubt: true,
        };
        self.excluded = state.excluded().collect();
        Ok(Observed {
            state,
            interfaces,
            occupied: routes.occupied,
            surroundings,
        })
    }

    async fn look_again(&mut self) -> BTreeMap<Family, Surroundings> {
        let obstacles = &mut self.obstacles;
        obstacles.look_again(&self.firewall, &self.interfaces).await
    }

    async fn drifted(&mut self) {
        self.drift.next().await;
    }

    async fn apply(&mut self, steps: &[Step]) -> Vec<StepError> {
        let mut failed = Vec::new();
        let mut unheard = Unheard::default();
        for batch in steps.chunk_by(|a, b| !is_one_by_one() && a.executor() == b.executor()) {
            #[cfg(feature = "kill-points")]
            kill_point::before_step();
            let batch = Batch::of(batch);
            for step in executable(&batch.routes, &mut failed) {
                match self.routes.execute(step).await {
                    Ok(()) => self.confirm_rule(step),
                    Err(error) => failed.push(StepError::new(step, error)),
                }
            }
            if !batch.firewall.is_empty() {
                self.firewall.apply(&batch.firewall, &mut failed).await;
                self.confirm(&batch.firewall, &failed);
            }
            if !batch.connections.is_empty() {
                let (steps, excluded) = (&batch.connections, &self.excluded);
                let firewall = &self.firewall;
                connections::apply(steps, firewall, excluded, &mut unheard, &mut failed).await;
            }
            for (family, sources) in batch.accepts {
                if let Err(error) = forward::accept(family, sources).await {
                    let step = Step::Accept(family, sources.clone());
                    failed.push(StepError::new(&step, error));
                }
            }
            for remnant in batch.remnants {
                // What is left does the work until ours does all of it: it stays when anything has failed.
                let step = Step::RemoveRemnant(remnant);
                for _ in executable(&[&step], &mut failed) {
                    let (families, mask) = (&self.families, self.ranges.mask);
                    let removed = remnants::remove(remnant, families, mask, &self.routes).await;
                    if let Err(error) = removed {
                        failed.push(StepError::new(&step, error));
                    }
                }
            }
        }
        challenge::elicit(unheard, self.excluded.clone(), self.challenges());
        failed
    }
}

/// Steps of one executor.
#[derive(Default)]
struct Batch<'a> {
    routes: Vec<&'a RouteStep>,
    firewall: Vec<&'a FirewallStep>,
    connections: Vec<&'a ConnectionStep>,
    accepts: Vec<(Family, &'a BTreeSet<IpNet>)>,
    remnants: Vec<Remnant>,
}

impl Batch<'_> {
    fn of(steps: &[Step]) -> Batch<'_> {
        let mut batch = Batch::default();
        for step in steps {
            match step {
                Step::Route(step) => batch.routes.push(step),
                Step::Firewall(step) => batch.firewall.push(step),
                Step::Connection(step) => batch.connections.push(step),
                Step::Accept(family, sources) => batch.accepts.push((*family, sources)),
                Step::RemoveRemnant(remnant) => batch.remnants.push(*remnant),
            }
        }
        batch
    }
}
