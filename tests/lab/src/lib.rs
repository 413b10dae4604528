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

pub mod api;
pub mod binaries;
pub mod capture;
pub mod cluster;
pub mod host;
pub mod kubelet;
pub mod net;
pub mod probe;
pub mod traffic;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::api::Api;
use crate::binaries::Binaries;
use crate::capture::Capture;
use crate::cluster::Cluster;
use crate::host::Host;
use crate::kubelet::Kubelet;
use crate::probe::{PORT, Protocol, Seen, Server, Stream};
use crate::traffic::{Beginning, Traffic};

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
    host: Arc<Host>,
    _server: Server,
}

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

impl Pod {
    /// Its address in a family.
    #[must_use]
    pub fn address(&self, family: Family) -> IpAddr {
        net::pick(&self.addresses, family)
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

/// A LoadBalancer Service of the lab.
#[derive(Clone, Debug)]
pub struct ServiceSpec {
    /// Its name; its pods are those with the label `app` of this value.
    pub name: String,
    /// `Cluster` or `Local`.
    pub traffic_policy: &'static str,
    /// Its families.
    pub families: Vec<Family>,
}

impl ServiceSpec {
    /// A dual-stack Service whose traffic keeps the client's address.
    #[must_use]
    pub fn new(name: &str) -> ServiceSpec {
        ServiceSpec {
            name: name.to_owned(),
            traffic_policy: "Cluster",
            families: Family::BOTH.into(),
        }
    }

    /// Chooses the traffic policy.
    #[must_use]
    pub fn traffic_policy(mut self, policy: &'static str) -> ServiceSpec {
        self.traffic_policy = policy;
        self
    }

    /// Chooses the families.
    #[must_use]
    pub fn families(mut self, families: &[Family]) -> ServiceSpec {
        self.families = families.into();
        self
    }
}

/// Label that makes a Service an egress Service.
pub const EGRESS_LABEL: &str = "metaleg.de/rewriteSrcIP";
const EXCLUDE_LABEL: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
const SERVICES: &str = "/api/v1/namespaces/default/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
/// A label that means nothing.
const HEARD: &str = "heard";
const DAEMONSET: &str = "/apis/apps/v1/namespaces/metallb-system/daemonsets/metaleg-agent";
const SPEAKER_ROLE: &str = "/apis/rbac.authorization.k8s.io/v1/clusterroles/metallb-system:speaker";
const PODS: &str = "/api/v1/namespaces/default/pods";
/// How long anything of the cluster may take to come about.
pub const SOON: Duration = Duration::from_secs(20);
/// Kubernetes' clients ask an API server that was away again after up to 30 s and jitter (client-go's
/// reflector): MetalLB may learn so late of what is new.
const BACK_OFF: Duration = Duration::from_secs(60);
/// An agent that logs every step and says nothing for so long has none to execute; in doubt it asks once a second.
const QUIET: Duration = Duration::from_millis(250);
const PREFIX: &str = "metaleg-lab-";

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
    /// Builds what is missing and starts a lab with everything but MetalEG.
    ///
    /// # Errors
    /// When a tool is missing, or something does not come up; nothing is left then.
    pub fn start(options: Options) -> Result<Lab> {
        if !nix::unistd::geteuid().is_root() {
            bail!("the lab makes network namespaces: run it as root");
        }
        require_tools()?;
        let binaries = Binaries::build()?;
        sweep();
        end_with_signals();
        let directory = tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{}-", std::process::id()))
            .tempdir()?;
        remember(directory.path());

        let lan = Host::new("lan")?;
        net::make_lan(&lan)?;
        let control_plane = Host::new("control-plane")?;
        net::join(
            &lan,
            &control_plane,
            "02:00:00:00:00:01",
            &net::CONTROL_PLANE,
        )?;
        let (mut cluster, api) = {
            let nodes = Lab::nodes(&lan, &options, directory.path())?;
            let (mut cluster, api) = Cluster::start(&control_plane, &binaries, directory.path())?;
            for (number, node) in (1..).zip(&nodes) {
                cluster::create_node(&api, &node.name, number)?;
            }
            cluster.start_controllers(
                &control_plane,
                &nodes,
                options.kube_proxy,
                options.masquerade,
            )?;
            ((cluster, nodes), api)
        };
        cluster.0.start_metallb(&control_plane, &cluster.1, &api)?;
        let (cluster, nodes) = cluster;
        let router = Host::new("router")?;
        net::join(
            &lan,
            &router,
            "02:00:00:00:00:fe",
            &["192.0.2.254", "2001:db8:1::fe"],
        )?;
        let far_server = Host::new("far-server")?;
        net::make_far_side(&router, &far_server)?;
        net::routes_to_pods(&router, options.nodes, None)?;
        let lan_server = Host::new("lan-server")?;
        net::join(&lan, &lan_server, "02:00:00:00:00:64", &net::LAN_SERVER)?;
        net::default_route(&lan_server)?;
        net::routes_to_pods(&lan_server, options.nodes, None)?;
        let mut servers = vec![probe::serve(&lan_server)?, probe::serve(&far_server)?];
        for node in &nodes {
            servers.push(probe::serve(node)?);
        }
        Ok(Lab {
            kubelet: None,
            pods: Vec::new(),
            _servers: servers,
            cluster,
            api,
            nodes: Arc::new(nodes),
            lan_server,
            far_server,
            _router: router,
            control_plane,
            lan,
            directory,
            options,
            next_pod: 1,
            boots: 1,
        })
    }

    fn nodes(lan: &Host, options: &Options, directory: &Path) -> Result<Vec<Host>> {
        let mut nodes = Vec::new();
        for number in 1..=options.nodes {
            let node = Host::new(&format!("node{number}"))?;
            net::join(lan, &node, &net::node_mac(number), &net::node(number))?;
            net::default_route(&node)?;
            net::routes_to_pods(&node, options.nodes, Some(number))?;
            net::make_node(&node, number, options.masquerade)?;
            // All nodes have one kernel: as on machines of their own, each has boots of its own.
            let boot = boot_file(directory, number);
            fs::write(&boot, cluster::boot_id(&node.name, 1))?;
            let boot = boot.display();
            node.sh(&format!(
                "mount --bind {boot} /proc/sys/kernel/random/boot_id"
            ))?;
            nodes.push(node);
        }
        Ok(nodes)
    }

    // === looking around ===

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

    /// A pod by name.
    ///
    /// # Errors
    /// When there is none.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        let pod = self.pods.iter().find(|pod| pod.name == name);
        pod.with_context(|| format!("there is no pod {name}"))
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

    /// Writes everything that helps to understand a failure into a directory.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn dump(&self, target: &Path) -> Result<()> {
        fs::create_dir_all(target)?;
        for node in self.nodes.iter() {
            let text = node.output(
                "for c in 'ip rule' 'ip -6 rule' 'ip route show table all' 'ip -6 route show table all' \
                 'ip neigh' iptables-nft-save ip6tables-nft-save iptables-legacy-save ip6tables-legacy-save \
                 'nft list ruleset' 'ipset save' 'conntrack -L' 'conntrack -L -f ipv6'; do \
                 echo \"== $c\"; $c 2>&1 || true; done",
            )?;
            fs::write(target.join(format!("{}.txt", node.name)), text.stdout)?;
        }
        let objects = self.kubectl(&[
            "get",
            "services,endpointslices,nodes,pods,servicel2statuses.metallb.io",
            "-A",
            "-o",
            "yaml",
        ]);
        fs::write(
            target.join("objects.yaml"),
            objects.unwrap_or_else(|error| format!("{error:#}")),
        )?;
        for entry in fs::read_dir(self.directory().join("logs"))? {
            let entry = entry?;
            fs::copy(entry.path(), target.join(entry.file_name()))?;
        }
        Ok(())
    }

    // === MetalEG ===

    /// Installs MetalEG as an operator does, and waits until it is ready on every node.
    ///
    /// # Errors
    /// With the agents' logs when they do not become ready.
    pub fn install_metaleg(&mut self) -> Result<()> {
        self.apply_metaleg()?;
        self.wait_for_agents()
    }

    /// The same without waiting.
    ///
    /// # Errors
    /// When the API server refuses something.
    pub fn apply_metaleg(&mut self) -> Result<()> {
        let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../k8s");
        let manifests = manifests.canonicalize()?.display().to_string();
        self.kubectl(&["apply", "-k", &manifests])?;
        self.set_env(&self.options.settings)?;
        self.kubelet = Some(Kubelet::start(
            &self.api,
            &self.nodes,
            ("metallb-system", "app.kubernetes.io/name=metaleg"),
            &self.options.agent,
            &self.cluster.authority,
            self.directory.path(),
        ));
        Ok(())
    }

    /// Deletes what [`Lab::install_metaleg`] applied, and waits until no agent runs.
    ///
    /// # Errors
    /// When the agents do not end.
    pub fn uninstall_metaleg(&mut self) -> Result<()> {
        let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../k8s");
        let manifests = manifests.canonicalize()?.display().to_string();
        self.kubectl(&["delete", "-k", &manifests])?;
        let kubelet = self.kubelet.as_ref().context("MetalEG is not installed")?;
        eventually(SOON, "no agent runs", || {
            Ok((kubelet.running() == 0).then_some(()))
        })?;
        self.kubelet = None;
        Ok(())
    }

    /// Runs a command of the agent's program on a node, as an administrator of the cluster, and returns what it
    /// printed.
    ///
    /// # Errors
    /// With what it complained about when it fails.
    pub fn agent_command(&self, node: usize, arguments: &str) -> Result<String> {
        self.node(node).sh(&format!(
            "KUBECONFIG={} NODE_NAME=node{node} {} {arguments}",
            self.cluster.kubeconfig.display(),
            self.options.agent.display(),
        ))
    }

    /// Changes settings of all agents, one node after the other as the DaemonSet's rolling update does it.
    ///
    /// # Errors
    /// When the agents do not become ready with them.
    pub fn configure_agents(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.set_env(settings)?;
        eventually(SOON, "the agents are updated", || {
            let daemonset = self.api.get(DAEMONSET)?;
            let status = &daemonset["status"];
            let seen = status["observedGeneration"] == daemonset["metadata"]["generation"];
            let updated = status["updatedNumberScheduled"] == self.options.nodes;
            Ok((seen && updated).then_some(()))
        })?;
        self.wait_for_agents()
    }

    fn set_env(&self, settings: &[(&str, &str)]) -> Result<()> {
        if settings.is_empty() {
            return Ok(());
        }
        let settings: Vec<String> = settings
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        let mut args = vec![
            "-n",
            "metallb-system",
            "set",
            "env",
            "daemonset/metaleg-agent",
        ];
        args.extend(settings.iter().map(String::as_str));
        self.kubectl(&args).map(drop)
    }

    /// Waits until the agents of all nodes are ready.
    ///
    /// # Errors
    /// With the agents' logs when they do not become ready.
    pub fn wait_for_agents(&self) -> Result<()> {
        let nodes = self.options.nodes;
        let all_ready = || {
            let status = &self.api.get(DAEMONSET)?["status"];
            let kubelet = self.kubelet.as_ref().context("MetalEG is not installed")?;
            Ok((status["numberReady"] == nodes && kubelet.ready() == nodes).then_some(()))
        };
        eventually(SOON, "MetalEG is ready on every node", all_ready).map_err(|error| {
            let logs: String = self.node_numbers().map(|n| self.agent_log(n)).collect();
            error.context(format!("logs of the agents:\n{logs}"))
        })
    }

    /// What the agent of a node wrote, over all its starts.
    #[must_use]
    pub fn agent_log(&self, node: usize) -> String {
        self.log(&format!("agent-node{node}"))
    }

    fn log(&self, program: &str) -> String {
        let path = self.directory().join(format!("logs/{program}.log"));
        fs::read_to_string(path).unwrap_or_default()
    }

    /// Ends the agent of a node with a signal and waits until the kubelet has started it again and it is ready.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn restart_agent(&self, node: usize, signal: Signal) -> Result<()> {
        let kubelet = self.kubelet.as_ref().context("MetalEG is not installed")?;
        let name = format!("node{node}");
        let before = kubelet.restarts(&name);
        kubelet.signal(&name, signal)?;
        eventually(SOON, "the agent is started again", || {
            Ok((kubelet.restarts(&name) > before).then_some(()))
        })?;
        self.wait_for_agents()
    }

    /// Sends a signal to all agents and goes on at once.
    ///
    /// # Errors
    /// When one does not run.
    pub fn signal_agents(&self, signal: Signal) -> Result<()> {
        let kubelet = self.kubelet.as_ref().context("MetalEG is not installed")?;
        let mut numbers = self.node_numbers();
        numbers.try_for_each(|number| kubelet.signal(&format!("node{number}"), signal))
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

    /// Lets the agents of all nodes die at a later time: each before it executes its next step but `steps`. Needs agents
    /// that are built for it.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn arm_kill_points(&self, steps: usize) -> Result<()> {
        for number in self.node_numbers() {
            fs::write(self.kill_point(number), steps.to_string())?;
        }
        Ok(())
    }

    /// Waits until the agent of every node has died, or has changed its kernel since its log was so long and has nothing
    /// more to do.
    ///
    /// # Errors
    /// When one has done neither.
    pub fn wait_for_kill_points(&self, logs: &[usize]) -> Result<()> {
        for (number, length) in self.node_numbers().zip(logs) {
            let what = format!("the agent of node{number} has died or changed something");
            eventually(SOON, &what, || {
                let is_dead = !self.kill_point(number).exists();
                let log = self.agent_log(number);
                let has_changed = log
                    .get(*length..)
                    .is_some_and(|log| log.contains("kernel changed"));
                Ok((is_dead || has_changed).then_some(()))
            })?;
        }
        eventually(SOON, "no agent has anything to do", || {
            let before = self.agent_log_lengths();
            std::thread::sleep(QUIET);
            Ok((before == self.agent_log_lengths()).then_some(()))
        })
    }

    /// How long the agents' logs are.
    #[must_use]
    pub fn agent_log_lengths(&self) -> Vec<usize> {
        let length = |number| self.agent_log(number).len();
        self.node_numbers().map(length).collect()
    }

    /// Lets agents live that have not died; returns how many have.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn disarm_kill_points(&self) -> Result<usize> {
        let mut died = 0;
        for number in self.node_numbers() {
            match fs::remove_file(self.kill_point(number)) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => died += 1,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(died)
    }

    fn kill_point(&self, node: usize) -> PathBuf {
        let directory = self.directory().join(kubelet::KILL_POINTS);
        directory.join(format!("node{node}"))
    }

    // === objects ===

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

    /// Creates a LoadBalancer Service and waits for its VIPs.
    ///
    /// # Errors
    /// When MetalLB gives none.
    pub fn create_service(&self, spec: &ServiceSpec) -> Result<Vec<IpAddr>> {
        let families: Vec<String> = spec.families.iter().map(Family::to_string).collect();
        let policy = if families.len() > 1 {
            "RequireDualStack"
        } else {
            "SingleStack"
        };
        let service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": spec.name},
            "spec": {
                "type": "LoadBalancer", "selector": {"app": spec.name},
                "externalTrafficPolicy": spec.traffic_policy,
                "ipFamilyPolicy": policy, "ipFamilies": families,
                "ports": [{"name": "tcp", "protocol": "TCP", "port": PORT},
                          {"name": "udp", "protocol": "UDP", "port": PORT}],
            },
        });
        self.api.create(SERVICES, &service)?;
        self.wait_for_vips(&spec.name)
    }

    /// Waits until a Service has a VIP for each of its families, and returns them in the order of the families.
    ///
    /// # Errors
    /// When MetalLB gives none.
    pub fn wait_for_vips(&self, service: &str) -> Result<Vec<IpAddr>> {
        eventually(BACK_OFF, "MetalLB assigns the VIPs", || {
            let object = self.service(service)?;
            let families = object["spec"]["ipFamilies"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            let ingress = object["status"]["loadBalancer"]["ingress"]
                .as_array()
                .cloned();
            let vips: Vec<IpAddr> = ingress
                .unwrap_or_default()
                .iter()
                .filter_map(|ingress| ingress["ip"].as_str()?.parse().ok())
                .collect();
            let of = |family: &Value| {
                vips.iter()
                    .find(|vip| vip.is_ipv4() == (*family == "IPv4"))
                    .copied()
            };
            let ordered: Vec<IpAddr> = families.iter().filter_map(of).collect();
            Ok((ordered.len() == families.len() && !ordered.is_empty()).then_some(ordered))
        })
    }

    /// Waits until MetalLB's speakers and the controllers of Kubernetes hear of a change of a Service and of its pods,
    /// which have its name as label `app`: after the API server was away each asks it again in its own time.
    ///
    /// # Errors
    /// When one stays deaf.
    pub fn wait_until_heard(&self, service: &str) -> Result<()> {
        let logs = || {
            let of_node = |number| self.log(&format!("speaker-node{number}"));
            self.node_numbers().map(of_node)
        };
        let before: Vec<usize> = logs().map(|log| log.len()).collect();
        // Never the same twice; a controller copies labels to the slices.
        let label = before.iter().sum::<usize>().to_string();
        self.patch_service(service, &json!({"metadata": {"labels": {HEARD: label}}}))?;
        let reconciled = format!("\"start reconcile\":\"default/{service}\"");
        let slices = format!("{SLICES}?labelSelector=kubernetes.io/service-name={service}");
        let pods = format!("{PODS}?labelSelector=app={service}");
        eventually(BACK_OFF, "everybody hears of the Service", || {
            let mut all = logs().zip(&before);
            let speakers_hear = all.all(|(log, before)| log[*before..].contains(&reconciled));
            let slices = self.api.get(&slices)?;
            let slices = || slices["items"].as_array().into_iter().flatten();
            let label_is_known = slices().all(|s| s["metadata"]["labels"][HEARD] == *label);
            let of_slices: BTreeSet<&str> = slices()
                .flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten())
                .flat_map(|endpoint| endpoint["addresses"].as_array().into_iter().flatten())
                .filter_map(Value::as_str)
                .collect();
            let pods = self.api.get(&pods)?;
            let pods = pods["items"].as_array().into_iter().flatten();
            let of_pods: BTreeSet<&str> = pods
                .flat_map(|pod| pod["status"]["podIPs"].as_array().into_iter().flatten())
                .filter_map(|address| address["ip"].as_str())
                .collect();
            let controllers_hear = label_is_known && of_slices == of_pods;
            Ok((speakers_hear && controllers_hear).then_some(()))
        })
    }

    fn service(&self, name: &str) -> Result<Value> {
        self.api.get(&format!("{SERVICES}/{name}"))
    }

    /// Changes a Service by a merge patch.
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn patch_service(&self, name: &str, change: &Value) -> Result<()> {
        self.api.patch(&format!("{SERVICES}/{name}"), change)
    }

    /// Opts a Service in or out.
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn label_service(&self, name: &str, egress: bool) -> Result<()> {
        let value = if egress { json!("true") } else { Value::Null };
        self.patch_service(
            name,
            &json!({"metadata": {"labels": {EGRESS_LABEL: value}}}),
        )
    }

    /// Deletes a Service.
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn delete_service(&self, name: &str) -> Result<()> {
        self.api.delete(&format!("{SERVICES}/{name}"))
    }

    /// A port of a Service on the nodes.
    ///
    /// # Errors
    /// When it has none.
    pub fn node_port(&self, service: &str) -> Result<u16> {
        let port = self.service(service)?["spec"]["ports"][0]["nodePort"].as_u64();
        Ok(u16::try_from(port.context("no node port")?)?)
    }

    /// The ClusterIP of a Service in a family.
    ///
    /// # Errors
    /// When it has none.
    pub fn cluster_ip(&self, service: &str, family: Family) -> Result<IpAddr> {
        let object = self.service(service)?;
        let ips = object["spec"]["clusterIPs"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let mut ips = ips
            .iter()
            .filter_map(|ip| ip.as_str()?.parse::<IpAddr>().ok());
        ips.find(|ip| ip.is_ipv4() == (family == Family::V4))
            .context("no ClusterIP of this family")
    }

    // === the wire ===

    /// The node that answers for a VIP on the wire, if any. Asked from a host that has nothing else to do with VIPs: what
    /// servers and router know of them is not touched.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn announcer(&self, vip: IpAddr) -> Result<Option<usize>> {
        let look = format!(
            "ip neigh del {vip} dev eth0 2>/dev/null || true
             ip neigh add {vip} dev eth0 nud none 2>/dev/null || true
             ip neigh change {vip} dev eth0 use 2>/dev/null || true
             for i in 1 2 3 4 5 6 7 8 9 10; do
               line=$(ip neigh show {vip} dev eth0)
               case \"$line\" in *lladdr*) break;; esac
               sleep 0.05
             done
             echo \"$line\""
        );
        // Something must be sent for the kernel to ask who has the address.
        let target = SocketAddr::new(vip, 9);
        let sent = self.control_plane.inside(move || {
            let any: IpAddr = if vip.is_ipv4() {
                [0; 4].into()
            } else {
                [0_u16; 8].into()
            };
            std::net::UdpSocket::bind((any, 0))
                .and_then(|socket| socket.send_to(b"?", target))
                .is_ok()
        })?;
        // What matters is the question, not the datagram.
        let _ = sent.join();
        let line = self.control_plane.sh(&look)?;
        Ok(self
            .node_numbers()
            .find(|number| line.contains(&net::node_mac(*number))))
    }

    /// Waits until some node, or a certain one, answers for a VIP, and returns it.
    ///
    /// # Errors
    /// When none does in time.
    pub fn wait_for_announcer(&self, vip: IpAddr, wanted: Option<usize>) -> Result<usize> {
        eventually(
            BACK_OFF,
            &format!("{vip} is announced by {wanted:?}"),
            || {
                let found = self.announcer(vip)?;
                Ok(found.filter(|node| wanted.is_none_or(|wanted| wanted == *node)))
            },
        )
    }

    /// Makes a node the only one that may announce, and waits until it does.
    ///
    /// # Errors
    /// When the VIPs do not move.
    pub fn move_announcement(&self, vips: &[IpAddr], to: usize) -> Result<()> {
        // The new one first, the present one last: in between there is always one that may, and it goes nowhere else.
        self.allow_announcing(to, true)?;
        let now = vips.first().map(|vip| self.announcer(*vip)).transpose()?;
        let mut others: Vec<usize> = self.node_numbers().filter(|n| *n != to).collect();
        others.sort_by_key(|number| now.flatten() == Some(*number));
        for number in others {
            self.allow_announcing(number, false)?;
        }
        for vip in vips {
            self.wait_for_announcer(*vip, Some(to))?;
        }
        Ok(())
    }

    /// The nodes that MetalLB's objects name as announcers of a Service.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn status_names(&self, service: &str) -> Result<Vec<String>> {
        let path = "/apis/metallb.io/v1beta1/namespaces/metallb-system/servicel2statuses";
        let path = format!("{path}?labelSelector=metallb.io/service-name={service}");
        let list = self.api.get(&path)?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let label = |item: &Value| {
            Some(
                item["metadata"]["labels"]["metallb.io/node"]
                    .as_str()?
                    .to_owned(),
            )
        };
        Ok(items.iter().filter_map(label).collect())
    }

    /// Removes MetalLB's objects about a Service's announcer, and lets speakers write none until [`Lab::allow_statuses`].
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn lose_statuses(&self, service: &str) -> Result<()> {
        self.let_speakers(&["get", "list", "watch"])?;
        let of_service = format!("--selector=metallb.io/service-name={service}");
        eventually(SOON, "MetalLB's objects are lost", || {
            let delete = ["delete", "servicel2statuses.metallb.io", &of_service];
            self.kubectl(&[&["-n", "metallb-system"], &delete[..]].concat())?;
            // A speaker that has not heard yet that it may not writes it again at once.
            std::thread::sleep(QUIET);
            Ok(self.status_names(service)?.is_empty().then_some(()))
        })
    }

    /// Lets speakers write their objects again.
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn allow_statuses(&self) -> Result<()> {
        self.let_speakers(&["*"])
    }

    /// What speakers may do with their objects.
    fn let_speakers(&self, verbs: &[&str]) -> Result<()> {
        let mut rules = self.api.get(SPEAKER_ROLE)?["rules"].clone();
        for rule in rules.as_array_mut().context("a role without rules")? {
            let kinds = rule["resources"].as_array().into_iter().flatten();
            if kinds.into_iter().any(|kind| *kind == "servicel2statuses") {
                rule["verbs"] = json!(verbs);
            }
        }
        self.api.patch(SPEAKER_ROLE, &json!({"rules": rules}))
    }

    /// Says whether a node may announce VIPs.
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn allow_announcing(&self, node: usize, allowed: bool) -> Result<()> {
        let value = if allowed { Value::Null } else { json!("true") };
        let change = json!({"metadata": {"labels": {EXCLUDE_LABEL: value}}});
        self.api
            .patch(&format!("/api/v1/nodes/node{node}"), &change)
    }

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

    /// Kills the agent of a node, and starts no other before [`Lab::start_agent`].
    ///
    /// # Errors
    /// When MetalEG is not installed.
    pub fn stop_agent(&self, node: usize) -> Result<()> {
        let kubelet = self.kubelet.as_ref().context("MetalEG is not installed")?;
        kubelet.hold(&format!("node{node}"));
        Ok(())
    }

    /// Starts the agent of a node that was booted, or whose agent was stopped.
    ///
    /// # Errors
    /// When MetalEG is not installed.
    pub fn start_agent(&self, node: usize) -> Result<()> {
        let kubelet = self.kubelet.as_ref().context("MetalEG is not installed")?;
        kubelet.release(&format!("node{node}"));
        Ok(())
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
}

/// What stands for `/proc/sys/kernel/random/boot_id` of a node.
fn boot_file(directory: &Path, node: usize) -> PathBuf {
    directory.join(format!("boot-id-node{node}"))
}

/// The tools that the lab runs, with their Debian packages.
const TOOLS: [(&str, &str); 8] = [
    ("conntrack", "conntrack"),
    ("go", "golang (1.26 or newer)"),
    ("ip", "iproute2"),
    ("ipset", "ipset"),
    ("iptables-nft", "iptables"),
    ("nft", "nftables"),
    ("setpriv", "util-linux"),
    ("sysctl", "procps"),
];

fn require_tools() -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories: Vec<PathBuf> = std::env::split_paths(&path)
        .chain(std::env::split_paths(host::PATH))
        .collect();
    let missing = |tool: &str| {
        !directories
            .iter()
            .any(|directory| directory.join(tool).exists())
    };
    let packages: Vec<&str> = TOOLS
        .iter()
        .filter(|(tool, _)| missing(tool))
        .map(|(_, p)| *p)
        .collect();
    if !packages.is_empty() {
        bail!(
            "the lab needs these Debian packages: {}",
            packages.join(", ")
        );
    }
    Ok(())
}

static DIRECTORIES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn remember(directory: &Path) {
    let mut directories = DIRECTORIES.lock().unwrap_or_else(PoisonError::into_inner);
    directories.push(directory.to_owned());
}

/// Removes the files on Ctrl-C and SIGTERM; the processes and with them the namespaces end by themselves.
#[expect(
    clippy::exit,
    reason = "a signal ends the process, whatever it is doing"
)]
fn end_with_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let Ok(mut signals) = signal_hook::iterator::Signals::new([
            signal_hook::consts::SIGINT,
            signal_hook::consts::SIGTERM,
        ]) else {
            return;
        };
        std::thread::spawn(move || {
            if let Some(signal) = signals.forever().next() {
                let directories = DIRECTORIES.lock().unwrap_or_else(PoisonError::into_inner);
                for directory in directories.iter() {
                    // What cannot be removed now is swept by the next lab.
                    let _ = fs::remove_dir_all(directory);
                }
                std::process::exit(128 + signal);
            }
        });
    });
}

/// Removes the files of labs that were killed.
fn sweep() {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Another lab may sweep at the same time.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
