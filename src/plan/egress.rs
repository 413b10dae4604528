//! The way out of one Service's pods in one family: its VIP and its gateway, or why there is none.

use std::net::IpAddr;

use crate::cluster::{Node, OnNoGateway, Service, View};
use crate::names::NodeName;
use crate::plan::slots::{Slot, Slots};
use crate::plan::verdict::{Blocked, Verdict};
use crate::settings::Settings;
use crate::state::{Family, NextHop};

/// The way out of a Service's pods in one family, as seen from this node.
pub(super) struct Egress<'a> {
    pub(super) vip: Result<IpAddr, Blocked>,
    pub(super) gateway: Result<Gateway<'a>, Blocked>,
    on_no_gateway: &'a OnNoGateway,
}

impl Egress<'_> {
    /// Why there is no way out.
    fn blocked(&self) -> Option<&Blocked> {
        self.vip.as_ref().err().or(self.gateway.as_ref().err())
    }

    /// Whether its pods are let out as without us.
    pub(super) fn is_released(&self) -> bool {
        *self.on_no_gateway == OnNoGateway::NodeAddress && self.blocked().is_some()
    }

    /// Where pods of this node are routed to; none where the gateway is this node, and where there is none.
    pub(super) fn hop(&self) -> Option<&NextHop> {
        self.gateway.as_ref().ok()?.hop.as_ref()
    }

    /// What becomes of its Service.
    pub(super) fn verdict(&self) -> Verdict {
        match (&self.vip, &self.gateway) {
            (Ok(vip), Ok(gateway)) => Verdict::Active {
                vip: *vip,
                gateway: gateway.node.clone(),
            },
            (Err(blocked), _) | (_, Err(blocked)) if self.is_released() => {
                Verdict::Released(blocked.clone())
            }
            (Err(blocked), _) | (_, Err(blocked)) => Verdict::Blocked(blocked.clone()),
        }
    }

    /// The slot of its gateway, where that is another node.
    pub(super) fn slot(&self, slots: &Slots) -> Option<Slot> {
        slots.get(self.hop()?.via)
    }
}

pub(super) struct Gateway<'a> {
    pub(super) node: &'a NodeName,
    /// `None`: this node is the gateway.
    pub(super) hop: Option<NextHop>,
}

pub(super) fn egress<'a>(
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
