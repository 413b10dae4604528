//! MetalEG itself: installed, configured, restarted, killed at a chosen step.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::kubelet::{self, Kubelet};
use crate::{Lab, QUIET, SOON, eventually};

const DAEMONSET: &str = "/apis/apps/v1/namespaces/metallb-system/daemonsets/metaleg-agent";

impl Lab {
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
        let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../k8s");
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

    /// Whether that was done, and not undone.
    #[must_use]
    pub fn is_installed(&self) -> bool {
        self.kubelet.is_some()
    }

    /// Deletes what [`Lab::install_metaleg`] applied, and waits until no agent runs.
    ///
    /// # Errors
    /// When the agents do not end.
    pub fn uninstall_metaleg(&mut self) -> Result<()> {
        let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../k8s");
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

    /// Whether the DaemonSet has these settings.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn has_settings(&self, settings: &[(&str, &str)]) -> Result<bool> {
        let daemonset = self.api.get(DAEMONSET)?;
        let env = &daemonset["spec"]["template"]["spec"]["containers"][0]["env"];
        let has = |(name, value): &(&str, &str)| {
            let mut env = env.as_array().into_iter().flatten();
            env.any(|variable| variable["name"] == *name && variable["value"] == *value)
        };
        Ok(settings.iter().all(has))
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

    /// How long the agents' logs are.
    #[must_use]
    pub fn agent_log_lengths(&self) -> Vec<usize> {
        let length = |number| self.agent_log(number).len();
        self.node_numbers().map(length).collect()
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

    /// Lets agents live that have not died; returns the nodes of those that have.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn disarm_kill_points(&self) -> Result<Vec<usize>> {
        let mut died = Vec::new();
        for number in self.node_numbers() {
            match fs::remove_file(self.kill_point(number)) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => died.push(number),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(died)
    }

    fn kill_point(&self, node: usize) -> PathBuf {
        let directory = self.directory().join(kubelet::KILL_POINTS);
        directory.join(format!("node{node}"))
    }
}
