//! Watches: keeps the facts up to date and wakes the agent when one of them changes.
//!
//! The only file that talks to the API server. Objects are reduced to facts on arrival; an event that changes
//! no fact wakes nobody. While the API server is away, the last facts stay.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use ipnet::IpNet;
use k8s_openapi::api::coordination::v1 as coordination;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use kube::core::{DeserializeGuard, DynamicObject, Resource, ResourceExt};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::announcers::{Announcers, Claims, Resolved};
use crate::backoff::Backoff;
use crate::cluster::l2status::{self, L2Status};
use crate::cluster::leases::{self, BootId, LEASE_LABEL, LEASE_VALUE};
use crate::cluster::pools;
use crate::cluster::{
    EGRESS_LABEL, EGRESS_VALUE, EndpointSlice, Node, Pod, Service, View, service_cidrs,
};
use crate::error::chain;
use crate::lan::Heard;
use crate::names::{NodeName, ObjectKey};

/// Pauses after failures: an API server that is back is noticed within the longest.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));

/// How often to look whether what a cluster may do without has come.
const NOT_SERVED_PAUSE: Duration = Duration::from_secs(60);

/// One kind of object that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Watch {
    /// Labelled Services.
    Services,
    /// Their EndpointSlices.
    EndpointSlices,
    /// Nodes.
    Nodes,
    /// Pods of this node.
    Pods,
    /// MetalLB's ServiceL2Statuses.
    ServiceL2Statuses,
    /// Leases of the nodes' agents.
    Leases,
    /// ServiceCIDRs, where they are served.
    ServiceCidrs,
    /// Calico's IPPools, where Calico is.
    IpPools,
    /// Cilium's CiliumNodes, where Cilium is.
    CiliumNodes,
}

impl Watch {
    /// Whether a cluster may do without.
    fn is_optional(self) -> bool {
        matches!(
            self,
            Watch::ServiceCidrs | Watch::IpPools | Watch::CiliumNodes
        )
    }
}

impl fmt::Display for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Watch::Services => "Services",
            Watch::EndpointSlices => "EndpointSlices",
            Watch::Nodes => "Nodes",
            Watch::Pods => "Pods",
            Watch::ServiceL2Statuses => "ServiceL2Statuses",
            Watch::Leases => "Leases",
            Watch::ServiceCidrs => "ServiceCIDRs",
            Watch::IpPools => "IPPools",
            Watch::CiliumNodes => "CiliumNodes",
        })
    }
}

/// The facts of one kind.
#[derive(Debug)]
struct Facts<K, F> {
    current: BTreeMap<K, F>,
    /// A list that is under way: it replaces `current` as a whole when it is complete.
    incoming: Option<BTreeMap<K, F>>,
    synced: bool,
    failure: Option<String>,
    failures: u64,
}

impl<K, F> Default for Facts<K, F> {
    fn default() -> Self {
        Facts {
            current: BTreeMap::new(),
            incoming: None,
            synced: false,
            failure: None,
            failures: 0,
        }
    }
}

impl<K: Ord, F: PartialEq> Facts<K, F> {
    /// Takes a fact from the event stream; returns whether anything changed.
    fn apply(&mut self, key: K, fact: Option<F>) -> bool {
        match fact {
            Some(fact) if self.current.get(&key) == Some(&fact) => false,
            Some(fact) => {
                self.current.insert(key, fact);
                true
            }
            None => self.current.remove(&key).is_some(),
        }
    }

    fn start_list(&mut self) {
        self.incoming = Some(BTreeMap::new());
    }

    fn list(&mut self, key: K, fact: Option<F>) {
        if let (Some(incoming), Some(fact)) = (&mut self.incoming, fact) {
            incoming.insert(key, fact);
        }
    }

    fn end_list(&mut self) -> bool {
        let changed = match self.incoming.take() {
            Some(incoming) if incoming != self.current => {
                self.current = incoming;
                true
            }
            _ => false,
        };
        !std::mem::replace(&mut self.synced, true) || changed
    }
}

#[derive(Debug, Default)]
struct Index {
    services: Facts<ObjectKey, Service>,
    slices: Facts<ObjectKey, EndpointSlice>,
    nodes: Facts<NodeName, Node>,
    pods: Facts<ObjectKey, Pod>,
    statuses: Facts<ObjectKey, L2Status>,
    leases: Facts<ObjectKey, (NodeName, BootId)>,
    service_cidrs: Facts<String, BTreeSet<IpNet>>,
    ip_pools: Facts<String, BTreeSet<IpNet>>,
    cilium_nodes: Facts<String, BTreeSet<IpNet>>,
    /// The API server does not answer: said once, not once for each watch.
    away: bool,
}

impl Index {
    /// The nodes, with what their agents and Cilium say of them.
    fn nodes(&self) -> BTreeMap<NodeName, Node> {
        let mut nodes = self.nodes.current.clone();
        for (name, nets) in &self.cilium_nodes.current {
            // Without networks of its own Cilium goes by the Node's.
            if let Some(node) = nodes
                .get_mut(&NodeName(name.clone()))
                .filter(|_| !nets.is_empty())
            {
                node.pod_cidrs.clone_from(nets);
            }
        }
        for (node, boot) in self.leases.current.values() {
            if let Some(node) = nodes.get_mut(node) {
                node.programmed = Some(boot.clone());
            }
        }
        nodes
    }
}

/// How far a watch has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchState {
    /// The first list is complete.
    pub synced: bool,
    /// Why it fails at the moment.
    pub failure: Option<String>,
    /// How often it failed.
    pub failures: u64,
}

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

    /// As if every watch had delivered an empty list.
    #[cfg(test)]
    pub(crate) fn pretend_synced(&self) {
        let mut index = self.index();
        index.services.synced = true;
        index.slices.synced = true;
        index.nodes.synced = true;
        index.pods.synced = true;
        index.statuses.synced = true;
        index.leases.synced = true;
        index.service_cidrs.synced = true;
        index.ip_pools.synced = true;
        index.cilium_nodes.synced = true;
        self.changed.notify_one();
    }

    /// The state of every watch.
    #[must_use]
    pub fn watches(&self) -> BTreeMap<Watch, WatchState> {
        fn state<K, F>(facts: &Facts<K, F>) -> WatchState {
            WatchState {
                synced: facts.synced,
                failure: facts.failure.clone(),
                failures: facts.failures,
            }
        }
        let index = self.index();
        [
            (Watch::Services, state(&index.services)),
            (Watch::EndpointSlices, state(&index.slices)),
            (Watch::Nodes, state(&index.nodes)),
            (Watch::Pods, state(&index.pods)),
            (Watch::ServiceL2Statuses, state(&index.statuses)),
            (Watch::Leases, state(&index.leases)),
            (Watch::ServiceCidrs, state(&index.service_cidrs)),
            (Watch::IpPools, state(&index.ip_pools)),
            (Watch::CiliumNodes, state(&index.cilium_nodes)),
        ]
        .into()
    }

    /// The facts as they are now, with what comes of all claims to announce a VIP. The interfaces are left for the
    /// caller to add.
    #[must_use]
    pub fn view(
        &self,
        announcers: &mut Announcers,
        heard: &BTreeMap<IpAddr, Heard>,
        now: Instant,
    ) -> (View, Resolved) {
        let index = self.index();
        let mut nodes = index.nodes();
        let claims = Claims {
            services: &index.services.current,
            statuses: &index.statuses.current,
            heard,
            nodes: &nodes,
            away: index.away,
        };
        let resolved = announcers.resolve(claims, now);
        for node in &resolved.still_programmed {
            if let Some(node) = nodes.get_mut(node) {
                node.programmed.clone_from(&node.boot);
            }
        }
        let all = |facts: &Facts<String, BTreeSet<IpNet>>| -> BTreeSet<IpNet> {
            facts.current.values().flatten().copied().collect()
        };
        let view = View {
            nodes,
            services: index.services.current.clone(),
            slices: index.slices.current.clone(),
            pods: index.pods.current.clone(),
            announcers: resolved.announcers.clone(),
            service_cidrs: all(&index.service_cidrs),
            pod_pools: all(&index.ip_pools),
            links: Vec::new(),
        };
        (view, resolved)
    }
}

/// Starts all watches; they run until the returned set is dropped.
#[must_use]
pub fn start(
    client: &Client,
    node: &NodeName,
    metallb_namespace: &str,
    cluster: &Arc<Cluster>,
) -> JoinSet<()> {
    let labelled = watcher::Config::default().labels(&format!("{EGRESS_LABEL}={EGRESS_VALUE}"));
    let all = watcher::Config::default();
    let mut watches = JoinSet::new();
    watches.spawn(follow(
        Watch::Services,
        Api::<DeserializeGuard<core::Service>>::all(client.clone()),
        labelled.clone(),
        cluster.clone(),
        |index| &mut index.services,
        key,
        guarded(|service| Some(Service::of(service))),
    ));
    watches.spawn(follow(
        Watch::EndpointSlices,
        Api::<DeserializeGuard<discovery::EndpointSlice>>::all(client.clone()),
        labelled,
        cluster.clone(),
        |index| &mut index.slices,
        key,
        guarded(EndpointSlice::of),
    ));
    watches.spawn(follow(
        Watch::Nodes,
        Api::<DeserializeGuard<core::Node>>::all(client.clone()),
        all.clone(),
        cluster.clone(),
        |index| &mut index.nodes,
        |node| NodeName(node.name_any()),
        guarded(|node| Some(Node::of(node))),
    ));
    watches.spawn(follow(
        Watch::Pods,
        Api::<DeserializeGuard<core::Pod>>::all(client.clone()),
        watcher::Config::default().fields(&format!("spec.nodeName={node}")),
        cluster.clone(),
        |index| &mut index.pods,
        key,
        guarded(Pod::of),
    ));
    watches.spawn(follow(
        Watch::ServiceL2Statuses,
        Api::<DynamicObject>::namespaced_with(
            client.clone(),
            metallb_namespace,
            &l2status::resource(),
        ),
        all.clone(),
        cluster.clone(),
        |index| &mut index.statuses,
        key,
        |status| Ok(L2Status::of(status)),
    ));
    watches.spawn(follow(
        Watch::Leases,
        Api::<DeserializeGuard<coordination::Lease>>::namespaced(client.clone(), metallb_namespace),
        watcher::Config::default().labels(&format!("{LEASE_LABEL}={LEASE_VALUE}")),
        cluster.clone(),
        |index| &mut index.leases,
        key,
        guarded(leases::programmed),
    ));
    watches.spawn(follow(
        Watch::ServiceCidrs,
        Api::<DeserializeGuard<networking::ServiceCIDR>>::all(client.clone()),
        all,
        cluster.clone(),
        |index| &mut index.service_cidrs,
        ResourceExt::name_any,
        guarded(|cidr| Some(service_cidrs(cidr))),
    ));
    for (watch, resource) in [
        (Watch::IpPools, pools::calico_pools()),
        (Watch::CiliumNodes, pools::cilium_nodes()),
    ] {
        watches.spawn(follow(
            watch,
            Api::<DynamicObject>::all_with(client.clone(), &resource),
            watcher::Config::default(),
            cluster.clone(),
            move |index| match watch {
                Watch::IpPools => &mut index.ip_pools,
                _ => &mut index.cilium_nodes,
            },
            ResourceExt::name_any,
            |object| Ok(Some(pools::networks(object))),
        ));
    }
    watches
}

fn key(object: &impl ResourceExt) -> ObjectKey {
    ObjectKey {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
    }
}

/// An object that does not decode is an error of that object alone.
fn guarded<O, F>(
    fact: impl Fn(&O) -> Option<F>,
) -> impl Fn(&DeserializeGuard<O>) -> Result<Option<F>, String> {
    move |object| match &object.0 {
        Ok(object) => Ok(fact(object)),
        Err(invalid) => Err(invalid.error.clone()),
    }
}

async fn follow<O, K, F>(
    watch: Watch,
    api: Api<O>,
    config: watcher::Config,
    cluster: Arc<Cluster>,
    facts: impl Fn(&mut Index) -> &mut Facts<K, F> + Send,
    key: impl Fn(&O) -> K + Send,
    fact: impl Fn(&O) -> Result<Option<F>, String> + Send,
) where
    O: Resource + Clone + DeserializeOwned + fmt::Debug + Send + 'static,
    K: Ord + fmt::Debug + Send,
    F: PartialEq + Clone + Send,
{
    let mut events = watcher::watcher(api, config).boxed();
    let mut backoff = BACKOFF;
    while let Some(event) = events.next().await {
        let mut failed = event.is_err();
        let changed = {
            let mut index = cluster.index();
            match event {
                // Says that a list is about to be asked for, not that there is an answer.
                Ok(Event::Init) => {
                    facts(&mut index).start_list();
                    false
                }
                Ok(event) => {
                    backoff.reset();
                    if std::mem::take(&mut index.away) {
                        info!("the API server answers again");
                    }
                    let facts = facts(&mut index);
                    facts.failure = None;
                    take(watch, event, facts, &key, &fact)
                }
                Err(error) => {
                    let failure = describe(watch, &error);
                    match &failure {
                        Failure::Away(text) => {
                            if !std::mem::replace(&mut index.away, true) {
                                warn!(
                                    "the API server does not answer, keeping the data plane and retrying: {text}"
                                );
                            }
                        }
                        // As after every restart of the API server: the watcher lists again, and need not wait.
                        Failure::Expired => failed = false,
                        Failure::NotServed | Failure::Refused(_) => {}
                    }
                    fail(watch, failure, facts(&mut index))
                }
            }
        };
        if changed {
            cluster.changed.notify_one();
        }
        if failed {
            let not_served = watch.is_optional() && facts(&mut cluster.index()).synced;
            if not_served {
                tokio::time::sleep(NOT_SERVED_PAUSE).await;
            } else {
                tokio::time::sleep(backoff.pause()).await;
            }
        }
    }
}

fn take<O, K: Ord + fmt::Debug, F: PartialEq + Clone>(
    watch: Watch,
    event: Event<O>,
    facts: &mut Facts<K, F>,
    key: &impl Fn(&O) -> K,
    fact: &impl Fn(&O) -> Result<Option<F>, String>,
) -> bool {
    // What does not decode keeps its last fact: dropping it would let its pods out as if unlabelled.
    let read = |object: &O, facts: &Facts<K, F>| {
        let key = key(object);
        let fact = fact(object).unwrap_or_else(|error| {
            warn!(%watch, ?key, error, "cannot decode object, keeping what was known of it");
            facts.current.get(&key).cloned()
        });
        (key, fact)
    };
    match event {
        Event::Apply(object) => {
            let (key, fact) = read(&object, facts);
            facts.apply(key, fact)
        }
        Event::Delete(object) => facts.apply(key(&object), None),
        Event::Init => false,
        Event::InitApply(object) => {
            let (key, fact) = read(&object, facts);
            facts.list(key, fact);
            false
        }
        Event::InitDone => facts.end_list(),
    }
}

/// Why a watch fails.
#[derive(Debug)]
enum Failure {
    /// No answer at all.
    Away(String),
    /// What has changed since the last answer is not known any more.
    Expired,
    /// The kind is not served, and need not be.
    NotServed,
    /// An answer that does not help.
    Refused(String),
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
        // Served since Kubernetes 1.33; without it the exclusion of pods and nodes does the work, because
        // packets to a ClusterIP are looked at after kube-proxy has chosen the pod.
        (watch, 404) if watch.is_optional() => Failure::NotServed,
        (Watch::ServiceL2Statuses, 404) => Failure::Refused(
            "not served by the API server: is a MetalLB installed that has this resource?"
                .to_owned(),
        ),
        _ => Failure::Refused(chain(error)),
    }
}

/// Notes why a watch fails; returns whether that is news for the agent.
fn fail<K, F>(watch: Watch, failure: Failure, facts: &mut Facts<K, F>) -> bool {
    facts.failures += 1;
    let text = match failure {
        Failure::Away(text) => format!("the API server does not answer: {text}"),
        Failure::Expired => return false,
        Failure::NotServed => {
            facts.failure = Some("not served by this API server".to_owned());
            return !std::mem::replace(&mut facts.synced, true);
        }
        Failure::Refused(text) => {
            if facts.failure.as_ref() != Some(&text) {
                warn!(%watch, "watch fails, retrying: {text}");
            }
            text
        }
    };
    let news = facts.failure.as_ref() != Some(&text);
    facts.failure = Some(text);
    news
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_replaces_everything_at_once_and_only_when_complete() {
        let mut facts = Facts::default();
        assert!(facts.apply("a", Some(1)));
        facts.start_list();
        facts.list("b", Some(2));
        assert_eq!(facts.current, [("a", 1)].into());
        assert!(facts.end_list());
        assert_eq!(facts.current, [("b", 2)].into());
    }

    #[test]
    fn only_changes_are_news() {
        let mut facts = Facts::default();
        assert!(
            facts.end_list(),
            "the first complete list is news even when it is empty"
        );
        assert!(facts.apply("a", Some(1)));
        assert!(!facts.apply("a", Some(1)));
        assert!(facts.apply("a", Some(2)));
        facts.start_list();
        facts.list("a", Some(2));
        assert!(!facts.end_list(), "the same list again");
        assert!(facts.apply("a", None));
        assert!(!facts.apply("a", None));
    }
}
