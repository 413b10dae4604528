//! The vocabulary of a node's kernel: what of ours is in it, what should be, and the steps between.
//!
//! Plain values without I/O, shared by `plan` (which makes the wanted [`KernelState`]), `kernel` (which reads
//! the present one and executes [`Step`]s) and `diff` (which orders the steps).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

/// An IP address family. Everything is kept for each family by itself: they share no kernel object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families, in the order in which they are worked on.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// The family of an address.
    #[must_use]
    pub fn of(address: IpAddr) -> Family {
        if address.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        }
    }

    /// The family of a network.
    #[must_use]
    pub fn of_net(net: IpNet) -> Family {
        Family::of(net.addr())
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// A routing table of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId(pub u32);

impl fmt::Display for TableId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A value of the packet mark within a mask: the bits outside the mask belong to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mark {
    /// The bits to set or to compare, all within `mask`.
    pub value: u32,
    /// The bits that count.
    pub mask: u32,
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}/{:#x}", self.value, self.mask)
    }
}

/// What a routing rule does with a packet that it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuleAction {
    /// Nothing: the target of `Goto` rules.
    Nop,
    /// Route by a table; without a match there, go on with the next rule.
    Lookup(TableId),
    /// Reject with an ICMP error.
    Unreachable,
    /// Go on at the rule with this priority.
    Goto(u32),
}

/// A routing policy rule (`ip rule`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// Place in the list of rules, lowest first. Rules of others may share it.
    pub priority: u32,
    /// What happens to matching packets.
    pub action: RuleAction,
    /// Match on the packet mark.
    pub mark: Option<Mark>,
    /// The match is inverted as a whole (`ip rule add not …`).
    pub not: bool,
    /// Match on the source.
    pub from: Option<IpAddr>,
    /// Match on the destination.
    pub to: Option<IpNet>,
}

impl fmt::Display for Rule {
    /// The form that `ip rule` takes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pref {}", self.priority)?;
        if self.not {
            f.write_str(" not")?;
        }
        if let Some(from) = self.from {
            write!(f, " from {from}")?;
        }
        if let Some(to) = self.to {
            write!(f, " to {to}")?;
        }
        if let Some(mark) = self.mark {
            write!(f, " fwmark {mark}")?;
        }
        match self.action {
            RuleAction::Nop => f.write_str(" nop"),
            RuleAction::Lookup(table) => write!(f, " lookup {table}"),
            RuleAction::Unreachable => f.write_str(" unreachable"),
            RuleAction::Goto(priority) => write!(f, " goto {priority}"),
        }
    }
}

/// Where a routing table sends its packets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NextHop {
    /// Address of the gateway node.
    pub via: IpAddr,
    /// Name of the interface on which the gateway is directly reachable.
    pub dev: String,
}

impl fmt::Display for NextHop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} dev {}", self.via, self.dev)
    }
}

/// One routing table of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// The `unreachable` default route with the worst metric is there: without it a table that lost its
    /// gateway is empty, the lookup falls through to `main`, and the packet leaks.
    pub fallback: bool,
    /// The default route to the gateway.
    pub gateway: Option<NextHop>,
}

/// Rules and tables of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteState {
    /// Our rules: in the kernel those with our protocol number, wherever they stand.
    pub rules: BTreeSet<Rule>,
    /// Our tables.
    pub tables: BTreeMap<TableId, Table>,
}

/// Whether the static part of the firewall (chains, jumps, sets) is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Skeleton {
    /// Nothing of ours.
    #[default]
    Absent,
    /// Something is missing or changed; the text says what, for the log.
    Damaged(String),
    /// All there, in the right order.
    Intact,
}

/// What this node does with one egress pod. The flags are independent because a crash can leave any of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodState {
    /// An egress pod: its connections pass our NAT, and what escapes it is dropped.
    pub egress: bool,
    /// The VIPs that it is translated to when it is not marked: one, or two in the middle of a change.
    pub vips: BTreeSet<IpAddr>,
    /// The mark that routes it to its gateway; none where this node is the gateway or the pod is elsewhere.
    pub mark: Option<Mark>,
    /// This node is the pod's gateway. Kept in the kernel so that a restarted agent knows whose connections
    /// became stale while it was away.
    pub gateway_here: bool,
    /// For a while this node may have been no gateway of it. Only the agent knows, see [`KernelState::interrupt`].
    pub interrupted: bool,
    /// It has no way out: rejected.
    pub blocked: bool,
    /// Known to be no egress pod; told only where pods wait for that.
    pub ordinary: bool,
}

/// Firewall of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FirewallState {
    /// Chains, jumps and static sets.
    pub skeleton: Skeleton,
    /// Destinations that are not egress.
    pub excluded: BTreeSet<IpNet>,
    /// Pod networks of the other nodes: what comes from there to outside must be known here.
    pub remote_pods: BTreeSet<IpNet>,
    /// Pod networks of this node whose pods wait until they are classified.
    pub local_pods: BTreeSet<IpNet>,
    /// All egress VIPs; each has its translation and is guarded.
    pub vips: BTreeSet<IpAddr>,
    /// Pods by address: egress pods of every node of the cluster, and the free ones of this node.
    pub pods: BTreeMap<IpAddr, PodState>,
}

/// Everything of ours in one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FamilyState {
    /// Rules and tables.
    pub routes: RouteState,
    /// Chains and sets.
    pub firewall: FirewallState,
}

/// What does our work in another way: left by a start with another backend, or by an earlier release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Remnant {
    /// The table of the nftables backend.
    Nftables,
    /// Chains of the iptables backend on nf_tables.
    IptablesNft,
    /// Chains of the iptables backend on ip_tables.
    IptablesLegacy,
    /// Sets of the iptables backend.
    Ipsets,
    /// Chains, sets, rules and routes of releases before 0.3.
    EarlierRelease,
}

/// Everything of ours in a node's kernel. A family that the kernel does not have is absent from the map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelState {
    /// By family.
    pub families: BTreeMap<Family, FamilyState>,
    /// What is to go when the families are as wanted.
    pub remnants: BTreeSet<Remnant>,
    /// Connections may have been opened under other rules than these: before the agent was started, while
    /// something was damaged, or before a step that failed.
    pub doubt: bool,
}

impl fmt::Display for Remnant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Remnant::Nftables => "the table of the nftables backend",
            Remnant::IptablesNft => "the chains of the iptables backend in nf_tables mode",
            Remnant::IptablesLegacy => "the chains of the iptables backend in legacy mode",
            Remnant::Ipsets => "the sets of the iptables backend",
            Remnant::EarlierRelease => "what a release before 0.3 left",
        })
    }
}

impl PodState {
    fn is_empty(&self) -> bool {
        *self == PodState::default()
    }
}

impl KernelState {
    /// What a step does to the state when it succeeds.
    pub fn apply(&mut self, step: &Step) {
        match step {
            Step::AddRule(family, rule) => {
                self.family(*family).routes.rules.insert(*rule);
            }
            Step::RemoveRule(family, rule) => {
                self.family(*family).routes.rules.remove(rule);
            }
            Step::AddFallback(family, table) => self.table(*family, *table, |t| t.fallback = true),
            Step::RemoveFallback(family, table) => {
                self.table(*family, *table, |t| t.fallback = false)
            }
            Step::SetGateway(table, hop) => {
                self.table(Family::of(hop.via), *table, |t| {
                    t.gateway = Some(hop.clone())
                });
            }
            Step::RemoveGateway(table, hop) => {
                self.table(Family::of(hop.via), *table, |t| t.gateway = None);
            }
            Step::InstallFirewall(family, vips) => {
                let firewall = &mut self.family(*family).firewall;
                firewall.skeleton = Skeleton::Intact;
                firewall.vips.clone_from(vips);
                for pod in firewall.pods.values_mut() {
                    pod.vips.retain(|vip| vips.contains(vip));
                }
                firewall.pods.retain(|_, pod| !pod.is_empty());
            }
            Step::RemoveFirewall(family) => {
                self.family(*family).firewall = FirewallState::default();
            }
            Step::AddVip(vip) => {
                self.firewall(*vip).vips.insert(*vip);
            }
            Step::RemoveVip(vip) => {
                let firewall = self.firewall(*vip);
                firewall.vips.remove(vip);
                for pod in firewall.pods.values_mut() {
                    pod.vips.remove(vip);
                }
                firewall.pods.retain(|_, pod| !pod.is_empty());
            }
            Step::Exclude(net) => {
                self.firewall(net.addr()).excluded.insert(*net);
            }
            Step::Include(net) => {
                self.firewall(net.addr()).excluded.remove(net);
            }
            Step::AddRemotePods(net) => {
                self.firewall(net.addr()).remote_pods.insert(*net);
            }
            Step::RemoveRemotePods(net) => {
                self.firewall(net.addr()).remote_pods.remove(net);
            }
            Step::AddLocalPods(net) => {
                self.firewall(net.addr()).local_pods.insert(*net);
            }
            Step::RemoveLocalPods(net) => {
                self.firewall(net.addr()).local_pods.remove(net);
            }
            Step::Know(pod) => self.pod(*pod, |p| p.egress = true),
            Step::Unknow(pod) => self.pod(*pod, |p| p.egress = false),
            Step::Translate { pod, vip } => self.pod(*pod, |p| {
                p.vips.insert(*vip);
            }),
            Step::Untranslate { pod, vip } => self.pod(*pod, |p| {
                p.vips.remove(vip);
            }),
            Step::Mark { pod, mark } => self.pod(*pod, |p| p.mark = Some(*mark)),
            Step::Unmark(pod) => self.pod(*pod, |p| p.mark = None),
            Step::Gateway(pod) => {
                self.pod(*pod, |p| (p.gateway_here, p.interrupted) = (true, false))
            }
            Step::Ungateway(pod) => {
                self.pod(*pod, |p| (p.gateway_here, p.interrupted) = (false, false))
            }
            Step::Block(pod) => self.pod(*pod, |p| p.blocked = true),
            Step::Unblock(pod) => self.pod(*pod, |p| p.blocked = false),
            Step::Free(pod) => self.pod(*pod, |p| p.ordinary = true),
            Step::Unfree(pod) => self.pod(*pod, |p| p.ordinary = false),
            Step::ForgetConnections(_)
            | Step::Wake(_)
            | Step::ForgetNewlyExcluded { .. }
            | Step::ResumeConnections { .. } => {}
            Step::ForgetWrongSource { .. } => self.doubt = false,
            Step::RemoveRemnant(remnant) => {
                self.remnants.remove(remnant);
            }
        }
    }

    /// Notes that the node may have been no gateway of these VIPs for a while: what it knows of their pods' connections
    /// may be old, and to go on being the gateway begins with taking them up anew.
    pub fn interrupt(&mut self, vips: &BTreeSet<IpAddr>) {
        let families = self.families.values_mut();
        for pod in families.flat_map(|family| family.firewall.pods.values_mut()) {
            pod.interrupted |= pod.gateway_here && !pod.vips.is_disjoint(vips);
        }
    }

    fn family(&mut self, family: Family) -> &mut FamilyState {
        self.families.entry(family).or_default()
    }

    fn firewall(&mut self, address: IpAddr) -> &mut FirewallState {
        &mut self.family(Family::of(address)).firewall
    }

    fn pod(&mut self, pod: IpAddr, change: impl FnOnce(&mut PodState)) {
        let pods = &mut self.firewall(pod).pods;
        let state = pods.entry(pod).or_default();
        change(state);
        if state.is_empty() {
            pods.remove(&pod);
        }
    }

    fn table(&mut self, family: Family, id: TableId, change: impl FnOnce(&mut Table)) {
        let tables = &mut self.family(family).routes.tables;
        let table = tables.entry(id).or_default();
        change(table);
        if *table == Table::default() {
            tables.remove(&id);
        }
    }
}

/// One change to one object of the kernel: an intent, which each backend puts into its own form.
///
/// Every step is idempotent: adding what is there and removing what is absent succeeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Add a routing rule.
    AddRule(Family, Rule),
    /// Remove a routing rule of ours.
    RemoveRule(Family, Rule),
    /// Add the `unreachable` default route of a table.
    AddFallback(Family, TableId),
    /// Remove the `unreachable` default route of a table.
    RemoveFallback(Family, TableId),
    /// Add or replace the route to a table's gateway.
    SetGateway(TableId, NextHop),
    /// Remove the route to a table's gateway.
    RemoveGateway(TableId, NextHop),

    /// (Re)write chains, jumps and static sets, with the translations of these VIPs; members of sets stay.
    InstallFirewall(Family, BTreeSet<IpAddr>),
    /// Remove chains, jumps and all sets.
    RemoveFirewall(Family),
    /// Guard a VIP and prepare the translation to it.
    AddVip(IpAddr),
    /// Remove a VIP's guard and translation.
    RemoveVip(IpAddr),
    /// Packets to this network are not egress.
    Exclude(IpNet),
    /// Packets to this network are egress again.
    Include(IpNet),
    /// Packets from this network to outside must be of pods that are known here.
    AddRemotePods(IpNet),
    /// Lift that.
    RemoveRemotePods(IpNet),

    /// Packets from this network to outside must be of pods that are classified.
    AddLocalPods(IpNet),
    /// Lift that.
    RemoveLocalPods(IpNet),

    /// Make a pod an egress pod: what is not translated is dropped.
    Know(IpAddr),
    /// It is none any more.
    Unknow(IpAddr),
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
    /// Remember that this node is the pod's gateway.
    Gateway(IpAddr),
    /// It is not any more.
    Ungateway(IpAddr),
    /// Reject what the pod sends to outside.
    Block(IpAddr),
    /// Lift that.
    Unblock(IpAddr),
    /// Let a pod that is no egress pod go its way.
    Free(IpAddr),
    /// It is not known to be one any more.
    Unfree(IpAddr),

    /// Forget the connections that a pod opened to outside: their address translation is decided anew.
    ForgetConnections(IpAddr),

    /// Take up the connections of a pod that this node is the gateway of, wherever they are by now, and forget those with
    /// another source.
    ResumeConnections {
        /// Address of the pod.
        pod: IpAddr,
        /// The source that its packets leave with.
        source: IpAddr,
    },

    /// Have a pod of this node say something on each of its connections to outside, which take another way from now on: a
    /// gateway learns of a connection by what the pod sends, and a server has something to say when it likes.
    Wake(IpAddr),

    /// Forget what came about under other rules than the present ones.
    ForgetWrongSource {
        /// Connections that these pods opened to outside with another source than the one given for each.
        sources: BTreeMap<IpAddr, IpAddr>,
        /// Connections from outside to these VIPs that nobody has answered: a server's packet to a pod's connection makes
        /// one on a node that has no guard yet, and it takes the pod's port.
        vips: BTreeSet<IpAddr>,
    },

    /// Forget what pods opened to destinations that are excluded from now on, other than by way of a Service.
    ForgetNewlyExcluded {
        /// Addresses of the pods.
        pods: BTreeSet<IpAddr>,
        /// The destinations.
        nets: BTreeSet<IpNet>,
    },

    /// Remove what another backend or an earlier release left.
    RemoveRemnant(Remnant),
}

/// The part of the kernel that executes a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Executor {
    /// Routing rules and tables.
    Routes,
    /// The firewall backend.
    Firewall,
    /// Connection tracking.
    Conntrack,
    /// What removes the traces of others than the present backend.
    Remnants,
}

impl Step {
    /// Who executes this step.
    #[must_use]
    pub fn executor(&self) -> Executor {
        use Step::{
            AddFallback, AddLocalPods, AddRemotePods, AddRule, AddVip, Block, Exclude,
            ForgetConnections, ForgetNewlyExcluded, ForgetWrongSource, Free, Gateway, Include,
            InstallFirewall, Know, Mark, RemoveFallback, RemoveFirewall, RemoveGateway,
            RemoveLocalPods, RemoveRemnant, RemoveRemotePods, RemoveRule, RemoveVip,
            ResumeConnections, SetGateway, Translate, Unblock, Unfree, Ungateway, Unknow, Unmark,
            Untranslate, Wake,
        };
        match self {
            AddRule(..) | RemoveRule(..) | AddFallback(..) | RemoveFallback(..)
            | SetGateway(..) | RemoveGateway(..) => Executor::Routes,
            InstallFirewall(..)
            | RemoveFirewall(_)
            | AddVip(_)
            | RemoveVip(_)
            | Exclude(_)
            | Include(_)
            | AddRemotePods(_)
            | RemoveRemotePods(_)
            | AddLocalPods(_)
            | RemoveLocalPods(_)
            | Know(_)
            | Unknow(_)
            | Translate { .. }
            | Untranslate { .. }
            | Mark { .. }
            | Unmark(_)
            | Gateway(_)
            | Ungateway(_)
            | Block(_)
            | Unblock(_)
            | Free(_)
            | Unfree(_) => Executor::Firewall,
            ForgetConnections(_)
            | ResumeConnections { .. }
            | Wake(_)
            | ForgetWrongSource { .. }
            | ForgetNewlyExcluded { .. } => Executor::Conntrack,
            RemoveRemnant(_) => Executor::Remnants,
        }
    }
}

impl Step {
    /// The pod that the step is about.
    #[must_use]
    pub fn pod(&self) -> Option<IpAddr> {
        match self {
            Step::Know(pod)
            | Step::Unknow(pod)
            | Step::Unmark(pod)
            | Step::Gateway(pod)
            | Step::Ungateway(pod)
            | Step::Block(pod)
            | Step::Unblock(pod)
            | Step::Free(pod)
            | Step::Unfree(pod)
            | Step::ForgetConnections(pod)
            | Step::Wake(pod)
            | Step::ResumeConnections { pod, .. }
            | Step::Mark { pod, .. }
            | Step::Translate { pod, .. }
            | Step::Untranslate { pod, .. } => Some(*pod),
            _ => None,
        }
    }

    /// Whether it changes more than what is in doubt: looking for strays comes with every look at the kernel.
    #[must_use]
    pub fn is_change(&self) -> bool {
        !matches!(self, Step::ForgetWrongSource { .. })
    }

    /// Whether this step must not be tried when `failed` could not be done: it would open what the other should
    /// have closed. Blocking a pod is always safe. So is whatever comes after a missing gateway route, because
    /// the fallback below it rejects.
    #[must_use]
    pub fn needs(&self, failed: &Step) -> bool {
        // Until ours does all of the work, it is done by what is left.
        if let Step::RemoveRemnant(_) = self {
            return true;
        }
        // Where routes and translation do not agree on what is excluded, the pod's own address leaves.
        if let (Step::Include(net), Step::RemoveRule(_, rule))
        | (Step::AddRule(_, rule), Step::Exclude(net)) = (self, failed)
        {
            return rule.to == Some(*net);
        }
        let Some(pod) = self.pod().filter(|_| !matches!(self, Step::Block(_))) else {
            return false;
        };
        match failed {
            Step::AddRule(family, _)
            | Step::AddFallback(family, _)
            | Step::InstallFirewall(family, _) => Family::of(pod) == *family,
            Step::Exclude(net) => Family::of(pod) == Family::of_net(*net),
            Step::AddVip(failed) => matches!(self, Step::Translate { vip, .. } if vip == failed),
            _ => failed.pod() == Some(pod),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::AddRule(family, rule) => write!(f, "add {family} rule {rule}"),
            Step::RemoveRule(family, rule) => write!(f, "remove {family} rule {rule}"),
            Step::AddFallback(family, table) => {
                write!(f, "add the unreachable {family} default of table {table}")
            }
            Step::RemoveFallback(family, table) => {
                write!(
                    f,
                    "remove the unreachable {family} default of table {table}"
                )
            }
            Step::SetGateway(table, hop) => write!(f, "route table {table} via {hop}"),
            Step::RemoveGateway(table, hop) => {
                write!(f, "remove from table {table} the route via {hop}")
            }
            Step::InstallFirewall(family, vips) => {
                write!(f, "install the {family} firewall with {} VIPs", vips.len())
            }
            Step::RemoveFirewall(family) => write!(f, "remove the {family} firewall"),
            Step::AddVip(vip) => write!(f, "add VIP {vip}"),
            Step::RemoveVip(vip) => write!(f, "remove VIP {vip}"),
            Step::Exclude(net) => write!(f, "exclude {net}"),
            Step::Include(net) => write!(f, "include {net}"),
            Step::AddRemotePods(net) => write!(f, "add remote pod network {net}"),
            Step::RemoveRemotePods(net) => write!(f, "remove remote pod network {net}"),
            Step::AddLocalPods(net) => write!(f, "add local pod network {net}"),
            Step::RemoveLocalPods(net) => write!(f, "remove local pod network {net}"),
            Step::Know(pod) => write!(f, "know pod {pod}"),
            Step::Unknow(pod) => write!(f, "no longer know pod {pod}"),
            Step::Translate { pod, vip } => write!(f, "translate pod {pod} to {vip}"),
            Step::Untranslate { pod, vip } => write!(f, "no longer translate pod {pod} to {vip}"),
            Step::Mark { pod, mark } => write!(f, "mark pod {pod} with {mark}"),
            Step::Unmark(pod) => write!(f, "no longer mark pod {pod}"),
            Step::Gateway(pod) => write!(f, "be the gateway of pod {pod}"),
            Step::Ungateway(pod) => write!(f, "no longer be the gateway of pod {pod}"),
            Step::Block(pod) => write!(f, "block pod {pod}"),
            Step::Unblock(pod) => write!(f, "unblock pod {pod}"),
            Step::Free(pod) => write!(f, "free pod {pod}"),
            Step::Unfree(pod) => write!(f, "no longer free pod {pod}"),
            Step::ForgetConnections(pod) => write!(f, "forget the connections of pod {pod}"),
            Step::ResumeConnections { pod, source } => {
                write!(f, "resume the connections of pod {pod} as {source}")
            }
            Step::Wake(pod) => write!(f, "have pod {pod} speak on its connections"),
            Step::ForgetWrongSource { sources, vips } => write!(
                f,
                "forget connections of {} pods that have another source than theirs, and unanswered ones to {} VIPs",
                sources.len(),
                vips.len()
            ),
            Step::ForgetNewlyExcluded { pods, nets } => {
                let nets: Vec<String> = nets.iter().map(IpNet::to_string).collect();
                let (pods, nets) = (pods.len(), nets.join(", "));
                write!(f, "forget connections of {pods} pods to {nets}")
            }
            Step::RemoveRemnant(remnant) => write!(f, "remove {remnant}"),
        }
    }
}
