//! What guards know of the neighbourhood: what each mark stands for, who the other nodes are, where the LAN is.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::cluster::View;
use crate::names::{Interface, Reach};
use crate::settings::Settings;
use crate::state::{Family, Landmark, RouteState};

pub(super) fn landmarks(
    family: Family,
    view: &View,
    settings: &Settings,
    vips: &BTreeSet<IpAddr>,
    routes: &RouteState,
) -> BTreeSet<Landmark> {
    let ways = routes.ways().map(Landmark::Way);
    let nodes = view.neighbours.values().copied().map(Landmark::Node);
    let lans = lans(family, view, settings, vips);
    let hops = routes
        .tables
        .values()
        .filter_map(|table| table.gateway.as_ref());
    let devices = hops.map(|hop| hop.dev.clone());
    ways.chain(nodes)
        .chain(lans.into_iter().chain(devices).map(Landmark::Lan))
        .collect()
}

/// The interfaces that VIPs are announced on: where they are on link, where the node's own address is, or as the operator
/// says.
fn lans(
    family: Family,
    view: &View,
    settings: &Settings,
    vips: &BTreeSet<IpAddr>,
) -> BTreeSet<String> {
    let own = view.nodes.get(&settings.node_name);
    let own = own.into_iter().flat_map(|node| &node.addresses);
    let own: Vec<&IpAddr> = own
        .filter(|address| Family::of(**address) == family)
        .collect();
    let is_lan = |interface: &&Interface| {
        let is_of = |vip: &IpAddr| interface.nets.iter().any(|net| net.contains(vip));
        own.iter()
            .any(|address| interface.addresses.contains(*address))
            || vips.iter().any(is_of)
    };
    let found = view.interfaces.iter().filter(is_lan);
    let on_link = vips.iter().filter_map(|vip| match view.reach.get(vip)? {
        Reach::OnLink(name) => Some(name.clone()),
        Reach::Router(_) | Reach::Own | Reach::Unreachable(_) => None,
    });
    let named = settings.lan_interface.iter().cloned();
    let found = found.map(|interface| interface.name.clone());
    named.chain(found).chain(on_link).collect()
}
