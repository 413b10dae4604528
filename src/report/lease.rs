//! The Lease by which other agents know that this node is programmed, see [`crate::cluster::leases`].

use std::future::Future;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::backoff::Backoff;
use crate::cluster::View;
use crate::cluster::leases::{
    self, BOOT_ANNOTATION, BootId, GUARDS_ANNOTATION, LEASE_LABEL, LEASE_VALUE,
};
use crate::error::chain;
use crate::names::NodeName;
use crate::settings::Settings;

/// Pauses after failures: a cause that was removed is noticed within the longest.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));

/// What the Lease is to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// The UID of the Node that owns it.
    pub(crate) owner: String,
    /// Whether the node is programmed.
    pub(crate) programmed: bool,
    /// Whether it guards as a gateway does.
    pub(crate) guards: bool,
}

/// This node in this boot, and the way to the task that writes its Lease.
#[derive(Debug)]
pub(super) struct Holder {
    node: NodeName,
    boot: BootId,
    wanted: watch::Sender<Option<Wanted>>,
}

impl Holder {
    /// A holder, and what receives the Leases that it wants written.
    pub(super) fn new(node: NodeName, boot: BootId) -> (Holder, watch::Receiver<Option<Wanted>>) {
        let (wanted, asked) = watch::channel(None);
        (Holder { node, boot, wanted }, asked)
    }

    /// Publishes whether the node is programmed, and as a gateway, unless the Lease says so already; returns whether it does.
    pub(super) fn say(&self, programmed: bool, guards: bool, view: &View) -> bool {
        // Without a Node nobody routes to this node, and nothing could own the Lease.
        let Some(node) = view.nodes.get(&self.node) else {
            return false;
        };
        let said = node.programmed.as_ref() == Some(&self.boot);
        let is_said = said == programmed && (!programmed || node.guards == Some(guards));
        if is_said {
            // What was to be said before, and could not be written yet, is not true any more.
            self.wanted
                .send_if_modified(|wanted| wanted.take().is_some());
        } else {
            self.wanted.send_replace(Some(Wanted {
                owner: node.uid.clone(),
                programmed,
                guards,
            }));
        }
        is_said
    }
}

/// A holder for this node, and the task that writes its Lease.
pub(super) fn hold(
    client: Client,
    settings: &Settings,
    boot: BootId,
) -> (Holder, impl Future<Output = ()> + Send + use<>) {
    let node = settings.node_name.clone();
    let api = Api::namespaced(client, &settings.metallb_namespace);
    let (holder, asked) = Holder::new(node.clone(), boot.clone());
    (holder, write(api, node, boot, asked))
}

async fn write(
    api: Api<Lease>,
    node: NodeName,
    boot: BootId,
    mut asked: watch::Receiver<Option<Wanted>>,
) {
    let name = leases::name(&node);
    let mut backoff = BACKOFF;
    while asked.changed().await.is_ok() {
        let Some(wanted) = asked.borrow_and_update().clone() else {
            continue;
        };
        let lease = document(&name, &node, &boot, &wanted);
        let by_us = PatchParams::apply("metaleg-agent").force();
        match api.patch(&name, &by_us, &Patch::Apply(&lease)).await {
            Ok(_) => {
                backoff.reset();
                let what = match wanted {
                    Wanted {
                        programmed: false, ..
                    } => "is not programmed",
                    Wanted { guards: false, .. } => "is programmed, and no gateway",
                    Wanted { guards: true, .. } => "is programmed as a gateway",
                };
                info!(lease = name, "other nodes know that this one {what}");
            }
            Err(error) => {
                warn!(
                    "cannot write Lease {name} of {}: until it is written, no other node routes its pods to this one: {}",
                    api.resource_url(),
                    chain(&error)
                );
                tokio::time::sleep(backoff.pause()).await;
                asked.mark_changed();
            }
        }
    }
}

fn document(name: &str, node: &NodeName, boot: &BootId, wanted: &Wanted) -> serde_json::Value {
    // Of no boot: what was there is gone.
    let boot = if wanted.programmed { &boot.0 } else { "" };
    json!({
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {
            "name": name,
            "labels": {LEASE_LABEL: LEASE_VALUE, "app.kubernetes.io/component": "agent"},
            "annotations": {BOOT_ANNOTATION: boot, GUARDS_ANNOTATION: wanted.guards.to_string()},
            // Garbage collected with the Node.
            "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": node.0, "uid": wanted.owner}],
        },
        // No duration and no renewal: it says what the node's kernel holds, not that an agent runs.
        "spec": {"holderIdentity": node.0},
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Node;

    #[test]
    fn what_could_not_be_written_is_not_written_when_it_is_not_true_any_more() {
        let (name, boot) = (NodeName("node1".to_owned()), BootId("first".to_owned()));
        let (holder, asked) = Holder::new(name.clone(), boot.clone());
        let node = Node {
            programmed: Some(boot),
            guards: Some(false),
            ..Node::default()
        };
        let view = View {
            nodes: [(name, node)].into(),
            ..View::default()
        };
        assert!(!holder.say(true, true, &view));
        assert!(asked.borrow().as_ref().is_some_and(|wanted| wanted.guards));
        assert!(holder.say(true, false, &view));
        assert_eq!(*asked.borrow(), None);
    }
}
