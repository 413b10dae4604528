//! Events on Services: what `kubectl describe service` shows of us.
//!
//! All agents see the same cluster. What they agree on is published by one: the agent of the node that has the Service's
//! pod with the lowest address. What differs from node to node is published by every node that has pods of it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc::UnboundedReceiver;
use tracing::debug;

use crate::backoff::Backoff;
use crate::cluster::View;
use crate::error::chain;
use crate::names::{NodeName, ObjectKey};
use crate::plan::{Blocked, Ignored, Subject, Verdict};
use crate::report::log::{Change, Notice};
use crate::state::{Family, Obstacle};

/// Pauses while the API server does not answer.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
/// In bytes, with room for an ellipsis: the limit is 1024.
const LONGEST_NOTE: usize = 1000;
/// An Event is tried at most this often: those behind it wait.
const MOST_TRIES: usize = 5;

/// An Event about a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceEvent {
    pub service: ObjectKey,
    pub is_warning: bool,
    /// One word.
    pub reason: &'static str,
    /// A sentence.
    pub note: String,
}

/// Events of what has changed, as far as the agent of `own` is to publish them.
#[must_use]
pub fn of_changes(changes: &[Change<'_>], view: &View, own: &NodeName) -> Vec<ServiceEvent> {
    let mut publishers = None;
    let of_change = |change: &Change<'_>| {
        let (event, differs_by_node) = match *change {
            Change::Verdict(service, family, old, verdict) => {
                let differs_by_node = old.is_some_and(is_of_the_node) || is_of_the_node(verdict);
                (of_verdict(service, family, old, verdict)?, differs_by_node)
            }
            Change::Ignored(subject, reason) => {
                let event = ServiceEvent {
                    service: service_of(subject, view)?.clone(),
                    // A hostNetwork pod is no mistake.
                    is_warning: !matches!(reason, Ignored::NodeAddress(_)),
                    reason: "Ignored",
                    note: format!("ignoring {subject}: {reason}"),
                };
                (event, false)
            }
            Change::Hindered(service, family, obstacle, others) => {
                // The plan names only Services that this node has to do with.
                return Some(of_obstacle(service, family, obstacle, others, own));
            }
            Change::Gone(_)
            | Change::UnknownNetwork(..)
            | Change::Found(..)
            | Change::Mended(..) => return None,
        };
        let publishers = publishers.get_or_insert_with(|| Publishers::of(view, own));
        let is_ours = match differs_by_node {
            true => publishers.has_pods_here(&event.service),
            false => publishers.is_ours(&event.service),
        };
        is_ours.then_some(event)
    };
    changes.iter().filter_map(of_change).collect()
}

/// Warnings to the Services that have a notice's VIP, as far as the agent of `own` is to publish them.
#[must_use]
pub fn of_notice(notice: &Notice, view: &View, own: &NodeName) -> Vec<ServiceEvent> {
    let publishers = Publishers::of(view, own);
    let services = view.services.iter().filter(|(key, service)| {
        let has_vip = service.vips.values().any(|vip| *vip == notice.vip);
        has_vip && publishers.is_ours(key)
    });
    let event = |(key, _): (&ObjectKey, _)| ServiceEvent {
        service: key.clone(),
        is_warning: true,
        reason: notice.reason,
        note: notice.text.clone(),
    };
    services.map(event).collect()
}

fn of_verdict(
    service: &ObjectKey,
    family: Family,
    old: Option<&Verdict>,
    verdict: &Verdict,
) -> Option<ServiceEvent> {
    let (is_warning, reason) = match verdict {
        // Only after trouble is it news.
        Verdict::Active { .. } => match old {
            Some(Verdict::Blocked(_) | Verdict::Released(_)) => (false, "Active"),
            _ => return None,
        },
        Verdict::Blocked(reason) | Verdict::Released(reason) => (true, reason.label()),
    };
    Some(ServiceEvent {
        service: service.clone(),
        is_warning,
        reason,
        note: format!("egress by {family} {verdict}"),
    })
}

fn of_obstacle(
    service: &ObjectKey,
    family: Family,
    obstacle: &Obstacle,
    others: usize,
    own: &NodeName,
) -> ServiceEvent {
    let mut note = format!("{family} on {own}: {obstacle}");
    if others > 0 {
        note += &format!(" (and {others} more, see metaleg-agent plan there)");
    }
    ServiceEvent {
        service: service.clone(),
        is_warning: true,
        reason: obstacle.label(),
        note,
    }
}

/// Whether other nodes may come to another verdict.
fn is_of_the_node(verdict: &Verdict) -> bool {
    use Blocked::{GatewayNotProgrammed, GatewayOffLink};
    let (Verdict::Blocked(reason) | Verdict::Released(reason)) = verdict else {
        return false;
    };
    matches!(reason, GatewayOffLink(..) | GatewayNotProgrammed(_))
}

fn service_of<'a>(subject: &'a Subject, view: &'a View) -> Option<&'a ObjectKey> {
    match subject {
        Subject::Service(key) | Subject::OnNoGateway(key) => Some(key),
        Subject::Endpoint { slice, .. } => Some(&view.slices.get(slice)?.service),
    }
}

/// Which node publishes Events of which Service.
struct Publishers<'a> {
    own: &'a NodeName,
    /// The lowest address of each Service, and its node.
    lowest: BTreeMap<&'a ObjectKey, (IpAddr, &'a NodeName)>,
    /// Services with pods on this node.
    here: Vec<&'a ObjectKey>,
}

impl<'a> Publishers<'a> {
    fn of(view: &'a View, own: &'a NodeName) -> Publishers<'a> {
        let mut publishers = Publishers {
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
                    publishers.here.push(&slice.service);
                }
                for address in endpoint.addresses.iter().filter_map(|a| a.parse().ok()) {
                    let lowest = publishers.lowest.entry(&slice.service);
                    let lowest = lowest.or_insert((address, node));
                    *lowest = (*lowest).min((address, node));
                }
            }
        }
        publishers
    }

    fn is_ours(&self, service: &ObjectKey) -> bool {
        let lowest = self.lowest.get(service);
        lowest.is_some_and(|(_, node)| *node == self.own)
    }

    fn has_pods_here(&self, service: &ObjectKey) -> bool {
        self.here.contains(&service)
    }
}

/// Publishes what comes, with the UID of the Service, until the sender is gone. An Event that is refused is lost: it is
/// in the log too. While the API server does not answer, it is tried again a few times.
pub(super) async fn publish(
    client: Client,
    node: NodeName,
    mut events: UnboundedReceiver<(ServiceEvent, String)>,
) {
    let reporter = Reporter {
        controller: "metaleg-agent".to_owned(),
        instance: Some(node.0),
    };
    let recorder = Recorder::new(client, reporter);
    while let Some((event, uid)) = events.recv().await {
        let (event, service) = document(event, uid);
        let mut backoff = BACKOFF;
        for _ in 0..MOST_TRIES {
            match recorder.publish(&event, &service).await {
                Ok(()) => break,
                Err(error) => {
                    debug!("cannot publish an Event: {}", chain(&error));
                    if let kube::Error::Api(_) = error {
                        break;
                    }
                }
            }
            tokio::time::sleep(backoff.pause()).await;
        }
    }
}

/// The API server refuses longer notes.
fn shortened(mut note: String) -> String {
    let is_end = |at: &usize| note.is_char_boundary(*at);
    if let Some(end) = (0..=LONGEST_NOTE)
        .rev()
        .find(is_end)
        .filter(|end| *end < note.len())
    {
        note.truncate(end);
        note.push('…');
    }
    note
}

fn document(event: ServiceEvent, uid: String) -> (Event, ObjectReference) {
    let service = ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Service".to_owned()),
        namespace: Some(event.service.namespace),
        name: Some(event.service.name),
        uid: Some(uid),
        ..ObjectReference::default()
    };
    let event = Event {
        type_: if event.is_warning {
            EventType::Warning
        } else {
            EventType::Normal
        },
        reason: event.reason.to_owned(),
        note: Some(shortened(event.note)),
        action: "Egress".to_owned(),
        secondary: None,
    };
    (event, service)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{With, endpoint, key, slice};
    use crate::plan::Desired;
    use crate::report::log::changes;

    fn node(n: u8) -> NodeName {
        NodeName(format!("node{n}"))
    }

    /// Service `a` has pods on node2 and node3.
    fn view() -> View {
        let endpoints = [("10.244.3.9", "node3"), ("10.244.2.9", "node2")];
        let endpoints = endpoints.map(|(address, node)| endpoint(address, node));
        View::default().with(slice("a-1", "a", endpoints))
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

    /// The reasons that each of three nodes publishes.
    fn published(before: &Desired, now: &Desired) -> [Vec<&'static str>; 3] {
        [1, 2, 3].map(|n| {
            let events = of_changes(&changes(before, now), &view(), &node(n));
            events.iter().map(|event| event.reason).collect()
        })
    }

    #[test]
    fn of_what_all_see_one_node_tells_and_of_its_own_trouble_each_node_with_pods() {
        let nothing = Desired::default();
        let blocked = desired(Verdict::Blocked(Blocked::NoVip));
        let off_link =
            Blocked::GatewayOffLink(node(1), IpAddr::from([203, 0, 113, 1]), "far".to_owned());
        let off_link = desired(Verdict::Blocked(off_link));
        assert_eq!(
            published(&nothing, &blocked),
            [vec![], vec!["NoVip"], vec![]]
        );
        assert_eq!(published(&blocked, &blocked).concat(), [""; 0]);
        assert_eq!(
            published(&nothing, &off_link),
            [vec![], vec!["GatewayOffLink"], vec!["GatewayOffLink"]]
        );
    }

    #[test]
    fn that_all_is_well_is_published_after_trouble_only() {
        let nothing = Desired::default();
        let active = desired(active());
        let blocked = desired(Verdict::Blocked(Blocked::NoVip));
        assert_eq!(published(&nothing, &active).concat(), [""; 0]);
        assert_eq!(
            published(&blocked, &active),
            [vec![], vec!["Active"], vec![]]
        );
    }

    #[test]
    fn an_obstacle_is_a_warning_of_the_node_that_has_it() {
        let obstacles = [
            Obstacle::RuleAhead("pref 220 lookup 220".to_owned()),
            Obstacle::RuleAhead("pref 221 lookup 221".to_owned()),
            Obstacle::NotSeen("é".repeat(2000)),
        ];
        let now = Desired {
            obstacles: [(key("a"), [(Family::V4, obstacles.into())].into())].into(),
            ..Desired::default()
        };
        let before = Desired::default();
        let events = of_changes(&changes(&before, &now), &view(), &node(1));
        let reasons: Vec<_> = events.iter().map(|event| event.reason).collect();
        assert_eq!(reasons, ["NotSeen", "RuleAhead"]);
        assert!(events.iter().all(|event| event.is_warning));
        assert_eq!(
            events[1].note,
            "IPv4 on node1: the routing rule `pref 220 lookup 220` of others comes before ours and takes egress packets: \
             give it a priority after ours, or set ROUTE_RULE_PRIORITY below it (and 1 more, see metaleg-agent plan there)"
        );
        let [long, short] = events.try_into().unwrap();
        let [long, short] =
            [long, short].map(|event| document(event, String::new()).0.note.unwrap());
        assert!(long.len() <= 1024 && long.ends_with('…'), "{}", long.len());
        assert!(short.ends_with("there)"));
    }

    #[test]
    fn what_is_ignored_is_an_event_of_its_service() {
        let subject = Subject::Endpoint {
            slice: key("a-1"),
            address: "10.244.2.9".to_owned(),
        };
        let now = Desired {
            ignored: [(subject, Ignored::OwnedBy(key("older")))].into(),
            ..Desired::default()
        };
        assert_eq!(
            published(&Desired::default(), &now),
            [vec![], vec!["Ignored"], vec![]]
        );
        let before = Desired::default();
        let events = of_changes(&changes(&before, &now), &view(), &node(2));
        assert_eq!(
            events[0].note,
            "ignoring endpoint 10.244.2.9 of EndpointSlice shop/a-1: belongs to Service shop/older, which is older"
        );
    }
}
