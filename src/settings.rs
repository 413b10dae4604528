//! Settings: one definition for each (environment variable, flag, default, help). What was given on the command line
//! and in the environment comes from [`crate::cli`].
//!
//! Text is parsed once, before anything is done; a value that makes no sense is one line that names the setting.

mod mask;

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use strum::{EnumString, VariantNames};
use tracing_subscriber::EnvFilter;

use crate::names::NodeName;
pub use crate::settings::mask::FwMask;

/// The number of gateways has no limit of ours; the offset must leave table numbers for this many, the most nodes that
/// Kubernetes supports.
const MOST_TABLES: u32 = 5_000;

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

macro_rules! definitions {
    ($($name:ident = $default:literal: $help:literal;)*) => {
        &[$(Definition { name: stringify!($name), default: $default, help: $help }),*]
    };
}

/// Every setting there is, in the order in which operators meet them.
pub const DEFINITIONS: &[Definition] = definitions! {
    NODE_NAME = "": "Name of the Kubernetes node that the agent runs on (required)";
    METALLB_NAMESPACE = "metallb-system": "Namespace of MetalLB's ServiceL2Status objects";
    FIREWALL_BACKEND = "auto":
        "What marks and translates packets: `nftables` (a table of its own), `iptables` (nf_tables or legacy \
         mode, as the node's other programs use it), or `auto`: nftables where the node can";
    FIREWALL_MASK = "0x00F00000":
        "Bits of the packet mark that MetalEG may use, contiguous: with n bits the pods of a node use 2^n - 2 \
         gateways at full speed, and any number beyond by one routing rule for each pod. Where it is not set and \
         others use the default bits, free ones are taken";
    FIREWALL_EXCLUDE_DST_CIDRS = "auto":
        "Destinations that are not egress: `auto` (pod and Service networks, node addresses, link-local, \
         multicast), a list of CIDRs in its place, or `auto,CIDR,…` for both";
    FORWARD_ACCEPT = "false":
        "Accept what pods send, and the answers, in iptables' FORWARD, behind all rules of others: for nodes \
         whose FORWARD policy is DROP";
    ROUTE_BACKEND = "netlink": "What routes packets to their gateway: `netlink`";
    ROUTE_TABLE_ID_OFFSET = "100000":
        "Routing tables are numbered from this number + 1, one for each gateway";
    ROUTE_RULE_PRIORITY = "1000":
        "First of the two routing rule priorities that MetalEG uses. Where it is not set and others have rules \
         there, lower ones are taken";
    RECONCILIATION_INTERVAL = "5m":
        "How often the whole kernel state is read back, repaired and cleaned up";
    FILTER_ENDPOINTS_FOR_NODE = "true":
        "Route only pods of this node to their gateway; `false` also routes packets of other nodes' pods that \
         pass through this one";
    GUARD_TRANSIT = "true":
        "Drop packets that other nodes' pods send to outside through this node unless they belong to an egress \
         pod; `false` where this node is a router for other nodes' pods";
    ANNOUNCER_GRACE_PERIOD = "30s":
        "How long a VIP's gateway is kept while nothing names an announcer, the announcer is not programmed, or \
         its Lease is lost; after a restart also how long an object that contradicts the kernel's gateway is \
         checked on the LAN";
    ANNOUNCER_SOURCES = "status,wire":
        "Where a VIP's announcer is read from: `status` (MetalLB's ServiceL2Status objects), or `status,wire`: \
         ARP and neighbour discovery on the LAN too, where it is known first and never lost";
    LAN_INTERFACE = "":
        "Interface on which VIPs are announced and the other nodes are on link; empty: found out for each, by networks \
         and routes";
    STRICT_START = "false":
        "Drop what a pod of this node sends to outside until it is known whether it is an egress pod";
    METRICS_BIND_ADDRESS = ":21793": "Address of `/metrics`; `0` for none";
    HEALTH_PROBE_BIND_ADDRESS = ":21794": "Address of `/healthz` and `/readyz`; `0` for none";
    RUST_LOG = "info": "What is logged: a level, or `target=level,…`";
    LOG_FORMAT = "text": "`text` or `json`";
};

/// Which destinations are not egress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExcludedDestinations {
    /// Those that the agent finds in the cluster.
    pub auto: bool,
    /// Those that the operator names.
    pub listed: BTreeSet<IpNet>,
}

/// What marks and translates packets.
#[derive(Clone, Copy, Debug, EnumString, PartialEq, Eq, VariantNames)]
#[strum(serialize_all = "lowercase")]
pub enum FirewallBackend {
    /// nftables where the node can do what is needed, else iptables.
    Auto,
    /// nftables, or the agent does not start.
    Nftables,
    Iptables,
}

/// Where claims to announce a VIP come from.
#[derive(Clone, Copy, Debug, EnumString, PartialEq, Eq, PartialOrd, Ord)]
pub enum AnnouncerSource {
    /// MetalLB's ServiceL2Status objects.
    #[strum(serialize = "status")]
    Status,
    /// ARP and neighbour discovery on the LAN.
    #[strum(serialize = "wire")]
    Lan,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, EnumString, PartialEq, Eq, VariantNames)]
#[strum(serialize_all = "lowercase")]
pub enum LogFormat {
    Text,
    /// One object a line.
    Json,
}

#[derive(EnumString, VariantNames)]
#[strum(serialize_all = "lowercase")]
enum RouteBackend {
    Netlink,
}

/// What the operator asked for, checked; [`DEFINITIONS`] say what each means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub node_name: NodeName,
    pub metallb_namespace: String,
    pub firewall: FirewallBackend,
    pub mask: FwMask,
    /// The operator has named it.
    pub mask_is_given: bool,
    /// Others may set bits of it. Not read from anywhere: found out at the start.
    pub mask_is_shared: bool,
    pub excluded: ExcludedDestinations,
    pub forward_accept: bool,
    /// Routing tables are numbered from here + 1.
    pub table_offset: u32,
    /// First priority of our routing rules.
    pub rule_priority: u32,
    /// The operator has named it.
    pub rule_priority_is_given: bool,
    /// Time between two full reconciles.
    pub reconciliation_interval: Duration,
    pub filter_endpoints_for_node: bool,
    pub strict_start: bool,
    pub guard_transit: bool,
    pub sources: BTreeSet<AnnouncerSource>,
    /// How long the last known announcer or gateway is kept.
    pub grace: Duration,
    pub lan_interface: Option<String>,
    pub metrics_address: Option<SocketAddr>,
    pub health_address: Option<SocketAddr>,
    /// In the syntax of `RUST_LOG`.
    pub log_filter: String,
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
        let is_given = |name| !value_of(name).trim().is_empty();
        let value = |name| {
            let given = value_of(name);
            let definition = DEFINITIONS.iter().find(|d| d.name == name);
            let text = match given.trim() {
                "" => definition.map_or("", |d| d.default),
                given => given,
            };
            Value {
                name,
                text: text.to_owned(),
            }
        };

        let Value { name, text: node } = value("NODE_NAME");
        if node.is_empty() {
            return Err(BadSetting(format!(
                "{name} is not set: must be the name of this Kubernetes node (in a pod: fieldRef spec.nodeName)"
            )));
        }
        value("ROUTE_BACKEND").one_of::<RouteBackend>()?;
        let second = Duration::from_secs(1);
        let lan_interface = value("LAN_INTERFACE").text;
        Ok(Settings {
            node_name: NodeName(node),
            metallb_namespace: value("METALLB_NAMESPACE").text,
            firewall: value("FIREWALL_BACKEND").one_of()?,
            mask: value("FIREWALL_MASK").mask()?,
            mask_is_given: is_given("FIREWALL_MASK"),
            mask_is_shared: false,
            excluded: value("FIREWALL_EXCLUDE_DST_CIDRS").excluded()?,
            forward_accept: value("FORWARD_ACCEPT").boolean()?,
            table_offset: value("ROUTE_TABLE_ID_OFFSET").table_offset()?,
            rule_priority: value("ROUTE_RULE_PRIORITY").rule_priority()?,
            rule_priority_is_given: is_given("ROUTE_RULE_PRIORITY"),
            reconciliation_interval: value("RECONCILIATION_INTERVAL").duration(second)?,
            filter_endpoints_for_node: value("FILTER_ENDPOINTS_FOR_NODE").boolean()?,
            strict_start: value("STRICT_START").boolean()?,
            guard_transit: value("GUARD_TRANSIT").boolean()?,
            sources: value("ANNOUNCER_SOURCES").sources()?,
            grace: value("ANNOUNCER_GRACE_PERIOD").duration(Duration::ZERO)?,
            lan_interface: (!lan_interface.is_empty()).then_some(lan_interface),
            metrics_address: value("METRICS_BIND_ADDRESS").bind_address()?,
            health_address: value("HEALTH_PROBE_BIND_ADDRESS").bind_address()?,
            log_filter: value("RUST_LOG").log_filter()?,
            log_format: value("LOG_FORMAT").one_of()?,
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

/// What was given for a setting, or its default.
struct Value {
    name: &'static str,
    text: String,
}

impl Value {
    fn bad(&self, what: impl fmt::Display) -> BadSetting {
        BadSetting(format!("{}={}: {what}", self.name, self.text))
    }

    fn checked<T>(&self, parsed: Option<T>, what: &str) -> Result<T, BadSetting> {
        parsed.ok_or_else(|| self.bad(what))
    }

    fn one_of<T: FromStr + VariantNames>(&self) -> Result<T, BadSetting> {
        let known = || format!("unknown, must be {}", T::VARIANTS.join(" or "));
        self.text.parse().map_err(|_| self.bad(known()))
    }

    fn mask(&self) -> Result<FwMask, BadSetting> {
        let digits = self.text.strip_prefix("0x");
        let digits = digits.or_else(|| self.text.strip_prefix("0X"));
        let digits = self.checked(digits, "must be a hexadecimal number such as 0x00F00000")?;
        let bits = self.checked(
            u32::from_str_radix(digits, 16).ok(),
            "must be a hexadecimal number of at most 32 bits such as 0x00F00000",
        )?;
        FwMask::new(bits).map_err(|what| {
            self.bad(format!(
                "{what}, must be one block of bits such as 0x00F00000"
            ))
        })
    }

    fn excluded(&self) -> Result<ExcludedDestinations, BadSetting> {
        let mut excluded = ExcludedDestinations {
            auto: false,
            listed: BTreeSet::new(),
        };
        for part in self.text.split(',').map(str::trim) {
            match part {
                "" => {}
                "auto" => excluded.auto = true,
                part => {
                    let address = || part.parse::<IpAddr>().map(IpNet::from);
                    let net: Result<IpNet, _> = part.parse().or_else(|_| address());
                    let what = format!("`{part}` is neither `auto` nor a CIDR such as 10.0.0.0/8");
                    let net = self.checked(net.ok(), &what)?;
                    excluded.listed.insert(net.trunc());
                }
            }
        }
        Ok(excluded)
    }

    fn sources(&self) -> Result<BTreeSet<AnnouncerSource>, BadSetting> {
        let words = self.text.split(',').map(|word| word.trim().parse().ok());
        let sources: Option<BTreeSet<_>> = words.collect();
        let sources = sources.filter(|sources| sources.contains(&AnnouncerSource::Status));
        self.checked(sources, "unknown, must be status,wire or status")
    }

    fn number(&self) -> Result<u32, BadSetting> {
        let number = self.text.parse().ok();
        self.checked(number, "must be a whole number of at most 4294967295")
    }

    /// Tables 0 (unspecified) and 253 to 255 (default, main, local) belong to the kernel.
    fn table_offset(&self) -> Result<u32, BadSetting> {
        let offset = self.number()?;
        let last = offset.checked_add(MOST_TABLES);
        let what = "too large: the table numbers do not fit into 32 bits";
        self.checked(last, what).map(|_| offset)
    }

    /// The last of our 100 priorities must be ahead of the `main` table's rule at 32766.
    fn rule_priority(&self) -> Result<u32, BadSetting> {
        let priority = Some(self.number()?).filter(|number| (1..=32_666).contains(number));
        let what = "must be from 1 to 32666: ahead of the rule for the main table";
        self.checked(priority, what)
    }

    fn duration(&self, least: Duration) -> Result<Duration, BadSetting> {
        let duration = humantime::parse_duration(&self.text).ok();
        let duration = self.checked(duration, "must be a duration such as 30s, 5m or 1h 30m")?;
        let what = format!("must be at least {}", humantime::format_duration(least));
        self.checked(Some(duration).filter(|given| *given >= least), &what)
    }

    fn boolean(&self) -> Result<bool, BadSetting> {
        // The spellings that earlier releases took.
        match self.text.as_str() {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
            _ => Err(self.bad("must be true or false")),
        }
    }

    fn bind_address(&self) -> Result<Option<SocketAddr>, BadSetting> {
        if self.text == "0" {
            return Ok(None);
        }
        let of_port = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let address = match self.text.strip_prefix(':') {
            Some(port) => port.parse().ok().map(of_port),
            None => self.text.parse().ok(),
        };
        let what = "must be an address such as :21793 or 127.0.0.1:21793, or 0 for none";
        self.checked(address, what).map(Some)
    }

    fn log_filter(self) -> Result<String, BadSetting> {
        match EnvFilter::builder().parse(&self.text) {
            Ok(_) => Ok(self.text),
            Err(error) => Err(self.bad(error)),
        }
    }
}

#[cfg(test)]
mod tests;
