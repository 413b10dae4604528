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
mod netlink;
mod nftables;
mod obstacles;
mod ours;
mod reach;
mod remnants;
mod routes;
mod rtnetlink;
mod tag;
#[cfg(test)]
mod tests;
mod tool;
mod watched;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;

use ipnet::IpNet;

use crate::error::chain;
pub use crate::kernel::challenge::Challenges;
use crate::kernel::challenge::Unheard;
use crate::kernel::conntrack::Conntrack;
pub use crate::kernel::drift::Drift;
use crate::kernel::drift::DriftListener;
pub(crate) use crate::kernel::error::executable;
pub use crate::kernel::error::{Error, StepError};
use crate::kernel::firewall::Firewall;
use crate::kernel::iptables::forward::{self, ACCEPT};
use crate::kernel::neighbours::neighbour_table;
use crate::kernel::netlink::OwnPorts;
use crate::kernel::obstacles::Obstacles;
use crate::kernel::ours::Ranges;
use crate::kernel::reach::Lookup;
use crate::kernel::routes::Routes;
use crate::settings::Settings;
use crate::state::{
    Accepted, Asked, ConnectionStep, Family, FamilyState, FirewallStep, KernelState, Landmark,
    NetSet, Observed, Obstacle, Remnant, RouteState, RouteStep, Rule, Step, Surroundings, Survey,
    Traits,
};

/// A node's kernel, as the agent sees it.
pub trait Kernel: Send {
    /// Reads everything of ours, and what of others is in its way.
    ///
    /// # Errors
    /// When any part cannot be read: a partial picture would make the agent repeat or remove the wrong things.
    fn observe(&mut self) -> impl Future<Output = Result<Observed, Error>> + Send;

    /// Completes what was read with how these addresses are reached, as far as that is not known since it was read, and with
    /// the link-layer addresses of those nodes that are on link; forgets other addresses.
    ///
    /// # Errors
    /// When the kernel cannot be asked. That an address is not reached is an answer.
    fn look_up(
        &mut self,
        asked: &Asked,
        observed: &mut Observed,
    ) -> impl Future<Output = Result<(), Error>> + Send;

    /// Looks again at what of the surroundings changes without a notice, at little cost.
    fn look_again(&mut self) -> impl Future<Output = BTreeMap<Family, Surroundings>> + Send;

    /// Waits until others may have changed what is ours, or how addresses that were looked up are reached. Cancel-safe.
    fn drifted(&mut self) -> impl Future<Output = Drift> + Send;

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
    own_ports: OwnPorts,
    mask_is_shared: bool,
    routes: Routes,
    lookup: Lookup,
    drift: DriftListener,
    families: Vec<Family>,
    ranges: Ranges,
    /// Which backend, and why.
    choice: String,
    /// Others than the present backend may have left something: it is looked for until there is nothing any more.
    has_remnants: bool,
    /// Chains of ours may be in iptables' FORWARD: they are looked for until there are none, and after each step that makes one.
    may_accept: bool,
    /// Destinations that are not egress, as far as confirmed: connections to them are never forgotten.
    excluded: BTreeSet<IpNet>,
    obstacles: Obstacles,
    /// Our routing rules, as read or confirmed last.
    rules: BTreeSet<(Family, Rule)>,
    /// Interfaces with IPv4 addresses, as read last: IPv6 has no settings of an interface that matter.
    interfaces: Vec<String>,
    conntrack: Conntrack,
    challenges: Challenges,
}

/// The families that the kernel has.
async fn families() -> Vec<Family> {
    let mut families = vec![Family::V4];
    // Absent in a kernel without IPv6.
    let has_ipv6 = tokio::fs::try_exists("/proc/thread-self/net/if_inet6").await;
    if has_ipv6.unwrap_or(false) {
        families.push(Family::V6);
    }
    families
}

fn ranges(settings: &Settings) -> Ranges {
    Ranges {
        mask: settings.mask.bits(),
        slots: settings.mask.slots(),
        table_offset: settings.table_offset,
        priority: settings.rule_priority,
        strict_tcp: false,
    }
}

/// Looks at what else uses marks and priorities of routing rules on this node. Changes nothing.
///
/// # Errors
/// When the kernel cannot be asked.
pub async fn survey(settings: &Settings) -> Result<Survey, Error> {
    Ok(routes::survey(&families().await, &ranges(settings))?)
}

impl NodeKernel {
    /// Finds out what this node has. Changes nothing.
    ///
    /// # Errors
    /// When a tool is missing, or the kernel cannot be asked, or cannot do what the wanted backend needs.
    pub async fn open(settings: &Settings) -> Result<NodeKernel, Error> {
        let families = families().await;
        let ranges = ranges(settings);
        let own_ports = OwnPorts::default();
        let routes = Routes::new(families.clone(), ranges, own_ports.clone());
        let (firewall, refusal) =
            Firewall::open(settings.firewall, ranges, &families, &own_ports).await?;
        let profile = firewall.profile();
        let mut choice = profile.name;
        let refusal = refusal.map(|error| chain(&error));
        if let Some(why) = &refusal {
            choice += &format!(", because nftables cannot be used: {why}");
        }
        let lookup = Lookup {
            interfaces: routes.watched.clone(),
            ..Lookup::default()
        };
        let drift = DriftListener::open(
            own_ports.clone(),
            ranges,
            profile.watched,
            lookup.clone(),
            settings.forward_accept,
        )?;
        Ok(NodeKernel {
            firewall,
            own_ports,
            mask_is_shared: settings.mask_is_shared,
            routes,
            lookup,
            drift,
            obstacles: Obstacles::new(families.clone(), refusal),
            families,
            ranges,
            choice,
            has_remnants: true,
            may_accept: true,
            excluded: BTreeSet::new(),
            rules: BTreeSet::new(),
            interfaces: Vec::new(),
            conntrack: Conntrack::default(),
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
    fn note_rules(&mut self, families: &BTreeMap<Family, RouteState>) {
        for (family, routes) in families {
            let had_any = self.rules.iter().any(|(of, _)| of == family);
            if had_any && routes.rules.is_empty() {
                self.obstacles.note_rules_removed(*family);
            }
        }
        let rules = families.iter();
        let rules = rules.flat_map(|(f, routes)| routes.rules.iter().map(|r| (*f, *r)));
        self.rules = rules.collect();
    }

    /// What our chains in iptables' FORWARD accept. A look that fails ends no pass: it is told.
    async fn accepted(&mut self, unseen: &mut BTreeSet<String>) -> BTreeMap<Family, Accepted> {
        let mut accepted = BTreeMap::new();
        let mut is_seen = true;
        for &family in &self.families {
            match forward::accepted(family).await {
                Ok(found) => accepted.extend(found.map(|found| (family, found))),
                Err(error) => {
                    is_seen = false;
                    let why = chain(&error);
                    unseen.insert(format!("cannot look for chain {ACCEPT} of {family}: {why}"));
                }
            }
        }
        self.may_accept = !is_seen || !accepted.is_empty();
        accepted
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
        self.note_rules(&routes.states);
        let is_of_ipv4 = |net: &IpNet| Family::of_net(*net) == Family::V4;
        let with_nets = routes.interfaces.iter();
        let with_nets = with_nets.filter(|interface| interface.nets.iter().any(is_of_ipv4));
        self.interfaces = with_nets.map(|interface| interface.name.clone()).collect();
        let obstacles = &mut self.obstacles;
        let surroundings = obstacles.look(&self.firewall, routes.surroundings, &self.interfaces);
        let surroundings = surroundings.await;
        let is_strict = |found: &Surroundings| found.obstacles.contains(&Obstacle::StrictTracking);
        let strict_tcp = surroundings.values().any(is_strict);
        let firewall = self.firewall.observe(strict_tcp).await?;
        let profile = self.firewall.profile();
        let mut families = BTreeMap::new();
        for (family, mut firewall) in firewall {
            let routes = routes.states.remove(&family).unwrap_or_default();
            if profile.ways_are_routes {
                firewall.landmarks.extend(routes.ways().map(Landmark::Way));
            }
            families.insert(family, FamilyState { routes, firewall });
        }
        let found = match self.has_remnants {
            true => remnants::find(&self.firewall, &self.families, routes.earlier).await,
            false => remnants::Found::default(),
        };
        self.has_remnants = !found.remnants.is_empty() || !found.unseen.is_empty();
        let mut unseen = found.unseen;
        let accepted = match self.may_accept {
            true => self.accepted(&mut unseen).await,
            false => BTreeMap::new(),
        };
        let state = KernelState {
            families,
            accepted,
            remnants: found.remnants,
            doubt: true,
        };
        self.excluded = state.excluded().collect();
        Ok(Observed {
            state,
            traits: Traits {
                marks_before_dnat: profile.marks_before_dnat,
                mask_is_shared: self.mask_is_shared,
            },
            interfaces: routes.interfaces,
            reach: BTreeMap::new(),
            neighbours: BTreeMap::new(),
            occupied: routes.occupied,
            surroundings,
            unseen,
        })
    }

    async fn look_up(&mut self, asked: &Asked, observed: &mut Observed) -> Result<(), Error> {
        let all = asked.nodes.union(&asked.vips).copied().collect();
        if self.lookup.complete(all, &mut observed.reach)? {
            self.lookup.watch(&asked.nodes, &observed.reach);
            for neighbour in neighbour_table().await? {
                self.lookup.neighbours.take(neighbour);
            }
        }
        observed.neighbours = self.lookup.neighbours.known();
        observed.neighbours.retain(|a, _| asked.nodes.contains(a));
        Ok(())
    }

    async fn look_again(&mut self) -> BTreeMap<Family, Surroundings> {
        let obstacles = &mut self.obstacles;
        obstacles.look_again(&self.firewall, &self.interfaces).await
    }

    async fn drifted(&mut self) -> Drift {
        self.drift.next().await
    }

    async fn apply(&mut self, steps: &[Step]) -> Vec<StepError> {
        let mut failed = Vec::new();
        let mut unheard = Unheard::expect(steps);
        for batch in steps.chunk_by(|a, b| !is_one_by_one() && a.executor() == b.executor()) {
            #[cfg(feature = "kill-points")]
            kill_point::before_step();
            let batch = Batch::of(batch);
            for step in executable(&batch.routes, &mut failed) {
                match self.routes.execute(step) {
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
                let (firewall, conntrack) = (&mut self.firewall, &mut self.conntrack);
                let (unheard, failed) = (&mut unheard, &mut failed);
                connections::apply(steps, firewall, conntrack, excluded, unheard, failed).await;
                let (conntrack, excluded) = (self.conntrack.clone(), self.excluded.clone());
                challenge::elicit(unheard.taken(), conntrack, excluded, self.challenges());
            }
            for (family, sources) in batch.accepts {
                self.may_accept = true;
                if let Err(error) = forward::accept(family, sources, &self.own_ports).await {
                    let step = Step::Accept(family, sources.clone());
                    failed.push(StepError::new(&step, error));
                }
            }
            for remnant in batch.remnants {
                // What is left does the work until ours does all of it: it stays when anything has failed.
                let step = Step::RemoveRemnant(remnant);
                for _ in executable(&[&step], &mut failed) {
                    let (families, mask) = (&self.families, self.ranges.mask);
                    let removed = remnants::remove(remnant, families, mask, &mut self.routes).await;
                    if let Err(error) = removed {
                        failed.push(StepError::new(&step, error));
                    }
                }
            }
        }
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
