//! What the rows of one lab share, and what makes a row independent of those before it: each function does only what
//! is missing.

use std::net::IpAddr;

use anyhow::Result;
use metaleg_lab::{Lab, ServiceSpec};

use crate::continuity::Table;
use crate::leaving::{Before, settle};
use crate::matrix::Inside;

/// Pods of the egress Service `shop`, one on each node.
pub(crate) const SHOP: [&str; 4] = ["shop-1", "shop-2", "shop-3", "shop-4"];

/// A lab with what rows know of it.
pub(crate) struct Stage {
    pub(crate) lab: Lab,
    /// VIPs of `shop`.
    pub(crate) vips: Vec<IpAddr>,
    /// What was seen inside the cluster before MetalEG was installed.
    pub(crate) inside: Option<Inside>,
    /// What connections suffered.
    pub(crate) table: Table,
}

impl Stage {
    pub(crate) fn new(lab: Lab) -> Stage {
        Stage {
            lab,
            vips: Vec::new(),
            inside: None,
            table: Table::default(),
        }
    }

    /// Pods of an app, on the first nodes.
    pub(crate) fn pods(&mut self, names: &[&str], app: &str) -> Result<()> {
        for (number, name) in self.lab.node_numbers().zip(names) {
            if self.lab.pod(name).is_err() {
                self.lab.create_pod(name, number, app)?;
            }
        }
        Ok(())
    }

    /// A Service with VIPs.
    pub(crate) fn service(&mut self, spec: &ServiceSpec) -> Result<Vec<IpAddr>> {
        match self.lab.has_service(&spec.name)? {
            true => self.lab.wait_for_vips(&spec.name),
            false => self.lab.create_service(spec),
        }
    }

    /// MetalEG runs on every node, with the settings of this lab.
    pub(crate) fn installed(&mut self) -> Result<()> {
        if !self.lab.is_installed() {
            return self.lab.install_metaleg();
        }
        let settings = self.lab.options().settings.clone();
        self.configured(&settings)
    }

    /// The agents have some settings.
    pub(crate) fn configured(&self, settings: &[(&str, &str)]) -> Result<()> {
        match self.lab.has_settings(settings)? {
            true => self.lab.wait_for_agents(),
            false => self.lab.configure_agents(settings),
        }
    }

    /// MetalEG runs, and the pods of `shop` on all nodes leave as its VIPs.
    pub(crate) fn shop(&mut self) -> Result<()> {
        self.pods(&SHOP, "shop")?;
        self.installed()?;
        self.vips = self.service(&ServiceSpec::new("shop"))?;
        if !self.lab.is_labelled("shop")? {
            self.lab.label_service("shop", true)?;
        }
        let nodes = self.lab.node_numbers().count();
        settle(&self.lab, &SHOP[..nodes], &self.vips, Before::Nodes)
    }
}
