//! Settings: one definition for each (environment variable, flag, default, help), and the only place that
//! reads the environment.
//!
//! What was typed is turned once into what it means; a value that makes no sense is one line that names the
//! setting, before anything is done.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Arg, Command};
use ipnet::IpNet;
use tracing_subscriber::EnvFilter;

use crate::names::NodeName;
use crate::state::Mark;

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
    fn flag(&self) -> String {
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
        help: "How long a VIP's last known announcer is kept as gateway when MetalLB names none",
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

/// More slots gain nothing, and each costs a chain: a node's pods hardly use as many gateways.
const MOST_SLOTS: u32 = 255;

/// The bits of the packet mark that are ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FwMask(u32);

impl FwMask {
    /// A mask of contiguous bits.
    ///
    /// # Errors
    /// When it has no bit or bits with gaps.
    pub fn new(bits: u32) -> Result<FwMask, &'static str> {
        if bits == 0 {
            return Err("has no bit");
        }
        let low = bits >> bits.trailing_zeros();
        if low & low.wrapping_add(1) != 0 {
            return Err("is not contiguous");
        }
        Ok(FwMask(bits))
    }

    /// The mask as a number.
    #[must_use]
    pub fn bits(self) -> u32 {
        self.0
    }

    /// How many slots there are: all values but 0, which means unmarked, and at most [`MOST_SLOTS`].
    #[must_use]
    pub fn slots(self) -> u32 {
        MOST_SLOTS.min(self.0 >> self.0.trailing_zeros())
    }

    /// The mark of a slot, from 1: those from [`FwMask::slots`] on share the last one.
    #[must_use]
    pub fn mark(self, slot: u32) -> Mark {
        Mark {
            value: slot.clamp(1, self.slots()) << self.0.trailing_zeros(),
            mask: self.0,
        }
    }

    /// The mark that no marked packet has.
    #[must_use]
    pub fn unmarked(self) -> Mark {
        Mark {
            value: 0,
            mask: self.0,
        }
    }
}

/// Which destinations are not egress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExcludedDestinations {
    /// Those that the agent finds out by itself.
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
    /// Drop what pods of this node send before they are classified.
    pub strict_start: bool,
    /// Drop what unknown pods of other nodes send through this node.
    pub guard_transit: bool,
    /// Listen on the LAN for announcements.
    pub wire: bool,
    /// How long the last known announcer is kept.
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

/// How a plan is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlanFormat {
    /// For people.
    Table,
    /// For programs.
    Json,
    /// For both.
    Yaml,
}

/// What the program is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Be the node's agent.
    Run,
    /// Show what the node would be made into.
    Plan(PlanFormat),
    /// Remove everything of ours from the node's kernel.
    Cleanup,
}

/// Why there are no settings.
#[derive(Debug)]
pub enum SettingsError {
    /// `--help` or `--version`: the text to print, exit code 0.
    Asked(String),
    /// A setting that makes no sense, as one line.
    Bad(String),
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SettingsError::Asked(text) | SettingsError::Bad(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for SettingsError {}

impl Settings {
    /// What to do, with settings from the command line and the environment.
    ///
    /// # Errors
    /// [`SettingsError::Bad`] names the first setting that makes no sense, with the value that was found.
    pub fn load(
        args: impl IntoIterator<Item = OsString>,
    ) -> Result<(Action, Settings), SettingsError> {
        let matches = command().try_get_matches_from(args).map_err(|error| {
            if matches!(
                error.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            ) {
                SettingsError::Asked(error.to_string())
            } else {
                let text = error.to_string();
                let line = text.lines().next().unwrap_or_default();
                SettingsError::Bad(format!(
                    "{} (see --help)",
                    line.trim_start_matches("error: ")
                ))
            }
        })?;
        let (action, matches) = match matches.subcommand() {
            None => (Action::Run, &matches),
            Some((CLEANUP, given)) => (Action::Cleanup, given),
            Some((_, given)) => {
                let format = given.get_one::<String>(OUTPUT).map(String::as_str);
                let format = match format {
                    Some("json") => PlanFormat::Json,
                    Some("yaml") => PlanFormat::Yaml,
                    _ => PlanFormat::Table,
                };
                (Action::Plan(format), given)
            }
        };
        let settings = Settings::parse(|name| {
            let given = matches.get_one::<String>(name).cloned().unwrap_or_default();
            match (name, action, given.trim()) {
                // What is removed is the same on every node.
                ("NODE_NAME", Action::Cleanup, "") => "any".to_owned(),
                _ => given,
            }
        })?;
        Ok((action, settings))
    }

    /// Settings from whatever knows a variable's value; empty means the default.
    ///
    /// # Errors
    /// [`SettingsError::Bad`] names the first setting that makes no sense.
    pub fn parse(value_of: impl Fn(&str) -> String) -> Result<Settings, SettingsError> {
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
            return Err(SettingsError::Bad(format!(
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
        let sources = value("ANNOUNCER_SOURCES");
        let wire = one_of(&sources, &["status,wire", "status"])? == "status,wire";

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
            wire,
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

fn command() -> Command {
    let args = DEFINITIONS.iter().map(|definition| {
        let help = if definition.default.is_empty() {
            definition.help.to_owned()
        } else {
            format!("{} [default: {}]", definition.help, definition.default)
        };
        Arg::new(definition.name)
            .long(definition.flag())
            .env(definition.name)
            .hide_env_values(true)
            .value_name("VALUE")
            .allow_hyphen_values(true)
            .global(true)
            .help(help)
    });
    let output = Arg::new(OUTPUT)
        .short('o')
        .long("output")
        .value_parser(["table", "json", "yaml"])
        .default_value("table")
        .help("How the plan is shown");
    Command::new("metaleg-agent")
        .version(env!("CARGO_PKG_VERSION"))
        .about(
            "MetalEG's agent for one Kubernetes node: pods of labelled Services leave the cluster with the \
             Service's MetalLB address",
        )
        .after_help(
            "Each setting is an environment variable or the flag of the same name; the flag wins.\n\
             Without a command the program is the node's agent, until a signal ends it.\n\
             Exit codes: 0 done, 1 failed, 2 bad settings (nothing was changed).",
        )
        .args(args)
        .subcommand(
            Command::new(PLAN)
                .about("Show what this node would be made into, and why; changes nothing")
                .arg(output),
        )
        .subcommand(Command::new(CLEANUP).about(
            "Remove everything of MetalEG from this node's kernel, also what another backend or an earlier \
             release left; needs no API server. Stop the agent first",
        ))
        .disable_help_subcommand(true)
}

const PLAN: &str = "plan";
const CLEANUP: &str = "cleanup";
const OUTPUT: &str = "output";

type Value = (&'static str, String);

fn bad((name, value): &Value, what: impl fmt::Display) -> SettingsError {
    SettingsError::Bad(format!("{name}={value}: {what}"))
}

fn one_of<'a>(value: &'a Value, known: &[&str]) -> Result<&'a str, SettingsError> {
    if known.contains(&value.1.as_str()) {
        Ok(&value.1)
    } else {
        Err(bad(
            value,
            format_args!("unknown, must be {}", known.join(" or ")),
        ))
    }
}

fn mask(value: &Value) -> Result<FwMask, SettingsError> {
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

fn excluded(value: &Value) -> Result<ExcludedDestinations, SettingsError> {
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

fn number(value: &Value) -> Result<u32, SettingsError> {
    value
        .1
        .parse()
        .map_err(|_| bad(value, "must be a whole number of at most 4294967295"))
}

/// Tables 0 (unspecified) and 253 to 255 (default, main, local) belong to the kernel.
fn table_offset(value: &Value) -> Result<u32, SettingsError> {
    let offset = number(value)?;
    if offset.checked_add(MOST_TABLES).is_none() {
        return Err(bad(
            value,
            "too large: the table numbers do not fit into 32 bits",
        ));
    }
    Ok(offset)
}

/// Gateways have no limit: tables for this many must have numbers.
const MOST_TABLES: u32 = 5_000;

/// The last of our 100 priorities must be ahead of the `main` table's rule at 32766.
fn rule_priority(value: &Value) -> Result<u32, SettingsError> {
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

fn duration(value: &Value, least: Duration) -> Result<Duration, SettingsError> {
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

fn boolean(value: &Value) -> Result<bool, SettingsError> {
    // The spellings that earlier releases took.
    match value.1.as_str() {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(bad(value, "must be true or false")),
    }
}

fn bind_address(value: &Value) -> Result<Option<SocketAddr>, SettingsError> {
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

fn log_filter(value: &Value) -> Result<String, SettingsError> {
    EnvFilter::builder()
        .parse(&value.1)
        .map(|_| value.1.clone())
        .map_err(|error| bad(value, error))
}

#[cfg(test)]
mod tests;
