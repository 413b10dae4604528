//! What of a node itself is in the way of its pods: found, told where people look, and gone when it is mended.

use anyhow::{Context, Result, ensure};
use metaleg_lab::probe::{Protocol, http_get};
use metaleg_lab::{Family, KubeProxy, Lab, Masquerade, Outside, SOON, eventually};

use crate::leaving::{Before, every, leave_as, leave_as_nodes, settle};
use crate::runner::{Check, Group, Row};
use crate::stage::{SHOP, Stage};

const NODES: usize = 3;
/// Pods of no egress Service, one on every node.
const PLAIN: [&str; NODES] = ["plain-1", "plain-2", "plain-3"];
/// Obstacles that the kernel does not notify of are to be found while the rows wait.
const INTERVAL: &str = "2s";
const TOOLS: [&str; 2] = ["iptables", "ip6tables"];

const ROWS: [(&str, Check); 3] = [
    ("a_forward_policy_of_drop", forward_drop),
    ("a_rule_of_others_ahead", rule_ahead),
    ("settings_of_the_kernel", settings),
];

pub(crate) fn groups() -> [Group; 2] {
    ["nftables", "iptables"].map(|backend| {
        let name = format!("obstacles::{backend}");
        let settings = [
            ("FIREWALL_BACKEND", backend),
            ("RECONCILIATION_INTERVAL", INTERVAL),
            ("FORWARD_ACCEPT", "false"),
        ];
        Group {
            options: Some(crate::lab(
                NODES,
                KubeProxy::Nftables,
                Masquerade::IptablesNft,
                &settings,
            )),
            alone: false,
            rows: ROWS.map(|(row, check)| Row::new(&name, row, check)).into(),
            name,
        }
    })
}

/// Whether each of the places where people look has it: the plan of a node and its metrics.
fn is_told(lab: &Lab, node: usize, kind: &str, family: Family) -> Result<bool> {
    let plan = lab.agent_command(node, "plan")?;
    let mut lines = plan.lines().map(|line| line.split_whitespace());
    let row = ["default/shop", &family.to_string(), kind].map(str::to_owned);
    let is_planned = lines.any(|words| words.take(row.len()).eq(row.iter().map(String::as_str)));
    let metrics = http_get(lab.node(node), 21793, "/metrics")?;
    let gauge = format!("metaleg_obstacles{{family=\"{family}\",kind=\"{kind}\"}} 1");
    let is_counted = metrics.lines().any(|line| line == gauge);
    ensure!(
        is_planned == is_counted,
        "the plan of node{node} and its metrics differ about {kind}:\n{plan}\n{metrics}"
    );
    Ok(is_planned)
}

/// Waits until some nodes tell of an obstacle, and no others.
fn told_by(lab: &Lab, kind: &str, families: &[Family], nodes: &[usize]) -> Result<()> {
    for number in lab.node_numbers() {
        for family in Family::BOTH {
            let expected = nodes.contains(&number) && families.contains(&family);
            let what = match expected {
                true => format!("node{number} tells of {kind} by {family}"),
                false => format!("node{number} does not tell of {kind} by {family}"),
            };
            eventually(SOON, &what, || {
                Ok((is_told(lab, number, kind, family)? == expected).then_some(()))
            })?;
        }
    }
    let published = nodes.iter().map(|number| format!("on node{number}: "));
    for word in published.chain((!nodes.is_empty()).then(|| kind.to_owned())) {
        eventually(SOON, &format!("an Event tells {word}"), || {
            let events = lab.kubectl(&["describe", "service", "shop"])?;
            Ok(events.contains(&word).then_some(()))
        })?;
    }
    Ok(())
}

/// What the log of a node says once of each family, however often the node is looked at.
fn logged_once(lab: &Lab, node: usize, level: &str, text: &str) -> Result<()> {
    let log = lab.agent_log(node);
    let lines = log.lines();
    let count = lines
        .filter(|line| line.contains(level) && line.contains(text))
        .count();
    ensure!(count == 2, "node{node} logs {text:?} {count} times");
    Ok(())
}

/// Ordinary pods of the node pass, as CNI plugins see to. What only passes through does not.
fn forward_drop(stage: &mut Stage) -> Result<()> {
    stage.pods(&PLAIN, "back")?;
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
    let vips = vips.clone();
    let gateway = lab.wait_for_announcer(vips[0], None)?;
    let both = Family::BOTH;
    told_by(lab, "ForwardDrop", &both, &[])?;
    let on_all = |script: &str| -> Result<()> {
        let nodes = lab.node_numbers();
        TOOLS
            .into_iter()
            .flat_map(|tool| nodes.clone().map(move |number| (number, tool)))
            .try_for_each(|(number, tool)| {
                let script = script.replace("TOOL", tool);
                lab.node(number).sh(&script).map(drop)
            })
    };
    on_all(
        "TOOL -A FORWARD -i pod+ -j ACCEPT; TOOL -A FORWARD -o pod+ -j ACCEPT; TOOL -P FORWARD DROP",
    )?;
    leave_as_nodes(lab, &PLAIN)?;
    told_by(lab, "ForwardDrop", &both, &[gateway])?;
    logged_once(
        lab,
        gateway,
        " WARN ",
        "drops forwarded packets by its policy",
    )?;
    for (family, number) in every(lab.node_numbers()) {
        let seen = lab.source_seen(SHOP[number - 1], Outside::Far, family, Protocol::Tcp)?;
        let is_out = seen.address().is_some();
        ensure!(
            is_out == (number == gateway),
            "{}: {seen}",
            SHOP[number - 1]
        );
    }

    lab.configure_agents(&[("FORWARD_ACCEPT", "true")])?;
    settle(lab, &SHOP[..NODES], &vips, Before::Same)?;
    leave_as(lab, &SHOP[..NODES], &vips)?;
    leave_as_nodes(lab, &PLAIN)?;
    told_by(lab, "ForwardDrop", &both, &[])?;
    logged_once(
        lab,
        gateway,
        " INFO ",
        "not in the way any more: chain FORWARD of iptables",
    )?;
    let has_rules = |number| -> Result<bool> {
        let rules = TOOLS
            .map(|tool| format!("{tool}-save -t filter"))
            .join("; ");
        Ok(lab.node(number).sh(&rules)?.contains("METALEG-ACCEPT"))
    };
    for number in lab.node_numbers() {
        ensure!(has_rules(number)?, "node{number} accepts nothing");
    }
    // As an administrator does who cleans up.
    lab.node(gateway).sh(&TOOLS
        .map(|tool| format!("{tool} -F METALEG-ACCEPT"))
        .join("; "))?;
    settle(lab, &SHOP[..NODES], &vips, Before::Same)?;

    lab.label_service("shop", false)?;
    for number in lab.node_numbers() {
        eventually(SOON, "nothing is accepted any more", || {
            Ok((!has_rules(number)?).then_some(()))
        })?;
    }
    lab.label_service("shop", true)?;
    settle(lab, &SHOP[..NODES], &vips, Before::Nodes)?;
    on_all(
        "TOOL -P FORWARD ACCEPT; TOOL -D FORWARD -i pod+ -j ACCEPT; TOOL -D FORWARD -o pod+ -j ACCEPT",
    )?;
    lab.configure_agents(&[("FORWARD_ACCEPT", "false")])?;
    leave_as(lab, &SHOP[..NODES], &vips)
}

/// The rule is on a node that has a pod, and is not its gateway.
fn rule_ahead(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
    let gateway = lab.wait_for_announcer(vips[0], None)?;
    let mut others = lab.node_numbers().filter(|number| *number != gateway);
    let node = others.next().context("one node only")?;
    let add = "rule add pref 105 lookup main suppress_prefixlength 0";
    for (family, ip) in [(Family::V4, "ip -4"), (Family::V6, "ip -6")] {
        lab.node(node).sh(&format!("{ip} {add}"))?;
        told_by(lab, "RuleAhead", &[family], &[node])?;
        lab.node(node).sh(&format!("{ip} rule del pref 105"))?;
        told_by(lab, "RuleAhead", &[], &[])?;
    }
    settle(lab, &SHOP[..NODES], vips, Before::Same)?;
    logged_once(
        lab,
        node,
        " WARN ",
        "the routing rule `pref 105 lookup 254 suppress_prefixlength 0`",
    )
}

fn settings(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
    let nodes: Vec<usize> = lab.node_numbers().collect();
    let gateway = lab.wait_for_announcer(vips[0], None)?;
    let set = |name: &str, value: u8, on: &[usize]| -> Result<()> {
        on.iter().try_for_each(|number| {
            lab.node(*number)
                .sh(&format!("echo {value} > /proc/sys/net/{name}"))
                .map(drop)
        })
    };
    let both = Family::BOTH;
    for (kind, name, families, on) in [
        (
            "StrictTracking",
            "netfilter/nf_conntrack_tcp_loose",
            &both[..],
            &nodes[..],
        ),
        (
            "ForwardingOff",
            "ipv4/ip_forward",
            &[Family::V4],
            &[gateway],
        ),
    ] {
        told_by(lab, kind, families, &[])?;
        set(name, 0, on)?;
        told_by(lab, kind, families, on)?;
        set(name, 1, on)?;
        told_by(lab, kind, families, &[])?;
    }
    settle(lab, &SHOP[..NODES], vips, Before::Same)?;
    leave_as(lab, &SHOP[..NODES], vips)
}
