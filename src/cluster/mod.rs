//! What the cluster says, reduced to the facts that matter: plain values with equality, made from Kubernetes
//! objects on arrival.
//!
//! Pure: no watch, no clock. A fact that compares equal to the one before it causes no work.

pub mod client;
pub mod index;
pub mod l2status;
pub mod leases;
pub mod pools;
pub mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use kube::ResourceExt;

use crate::cluster::leases::BootId;
use crate::ethernet::Mac;
use crate::names::{Interface, NodeName, ObjectKey, Reach};
use crate::state::{Family, Surroundings, Traits};

/// Label that opts a Service in, when its value is [`EGRESS_VALUE`].
pub const EGRESS_LABEL: &str = "metaleg.de/rewriteSrcIP";
pub const EGRESS_VALUE: &str = "true";

/// Annotation that says what pods of a Service do while it has no gateway.
pub const ON_NO_GATEWAY_ANNOTATION: &str = "metaleg.de/on-no-gateway";

/// What pods of a Service do while it has no gateway.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum OnNoGateway {
    #[default]
    Reject,
    /// They leave with the node's address, as without MetalEG: a pod may have to call out before MetalLB announces its VIP.
    NodeAddress,
    /// An unknown value: as `Reject`.
    Unknown(String),
}

/// A labelled Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its UID: Events refer to it.
    pub uid: String,
    /// Creation time in seconds since the epoch: of two Services that claim a pod, the older one has it.
    pub created: i64,
    pub load_balancer: bool,
    /// The families that it serves: in others its pods are left alone.
    pub families: BTreeSet<Family>,
    pub vips: BTreeMap<Family, IpAddr>,
    /// Its ingress is a host name, which is no source address.
    pub hostname: Option<String>,
    pub on_no_gateway: OnNoGateway,
    /// The labels of its pods; empty where its EndpointSlices are made by hand.
    pub selector: BTreeMap<String, String>,
}

/// What an endpoint says it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Pod(ObjectKey),
    /// Anything else, or nothing: the text names it.
    Other(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its addresses as written: the plan judges them.
    pub addresses: Vec<String>,
    pub node: Option<NodeName>,
    pub target: Target,
}

/// An EndpointSlice of a labelled Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    pub service: ObjectKey,
    /// Its endpoints: ready, not ready and terminating alike, for a starting or draining pod sends too.
    pub endpoints: Vec<Endpoint>,
}

/// A pod of this node that has an address and a network of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    pub labels: BTreeMap<String, String>,
    pub addresses: BTreeSet<IpAddr>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Its InternalIPs, in the order of the object.
    pub addresses: Vec<IpAddr>,
    pub pod_cidrs: BTreeSet<IpNet>,
    pub ready: bool,
    /// Its UID: the Lease of its agent is owned by it.
    pub uid: String,
    /// Its present boot, if its kubelet reports it.
    pub boot: Option<BootId>,
    /// The boot in which its agent has programmed it. From the agent's Lease, not from the Node.
    pub programmed: Option<BootId>,
    /// Whether it holds back pods of other nodes that it does not know, as a gateway does; `None`: its agent does not say,
    /// and always does. From the Lease too.
    pub guards: Option<bool>,
}

/// Everything that a plan is made from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Labelled Services.
    pub services: BTreeMap<ObjectKey, Service>,
    pub slices: BTreeMap<ObjectKey, EndpointSlice>,
    /// The pods of this node.
    pub pods: BTreeMap<ObjectKey, Pod>,
    pub nodes: BTreeMap<NodeName, Node>,
    /// The node that pods of each VIP leave through, as [`crate::announcers`] finds it.
    pub announcers: BTreeMap<IpAddr, NodeName>,
    /// The networks of ClusterIPs, where the API server serves ServiceCIDRs.
    pub service_cidrs: BTreeSet<IpNet>,
    /// Pod networks that the CNI plugin keeps in objects of its own.
    pub pod_pools: BTreeSet<IpNet>,
    pub traits: Traits,
    /// The interfaces of this node that are up, but for loopback.
    pub interfaces: Vec<Interface>,
    /// How this node reaches the addresses of nodes, and VIPs in no network of an interface.
    pub reach: BTreeMap<IpAddr, Reach>,
    /// The link-layer addresses of other nodes that are on link, as far as this node's kernel has learned them.
    pub neighbours: BTreeMap<IpAddr, Mac>,
    /// Packets of other nodes' pods may come through this node as their gateway: it is one, was one a moment ago, or others
    /// still take it for one.
    pub is_gateway: bool,
    /// Something concerned this node a moment ago: late replies may still come.
    pub lingers: bool,
    /// What of this node decides with us.
    pub surroundings: BTreeMap<Family, Surroundings>,
}

impl Service {
    pub fn of(object: &core::Service) -> Service {
        let spec = object.spec.clone().unwrap_or_default();
        let status = object.status.clone().unwrap_or_default();
        let ingress = status.load_balancer.unwrap_or_default().ingress;
        let ingress = ingress.unwrap_or_default();
        let mut vips = BTreeMap::new();
        for ip in ingress.iter().filter_map(|i| i.ip.as_ref()?.parse().ok()) {
            vips.entry(Family::of(ip)).or_insert(ip);
        }
        let families = spec.ip_families.iter().flatten();
        let family = |family: &String| match family.as_str() {
            "IPv4" => Some(Family::V4),
            "IPv6" => Some(Family::V6),
            _ => None,
        };
        let created = object.creation_timestamp();
        let on_no_gateway = object.annotations().get(ON_NO_GATEWAY_ANNOTATION);
        Service {
            uid: object.uid().unwrap_or_default(),
            created: created.map_or(i64::MAX, |time| time.0.as_second()),
            load_balancer: spec.type_.as_deref() == Some("LoadBalancer"),
            families: families.filter_map(family).collect(),
            vips,
            hostname: ingress.into_iter().find_map(|i| i.hostname),
            on_no_gateway: match on_no_gateway.map(String::as_str) {
                None | Some("reject") => OnNoGateway::Reject,
                Some("node-address") => OnNoGateway::NodeAddress,
                Some(other) => OnNoGateway::Unknown(other.to_owned()),
            },
            selector: spec.selector.unwrap_or_default(),
        }
    }

    /// Whether a pod of the same namespace belongs to it.
    pub fn selects(&self, pod: &Pod) -> bool {
        let has = |(key, value): (&String, &String)| pod.labels.get(key) == Some(value);
        !self.selector.is_empty() && self.selector.iter().all(has)
    }
}

impl Pod {
    /// The facts of a Pod object; `None` while it has no address, when it has its node's, and when it has ended and
    /// its address may be another pod's.
    pub fn of(object: &core::Pod) -> Option<Pod> {
        let on_host = object.spec.as_ref()?.host_network.unwrap_or_default();
        let status = object.status.as_ref()?;
        let has_ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let ips = status.pod_ips.iter().flatten();
        let addresses: BTreeSet<IpAddr> = ips.filter_map(|ip| ip.ip.parse().ok()).collect();
        let labels = object.labels().clone();
        (!on_host && !has_ended && !addresses.is_empty()).then_some(Pod { labels, addresses })
    }
}

impl EndpointSlice {
    /// The facts of an EndpointSlice object; `None` when it belongs to no Service.
    pub fn of(object: &discovery::EndpointSlice) -> Option<EndpointSlice> {
        let namespace = object.namespace()?;
        let name = object.labels().get("kubernetes.io/service-name")?.clone();
        let endpoint = |endpoint: &discovery::Endpoint| Endpoint {
            addresses: endpoint.addresses.clone(),
            node: endpoint.node_name.clone().map(NodeName),
            target: target(endpoint.target_ref.as_ref(), &namespace),
        };
        Some(EndpointSlice {
            endpoints: object.endpoints.iter().flatten().map(endpoint).collect(),
            service: ObjectKey { namespace, name },
        })
    }
}

fn target(reference: Option<&core::ObjectReference>, own_namespace: &str) -> Target {
    let Some(reference) = reference else {
        return Target::Other("nothing".to_owned());
    };
    let kind = reference.kind.as_deref().unwrap_or_default();
    let name = reference.name.clone().unwrap_or_default();
    if kind != "Pod" {
        return Target::Other(format!("{kind} {name}"));
    }
    let namespace = reference.namespace.as_deref();
    let namespace = namespace.unwrap_or(own_namespace).to_owned();
    Target::Pod(ObjectKey { namespace, name })
}

impl Node {
    /// The facts of a Node object; addresses and networks that do not parse are left out.
    pub fn of(object: &core::Node) -> Node {
        let (spec, status) = (object.spec.iter(), object.status.as_ref());
        let cidrs = spec.flat_map(|s| s.pod_cidrs.iter().flatten().chain(&s.pod_cidr));
        let addresses = status.iter().flat_map(|s| &s.addresses).flatten();
        let internal = addresses.filter(|address| address.type_ == "InternalIP");
        let mut conditions = status.iter().flat_map(|s| &s.conditions).flatten();
        let boot = status.and_then(|s| Some(s.node_info.as_ref()?.boot_id.clone()));
        Node {
            addresses: internal.filter_map(|a| a.address.parse().ok()).collect(),
            pod_cidrs: networks(cidrs),
            ready: conditions.any(|c| c.type_ == "Ready" && c.status == "True"),
            uid: object.uid().unwrap_or_default(),
            boot: boot.filter(|boot| !boot.is_empty()).map(BootId),
            programmed: None,
            guards: None,
        }
    }

    /// Whether its agent has programmed it as a gateway since it was booted: only then may pods of other nodes be routed
    /// there.
    pub fn is_programmed(&self) -> bool {
        let is_of_this_boot = self.boot.is_none() || self.boot == self.programmed;
        self.programmed.is_some() && is_of_this_boot && self.guards != Some(false)
    }

    /// Its addresses of a family, in the order of the object.
    pub fn addresses(&self, family: Family) -> impl Iterator<Item = IpAddr> {
        let addresses = self.addresses.iter().copied();
        addresses.filter(move |address| Family::of(*address) == family)
    }
}

pub fn service_cidrs(object: &networking::ServiceCIDR) -> BTreeSet<IpNet> {
    networks(object.spec.iter().flat_map(|spec| &spec.cidrs).flatten())
}

fn networks(texts: impl Iterator<Item = impl AsRef<str>>) -> BTreeSet<IpNet> {
    let nets = texts.filter_map(|text| text.as_ref().parse().ok());
    nets.map(|net: IpNet| net.trunc()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::serde_json::{self, json};

    fn service(object: serde_json::Value) -> Service {
        Service::of(&serde_json::from_value(object).unwrap())
    }

    #[test]
    fn the_first_ingress_address_of_a_family_that_parses_is_the_vip() {
        let service = service(json!({
            "metadata": {"uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z",
                         "annotations": {"metaleg.de/on-no-gateway": "node-address"}},
            "spec": {"type": "LoadBalancer", "ipFamilies": ["IPv4", "IPv6"], "selector": {"app": "a"}},
            "status": {"loadBalancer": {"ingress": [
                {"hostname": "a.example"}, {"ip": "nonsense"}, {"ip": "192.0.2.201"},
                {"ip": "192.0.2.200"}, {"ip": "2001:db8:1::c8"}
            ]}}
        }));
        assert_eq!(
            service,
            Service {
                uid: "u".to_owned(),
                created: 1_767_225_600,
                load_balancer: true,
                families: [Family::V4, Family::V6].into(),
                vips: [
                    (Family::V4, "192.0.2.201".parse().unwrap()),
                    (Family::V6, "2001:db8:1::c8".parse().unwrap())
                ]
                .into(),
                hostname: Some("a.example".to_owned()),
                on_no_gateway: OnNoGateway::NodeAddress,
                selector: [("app".to_owned(), "a".to_owned())].into(),
            }
        );
    }

    #[test]
    fn a_slice_keeps_endpoints_of_every_condition_and_what_they_stand_for() {
        let slice: discovery::EndpointSlice = serde_json::from_value(json!({
            "metadata": {"namespace": "shop", "name": "a-1", "labels": {"kubernetes.io/service-name": "a"}},
            "addressType": "IPv4",
            "endpoints": [
                {"addresses": ["10.244.1.2"], "nodeName": "node1", "conditions": {"ready": false, "terminating": true},
                 "targetRef": {"kind": "Pod", "name": "p", "namespace": "shop"}},
                {"addresses": ["10.0.0.1"]},
                {"addresses": ["10.0.0.2"], "targetRef": {"kind": "VirtualMachine", "name": "v"}}
            ]
        }))
        .unwrap();
        let key = |name: &str| ObjectKey {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
        };
        let endpoint = |address: &str, node: Option<&str>, target| Endpoint {
            addresses: vec![address.to_owned()],
            node: node.map(|n| NodeName(n.to_owned())),
            target,
        };
        assert_eq!(
            EndpointSlice::of(&slice),
            Some(EndpointSlice {
                service: key("a"),
                endpoints: vec![
                    endpoint("10.244.1.2", Some("node1"), Target::Pod(key("p"))),
                    endpoint("10.0.0.1", None, Target::Other("nothing".to_owned())),
                    endpoint(
                        "10.0.0.2",
                        None,
                        Target::Other("VirtualMachine v".to_owned())
                    ),
                ]
            })
        );
        let stray: discovery::EndpointSlice = serde_json::from_value(
            json!({"metadata": {"namespace": "shop"}, "addressType": "IPv4", "endpoints": []}),
        )
        .unwrap();
        assert_eq!(EndpointSlice::of(&stray), None);
    }

    #[test]
    fn a_pod_counts_from_its_address_to_its_end_and_not_on_the_host_network() {
        let pod = |spec: serde_json::Value, status: serde_json::Value| {
            let labels = json!({"app": "a", "tier": "x"});
            let object = json!({"metadata": {"labels": labels}, "spec": spec, "status": status});
            Pod::of(&serde_json::from_value(object).unwrap())
        };
        let spec = json!({"containers": []});
        let ips = json!([{"ip": "10.244.1.2"}, {"ip": "fd00::2"}]);
        assert_eq!(pod(spec.clone(), json!({"phase": "Pending"})), None);
        assert_eq!(
            pod(spec.clone(), json!({"phase": "Succeeded", "podIPs": ips})),
            None
        );
        let on_host = json!({"containers": [], "hostNetwork": true});
        assert_eq!(
            pod(on_host, json!({"phase": "Running", "podIPs": ips})),
            None
        );
        let pod = pod(spec, json!({"phase": "Pending", "podIPs": ips})).unwrap();
        assert_eq!(pod.addresses.len(), 2);
        for (selector, expected) in [
            (json!({"app": "a"}), true),
            (json!({"app": "a", "tier": "x"}), true),
            (json!({"app": "b"}), false),
            (json!({"app": "a", "more": "y"}), false),
            (json!({}), false),
        ] {
            let service = service(json!({"metadata": {}, "spec": {"selector": selector}}));
            assert_eq!(service.selects(&pod), expected, "{selector}");
        }
    }

    #[test]
    fn a_heartbeat_of_a_node_changes_no_fact() {
        let node = |heartbeat: &str| {
            Node::of(
                &serde_json::from_value(json!({
                    "metadata": {"name": "node1"},
                    "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64"]},
                    "status": {
                        "addresses": [{"type": "Hostname", "address": "node1"}, {"type": "InternalIP", "address": "192.0.2.11"}],
                        "conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": heartbeat}]
                    }
                }))
                .unwrap(),
            )
        };
        assert_eq!(node("2026-01-01T00:00:00Z"), node("2026-01-01T00:00:10Z"));
        assert_eq!(node("2026-01-01T00:00:00Z").pod_cidrs.len(), 2);
        assert_eq!(
            node("2026-01-01T00:00:00Z").addresses,
            ["192.0.2.11".parse::<IpAddr>().unwrap()]
        );
    }
}
