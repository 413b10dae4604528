//! Names that every part of the agent shares, and that belong to none of them.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use derive_more::Display;
use ipnet::IpNet;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(pub String);

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// An interface of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    /// The node's own addresses on it.
    pub addresses: BTreeSet<IpAddr>,
    /// The networks of these addresses. What is on link there is another question, see [`Reach`]: an address of /128 names
    /// no network.
    pub nets: BTreeSet<IpNet>,
}

/// How this node's kernel would send to an address.
#[derive(Clone, Debug, Display, PartialEq, Eq)]
pub enum Reach {
    /// Directly, on this interface.
    #[display("on link at {_0}")]
    OnLink(String),
    #[display("reached through {_0}")]
    Router(IpAddr),
    #[display("this node's own")]
    Own,
    #[display("not reached: {_0}")]
    Unreachable(String),
}
