//! The steps that change a kernel, by who executes them.
//!
//! A step is an intent on one object; each backend puts it into its own form. Every step is idempotent: adding what is
//! there and removing what is absent succeeds.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use derive_more::{Display, From};
use ipnet::IpNet;
use strum::{IntoStaticStr, VariantNames};

use crate::state::{Family, Landmark, Mark, NetSet, NextHop, PodSet, Remnant, Rule, TableId};

/// One change to one object of the kernel.
#[derive(Clone, Debug, Display, From, PartialEq, Eq)]
pub enum Step {
    Route(RouteStep),
    Firewall(FirewallStep),
    Connection(ConnectionStep),
    /// Let packets from these networks, and the answers to them, pass iptables' FORWARD whatever its policy; without any,
    /// the chain that does so is removed.
    #[display("accept {_0} packets of {} in iptables' FORWARD", joined(_1))]
    #[from(skip)]
    Accept(Family, BTreeSet<IpNet>),
    #[display("remove {_0}")]
    RemoveRemnant(Remnant),
}

/// A change of routing rules and tables.
#[derive(Clone, Debug, Display, IntoStaticStr, PartialEq, Eq, VariantNames)]
pub enum RouteStep {
    #[display("add {_0} rule {_1}")]
    AddRule(Family, Rule),
    #[display("remove {_0} rule {_1}")]
    RemoveRule(Family, Rule),
    #[display("add the unreachable {_0} default of table {_1}")]
    AddFallback(Family, TableId),
    #[display("remove the unreachable {_0} default of table {_1}")]
    RemoveFallback(Family, TableId),
    /// Replaces any other.
    #[display("route table {_0} via {_1}")]
    SetGateway(TableId, NextHop),
    #[display("remove from table {_0} the route via {_1}")]
    RemoveGateway(TableId, NextHop),
    #[display("let table {_0} leave {_1} to later rules")]
    AddThrow(TableId, IpNet),
    #[display("let table {_0} decide about {_1}")]
    RemoveThrow(TableId, IpNet),
}

/// A change of chains and sets.
#[derive(Clone, Debug, Display, IntoStaticStr, PartialEq, Eq, VariantNames)]
pub enum FirewallStep {
    /// (Re)write chains, jumps and static sets, with the translations of these VIPs; members of sets stay.
    #[display("install the {_0} firewall with {} VIPs", _1.len())]
    Install(Family, BTreeSet<IpAddr>),
    /// Remove chains, jumps and all sets.
    #[display("remove the {_0} firewall")]
    Remove(Family),
    /// Guard a VIP and prepare the translation to it.
    #[display("add VIP {_0}")]
    AddVip(IpAddr),
    #[display("remove VIP {_0}")]
    RemoveVip(IpAddr),
    #[display("add {_1} to the {_0}")]
    AddNet(NetSet, IpNet),
    #[display("remove {_1} from the {_0}")]
    RemoveNet(NetSet, IpNet),
    #[display("know the {_0} {_1}")]
    AddLandmark(Family, Landmark),
    #[display("no longer know the {_0} {_1}")]
    RemoveLandmark(Family, Landmark),
    #[display("add {_1} to the {_0}")]
    AddPod(PodSet, IpAddr),
    #[display("remove {_1} from the {_0}")]
    RemovePod(PodSet, IpAddr),
    /// Translate a pod to a VIP where it is not marked.
    #[display("translate pod {pod} to {vip}")]
    Translate { pod: IpAddr, vip: IpAddr },
    #[display("no longer translate pod {pod} to {vip}")]
    Untranslate { pod: IpAddr, vip: IpAddr },
    /// Route a pod to its gateway by this mark, instead of any other that it had.
    #[display("mark pod {pod} with {mark}")]
    Mark { pod: IpAddr, mark: Mark },
    #[display("no longer mark pod {_0}")]
    Unmark(IpAddr),
}

/// A change of what the kernel and the pods know of connections.
#[derive(Clone, Debug, Display, IntoStaticStr, PartialEq, Eq, VariantNames)]
pub enum ConnectionStep {
    /// Forget the connections that a pod opened to outside: their address translation is decided anew.
    #[display("forget the connections of pod {_0}")]
    Forget(IpAddr),
    /// Keep the connections of a pod that this node is the gateway of, wherever their TCP windows are by now, and forget
    /// those with another source than the one that its packets leave with.
    #[display("resume the connections of pod {pod} as {source}")]
    Resume { pod: IpAddr, source: IpAddr },
    /// Make a local pod send one packet on each TCP connection to outside: its path has changed, and the new gateway has
    /// no conntrack entry, so drops the server's packets, until it sees one of the pod's.
    #[display("elicit an ACK of pod {_0} on each of its connections")]
    ElicitAck(IpAddr),
    /// Forget what came about under other rules than the present ones.
    #[display(
        "forget connections of {} pods that have another source than theirs, unreplied ones to {} VIPs, and those to {} \
         pods that nobody guarded",
        sources.len(),
        vips.len(),
        unguarded.len()
    )]
    ForgetWrongSource {
        /// Connections that these pods opened to outside with another source than the one given for each.
        sources: BTreeMap<IpAddr, IpAddr>,
        /// Unreplied entries to these VIPs: a server's packet that came before the guard was in place created one; it
        /// occupies VIP:port, and SNAT would remap the pod's connection to another port.
        vips: BTreeSet<IpAddr>,
        /// Entries from outside to these pods' own addresses, of protocols in which any packet may begin a connection:
        /// while the guard was not whole, the server's next packet of a connection that was lost here has begun them.
        unguarded: BTreeSet<IpAddr>,
    },
    /// Forget what pods opened to destinations that are excluded from now on, other than by way of a Service.
    #[display("forget connections of {} pods to {}", pods.len(), joined(nets))]
    ForgetNewlyExcluded {
        pods: BTreeSet<IpAddr>,
        nets: BTreeSet<IpNet>,
    },
}

impl FirewallStep {
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
            | FirewallStep::RemoveNet(..)
            | FirewallStep::AddLandmark(..)
            | FirewallStep::RemoveLandmark(..) => None,
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
            Step::Accept(..) => "filter",
            Step::RemoveRemnant(_) => "remnants",
        }
    }

    #[must_use]
    pub fn pod(&self) -> Option<IpAddr> {
        match self {
            Step::Firewall(step) => step.pod(),
            Step::Connection(
                ConnectionStep::Forget(pod)
                | ConnectionStep::ElicitAck(pod)
                | ConnectionStep::Resume { pod, .. },
            ) => Some(*pod),
            Step::Route(_) | Step::Connection(_) | Step::Accept(..) | Step::RemoveRemnant(_) => {
                None
            }
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
        use RouteStep::{AddFallback, AddRule, AddThrow, RemoveThrow};
        // Until ours does all of the work, it is done by what is left.
        if let Step::RemoveRemnant(_) = self {
            return true;
        }
        // Where routes and translation do not agree on what is excluded, the pod's own address leaves.
        if let (
            Step::Firewall(RemoveNet(NetSet::Excluded, net)),
            Step::Route(RemoveThrow(_, thrown)),
        )
        | (Step::Route(AddThrow(_, thrown)), Step::Firewall(AddNet(NetSet::Excluded, net))) =
            (self, failed)
        {
            return net.contains(thrown);
        }
        let blocks = matches!(self, Step::Firewall(AddPod(PodSet::Blocked, _)));
        let Some(pod) = self.pod().filter(|_| !blocks) else {
            return false;
        };
        match failed {
            Step::Route(AddRule(_, Rule { from: Some(of), .. })) => pod == *of,
            Step::Route(AddRule(family, _) | AddFallback(family, _))
            | Step::Firewall(Install(family, _)) => Family::of(pod) == *family,
            Step::Route(AddThrow(_, net)) | Step::Firewall(AddNet(NetSet::Excluded, net)) => {
                Family::of(pod) == Family::of_net(*net)
            }
            Step::Firewall(AddVip(failed)) => {
                matches!(self, Step::Firewall(Translate { vip, .. }) if vip == failed)
            }
            _ => failed.pod() == Some(pod),
        }
    }
}

fn joined(nets: &BTreeSet<IpNet>) -> String {
    if nets.is_empty() {
        return "nobody".to_owned();
    }
    let nets: Vec<String> = nets.iter().map(IpNet::to_string).collect();
    nets.join(", ")
}
