//! Starts a lab, and sees to it that nothing stays of one.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::binaries::Binaries;
use crate::cluster::{self, Cluster};
use crate::host::{self, Host};
use crate::{Lab, Options, net, probe};

const PREFIX: &str = "metaleg-lab-";

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
        let mut servers = vec![
            probe::serve_outside(&lan_server)?,
            probe::serve_outside(&far_server)?,
        ];
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
}

/// What stands for `/proc/sys/kernel/random/boot_id` of a node.
pub(crate) fn boot_file(directory: &Path, node: usize) -> PathBuf {
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

/// On Ctrl-C and SIGTERM, ends the processes, and with them the namespaces, and then removes their files: who still runs
/// writes more of them.
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
                host::end_all();
                let directories = DIRECTORIES.lock().unwrap_or_else(PoisonError::into_inner);
                directories.iter().for_each(|directory| remove(directory));
                std::process::exit(128 + signal);
            }
        });
    });
}

/// Removes a directory, in spite of processes that were killed a moment ago. What they keep for longer is swept by the next
/// lab.
fn remove(directory: &Path) {
    for _ in 0..100 {
        let removed = fs::remove_dir_all(directory);
        if removed.is_ok() || !directory.exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
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
