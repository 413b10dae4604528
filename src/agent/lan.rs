//! The agent's side of the wire: what to listen for, and what of it the operator is told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use tracing::warn;

use crate::announcers::Resolved;
use crate::cluster::View;
use crate::lan::{Anomaly, Heard, Lan, Wanted};
use crate::names::{Interface, NodeName};
use crate::report::{Report, events};
use crate::settings::Settings;

/// The wire, and what was told of it.
#[derive(Debug)]
pub(super) struct LanSide<'a> {
    settings: &'a Settings,
    report: &'a Report,
    /// None where announcements are read from objects only.
    wire: Option<&'a Lan>,
    odd: BTreeSet<Anomaly>,
    disagreements: BTreeMap<IpAddr, (NodeName, NodeName)>,
}

impl<'a> LanSide<'a> {
    /// Nothing was told yet.
    pub(super) fn new(settings: &'a Settings, report: &'a Report, wire: Option<&'a Lan>) -> Self {
        LanSide {
            settings,
            report,
            wire,
            odd: BTreeSet::new(),
            disagreements: BTreeMap::new(),
        }
    }

    /// Who announces what, as heard.
    pub(super) fn heard(&self) -> BTreeMap<IpAddr, Heard> {
        self.wire.map(Lan::heard).unwrap_or_default()
    }

    /// Waits until there is news; for ever where nobody listens.
    pub(super) async fn changed(&self) {
        match self.wire {
            Some(wire) => wire.changed().await,
            None => std::future::pending().await,
        }
    }

    /// Listens for what a view makes of interest, and tells the operator what is strange.
    pub(super) fn listen(&mut self, view: &View, resolved: &Resolved) {
        let Some(wire) = self.wire else {
            return;
        };
        wire.want(self.wanted(view, resolved));
        for anomaly in wire.anomalies().into_keys() {
            if self.odd.insert(anomaly.clone()) {
                self.tell(anomaly.vip(), "StrangeClaim", &anomaly.to_string(), view);
            }
        }
        for (vip, (object, voice)) in &resolved.disagreements {
            if !self.disagreements.contains_key(vip) {
                let note = format!(
                    "ServiceL2Status says that {object} announces {vip}, but {voice} answers for it: \
                     using the newer claim"
                );
                self.tell(*vip, "Disagreement", &note, view);
            }
        }
        self.disagreements.clone_from(&resolved.disagreements);
    }

    fn wanted(&self, view: &View, resolved: &Resolved) -> Wanted {
        let own = view.nodes.get(&self.settings.node_name);
        let is_lan = |link: &&Interface| {
            let mut addresses = own.into_iter().flat_map(|node| &node.addresses);
            addresses.any(|a| link.nets.iter().any(|net| net.contains(a)))
        };
        let found = || Some(view.links.iter().find(is_lan)?.name.clone());
        let nodes = view.nodes.iter().flat_map(|(name, node)| {
            let addresses = node.addresses.iter();
            addresses.map(move |address| (*address, name.clone()))
        });
        let vips = view.services.values().flat_map(|s| s.vips.values());
        Wanted {
            interface: self.settings.lan_interface.clone().or_else(found),
            own: Some(self.settings.node_name.clone()),
            nodes: nodes.collect(),
            vips: vips
                .map(|vip| (*vip, resolved.claimed.get(vip).cloned()))
                .collect(),
            unsettled: resolved.unsettled.clone(),
            audit: self.settings.reconciliation_interval,
        }
    }

    fn tell(&self, vip: IpAddr, reason: &'static str, note: &str, view: &View) {
        warn!("{note}");
        let told = events::about_vip(vip, reason, note, view, &self.settings.node_name);
        self.report.tell(told, view);
    }
}
