//! What the watches have delivered: facts by kind, and how far each watch has come.
//!
//! Synchronous, without a client: [`super::watch`] fills it, a pass takes a [`Snapshot`] of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use ipnet::IpNet;
use kube::runtime::watcher::Event;
use strum::{Display, VariantArray};
use tracing::{info, warn};

use crate::cluster::l2status::L2Status;
use crate::cluster::leases::Programmed;
use crate::cluster::{EndpointSlice, Node, Pod, Service, View};
use crate::names::{NodeName, ObjectKey};

/// One kind of object that is watched, with the name that metrics and probes give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Display, VariantArray)]
pub enum Watch {
    Services,
    EndpointSlices,
    Nodes,
    /// Those of this node.
    Pods,
    ServiceL2Statuses,
    /// Those of the nodes' agents.
    Leases,
    #[strum(serialize = "ServiceCIDRs")]
    ServiceCidrs,
    #[strum(serialize = "IPPools")]
    IpPools,
    CiliumNodes,
}

impl Watch {
    /// Whether a cluster may do without.
    pub(super) fn is_optional(self) -> bool {
        matches!(
            self,
            Watch::ServiceCidrs | Watch::IpPools | Watch::CiliumNodes
        )
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WatchState {
    /// The first list is complete.
    pub synced: bool,
    /// Why it fails at the moment.
    pub failure: Option<String>,
    pub failures: u64,
}

#[derive(Debug)]
pub(super) enum Failure {
    /// No answer at all.
    Away(String),
    /// The resource version is too old: the watcher lists anew, as after every restart of the API server.
    Expired,
    /// The kind is not served, and need not be.
    NotServed,
    /// An answer that does not help.
    Refused(String),
}

#[derive(Debug)]
pub(super) struct Facts<K, F> {
    current: BTreeMap<K, F>,
    /// A list that is under way: it replaces `current` as a whole when it is complete.
    incoming: Option<BTreeMap<K, F>>,
}

impl<K, F> Default for Facts<K, F> {
    fn default() -> Self {
        Facts {
            current: BTreeMap::new(),
            incoming: None,
        }
    }
}

impl<K: Ord + fmt::Debug, F: PartialEq + Clone> Facts<K, F> {
    /// Takes an event; `read` reduces an object to its key and its fact. Returns whether anything changed.
    fn take<O>(
        &mut self,
        watch: Watch,
        event: Event<O>,
        read: impl Fn(&O) -> (K, Result<Option<F>, String>),
    ) -> bool {
        // What does not decode keeps its last fact: dropping it would let its pods out as if unlabelled.
        let fact_of = |object: &O, current: &BTreeMap<K, F>| {
            let (key, fact) = read(object);
            let fact = fact.unwrap_or_else(|error| {
                warn!(%watch, ?key, error, "cannot decode object, keeping what was known of it");
                current.get(&key).cloned()
            });
            (key, fact)
        };
        match event {
            Event::Apply(object) => match fact_of(&object, &self.current) {
                (key, Some(fact)) if self.current.get(&key) == Some(&fact) => false,
                (key, Some(fact)) => {
                    self.current.insert(key, fact);
                    true
                }
                (key, None) => self.current.remove(&key).is_some(),
            },
            Event::Delete(object) => self.current.remove(&read(&object).0).is_some(),
            Event::Init => {
                self.incoming = Some(BTreeMap::new());
                false
            }
            Event::InitApply(object) => {
                if let (key, Some(fact)) = fact_of(&object, &self.current)
                    && let Some(incoming) = &mut self.incoming
                {
                    incoming.insert(key, fact);
                }
                false
            }
            Event::InitDone => {
                let incoming = self.incoming.take();
                let changed = incoming.filter(|incoming| *incoming != self.current);
                changed.map(|incoming| self.current = incoming).is_some()
            }
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Index {
    pub(super) services: Facts<ObjectKey, Service>,
    pub(super) slices: Facts<ObjectKey, EndpointSlice>,
    pub(super) nodes: Facts<NodeName, Node>,
    pub(super) pods: Facts<ObjectKey, Pod>,
    pub(super) statuses: Facts<ObjectKey, L2Status>,
    pub(super) leases: Facts<ObjectKey, (NodeName, Programmed)>,
    pub(super) service_cidrs: Facts<String, BTreeSet<IpNet>>,
    pub(super) ip_pools: Facts<String, BTreeSet<IpNet>>,
    pub(super) cilium_nodes: Facts<String, BTreeSet<IpNet>>,
    /// Only of watches that were heard of: the others have not begun.
    watches: BTreeMap<Watch, WatchState>,
    /// The API server does not answer: logged once, not once for each watch.
    away: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Without announcers and interfaces: a pass finds them elsewhere.
    pub view: View,
    /// What MetalLB's speakers say about who announces.
    pub statuses: BTreeMap<ObjectKey, L2Status>,
    /// The API server does not answer: the facts may be old.
    pub away: bool,
}

impl Index {
    /// Takes what a watch delivers into the facts of its kind; returns whether that is news for the agent.
    pub(super) fn take<O, K, F>(
        &mut self,
        watch: Watch,
        event: Event<O>,
        facts: impl Fn(&mut Index) -> &mut Facts<K, F>,
        read: impl Fn(&O) -> (K, Result<Option<F>, String>),
    ) -> bool
    where
        K: Ord + fmt::Debug,
        F: PartialEq + Clone,
    {
        // An `Init` says that a list is about to be asked for, not that there is an answer.
        let is_answer = !matches!(event, Event::Init);
        let is_list = matches!(event, Event::InitDone);
        let changed = facts(self).take(watch, event, read);
        if is_answer && std::mem::take(&mut self.away) {
            info!("the API server answers again");
        }
        let state = self.watches.entry(watch).or_default();
        if is_answer {
            state.failure = None;
        }
        let is_first = is_list && !std::mem::replace(&mut state.synced, true);
        changed || is_first
    }

    /// Notes why a watch fails; returns whether that is news for the agent.
    pub(super) fn fail(&mut self, watch: Watch, failure: &Failure) -> bool {
        let state = self.watches.entry(watch).or_default();
        state.failures += 1;
        let text = match failure {
            Failure::Away(text) => {
                if !std::mem::replace(&mut self.away, true) {
                    warn!(
                        "the API server does not answer, keeping the data plane and retrying: {text}"
                    );
                }
                format!("the API server does not answer: {text}")
            }
            Failure::Expired => return false,
            Failure::NotServed => {
                state.failure = Some("not served by this API server".to_owned());
                return !std::mem::replace(&mut state.synced, true);
            }
            Failure::Refused(text) => text.clone(),
        };
        let is_news = state.failure.as_ref() != Some(&text);
        if is_news && matches!(failure, Failure::Refused(_)) {
            warn!(%watch, "watch fails, retrying: {text}");
        }
        state.failure = Some(text);
        is_news
    }

    pub(super) fn watches(&self) -> BTreeMap<Watch, WatchState> {
        let state = |watch| self.watches.get(watch).cloned().unwrap_or_default();
        Watch::VARIANTS.iter().map(|w| (*w, state(w))).collect()
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let all = |facts: &Facts<String, BTreeSet<IpNet>>| -> BTreeSet<IpNet> {
            facts.current.values().flatten().copied().collect()
        };
        Snapshot {
            view: View {
                services: self.services.current.clone(),
                slices: self.slices.current.clone(),
                pods: self.pods.current.clone(),
                nodes: merged(
                    &self.nodes.current,
                    &self.cilium_nodes.current,
                    self.leases.current.values(),
                ),
                service_cidrs: all(&self.service_cidrs),
                pod_pools: all(&self.ip_pools),
                ..View::default()
            },
            statuses: self.statuses.current.clone(),
            away: self.away,
        }
    }

    /// As if every watch had delivered an empty list.
    #[cfg(test)]
    pub(super) fn pretend_synced(&mut self) {
        for watch in Watch::VARIANTS {
            self.watches.entry(*watch).or_default().synced = true;
        }
    }
}

/// The nodes, with the pod networks that Cilium gives them, and what their agents have programmed.
pub fn merged<'a>(
    nodes: &BTreeMap<NodeName, Node>,
    cilium: &BTreeMap<String, BTreeSet<IpNet>>,
    leases: impl Iterator<Item = &'a (NodeName, Programmed)>,
) -> BTreeMap<NodeName, Node> {
    let mut nodes = nodes.clone();
    // A CiliumNode without networks: Cilium goes by the Node's.
    for (name, nets) in cilium.iter().filter(|(_, nets)| !nets.is_empty()) {
        if let Some(node) = nodes.get_mut(&NodeName(name.clone())) {
            node.pod_cidrs.clone_from(nets);
        }
    }
    for (name, Programmed { boot, guards }) in leases {
        if let Some(node) = nodes.get_mut(name) {
            node.programmed = Some(boot.clone());
            node.guards = *guards;
        }
    }
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::leases::BootId;

    /// An object of a test is its key and what comes of reading it.
    type Object = (&'static str, Result<Option<u8>, String>);

    fn take(facts: &mut Facts<&'static str, u8>, event: Event<Object>) -> bool {
        facts.take(Watch::Services, event, |(key, fact)| (*key, fact.clone()))
    }

    fn garbled() -> Result<Option<u8>, String> {
        Err("no field `spec`".to_owned())
    }

    #[test]
    fn a_list_replaces_everything_at_once_and_only_when_complete() {
        let mut facts = Facts::default();
        assert!(take(&mut facts, Event::Apply(("a", Ok(Some(1))))));
        take(&mut facts, Event::Init);
        take(&mut facts, Event::InitApply(("b", Ok(Some(2)))));
        assert_eq!(facts.current, [("a", 1)].into());
        assert!(take(&mut facts, Event::InitDone));
        assert_eq!(facts.current, [("b", 2)].into());
    }

    #[test]
    fn only_changes_are_news() {
        let mut facts = Facts::default();
        assert!(take(&mut facts, Event::Apply(("a", Ok(Some(1))))));
        assert!(!take(&mut facts, Event::Apply(("a", Ok(Some(1))))));
        assert!(take(&mut facts, Event::Apply(("a", Ok(Some(2))))));
        take(&mut facts, Event::Init);
        take(&mut facts, Event::InitApply(("a", Ok(Some(2)))));
        assert!(!take(&mut facts, Event::InitDone), "the same list again");
        assert!(take(&mut facts, Event::Delete(("a", Ok(Some(2))))));
        assert!(!take(&mut facts, Event::Apply(("a", Ok(None)))));
    }

    #[test]
    fn an_object_that_does_not_decode_keeps_its_last_fact() {
        let mut facts = Facts::default();
        take(&mut facts, Event::Apply(("a", Ok(Some(1)))));
        assert!(!take(&mut facts, Event::Apply(("a", garbled()))));
        assert!(!take(&mut facts, Event::Apply(("never read", garbled()))));
        assert_eq!(facts.current, [("a", 1)].into());
        take(&mut facts, Event::Init);
        take(&mut facts, Event::InitApply(("a", garbled())));
        take(&mut facts, Event::InitApply(("b", Ok(Some(2)))));
        assert!(take(&mut facts, Event::InitDone));
        assert_eq!(facts.current, [("a", 1), ("b", 2)].into());
        assert!(take(&mut facts, Event::Delete(("a", garbled()))));
    }

    #[test]
    fn a_watch_is_synced_by_its_first_list_or_when_its_kind_need_not_be_served() {
        let mut index = Index::default();
        let pool = |_: &()| ("pool".to_owned(), Ok(None));
        let take = |index: &mut Index, event| {
            index.take(Watch::IpPools, event, |index| &mut index.ip_pools, pool)
        };
        let synced = |index: &Index| index.watches()[&Watch::IpPools].synced;
        assert!(!take(&mut index, Event::Init) && !synced(&index));
        assert!(
            take(&mut index, Event::InitDone),
            "the first complete list is news even when it is empty"
        );
        assert!(synced(&index));
        take(&mut index, Event::Init);
        assert!(!take(&mut index, Event::InitDone));

        let mut index = Index::default();
        assert!(index.fail(Watch::CiliumNodes, &Failure::NotServed));
        assert!(!index.fail(Watch::CiliumNodes, &Failure::NotServed));
        let state = &index.watches()[&Watch::CiliumNodes];
        assert!(state.synced && state.failures == 2);
    }

    #[test]
    fn the_facts_may_be_old_from_silence_to_the_next_answer() {
        let mut index = Index::default();
        assert!(index.fail(Watch::Nodes, &Failure::Away("timed out".to_owned())));
        assert!(!index.fail(Watch::Nodes, &Failure::Away("timed out".to_owned())));
        assert!(index.snapshot().away);
        let pod = |_: &()| (key(), Ok(None));
        for (event, away) in [(Event::Init, true), (Event::InitDone, false)] {
            index.take(Watch::Pods, event, |index| &mut index.pods, pod);
            assert_eq!(index.snapshot().away, away);
        }
    }

    fn key() -> ObjectKey {
        ObjectKey {
            namespace: "shop".to_owned(),
            name: "a".to_owned(),
        }
    }

    #[test]
    fn cilium_and_leases_add_to_what_nodes_say_of_themselves() {
        let name = |n: u8| NodeName(format!("node{n}"));
        let boot = |text: &str| BootId(text.to_owned());
        let programmed_in = |text: &str, guards| Programmed {
            boot: boot(text),
            guards,
        };
        let nets = |texts: &[&str]| -> BTreeSet<IpNet> {
            texts.iter().map(|text| text.parse().unwrap()).collect()
        };
        let facts = Node {
            pod_cidrs: nets(&["10.244.1.0/24"]),
            boot: Some(boot("second")),
            ..Node::default()
        };
        let nodes = [(name(1), facts.clone())].into();
        for (what, cilium, lease, pod_cidrs, programmed) in [
            ("nothing", None, None, "10.244.1.0/24", None),
            (
                "Cilium gives other networks",
                Some(("node1", nets(&["10.0.1.0/24"]))),
                None,
                "10.0.1.0/24",
                None,
            ),
            (
                "Cilium goes by the Node",
                Some(("node1", nets(&[]))),
                None,
                "10.244.1.0/24",
                None,
            ),
            (
                "of an unknown node",
                Some(("node2", nets(&["10.0.1.0/24"]))),
                Some((name(2), programmed_in("second", None))),
                "10.244.1.0/24",
                None,
            ),
            (
                "of this boot",
                None,
                Some((name(1), programmed_in("second", None))),
                "10.244.1.0/24",
                Some(true),
            ),
            (
                "of this boot, as a gateway",
                None,
                Some((name(1), programmed_in("second", Some(true)))),
                "10.244.1.0/24",
                Some(true),
            ),
            (
                "of this boot, and no gateway",
                None,
                Some((name(1), programmed_in("second", Some(false)))),
                "10.244.1.0/24",
                Some(false),
            ),
            (
                "of another boot",
                None,
                Some((name(1), programmed_in("first", Some(true)))),
                "10.244.1.0/24",
                Some(false),
            ),
        ] {
            let cilium = cilium.map(|(name, nets)| (name.to_owned(), nets));
            let merged = merged(&nodes, &cilium.into_iter().collect(), lease.iter());
            assert_eq!(merged.keys().collect::<Vec<_>>(), [&name(1)], "{what}");
            let node = &merged[&name(1)];
            assert_eq!(node.pod_cidrs, nets(&[pod_cidrs]), "{what}");
            assert_eq!(node.is_programmed(), programmed == Some(true), "{what}");
            assert_eq!(node.programmed.is_some(), programmed.is_some(), "{what}");
        }
    }
}
