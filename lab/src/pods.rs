//! Pods: a network namespace each, and an object as a kubelet would write it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;

use crate::cluster;
use crate::host::Host;
use crate::probe::{self, Server};
use crate::traffic::Beginning;
use crate::{Family, Lab, net};

pub(crate) const PODS: &str = "/api/v1/namespaces/default/pods";

/// A pod of the lab.
#[derive(Debug)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its node, counted from 1.
    pub node: usize,
    /// By which its addresses and its interface are told from others'.
    number: usize,
    /// Its addresses.
    pub addresses: [String; 2],
    pub(crate) host: Arc<Host>,
    _server: Server,
}

impl Pod {
    /// Its address in a family.
    #[must_use]
    pub fn address(&self, family: Family) -> IpAddr {
        net::pick(&self.addresses, family)
    }
}

impl Lab {
    /// A pod by name.
    ///
    /// # Errors
    /// When there is none.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        let pod = self.pods.iter().find(|pod| pod.name == name);
        pod.with_context(|| format!("there is no pod {name}"))
    }

    /// Starts a pod on a node, as a member of an `app`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create_pod(&mut self, name: &str, node: usize, app: &str) -> Result<()> {
        let n = self.next_pod;
        self.next_pod += 1;
        self.create_pod_numbered(n, name, node, app)
    }

    /// Starts a pod that sends to outside before its object is there; returns that, and when the API server had taken
    /// the pod's addresses.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create_pod_that_sends(
        &mut self,
        name: &str,
        node: usize,
        app: &str,
        family: Family,
    ) -> Result<(Beginning, Instant)> {
        let n = self.next_pod;
        self.next_pod += 1;
        let host = Arc::new(Host::new(name)?);
        net::connect_pod(self.node(node), node, &host, &format!("pod{n}"), n)?;
        let beginning = Beginning::start(&host, family)?;
        // Something is sent while nobody knows of it.
        std::thread::sleep(Duration::from_millis(20));
        self.announce_pod(n, name, node, app, host)?;
        Ok((beginning, Instant::now()))
    }

    /// Ends a pod, and starts another on the same node with the same addresses.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn replace_pod(&mut self, old: &str, new: &str, app: &str) -> Result<()> {
        let (n, node) = (self.pod(old)?.number, self.pod(old)?.node);
        self.delete_pod(old)?;
        self.create_pod_numbered(n, new, node, app)
    }

    fn create_pod_numbered(&mut self, n: usize, name: &str, node: usize, app: &str) -> Result<()> {
        let host = Arc::new(Host::new(name)?);
        net::connect_pod(self.node(node), node, &host, &format!("pod{n}"), n)?;
        self.announce_pod(n, name, node, app, host)
    }

    /// Tells the API server of a pod whose network is there.
    fn announce_pod(
        &mut self,
        n: usize,
        name: &str,
        node: usize,
        app: &str,
        host: Arc<Host>,
    ) -> Result<()> {
        let server = probe::serve(&host)?;
        let addresses = net::pod(node, n);
        let labels = json!({"app": app});
        cluster::create_pod(
            &self.api,
            "default",
            name,
            &format!("node{node}"),
            &labels,
            &addresses,
            false,
        )?;
        self.pods.push(Pod {
            name: name.to_owned(),
            number: n,
            node,
            addresses,
            host,
            _server: server,
        });
        Ok(())
    }

    /// Creates a hostNetwork pod: an object only, for its network is the node's.
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn create_host_network_pod(&self, name: &str, node: usize, app: &str) -> Result<()> {
        let labels = json!({"app": app});
        cluster::create_pod(
            &self.api,
            "default",
            name,
            &format!("node{node}"),
            &labels,
            &net::node(node),
            true,
        )
    }

    /// Ends a pod: as with a kubelet, its object goes when nothing of it runs any more.
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn delete_pod(&mut self, name: &str) -> Result<()> {
        if let Some(at) = self.pods.iter().position(|pod| pod.name == name) {
            let pod = self.pods.remove(at);
            // The kernel takes its time with the network of a process that has ended.
            let unplug = format!("ip link del pod{}", pod.number);
            self.node(pod.node).output(&unplug)?;
        }
        self.api.delete(&format!("{PODS}/{name}"))
    }
}
