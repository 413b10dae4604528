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
    Active { vip: IpAddr, gateway: NodeName },
    /// Its pods do not leave.
    Blocked(Blocked),
    /// Its pods would not leave, but its annotation lets them out as without MetalEG.
    Released(Blocked),
}

/// Why pods of a Service do not leave.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Blocked {
    #[error("MetalLB has not assigned an address of this family")]
    NoVip,
    #[error("the ingress is the host name {0}, not an address")]
    HostnameIngress(String),
    #[error("no node announces the VIP (MetalLB does only while an endpoint is ready)")]
    NoAnnouncer,
    #[error("announced by {0}, which is not a node of the cluster")]
    UnknownGateway(NodeName),
    #[error("announced by {0}, which has no InternalIP of this family")]
    GatewayWithoutAddress(NodeName),
    #[error("announced by {0}, which no agent has programmed since it was booted")]
    GatewayNotProgrammed(NodeName),
    #[error("announced by {0}, whose address {1} is in no network of this node's interfaces")]
    GatewayOffLink(NodeName, IpAddr),
}

/// What is left out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    Service(ObjectKey),
    /// The annotation of a Service that says what happens without a gateway.
    OnNoGateway(ObjectKey),
    Endpoint {
        slice: ObjectKey,
        /// The address as it is written there.
        address: String,
    },
}

/// Why something is left out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ignored {
    #[error("not of type LoadBalancer")]
    NotLoadBalancer,
    #[error("`{0}` is neither reject nor node-address")]
    UnknownValue(String),
    #[error("not an IP address")]
    NotAnAddress,
    #[error("loopback, link-local, multicast or unspecified: no pod's address")]
    NotAPodAddress,
    #[error("address of node {0}: a hostNetwork pod leaves as its node")]
    NodeAddress(NodeName),
    /// Nobody may capture what is not a pod of the Service's own namespace with a hand-made slice.
    #[error("stands for {}", target(.0))]
    NotAPodOfItsNamespace(Target),
    /// The address is that of another pod, which a hand-made slice, or one that is late, must not capture.
    #[error("address of another Pod, {0}")]
    AnotherPod(ObjectKey),
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

fn target(target: &Target) -> String {
    match target {
        Target::Pod(pod) => format!("Pod {pod} of another namespace"),
        Target::Other(what) => format!("{what}, not for a Pod"),
    }
}
