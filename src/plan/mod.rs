//! Every rule of the product: what this node's kernel must hold for what the cluster says, and why.
//!
//! Pure: no I/O, no clock. All nodes that see the same cluster agree on owner, VIP and gateway of every pod;
//! they differ in which pods are their own.

pub mod excluded;
pub mod slots;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::cluster::{
    Endpoint, Node, ON_NO_GATEWAY_ANNOTATION, OnNoGateway, Pod, Service, Target, View,
};
use crate::names::{NodeName, ObjectKey};
use crate::plan::slots::{Slot, Slots};
use crate::settings::Settings;
use crate::state::{
    Family, FamilyState, FirewallState, KernelState, NextHop, PodState, RouteState, Rule,
    RuleAction, Skeleton, Table,
};

/// Places of our rules, from `ROUTE_RULE_PRIORITY` on. The first one lets unmarked packets pass all others.
const PASS_UNMARKED: u32 = 0;
/// Excluded destinations are routed as without us.
const PASS_EXCLUDED: u32 = 1;
/// One rule for each gateway.
const TO_GATEWAY: u32 = 2;
/// Whatever is marked and found no gateway is rejected.
const REJECT_REST: u32 = 98;
/// Where passing packets go on.
const END: u32 = 99;

/// What this node must be, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// The kernel state to reach.
    pub kernel: KernelState,
    /// The slots behind it, for the next plan.
    pub slots: Slots,
    /// What becomes of each labelled Service, by family.
    pub services: BTreeMap<ObjectKey, BTreeMap<Family, Verdict>>,
    /// Services and endpoints that are left out.
    pub ignored: BTreeMap<Subject, Ignored>,
    /// Pods outside every known pod network, one for each family: why all private networks are excluded.
    pub unknown_networks: BTreeMap<Family, IpAddr>,
}

/// What becomes of a Service in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its pods leave with the VIP.
    Active {
        /// The source address of its pods.
        vip: IpAddr,
        /// The node that they leave through.
        gateway: NodeName,
    },
    /// Its pods do not leave.
    Blocked(Blocked),
    /// Its pods would not leave, but its annotation lets them out as without MetalEG.
    Released(Blocked),
}

/// Why pods of a Service do not leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Blocked {
    /// MetalLB has not assigned an address of this family.
    NoVip,
    /// The ingress is a host name.
    HostnameIngress(String),
    /// Nobody announces the VIP.
    NoAnnouncer,
    /// The announcer is not a node of the cluster.
    UnknownGateway(NodeName),
    /// The announcer has no InternalIP of this family.
    GatewayWithoutAddress(NodeName),
    /// The agent of the announcer has not programmed it since it was booted.
    GatewayNotProgrammed(NodeName),
    /// No interface of this node has a network that holds the gateway's address.
    GatewayOffLink(NodeName, IpAddr),
}

/// What is left out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// A Service.
    Service(ObjectKey),
    /// The annotation of a Service that says what happens without a gateway.
    OnNoGateway(ObjectKey),
    /// An address of an EndpointSlice.
    Endpoint {
        /// The slice.
        slice: ObjectKey,
        /// The address as it is written there.
        address: String,
    },
}

/// Why something is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ignored {
    /// A Service that is not of type LoadBalancer has no VIP.
    NotLoadBalancer,
    /// An annotation with a value that means nothing.
    UnknownValue(String),
    /// Not an IP address.
    NotAnAddress,
    /// Loopback, link-local, multicast or unspecified: no pod has such an address.
    NotAPodAddress,
    /// Address of a node: a hostNetwork pod is the node itself.
    NodeAddress(NodeName),
    /// Nobody may capture what is not a pod of the Service's own namespace with a hand-made slice.
    NotAPodOfItsNamespace(Target),
    /// The address is that of another pod, which a hand-made slice, or one that is late, must not capture.
    AnotherPod(ObjectKey),
    /// An older Service has this pod.
    OwnedBy(ObjectKey),
}

/// Makes the plan for this node.
///
/// `families` are those that the kernel has; `slots` are those in use, of the plan before or adopted from the
/// kernel.
#[must_use]
pub fn plan(
    view: &View,
    settings: &Settings,
    families: &BTreeSet<Family>,
    slots: &Slots,
) -> Desired {
    let mut desired = Desired::default();
    for (key, service) in &view.services {
        if !service.load_balancer {
            desired
                .ignored
                .insert(Subject::Service(key.clone()), Ignored::NotLoadBalancer);
        }
        if let OnNoGateway::Unknown(value) = &service.on_no_gateway {
            let subject = Subject::OnNoGateway(key.clone());
            let reason = Ignored::UnknownValue(value.clone());
            desired.ignored.insert(subject, reason);
        }
    }
    for &family in families {
        plan_family(family, view, settings, slots, &mut desired);
    }
    desired
}

/// A pod that belongs to a labelled Service.
struct EgressPod<'a> {
    service: &'a ObjectKey,
    /// Its packets enter the network on this node.
    local: bool,
}

/// The way out of a Service's pods in one family, as seen from this node.
struct Egress<'a> {
    vip: Result<IpAddr, Blocked>,
    gateway: Result<Gateway<'a>, Blocked>,
    on_no_gateway: &'a OnNoGateway,
}

impl Egress<'_> {
    /// Why there is no way out.
    fn blocked(&self) -> Option<&Blocked> {
        self.vip.as_ref().err().or(self.gateway.as_ref().err())
    }

    /// Whether its pods are let out as without us.
    fn is_released(&self) -> bool {
        *self.on_no_gateway == OnNoGateway::NodeAddress && self.blocked().is_some()
    }

    /// The slot of its gateway, where that is another node.
    fn slot(&self, slots: &Slots) -> Option<Slot> {
        slots.get(self.gateway.as_ref().ok()?.hop.as_ref()?.via)
    }
}

struct Gateway<'a> {
    node: &'a NodeName,
    /// `None`: this node is the gateway.
    hop: Option<NextHop>,
}

fn plan_family(
    family: Family,
    view: &View,
    settings: &Settings,
    slots: &Slots,
    desired: &mut Desired,
) {
    let services = by_age(family, view);
    let pods = egress_pods(family, view, settings, &services, &mut desired.ignored);
    let egress: BTreeMap<&ObjectKey, Egress<'_>> = services
        .iter()
        .map(|(key, service)| (*key, egress(family, service, view, settings)))
        .collect();

    let hops: BTreeMap<IpAddr, &NextHop> = pods
        .values()
        .filter(|pod| pod.local)
        .filter_map(|pod| egress.get(pod.service))
        .filter(|egress| egress.vip.is_ok())
        .filter_map(|egress| egress.gateway.as_ref().ok()?.hop.as_ref())
        .map(|hop| (hop.via, hop))
        .collect();
    let slots = slots.assign(family, &hops.keys().copied().collect(), settings);
    // What pods elsewhere may reach inside is their own nodes' matter.
    let own = pods.iter().filter(|(_, pod)| pod.local);
    let own = own.map(|(address, _)| *address);
    let excluded = excluded::find(family, view, &settings.excluded, own);

    let mut states = BTreeMap::new();
    let mut routes = routes(family, settings, &excluded.nets, &slots, &hops);
    for (address, pod) in &pods {
        let Some(egress) = egress
            .get(pod.service)
            .filter(|egress| !egress.is_released())
        else {
            continue;
        };
        if pod.local
            && let Some(slot) = egress.slot(&slots)
            && slot.overflows(settings.mask)
        {
            routes.rules.insert(Rule {
                from: Some(*address),
                ..to_gateway(slot, settings)
            });
        }
        states.insert(*address, pod_state(pod.local, egress, &slots, settings));
    }
    if settings.strict_start {
        let free = PodState {
            ordinary: true,
            ..PodState::default()
        };
        for address in own_addresses(family, view) {
            states.entry(address).or_insert_with(|| free.clone());
        }
    }
    for (key, egress) in &egress {
        let verdicts = desired.services.entry((*key).clone()).or_default();
        verdicts.insert(family, verdict(egress));
    }
    let state = FamilyState {
        routes,
        firewall: FirewallState {
            skeleton: Skeleton::Intact,
            remote_pods: remote_pods(family, view, settings),
            local_pods: local_pods(family, view, settings),
            vips: egress
                .values()
                .filter_map(|e| e.vip.as_ref().ok().copied())
                .collect(),
            pods: states,
            excluded: excluded.nets,
        },
    };
    desired.kernel.families.insert(family, state);
    desired.slots.extend(slots);
    if let Some(pod) = excluded.unknown_network_of {
        desired.unknown_networks.insert(family, pod);
    }
}

/// The Services that count in a family, the oldest first: the order in which they may claim pods.
fn by_age(family: Family, view: &View) -> Vec<(&ObjectKey, &Service)> {
    let mut services: Vec<_> = view
        .services
        .iter()
        .filter(|(_, service)| service.load_balancer && service.families.contains(&family))
        .collect();
    services.sort_by_key(|(key, service)| (service.created, *key));
    services
}

fn egress_pods<'a>(
    family: Family,
    view: &'a View,
    settings: &Settings,
    services: &[(&'a ObjectKey, &Service)],
    ignored: &mut BTreeMap<Subject, Ignored>,
) -> BTreeMap<IpAddr, EgressPod<'a>> {
    let node_addresses: BTreeMap<IpAddr, &NodeName> = view
        .nodes
        .iter()
        .flat_map(|(name, node)| node.addresses.iter().map(move |address| (*address, name)))
        .collect();
    let mut slices: BTreeMap<&ObjectKey, Vec<(&'a ObjectKey, &'a Endpoint)>> = BTreeMap::new();
    for (key, slice) in &view.slices {
        let endpoints = slices.entry(&slice.service).or_default();
        endpoints.extend(slice.endpoints.iter().map(|endpoint| (key, endpoint)));
    }
    let mut own_pods: BTreeMap<&str, Vec<&Pod>> = BTreeMap::new();
    let mut holders: BTreeMap<IpAddr, BTreeSet<&ObjectKey>> = BTreeMap::new();
    for (key, pod) in &view.pods {
        own_pods.entry(&key.namespace).or_default().push(pod);
        for address in &pod.addresses {
            holders.entry(*address).or_default().insert(key);
        }
    }
    let mut pods: BTreeMap<IpAddr, EgressPod<'a>> = BTreeMap::new();
    for (service, facts) in services {
        for (slice, endpoint) in slices.get(service).into_iter().flatten() {
            for written in &endpoint.addresses {
                let checked = pod_address(written, endpoint, service, &node_addresses, &holders)
                    .and_then(|address| match pods.get(&address) {
                        Some(pod) if pod.service != *service => {
                            Err(Ignored::OwnedBy(pod.service.clone()))
                        }
                        _ => Ok(address),
                    });
                match checked {
                    Ok(address) if Family::of(address) == family => {
                        let local = is_local(address, endpoint, view, settings);
                        let pod = pods.entry(address).or_insert(EgressPod { service, local });
                        pod.local |= local;
                    }
                    Ok(_) => {}
                    Err(reason) => {
                        let subject = Subject::Endpoint {
                            slice: (*slice).clone(),
                            address: written.clone(),
                        };
                        ignored.insert(subject, reason);
                    }
                }
            }
        }
        // A pod sends as soon as it has an address; slices name it 100 to 200 ms later.
        let of_namespace = own_pods.get(service.namespace.as_str());
        let selected = of_namespace
            .into_iter()
            .flatten()
            .filter(|pod| facts.selects(pod));
        for address in selected.flat_map(|pod| &pod.addresses) {
            if Family::of(*address) == family && !node_addresses.contains_key(address) {
                let local = true;
                let pod = pods.entry(*address).or_insert(EgressPod { service, local });
                pod.local |= pod.service == *service;
            }
        }
    }
    pods
}

fn pod_address(
    written: &str,
    endpoint: &Endpoint,
    service: &ObjectKey,
    node_addresses: &BTreeMap<IpAddr, &NodeName>,
    holders: &BTreeMap<IpAddr, BTreeSet<&ObjectKey>>,
) -> Result<IpAddr, Ignored> {
    let address: IpAddr = written.parse().map_err(|_| Ignored::NotAnAddress)?;
    let impossible = address.is_loopback()
        || address.is_multicast()
        || address.is_unspecified()
        || match address {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
            IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
        };
    if impossible {
        return Err(Ignored::NotAPodAddress);
    }
    if let Some(node) = node_addresses.get(&address) {
        return Err(Ignored::NodeAddress((*node).clone()));
    }
    let pod = match &endpoint.target {
        Target::Pod(pod) if pod.namespace == service.namespace => pod,
        other => return Err(Ignored::NotAPodOfItsNamespace(other.clone())),
    };
    // Only a pod's own node knows; only there is it marked.
    let holders = holders.get(&address).filter(|pods| !pods.contains(pod));
    match holders.and_then(|pods| pods.first()) {
        Some(holder) => Err(Ignored::AnotherPod((*holder).clone())),
        None => Ok(address),
    }
}

fn is_local(address: IpAddr, endpoint: &Endpoint, view: &View, settings: &Settings) -> bool {
    if !settings.filter_endpoints_for_node {
        return true;
    }
    match &endpoint.node {
        Some(node) => *node == settings.node_name,
        None => view
            .nodes
            .get(&settings.node_name)
            .is_some_and(|node| node.pod_cidrs.iter().any(|cidr| cidr.contains(&address))),
    }
}

fn egress<'a>(
    family: Family,
    service: &'a Service,
    view: &'a View,
    settings: &Settings,
) -> Egress<'a> {
    let vip = match (service.vips.get(&family), &service.hostname) {
        (Some(vip), _) => Ok(*vip),
        (None, Some(name)) => Err(Blocked::HostnameIngress(name.clone())),
        (None, None) => Err(Blocked::NoVip),
    };
    let gateway = match &vip {
        Ok(vip) => gateway(*vip, view, settings),
        Err(blocked) => Err(blocked.clone()),
    };
    Egress {
        vip,
        gateway,
        on_no_gateway: &service.on_no_gateway,
    }
}

fn gateway<'a>(vip: IpAddr, view: &'a View, settings: &Settings) -> Result<Gateway<'a>, Blocked> {
    let family = Family::of(vip);
    let announcer = view.announcers.get(&vip).ok_or(Blocked::NoAnnouncer)?;
    let (node, facts) = view
        .nodes
        .get_key_value(announcer)
        .ok_or_else(|| Blocked::UnknownGateway(announcer.clone()))?;
    if *node == settings.node_name {
        return Ok(Gateway { node, hop: None });
    }
    if !facts.is_programmed() {
        return Err(Blocked::GatewayNotProgrammed(node.clone()));
    }
    let via =
        Node::address(facts, family).ok_or_else(|| Blocked::GatewayWithoutAddress(node.clone()))?;
    let dev = view
        .links
        .iter()
        .filter(|link| {
            settings
                .lan_interface
                .as_ref()
                .is_none_or(|lan| *lan == link.name)
        })
        .find(|link| link.nets.iter().any(|net| net.contains(&via)))
        .map(|link| link.name.clone())
        .ok_or_else(|| Blocked::GatewayOffLink(node.clone(), via))?;
    Ok(Gateway {
        node,
        hop: Some(NextHop { via, dev }),
    })
}

fn pod_state(local: bool, egress: &Egress<'_>, slots: &Slots, settings: &Settings) -> PodState {
    let mut state = PodState {
        egress: true,
        vips: egress.vip.iter().copied().collect(),
        ..PodState::default()
    };
    match (&egress.vip, &egress.gateway) {
        (Err(_), _) => state.blocked = true,
        (Ok(_), Ok(Gateway { hop: None, .. })) => state.gateway_here = true,
        // Not our pod: its node routes it. Should a packet pass here, it leaves with the VIP all the same.
        (Ok(_), _) if !local => {}
        (Ok(_), Ok(_)) => {
            state.mark = egress.slot(slots).map(|slot| slot.mark(settings.mask));
            // Every gateway in use has a slot; if not, better rejected than leaked.
            state.blocked = state.mark.is_none();
        }
        (Ok(_), Err(_)) => state.blocked = true,
    }
    state
}

fn verdict(egress: &Egress<'_>) -> Verdict {
    match (&egress.vip, &egress.gateway) {
        (Ok(vip), Ok(gateway)) => Verdict::Active {
            vip: *vip,
            gateway: gateway.node.clone(),
        },
        (Err(blocked), _) | (Ok(_), Err(blocked)) if egress.is_released() => {
            Verdict::Released(blocked.clone())
        }
        (Err(blocked), _) | (Ok(_), Err(blocked)) => Verdict::Blocked(blocked.clone()),
    }
}

/// Rules and tables: a block of rules that unmarked packets pass in one step.
fn routes(
    family: Family,
    settings: &Settings,
    excluded: &BTreeSet<IpNet>,
    slots: &Slots,
    hops: &BTreeMap<IpAddr, &NextHop>,
) -> RouteState {
    let rule = |place: u32, action: RuleAction| rule(settings, place, action);
    let end = settings.rule_priority + END;
    let unmarked = settings.mask.unmarked();
    let mut state = RouteState::default();
    state.rules.insert(Rule {
        mark: Some(unmarked),
        ..rule(PASS_UNMARKED, RuleAction::Goto(end))
    });
    // Not `lookup main`: an excluded destination is routed by whatever rules others have, as if unmarked. This
    // is also what lets a reverse path check that looks at the mark (src_valid_mark, firewalld's
    // IPv6_rpfilter) find the way back to a pod.
    state.rules.extend(excluded.iter().map(|net| Rule {
        to: Some(*net),
        ..rule(PASS_EXCLUDED, RuleAction::Goto(end))
    }));
    // Says itself that it means marked packets only: were the first rule lost, an unconditional one would cut
    // the node off.
    state.rules.insert(Rule {
        mark: Some(unmarked),
        not: true,
        ..rule(REJECT_REST, RuleAction::Unreachable)
    });
    state.rules.insert(rule(END, RuleAction::Nop));
    for (gateway, slot) in slots.iter().filter(|(g, _)| Family::of(*g) == family) {
        let Some(hop) = hops.get(&gateway) else {
            continue;
        };
        // Where gateways share a mark, each of their pods has a rule.
        if !slot.overflows(settings.mask) {
            state.rules.insert(to_gateway(slot, settings));
        }
        state.tables.insert(
            slot.table(settings),
            Table {
                fallback: true,
                gateway: Some((*hop).clone()),
            },
        );
    }
    state
}

fn rule(settings: &Settings, place: u32, action: RuleAction) -> Rule {
    Rule {
        priority: settings.rule_priority + place,
        action,
        mark: None,
        not: false,
        from: None,
        to: None,
    }
}

/// Sends what has a slot's mark to the slot's table.
fn to_gateway(slot: Slot, settings: &Settings) -> Rule {
    let table = slot.table(settings);
    Rule {
        mark: Some(slot.mark(settings.mask)),
        ..rule(settings, TO_GATEWAY, RuleAction::Lookup(table))
    }
}

/// The pod networks of the other nodes, unless this node may be their router. Neighbours are one network, as the
/// kernel keeps them: others would be found changed at each look.
fn remote_pods(family: Family, view: &View, settings: &Settings) -> BTreeSet<IpNet> {
    if !pods_are_where_their_nodes_say(family, view, settings) {
        return BTreeSet::new();
    }
    let others = view
        .nodes
        .iter()
        .filter(|(name, _)| settings.guard_transit && **name != settings.node_name);
    let nets: Vec<IpNet> = others
        .flat_map(|(_, node)| node.pod_cidrs.iter().copied())
        .filter(|cidr| Family::of_net(*cidr) == family)
        .collect();
    IpNet::aggregate(&nets).into_iter().collect()
}

/// Whether pods have addresses of their nodes' podCIDRs. Where a CNI plugin gives them others, as Calico does, podCIDRs
/// mean nothing: a pod of this node may have an address of another one's.
fn pods_are_where_their_nodes_say(family: Family, view: &View, settings: &Settings) -> bool {
    let own_nets = view
        .nodes
        .get(&settings.node_name)
        .map(|node| &node.pod_cidrs);
    let is_own =
        |pod: IpAddr| own_nets.is_some_and(|nets| nets.iter().any(|net| net.contains(&pod)));
    let mut pods = own_addresses(family, view).peekable();
    let has_pools = view
        .pod_pools
        .iter()
        .any(|net| Family::of_net(*net) == family);
    match pods.peek() {
        None => !has_pools,
        Some(_) => pods.all(is_own),
    }
}

/// The networks that pods of this node have their addresses of, if they are to wait until they are classified.
fn local_pods(family: Family, view: &View, settings: &Settings) -> BTreeSet<IpNet> {
    if !settings.strict_start {
        return BTreeSet::new();
    }
    let own = view.nodes.get(&settings.node_name);
    let nets = own.into_iter().flat_map(|node| &node.pod_cidrs);
    let nets = nets.chain(&view.pod_pools).copied();
    let nets: Vec<IpNet> = nets.filter(|net| Family::of_net(*net) == family).collect();
    IpNet::aggregate(&nets).into_iter().collect()
}

/// The addresses of this node's pods.
fn own_addresses(family: Family, view: &View) -> impl Iterator<Item = IpAddr> {
    let addresses = view.pods.values().flat_map(|pod| &pod.addresses).copied();
    addresses.filter(move |address| Family::of(*address) == family)
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Active { vip, gateway } => write!(f, "active: {vip} through {gateway}"),
            Verdict::Blocked(reason) => write!(f, "blocked: {reason}"),
            Verdict::Released(reason) => write!(f, "let out with the node's address: {reason}"),
        }
    }
}

impl Blocked {
    /// One word for metrics.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Blocked::NoVip => "NoVip",
            Blocked::HostnameIngress(_) => "HostnameIngress",
            Blocked::NoAnnouncer => "NoAnnouncer",
            Blocked::UnknownGateway(_) => "UnknownGateway",
            Blocked::GatewayWithoutAddress(_) => "GatewayWithoutAddress",
            Blocked::GatewayNotProgrammed(_) => "GatewayNotProgrammed",
            Blocked::GatewayOffLink(..) => "GatewayOffLink",
        }
    }
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Blocked::NoVip => f.write_str("MetalLB has not assigned an address of this family"),
            Blocked::HostnameIngress(name) => {
                write!(f, "the ingress is the host name {name}, not an address")
            }
            Blocked::NoAnnouncer => f.write_str(
                "no node announces the VIP (MetalLB does only while an endpoint is ready)",
            ),
            Blocked::UnknownGateway(node) => {
                write!(f, "announced by {node}, which is not a node of the cluster")
            }
            Blocked::GatewayWithoutAddress(node) => {
                write!(
                    f,
                    "announced by {node}, which has no InternalIP of this family"
                )
            }
            Blocked::GatewayNotProgrammed(node) => write!(
                f,
                "announced by {node}, which no agent has programmed since it was booted"
            ),
            Blocked::GatewayOffLink(node, address) => write!(
                f,
                "announced by {node}, whose address {address} is in no network of this node's interfaces"
            ),
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Subject::Service(key) => write!(f, "Service {key}"),
            Subject::OnNoGateway(key) => {
                write!(f, "annotation {ON_NO_GATEWAY_ANNOTATION} of Service {key}")
            }
            Subject::Endpoint { slice, address } => {
                write!(f, "endpoint {address} of EndpointSlice {slice}")
            }
        }
    }
}

impl fmt::Display for Ignored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ignored::NotLoadBalancer => f.write_str("not of type LoadBalancer"),
            Ignored::UnknownValue(value) => {
                write!(f, "`{value}` is neither reject nor node-address")
            }
            Ignored::NotAnAddress => f.write_str("not an IP address"),
            Ignored::NotAPodAddress => {
                f.write_str("loopback, link-local, multicast or unspecified: no pod's address")
            }
            Ignored::NodeAddress(node) => {
                write!(
                    f,
                    "address of node {node}: a hostNetwork pod leaves as its node"
                )
            }
            Ignored::NotAPodOfItsNamespace(Target::Pod(pod)) => {
                write!(f, "stands for Pod {pod} of another namespace")
            }
            Ignored::NotAPodOfItsNamespace(Target::Other(what)) => {
                write!(f, "stands for {what}, not for a Pod")
            }
            Ignored::AnotherPod(pod) => write!(f, "address of another Pod, {pod}"),
            Ignored::OwnedBy(service) => {
                write!(f, "belongs to Service {service}, which is older")
            }
        }
    }
}

#[cfg(test)]
mod tests;
