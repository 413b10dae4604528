//! Which pods are egress pods, whose they are, and what this node does with each.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::cluster::{Endpoint, Node, Pod, Service, Target, View};
use crate::names::{NodeName, ObjectKey};
use crate::plan::egress::{Egress, Gateway};
use crate::plan::slots::Slots;
use crate::plan::verdict::{Ignored, Subject};
use crate::settings::Settings;
use crate::state::{Family, PodState};

/// A pod that belongs to a labelled Service.
#[derive(Clone, Copy)]
pub(super) struct EgressPod<'a> {
    pub(super) service: &'a ObjectKey,
    /// The node that its slice names.
    pub(super) node: Option<&'a NodeName>,
    /// Its packets enter the network on this node.
    pub(super) local: bool,
}

/// The facts of a view that claims are checked against, indexed.
pub(super) struct Lookup<'a> {
    settings: &'a Settings,
    node_addresses: BTreeMap<IpAddr, &'a NodeName>,
    own_node: Option<&'a Node>,
    endpoints: BTreeMap<&'a ObjectKey, Vec<(&'a ObjectKey, &'a Endpoint)>>,
    /// Pods of this node, by namespace and by address.
    own_pods: BTreeMap<&'a str, Vec<&'a Pod>>,
    holders: BTreeMap<IpAddr, BTreeSet<&'a ObjectKey>>,
}

impl<'a> Lookup<'a> {
    pub(super) fn of(view: &'a View, settings: &'a Settings) -> Lookup<'a> {
        let nodes = view.nodes.iter();
        let mut lookup = Lookup {
            settings,
            node_addresses: nodes
                .flat_map(|(name, node)| node.addresses.iter().map(move |a| (*a, name)))
                .collect(),
            own_node: view.nodes.get(&settings.node_name),
            endpoints: BTreeMap::new(),
            own_pods: BTreeMap::new(),
            holders: BTreeMap::new(),
        };
        for (key, slice) in &view.slices {
            let endpoints = lookup.endpoints.entry(&slice.service).or_default();
            endpoints.extend(slice.endpoints.iter().map(|endpoint| (key, endpoint)));
        }
        for (key, pod) in &view.pods {
            lookup.own_pods.entry(&key.namespace).or_default().push(pod);
            for address in &pod.addresses {
                lookup.holders.entry(*address).or_default().insert(key);
            }
        }
        lookup
    }
}

/// A Service's claim to an address.
struct Claim<'a> {
    pod: EgressPod<'a>,
    /// The slices that name it, with the address as written; none where only the pod's labels say so.
    written: Vec<(&'a ObjectKey, &'a str)>,
}

/// The egress pods of one family. `services` come with the oldest first: the order in which they may have pods.
pub(super) fn egress_pods<'a>(
    family: Family,
    services: &[(&'a ObjectKey, &Service)],
    lookup: &Lookup<'a>,
    ignored: &mut BTreeMap<Subject, Ignored>,
) -> BTreeMap<IpAddr, EgressPod<'a>> {
    let mut claims: BTreeMap<IpAddr, Vec<Claim<'a>>> = BTreeMap::new();
    for (key, service) in services {
        for (address, claim) in claims_of(family, key, service, lookup, ignored) {
            claims.entry(address).or_default().push(claim);
        }
    }
    let claims = claims.into_iter();
    let owned = claims.filter_map(|(address, all)| Some((address, owner(&all, ignored)?)));
    owned.collect()
}

/// What one Service claims in one family; endpoints that make no sense are ignored with a reason.
fn claims_of<'a>(
    family: Family,
    key: &'a ObjectKey,
    service: &Service,
    lookup: &Lookup<'a>,
    ignored: &mut BTreeMap<Subject, Ignored>,
) -> BTreeMap<IpAddr, Claim<'a>> {
    let new = || Claim {
        pod: EgressPod {
            service: key,
            node: None,
            local: false,
        },
        written: Vec::new(),
    };
    let mut claims: BTreeMap<IpAddr, Claim<'a>> = BTreeMap::new();
    for (slice, endpoint) in lookup.endpoints.get(key).into_iter().flatten() {
        for written in &endpoint.addresses {
            match pod_address(written, endpoint, key, lookup) {
                Ok(address) if Family::of(address) == family => {
                    let claim = claims.entry(address).or_insert_with(new);
                    claim.pod.local |= is_local(address, endpoint, lookup);
                    claim.pod.node = endpoint.node.as_ref();
                    claim.written.push((*slice, written));
                }
                Ok(_) => {}
                Err(reason) => {
                    ignored.insert(endpoint_of(slice, written), reason);
                }
            }
        }
    }
    // A pod sends as soon as it has an address; slices name it 100 to 200 ms later.
    let pods = lookup.own_pods.get(key.namespace.as_str());
    let pods = pods.into_iter().flatten();
    let selected = pods.filter(|pod| service.selects(pod));
    for address in selected.flat_map(|pod| &pod.addresses) {
        if Family::of(*address) == family && !lookup.node_addresses.contains_key(address) {
            claims.entry(*address).or_insert_with(new).pod.local = true;
        }
    }
    claims
}

/// Who has an address of those that claim it: the oldest Service. The others learn why not.
fn owner<'a>(
    claims: &[Claim<'a>],
    ignored: &mut BTreeMap<Subject, Ignored>,
) -> Option<EgressPod<'a>> {
    let (oldest, others) = claims.split_first()?;
    for (slice, address) in others.iter().flat_map(|claim| &claim.written) {
        let reason = Ignored::OwnedBy(oldest.pod.service.clone());
        ignored.insert(endpoint_of(slice, address), reason);
    }
    Some(oldest.pod)
}

fn endpoint_of(slice: &ObjectKey, address: &str) -> Subject {
    Subject::Endpoint {
        slice: slice.clone(),
        address: address.to_owned(),
    }
}

fn pod_address(
    written: &str,
    endpoint: &Endpoint,
    service: &ObjectKey,
    lookup: &Lookup<'_>,
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
    if let Some(node) = lookup.node_addresses.get(&address) {
        return Err(Ignored::NodeAddress((*node).clone()));
    }
    let pod = match &endpoint.target {
        Target::Pod(pod) if pod.namespace == service.namespace => pod,
        other => return Err(Ignored::NotAPodOfItsNamespace(other.clone())),
    };
    // Only the pod's own node knows who has the address; only there is the pod marked.
    let holders = lookup.holders.get(&address);
    let holders = holders.filter(|pods| !pods.contains(pod));
    match holders.and_then(|pods| pods.first()) {
        Some(holder) => Err(Ignored::AnotherPod((*holder).clone())),
        None => Ok(address),
    }
}

fn is_local(address: IpAddr, endpoint: &Endpoint, lookup: &Lookup<'_>) -> bool {
    if !lookup.settings.filter_endpoints_for_node {
        return true;
    }
    match &endpoint.node {
        Some(node) => *node == lookup.settings.node_name,
        None => {
            let mut nets = lookup.own_node.iter().flat_map(|node| &node.pod_cidrs);
            nets.any(|cidr| cidr.contains(&address))
        }
    }
}

/// What this node does with an egress pod.
pub(super) fn state(
    pod: &EgressPod<'_>,
    egress: &Egress<'_>,
    slots: &Slots,
    settings: &Settings,
) -> PodState {
    let mut state = PodState {
        egress: true,
        vips: egress.vip.into_iter().collect(),
        ..PodState::default()
    };
    match &egress.gateway {
        Ok(Gateway { hop: None, .. }) => state.gateway_here = true,
        // A pod of another node, which routes it. Should a packet pass here, it still leaves with the VIP.
        _ if !pod.local && egress.vip.is_some() => {}
        Ok(_) => {
            state.mark = egress.slot(slots).map(|slot| slot.mark(settings.mask));
            // Every gateway in use has a slot. If one had none: better rejected than leaked.
            state.blocked = state.mark.is_none();
        }
        Err(_) => state.blocked = true,
    }
    state
}
