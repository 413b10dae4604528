//! A small client of the lab's API server, that speaks from inside the control plane's network.

use std::fs::File;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;

use anyhow::{Context, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::host::Host;

/// The client. Cheap to clone.
#[derive(Clone)]
pub struct Api {
    runtime: Arc<Shutdown>,
    client: Client,
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").finish_non_exhaustive()
    }
}

/// Ends the runtime without waiting: it may end inside another one.
#[derive(Debug)]
struct Shutdown(Option<Runtime>);

impl Drop for Shutdown {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Api {
    /// A client as the user of a kubeconfig.
    ///
    /// # Errors
    /// When the network cannot be entered.
    pub fn new(control_plane: &Host, kubeconfig: &Path) -> Result<Api> {
        let namespace = File::open(format!("/proc/{}/ns/net", control_plane.pid()))?;
        let enter = move || {
            // A thread that stays outside reaches no API server, which every call would say.
            let _ = setns(&namespace, CloneFlags::CLONE_NEWNET);
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .on_thread_start(enter)
            .build()?;
        let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
        let client = wait(&runtime, async move {
            let options = KubeConfigOptions::default();
            let config = Config::from_custom_kubeconfig(kubeconfig, &options).await?;
            anyhow::Ok(Client::try_from(config)?)
        })??;
        Ok(Api {
            runtime: Arc::new(Shutdown(Some(runtime))),
            client,
        })
    }

    /// Sends a request; an object that is not there is `None`.
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Option<Value>> {
        let kind = match method {
            "PATCH" => "application/merge-patch+json",
            _ => "application/json",
        };
        let bytes = body
            .map(serde_json::to_vec)
            .transpose()?
            .unwrap_or_default();
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", kind)
            .body(bytes)?;
        let client = self.client.clone();
        let runtime = self.runtime.0.as_ref().context("the client is closed")?;
        match wait(
            runtime,
            async move { client.request::<Value>(request).await },
        )? {
            Ok(value) => Ok(Some(value)),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(error) => Err(error).with_context(|| format!("{method} {path}")),
        }
    }

    /// Reads an object or a list.
    ///
    /// # Errors
    /// When it is not there or cannot be read.
    pub fn get(&self, path: &str) -> Result<Value> {
        self.request("GET", path, None)?
            .with_context(|| format!("{path} is not there"))
    }

    /// Creates an object.
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn create(&self, path: &str, object: &Value) -> Result<()> {
        self.request("POST", path, Some(object)).map(drop)
    }

    /// Merges into an object.
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn patch(&self, path: &str, change: &Value) -> Result<()> {
        self.request("PATCH", path, Some(change)).map(drop)
    }

    /// Deletes an object at once; absent is fine.
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn delete(&self, path: &str) -> Result<()> {
        let now = serde_json::json!({"gracePeriodSeconds": 0});
        self.request("DELETE", path, Some(&now)).map(drop)
    }
}

/// Runs on the runtime's own threads, which are in the right network, unlike the caller's.
fn wait<T: Send + 'static>(
    runtime: &Runtime,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = channel();
    runtime.spawn(async move {
        // The caller waits for it.
        let _ = sender.send(work.await);
    });
    receiver.recv().context("the client ended")
}
