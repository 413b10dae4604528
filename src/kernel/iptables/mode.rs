//! Which mode of iptables the node's other programs use, found out without changing anything.

use crate::kernel::error::Error;
use crate::kernel::tool::run;
use crate::state::Family;

/// A mode of the iptables tools, by the kernel interface that they use.
#[derive(Clone, Copy, Debug, strum::Display, PartialEq, Eq)]
pub(crate) enum Variant {
    #[strum(to_string = "nf_tables")]
    Nft,
    /// ip_tables.
    #[strum(to_string = "legacy")]
    Legacy,
}

impl Variant {
    pub(super) const BOTH: [Variant; 2] = [Variant::Nft, Variant::Legacy];

    pub(super) fn other(self) -> Variant {
        match self {
            Variant::Nft => Variant::Legacy,
            Variant::Legacy => Variant::Nft,
        }
    }

    /// The name of one of its tools.
    pub(super) fn tool(self, family: Family, what: &str) -> String {
        let iptables = match family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        let variant = match self {
            Variant::Nft => "nft",
            Variant::Legacy => "legacy",
        };
        format!("{iptables}-{variant}-{what}")
    }
}

/// Finds out the mode as Kubernetes' iptables-wrappers does: what the kubelet uses, else what has more rules.
pub(super) async fn detect(families: &[Family]) -> Result<(Variant, &'static str), Error> {
    let of_kubelet = "the kubelet uses it";
    let nft = survey(Variant::Nft, families).await?;
    if nft.kubelet {
        return Ok((Variant::Nft, of_kubelet));
    }
    let legacy = survey(Variant::Legacy, families).await?;
    if legacy.kubelet {
        return Ok((Variant::Legacy, of_kubelet));
    }
    if legacy.rules > nft.rules {
        return Ok((Variant::Legacy, "it has more rules"));
    }
    Ok((Variant::Nft, "nothing speaks for legacy"))
}

/// Signs of a mode's use.
#[derive(Debug, Default)]
struct Survey {
    kubelet: bool,
    rules: usize,
}

async fn survey(variant: Variant, families: &[Family]) -> Result<Survey, Error> {
    let mut survey = Survey::default();
    for family in families {
        if variant == Variant::Legacy && !has_legacy_tables(*family).await {
            continue;
        }
        let text = run(&variant.tool(*family, "save"), &[], String::new()).await?;
        let hint = |line: &str| {
            line.starts_with(":KUBE-IPTABLES-HINT ") || line.starts_with(":KUBE-KUBELET-CANARY ")
        };
        survey.kubelet |= text.lines().any(hint);
        survey.rules += text.lines().filter(|line| line.starts_with('-')).count();
    }
    Ok(survey)
}

/// Whether the legacy tables are in use here. The legacy tools would register them when asked.
pub(super) async fn has_legacy_tables(family: Family) -> bool {
    !legacy_tables(family).await.trim().is_empty()
}

/// The same of one table.
pub(super) async fn has_legacy_table(family: Family, table: &str) -> bool {
    let names = legacy_tables(family).await;
    names.lines().any(|name| name == table)
}

/// The names of the legacy tables, one a line.
async fn legacy_tables(family: Family) -> String {
    let file = match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    // Absent until the module is loaded.
    tokio::fs::read_to_string(file).await.unwrap_or_default()
}
