//! The modes of iptables, and how to see that the legacy one is in use.

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

/// Whether a legacy table is in use here.
pub(super) async fn has_legacy_table(family: Family, table: &str) -> bool {
    legacy_tables(family).await.iter().any(|name| name == table)
}

/// The legacy tables that are in use here. The legacy tools would register others when asked for them.
pub(super) async fn legacy_tables(family: Family) -> Vec<String> {
    let file = match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    // Absent until the module is loaded.
    let names = tokio::fs::read_to_string(file).await.unwrap_or_default();
    names.split_whitespace().map(str::to_owned).collect()
}
