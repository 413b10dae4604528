//! MetalLB's ServiceL2Status objects.
//!
//! The label of such an object is right where label and `status.node` disagree: a speaker of MetalLB 0.15 that
//! takes over after a crash rewrites the label, but cannot rewrite `status.node`, which is immutable.

use kube::ResourceExt;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};

use crate::names::{NodeName, ObjectKey};

pub fn resource() -> ApiResource {
    let kind = GroupVersionKind::gvk("metallb.io", "v1beta1", "ServiceL2Status");
    ApiResource::from_gvk_with_plural(&kind, "servicel2statuses")
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct L2Status {
    pub service: ObjectKey,
    /// The node that announces its VIPs.
    pub node: NodeName,
    /// Order of claims: the object's resource version, the largest being the newest.
    pub version: u64,
}

impl L2Status {
    /// The claim of an object; `None` while a speaker has created it but not yet filled it.
    pub fn of(object: &DynamicObject) -> Option<L2Status> {
        let label = |name: &str| object.labels().get(name).filter(|v| !v.is_empty()).cloned();
        let status = |name: &str| {
            let value = object.data.get("status")?.get(name)?.as_str()?;
            (!value.is_empty()).then(|| value.to_owned())
        };
        let either = |name: &str, field: &str| label(name).or_else(|| status(field));
        let version = object.resource_version();
        Some(L2Status {
            service: ObjectKey {
                namespace: either("metallb.io/service-namespace", "serviceNamespace")?,
                name: either("metallb.io/service-name", "serviceName")?,
            },
            node: NodeName(either("metallb.io/node", "node")?),
            version: version.and_then(|v| v.parse().ok()).unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::serde_json::{self, json};

    fn key() -> ObjectKey {
        ObjectKey {
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
}
