//! Kubernetes objects as YAML has them, read as the watches read them: with their selectors, and reduced to facts.

use k8s_openapi::api::coordination::v1 as coordination;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use kube::ResourceExt;
use kube::core::DynamicObject;
use metaleg::cluster::index::{Snapshot, merged};
use metaleg::cluster::l2status::L2Status;
use metaleg::cluster::leases::{self, LEASE_LABEL, LEASE_VALUE};
use metaleg::cluster::{
    EGRESS_LABEL, EGRESS_VALUE, EndpointSlice, Node, Pod, Service, View, pools, service_cidrs,
};
use metaleg::names::{NodeName, ObjectKey};
use metaleg::settings::Settings;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Everything that is in the cluster.
#[derive(Debug, Default)]
pub(crate) struct Objects {
    services: Vec<core::Service>,
    slices: Vec<discovery::EndpointSlice>,
    nodes: Vec<core::Node>,
    pods: Vec<core::Pod>,
    statuses: Vec<DynamicObject>,
    leases: Vec<coordination::Lease>,
    service_cidrs: Vec<networking::ServiceCIDR>,
    ip_pools: Vec<DynamicObject>,
    cilium_nodes: Vec<DynamicObject>,
}

impl Objects {
    pub(crate) fn read(objects: Vec<Value>) -> Result<Objects, String> {
        let mut all = Objects::default();
        for object in objects {
            let kind = object["kind"].as_str().unwrap_or_default().to_owned();
            match kind.as_str() {
                "Service" => all.services.push(typed(object)?),
                "EndpointSlice" => all.slices.push(typed(object)?),
                "Node" => all.nodes.push(typed(object)?),
                "Pod" => all.pods.push(typed(object)?),
                "ServiceL2Status" => all.statuses.push(typed(object)?),
                "Lease" => all.leases.push(typed(object)?),
                "ServiceCIDR" => all.service_cidrs.push(typed(object)?),
                "IPPool" => all.ip_pools.push(typed(object)?),
                "CiliumNode" => all.cilium_nodes.push(typed(object)?),
                _ => return Err(format!("{kind}: the agent reads no such object")),
            }
        }
        Ok(all)
    }

    /// What the watches of a node's agent deliver.
    pub(crate) fn facts(&self, settings: &Settings) -> Snapshot {
        let is_labelled = |object: &dyn Labelled| object.has(EGRESS_LABEL, EGRESS_VALUE);
        let of_metallb =
            |namespace: Option<String>| namespace.as_ref() == Some(&settings.metallb_namespace);
        let services = self.services.iter().filter(|s| is_labelled(*s));
        let slices = self.slices.iter().filter(|s| is_labelled(*s));
        let is_own = |pod: &&core::Pod| {
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref());
            node == Some(&settings.node_name.0)
        };
        let pods = self.pods.iter().filter(is_own);
        let statuses = self.statuses.iter().filter(|s| of_metallb(s.namespace()));
        let leases = self
            .leases
            .iter()
            .filter(|l| of_metallb(l.namespace()) && l.has(LEASE_LABEL, LEASE_VALUE));
        let nodes = self.nodes.iter();
        let nodes = nodes.map(|node| (NodeName(node.name_any()), Node::of(node)));
        let cilium = self.cilium_nodes.iter();
        let cilium = cilium.map(|object| (object.name_any(), pools::networks(object)));
        let leases: Vec<_> = leases.filter_map(leases::programmed).collect();
        let nodes = merged(&nodes.collect(), &cilium.collect(), leases.iter());
        Snapshot {
            view: View {
                services: services.map(|s| (key(s), Service::of(s))).collect(),
                slices: slices
                    .filter_map(|s| Some((key(s), EndpointSlice::of(s)?)))
                    .collect(),
                pods: pods.filter_map(|p| Some((key(p), Pod::of(p)?))).collect(),
                nodes,
                service_cidrs: self.service_cidrs.iter().flat_map(service_cidrs).collect(),
                pod_pools: self.ip_pools.iter().flat_map(pools::networks).collect(),
                ..View::default()
            },
            statuses: statuses
                .filter_map(|s| Some((key(s), L2Status::of(s)?)))
                .collect(),
            away: false,
        }
    }
}

trait Labelled {
    fn has(&self, label: &str, value: &str) -> bool;
}

impl<O: ResourceExt> Labelled for O {
    fn has(&self, label: &str, value: &str) -> bool {
        self.labels().get(label).is_some_and(|v| v == value)
    }
}

fn key(object: &impl ResourceExt) -> ObjectKey {
    ObjectKey {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
    }
}

fn typed<O: DeserializeOwned>(object: Value) -> Result<O, String> {
    let name = format!("{} {}", object["kind"], object["metadata"]["name"]);
    serde_json::from_value(object).map_err(|error| format!("{name}: {error}"))
}
