//! Events on Services: what `kubectl describe service` shows of us.
//!
//! All agents see the same cluster. Of what they agree on, one tells: the agent of the node that has the Service's
//! pod with the lowest address. What differs from node to node is told by the nodes that have pods of it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc::UnboundedReceiver;
use tracing::debug;

use crate::cluster::View;
use crate::error::chain;
use crate::names::{NodeName, ObjectKey};
use crate::plan::{Blocked, Desired, Ignored, Subject, Verdict};
use crate::state::Family;

/// An event about a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// The Service.
    pub service: ObjectKey,
    /// Something is not as the operator wants it.
    pub is_warning: bool,
    /// One word.
    pub reason: &'static str,
    /// A sentence.
    pub note: String,
}

/// What became different for whom, as far as the agent of `own` is to tell it.
#[must_use]
pub fn changes(before: &Desired, now: &Desired, view: &View, own: &NodeName) -> Vec<Told> {
    let mut told = Vec::new();
    let mut tellers = None;
    let mut tell = |service: &ObjectKey, is_of_this_node: bool, event: Told| {
        let tellers = tellers.get_or_insert_with(|| Tellers::of(view, own));
        let is_ours = if is_of_this_node {
            tellers.has_pods_here(service)
        } else {
            tellers.is_ours(service)
        };
        if is_ours {
            told.push(event);
        }
    };
    for (service, verdicts) in &now.services {
        for (family, verdict) in verdicts {
            let old = before.services.get(service).and_then(|v| v.get(family));
            if old == Some(verdict) {
                continue;
            }
            let differs_by_node = [old, Some(verdict)]
                .into_iter()
                .flatten()
                .any(is_of_the_node);
            if let Some(event) = of_verdict(service, *family, old, verdict) {
                tell(service, differs_by_node, event);
            }
        }
    }
    for (subject, reason) in &now.ignored {
        if before.ignored.get(subject) == Some(reason) {
            continue;
        }
        if let Some(service) = service_of(subject, view) {
            let event = Told {
                service: service.clone(),
                // A hostNetwork pod is no mistake.
                is_warning: !matches!(reason, Ignored::NodeAddress(_)),
                reason: "Ignored",
                note: format!("ignoring {subject}: {reason}"),
            };
            tell(service, false, event);
        }
    }
    told
}

/// A warning to the Services that have a VIP, as far as the agent of `own` is to tell it.
#[must_use]
pub fn about_vip(
    vip: IpAddr,
    reason: &'static str,
    note: &str,
    view: &View,
    own: &NodeName,
) -> Vec<Told> {
    let tellers = Tellers::of(view, own);
    let of_vip = view
        .services
        .iter()
        .filter(|(_, service)| service.vips.values().any(|found| *found == vip));
    of_vip
        .filter(|(key, _)| tellers.is_ours(key))
        .map(|(key, _)| Told {
            service: key.clone(),
            is_warning: true,
            reason,
            note: note.to_owned(),
        })
        .collect()
}

fn of_verdict(
    service: &ObjectKey,
    family: Family,
    old: Option<&Verdict>,
    verdict: &Verdict,
) -> Option<Told> {
    let (is_warning, reason) = match verdict {
        // Said where it is news: after trouble.
        Verdict::Active { .. } => match old {
            Some(Verdict::Blocked(_) | Verdict::Released(_)) => (false, "Active"),
            _ => return None,
        },
        Verdict::Blocked(reason) => (true, reason.label()),
        Verdict::Released(reason) => (true, reason.label()),
    };
    Some(Told {
        service: service.clone(),
        is_warning,
        reason,
        note: format!("egress by {family} {verdict}"),
    })
}

/// Whether nodes may come to different verdicts.
fn is_of_the_node(verdict: &Verdict) -> bool {
    let (Verdict::Blocked(reason) | Verdict::Released(reason)) = verdict else {
        return false;
    };
    matches!(
        reason,
        Blocked::GatewayOffLink(..) | Blocked::GatewayNotProgrammed(_)
    )
}

fn service_of<'a>(subject: &'a Subject, view: &'a View) -> Option<&'a ObjectKey> {
    match subject {
        Subject::Service(key) | Subject::OnNoGateway(key) => Some(key),
        Subject::Endpoint { slice, .. } => Some(&view.slices.get(slice)?.service),
    }
}

/// Which node tells of which Service.
struct Tellers<'a> {
    own: &'a NodeName,
    /// The lowest address of each Service, and its node.
    lowest: BTreeMap<&'a ObjectKey, (IpAddr, &'a NodeName)>,
    /// Services with pods on this node.
    here: Vec<&'a ObjectKey>,
}

impl<'a> Tellers<'a> {
    fn of(view: &'a View, own: &'a NodeName) -> Tellers<'a> {
        let mut tellers = Tellers {
            own,
            lowest: BTreeMap::new(),
            here: Vec::new(),
        };
        for slice in view.slices.values() {
            for endpoint in &slice.endpoints {
                let Some(node) = &endpoint.node else {
                    continue;
                };
                if node == own {
                    tellers.here.push(&slice.service);
                }
                for address in endpoint.addresses.iter().filter_map(|a| a.parse().ok()) {
                    let lowest = tellers
                        .lowest
                        .entry(&slice.service)
                        .or_insert((address, node));
                    *lowest = (*lowest).min((address, node));
                }
            }
        }
        tellers
    }

    fn is_ours(&self, service: &ObjectKey) -> bool {
        self.lowest
            .get(service)
            .is_some_and(|(_, node)| *node == self.own)
    }

    fn has_pods_here(&self, service: &ObjectKey) -> bool {
        self.here.contains(&service)
    }
}

/// Publishes what comes, until the sender is gone. An event that cannot be published is lost: it is in the log too.
pub async fn publish(
    client: Client,
    node: NodeName,
    mut events: UnboundedReceiver<(Told, String)>,
) {
    let reporter = Reporter {
        controller: "metaleg-agent".to_owned(),
        instance: Some(node.0),
    };
    let recorder = Recorder::new(client, reporter);
    while let Some((told, uid)) = events.recv().await {
        let event = Event {
            type_: if told.is_warning {
                EventType::Warning
            } else {
                EventType::Normal
            },
            reason: told.reason.to_owned(),
            note: Some(told.note),
            action: "Egress".to_owned(),
            secondary: None,
        };
        let service = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Service".to_owned()),
            namespace: Some(told.service.namespace),
            name: Some(told.service.name),
            uid: Some(uid),
            ..ObjectReference::default()
        };
        if let Err(error) = recorder.publish(&event, &service).await {
            debug!("cannot publish an event: {}", chain(&error));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{Endpoint, EndpointSlice, Target};

    fn key(name: &str) -> ObjectKey {
        ObjectKey {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
        }
    }

    fn node(n: u8) -> NodeName {
        NodeName(format!("node{n}"))
    }

    /// Service `a` has pods on node2 and node3.
    fn view() -> View {
        let endpoint = |address: &str, n| Endpoint {
            addresses: vec![address.to_owned()],
            node: Some(node(n)),
            target: Target::Pod(key("pod")),
        };
        let slice = EndpointSlice {
            service: key("a"),
            endpoints: vec![endpoint("10.244.3.9", 3), endpoint("10.244.2.9", 2)],
        };
        View {
            slices: [(key("a-1"), slice)].into(),
            ..View::default()
        }
    }

    fn desired(verdict: Verdict) -> Desired {
        Desired {
            services: [(key("a"), [(Family::V4, verdict)].into())].into(),
            ..Desired::default()
        }
    }

    fn active() -> Verdict {
        Verdict::Active {
            vip: IpAddr::from([192, 0, 2, 200]),
            gateway: node(1),
        }
    }

    /// The reasons that each of three nodes tells.
    fn told(before: &Desired, now: &Desired) -> [Vec<&'static str>; 3] {
        [1, 2, 3].map(|n| {
            let told = changes(before, now, &view(), &node(n));
            told.iter().map(|told| told.reason).collect()
        })
    }

    #[test]
    fn of_what_all_see_one_node_tells_and_of_its_own_trouble_each_node_with_pods() {
        let nothing = Desired::default();
        let blocked = desired(Verdict::Blocked(Blocked::NoVip));
        let off_link = Blocked::GatewayOffLink(node(1), IpAddr::from([203, 0, 113, 1]));
        let off_link = desired(Verdict::Blocked(off_link));
        assert_eq!(told(&nothing, &blocked), [vec![], vec!["NoVip"], vec![]]);
        assert_eq!(told(&blocked, &blocked).concat(), [""; 0]);
        assert_eq!(
            told(&nothing, &off_link),
            [vec![], vec!["GatewayOffLink"], vec!["GatewayOffLink"]]
        );
    }

    #[test]
    fn that_all_is_well_is_told_after_trouble_only() {
        let nothing = Desired::default();
        let active = desired(active());
        let blocked = desired(Verdict::Blocked(Blocked::NoVip));
        assert_eq!(told(&nothing, &active).concat(), [""; 0]);
        assert_eq!(told(&blocked, &active), [vec![], vec!["Active"], vec![]]);
    }

    #[test]
    fn what_is_ignored_is_told_to_its_service() {
        let subject = Subject::Endpoint {
            slice: key("a-1"),
            address: "10.244.2.9".to_owned(),
        };
        let now = Desired {
            ignored: [(subject, Ignored::OwnedBy(key("older")))].into(),
            ..Desired::default()
        };
        assert_eq!(
            told(&Desired::default(), &now),
            [vec![], vec!["Ignored"], vec![]]
        );
        let told = changes(&Desired::default(), &now, &view(), &node(2));
        assert_eq!(
            told[0].note,
            "ignoring endpoint 10.244.2.9 of EndpointSlice shop/a-1: belongs to Service shop/older, which is older"
        );
    }
}
