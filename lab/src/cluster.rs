//! The control plane: etcd, API server, controllers, kube-proxy and MetalLB, as real as in production.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose};
use serde_json::{Value, json};

use crate::api::Api;
use crate::binaries::Binaries;
use crate::host::{Host, PATH, Process, Program};
use crate::{KubeProxy, Masquerade, SOON, eventually, net};

/// Where the API server listens, as seen from every host.
pub const SERVER: &str = "https://192.0.2.1:6443";

/// Users of the API server with a token of their own; MetalLB uses ServiceAccounts.
const USERS: [(&str, &str); 4] = [
    ("admin", "system:masters"),
    ("system:kube-controller-manager", "system:masters"),
    ("system:kube-scheduler", ""),
    ("system:kube-proxy", ""),
];

/// The processes of the control plane by name, with what to start again.
#[derive(Debug)]
pub struct Cluster {
    /// Kubeconfig of the administrator.
    pub kubeconfig: PathBuf,
    /// The certificate of the API server's authority.
    pub authority: PathBuf,
    programs: BTreeMap<String, Program>,
    processes: BTreeMap<String, Process>,
    binaries: Binaries,
    directory: PathBuf,
}

impl Cluster {
    /// Starts etcd and the API server, and waits until it answers.
    ///
    /// # Errors
    /// With the log's end when one of them does not come up.
    pub fn start(
        control_plane: &Host,
        binaries: &Binaries,
        directory: &Path,
    ) -> Result<(Cluster, Api)> {
        let logs = directory.join("logs");
        fs::create_dir_all(&logs)?;
        let authority = write_certificates(directory)?;
        let file = |name: &str| directory.join(name).display().to_string();
        let tokens: String = USERS
            .iter()
            .map(|(user, group)| format!("token-{user},{user},{user},\"{group}\"\n"))
            .collect();
        fs::write(directory.join("tokens.csv"), tokens)?;
        let mut cluster = Cluster {
            kubeconfig: directory.join("admin.kubeconfig"),
            authority,
            programs: BTreeMap::new(),
            processes: BTreeMap::new(),
            binaries: binaries.clone(),
            directory: directory.to_owned(),
        };
        for (user, _) in USERS {
            cluster.write_kubeconfig(user, &format!("token-{user}"))?;
        }
        let etcd = cluster.program("etcd", "etcd").args([
            format!("--data-dir={}", file("etcd")),
            "--unsafe-no-fsync".to_owned(),
            "--log-level=error".to_owned(),
        ]);
        let apiserver = cluster.program("kube-apiserver", "kube-apiserver").args([
            "--etcd-servers=http://127.0.0.1:2379".to_owned(),
            "--advertise-address=192.0.2.1".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
            "--authorization-mode=RBAC".to_owned(),
            "--allow-privileged".to_owned(),
            "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-signing-key-file={}", file("sa.key")),
            format!("--service-account-key-file={}", file("sa.pub")),
            format!("--token-auth-file={}", file("tokens.csv")),
            format!("--tls-cert-file={}", file("apiserver.crt")),
            format!("--tls-private-key-file={}", file("apiserver.key")),
            format!("--cert-dir={}", file("generated")),
        ]);
        cluster.run(control_plane, etcd)?;
        cluster.run(control_plane, apiserver)?;
        let api = Api::new(control_plane, &cluster.kubeconfig)?;
        cluster.wait_for("kube-apiserver", || {
            Ok(api.get("/api/v1/namespaces/default").is_ok())
        })?;
        Ok((cluster, api))
    }

    /// Starts controllers, scheduler, and for each node kube-proxy.
    ///
    /// # Errors
    /// When one cannot be started.
    pub fn start_controllers(
        &mut self,
        control_plane: &Host,
        nodes: &[Host],
        mode: KubeProxy,
        masquerade: Masquerade,
    ) -> Result<()> {
        let kubeconfig = |user: &str| self.kubeconfig_of(user).display().to_string();
        let manager = self
            .program("kube-controller-manager", "kube-controller-manager")
            .args([
                format!(
                    "--kubeconfig={}",
                    kubeconfig("system:kube-controller-manager")
                ),
                // What the lab needs; without node-lifecycle, nodes that nobody heartbeats stay ready.
                "--controllers=daemonset-controller,endpoints-controller,endpointslice-controller,\
             endpointslice-mirroring-controller,garbage-collector-controller,namespace-controller,\
             serviceaccount-controller"
                    .to_owned(),
                "--leader-elect=false".to_owned(),
                "--concurrent-service-endpoint-syncs=5".to_owned(),
            ]);
        let scheduler = self.program("kube-scheduler", "kube-scheduler").args([
            format!("--kubeconfig={}", kubeconfig("system:kube-scheduler")),
            "--leader-elect=false".to_owned(),
        ]);
        let mode = match mode {
            KubeProxy::Iptables => "iptables",
            KubeProxy::Nftables => "nftables",
        };
        // As in a kube-proxy image, `iptables` is the node's mode.
        let tools = self.iptables_of(masquerade)?;
        let proxies: Vec<Program> = nodes
            .iter()
            .map(|node| {
                let name = format!("kube-proxy-{}", node.name);
                self.program(&name, "kube-proxy")
                    .args([
                        format!("--kubeconfig={}", kubeconfig("system:kube-proxy")),
                        format!("--hostname-override={}", node.name),
                        format!("--proxy-mode={mode}"),
                        "--cluster-cidr=10.244.0.0/16,fd00:10:244::/48".to_owned(),
                        "--nodeport-addresses=192.0.2.0/24,2001:db8:1::/64".to_owned(),
                        "--conntrack-max-per-core=0".to_owned(),
                        "--conntrack-tcp-timeout-established=0".to_owned(),
                        "--conntrack-tcp-timeout-close-wait=0".to_owned(),
                    ])
                    .env("PATH", format!("{}:{PATH}", tools.display()))
            })
            .collect();
        self.run(control_plane, manager)?;
        self.run(control_plane, scheduler)?;
        for (node, proxy) in nodes.iter().zip(proxies) {
            self.run(node, proxy)?;
        }
        Ok(())
    }

    /// Installs MetalLB from its manifest, with its own roles, and starts controller and speakers.
    ///
    /// # Errors
    /// When the API server refuses something.
    pub fn start_metallb(&mut self, control_plane: &Host, nodes: &[Host], api: &Api) -> Result<()> {
        let manifest = without_workloads(&self.binaries.metallb_manifest()?);
        self.kubectl(
            control_plane,
            &["apply", "--server-side", "-f", "-"],
            Some(&manifest),
        )?;
        let established = [
            "wait",
            "--for=condition=Established",
            "--timeout=20s",
            "crd",
            "--all",
        ];
        self.kubectl(control_plane, &established, None)?;
        served(api)?;
        let pools = "
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: lab, namespace: metallb-system}
spec: {addresses: [192.0.2.200-192.0.2.240, 2001:db8:1::200-2001:db8:1::240]}
---
apiVersion: metallb.io/v1beta1
kind: L2Advertisement
metadata: {name: lab, namespace: metallb-system}
";
        self.kubectl(control_plane, &["apply", "-f", "-"], Some(pools))?;
        for account in ["controller", "speaker"] {
            let token = token(api, "metallb-system", account)?;
            self.write_kubeconfig(account, &token)?;
        }
        let controller = self
            .program("metallb-controller", "controller")
            .args([
                "--webhook-mode=disabled",
                "--disable-cert-rotation",
                "--log-level=info",
            ])
            .env("METALLB_NAMESPACE", "metallb-system")
            .env("METALLB_BGP_TYPE", "native")
            .env(
                "KUBECONFIG",
                self.kubeconfig_of("controller").display().to_string(),
            );
        self.run(control_plane, controller)?;
        for (number, node) in (1..).zip(nodes) {
            let name = format!("speaker-{}", node.name);
            // Members find each other by these pods, and status objects belong to them.
            let labels = json!({"app": "metallb", "component": "speaker"});
            create_pod(
                api,
                "metallb-system",
                &name,
                &node.name,
                &labels,
                &net::node(number),
                true,
            )?;
            let speaker = self
                .program(&name, "speaker")
                .args(["--log-level=info"])
                .env("METALLB_NAMESPACE", "metallb-system")
                .env("METALLB_NODE_NAME", &*node.name)
                .env("METALLB_POD_NAME", &*name)
                .env("METALLB_ML_BIND_ADDR", net::node(number)[0].clone())
                .env("METALLB_ML_BIND_PORT", "7946")
                .env("METALLB_ML_LABELS", "app=metallb,component=speaker")
                .env(
                    "KUBECONFIG",
                    self.kubeconfig_of("speaker").display().to_string(),
                );
            self.run(node, speaker)?;
        }
        Ok(())
    }

    /// Runs kubectl as the administrator.
    ///
    /// # Errors
    /// With what kubectl says.
    pub fn kubectl(
        &self,
        control_plane: &Host,
        args: &[&str],
        input: Option<&str>,
    ) -> Result<String> {
        let quoted: String = args
            .iter()
            .map(|arg| format!(" '{}'", arg.replace('\'', "'\\''")))
            .collect();
        let input = match input {
            Some(text) => format!(" <<'END-OF-INPUT'\n{text}\nEND-OF-INPUT\n"),
            None => String::new(),
        };
        let (kubectl, kubeconfig) = (self.binaries.path("kubectl"), &self.kubeconfig);
        control_plane.sh(&format!(
            // In the place of the shell, that it is killed with the lab.
            "exec env HOME={} {} --kubeconfig={}{quoted}{input}",
            self.directory.display(),
            kubectl.display(),
            kubeconfig.display(),
        ))
    }

    /// The path of kubectl, for people.
    #[must_use]
    pub fn kubectl_path(&self) -> PathBuf {
        self.binaries.path("kubectl")
    }

    /// Stops a process at once, as a crash does.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn kill(&mut self, name: &str) -> Result<()> {
        let process = self.processes.remove(name);
        process
            .map(drop)
            .with_context(|| format!("no process {name} runs"))
    }

    /// Processes that were started once and do not run; the API server, which others need, first.
    #[must_use]
    pub fn not_running(&mut self) -> Vec<String> {
        let mut names: Vec<String> = self.programs.keys().cloned().collect();
        names.retain(|name| {
            let process = self.processes.get_mut(name);
            process.is_none_or(|process| process.ended().is_some())
        });
        names.sort_by_key(|name| name != "kube-apiserver");
        names
    }

    /// Starts a process again.
    ///
    /// # Errors
    /// When there never was one of that name.
    pub fn restart(&mut self, name: &str, host: &Host) -> Result<()> {
        let program = self.programs.get(name).cloned();
        self.processes.remove(name);
        self.run(
            host,
            program.with_context(|| format!("there is no program {name}"))?,
        )
    }

    fn program(&self, name: &str, binary: &str) -> Program {
        Program::new(
            name,
            self.binaries.path(binary),
            &self.directory.join("logs"),
        )
    }

    fn run(&mut self, host: &Host, program: Program) -> Result<()> {
        let process = host.start(&program)?;
        self.processes.insert(program.name.clone(), process);
        self.programs.insert(program.name.clone(), program);
        Ok(())
    }

    fn wait_for(&mut self, name: &str, ready: impl Fn() -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !ready()? {
            let status = self.processes.get_mut(name).and_then(Process::ended);
            if status.is_some() || Instant::now() > deadline {
                let log = self.programs.get(name).map(|program| program.log_tail(20));
                bail!("{name} does not come up:\n{}", log.unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn kubeconfig_of(&self, user: &str) -> PathBuf {
        self.directory.join(format!("{user}.kubeconfig"))
    }

    fn write_kubeconfig(&self, user: &str, token: &str) -> Result<()> {
        let authority = self.authority.display().to_string();
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {"server": SERVER, "certificate-authority": authority}}],
            "users": [{"name": "lab", "user": {"token": token}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
        });
        fs::write(self.kubeconfig_of(user), text.to_string())?;
        Ok(())
    }

    /// A directory in which `iptables` and its relatives are those of one mode.
    fn iptables_of(&self, masquerade: Masquerade) -> Result<PathBuf> {
        let mode = masquerade.iptables_mode();
        let directory = self.directory.join(format!("iptables-{mode}"));
        fs::create_dir_all(&directory)?;
        for family in ["iptables", "ip6tables"] {
            for tool in ["", "-save", "-restore"] {
                let target = format!("/usr/sbin/xtables-{mode}-multi");
                std::os::unix::fs::symlink(target, directory.join(format!("{family}{tool}")))?;
            }
        }
        Ok(directory)
    }
}

/// An authority, a certificate of the API server, and the key that signs ServiceAccount tokens.
fn write_certificates(directory: &Path) -> Result<PathBuf> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    let issuer = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    let names = [
        "192.0.2.1",
        "2001:db8:1::1",
        "10.96.0.1",
        "kubernetes.default.svc",
    ];
    let key = KeyPair::generate()?;
    let server = CertificateParams::new(names.map(str::to_owned))?.signed_by(&key, &issuer)?;
    let account = KeyPair::generate()?;
    for (name, text) in [
        ("ca.crt", issuer.pem()),
        ("apiserver.crt", server.pem()),
        ("apiserver.key", key.serialize_pem()),
        ("sa.key", account.serialize_pem()),
        ("sa.pub", account.public_key_pem()),
    ] {
        fs::write(directory.join(name), text)?;
    }
    Ok(directory.join("ca.crt"))
}

/// MetalLB's manifest without what runs as pods and without webhooks, for which there is no server here.
fn without_workloads(manifest: &str) -> String {
    let kinds = ["Deployment", "DaemonSet", "ValidatingWebhookConfiguration"];
    let runs = |document: &&str| {
        !kinds
            .iter()
            .any(|kind| document.lines().any(|line| line == format!("kind: {kind}")))
    };
    let mut text = String::new();
    for document in manifest.split("\n---\n").filter(runs) {
        let mut skipping = false;
        for line in document.lines() {
            let indent = line.len() - line.trim_start().len();
            if indent <= 2 {
                skipping = line == "  conversion:";
            }
            if !skipping {
                text += line;
                text.push('\n');
            }
        }
        text += "---\n";
    }
    text
}

/// Waits until every custom kind is in what the API server says that it serves, which is later than that it is established.
/// A speaker that starts in between does without status objects, and waits for ever to write the first one.
fn served(api: &Api) -> Result<()> {
    let items = |list: &Value| list.as_array().cloned().unwrap_or_default();
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    let all = api.request("GET", definitions, None)?.unwrap_or_default();
    for definition in items(&all["items"]) {
        let spec = &definition["spec"];
        let group = spec["group"].as_str().context("a kind without a group")?;
        let kind = spec["names"]["plural"]
            .as_str()
            .context("a kind without a name")?;
        let versions = items(&spec["versions"]).into_iter();
        for version in versions.filter(|version| version["served"] == true) {
            let name = version["name"]
                .as_str()
                .context("a version without a name")?;
            let path = format!("/apis/{group}/{name}");
            eventually(SOON, &format!("{path} has {kind}"), || {
                let served = api.request("GET", &path, None)?.unwrap_or_default();
                let mut served = items(&served["resources"]).into_iter();
                Ok(served
                    .any(|resource| resource["name"] == *kind)
                    .then_some(()))
            })?;
        }
    }
    Ok(())
}

/// A token of a ServiceAccount.
///
/// # Errors
/// When the ServiceAccount does not exist.
pub fn token(api: &Api, namespace: &str, account: &str) -> Result<String> {
    let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
                         "spec": {"expirationSeconds": 86400}});
    let answer = api
        .request("POST", &path, Some(&request))?
        .with_context(|| format!("no ServiceAccount {namespace}/{account}"))?;
    let token = answer.pointer("/status/token").and_then(Value::as_str);
    Ok(token.context("an answer without token")?.to_owned())
}

/// Creates a node object that is ready and has room.
///
/// # Errors
/// With the API server's reason.
pub fn create_node(api: &Api, name: &str, number: usize) -> Result<()> {
    let nets = net::pod_nets(number);
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}},
        "spec": {"podCIDR": nets[0], "podCIDRs": nets},
    });
    api.create("/api/v1/nodes", &node)?;
    let addresses: Vec<Value> = net::node(number)
        .iter()
        .map(|address| json!({"type": "InternalIP", "address": address}))
        .collect();
    let room = json!({"cpu": "8", "memory": "16Gi", "pods": "500"});
    let status = json!({"status": {
        "addresses": addresses, "capacity": room, "allocatable": room,
        "conditions": [{"type": "Ready", "status": "True", "reason": "Lab", "message": ""}],
        "nodeInfo": {"bootID": boot_id(name, 1)},
    }});
    api.patch(&format!("/api/v1/nodes/{name}/status"), &status)
}

/// What tells a boot of a node from the ones before.
#[must_use]
pub fn boot_id(node: &str, boot: usize) -> String {
    format!("{node}-boot-{boot}")
}

/// Creates a pod object that runs and is ready.
///
/// # Errors
/// With the API server's reason.
pub fn create_pod(
    api: &Api,
    namespace: &str,
    name: &str,
    node: &str,
    labels: &Value,
    addresses: &[String; 2],
    host_network: bool,
) -> Result<()> {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"nodeName": node, "hostNetwork": host_network, "containers": [{"name": "lab", "image": "lab"}]},
    });
    let pods = format!("/api/v1/namespaces/{namespace}/pods");
    // The namespace's default ServiceAccount is not waited for: admission does not ask for it here.
    eventually(Duration::from_secs(10), "the namespace takes pods", || {
        api.create(&pods, &pod)?;
        Ok(Some(()))
    })?;
    api.patch(
        &format!("{pods}/{name}/status"),
        &pod_status(addresses, "Running", true),
    )
}

/// The status of a pod, as a kubelet reports it.
#[must_use]
pub fn pod_status(addresses: &[String; 2], phase: &str, ready: bool) -> Value {
    let ready = if ready { "True" } else { "False" };
    let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    json!({"status": {
        "phase": phase, "podIP": addresses[0], "podIPs": ips,
        "conditions": [{"type": "Ready", "status": ready}, {"type": "ContainersReady", "status": ready}],
    }})
}
