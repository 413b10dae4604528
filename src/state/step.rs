//! The steps that change a kernel, by who executes them.
//!
//! A step is an intent on one object; each backend puts it into its own form. Every step is idempotent: adding what is
//! there and removing what is absent succeeds.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use strum::{IntoStaticStr, VariantNames};

use crate::state::{Family, Mark, NetSet, NextHop, PodSet, Remnant, Rule, TableId};

/// One change to one object of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Routing rules and tables.
    Route(RouteStep),
    /// The firewall backend.
    Firewall(FirewallStep),
    /// Connection tracking.
    Connection(ConnectionStep),
    /// Remove what another backend or an earlier release left.
    RemoveRemnant(Remnant),
}

/// A change of routing rules and tables.
#[derive(Clone, Debug, IntoStaticStr, PartialEq, Eq, VariantNames)]
pub enum RouteStep {
    /// Add a routing rule.
    AddRule(Family, Rule),
    /// Remove a routing rule of ours.
    RemoveRule(Family, Rule),
    /// Add a table's `unreachable` default.
    AddFallback(Family, TableId),
    /// Remove a table's `unreachable` default.
    RemoveFallback(Family, TableId),
    /// Add or replace the route to a table's gateway.
    SetGateway(TableId, NextHop),
    /// Remove the route to a table's gateway.
    RemoveGateway(TableId, NextHop),
}

/// A change of chains and sets.
#[derive(Clone, Debug, IntoStaticStr, PartialEq, Eq, VariantNames)]
pub enum FirewallStep {
    /// (Re)write chains, jumps and static sets, with the translations of these VIPs; members of sets stay.
    Install(Family, BTreeSet<IpAddr>),
    /// Remove chains, jumps and all sets.
    Remove(Family),
    /// Guard a VIP and prepare the translation to it.
    AddVip(IpAddr),
    /// Remove a VIP's guard and translation.
    RemoveVip(IpAddr),
    /// Put a network into a set.
    AddNet(NetSet, IpNet),
    /// Take a network out of a set.
    RemoveNet(NetSet, IpNet),
    /// Put a pod into a set.
    AddPod(PodSet, IpAddr),
    /// Take a pod out of a set.
    RemovePod(PodSet, IpAddr),
    /// Translate a pod to a VIP where it is not marked.
    Translate {
        /// Address of the pod.
        pod: IpAddr,
        /// Address it gets.
        vip: IpAddr,
    },
    /// Lift that.
    Untranslate {
        /// Address of the pod.
        pod: IpAddr,
        /// Address it got.
        vip: IpAddr,
    },
    /// Route a pod to its gateway by this mark, instead of any other that it had.
    Mark {
        /// Address of the pod.
        pod: IpAddr,
        /// The gateway's mark.
        mark: Mark,
    },
    /// Lift that.
    Unmark(IpAddr),
}

/// A change of what the kernel and the pods know of connections.
#[derive(Clone, Debug, IntoStaticStr, PartialEq, Eq, VariantNames)]
pub enum ConnectionStep {
    /// Forget the connections that a pod opened to outside: their address translation is decided anew.
    Forget(IpAddr),
    /// Keep the connections of a pod that this node is the gateway of, wherever their TCP windows are by now, and forget
    /// those with another source.
    Resume {
        /// Address of the pod.
        pod: IpAddr,
        /// The source that its packets leave with.
        source: IpAddr,
    },
    /// Make a local pod send one packet on each TCP connection to outside: its path has changed, and the new gateway has
    /// no conntrack entry, so drops the server's packets, until it sees one of the pod's.
    ElicitAck(IpAddr),
    /// Forget what came about under other rules than the present ones.
    ForgetWrongSource {
        /// Connections that these pods opened to outside with another source than the one given for each.
        sources: BTreeMap<IpAddr, IpAddr>,
        /// Unreplied entries to these VIPs: a server's packet that came before the guard was in place created one; it
        /// occupies VIP:port, and SNAT would remap the pod's connection to another port.
        vips: BTreeSet<IpAddr>,
    },
    /// Forget what pods opened to destinations that are excluded from now on, other than by way of a Service.
    ForgetNewlyExcluded {
        /// Addresses of the pods.
        pods: BTreeSet<IpAddr>,
        /// The destinations.
        nets: BTreeSet<IpNet>,
    },
}

impl From<RouteStep> for Step {
    fn from(step: RouteStep) -> Step {
        Step::Route(step)
    }
}

impl From<FirewallStep> for Step {
    fn from(step: FirewallStep) -> Step {
        Step::Firewall(step)
    }
}

impl From<ConnectionStep> for Step {
    fn from(step: ConnectionStep) -> Step {
        Step::Connection(step)
    }
}

impl FirewallStep {
    /// The pod that the step is about.
    #[must_use]
    pub fn pod(&self) -> Option<IpAddr> {
        match self {
            FirewallStep::AddPod(_, pod)
            | FirewallStep::RemovePod(_, pod)
            | FirewallStep::Unmark(pod)
            | FirewallStep::Mark { pod, .. }
            | FirewallStep::Translate { pod, .. }
            | FirewallStep::Untranslate { pod, .. } => Some(*pod),
            FirewallStep::Install(..)
            | FirewallStep::Remove(_)
            | FirewallStep::AddVip(_)
            | FirewallStep::RemoveVip(_)
            | FirewallStep::AddNet(..)
            | FirewallStep::RemoveNet(..) => None,
        }
    }
}

impl Step {
    /// Who executes the step: one word for metrics, and what a batch has in common.
    #[must_use]
    pub fn executor(&self) -> &'static str {
        match self {
            Step::Route(_) => "routes",
            Step::Firewall(_) => "firewall",
            Step::Connection(_) => "conntrack",
            Step::RemoveRemnant(_) => "remnants",
        }
    }

    /// The pod that the step is about.
    #[must_use]
    pub fn pod(&self) -> Option<IpAddr> {
        match self {
            Step::Firewall(step) => step.pod(),
            Step::Connection(
                ConnectionStep::Forget(pod)
                | ConnectionStep::ElicitAck(pod)
                | ConnectionStep::Resume { pod, .. },
            ) => Some(*pod),
            Step::Route(_) | Step::Connection(_) | Step::RemoveRemnant(_) => None,
        }
    }

    /// Whether it changes more than what is in doubt: a look for wrong sources comes with every look at the kernel.
    #[must_use]
    pub fn is_change(&self) -> bool {
        !matches!(
            self,
            Step::Connection(ConnectionStep::ForgetWrongSource { .. })
        )
    }

    /// Whether this step must not be tried when `failed` could not be done: it would open what the other should
    /// have closed. Blocking a pod is always safe. So is whatever comes after a missing gateway route, because
    /// the fallback below it rejects.
    #[must_use]
    pub fn needs(&self, failed: &Step) -> bool {
        use FirewallStep::{AddNet, AddPod, AddVip, Install, RemoveNet, Translate};
        use RouteStep::{AddFallback, AddRule, RemoveRule};
        // Until ours does all of the work, it is done by what is left.
        if let Step::RemoveRemnant(_) = self {
            return true;
        }
        // Where routes and translation do not agree on what is excluded, the pod's own address leaves.
        if let (
            Step::Firewall(RemoveNet(NetSet::Excluded, net)),
            Step::Route(RemoveRule(_, rule)),
        )
        | (Step::Route(AddRule(_, rule)), Step::Firewall(AddNet(NetSet::Excluded, net))) =
            (self, failed)
        {
            return rule.to == Some(*net);
        }
        let blocks = matches!(self, Step::Firewall(AddPod(PodSet::Blocked, _)));
        let Some(pod) = self.pod().filter(|_| !blocks) else {
            return false;
        };
        match failed {
            Step::Route(AddRule(family, _) | AddFallback(family, _))
            | Step::Firewall(Install(family, _)) => Family::of(pod) == *family,
            Step::Firewall(AddNet(NetSet::Excluded, net)) => {
                Family::of(pod) == Family::of_net(*net)
            }
            Step::Firewall(AddVip(failed)) => {
                matches!(self, Step::Firewall(Translate { vip, .. }) if vip == failed)
            }
            _ => failed.pod() == Some(pod),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Route(step) => step.fmt(f),
            Step::Firewall(step) => step.fmt(f),
            Step::Connection(step) => step.fmt(f),
            Step::RemoveRemnant(remnant) => write!(f, "remove {remnant}"),
        }
    }
}

impl fmt::Display for RouteStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RouteStep::AddRule(family, rule) => write!(f, "add {family} rule {rule}"),
            RouteStep::RemoveRule(family, rule) => write!(f, "remove {family} rule {rule}"),
            RouteStep::AddFallback(family, table) => {
                write!(f, "add the unreachable {family} default of table {table}")
            }
            RouteStep::RemoveFallback(family, table) => write!(
                f,
                "remove the unreachable {family} default of table {table}"
            ),
            RouteStep::SetGateway(table, hop) => write!(f, "route table {table} via {hop}"),
            RouteStep::RemoveGateway(table, hop) => {
                write!(f, "remove from table {table} the route via {hop}")
            }
        }
    }
}

impl fmt::Display for FirewallStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FirewallStep::Install(family, vips) => {
                write!(f, "install the {family} firewall with {} VIPs", vips.len())
            }
            FirewallStep::Remove(family) => write!(f, "remove the {family} firewall"),
            FirewallStep::AddVip(vip) => write!(f, "add VIP {vip}"),
            FirewallStep::RemoveVip(vip) => write!(f, "remove VIP {vip}"),
            FirewallStep::AddNet(set, net) => write!(f, "add {net} to the {set}"),
            FirewallStep::RemoveNet(set, net) => write!(f, "remove {net} from the {set}"),
            FirewallStep::AddPod(set, pod) => write!(f, "add {pod} to the {set}"),
            FirewallStep::RemovePod(set, pod) => write!(f, "remove {pod} from the {set}"),
            FirewallStep::Translate { pod, vip } => write!(f, "translate pod {pod} to {vip}"),
            FirewallStep::Untranslate { pod, vip } => {
                write!(f, "no longer translate pod {pod} to {vip}")
            }
            FirewallStep::Mark { pod, mark } => write!(f, "mark pod {pod} with {mark}"),
            FirewallStep::Unmark(pod) => write!(f, "no longer mark pod {pod}"),
        }
    }
}

impl fmt::Display for ConnectionStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConnectionStep::Forget(pod) => write!(f, "forget the connections of pod {pod}"),
            ConnectionStep::Resume { pod, source } => {
                write!(f, "resume the connections of pod {pod} as {source}")
            }
            ConnectionStep::ElicitAck(pod) => {
                write!(f, "elicit an ACK of pod {pod} on each of its connections")
            }
            ConnectionStep::ForgetWrongSource { sources, vips } => write!(
                f,
                "forget connections of {} pods that have another source than theirs, and unreplied ones to {} VIPs",
                sources.len(),
                vips.len()
            ),
            ConnectionStep::ForgetNewlyExcluded { pods, nets } => {
                let nets: Vec<String> = nets.iter().map(IpNet::to_string).collect();
                let (pods, nets) = (pods.len(), nets.join(", "));
                write!(f, "forget connections of {pods} pods to {nets}")
            }
        }
    }
}
