//! Who announces a Service's VIPs, as MetalLB's ServiceL2Status objects tell it.
//!
//! Pure: the time comes in as a value. The label of such an object is right where label and `status.node`
//! disagree: a speaker of MetalLB 0.15 that takes over after a crash rewrites the label, but cannot rewrite
//! `status.node`, which is immutable.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kube::core::{ApiResource, DynamicObject, GroupVersionKind};

use crate::view::{Key, NodeName};

/// The resource that MetalLB's speakers write.
#[must_use]
pub fn resource() -> ApiResource {
    let kind = GroupVersionKind::gvk("metallb.io", "v1beta1", "ServiceL2Status");
    ApiResource::from_gvk_with_plural(&kind, "servicel2statuses")
}

/// What one ServiceL2Status object says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct L2Status {
    /// The Service.
    pub service: Key,
    /// The node that announces its VIPs.
    pub node: NodeName,
    /// Age of this claim, the newest being the largest: the object's resource version.
    pub version: u64,
}

impl L2Status {
    /// The claim of an object; `None` while a speaker has created it but not yet filled it.
    #[must_use]
    pub fn of(object: &DynamicObject) -> Option<L2Status> {
        let labels = object.metadata.labels.as_ref();
        let label = |name: &str| labels?.get(name).filter(|v| !v.is_empty()).cloned();
        let status = |name: &str| {
            let value = object.data.get("status")?.get(name)?.as_str()?;
            (!value.is_empty()).then(|| value.to_owned())
        };
        Some(L2Status {
            service: Key {
                namespace: label("metallb.io/service-namespace")
                    .or_else(|| status("serviceNamespace"))?,
                name: label("metallb.io/service-name").or_else(|| status("serviceName"))?,
            },
            node: NodeName(label("metallb.io/node").or_else(|| status("node"))?),
            version: object
                .metadata
                .resource_version
                .as_deref()
                .and_then(|version| version.parse().ok())
                .unwrap_or_default(),
        })
    }
}

/// The announcer of a Service's VIPs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Announcer {
    /// MetalLB names it.
    Present(NodeName),
    /// MetalLB names none since less than the grace period; this was the last one.
    Grace(NodeName),
}

impl Announcer {
    /// The node to use as gateway.
    #[must_use]
    pub fn node(&self) -> &NodeName {
        match self {
            Announcer::Present(node) | Announcer::Grace(node) => node,
        }
    }
}

/// Remembers the last known announcer of each Service, for the grace period.
#[derive(Debug)]
pub struct Announcers {
    grace: Duration,
    last: BTreeMap<Key, (NodeName, Option<Instant>)>,
}

impl Announcers {
    /// Knows none yet.
    #[must_use]
    pub fn new(grace: Duration) -> Announcers {
        Announcers {
            grace,
            last: BTreeMap::new(),
        }
    }

    /// Takes over what an earlier run of the agent knew, as found in the kernel: it counts as last known from
    /// `now` on.
    pub fn adopt(&mut self, service: Key, node: NodeName, now: Instant) {
        self.last.entry(service).or_insert((node, Some(now)));
    }

    /// The announcers at the time `now`, and the time at which the first grace period ends.
    ///
    /// Of two claims, as at a move, the newer one wins.
    pub fn resolve<'a>(
        &mut self,
        claims: impl IntoIterator<Item = &'a L2Status>,
        is_labelled: impl Fn(&Key) -> bool,
        now: Instant,
    ) -> (BTreeMap<Key, Announcer>, Option<Instant>) {
        let mut newest: BTreeMap<&Key, &L2Status> = BTreeMap::new();
        for claim in claims.into_iter().filter(|c| is_labelled(&c.service)) {
            let known = newest.entry(&claim.service).or_insert(claim);
            if claim.version > known.version {
                *known = claim;
            }
        }
        self.last.retain(|service, _| is_labelled(service));
        for (service, (_, lost)) in &mut self.last {
            if !newest.contains_key(service) {
                lost.get_or_insert(now);
            }
        }
        for (service, claim) in newest {
            self.last
                .insert(service.clone(), (claim.node.clone(), None));
        }
        let grace = self.grace;
        self.last.retain(|_, (_, lost)| {
            lost.is_none_or(|lost| now.saturating_duration_since(lost) < grace)
        });
        let ends = self
            .last
            .values()
            .filter_map(|(_, lost)| Some((*lost)? + grace))
            .min();
        let announcers = self
            .last
            .iter()
            .map(|(service, (node, lost))| {
                let announcer = match lost {
                    None => Announcer::Present(node.clone()),
                    Some(_) => Announcer::Grace(node.clone()),
                };
                (service.clone(), announcer)
            })
            .collect();
        (announcers, ends)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::serde_json::{self, json};

    const GRACE: Duration = Duration::from_secs(30);

    fn key() -> Key {
        Key {
            namespace: "shop".to_owned(),
            name: "a".to_owned(),
        }
    }

    fn node(name: &str) -> NodeName {
        NodeName(name.to_owned())
    }

    fn claim(name: &str, version: u64) -> L2Status {
        L2Status {
            service: key(),
            node: node(name),
            version,
        }
    }

    fn parsed(object: serde_json::Value) -> Option<L2Status> {
        L2Status::of(&serde_json::from_value(object).unwrap())
    }

    #[test]
    fn the_label_is_right_where_it_disagrees_with_the_status() {
        let object = json!({
            "apiVersion": "metallb.io/v1beta1", "kind": "ServiceL2Status",
            "metadata": {"name": "l2-x", "resourceVersion": "7", "labels": {
                "metallb.io/node": "node2", "metallb.io/service-name": "a", "metallb.io/service-namespace": "shop"}},
            "status": {"node": "node1", "serviceName": "a", "serviceNamespace": "shop"}
        });
        assert_eq!(parsed(object), Some(claim("node2", 7)));
    }

    #[test]
    fn the_status_serves_where_labels_are_missing_and_an_empty_object_claims_nothing() {
        let object = |status: serde_json::Value| {
            json!({"apiVersion": "metallb.io/v1beta1", "kind": "ServiceL2Status",
                   "metadata": {"name": "l2-x", "resourceVersion": "7"}, "status": status})
        };
        assert_eq!(
            parsed(object(
                json!({"node": "node1", "serviceName": "a", "serviceNamespace": "shop"})
            )),
            Some(claim("node1", 7))
        );
        assert_eq!(parsed(object(json!({}))), None);
    }

    #[test]
    fn the_newest_of_two_claims_wins_in_either_order() {
        let now = Instant::now();
        for claims in [
            [claim("node1", 5), claim("node2", 6)],
            [claim("node2", 6), claim("node1", 5)],
        ] {
            let (announcers, ends) = Announcers::new(GRACE).resolve(&claims, |_| true, now);
            assert_eq!(
                announcers,
                [(key(), Announcer::Present(node("node2")))].into()
            );
            assert_eq!(ends, None);
        }
    }

    #[test]
    fn the_last_announcer_is_kept_for_the_grace_period_and_not_longer() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut announcers = Announcers::new(GRACE);
        announcers.resolve(&[claim("node1", 5)], |_| true, at(0));
        for (seconds, expected) in [
            (10, Some(Announcer::Grace(node("node1")))),
            (39, Some(Announcer::Grace(node("node1")))),
            (40, None),
            (41, None),
        ] {
            let (resolved, ends) = announcers.resolve(&[], |_| true, at(seconds));
            assert_eq!(resolved.get(&key()), expected.as_ref(), "at {seconds} s");
            assert_eq!(ends, expected.map(|_| at(40)));
        }
        let (resolved, _) = announcers.resolve(&[claim("node2", 9)], |_| true, at(50));
        assert_eq!(resolved[&key()], Announcer::Present(node("node2")));
    }

    #[test]
    fn an_adopted_announcer_serves_until_metallb_names_one() {
        let now = Instant::now();
        let mut announcers = Announcers::new(GRACE);
        announcers.adopt(key(), node("node3"), now);
        let (resolved, _) = announcers.resolve(&[], |_| true, now);
        assert_eq!(resolved[&key()], Announcer::Grace(node("node3")));
        let (resolved, _) = announcers.resolve(&[claim("node1", 1)], |_| true, now);
        assert_eq!(resolved[&key()], Announcer::Present(node("node1")));
    }

    #[test]
    fn services_without_the_label_are_forgotten() {
        let mut announcers = Announcers::new(GRACE);
        let now = Instant::now();
        announcers.resolve(&[claim("node1", 5)], |_| true, now);
        let (resolved, _) = announcers.resolve(&[claim("node1", 5)], |_| false, now);
        assert!(resolved.is_empty());
    }
}
