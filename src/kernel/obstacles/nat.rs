//! NAT chains of others that may translate a connection before ours do.
//!
//! The first NAT chain that decides about a connection wins. Those of one priority are asked in the order in which
//! they were registered, the last one first, so that a CNI plugin that is restarted may get ahead of iptables'
//! table. Only a chain with a priority of its own is always first.

use nix::libc::NF_INET_POST_ROUTING;

use crate::kernel::error::Error;
use crate::kernel::firewall::Firewall;
use crate::kernel::nftables::TABLE;
use crate::kernel::obstacles::chains::Found;
use crate::state::{Family, Obstacle};

/// kube-proxy's own table translates only what it has marked itself, which is never egress.
const KUBE_PROXY: &str = "kube-proxy";

/// Looks for them among the base chains, and where only the backend's tools can see them.
pub(super) async fn find(
    in_use: &Firewall,
    chains: &[Found],
) -> Result<Vec<(Family, Obstacle)>, Error> {
    let ours = in_use.profile();
    let obstacle = |chain| Obstacle::ForeignNat(chain, ours.advice);
    let mut found = Vec::new();
    for chain in in_use.foreign_nat().await? {
        found.extend(Family::ALL.map(|family| (family, obstacle(chain.clone()))));
    }
    for chain in chains {
        let Found {
            kind,
            table,
            name,
            base,
        } = chain;
        let is_ours = ours.nat_table == Some(table) || table == TABLE;
        // What iptables has in its other mode is looked at by what its rules do.
        let is_iptables = table == "nat" && *kind != "inet";
        let decides_first = base.kind == "nat"
            && base.hook == NF_INET_POST_ROUTING
            && base.priority <= ours.nat_priority;
        if decides_first && !is_ours && !is_iptables && table != KUBE_PROXY {
            let text = format!("chain {name} of nftables table {kind} {table}");
            let families = Family::ALL.into_iter().filter(|f| chain.sees(*f));
            found.extend(families.map(|family| (family, obstacle(text.clone()))));
        }
    }
    Ok(found)
}
