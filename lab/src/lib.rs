//! A real Kubernetes with MetalLB in network namespaces of one machine, for tests and the demo.
//!
//! ```text
//!            control plane .1      LAN server .100
//!                  |                    |
//!   ---------------+------- LAN --------+----------+---  192.0.2.0/24, 2001:db8:1::/64
//!        |              |             |            |
//!   node1 .11      node2 .12     node3 .13     router .254 --- far server 198.51.100.10, 2001:db8:2::10
//!     pods           pods          pods
//!   10.244.1.0/24  10.244.2.0/24  10.244.3.0/24 (and fd00:10:244:N::/64)
//! ```
//!
//! etcd, kube-apiserver with RBAC, kube-controller-manager, kube-scheduler, kube-proxy and MetalLB are the real
//! programs; the kernel is the real kernel. Only the kubelet is a stand-in: see [`kubelet`].
//!
//! Nothing has a name outside: namespaces are held by processes, which the kernel kills when the lab ends,
//! however it ends. Any number of labs run side by side.

mod agents;
pub mod api;
mod asks;
pub mod binaries;
pub mod capture;
pub mod cluster;
mod crashes;
mod dump;
pub mod host;
pub mod kubelet;
mod metallb;
pub mod net;
mod pods;
pub mod probe;
mod services;
mod start;
pub mod traffic;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tempfile::TempDir;

use crate::api::Api;
pub use crate::asks::{Dialer, Outside};
use crate::cluster::Cluster;
use crate::host::Host;
use crate::kubelet::Kubelet;
pub use crate::pods::Pod;
use crate::probe::Server;
pub use crate::services::{EGRESS_LABEL, ServiceSpec};

/// Writes a line for the person who watches.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        // A reader that goes away early is no failure.
        let _ = writeln!(std::io::stdout(), $($arg)*);
        let _ = std::io::stdout().flush();
    }};
}

/// An IP address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// How kube-proxy programs the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KubeProxy {
    /// With iptables.
    Iptables,
    /// With nftables.
    Nftables,
}

/// Where the CNI plugin's masquerade is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Masquerade {
    /// iptables in nf_tables mode.
    IptablesNft,
    /// iptables in legacy mode.
    IptablesLegacy,
    /// A table of its own.
    NftTable,
}

impl Masquerade {
    /// The mode of iptables on these nodes.
    #[must_use]
    pub fn iptables_mode(self) -> &'static str {
        match self {
            Masquerade::IptablesLegacy => "legacy",
            Masquerade::IptablesNft | Masquerade::NftTable => "nft",
        }
    }
}

/// What kind of lab.
#[derive(Clone, Debug)]
pub struct Options {
    /// Number of nodes.
    pub nodes: usize,
    /// kube-proxy's mode.
    pub kube_proxy: KubeProxy,
    /// The CNI plugin's masquerade.
    pub masquerade: Masquerade,
    /// The program that the image of the DaemonSet stands for.
    pub agent: PathBuf,
    /// Settings of the agents that differ from the DaemonSet's, as environment variables.
    pub settings: Vec<(&'static str, &'static str)>,
}

/// How long anything of the cluster may take to come about.
pub const SOON: Duration = Duration::from_secs(20);
/// Kubernetes' clients ask an API server that was away again after up to 30 s and jitter (client-go's
/// reflector): MetalLB may learn so late of what is new.
const BACK_OFF: Duration = Duration::from_secs(60);
/// An agent that logs every step and says nothing for so long has none to execute; in doubt it asks once a second.
const QUIET: Duration = Duration::from_millis(250);

/// A running lab. Everything of it ends with it.
#[derive(Debug)]
pub struct Lab {
    // In the order in which they must end.
    kubelet: Option<Kubelet>,
    pods: Vec<Pod>,
    _servers: Vec<Server>,
    cluster: Cluster,
    api: Api,
    nodes: Arc<Vec<Host>>,
    lan_server: Host,
    far_server: Host,
    _router: Host,
    control_plane: Host,
    lan: Host,
    directory: TempDir,
    options: Options,
    next_pod: usize,
    /// How many boots the node with the most of them has had.
    boots: usize,
}

/// Waits until `check` finds something.
///
/// # Errors
/// With `what` and the last error or "not yet" when it has not by the end of `limit`.
pub fn eventually<T>(
    limit: Duration,
    what: &str,
    mut check: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        let result = check();
        if let Ok(Some(value)) = result {
            return Ok(value);
        }
        if Instant::now() > deadline {
            let why = result
                .err()
                .map_or("not yet".to_owned(), |error| format!("{error:#}"));
            bail!("waited {limit:?} until {what}: {why}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Lab {
    /// What kind of lab it is.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The directory with logs and kubeconfigs.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A shell command that runs kubectl as the administrator, from anywhere on this machine.
    #[must_use]
    pub fn kubectl_command(&self) -> String {
        format!(
            "nsenter -t {} -n {} --kubeconfig={}",
            self.control_plane.pid(),
            self.cluster.kubectl_path().display(),
            self.cluster.kubeconfig.display()
        )
    }

    /// A node, counted from 1.
    #[must_use]
    pub fn node(&self, number: usize) -> &Host {
        &self.nodes[number - 1]
    }

    /// Numbers of all nodes.
    #[must_use]
    pub fn node_numbers(&self) -> std::ops::RangeInclusive<usize> {
        1..=self.options.nodes
    }

    /// The API server.
    #[must_use]
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// Runs kubectl as the administrator.
    ///
    /// # Errors
    /// With what kubectl says.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.cluster.kubectl(&self.control_plane, args, None)
    }
}
