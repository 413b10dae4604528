//! Which boot of a node its agent has programmed: Leases in MetalLB's namespace, one for each node.
//!
//! A node that was rebooted takes its VIPs back as soon as MetalLB's speaker runs there, perhaps before our agent, and a
//! node may have no agent at all: what is routed there would leave with the node's address. So an agent writes into its
//! Lease in which boot it has programmed its node, and other agents route there only while the kubelet reports that
//! boot. What a stopped agent has programmed stays in force, and so does its Lease.
//!
//! A node that is no gateway knows the egress pods, but does not hold back pods that it has not heard of yet. So the Lease
//! says whether it does: a node that becomes a gateway gets pods of others once it guards.

use k8s_openapi::api::coordination::v1 as coordination;
use kube::ResourceExt;

use crate::names::NodeName;

pub const LEASE_LABEL: &str = "app.kubernetes.io/name";
pub const LEASE_VALUE: &str = "metaleg";
pub const BOOT_ANNOTATION: &str = "metaleg.de/boot-id";
/// Whether the node guards as a gateway does: `true` or `false`. Agents that do not write it always do.
pub const GUARDS_ANNOTATION: &str = "metaleg.de/guards-transit";

/// Identifies one boot of a node: `/proc/sys/kernel/random/boot_id`, which a kubelet reports as
/// `status.nodeInfo.bootID`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootId(pub String);

impl BootId {
    /// The boot of this node.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of_this_node() -> std::io::Result<BootId> {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Ok(BootId(text.trim().to_owned()))
    }
}

pub fn name(node: &NodeName) -> String {
    format!("metaleg-{node}")
}

/// What an agent has programmed on its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programmed {
    /// In which boot.
    pub boot: BootId,
    /// Whether it guards as a gateway does; `None` when it does not say.
    pub guards: Option<bool>,
}

/// The node that holds a Lease, and what its agent has programmed.
pub fn programmed(lease: &coordination::Lease) -> Option<(NodeName, Programmed)> {
    let node = NodeName(lease.spec.as_ref()?.holder_identity.clone()?);
    let boot = lease.annotations().get(BOOT_ANNOTATION)?.clone();
    // Withdrawn.
    if boot.is_empty() {
        return None;
    }
    let guards = lease.annotations().get(GUARDS_ANNOTATION);
    let programmed = Programmed {
        boot: BootId(boot),
        guards: guards.map(|value| value == "true"),
    };
    // A copied Lease has another name, and must not count for the node that it was copied from.
    (lease.name_any() == name(&node)).then_some((node, programmed))
}
