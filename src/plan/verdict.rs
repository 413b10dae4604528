//! What becomes of each Service and endpoint, and the words for it: log, Events, metrics and the `plan` command all
//! say it from here.

use std::fmt;
use std::net::IpAddr;

use crate::cluster::{ON_NO_GATEWAY_ANNOTATION, Target};
use crate::names::{NodeName, ObjectKey};

/// What becomes of a Service in one family.
#[derive(Clone, Debug, PartialEq, Eq, strum::Display)]
pub enum Verdict {
    /// Its pods leave with the VIP.
    #[strum(to_string = "active: {vip} through {gateway}")]
    Active { vip: IpAddr, gateway: NodeName },
    /// Its pods do not leave.
    #[strum(to_string = "blocked: {0}")]
    Blocked(Blocked),
    /// Its pods would not leave, but its annotation lets them out as without MetalEG.
    #[strum(to_string = "let out with the node's address: {0}")]
    Released(Blocked),
}

/// Why pods of a Service do not leave.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, strum::IntoStaticStr)]
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
    /// With what the kernel says of the address.
    #[error("announced by {0}, whose address {1} cannot be a next hop here: it is {2}")]
    GatewayOffLink(NodeName, IpAddr, String),
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

impl Blocked {
    /// One word for metrics.
    pub fn label(&self) -> &'static str {
        self.into()
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
