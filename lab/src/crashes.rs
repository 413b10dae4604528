//! Processes and nodes that die, and come back.

use std::fs;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::start::boot_file;
use crate::{Lab, SOON, cluster, eventually, net};

impl Lab {
    /// Kills a process of the cluster (`kube-apiserver`, `speaker-node1`, `kube-proxy-node2`, …).
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn kill(&mut self, process: &str) -> Result<()> {
        self.cluster.kill(process)
    }

    /// Starts a process of the cluster again.
    ///
    /// # Errors
    /// When there never was one of that name.
    pub fn restart(&mut self, process: &str) -> Result<()> {
        let node = self
            .nodes
            .iter()
            .find(|node| process.ends_with(&format!("-{}", node.name)));
        self.cluster
            .restart(process, node.unwrap_or(&self.control_plane))
    }

    /// A node loses power: its programs end, and nothing comes from it any more. Its pods are not touched: the caller
    /// deletes them first.
    ///
    /// # Errors
    /// When something of it does not run.
    pub fn crash_node(&mut self, node: usize) -> Result<()> {
        let name = format!("node{node}");
        self.lan.sh(&format!("ip link set {name} down"))?;
        self.cluster.kill(&format!("speaker-{name}"))?;
        self.cluster.kill(&format!("kube-proxy-{name}"))?;
        let kubelet = self.kubelet.as_ref().context("MetalEG is not installed")?;
        kubelet.hold(&name);
        Ok(())
    }

    /// A node comes back with another boot: its kernel is empty but for what its CNI plugin does, and all programs are
    /// started but the agent.
    ///
    /// # Errors
    /// When something of it cannot be started.
    pub fn boot_node(&mut self, node: usize) -> Result<()> {
        let name = format!("node{node}");
        self.boots += 1;
        let boot = cluster::boot_id(&name, self.boots);
        net::empty_node(self.node(node))?;
        net::program_node(self.node(node), node, self.options.masquerade)?;
        fs::write(boot_file(self.directory.path(), node), &boot)?;
        let status = json!({"status": {"nodeInfo": {"bootID": boot}}});
        self.api
            .patch(&format!("/api/v1/nodes/{name}/status"), &status)?;
        self.lan.sh(&format!("ip link set {name} up"))?;
        self.restart(&format!("kube-proxy-{name}"))?;
        self.restart(&format!("speaker-{name}"))
    }

    /// Starts the API server again and waits until it answers: what is started while it does not may give up.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restart_api_server(&mut self) -> Result<()> {
        self.restart("kube-apiserver")?;
        eventually(SOON, "the API server answers, also for MetalLB", || {
            let served = self.api.get("/apis/metallb.io/v1beta1")?;
            let peers = served["resources"].as_array().into_iter().flatten();
            let has_all = peers.into_iter().any(|kind| kind["name"] == "bgppeers");
            Ok(has_all.then_some(()))
        })
    }

    /// After a failure: everything runs again that was started once, and every node may announce.
    ///
    /// # Errors
    /// When something cannot be started.
    pub fn mend(&mut self) -> Result<()> {
        for process in self.cluster.not_running() {
            match &*process {
                "kube-apiserver" => self.restart_api_server()?,
                other => self.restart(other)?,
            }
        }
        if let Some(kubelet) = &self.kubelet {
            for node in self.nodes.iter() {
                kubelet.release(&node.name);
                // One that does not run is started anyway.
                let _ = kubelet.signal(&node.name, Signal::SIGCONT);
            }
        }
        let mut numbers = self.node_numbers();
        numbers.try_for_each(|number| self.allow_announcing(number, true))
    }
}
