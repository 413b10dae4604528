//! Effects: reads what of ours is in the kernel and executes steps, in the order given.
//!
//! Knows nothing of Kubernetes and decides nothing: which steps, and in which order, is `diff`'s matter.

mod challenge;
mod conntrack;
mod drift;
mod foreign_nat;
mod iptables;
#[cfg(feature = "kill-points")]
mod kill_point;
pub(crate) mod neighbours;
mod netfilter;
mod nftables;
mod remnants;
mod routes;
mod tag;
mod tool;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;

use ipnet::IpNet;
use tracing::debug;

use crate::error::chain;
use crate::kernel::challenge::Asleep;
use crate::kernel::conntrack::{ConntrackError, Keep, LateReply, Which};
use crate::kernel::drift::{DriftListener, Watched};
use crate::kernel::iptables::Iptables;
use crate::kernel::netfilter::NetlinkError;
use crate::kernel::nftables::Nftables;
use crate::kernel::routes::{Ranges, RouteError, Routes};
use crate::kernel::tool::ToolError;
use crate::names::Interface;
use crate::settings::{FirewallBackend, Settings};
use crate::state::{
    Executor, Family, FamilyState, FirewallState, KernelState, Remnant, Step, TableId,
};

/// A step that could not be executed; the steps after it were tried all the same, but for those that rely on it.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct StepError {
    /// What was tried.
    pub step: Step,
    /// What went wrong.
    #[source]
    pub source: Error,
}

/// What can go wrong with the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tool failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A tool failed on a whole batch, and did not say which line was the reason.
    #[error("{0}")]
    Batch(String),
    /// Rules or routes.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// nftables.
    #[error("nftables: {0}")]
    Netlink(#[from] NetlinkError),
    /// Connection tracking.
    #[error(transparent)]
    Conntrack(#[from] ConntrackError),
    /// What the step relies on failed.
    #[error("not tried, because what it relies on failed: {0}")]
    NotTried(String),
    /// A failure that a test asked for.
    #[cfg(test)]
    #[error("injected failure")]
    Injected,
}

/// What was read of a kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Everything of ours.
    pub state: KernelState,
    /// Tables of our range that others use: not to be used by us.
    pub occupied: BTreeSet<(Family, TableId)>,
    /// What of others gets in the way of ours, as sentences for the operator.
    pub collisions: BTreeSet<String>,
}

/// A node's kernel, as the agent sees it.
pub trait Kernel: Send {
    /// Reads everything of ours, and what of others is in its way.
    ///
    /// # Errors
    /// When any part cannot be read: a partial picture would make the agent repeat or remove the wrong things.
    fn observe(&mut self) -> impl Future<Output = Result<Observed, Error>> + Send;

    /// Reads the interfaces that are up, with the networks that are directly reachable on them.
    ///
    /// # Errors
    /// When they cannot be read.
    fn links(&mut self) -> impl Future<Output = Result<Vec<Interface>, Error>> + Send;

    /// Waits until others may have changed what is ours. Nothing is lost when the wait is given up and taken up
    /// again.
    fn drifted(&mut self) -> impl Future<Output = ()> + Send;

    /// Executes the steps in order; connections to `excluded` destinations are never forgotten.
    /// Returns the steps that failed. A failed step keeps no other from being tried than those that rely on it
    /// ([`Step::needs`]).
    fn apply(
        &mut self,
        steps: &[Step],
        excluded: &BTreeSet<IpNet>,
    ) -> impl Future<Output = Vec<StepError>> + Send;
}

/// Whether every step is to be executed by itself.
fn is_one_by_one() -> bool {
    #[cfg(feature = "kill-points")]
    return kill_point::is_armed();
    #[cfg(not(feature = "kill-points"))]
    false
}

/// A backend that marks, translates, guards and rejects packets.
trait Firewall {
    /// Reads everything of ours, by family.
    async fn observe(&mut self) -> Result<BTreeMap<Family, FirewallState>, Error>;

    /// Executes firewall steps in order, and adds those that fail to `failed`.
    async fn apply(&mut self, steps: &[&Step], failed: &mut Vec<StepError>);

    /// Keeps late replies of connections that are about to be forgotten from beginning connections of their own: the
    /// pod's next packet would be taken for an answer to one that came from outside, and leave with the pod's address.
    async fn expect_late_replies(&mut self, replies: &[LateReply]) -> Result<(), Error>;
}

/// How long late replies are expected: until the node that was the gateway, or the server, has learned of the change;
/// seconds at most, where both are alive.
const LATE_REPLY_SECONDS: u32 = 60;

/// The steps that rely on none that failed; the others join these.
fn executable<'a>(steps: &[&'a Step], failed: &mut Vec<StepError>) -> Vec<&'a Step> {
    if failed.is_empty() {
        return steps.to_vec();
    }
    let mut rest = Vec::new();
    for step in steps {
        match failed.iter().find(|failure| step.needs(&failure.step)) {
            Some(failure) => {
                let source = Error::NotTried(failure.step.to_string());
                failed.push(StepError {
                    step: (*step).clone(),
                    source,
                });
            }
            None => rest.push(*step),
        }
    }
    rest
}

/// The backend in use.
#[derive(Debug)]
enum Backend {
    Nftables(Nftables),
    Iptables(Iptables),
}

impl Firewall for Backend {
    async fn observe(&mut self) -> Result<BTreeMap<Family, FirewallState>, Error> {
        match self {
            Backend::Nftables(nftables) => nftables.observe().await,
            Backend::Iptables(iptables) => iptables.observe().await,
        }
    }

    async fn apply(&mut self, steps: &[&Step], failed: &mut Vec<StepError>) {
        match self {
            Backend::Nftables(nftables) => nftables.apply(steps, failed).await,
            Backend::Iptables(iptables) => iptables.apply(steps, failed).await,
        }
    }

    async fn expect_late_replies(&mut self, replies: &[LateReply]) -> Result<(), Error> {
        match self {
            Backend::Nftables(nftables) => nftables.expect_late_replies(replies).await,
            Backend::Iptables(iptables) => iptables.expect_late_replies(replies).await,
        }
    }
}

/// The kernel of the node that this process runs on.
#[derive(Debug)]
pub struct NodeKernel {
    firewall: Backend,
    routes: Routes,
    drift: DriftListener,
    families: Vec<Family>,
    mask: u32,
    /// Which backend, and why.
    choice: String,
    /// What was left by others than the present backend; looked for until there is nothing any more.
    remnants: Option<BTreeSet<Remnant>>,
    /// Pods that are to say something when all steps are done.
    asleep: Asleep,
}

impl NodeKernel {
    /// Finds out what this node has. Changes nothing.
    ///
    /// # Errors
    /// When a tool is missing, or the kernel cannot be asked, or cannot do what the wanted backend needs.
    pub async fn open(settings: &Settings) -> Result<NodeKernel, Error> {
        let (mask, wanted) = (settings.mask, settings.firewall);
        // Absent in a kernel without IPv6.
        let has_ipv6 = tokio::fs::try_exists("/proc/thread-self/net/if_inet6").await;
        let mut families = vec![Family::V4];
        if has_ipv6.unwrap_or(false) {
            families.push(Family::V6);
        }
        let ranges = Ranges {
            mask: mask.bits(),
            table_offset: settings.table_offset,
            priority: settings.rule_priority,
        };
        let routes = Routes::open(families.clone(), ranges)?;
        let nftables = match wanted {
            FirewallBackend::Iptables => None,
            FirewallBackend::Nftables | FirewallBackend::Auto => {
                Some(Nftables::check(mask, &families).await)
            }
        };
        let (firewall, choice) = match (wanted, nftables) {
            (FirewallBackend::Nftables, Some(Err(error))) => return Err(error),
            (_, Some(Ok(()))) => {
                let nftables = Nftables::open(mask, families.clone())?;
                (Backend::Nftables(nftables), "nftables".to_owned())
            }
            (_, refusal) => {
                let iptables = Iptables::open(mask.bits(), families.clone()).await?;
                let mut choice = iptables.describe();
                if let Some(Err(error)) = refusal {
                    choice = format!(
                        "{choice}, because nftables cannot be used: {}",
                        chain(&error)
                    );
                }
                (Backend::Iptables(iptables), choice)
            }
        };
        let mut own_ports = vec![routes.port()];
        let watched = match &firewall {
            Backend::Nftables(nftables) => {
                own_ports.push(nftables.port());
                Watched::OwnTable
            }
            Backend::Iptables(_) => Watched::IptablesChains,
        };
        let drift = DriftListener::open(own_ports, ranges, watched, routes.devices())?;
        Ok(NodeKernel {
            firewall,
            routes,
            drift,
            families,
            mask: mask.bits(),
            choice,
            remnants: None,
            asleep: Asleep::default(),
        })
    }

    async fn remove(&self, remnant: Remnant) -> Result<(), Error> {
        remnants::remove(remnant, &self.families, self.mask, &self.routes).await
    }

    /// One look at the connections for all pods of a batch.
    async fn forget(&mut self, steps: &[&Step], excluded: &BTreeSet<IpNet>) -> Vec<StepError> {
        let mut which = Which::default();
        for step in steps {
            match step {
                Step::Wake(pod) => drop(self.asleep.pods.insert(*pod)),
                Step::ForgetConnections(pod) => drop(which.pods.insert(*pod, Keep::Nothing)),
                Step::ResumeConnections { pod, source } => {
                    which.pods.insert(*pod, Keep::Resumed(*source));
                }
                Step::ForgetWrongSource { sources, vips } => {
                    for (pod, source) in sources {
                        which.pods.entry(*pod).or_insert(Keep::WithSource(*source));
                    }
                    which.unanswered.extend(vips);
                }
                Step::ForgetNewlyExcluded { pods, nets } => {
                    which.inside.extend(pods);
                    which.newly_excluded.extend(nets);
                }
                _ => {}
            }
        }
        if steps.iter().all(|step| matches!(step, Step::Wake(_))) {
            return Vec::new();
        }
        let Err(error) = self.forget_connections(which, excluded).await else {
            return Vec::new();
        };
        let text = chain(&error);
        let failure = |step: &&Step| StepError {
            step: (*step).clone(),
            source: Error::Batch(text.clone()),
        };
        steps.iter().map(failure).collect()
    }

    async fn forget_connections(
        &mut self,
        which: Which,
        excluded: &BTreeSet<IpNet>,
    ) -> Result<(), Error> {
        let found = conntrack::find(which, excluded.clone()).await?;
        self.asleep.flows.extend(&found.established);
        if !found.late.is_empty() {
            self.firewall.expect_late_replies(&found.late).await?;
        }
        Ok(conntrack::forget(found).await?)
    }

    /// What was found, for the log.
    #[must_use]
    pub fn describe(&self) -> &str {
        &self.choice
    }
}

impl Kernel for NodeKernel {
    async fn observe(&mut self) -> Result<Observed, Error> {
        let mut routes = self.routes.observe().await?;
        let firewall = self.firewall.observe().await?;
        let families = firewall.into_iter().map(|(family, firewall)| {
            let routes = routes.states.remove(&family).unwrap_or_default();
            (family, FamilyState { routes, firewall })
        });
        let families = families.collect();
        let remnants = match &self.remnants {
            Some(none) if none.is_empty() => BTreeSet::new(),
            _ => remnants::find(&self.firewall, &self.families, routes.earlier).await?,
        };
        self.remnants = Some(remnants.clone());
        let mut collisions = routes.collisions;
        // Only told, so that a failure to see them stops nothing.
        let rivals = foreign_nat::find(&self.firewall, &self.families).await;
        for rival in rivals.unwrap_or_else(|error| {
            debug!("cannot look for NAT of others: {}", chain(&error));
            BTreeSet::new()
        }) {
            collisions.insert(match self.firewall {
                Backend::Nftables(_) => format!("{rival} may translate packets before we do"),
                Backend::Iptables(_) => format!(
                    "{rival} may translate packets before we do: FIREWALL_BACKEND=nftables would be ahead of it"
                ),
            });
        }
        Ok(Observed {
            state: KernelState {
                families,
                remnants,
                doubt: true,
            },
            occupied: routes.occupied,
            collisions,
        })
    }

    async fn links(&mut self) -> Result<Vec<Interface>, Error> {
        Ok(self.routes.links().await?)
    }

    async fn drifted(&mut self) {
        self.drift.next().await;
    }

    async fn apply(&mut self, steps: &[Step], excluded: &BTreeSet<IpNet>) -> Vec<StepError> {
        let mut failed = Vec::new();
        for batch in steps.chunk_by(|a, b| !is_one_by_one() && a.executor() == b.executor()) {
            #[cfg(feature = "kill-points")]
            kill_point::before_step();
            let executor = batch[0].executor();
            let batch: Vec<&Step> = batch.iter().collect();
            match executor {
                Executor::Routes => self.routes.apply(&batch, &mut failed).await,
                Executor::Firewall => self.firewall.apply(&batch, &mut failed).await,
                Executor::Conntrack => {
                    let batch = executable(&batch, &mut failed);
                    failed.extend(self.forget(&batch, excluded).await);
                }
                Executor::Remnants => {
                    for step in executable(&batch, &mut failed) {
                        if let Step::RemoveRemnant(remnant) = step
                            && let Err(source) = self.remove(*remnant).await
                        {
                            let step = step.clone();
                            failed.push(StepError { step, source });
                        }
                    }
                }
            }
        }
        challenge::elicit(std::mem::take(&mut self.asleep), excluded.clone());
        failed
    }
}
