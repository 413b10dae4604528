//! Which mode of iptables the node's other programs use, found out without changing anything.

use crate::kernel::error::Error;
use crate::kernel::iptables::by_name::ByName;
use crate::kernel::iptables::mode::{Variant, legacy_tables};
use crate::kernel::iptables::save::{Line, save};
use crate::state::Family;

/// Chains by which a kubelet says which mode it uses, as iptables-wrappers looks for them.
const HINTS: [(&str, &str); 2] = [
    ("mangle", "KUBE-IPTABLES-HINT"),
    ("mangle", "KUBE-KUBELET-CANARY"),
];

/// Finds out the mode as Kubernetes' iptables-wrappers does: what the kubelet uses, else what has more rules.
pub(super) async fn detect(families: &[Family]) -> Result<(Variant, &'static str), Error> {
    let of_kubelet = "the kubelet uses it";
    let nft = ByName::open()?;
    for family in families {
        if nft.has_any(*family, HINTS)? {
            return Ok((Variant::Nft, of_kubelet));
        }
    }
    let mut legacy = Vec::new();
    for family in families {
        if !legacy_tables(*family).await.is_empty() {
            legacy.extend(save(Variant::Legacy, *family).await?);
        }
    }
    let is_hint = |line: &Line| HINTS.contains(&(line.table.as_str(), line.chain.as_str()));
    if legacy.iter().any(is_hint) {
        return Ok((Variant::Legacy, of_kubelet));
    }
    let rules = legacy.iter().filter(|line| line.rule.is_some()).count();
    let mut of_nft = 0;
    for family in families.iter().filter(|_| rules > 0) {
        of_nft += nft.rules(*family)?;
    }
    Ok(match rules > of_nft {
        true => (Variant::Legacy, "it has more rules"),
        false => (Variant::Nft, "nothing speaks for legacy"),
    })
}
