//! The vocabulary of a node's kernel: what of ours is in it, what should be, and the steps between.
//!
//! Plain values without I/O, shared by `plan` (which makes the wanted [`KernelState`]), `kernel` (which reads
//! the present one and executes [`Step`]s) and `diff` (which orders the steps).

mod obstacle;
mod routing;
mod step;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use derive_more::Display;
use ipnet::IpNet;
use strum::{IntoStaticStr, VariantNames};

use crate::ethernet::Mac;
use crate::names::{Interface, Reach};

pub use self::obstacle::{DroppingFilter, Obstacle, Passage, ReversePath, RuleAhead, Surroundings};
pub use self::routing::{
    Mark, NextHop, NextHops, RouteState, Rule, RuleAction, Table, TableId, Way,
};
pub use self::step::{ConnectionStep, FirewallStep, RouteStep, Step};

/// An IP address family. Everything is kept for each family by itself, though nftables has both in one table.
#[derive(Clone, Copy, Debug, Display, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    #[display("IPv4")]
    V4,
    #[display("IPv6")]
    V6,
}

impl Family {
    /// Both families, in the order in which they are worked on.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    #[must_use]
    pub fn of(address: IpAddr) -> Family {
        if address.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        }
    }

    #[must_use]
    pub fn of_net(net: IpNet) -> Family {
        Family::of(net.addr())
    }
}

/// Whether the static part of the firewall (chains, jumps, sets) is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Skeleton {
    #[default]
    Absent,
    /// Something is missing or changed; the text says what, for the log.
    Damaged(String),
    Intact,
}

/// A set of pods in the kernel: one flag of [`PodState`] each.
#[derive(
    Clone, Copy, Debug, Display, IntoStaticStr, PartialEq, Eq, PartialOrd, Ord, VariantNames,
)]
pub enum PodSet {
    /// Egress pods: their connections pass our NAT, and what escapes it is dropped.
    #[display("egress pods")]
    Egress,
    /// Pods whose gateway this node is. No rule looks there: a restarted agent knows by it whose connections became
    /// stale while it was away.
    #[display("pods whose gateway this node is")]
    GatewayHere,
    /// Pods without a way out: rejected.
    #[display("blocked pods")]
    Blocked,
    /// Pods of this node that are known to be no egress pods; kept only where pods wait for that.
    #[display("ordinary pods")]
    Ordinary,
}

impl PodSet {
    pub const ALL: [PodSet; 4] = [
        PodSet::Egress,
        PodSet::GatewayHere,
        PodSet::Blocked,
        PodSet::Ordinary,
    ];
}

/// A set of networks in the kernel.
#[derive(
    Clone, Copy, Debug, Display, IntoStaticStr, PartialEq, Eq, PartialOrd, Ord, VariantNames,
)]
pub enum NetSet {
    #[display("excluded destinations")]
    Excluded,
    /// Pod networks of the other nodes: what comes from there to outside must be of an egress pod.
    #[display("remote pod networks")]
    RemotePods,
    /// Pod networks of this node whose pods wait until they are classified.
    #[display("local pod networks")]
    LocalPods,
}

impl NetSet {
    pub const ALL: [NetSet; 3] = [NetSet::Excluded, NetSet::RemotePods, NetSet::LocalPods];
}

/// What tells guards where a packet goes, or where it comes from.
#[derive(Clone, Debug, Display, PartialEq, Eq, PartialOrd, Ord)]
pub enum Landmark {
    /// What a mark stands for. A mark alone is no way: rules of others may come ahead of ours, and ours may be lost.
    #[display("way of mark {_0}")]
    Way(Way),
    /// The link-layer address of another node: what it hands over from outside belongs to a connection of a pod.
    #[display("node at {_0}")]
    Node(Mac),
    /// An interface on which VIPs are announced: a packet to a VIP that would leave by the interface it came in by was meant
    /// for this node.
    #[display("LAN interface {_0}")]
    Lan(String),
}

/// What this node does with one pod. The flags are independent because a crash can leave any of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodState {
    pub egress: bool,
    /// The VIPs that it is translated to when it is not marked: one, or two in the middle of a change.
    pub vips: BTreeSet<IpAddr>,
    /// The mark that routes it to its gateway; none where this node is the gateway or the pod is elsewhere.
    pub mark: Option<Mark>,
    pub gateway_here: bool,
    /// The VIP may have been announced elsewhere since the last pass, so conntrack entries here may be stale. Set by the
    /// agent, never read from the kernel: see [`KernelState::interrupt`].
    pub interrupted: bool,
    pub blocked: bool,
    pub ordinary: bool,
}

/// Firewall of one family; its networks are the sets of [`NetSet`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FirewallState {
    pub skeleton: Skeleton,
    pub excluded: BTreeSet<IpNet>,
    pub remote_pods: BTreeSet<IpNet>,
    pub local_pods: BTreeSet<IpNet>,
    /// All egress VIPs; each has its translation and is guarded.
    pub vips: BTreeSet<IpAddr>,
    pub landmarks: BTreeSet<Landmark>,
    /// Pods by address: egress pods of every node of the cluster, and the ordinary ones of this node.
    pub pods: BTreeMap<IpAddr, PodState>,
}

/// Everything of ours in one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FamilyState {
    pub routes: RouteState,
    pub firewall: FirewallState,
}

/// What does our work in another way: left by a start with another backend, or by an earlier release.
#[derive(
    Clone, Copy, Debug, Display, IntoStaticStr, PartialEq, Eq, PartialOrd, Ord, VariantNames,
)]
pub enum Remnant {
    #[display("the table of the nftables backend")]
    Nftables,
    #[display("the chains of the iptables backend in nf_tables mode")]
    IptablesNft,
    #[display("the chains of the iptables backend in legacy mode")]
    IptablesLegacy,
    #[display("the sets of the iptables backend")]
    Ipsets,
    /// Chains, sets, rules and routes.
    #[display("what a release before 0.3 left")]
    EarlierRelease,
}

/// What our chain in iptables' FORWARD accepts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// Something is missing or changed.
    Damaged,
    /// Packets from there, and what belongs to connections that were opened from there.
    Sources(BTreeSet<IpNet>),
}

/// Everything of ours in a node's kernel. A family that the kernel does not have is absent from the map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelState {
    pub families: BTreeMap<Family, FamilyState>,
    /// What a rule of ours lets pass iptables' FORWARD, by family; absent where there is none.
    pub accepted: BTreeMap<Family, Accepted>,
    /// What is to go when the families are as wanted.
    pub remnants: BTreeSet<Remnant>,
    /// Connections may have been opened under other rules than these: before the agent was started, while
    /// something was damaged, or before a step that failed.
    pub doubt: bool,
}

/// How long replies to forgotten connections are still dropped. Old gateway and server normally learn of the change
/// within seconds.
pub const LATE_REPLY_SECONDS: u32 = 60;

/// What a node's kernel and its firewall backend are like, as far as a plan depends on it. Fixed while the agent runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traits {
    /// Marks are set before DNAT, so on packets inside the cluster too: routing has to leave them alone.
    pub marks_before_dnat: bool,
    /// Others may set our bits of the mark: it counts only together with a pod's address.
    pub mask_is_shared: bool,
}

/// What else uses marks and priorities of routing rules on a node, as far as it shows itself, and where ours were.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    pub own: Vec<Rule>,
    pub others: Vec<Rule>,
    /// The names of all interfaces.
    pub interfaces: BTreeSet<String>,
}

/// Addresses of others that the kernel is asked about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Those of nodes.
    pub nodes: BTreeSet<IpAddr>,
    pub vips: BTreeSet<IpAddr>,
}

/// What was read of a node's kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    pub state: KernelState,
    pub traits: Traits,
    /// The interfaces that are up, but for loopback.
    pub interfaces: Vec<Interface>,
    /// How addresses are reached, as far as they were asked for since.
    pub reach: BTreeMap<IpAddr, Reach>,
    /// The link-layer addresses of other nodes that are on link, as far as the kernel has learned them, by IP address.
    pub neighbours: BTreeMap<IpAddr, Mac>,
    /// Tables of our range that others use: not to be used by us.
    pub occupied: BTreeSet<(Family, TableId)>,
    /// What of the node itself and of others decides with us, by family.
    pub surroundings: BTreeMap<Family, Surroundings>,
    /// What could not be looked at although something of ours may be there, as sentences for the operator.
    pub unseen: BTreeSet<String>,
}

impl PodState {
    #[must_use]
    pub fn is_in(&self, set: PodSet) -> bool {
        match set {
            PodSet::Egress => self.egress,
            PodSet::GatewayHere => self.gateway_here,
            PodSet::Blocked => self.blocked,
            PodSet::Ordinary => self.ordinary,
        }
    }

    /// Puts the pod into a set, or takes it out.
    pub fn set(&mut self, set: PodSet, member: bool) {
        match set {
            PodSet::Egress => self.egress = member,
            PodSet::GatewayHere => (self.gateway_here, self.interrupted) = (member, false),
            PodSet::Blocked => self.blocked = member,
            PodSet::Ordinary => self.ordinary = member,
        }
    }

    fn is_empty(&self) -> bool {
        *self == PodState::default()
    }
}

impl FirewallState {
    #[must_use]
    pub fn nets(&self, set: NetSet) -> &BTreeSet<IpNet> {
        match set {
            NetSet::Excluded => &self.excluded,
            NetSet::RemotePods => &self.remote_pods,
            NetSet::LocalPods => &self.local_pods,
        }
    }

    pub fn nets_mut(&mut self, set: NetSet) -> &mut BTreeSet<IpNet> {
        match set {
            NetSet::Excluded => &mut self.excluded,
            NetSet::RemotePods => &mut self.remote_pods,
            NetSet::LocalPods => &mut self.local_pods,
        }
    }

    fn change_pod(&mut self, pod: IpAddr, change: impl FnOnce(&mut PodState)) {
        let state = self.pods.entry(pod).or_default();
        change(state);
        if state.is_empty() {
            self.pods.remove(&pod);
        }
    }

    fn retain_vips(&mut self, keep: impl Fn(&IpAddr) -> bool) {
        self.vips.retain(&keep);
        for pod in self.pods.values_mut() {
            pod.vips.retain(&keep);
        }
        self.pods.retain(|_, pod| !pod.is_empty());
    }
}

impl KernelState {
    /// What a step does to the state when it succeeds.
    pub fn apply(&mut self, step: &Step) {
        match step {
            Step::Route(step) => self.apply_route(step),
            Step::Firewall(step) => self.apply_firewall(step),
            Step::Connection(ConnectionStep::ForgetWrongSource { .. }) => self.doubt = false,
            // Connections are no part of the state.
            Step::Connection(
                ConnectionStep::Forget(_)
                | ConnectionStep::Resume { .. }
                | ConnectionStep::ElicitAck(_)
                | ConnectionStep::ForgetNewlyExcluded { .. },
            ) => {}
            Step::RemoveRemnant(remnant) => {
                self.remnants.remove(remnant);
            }
            Step::Accept(family, sources) if sources.is_empty() => {
                self.accepted.remove(family);
            }
            Step::Accept(family, sources) => {
                let sources = Accepted::Sources(sources.clone());
                self.accepted.insert(*family, sources);
            }
        }
    }

    fn apply_route(&mut self, step: &RouteStep) {
        match step {
            RouteStep::AddRule(family, rule) => {
                self.family(*family).routes.rules.insert(*rule);
            }
            RouteStep::RemoveRule(family, rule) => {
                self.family(*family).routes.rules.remove(rule);
            }
            RouteStep::AddFallback(family, table) => {
                self.table(*family, *table, |t| t.fallback = true);
            }
            RouteStep::RemoveFallback(family, table) => {
                self.table(*family, *table, |t| t.fallback = false);
            }
            RouteStep::SetGateway(table, hop) => {
                let gateway = Some(hop.clone());
                self.table(Family::of(hop.via), *table, |t| t.gateway = gateway);
            }
            RouteStep::RemoveGateway(table, hop) => {
                self.table(Family::of(hop.via), *table, |t| t.gateway = None);
            }
            RouteStep::AddThrow(table, net) => {
                self.table(Family::of_net(*net), *table, |t| {
                    t.throws.insert(*net);
                });
            }
            RouteStep::RemoveThrow(table, net) => {
                self.table(Family::of_net(*net), *table, |t| {
                    t.throws.remove(net);
                });
            }
        }
    }

    /// What a step of the firewall does to the state when it succeeds.
    pub fn apply_firewall(&mut self, step: &FirewallStep) {
        match step {
            FirewallStep::Install(family, vips) => {
                let firewall = &mut self.family(*family).firewall;
                firewall.skeleton = Skeleton::Intact;
                firewall.vips.clone_from(vips);
                firewall.retain_vips(|vip| vips.contains(vip));
            }
            FirewallStep::Remove(family) => {
                self.family(*family).firewall = FirewallState::default();
            }
            FirewallStep::AddVip(vip) => {
                self.firewall(*vip).vips.insert(*vip);
            }
            FirewallStep::RemoveVip(vip) => self.firewall(*vip).retain_vips(|other| other != vip),
            FirewallStep::AddNet(set, net) => {
                self.firewall(net.addr()).nets_mut(*set).insert(*net);
            }
            FirewallStep::RemoveNet(set, net) => {
                self.firewall(net.addr()).nets_mut(*set).remove(net);
            }
            FirewallStep::AddLandmark(family, landmark) => {
                let landmarks = &mut self.family(*family).firewall.landmarks;
                landmarks.insert(landmark.clone());
            }
            FirewallStep::RemoveLandmark(family, landmark) => {
                self.family(*family).firewall.landmarks.remove(landmark);
            }
            FirewallStep::AddPod(set, pod) => self.change_pod(*pod, |p| p.set(*set, true)),
            FirewallStep::RemovePod(set, pod) => self.change_pod(*pod, |p| p.set(*set, false)),
            FirewallStep::Translate { pod, vip } => self.change_pod(*pod, |p| {
                p.vips.insert(*vip);
            }),
            FirewallStep::Untranslate { pod, vip } => self.change_pod(*pod, |p| {
                p.vips.remove(vip);
            }),
            FirewallStep::Mark { pod, mark } => self.change_pod(*pod, |p| p.mark = Some(*mark)),
            FirewallStep::Unmark(pod) => self.change_pod(*pod, |p| p.mark = None),
        }
    }

    /// The destinations that are not egress, of both families.
    pub fn excluded(&self) -> impl Iterator<Item = IpNet> {
        let families = self.families.values();
        families.flat_map(|family| family.firewall.excluded.iter().copied())
    }

    /// Notes that the node may have been no gateway of these VIPs for a while: what it knows of their pods' connections
    /// may be stale, and to go on being the gateway begins with resuming them.
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

    fn change_pod(&mut self, pod: IpAddr, change: impl FnOnce(&mut PodState)) {
        self.firewall(pod).change_pod(pod, change);
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

#[cfg(test)]
mod tests;
