//! Shows what this node would be made into, and why: the pass that an agent would begin with now, without a change.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use serde::Serialize;

use crate::cli::PlanFormat;
use crate::cluster::View;
use crate::cluster::watch::Cluster;
use crate::kernel::{self, Kernel};
use crate::names::ObjectKey;
use crate::pass::{self, Memory};
use crate::plan::{self, Desired, Verdict};
use crate::settings::Settings;
use crate::state::{Family, NextHop, PodState, TableId};

/// How long to wait for the API server.
const PATIENCE: Duration = Duration::from_secs(15);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no answer within {seconds} s: {0}", seconds = PATIENCE.as_secs())]
    NotSynced(String),
    #[error("cannot read this node's kernel")]
    Kernel(#[from] kernel::Error),
    #[error("cannot write the plan as {0}: {1}")]
    Format(&'static str, String),
}

/// What a plan says, for people and programs.
#[derive(Debug, Serialize)]
pub struct Shown {
    node: String,
    services: Vec<ShownService>,
    pods: Vec<ShownPod>,
    ignored: Vec<ShownIgnored>,
    obstacles: Vec<ShownObstacle>,
    excluded: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ShownService {
    service: String,
    family: String,
    verdict: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    vip: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

#[derive(Debug, Serialize)]
struct ShownPod {
    address: IpAddr,
    service: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<String>,
    here: String,
}

#[derive(Debug, Serialize)]
struct ShownIgnored {
    subject: String,
    reason: String,
}

#[derive(Debug, Serialize)]
struct ShownObstacle {
    service: String,
    family: String,
    kind: &'static str,
    what: String,
}

/// Makes the plan that the agent would make now, as text.
///
/// # Errors
/// When cluster or kernel cannot be read.
pub async fn run(
    settings: &Settings,
    cluster: &Cluster,
    kernel: &mut impl Kernel,
    format: PlanFormat,
) -> Result<String, Error> {
    let synced = tokio::time::timeout(PATIENCE, cluster.synced());
    if synced.await.is_err() {
        let missing = cluster.not_synced().unwrap_or_default();
        return Err(Error::NotSynced(missing));
    }
    let mut observed = kernel.observe().await?;
    let (heard, now) = (BTreeMap::new(), Instant::now());
    let facts = cluster.facts();
    let asked = pass::to_look_up(&facts, &observed.interfaces);
    kernel.look_up(&asked, &mut observed).await?;
    let mut memory = Memory::new(settings);
    let pass = memory.plan(facts, &heard, &mut observed, settings, now);
    let shown = Shown::of(&pass.desired, &pass.view, settings);
    match format {
        PlanFormat::Table => Ok(shown.to_string()),
        PlanFormat::Json => serde_json::to_string_pretty(&shown)
            .map(|text| text + "\n")
            .map_err(|error| Error::Format("JSON", error.to_string())),
        PlanFormat::Yaml => serde_saphyr::to_string(&shown)
            .map_err(|error| Error::Format("YAML", error.to_string())),
    }
}

impl Shown {
    pub fn of(desired: &Desired, view: &View, settings: &Settings) -> Shown {
        let mut services = Vec::new();
        for (service, verdicts) in &desired.services {
            for (family, verdict) in verdicts {
                services.push(ShownService::of(service, *family, verdict));
            }
        }
        let owners = plan::owners(view, settings);
        let mut pods = Vec::new();
        let mut excluded = Vec::new();
        for state in desired.kernel.families.values() {
            excluded.extend(state.firewall.excluded.iter().map(IpNet::to_string));
            let hops = state.next_hops();
            for (address, pod) in state.firewall.pods.iter().filter(|(_, pod)| pod.egress) {
                let owner = owners.get(address);
                pods.push(ShownPod {
                    address: *address,
                    service: owner.map_or_else(String::new, |(service, _)| service.to_string()),
                    node: owner.and_then(|(_, node)| Some((*node)?.to_string())),
                    here: here(pod, hops.of(*address)),
                });
            }
        }
        let ignored = desired.ignored.iter();
        let ignored = ignored.map(|(subject, reason)| ShownIgnored {
            subject: subject.to_string(),
            reason: reason.to_string(),
        });
        let mut obstacles = Vec::new();
        for (service, families) in &desired.obstacles {
            for (family, found) in families {
                obstacles.extend(found.iter().map(|obstacle| ShownObstacle {
                    service: service.to_string(),
                    family: family.to_string(),
                    kind: obstacle.label(),
                    what: obstacle.to_string(),
                }));
            }
        }
        Shown {
            node: settings.node_name.to_string(),
            services,
            pods,
            ignored: ignored.collect(),
            obstacles,
            excluded,
        }
    }
}

impl ShownService {
    fn of(service: &ObjectKey, family: Family, verdict: &Verdict) -> ShownService {
        let (verdict, vip, gateway, reason) = match verdict {
            Verdict::Active { vip, gateway } => ("Active", Some(*vip), Some(gateway), None),
            Verdict::Blocked(reason) => ("Blocked", None, None, Some(reason)),
            Verdict::Released(reason) => ("Released", None, None, Some(reason)),
        };
        ShownService {
            service: service.to_string(),
            family: family.to_string(),
            verdict,
            vip,
            gateway: gateway.map(ToString::to_string),
            reason: reason.map(ToString::to_string),
        }
    }
}

/// What this node does with a pod's packets to outside.
fn here(pod: &PodState, hop: Option<(TableId, &NextHop)>) -> String {
    let vip = pod.vips.first().map(IpAddr::to_string).unwrap_or_default();
    match (pod.mark, hop) {
        _ if pod.blocked => "rejected".to_owned(),
        (None, _) if pod.gateway_here => format!("translated to {vip}: this node is the gateway"),
        (None, _) => format!("translated to {vip}, should it pass here"),
        (Some(mark), Some((table, hop))) => {
            format!("routed to {hop} (mark {mark}, table {table}), {vip} there")
        }
        (Some(mark), None) => format!("marked {mark}"),
    }
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let services = self.services.iter().map(|s| {
            let why = match (&s.vip, &s.gateway, &s.reason) {
                (Some(vip), Some(gateway), _) => format!("{vip} through {gateway}"),
                (_, _, reason) => reason.clone().unwrap_or_default(),
            };
            let verdict = format!("{}: {why}", s.verdict);
            [s.service.clone(), s.family.clone(), verdict]
        });
        let pods = self.pods.iter().map(|pod| {
            let node = pod.node.clone().unwrap_or_default();
            [
                pod.address.to_string(),
                pod.service.clone(),
                node,
                pod.here.clone(),
            ]
        });
        writeln!(f, "What {} would be made into:\n", self.node)?;
        writeln!(f, "{}", columns(["SERVICE", "FAMILY", "VERDICT"], services))?;
        write!(f, "{}", columns(["POD", "SERVICE", "NODE", "HERE"], pods))?;
        if !self.ignored.is_empty() {
            let ignored = self.ignored.iter();
            let ignored = ignored.map(|i| [i.subject.clone(), i.reason.clone()]);
            write!(f, "\n{}", columns(["IGNORED", "WHY"], ignored))?;
        }
        if !self.obstacles.is_empty() {
            let rows = self.obstacles.iter().map(|o| {
                let kind = o.kind.to_owned();
                [o.service.clone(), o.family.clone(), kind, o.what.clone()]
            });
            let header = ["SERVICE", "FAMILY", "OBSTACLE", "WHAT"];
            write!(f, "\n{}", columns(header, rows))?;
        }
        writeln!(f, "\nNot egress: {}", self.excluded.join(", "))
    }
}

/// Lines with aligned columns, the header first.
fn columns<const N: usize>(header: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let mut lines = vec![header.map(str::to_owned)];
    lines.extend(rows);
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or_default());
    let mut text = String::new();
    for line in &lines {
        let cells = widths.iter().zip(line);
        let cells = cells.map(|(width, cell)| format!("{cell:width$}  "));
        text = text + cells.collect::<String>().trim_end() + "\n";
    }
    text
}
