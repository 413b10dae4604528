//! Changes after which no connection can go on.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use metaleg_lab::Lab;
use metaleg_lab::traffic::Kind;
use serde_json::json;

use super::{AFTERMATH, Allowed, SHOP, Table, Watch};
use crate::leaving::{Before, settle, settle_as_nodes};
use crate::runner::{Check, Row};
use crate::stage::Stage;

/// How long a connection that cannot go on may take to end.
const END_GOAL: Duration = Duration::from_secs(1);
/// Where `VIP changed` leads.
const OTHER_VIPS: [&str; 2] = ["192.0.2.230", "2001:db8:1::230"];

pub(super) fn rows(backend: &str) -> Vec<Row> {
    let module = format!("continuity::endings::{backend}");
    let rows: [(&str, Check); 4] = [
        ("label_removed", |stage| {
            let (pods, gateway) = stage.elsewhere()?;
            let Stage {
                lab, vips, table, ..
            } = stage;
            let change = |lab: &mut Lab| lab.label_service("shop", false);
            let allowed = Allowed::vips(vips).and_nodes(others(lab, gateway));
            ending(lab, "label removed", &pods, gateway, allowed, change, table)?;
            settle_as_nodes(lab, &SHOP, Before::Same)
        }),
        ("label_set", |stage| {
            let (pods, gateway) = stage.elsewhere()?;
            let Stage {
                lab, vips, table, ..
            } = stage;
            lab.label_service("shop", false)?;
            settle_as_nodes(lab, &SHOP, Before::Vips(vips))?;
            let change = |lab: &mut Lab| lab.label_service("shop", true);
            let allowed = Allowed::vips(vips)
                .and_nodes(others(lab, gateway))
                .with_limits_of(lab);
            ending(lab, "label set", &pods, gateway, allowed, change, table)?;
            settle(lab, &SHOP, vips, Before::Same)
        }),
        ("vip_changed", |stage| {
            let (pods, gateway) = stage.elsewhere()?;
            let Stage {
                lab, vips, table, ..
            } = stage;
            let other: Vec<IpAddr> = OTHER_VIPS
                .iter()
                .map(|vip| vip.parse())
                .collect::<Result<_, _>>()?;
            let annotations = json!({"metallb.io/loadBalancerIPs": OTHER_VIPS.join(",")});
            let change = |lab: &mut Lab| {
                lab.patch_service("shop", &json!({"metadata": {"annotations": annotations}}))
            };
            let allowed = Allowed::vips(&[vips.as_slice(), &other].concat());
            ending(lab, "VIP changed", &pods, gateway, allowed, change, table)?;
            settle(lab, &SHOP, &other, Before::Same)
        }),
        ("service_deleted", |stage| {
            let (pods, gateway) = stage.elsewhere()?;
            let Stage {
                lab, vips, table, ..
            } = stage;
            let change = |lab: &mut Lab| lab.delete_service("shop");
            let allowed = Allowed::vips(vips).and_nodes(others(lab, gateway));
            ending(
                lab,
                "Service deleted",
                &pods,
                gateway,
                allowed,
                change,
                table,
            )?;
            settle_as_nodes(lab, &SHOP, Before::Same)
        }),
    ];
    rows.into_iter()
        .map(|(row, check)| {
            // The pod's node may have taken its guard away while the gateway still hands over answers: see Known limits of
            // the data path.
            let removes_all = ["label_removed", "service_deleted"].contains(&row);
            let is_known_to_leak = backend == "iptables" && removes_all;
            Row::new(&module, row, check).ignored_unless(!is_known_to_leak)
        })
        .collect()
}

impl Stage {
    /// The pods on other nodes than the gateway, which stays the only announcer: then the gateway's own address is
    /// nobody's who may leave as it.
    fn elsewhere(&mut self) -> Result<(Vec<&'static str>, usize)> {
        self.shop()?;
        let gateway = self.lab.wait_for_announcer(self.vips[0], None)?;
        self.lab.move_announcement(&self.vips, gateway)?;
        let mut pods = SHOP.to_vec();
        pods.remove(gateway - 1);
        Ok((pods, gateway))
    }
}

fn others(lab: &Lab, gateway: usize) -> impl Iterator<Item = usize> {
    lab.node_numbers().filter(move |node| *node != gateway)
}

/// Each connection ends soon, nothing but the addresses from before and after leaves, and datagrams and new connections
/// go on with the new one.
fn ending(
    lab: &mut Lab,
    name: &'static str,
    pods: &[&str],
    gateway: usize,
    allowed: Allowed,
    change: impl FnOnce(&mut Lab) -> Result<()>,
    table: &mut Table,
) -> Result<()> {
    let mut watch = Watch::start(lab, pods, allowed, table)?;
    let mut changed = Instant::now();
    let seen = watch
        .during(lab, name, |lab| {
            change(lab)?;
            changed = Instant::now();
            Ok(Some((gateway, gateway)))
        })
        .context(name);
    let mut numbers = lab.node_numbers();
    numbers.try_for_each(|number| lab.allow_announcing(number, true))?;
    let seen = seen?;
    for flow in &seen.suffered {
        let what = || format!("{name}: {:?} {} of {}", flow.kind, flow.family, flow.pod);
        match (flow.kind, &flow.broken) {
            (Kind::Stream, None) => bail!("{} goes on or hangs", what()),
            (Kind::Stream, Some(why)) => {
                let after = flow.last.saturating_duration_since(changed);
                ensure!(after < END_GOAL, "{} ended after {after:?}: {why}", what());
                ensure!(why.contains("reset"), "{} ended with {why}", what());
            }
            (_, Some(why)) => bail!("{}: {why}", what()),
            (_, None) => ensure!(flow.last.elapsed() < AFTERMATH, "{} is silent", what()),
        }
    }
    Ok(())
}
