//! Scenarios: what is in the cluster and on the node, and the plan that comes of it. Each is one YAML file in this folder;
//! a new one needs no Rust. `README.md` beside them says what a file consists of.
//!
//! `UPDATE=1 cargo test --test scenarios` writes what comes out into the files; read the difference before it is committed.

#![expect(
    clippy::unwrap_used,
    reason = "a scenario that cannot be read is a failed test"
)]

mod objects;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use libtest_mimic::{Arguments, Failed, Trial};
use metaleg::commands::plan::Shown;
use metaleg::diff::diff;
use metaleg::lan::Heard;
use metaleg::names::{Interface, NodeName, Reach};
use metaleg::pass::{self, Memory};
use metaleg::settings::{DEFINITIONS, Settings};
use metaleg::state::{
    Family, FamilyState, KernelState, NextHop, Observed, PodState, Rule, RuleAction, Table, TableId,
};
use serde::Deserialize;
use serde_json::Value;

use crate::objects::Objects;

/// The keys of a plan that are written into a scenario that has none yet. What is excluded is long, and seldom the point.
const USUAL: [&str; 3] = ["services", "pods", "ignored"];

/// The first document of a scenario: the node, and how the agent finds it. Everything has a default.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Given {
    /// Files of `clusters/` whose objects are there too; the scenario's own objects replace those of the same name.
    clusters: Vec<String>,
    /// As in the environment; `NODE_NAME` is `node1` where nothing else is said.
    settings: BTreeMap<String, Value>,
    /// The families that the kernel has; both where nothing is said.
    families: Option<Vec<String>>,
    /// Interfaces with their connected networks; `eth0` on the nodes' LAN where nothing is said.
    interfaces: Option<BTreeMap<String, Vec<String>>>,
    /// The routers on the way to addresses.
    routers: BTreeMap<IpAddr, IpAddr>,
    /// The node that is heard to announce an address.
    lan: BTreeMap<IpAddr, String>,
    /// What an earlier run of the agent, or somebody else, has left.
    kernel: Found,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Found {
    /// Tables of ours, with the gateway that each leads to.
    tables: BTreeMap<u32, IpAddr>,
    /// Pods, with their VIP and the table that they are routed by; without one this node is their gateway.
    pods: BTreeMap<IpAddr, FoundPod>,
    /// Tables that others use.
    tables_of_others: BTreeSet<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FoundPod {
    vip: IpAddr,
    table: Option<u32>,
}

/// A scenario as it is written.
struct Scenario {
    /// Up to the expected part.
    text: String,
    given: Given,
    objects: Vec<Value>,
    expected: Option<Value>,
    /// The expected part as it is written.
    written: String,
}

impl Scenario {
    fn read(path: &Path) -> Result<Scenario, String> {
        let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
        let mut given = None;
        let mut objects = Vec::new();
        let mut expected = None;
        let (mut before, mut written) = (String::new(), String::new());
        for part in documents(&text) {
            let value: Value = serde_saphyr::from_str(part).map_err(|error| error.to_string())?;
            if expected.is_some() {
                return Err("what is expected must be the last document".to_owned());
            }
            if value.get("plan").is_some() || value.get("steps").is_some() {
                expected = Some(value);
                written = part.trim_start_matches("---\n").to_owned();
                continue;
            }
            before += part;
            if value.get("kind").is_some() {
                objects.push(value);
            } else if given.is_none() && objects.is_empty() {
                given = Some(serde_json::from_value(value).map_err(|error| error.to_string())?);
            } else {
                return Err(format!("a document of no kind:\n{part}"));
            }
        }
        Ok(Scenario {
            text: before,
            given: given.unwrap_or_default(),
            objects,
            expected,
            written,
        })
    }

    /// The objects, with those of the named clusters.
    fn objects(&self) -> Result<Objects, String> {
        let mut all: Vec<Value> = Vec::new();
        for name in &self.given.clusters {
            let path = folder().join("clusters").join(format!("{name}.yaml"));
            let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            for part in documents(&text) {
                all.push(serde_saphyr::from_str(part).map_err(|error| error.to_string())?);
            }
        }
        let name = |o: &Value| {
            (
                o["kind"].clone(),
                o["metadata"]["namespace"].clone(),
                o["metadata"]["name"].clone(),
            )
        };
        for object in &self.objects {
            all.retain(|other| name(other) != name(object));
            all.push(object.clone());
        }
        Objects::read(all)
    }

    fn settings(&self) -> Result<Settings, String> {
        let given = &self.given.settings;
        for name in given.keys() {
            if !DEFINITIONS.iter().any(|definition| definition.name == name) {
                return Err(format!("{name}: no such setting"));
            }
        }
        let value = |name: &str| match (given.get(name), name) {
            (Some(Value::String(text)), _) => text.clone(),
            (Some(other), _) => other.to_string(),
            (None, "NODE_NAME") => "node1".to_owned(),
            (None, _) => String::new(),
        };
        Settings::parse(value).map_err(|error| error.to_string())
    }

    fn node(&self, settings: &Settings) -> Observed {
        let interfaces = self.given.interfaces.clone().unwrap_or_else(|| {
            let lan = ["192.0.2.0/24", "2001:db8:1::/64"];
            [(
                "eth0".to_owned(),
                lan.map(|net| net.parse().unwrap()).into(),
            )]
            .into()
        });
        let is_there = |family: &Family| match &self.given.families {
            Some(families) => families.contains(&family.to_string()),
            None => true,
        };
        let families = Family::ALL.into_iter().filter(is_there);
        let mut kernel = KernelState {
            families: families.map(|f| (f, FamilyState::default())).collect(),
            doubt: true,
            ..KernelState::default()
        };
        let found = &self.given.kernel;
        for (id, via) in &found.tables {
            let state = kernel.families.entry(Family::of(*via)).or_default();
            put_table(state, settings, TableId(*id), *via);
        }
        for (address, pod) in &found.pods {
            let state = kernel.families.entry(Family::of(*address)).or_default();
            let mark = pod.table.map(|id| slot(settings, id));
            let pod = PodState {
                egress: true,
                vips: [pod.vip].into(),
                gateway_here: mark.is_none(),
                mark,
                ..PodState::default()
            };
            state.firewall.vips.extend(&pod.vips);
            state.firewall.pods.insert(*address, pod);
        }
        let tables = found.tables_of_others.iter();
        let occupied = tables.flat_map(|id| Family::ALL.map(|family| (family, TableId(*id))));
        Observed {
            state: kernel,
            occupied: occupied.collect(),
            interfaces: interfaces
                .into_iter()
                .map(|(name, nets)| Interface {
                    name,
                    nets: nets.iter().map(|net| net.parse().unwrap()).collect(),
                    ..Interface::default()
                })
                .collect(),
            ..Observed::default()
        }
    }

    /// How the node reaches an address: on link where an interface is connected to its network.
    fn reach(&self, address: IpAddr, interfaces: &[Interface]) -> Reach {
        if let Some(router) = self.given.routers.get(&address) {
            return Reach::Router(*router);
        }
        let holds =
            |interface: &&Interface| interface.nets.iter().any(|net| net.contains(&address));
        match interfaces.iter().find(holds) {
            Some(interface) => Reach::OnLink(interface.name.clone()),
            None => Reach::Unreachable("Network is unreachable".to_owned()),
        }
    }

    /// What comes of it: the plan as `metaleg-agent plan` shows it, and the steps to it.
    fn outcome(&self) -> Result<(Shown, Vec<String>), String> {
        let settings = self.settings()?;
        let mut node = self.node(&settings);
        let now = Instant::now();
        let heard = self.given.lan.iter();
        let heard = heard.map(|(vip, node)| (*vip, Heard::new(NodeName(node.clone()), now)));
        // The head of a pass of an agent that has just been started, and the steps that come of it.
        let facts = self.objects()?.facts(&settings);
        let asked = pass::to_look_up(&facts, &node.interfaces);
        let addresses = asked.nodes.union(&asked.vips);
        let reach = addresses.map(|a| (*a, self.reach(*a, &node.interfaces)));
        node.reach = reach.collect();
        let heard = heard.collect();
        let pass = Memory::new(&settings).plan(facts, &heard, &mut node, &settings, now);
        let steps = diff(&node.state, &pass.desired.kernel);
        Ok((
            Shown::of(&pass.desired, &pass.view, &settings),
            steps.iter().map(ToString::to_string).collect(),
        ))
    }
}

fn slot(settings: &Settings, table: u32) -> metaleg::state::Mark {
    settings.mask.mark(table - settings.table_offset)
}

fn put_table(state: &mut FamilyState, settings: &Settings, id: TableId, via: IpAddr) {
    state.routes.rules.insert(Rule {
        priority: settings.rule_priority,
        action: RuleAction::Lookup(id),
        mark: Some(slot(settings, id.0)),
        not: false,
        from: None,
        to: None,
    });
    let gateway = NextHop {
        via,
        dev: "eth0".to_owned(),
    };
    let table = Table {
        fallback: true,
        gateway: Some(gateway),
        ..Table::default()
    };
    state.routes.tables.insert(id, table);
}

/// The documents of a file, each with its separator, so that they make the file again.
fn documents(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find("\n---\n") {
        let (part, after) = rest.split_at(at + 1);
        parts.push(part);
        rest = after;
    }
    parts.push(rest);
    parts
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios")
}

/// A plan as YAML, with some of its keys, below a key of its own.
fn plan_text(shown: &Shown, keys: &[&str]) -> String {
    let mut text = "plan:\n".to_owned();
    let mut is_wanted = false;
    for line in serde_saphyr::to_string(shown).unwrap().lines() {
        if !line.starts_with([' ', '-']) {
            is_wanted = keys.iter().any(|key| line.starts_with(&format!("{key}:")));
        }
        if is_wanted {
            text += &format!("  {line}\n");
        }
    }
    text
}

fn run(path: &Path, update: bool) -> Result<(), Failed> {
    let scenario = Scenario::read(path)?;
    let (shown, steps) = scenario.outcome()?;
    let wanted = scenario.expected.clone().unwrap_or_default();
    let keys: Vec<&str> = match wanted["plan"].as_object() {
        Some(plan) => plan.keys().map(String::as_str).collect(),
        None if wanted["steps"].is_null() => USUAL.into(),
        None => Vec::new(),
    };
    let mut text = String::new();
    if !keys.is_empty() {
        text += &plan_text(&shown, &keys);
    }
    if !wanted["steps"].is_null() {
        let steps: BTreeMap<&str, _> = [("steps", steps)].into();
        text += &serde_saphyr::to_string(&steps).unwrap();
    }
    let actual: Value = serde_saphyr::from_str(&text).map_err(|error| error.to_string())?;
    if actual == wanted {
        return Ok(());
    }
    if update {
        fs::write(path, format!("{}---\n{text}", scenario.text))?;
        return Ok(());
    }
    Err(format!(
        "{}\nUPDATE=1 writes it",
        difference(&scenario.written, &text)
    )
    .into())
}

/// Lines that are missing and lines that are there instead, as `diff` shows them.
fn difference(expected: &str, actual: &str) -> String {
    let (old, new): (Vec<&str>, Vec<&str>) = (expected.lines().collect(), actual.lines().collect());
    let same_head = old.iter().zip(&new).take_while(|(a, b)| a == b).count();
    let (old_rest, new_rest) = (&old[same_head..], &new[same_head..]);
    let same_tail = old_rest
        .iter()
        .rev()
        .zip(new_rest.iter().rev())
        .take_while(|(a, b)| a == b)
        .count();
    let removed = old_rest[..old_rest.len() - same_tail]
        .iter()
        .map(|line| format!("- {line}"));
    let added = new_rest[..new_rest.len() - same_tail]
        .iter()
        .map(|line| format!("+ {line}"));
    let head = old[..same_head].iter().map(|line| format!("  {line}"));
    let tail = old_rest[old_rest.len() - same_tail..]
        .iter()
        .map(|line| format!("  {line}"));
    head.chain(removed)
        .chain(added)
        .chain(tail)
        .collect::<Vec<_>>()
        .join("\n")
}

fn main() {
    let arguments = Arguments::from_args();
    let update = std::env::var_os("UPDATE").is_some();
    let mut files: Vec<PathBuf> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "yaml")
    });
    files.sort();
    let trials = files.into_iter().map(|path| {
        let name = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Trial::test(name, move || run(&path, update))
    });
    libtest_mimic::run(&arguments, trials.collect()).exit();
}
