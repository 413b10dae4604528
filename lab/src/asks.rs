//! What servers see of pods, nodes and hosts outside, and what is on the LAN.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::{Result, bail};

use crate::capture::Capture;
use crate::host::Host;
use crate::probe::{self, PORT, Protocol, Seen, Stream};
use crate::traffic::Traffic;
use crate::{Family, Lab, net};

/// Opens connections from a pod, independent of what happens to the lab.
#[derive(Debug)]
pub struct Dialer {
    pod: String,
    host: Arc<Host>,
}

impl Dialer {
    /// The pod's name.
    #[must_use]
    pub fn pod(&self) -> &str {
        &self.pod
    }

    /// What an outside server sees when the pod opens a connection.
    ///
    /// # Errors
    /// When the pod's network is gone.
    pub fn ask(&self, to: Outside, family: Family, protocol: Protocol) -> Result<Seen> {
        let address = to.address(family);
        probe::ask(&self.host, SocketAddr::new(address, PORT), protocol)
    }
}

/// Outside servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outside {
    /// On the nodes' network.
    Lan,
    /// Behind the router.
    Far,
}

impl Outside {
    /// Both.
    pub const BOTH: [Outside; 2] = [Outside::Lan, Outside::Far];

    /// Its address in a family.
    #[must_use]
    pub fn address(self, family: Family) -> IpAddr {
        match self {
            Outside::Lan => net::pick(&net::LAN_SERVER, family),
            Outside::Far => net::pick(&net::FAR_SERVER, family),
        }
    }
}

impl Lab {
    /// What an outside server sees when a pod opens a connection.
    ///
    /// # Errors
    /// When there is no such pod.
    pub fn source_seen(
        &self,
        pod: &str,
        to: Outside,
        family: Family,
        protocol: Protocol,
    ) -> Result<Seen> {
        self.ask_from_pod(pod, to.address(family), PORT, protocol)
    }

    /// What a server sees when a pod opens a connection to it.
    ///
    /// # Errors
    /// When there is no such pod.
    pub fn ask_from_pod(
        &self,
        pod: &str,
        to: IpAddr,
        port: u16,
        protocol: Protocol,
    ) -> Result<Seen> {
        probe::ask(&self.pod(pod)?.host, SocketAddr::new(to, port), protocol)
    }

    /// What an outside server sees when a process of a node opens a connection.
    ///
    /// # Errors
    /// When the node's network cannot be entered.
    pub fn ask_from_node(&self, node: usize, to: IpAddr, protocol: Protocol) -> Result<Seen> {
        probe::ask(self.node(node), SocketAddr::new(to, PORT), protocol)
    }

    /// What a server of the cluster sees when an outside host opens a connection to it.
    ///
    /// # Errors
    /// When the host's network cannot be entered.
    pub fn ask_from_outside(
        &self,
        from: Outside,
        to: IpAddr,
        port: u16,
        protocol: Protocol,
    ) -> Result<Seen> {
        let host = match from {
            Outside::Lan => &self.lan_server,
            Outside::Far => &self.far_server,
        };
        probe::ask(host, SocketAddr::new(to, port), protocol)
    }

    /// A connection of a pod to an outside server that stays open.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open_stream(&self, pod: &str, to: Outside, family: Family) -> Result<Stream> {
        Stream::open(
            &self.pod(pod)?.host,
            SocketAddr::new(to.address(family), PORT),
        )
    }

    /// Who opens connections from pods while other things happen to the lab.
    ///
    /// # Errors
    /// When there is no such pod.
    pub fn dialers(&self, pods: &[&str]) -> Result<Vec<Dialer>> {
        let dialer = |name: &&str| {
            let host = self.pod(name)?.host.clone();
            let pod = (*name).to_owned();
            Ok(Dialer { pod, host })
        };
        pods.iter().map(dialer).collect()
    }

    /// Starts traffic from pods that goes on while other things happen to the lab.
    ///
    /// # Errors
    /// When there is no such pod.
    pub fn traffic(&self, pods: &[&str]) -> Result<Traffic> {
        let hosts: Result<Vec<_>> = pods
            .iter()
            .map(|name| Ok(((*name).to_owned(), self.pod(name)?.host.clone())))
            .collect();
        Traffic::start(&hosts?)
    }

    /// Counts the packets that nodes send to servers outside, from now on.
    ///
    /// # Errors
    /// When it cannot listen on the LAN.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(&self.lan, self.options.nodes)
    }

    /// Tells every node that an outside host, which is no node, has an IPv4 address.
    ///
    /// # Errors
    /// When it cannot be sent.
    pub fn forge_claim(&self, address: IpAddr) -> Result<()> {
        let IpAddr::V4(v4) = address else {
            bail!("{address}: ARP is of IPv4");
        };
        let nodes: Vec<[u8; 6]> = self.node_numbers().map(net::node_mac_bytes).collect();
        let sent = self
            .lan_server
            .inside(move || probe::forge_arp("eth0", &nodes, v4))?;
        sent.join()
            .map_err(|_| anyhow::anyhow!("the forger panicked"))?
    }
}
