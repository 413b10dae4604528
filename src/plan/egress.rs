//! The way out of one Service's pods in one family: its VIP and its gateway, or why there is none.

use std::net::IpAddr;

use crate::cluster::{OnNoGateway, Service, View};
use crate::names::{NodeName, Reach};
use crate::plan::slots::{Slot, Slots};
use crate::plan::verdict::{Blocked, Verdict};
use crate::settings::Settings;
use crate::state::{Family, NextHop};

/// The way out of a Service's pods in one family, as seen from this node.
pub(super) struct Egress<'a> {
    pub(super) vip: Option<IpAddr>,
    pub(super) gateway: Result<Gateway<'a>, Blocked>,
    on_no_gateway: &'a OnNoGateway,
}

pub(super) struct Gateway<'a> {
    vip: IpAddr,
    node: &'a NodeName,
    /// `None`: this node is the gateway.
    pub(super) hop: Option<NextHop>,
}

impl Egress<'_> {
    /// Whether its pods are let out as without us.
    pub(super) fn is_released(&self) -> bool {
        *self.on_no_gateway == OnNoGateway::NodeAddress && self.gateway.is_err()
    }

    pub(super) fn is_gateway_here(&self) -> bool {
        matches!(&self.gateway, Ok(gateway) if gateway.hop.is_none())
    }

    /// Where pods of this node are routed to; none where the gateway is this node, and where there is none.
    pub(super) fn hop(&self) -> Option<&NextHop> {
        self.gateway.as_ref().ok()?.hop.as_ref()
    }

    /// The slot of its gateway, where that is another node.
    pub(super) fn slot(&self, slots: &Slots) -> Option<Slot> {
        slots.get(self.hop()?.via)
    }

    pub(super) fn verdict(&self) -> Verdict {
        match &self.gateway {
            Ok(gateway) => Verdict::Active {
                vip: gateway.vip,
                gateway: gateway.node.clone(),
            },
            Err(blocked) if self.is_released() => Verdict::Released(blocked.clone()),
            Err(blocked) => Verdict::Blocked(blocked.clone()),
        }
    }
}

pub(super) fn egress<'a>(
    family: Family,
    service: &'a Service,
    view: &'a View,
    settings: &Settings,
) -> Egress<'a> {
    let vip = service.vips.get(&family).copied();
    Egress {
        vip,
        gateway: match (vip, &service.hostname) {
            (Some(vip), _) => gateway(vip, view, settings),
            (None, Some(name)) => Err(Blocked::HostnameIngress(name.clone())),
            (None, None) => Err(Blocked::NoVip),
        },
        on_no_gateway: &service.on_no_gateway,
    }
}

fn gateway<'a>(vip: IpAddr, view: &'a View, settings: &Settings) -> Result<Gateway<'a>, Blocked> {
    let announcer = view.announcers.get(&vip).ok_or(Blocked::NoAnnouncer)?;
    let found = view.nodes.get_key_value(announcer);
    let (node, facts) = found.ok_or_else(|| Blocked::UnknownGateway(announcer.clone()))?;
    if *node == settings.node_name {
        let hop = None;
        return Ok(Gateway { vip, node, hop });
    }
    if !facts.is_programmed() {
        return Err(Blocked::GatewayNotProgrammed(node.clone()));
    }
    let hop = next_hop(node, facts.addresses(Family::of(vip)), view, settings)?;
    let hop = Some(hop);
    Ok(Gateway { vip, node, hop })
}

/// The first of a node's addresses that is on link, which is on LAN_INTERFACE where that is set; else what is wrong with
/// the first.
fn next_hop(
    node: &NodeName,
    addresses: impl Iterator<Item = IpAddr>,
    view: &View,
    settings: &Settings,
) -> Result<NextHop, Blocked> {
    let lan = settings.lan_interface.as_ref();
    let mut refused = None;
    for via in addresses {
        match view.reach.get(&via) {
            Some(Reach::OnLink(dev)) if lan.is_none_or(|lan| lan == dev) => {
                let dev = dev.clone();
                return Ok(NextHop { via, dev });
            }
            reach => refused = refused.or(Some((via, reach))),
        }
    }
    let Some((via, reach)) = refused else {
        return Err(Blocked::GatewayWithoutAddress(node.clone()));
    };
    let why = match (reach, lan) {
        (Some(reach @ Reach::OnLink(_)), Some(lan)) => {
            format!("{reach}, and LAN_INTERFACE is {lan}")
        }
        (Some(reach), _) => reach.to_string(),
        (None, _) => "not looked up".to_owned(),
    };
    Err(Blocked::GatewayOffLink(node.clone(), via, why))
}
