//! What guards know of the neighbourhood: what each mark stands for, who the other nodes are, where the LAN is.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::cluster::View;
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
    let hops = routes.tables.values().filter_map(|table| table.gateway.as_ref());
    let devices = hops.map(|hop| hop.dev.clone());
    ways.chain(nodes)
        .chain(lans.chain(devices).map(Landmark::Lan))
        .collect()
}

/// The interfaces that VIPs are announced on: where their network or the node's own address is, or as the operator says.
fn lans(
    family: Family,
    view: &View,
    settings: &Settings,
    vips: &BTreeSet<IpAddr>,
) -> impl Iterator<Item = String> {
    let own = view.nodes.get(&settings.node_name);
    let own = own.into_iter().flat_map(|node| &node.addresses);
    let own = own.filter(|address| Family::of(**address) == family);
    let lan: BTreeSet<&IpAddr> = own.chain(vips).collect();
    let is_lan = |nets: &BTreeSet<ipnet::IpNet>| {
        nets.iter().any(|net| lan.iter().any(|address| net.contains(*address)))
    };
    let found = view.interfaces.iter().filter(|i| is_lan(&i.nets));
    let found: Vec<String> = found.map(|interface| interface.name.clone()).collect();
    settings.lan_interface.iter().cloned().chain(found).collect::<BTreeSet<_>>().into_iter()
}
