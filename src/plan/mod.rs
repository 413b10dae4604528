//! Every rule of the product: what this node's kernel must hold for what the cluster says, and why.
//!
//! Pure: no I/O, no clock. All nodes that see the same cluster agree on owner, VIP and gateway of every pod;
//! they differ in which pods are their own.

pub mod adopt;
mod egress;
mod landmarks;
mod networks;
mod obstacles;
pub mod places;
mod pods;
mod routes;
pub mod slots;
mod verdict;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::cluster::{OnNoGateway, Service, View};
use crate::names::{NodeName, ObjectKey};
use crate::plan::egress::Egress;
use crate::plan::pods::{EgressPod, Lookup};
use crate::plan::routes::Routing;
use crate::plan::slots::Slots;
pub use crate::plan::verdict::{Blocked, Ignored, Subject, Verdict};
use crate::settings::Settings;
use crate::state::{
    Accepted, Family, FamilyState, FirewallState, KernelState, NextHop, Obstacle, PodState,
    Skeleton,
};

/// What this node must be, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    pub kernel: KernelState,
    /// The slots behind it, for the next plan.
    pub slots: Slots,
    /// What becomes of each labelled Service, by family.
    pub services: BTreeMap<ObjectKey, BTreeMap<Family, Verdict>>,
    /// What of this node is in the way of Services that it has to do with, by family.
    pub obstacles: BTreeMap<ObjectKey, BTreeMap<Family, BTreeSet<Obstacle>>>,
    /// Services and endpoints that are left out.
    pub ignored: BTreeMap<Subject, Ignored>,
    /// Pods outside every known pod network, one for each family: why all private networks are excluded.
    pub unknown_networks: BTreeMap<Family, IpAddr>,
}

/// Makes the plan for this node.
///
/// `families` are those that the kernel has; `slots` are those in use, of the plan before or adopted from the
/// kernel.
pub fn plan(
    view: &View,
    settings: &Settings,
    families: &BTreeSet<Family>,
    slots: &Slots,
) -> Desired {
    let mut desired = Desired::default();
    for (key, service) in &view.services {
        if !service.load_balancer {
            let subject = Subject::Service(key.clone());
            desired.ignored.insert(subject, Ignored::NotLoadBalancer);
        }
        if let OnNoGateway::Unknown(value) = &service.on_no_gateway {
            let subject = Subject::OnNoGateway(key.clone());
            let reason = Ignored::UnknownValue(value.clone());
            desired.ignored.insert(subject, reason);
        }
    }
    let lookup = Lookup::of(view, settings);
    for &family in families {
        plan_family(family, view, &lookup, settings, slots, &mut desired);
    }
    desired
}

fn plan_family(
    family: Family,
    view: &View,
    lookup: &Lookup<'_>,
    settings: &Settings,
    slots: &Slots,
    desired: &mut Desired,
) {
    let services = by_age(family, view);
    let pods = pods::egress_pods(family, &services, lookup, &mut desired.ignored);
    let egress: BTreeMap<&ObjectKey, Egress<'_>> = services
        .iter()
        .map(|(key, service)| (*key, egress::egress(family, service, view, settings)))
        .collect();
    let local = pods.iter().filter(|(_, pod)| pod.local);

    let hops: BTreeMap<IpAddr, &NextHop> = local
        .clone()
        .filter_map(|(_, pod)| egress.get(pod.service)?.hop())
        .map(|hop| (hop.via, hop))
        .collect();
    let slots = slots.assign(family, &hops.keys().copied().collect(), settings);
    // Only pods of this node: those of others are excluded from what by their own nodes.
    let own = local.map(|(address, _)| *address);
    let excluded = networks::excluded(family, view, &settings.excluded, own);

    for (service, found) in obstacles::obstacles(family, view, &pods, &egress, &excluded.nets) {
        let of_service = desired.obstacles.entry(service).or_default();
        of_service.insert(family, found);
    }

    let routing = Routing {
        settings,
        traits: view.traits,
        slots: &slots,
        hops: &hops,
    };
    let own_pods = networks::own_pods(view, settings);
    let throws = routes::throws(family, view.traits, &excluded.nets, own_pods);
    let mut routes = routing.state(&throws);
    let mut states = BTreeMap::new();
    for (address, pod) in &pods {
        let egress = egress.get(pod.service);
        if let Some(egress) = egress.filter(|egress| !egress.is_released()) {
            if let Some(slot) = egress.slot(&slots).filter(|_| pod.local) {
                routes.rules.extend(routing.of_pod(*address, slot));
            }
            states.insert(*address, pods::state(pod, egress, &slots, settings));
        }
    }
    if settings.strict_start {
        for address in networks::own_addresses(family, view) {
            states.entry(address).or_insert_with(|| PodState {
                ordinary: true,
                ..PodState::default()
            });
        }
    }
    for (key, egress) in &egress {
        let verdicts = desired.services.entry((*key).clone()).or_default();
        verdicts.insert(family, egress.verdict());
    }
    let vips: BTreeSet<IpAddr> = egress.values().filter_map(|egress| egress.vip).collect();
    // Any node may become the gateway of a VIP at any moment. Where there is no VIP, and no pod is here, there is nothing to
    // do.
    let is_here =
        |(address, pod): (&IpAddr, &EgressPod<'_>)| pod.local && states.contains_key(address);
    let has_work =
        settings.strict_start || view.lingers || !vips.is_empty() || pods.iter().any(is_here);
    let landmarks = landmarks::landmarks(family, view, settings, &vips, &routes);
    let passes = |(address, pod): (&IpAddr, &PodState)| {
        pod.gateway_here || pods.get(address).is_some_and(|pod| pod.local)
    };
    let sources = networks::pods(family, view);
    if settings.forward_accept && !sources.is_empty() && states.iter().any(passes) {
        let accepted = Accepted::Sources(sources);
        desired.kernel.accepted.insert(family, accepted);
    }
    let state = FamilyState {
        routes,
        firewall: FirewallState {
            skeleton: Skeleton::Intact,
            remote_pods: networks::remote_pods(family, view, settings),
            local_pods: networks::local_pods(family, view, settings),
            landmarks,
            vips,
            pods: states,
            excluded: excluded.nets,
        },
    };
    let state = if has_work {
        state
    } else {
        FamilyState::default()
    };
    desired.kernel.families.insert(family, state);
    desired.slots.extend(slots);
    if let Some(pod) = excluded.unknown_network_of {
        desired.unknown_networks.insert(family, pod);
    }
}

/// The Service that has each pod, and the node that its slice names.
pub fn owners<'a>(
    view: &'a View,
    settings: &'a Settings,
) -> BTreeMap<IpAddr, (&'a ObjectKey, Option<&'a NodeName>)> {
    let lookup = Lookup::of(view, settings);
    let pods = Family::ALL.into_iter().flat_map(|family| {
        let services = by_age(family, view);
        pods::egress_pods(family, &services, &lookup, &mut BTreeMap::new())
    });
    pods.map(|(address, pod)| (address, (pod.service, pod.node)))
        .collect()
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

#[cfg(test)]
mod tests;
