//! Pod networks that CNI plugins keep in objects of their own, apart from the Nodes' podCIDRs.

use std::collections::BTreeSet;

use ipnet::IpNet;
use k8s_openapi::serde_json::Value;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};

pub fn calico_pools() -> ApiResource {
    let kind = GroupVersionKind::gvk("crd.projectcalico.org", "v1", "IPPool");
    ApiResource::from_gvk_with_plural(&kind, "ippools")
}

pub fn cilium_nodes() -> ApiResource {
    let kind = GroupVersionKind::gvk("cilium.io", "v2", "CiliumNode");
    ApiResource::from_gvk_with_plural(&kind, "ciliumnodes")
}

/// The pod networks that such an object names; what does not parse is left out.
pub fn networks(object: &DynamicObject) -> BTreeSet<IpNet> {
    let spec = &object.data["spec"];
    let ipam = &spec["ipam"];
    let pools = items(&ipam["pools"]["allocated"]).flat_map(|pool| items(&pool["cidrs"]));
    let nets = items(&ipam["podCIDRs"]).chain(pools).chain([&spec["cidr"]]);
    super::networks(nets.filter_map(Value::as_str))
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::serde_json::{self, json};

    #[test]
    fn pools_of_calico_and_nodes_of_cilium_name_pod_networks() {
        for (spec, expected) in [
            (json!({"cidr": "10.48.0.0/16"}), vec!["10.48.0.0/16"]),
            (
                json!({"ipam": {"podCIDRs": ["10.0.1.0/24", "fd00::1/64", "nonsense"]}}),
                vec!["10.0.1.0/24", "fd00::/64"],
            ),
            (
                json!({"ipam": {"pools": {"allocated": [{"pool": "default", "cidrs": ["10.10.0.0/27"]}]}}}),
                vec!["10.10.0.0/27"],
            ),
            (json!({}), vec![]),
        ] {
            let object: DynamicObject = serde_json::from_value(json!({
                "apiVersion": "v1", "kind": "Any", "metadata": {"name": "x"}, "spec": spec
            }))
            .unwrap();
            let found: Vec<String> = networks(&object).iter().map(IpNet::to_string).collect();
            assert_eq!(found, expected);
        }
    }
}
