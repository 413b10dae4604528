//! What else lives on a node, and what MetalEG leaves to it.

use std::time::Duration;

use anyhow::{Result, ensure};
use metaleg_lab::{Family, KubeProxy, Lab, Masquerade, Outside, SOON, ServiceSpec, eventually};

use crate::leaving::{Before, Late, hear_over_a_move, settle_as_nodes, settle_for_good};
use crate::names;
use crate::runner::{Check, Group, Row};
use crate::stage::Stage;

/// A pod of the egress Service on every node: when the VIP moves, on the old gateway, on the new one, and elsewhere.
const SHOP: [&str; 3] = ["shop-1", "shop-2", "shop-3"];
/// How long servers take to answer while their clients' VIP moves.
const LATE: Duration = Duration::from_secs(6);
/// How long the rules of others stay: pods send all the time.
const AHEAD: Duration = Duration::from_secs(2);
/// How long guards wait for late replies after the last Service.
const LINGERING: Duration = Duration::from_secs(60);
/// How much later an answer may come: packets that are lost are sent again after 0.2 s, 0.6 s and 1.4 s.
const PATIENCE: Duration = Duration::from_secs(2);

/// Both backends, the second with the other mode of iptables.
pub(crate) fn groups() -> Vec<Group> {
    let labs = [
        ("nftables", Masquerade::IptablesNft),
        ("iptables", Masquerade::IptablesLegacy),
    ];
    let group = |(backend, masquerade)| {
        let name = format!("others::{backend}");
        let row = |(row, check): (&str, Check)| Row::new(&name, row, check);
        Group {
            rows: ROWS.into_iter().map(row).collect(),
            options: Some(crate::lab(
                3,
                KubeProxy::Iptables,
                masquerade,
                &[("FIREWALL_BACKEND", backend)],
            )),
            alone: false,
            name,
        }
    };
    labs.into_iter().map(group).collect()
}

const ROWS: [(&str, Check); 4] = [
    ("nothing_is_there_without_a_label", without_a_label),
    ("nothing_is_left_of_a_label_that_went", label_that_went),
    ("rules_of_others_ahead_let_nothing_out", rules_ahead),
    ("half_closed_clients_hear_late_answers", half_closed),
];

/// Everything of ours in a node's kernel.
fn of_ours(lab: &Lab, number: usize) -> Result<String> {
    lab.node(number).sh(&format!(
        "for f in -4 -6; do
           ip $f rule | grep '{protocol}' || true
           ip $f route show table all {protocol}
         done
         nft list ruleset 2>/dev/null | grep -i metaleg || true
         ipset list -n 2>/dev/null | grep {chains} || true
         for t in iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do
           $t-save 2>/dev/null | grep {chains} || true
         done",
        protocol = names::PROTOCOL,
        chains = names::CHAINS,
    ))
}

/// Agents run, and their nodes' kernels are as without them.
fn nothing_of_ours(lab: &Lab) -> Result<()> {
    for number in lab.node_numbers() {
        let found = of_ours(lab, number)?;
        ensure!(found.is_empty(), "on node{number}: {found}");
    }
    Ok(())
}

fn without_a_label(stage: &mut Stage) -> Result<()> {
    stage.pods(&SHOP, "shop")?;
    stage.installed()?;
    stage.service(&ServiceSpec::new("shop"))?;
    settle_as_nodes(&stage.lab, &SHOP, Before::Same)?;
    nothing_of_ours(&stage.lab)
}

fn label_that_went(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
    for number in lab.node_numbers() {
        ensure!(!of_ours(lab, number)?.is_empty(), "nothing on node{number}");
    }
    lab.label_service("shop", false)?;
    settle_as_nodes(lab, &SHOP, Before::Vips(vips))?;
    eventually(LINGERING + SOON, "nothing of ours is there", || {
        nothing_of_ours(lab).map(Some)
    })
}

/// IPsec has a table of its own, which knows the way to the server, on every node.
fn rules_ahead(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
    let gateway = lab.wait_for_announcer(vips[0], None)?;
    let traffic = lab.traffic(&SHOP)?;
    traffic.wait_for_signs_of_life()?;
    let capture = lab.capture()?;
    for number in lab.node_numbers() {
        for (option, family) in [("-4", Family::V4), ("-6", Family::V6)] {
            let server = Outside::Far.address(family);
            lab.node(number).sh(&format!(
                "way=$(ip {option} route show default table main | head -1 | sed 's/^default//')
                 ip {option} route add {server} $way table 220; ip {option} rule add pref 220 lookup 220"
            ))?;
        }
    }
    std::thread::sleep(AHEAD);
    let left = capture.take()?;
    for number in lab.node_numbers() {
        lab.node(number)
            .sh("for f in -4 -6; do ip $f rule del pref 220; ip $f route flush table 220; done")?;
    }
    // Of IPv6 iptables does not see where packets go.
    let is_nftables = lab.node(1).sh("nft list tables")?.contains(names::TABLE);
    left.only(|node, source| {
        node == gateway && vips.contains(&source) || source.is_ipv6() && !is_nftables
    })?;
    drop(traffic);
    settle_for_good(lab, &SHOP, vips, Before::Same)
}

/// Clients have said all that they have to say, and wait for the answer while their VIP moves.
fn half_closed(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let late = Late {
        answer: LATE,
        patience: PATIENCE,
        is_half_closed: true,
    };
    hear_over_a_move(&stage.lab, &SHOP, &stage.vips, &late)
}
