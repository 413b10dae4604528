//! Watches: one reflector for each kind of object, which keeps its facts up to date and wakes the agent when one of them
//! changes.
//!
//! Objects are reduced to facts on arrival; an event that changes no fact wakes nobody. While the API server is away,
//! the last facts stay.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use kube::core::{DeserializeGuard, Resource, ResourceExt};
use kube::runtime::watcher;
use kube::{Api, Client};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;

use crate::backoff::Backoff;
use crate::cluster::index::{Facts, Failure, Index, Snapshot, Watch, WatchState};
use crate::cluster::l2status::{self, L2Status};
use crate::cluster::leases::{self, LEASE_LABEL, LEASE_VALUE};
use crate::cluster::{EGRESS_LABEL, EGRESS_VALUE, EndpointSlice, Node, Pod, Service};
use crate::cluster::{pools, service_cidrs};
use crate::error::chain;
use crate::names::{NodeName, ObjectKey};
use crate::settings::Settings;
use crate::tasks::Tasks;

/// Pauses after failures: an API server that is back is noticed within the longest.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));

/// How often to look whether a kind that is not served has come.
const NOT_SERVED_PAUSE: Duration = Duration::from_secs(60);

/// The cluster as the watches see it.
#[derive(Debug, Default)]
pub struct Cluster {
    index: Mutex<Index>,
    changed: Notify,
}

impl Cluster {
    fn index(&self) -> MutexGuard<'_, Index> {
        // Facts are replaced one by one: a panic elsewhere leaves no half of one.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a fact has changed since the last call.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    pub fn watches(&self) -> BTreeMap<Watch, WatchState> {
        self.index().watches()
    }

    /// Waits until every watch has delivered its first list. Cancel-safe.
    pub async fn synced(&self) {
        while self.not_synced().is_some() {
            self.changed().await;
        }
    }

    /// The watches that have not delivered their first list, with the reasons; `None` when all have.
    pub fn not_synced(&self) -> Option<String> {
        let watches = self.watches().into_iter();
        let missing: Vec<String> = watches
            .filter(|(_, state)| !state.synced)
            .map(|(watch, state)| {
                let why = state.failure.as_deref().unwrap_or("not listed yet");
                format!("{watch}: {why}")
            })
            .collect();
        (!missing.is_empty()).then(|| missing.join("; "))
    }

    pub fn facts(&self) -> Snapshot {
        self.index().snapshot()
    }

    /// As if every watch had delivered an empty list, but for the Nodes.
    #[cfg(test)]
    pub(crate) fn pretend_synced(&self, nodes: &[(NodeName, Node)]) {
        let mut index = self.index();
        for node in nodes {
            let event = watcher::Event::Apply(node.clone());
            let read = |(name, node): &(NodeName, Node)| (name.clone(), Ok(Some(node.clone())));
            index.take(Watch::Nodes, event, |index| &mut index.nodes, read);
        }
        index.pretend_synced();
        self.changed.notify_one();
    }
}

pub fn start(client: Client, settings: &Settings, cluster: &Arc<Cluster>, tasks: &mut Tasks) {
    let (node, metallb) = (&settings.node_name, &settings.metallb_namespace);
    let all = watcher::Config::default;
    let labelled = || all().labels(&format!("{EGRESS_LABEL}={EGRESS_VALUE}"));
    let mut reflectors = Reflectors { cluster, tasks };
    reflectors.follow(
        Watch::Services,
        Api::all(client.clone()),
        labelled(),
        |index| &mut index.services,
        key,
        |service| Some(Service::of(service)),
    );
    reflectors.follow(
        Watch::EndpointSlices,
        Api::all(client.clone()),
        labelled(),
        |index| &mut index.slices,
        key,
        EndpointSlice::of,
    );
    reflectors.follow(
        Watch::Nodes,
        Api::all(client.clone()),
        all(),
        |index| &mut index.nodes,
        |node| NodeName(node.name_any()),
        |node| Some(Node::of(node)),
    );
    reflectors.follow(
        Watch::Pods,
        Api::all(client.clone()),
        all().fields(&format!("spec.nodeName={node}")),
        |index| &mut index.pods,
        key,
        Pod::of,
    );
    reflectors.follow(
        Watch::ServiceL2Statuses,
        Api::namespaced_with(client.clone(), metallb, &l2status::resource()),
        all(),
        |index| &mut index.statuses,
        key,
        L2Status::of,
    );
    reflectors.follow(
        Watch::Leases,
        Api::namespaced(client.clone(), metallb),
        all().labels(&format!("{LEASE_LABEL}={LEASE_VALUE}")),
        |index| &mut index.leases,
        key,
        leases::programmed,
    );
    reflectors.follow(
        Watch::ServiceCidrs,
        Api::all(client.clone()),
        all(),
        |index| &mut index.service_cidrs,
        ResourceExt::name_any,
        |cidr| Some(service_cidrs(cidr)),
    );
    reflectors.follow(
        Watch::IpPools,
        Api::all_with(client.clone(), &pools::calico_pools()),
        all(),
        |index| &mut index.ip_pools,
        ResourceExt::name_any,
        |pool| Some(pools::networks(pool)),
    );
    reflectors.follow(
        Watch::CiliumNodes,
        Api::all_with(client, &pools::cilium_nodes()),
        all(),
        |index| &mut index.cilium_nodes,
        ResourceExt::name_any,
        |node| Some(pools::networks(node)),
    );
}

fn key(object: &impl ResourceExt) -> ObjectKey {
    ObjectKey {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
    }
}

struct Reflectors<'a> {
    cluster: &'a Arc<Cluster>,
    tasks: &'a mut Tasks,
}

impl Reflectors<'_> {
    /// Starts a watch that keeps the facts of one kind: each object is reduced to its key and its fact. An object that
    /// does not decode is an error of that object alone.
    fn follow<O, K, F>(
        &mut self,
        watch: Watch,
        api: Api<DeserializeGuard<O>>,
        config: watcher::Config,
        facts: fn(&mut Index) -> &mut Facts<K, F>,
        key: impl Fn(&DeserializeGuard<O>) -> K + Send + Sync + 'static,
        fact: impl Fn(&O) -> Option<F> + Send + Sync + 'static,
    ) where
        O: Resource + Clone + DeserializeOwned + fmt::Debug + Send + 'static,
        K: Ord + fmt::Debug + 'static,
        F: PartialEq + Clone + 'static,
    {
        let read = move |object: &DeserializeGuard<O>| {
            let fact = object.0.as_ref().map(&fact);
            (key(object), fact.map_err(|invalid| invalid.error.clone()))
        };
        let cluster = self.cluster.clone();
        self.tasks.spawn(format!("watch of {watch}"), async move {
            let mut events = watcher::watcher(api, config).boxed();
            let mut backoff = BACKOFF;
            while let Some(event) = events.next().await {
                let (is_news, pause) = match event {
                    Ok(event) => {
                        if !matches!(event, watcher::Event::Init) {
                            backoff.reset();
                        }
                        (cluster.index().take(watch, event, facts, &read), None)
                    }
                    Err(error) => {
                        let failure = describe(watch, &error);
                        let pause = match failure {
                            Failure::Expired => None,
                            Failure::NotServed => Some(NOT_SERVED_PAUSE),
                            Failure::Away(_) | Failure::Refused(_) => Some(backoff.pause()),
                        };
                        (cluster.index().fail(watch, &failure), pause)
                    }
                };
                if is_news {
                    cluster.changed.notify_one();
                }
                if let Some(pause) = pause {
                    tokio::time::sleep(pause).await;
                }
            }
        });
    }
}

fn describe(watch: Watch, error: &watcher::Error) -> Failure {
    let status = match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => match error {
            kube::Error::Api(status) => status.code,
            other => return Failure::Away(chain(other)),
        },
        watcher::Error::WatchError(status) => status.code,
        _ => 0,
    };
    match (watch, status) {
        (_, 410) => Failure::Expired,
        // ServiceCIDRs are served since Kubernetes 1.33; without them the exclusion of pods and nodes suffices, because
        // packets to a ClusterIP are looked at after kube-proxy has chosen the pod.
        (watch, 404) if watch.is_optional() => Failure::NotServed,
        (Watch::ServiceL2Statuses, 404) => Failure::Refused(
            "not served by the API server: is a MetalLB installed that has this resource?"
                .to_owned(),
        ),
        _ => Failure::Refused(chain(error)),
    }
}
