//! Settings: one definition for each (environment variable, flag, default, help). What was given on the command line
//! and in the environment comes from [`crate::cli`].
//!
//! Text is parsed once, before anything is done; a value that makes no sense is one line that names the setting.

mod mask;

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use tracing_subscriber::EnvFilter;

use crate::names::NodeName;
pub use crate::settings::mask::FwMask;

/// A setting as operators see it.
#[derive(Clone, Copy, Debug)]
pub struct Definition {
    /// Name of the environment variable; the flag is the same in lower case with dashes.
    pub name: &'static str,
    /// Value when the variable is unset or empty.
    pub default: &'static str,
    /// What it does, for `--help` and the README.
    pub help: &'static str,
}

impl Definition {
    pub(crate) fn flag(&self) -> String {
        self.name.to_lowercase().replace('_', "-")
    }
}

/// Every setting there is, in the order in which operators meet them.
pub const DEFINITIONS: &[Definition] = &[
    Definition {
        name: "NODE_NAME",
        default: "",
        help: "Name of the Kubernetes node that the agent runs on (required)",
    },
    Definition {
        name: "METALLB_NAMESPACE",
        default: "metallb-system",
        help: "Namespace of MetalLB's ServiceL2Status objects",
    },
    Definition {
        name: "FIREWALL_BACKEND",
        default: "auto",
        help: "What marks and translates packets: `nftables` (a table of its own), `iptables` (nf_tables or \
               legacy mode, as the node's other programs use it), or `auto`: nftables where the node can",
    },
    Definition {
        name: "FIREWALL_MASK",
        default: "0x00F00000",
        help: "Bits of the packet mark that MetalEG may use, contiguous: with n bits the pods of a node use 2^n - 2 \
               gateways at full speed, and any number beyond by one routing rule for each pod",
    },
    Definition {
        name: "FIREWALL_EXCLUDE_DST_CIDRS",
        default: "auto",
        help: "Destinations that are not egress: `auto` (pod and Service networks, node addresses, \
               link-local, multicast), a list of CIDRs in its place, or `auto,CIDR,…` for both",
    },
    Definition {
        name: "ROUTE_BACKEND",
        default: "netlink",
        help: "What routes packets to their gateway: `netlink`",
    },
    Definition {
        name: "ROUTE_TABLE_ID_OFFSET",
        default: "100000",
        help: "Routing tables are numbered from this number + 1, one for each gateway",
    },
    Definition {
        name: "ROUTE_RULE_PRIORITY",
        default: "1000",
        help: "First of the 100 routing rule priorities that MetalEG uses",
    },
    Definition {
        name: "RECONCILIATION_INTERVAL",
        default: "5m",
        help: "How often the whole kernel state is read back, repaired and cleaned up",
    },
    Definition {
        name: "FILTER_ENDPOINTS_FOR_NODE",
        default: "true",
        help: "Route only pods of this node to their gateway; `false` also routes packets of other nodes' \
               pods that pass through this one",
    },
    Definition {
        name: "GUARD_TRANSIT",
        default: "true",
        help: "Drop packets that other nodes' pods send to outside through this node unless they belong to an \
               egress pod; `false` where this node is a router for other nodes' pods",
    },
    Definition {
        name: "ANNOUNCER_GRACE_PERIOD",
        default: "30s",
        help: "How long a VIP's gateway is kept while nothing names an announcer, the announcer is not programmed, or \
               its Lease is lost; after a restart also how long an object that contradicts the kernel's gateway is \
               checked on the LAN",
    },
    Definition {
        name: "ANNOUNCER_SOURCES",
        default: "status,wire",
        help: "Where a VIP's announcer is read from: `status` (MetalLB's ServiceL2Status objects), or \
               `status,wire`: ARP and neighbour discovery on the LAN too, where it is known first and never lost",
    },
    Definition {
        name: "LAN_INTERFACE",
        default: "",
        help: "Interface on which the other nodes are reached; empty: the one whose subnet holds the gateway",
    },
    Definition {
        name: "STRICT_START",
        default: "false",
        help: "Drop what a pod of this node sends to outside until it is known whether it is an egress pod",
    },
    Definition {
        name: "METRICS_BIND_ADDRESS",
        default: ":21793",
        help: "Address of `/metrics`; `0` for none",
    },
    Definition {
        name: "HEALTH_PROBE_BIND_ADDRESS",
        default: ":21794",
        help: "Address of `/healthz` and `/readyz`; `0` for none",
    },
    Definition {
        name: "RUST_LOG",
        default: "info",
        help: "What is logged: a level, or `target=level,…`",
    },
    Definition {
        name: "LOG_FORMAT",
        default: "text",
        help: "`text` or `json`",
    },
];

/// Which destinations are not egress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExcludedDestinations {
    /// Those that the agent finds in the cluster.
    pub auto: bool,
    /// Those that the operator names.
    pub listed: BTreeSet<IpNet>,
}

/// What marks and translates packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirewallBackend {
    /// nftables where the node can do what is needed, else iptables.
    Auto,
    /// nftables, or the agent does not start.
    Nftables,
    /// iptables and ipset.
    Iptables,
}

/// Where claims to announce a VIP come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AnnouncerSource {
    /// MetalLB's ServiceL2Status objects.
    Status,
    /// ARP and neighbour discovery on the LAN.
    Lan,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What the operator asked for, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The node that the agent runs on.
    pub node_name: NodeName,
    /// Where MetalLB's status objects are.
    pub metallb_namespace: String,
    /// What marks and translates packets.
    pub firewall: FirewallBackend,
    /// Mark bits that are ours.
    pub mask: FwMask,
    /// Destinations that are not egress.
    pub excluded: ExcludedDestinations,
    /// Routing tables are numbered from here + 1.
    pub table_offset: u32,
    /// First priority of our routing rules.
    pub rule_priority: u32,
    /// Time between two full reconciles.
    pub reconciliation_interval: Duration,
    /// Route only pods of this node.
    pub filter_endpoints_for_node: bool,
    /// Drop what pods of this node send to outside before they are classified.
    pub strict_start: bool,
    /// Drop what pods of other nodes send to outside through this node, unless they are egress pods.
    pub guard_transit: bool,
    /// Where claims to announce a VIP are read from.
    pub sources: BTreeSet<AnnouncerSource>,
    /// How long the last known announcer or gateway is kept.
    pub grace: Duration,
    /// The interface towards the gateways, if the operator names it.
    pub lan_interface: Option<String>,
    /// Where metrics are served.
    pub metrics_address: Option<SocketAddr>,
    /// Where health probes are served.
    pub health_address: Option<SocketAddr>,
    /// What is logged, in the syntax of `RUST_LOG`.
    pub log_filter: String,
    /// How log lines look.
    pub log_format: LogFormat,
}

/// A setting that makes no sense, as one line that names it and the value that was found.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadSetting(pub String);

impl Settings {
    /// Settings from whatever knows a variable's value; empty means the default.
    ///
    /// # Errors
    /// For the first setting that makes no sense.
    pub fn parse(value_of: impl Fn(&str) -> String) -> Result<Settings, BadSetting> {
        let value = |name: &'static str| -> (&'static str, String) {
            let given = value_of(name);
            let trimmed = given.trim();
            if !trimmed.is_empty() {
                return (name, trimmed.to_owned());
            }
            let definition = DEFINITIONS.iter().find(|d| d.name == name);
            (name, definition.map_or("", |d| d.default).to_owned())
        };

        let (name, node_name) = value("NODE_NAME");
        if node_name.is_empty() {
            return Err(BadSetting(format!(
                "{name} is not set: must be the name of this Kubernetes node (in a pod: fieldRef spec.nodeName)"
            )));
        }
        let backend = value("FIREWALL_BACKEND");
        let firewall = match one_of(&backend, &["auto", "nftables", "iptables"])? {
            "nftables" => FirewallBackend::Nftables,
            "iptables" => FirewallBackend::Iptables,
            _ => FirewallBackend::Auto,
        };
        one_of(&value("ROUTE_BACKEND"), &["netlink"])?;
        let mask = mask(&value("FIREWALL_MASK"))?;
        let (_, lan_interface) = value("LAN_INTERFACE");
        let log_format = match one_of(&value("LOG_FORMAT"), &["text", "json"])? {
            "json" => LogFormat::Json,
            _ => LogFormat::Text,
        };
        Ok(Settings {
            node_name: NodeName(node_name),
            metallb_namespace: value("METALLB_NAMESPACE").1,
            firewall,
            mask,
            excluded: excluded(&value("FIREWALL_EXCLUDE_DST_CIDRS"))?,
            table_offset: table_offset(&value("ROUTE_TABLE_ID_OFFSET"))?,
            rule_priority: rule_priority(&value("ROUTE_RULE_PRIORITY"))?,
            reconciliation_interval: duration(
                &value("RECONCILIATION_INTERVAL"),
                Duration::from_secs(1),
            )?,
            filter_endpoints_for_node: boolean(&value("FILTER_ENDPOINTS_FOR_NODE"))?,
            strict_start: boolean(&value("STRICT_START"))?,
            guard_transit: boolean(&value("GUARD_TRANSIT"))?,
            sources: sources(&value("ANNOUNCER_SOURCES"))?,
            grace: duration(&value("ANNOUNCER_GRACE_PERIOD"), Duration::ZERO)?,
            lan_interface: (!lan_interface.is_empty()).then_some(lan_interface),
            metrics_address: bind_address(&value("METRICS_BIND_ADDRESS"))?,
            health_address: bind_address(&value("HEALTH_PROBE_BIND_ADDRESS"))?,
            log_filter: log_filter(&value("RUST_LOG"))?,
            log_format,
        })
    }
}

#[cfg(test)]
impl Settings {
    /// The defaults, on a node.
    pub(crate) fn default_on(node: &str) -> Settings {
        let only_the_name = |name: &str| if name == "NODE_NAME" { node } else { "" }.to_owned();
        Settings::parse(only_the_name).unwrap()
    }
}

type Value = (&'static str, String);

fn bad((name, value): &Value, what: impl fmt::Display) -> BadSetting {
    BadSetting(format!("{name}={value}: {what}"))
}

fn one_of<'a>(value: &'a Value, known: &[&str]) -> Result<&'a str, BadSetting> {
    if known.contains(&value.1.as_str()) {
        Ok(&value.1)
    } else {
        Err(bad(
            value,
            format_args!("unknown, must be {}", known.join(" or ")),
        ))
    }
}

fn mask(value: &Value) -> Result<FwMask, BadSetting> {
    let digits = value
        .1
        .strip_prefix("0x")
        .or_else(|| value.1.strip_prefix("0X"))
        .ok_or_else(|| bad(value, "must be a hexadecimal number such as 0x00F00000"))?;
    let bits = u32::from_str_radix(digits, 16).map_err(|_| {
        bad(
            value,
            "must be a hexadecimal number of at most 32 bits such as 0x00F00000",
        )
    })?;
    FwMask::new(bits).map_err(|what| {
        bad(
            value,
            format_args!("{what}, must be one block of bits such as 0x00F00000"),
        )
    })
}

fn excluded(value: &Value) -> Result<ExcludedDestinations, BadSetting> {
    let mut excluded = ExcludedDestinations {
        auto: false,
        listed: BTreeSet::new(),
    };
    for part in value.1.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        if part == "auto" {
            excluded.auto = true;
            continue;
        }
        let net = part
            .parse::<IpNet>()
            .ok()
            .or_else(|| part.parse::<IpAddr>().ok().map(IpNet::from))
            .ok_or_else(|| {
                bad(
                    value,
                    format_args!("`{part}` is neither `auto` nor a CIDR such as 10.0.0.0/8"),
                )
            })?;
        excluded.listed.insert(net.trunc());
    }
    Ok(excluded)
}

fn sources(value: &Value) -> Result<BTreeSet<AnnouncerSource>, BadSetting> {
    let parsed = value.1.split(',').map(|word| match word.trim() {
        "status" => Some(AnnouncerSource::Status),
        "wire" => Some(AnnouncerSource::Lan),
        _ => None,
    });
    let parsed: Option<BTreeSet<AnnouncerSource>> = parsed.collect();
    parsed
        .filter(|sources| sources.contains(&AnnouncerSource::Status))
        .ok_or_else(|| bad(value, "unknown, must be status,wire or status"))
}

fn number(value: &Value) -> Result<u32, BadSetting> {
    value
        .1
        .parse()
        .map_err(|_| bad(value, "must be a whole number of at most 4294967295"))
}

/// Tables 0 (unspecified) and 253 to 255 (default, main, local) belong to the kernel.
fn table_offset(value: &Value) -> Result<u32, BadSetting> {
    let offset = number(value)?;
    if offset.checked_add(MOST_TABLES).is_none() {
        return Err(bad(
            value,
            "too large: the table numbers do not fit into 32 bits",
        ));
    }
    Ok(offset)
}

/// The number of gateways has no limit of ours; the offset must leave table numbers for this many, the most nodes that
/// Kubernetes supports.
const MOST_TABLES: u32 = 5_000;

/// The last of our 100 priorities must be ahead of the `main` table's rule at 32766.
fn rule_priority(value: &Value) -> Result<u32, BadSetting> {
    let priority = number(value)?;
    if (1..=32_666).contains(&priority) {
        Ok(priority)
    } else {
        Err(bad(
            value,
            "must be from 1 to 32666: ahead of the rule for the main table",
        ))
    }
}

fn duration(value: &Value, least: Duration) -> Result<Duration, BadSetting> {
    let duration = humantime::parse_duration(&value.1)
        .map_err(|_| bad(value, "must be a duration such as 30s, 5m or 1h 30m"))?;
    if duration < least {
        return Err(bad(
            value,
            format_args!("must be at least {}", humantime::format_duration(least)),
        ));
    }
    Ok(duration)
}

fn boolean(value: &Value) -> Result<bool, BadSetting> {
    // The spellings that earlier releases took.
    match value.1.as_str() {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(bad(value, "must be true or false")),
    }
}

fn bind_address(value: &Value) -> Result<Option<SocketAddr>, BadSetting> {
    if value.1 == "0" {
        return Ok(None);
    }
    let address = match value.1.strip_prefix(':') {
        Some(port) => port
            .parse()
            .ok()
            .map(|port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))),
        None => value.1.parse().ok(),
    };
    address.map(Some).ok_or_else(|| {
        bad(
            value,
            "must be an address such as :21793 or 127.0.0.1:21793, or 0 for none",
        )
    })
}

fn log_filter(value: &Value) -> Result<String, BadSetting> {
    EnvFilter::builder()
        .parse(&value.1)
        .map(|_| value.1.clone())
        .map_err(|error| bad(value, error))
}

#[cfg(test)]
mod tests;
