//! What becomes of each Service and endpoint, and the words for it: log, Events, metrics and the `plan` command all
//! say it from here.

use std::fmt;
use std::net::IpAddr;

use crate::cluster::{ON_NO_GATEWAY_ANNOTATION, OnNoGateway, Service, Target};
use crate::names::{NodeName, ObjectKey};

/// What becomes of a Service in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its pods leave with the VIP.
    Active {
        /// The source address of its pods.
        vip: IpAddr,
        /// The node that they leave through.
        gateway: NodeName,
    },
    /// Its pods do not leave.
    Blocked(Blocked),
    /// Its pods would not leave, but its annotation lets them out as without MetalEG.
    Released(Blocked),
}

/// Why pods of a Service do not leave.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Blocked {
    /// MetalLB has not assigned an address of this family.
    #[error("MetalLB has not assigned an address of this family")]
    NoVip,
    /// The ingress is a host name.
    #[error("the ingress is the host name {0}, not an address")]
    HostnameIngress(String),
    /// Nobody announces the VIP.
    #[error("no node announces the VIP (MetalLB does only while an endpoint is ready)")]
    NoAnnouncer,
    /// The announcer is not a node of the cluster.
    #[error("announced by {0}, which is not a node of the cluster")]
    UnknownGateway(NodeName),
    /// The announcer has no InternalIP of this family.
    #[error("announced by {0}, which has no InternalIP of this family")]
    GatewayWithoutAddress(NodeName),
    /// The agent of the announcer has not programmed it since it was booted.
    #[error("announced by {0}, which no agent has programmed since it was booted")]
    GatewayNotProgrammed(NodeName),
    /// No interface of this node has a network that holds the gateway's address.
    #[error("announced by {0}, whose address {1} is in no network of this node's interfaces")]
    GatewayOffLink(NodeName, IpAddr),
}

/// What is left out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// A Service.
    Service(ObjectKey),
    /// The annotation of a Service that says what happens without a gateway.
    OnNoGateway(ObjectKey),
    /// An address of an EndpointSlice.
    Endpoint {
        /// The slice.
        slice: ObjectKey,
        /// The address as it is written there.
        address: String,
    },
}

/// Why something is left out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ignored {
    /// A Service that is not of type LoadBalancer has no VIP.
    #[error("not of type LoadBalancer")]
    NotLoadBalancer,
    /// An annotation with a value that means nothing.
    #[error("`{0}` is neither reject nor node-address")]
    UnknownValue(String),
    /// Not an IP address.
    #[error("not an IP address")]
    NotAnAddress,
    /// Loopback, link-local, multicast or unspecified: no pod has such an address.
    #[error("loopback, link-local, multicast or unspecified: no pod's address")]
    NotAPodAddress,
    /// Address of a node: a hostNetwork pod is the node itself.
    #[error("address of node {0}: a hostNetwork pod leaves as its node")]
    NodeAddress(NodeName),
    /// Nobody may capture what is not a pod of the Service's own namespace with a hand-made slice.
    #[error("stands for {}", target(.0))]
    NotAPodOfItsNamespace(Target),
    /// The address is that of another pod, which a hand-made slice, or one that is late, must not capture.
    #[error("address of another Pod, {0}")]
    AnotherPod(ObjectKey),
    /// An older Service has this pod.
    #[error("belongs to Service {0}, which is older")]
    OwnedBy(ObjectKey),
}

/// What of a Service itself is left out, and why.
pub(super) fn ignored(
    key: &ObjectKey,
    service: &Service,
) -> impl Iterator<Item = (Subject, Ignored)> {
    let kind =
        (!service.load_balancer).then(|| (Subject::Service(key.clone()), Ignored::NotLoadBalancer));
    let annotation = match &service.on_no_gateway {
        OnNoGateway::Unknown(value) => {
            let reason = Ignored::UnknownValue(value.clone());
            Some((Subject::OnNoGateway(key.clone()), reason))
        }
        OnNoGateway::Reject | OnNoGateway::NodeAddress => None,
    };
    kind.into_iter().chain(annotation)
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Active { vip, gateway } => write!(f, "active: {vip} through {gateway}"),
            Verdict::Blocked(reason) => write!(f, "blocked: {reason}"),
            Verdict::Released(reason) => write!(f, "let out with the node's address: {reason}"),
        }
    }
}

impl Blocked {
    /// One word for metrics.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Blocked::NoVip => "NoVip",
            Blocked::HostnameIngress(_) => "HostnameIngress",
            Blocked::NoAnnouncer => "NoAnnouncer",
            Blocked::UnknownGateway(_) => "UnknownGateway",
            Blocked::GatewayWithoutAddress(_) => "GatewayWithoutAddress",
            Blocked::GatewayNotProgrammed(_) => "GatewayNotProgrammed",
            Blocked::GatewayOffLink(..) => "GatewayOffLink",
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Subject::Service(key) => write!(f, "Service {key}"),
            Subject::OnNoGateway(key) => {
                write!(f, "annotation {ON_NO_GATEWAY_ANNOTATION} of Service {key}")
            }
            Subject::Endpoint { slice, address } => {
                write!(f, "endpoint {address} of EndpointSlice {slice}")
            }
        }
    }
}

/// What an endpoint of a hand-made slice stands for.
fn target(target: &Target) -> String {
    match target {
        Target::Pod(pod) => format!("Pod {pod} of another namespace"),
        Target::Other(what) => format!("{what}, not for a Pod"),
    }
}
