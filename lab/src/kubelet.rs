//! A stand-in for the kubelet that runs what it is asked to run as it is asked to: the pods that the DaemonSet
//! controller creates from the manifest and the scheduler binds, with their env, args, capabilities, volumes
//! and ServiceAccount token. What is tested is the manifest.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::api::Api;
use crate::cluster::{pod_status, token};
use crate::host::{Host, PATH, Process, Program};
use crate::probe::http_get;
use crate::{net, say};

/// How often the kubelet looks for work: also the resolution of the readiness that it reports.
const ROUND: Duration = Duration::from_millis(100);
/// Directory of a file for each node that says after how many steps the agent dies.
pub(crate) const KILL_POINTS: &str = "kill-points";
/// Pause before a container that ended is started again.
const RESTART_PAUSE: Duration = Duration::from_millis(500);

/// What is shared with the thread that does the work.
#[derive(Debug, Default)]
struct Shared {
    running: Mutex<BTreeMap<String, Container>>,
    /// Nodes on which nothing is started.
    held: Mutex<BTreeSet<String>>,
    stop: AtomicBool,
}

/// The kubelet of all nodes.
#[derive(Debug)]
pub struct Kubelet {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// A running container of a pod.
#[derive(Debug)]
struct Container {
    node: String,
    process: Process,
    started: Instant,
    restarts: usize,
    ready: bool,
}

/// What the thread works with.
struct Worker {
    api: Api,
    nodes: Arc<Vec<Host>>,
    namespace: String,
    selector: String,
    binary: PathBuf,
    authority: PathBuf,
    directory: PathBuf,
}

impl Kubelet {
    /// Starts to run the pods of a namespace that a label selects; every image stands for `binary`.
    #[must_use]
    pub fn start(
        api: &Api,
        nodes: &Arc<Vec<Host>>,
        (namespace, selector): (&str, &str),
        binary: &Path,
        authority: &Path,
        directory: &Path,
    ) -> Kubelet {
        let worker = Worker {
            api: api.clone(),
            nodes: nodes.clone(),
            namespace: namespace.to_owned(),
            selector: selector.to_owned(),
            binary: binary.to_owned(),
            authority: authority.to_owned(),
            directory: directory.to_owned(),
        };
        let shared = Arc::new(Shared::default());
        let thread = std::thread::spawn({
            let shared = shared.clone();
            move || {
                while !shared.stop.load(Ordering::Relaxed) {
                    if let Err(error) = worker.round(&shared) {
                        // The API server may be away on purpose.
                        if !shared.stop.load(Ordering::Relaxed) && !is_away(&error) {
                            say!("kubelet: {error:#}");
                        }
                    }
                    std::thread::sleep(ROUND);
                }
            }
        });
        Kubelet {
            shared,
            thread: Some(thread),
        }
    }

    /// Kills what runs on a node, and starts nothing there until [`Kubelet::release`].
    pub fn hold(&self, node: &str) {
        let held = self.shared.held.lock();
        held.unwrap_or_else(PoisonError::into_inner)
            .insert(node.to_owned());
        let running = self.shared.running.lock();
        running
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|_, container| container.node != node);
    }

    /// Lifts that.
    pub fn release(&self, node: &str) {
        let held = self.shared.held.lock();
        held.unwrap_or_else(PoisonError::into_inner).remove(node);
    }

    /// How many containers run.
    #[must_use]
    pub fn running(&self) -> usize {
        let running = self.shared.running.lock();
        running.unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Sends a signal to the container on a node, without the pod being deleted.
    ///
    /// # Errors
    /// When none runs there.
    pub fn signal(&self, node: &str, signal: Signal) -> Result<()> {
        let running = self
            .shared
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let container = running.values().find(|container| container.node == node);
        container
            .with_context(|| format!("no agent runs on {node}"))?
            .process
            .signal(signal)
    }

    /// How often containers of a node were started again.
    #[must_use]
    pub fn restarts(&self, node: &str) -> usize {
        let running = self
            .shared
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        running
            .values()
            .filter(|c| c.node == node)
            .map(|c| c.restarts)
            .sum()
    }

    /// How many containers run and are ready.
    #[must_use]
    pub fn ready(&self) -> usize {
        let running = self
            .shared
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        running.values().filter(|container| container.ready).count()
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there was printed there.
            let _ = thread.join();
        }
    }
}

fn is_away(error: &anyhow::Error) -> bool {
    let text = format!("{error:#}");
    text.contains("onnect") || text.contains("client error") || text.contains("closed")
}

impl Worker {
    fn round(&self, shared: &Shared) -> Result<()> {
        let path = format!(
            "/api/v1/namespaces/{}/pods?labelSelector={}",
            self.namespace, self.selector
        );
        let list = self.api.get(&path)?;
        let pods = list["items"].as_array().cloned().unwrap_or_default();
        let uid = |pod: &Value| {
            pod["metadata"]["uid"]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        let known: Vec<String> = pods.iter().map(uid).collect();
        {
            let mut running = shared
                .running
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            running.retain(|uid, _| known.contains(uid));
        }
        for pod in &pods {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            self.pod(shared, &uid(pod), name, pod)
                .with_context(|| format!("pod {name}"))?;
        }
        Ok(())
    }

    fn pod(&self, shared: &Shared, uid: &str, name: &str, pod: &Value) -> Result<()> {
        let Some(node_name) = pod["spec"]["nodeName"].as_str() else {
            return Ok(());
        };
        let Some(index) = self.nodes.iter().position(|node| node.name == node_name) else {
            return Ok(());
        };
        let held = shared.held.lock();
        if held
            .unwrap_or_else(PoisonError::into_inner)
            .contains(node_name)
        {
            return Ok(());
        }
        let (node, addresses) = (&self.nodes[index], net::node(index + 1));
        let running = || {
            shared
                .running
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        let path = format!("/api/v1/namespaces/{}/pods/{name}", self.namespace);
        if !pod["metadata"]["deletionTimestamp"].is_null() {
            let grace = pod["metadata"]["deletionGracePeriodSeconds"]
                .as_u64()
                .unwrap_or(30);
            let container = running().remove(uid);
            if let Some(mut container) = container {
                container.process.signal(Signal::SIGTERM)?;
                // Killed when it goes out of scope, if it has not ended by then.
                let _ = container.process.wait(Duration::from_secs(grace));
            }
            return self.api.delete(&path);
        }
        let ended = running().get_mut(uid).map(|container| {
            let pause = RESTART_PAUSE.saturating_sub(container.started.elapsed());
            container
                .process
                .ended()
                .map(|_| (container.restarts + 1, pause))
        });
        let (restarts, wait) = match ended {
            None => (0, Duration::ZERO),
            Some(Some(again)) => again,
            Some(None) => return self.report(shared, uid, &path, pod, node, &addresses),
        };
        std::thread::sleep(wait);
        let process = self.container(uid, pod, node, &addresses)?;
        let container = Container {
            node: node_name.to_owned(),
            process,
            started: Instant::now(),
            restarts,
            ready: false,
        };
        running().insert(uid.to_owned(), container);
        self.api.patch(
            &format!("{path}/status"),
            &pod_status(&addresses, "Running", false),
        )
    }

    fn report(
        &self,
        shared: &Shared,
        uid: &str,
        path: &str,
        pod: &Value,
        node: &Host,
        addresses: &[String; 2],
    ) -> Result<()> {
        let ready = probe(node, &pod["spec"]["containers"][0])?;
        let mut running = shared
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(container) = running
            .get_mut(uid)
            .filter(|container| container.ready != ready)
        else {
            return Ok(());
        };
        container.ready = ready;
        drop(running);
        self.api.patch(
            &format!("{path}/status"),
            &pod_status(addresses, "Running", ready),
        )
    }

    /// Starts the pod's one container as its object says.
    fn container(
        &self,
        uid: &str,
        pod: &Value,
        node: &Host,
        addresses: &[String; 2],
    ) -> Result<Process> {
        let spec = &pod["spec"]["containers"][0];
        let directory = self.directory.join("pods").join(uid);
        fs::create_dir_all(directory.join("host-run"))?;
        let mounts = self.mounts(&directory, pod, spec)?;
        let security = &spec["securityContext"];
        let mut capabilities = "-all".to_owned();
        if security["capabilities"]["drop"] != json!(["ALL"]) {
            bail!("the lab runs only containers that drop all capabilities");
        }
        for capability in security["capabilities"]["add"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let name = capability.as_str().unwrap_or_default().to_lowercase();
            capabilities += &format!(",+{name}");
        }
        let mut privileges = format!("--bounding-set={capabilities} --inh-caps={capabilities}");
        if security["allowPrivilegeEscalation"] == json!(false) {
            privileges += " --no-new-privs";
        }
        let read_only = if security["readOnlyRootFilesystem"] == json!(true) {
            "mount -o remount,bind,ro /; mount -o remount,ro /run"
        } else {
            ":"
        };
        let script = format!(
            "mount --bind /run {run}
             mount -t tmpfs tmpfs /run
             mount --bind {kill_points} {kill_points}
             {mounts}
             {read_only}
             exec setpriv --pdeathsig KILL {privileges} -- \"$@\"",
            run = directory.join("host-run").display(),
            kill_points = self.kill_points()?.display(),
        );
        let log = format!("agent-{}", node.name);
        let mut program = Program::new(&log, "unshare", &self.directory.join("logs"));
        program = program.args(["--mount", "--", "sh", "-euc", &script, "sh", "env", "-i"]);
        program = program.args([format!("PATH={PATH}")]);
        for variable in spec["env"].as_array().into_iter().flatten() {
            let name = variable["name"]
                .as_str()
                .context("a variable without name")?;
            let value = value_of(variable, pod, addresses)?;
            program = program.args([format!("{name}={value}")]);
        }
        let kill_point = self.kill_points()?.join(&node.name);
        program = program.args([format!("METALEG_KILL_POINT={}", kill_point.display())]);
        program = program.args([
            "KUBERNETES_SERVICE_HOST=192.0.2.1",
            "KUBERNETES_SERVICE_PORT=6443",
        ]);
        let words = |value: &Value| -> Vec<String> {
            let words = value.as_array().into_iter().flatten();
            words
                .filter_map(|word| word.as_str().map(str::to_owned))
                .collect()
        };
        let command = words(&spec["command"]);
        if command.is_empty() {
            program = program.args([self.binary.display().to_string()]);
        }
        node.start(&program.args(command).args(words(&spec["args"])))
    }

    /// Where a build for tests is told when to die: the one place that containers may write to.
    fn kill_points(&self) -> Result<PathBuf> {
        let path = self.directory.join(KILL_POINTS);
        fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// The script that makes the container's mounts; what it does not mount is not there.
    fn mounts(&self, directory: &Path, pod: &Value, spec: &Value) -> Result<String> {
        let volumes = pod["spec"]["volumes"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let mut script = String::new();
        for mount in spec["volumeMounts"].as_array().into_iter().flatten() {
            let name = mount["name"].as_str().unwrap_or_default();
            let target = mount["mountPath"]
                .as_str()
                .context("a mount without path")?;
            // As in the image, /var/run is /run.
            let target = target
                .strip_prefix("/var")
                .filter(|t| t.starts_with("/run/"))
                .unwrap_or(target);
            let volume = volumes.iter().find(|volume| volume["name"] == name);
            let volume = volume.with_context(|| format!("no volume {name}"))?;
            if let Some(path) = volume["hostPath"]["path"].as_str() {
                let inside = path
                    .strip_prefix("/run/")
                    .context("the lab mounts host paths below /run")?;
                let source = directory.join("host-run").join(inside);
                if volume["hostPath"]["type"] != "FileOrCreate" {
                    bail!("the lab knows only host paths of type FileOrCreate");
                }
                script += &format!(
                    "touch {source} {target}; mount --bind {source} {target}\n",
                    source = source.display()
                );
            } else if volume["projected"].is_object() {
                let source = directory.join(name);
                self.project(&source, pod, &volume["projected"]["sources"])?;
                script += &format!(
                    "mkdir -p {target}; mount --bind {} {target}\n",
                    source.display()
                );
            } else {
                bail!("the lab does not know the kind of volume {name}");
            }
        }
        Ok(script)
    }

    fn project(&self, target: &Path, pod: &Value, sources: &Value) -> Result<()> {
        fs::create_dir_all(target)?;
        for source in sources.as_array().into_iter().flatten() {
            if let Some(path) = source["serviceAccountToken"]["path"].as_str() {
                let account = pod["spec"]["serviceAccountName"]
                    .as_str()
                    .unwrap_or("default");
                fs::write(
                    target.join(path),
                    token(&self.api, &self.namespace, account)?,
                )?;
            }
            if source["configMap"]["name"] == "kube-root-ca.crt" {
                fs::copy(&self.authority, target.join("ca.crt"))?;
            }
            for item in source["downwardAPI"]["items"]
                .as_array()
                .into_iter()
                .flatten()
            {
                let path = item["path"].as_str().unwrap_or_default();
                let field = item["fieldRef"]["fieldPath"].as_str().unwrap_or_default();
                fs::write(target.join(path), field_of(pod, field, &net::node(1))?)?;
            }
        }
        Ok(())
    }
}

fn value_of(variable: &Value, pod: &Value, addresses: &[String; 2]) -> Result<String> {
    match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
        Some(field) => field_of(pod, field, addresses),
        None => Ok(variable["value"].as_str().unwrap_or_default().to_owned()),
    }
}

fn field_of(pod: &Value, field: &str, addresses: &[String; 2]) -> Result<String> {
    let value = match field {
        "spec.nodeName" => pod["spec"]["nodeName"].as_str(),
        "metadata.name" => pod["metadata"]["name"].as_str(),
        "metadata.namespace" => pod["metadata"]["namespace"].as_str(),
        "status.hostIP" | "status.podIP" => Some(addresses[0].as_str()),
        _ => None,
    };
    Ok(value
        .with_context(|| format!("the lab does not know the field {field}"))?
        .to_owned())
}

/// Asks the container's readiness endpoint, from its node.
fn probe(node: &Host, spec: &Value) -> Result<bool> {
    let get = &spec["readinessProbe"]["httpGet"];
    let path = get["path"].as_str().unwrap_or("/");
    let ports = spec["ports"].as_array().cloned().unwrap_or_default();
    let named = ports.iter().find(|port| port["name"] == get["port"]);
    let port = named.map_or(&get["port"], |port| &port["containerPort"]);
    let port = port
        .as_u64()
        .and_then(|port| u16::try_from(port).ok())
        .context("no probe port")?;
    let answer = http_get(node, port, path);
    Ok(answer.is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")))
}
