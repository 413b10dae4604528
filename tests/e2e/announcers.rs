//! Who announces: speakers that restart, crash and come back, an API server that is away, a forged claim.
//!
//! A watcher dials from a pod on every node all the time: no connection may ever show another address than the
//! VIP, whatever else it suffers.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use metaleg_lab::probe::Protocol;
use metaleg_lab::{Family, Lab, Outside, SOON, ServiceSpec, eventually};

use crate::Suite;
use crate::rows::{SHOP, every, leave_as, settle, vip_of};

/// Longer than the grace period that the agents of this lab have.
const PAST_GRACE: Duration = Duration::from_secs(5);
/// The agents' grace period: what outlives it is known from the wire.
pub(crate) const GRACE: &str = "3s";

pub(crate) fn run(suite: &mut Suite, lab: &mut Lab) {
    let mut vips = Vec::new();
    suite.row("pods on every node leave as the VIP", || {
        for (number, pod) in (1..).zip(SHOP) {
            lab.create_pod(pod, number, "shop")?;
        }
        vips = lab.create_service(&ServiceSpec::new("shop"))?;
        lab.install_metaleg()?;
        lab.label_service("shop", true)?;
        settle(lab, &SHOP, &vips)
    });
    suite.row(
        "the announcer's speaker restarts: nothing is lost after the grace period",
        || {
            let from = lab.wait_for_announcer(vips[0], None)?;
            let speaker = format!("speaker-node{from}");
            watched(lab, &vips, |lab| {
                lab.kill(&speaker)?;
                lab.restart(&speaker)?;
                pass_grace(lab, &vips)
            })
        },
    );
    suite.row(
        "the announcer's speaker crashes: another node takes over",
        || {
            let from = lab.wait_for_announcer(vips[0], None)?;
            let speaker = format!("speaker-node{from}");
            watched(lab, &vips, |lab| {
                lab.kill(&speaker)?;
                taken_over(lab, vips[0], from)?;
                pass_grace(lab, &vips)
            })?;
            watched(lab, &vips, |lab| {
                lab.restart(&speaker)?;
                pass_grace(lab, &vips)
            })
        },
    );
    suite.row(
        "the API server is away while the VIP moves: the wire is enough",
        || {
            let from = lab.wait_for_announcer(vips[0], None)?;
            let speaker = format!("speaker-node{from}");
            watched(lab, &vips, |lab| {
                lab.kill("kube-apiserver")?;
                lab.kill(&speaker)?;
                taken_over(lab, vips[0], from)?;
                settle(lab, &SHOP, &vips)?;
                leave_as(lab, &SHOP, &vips)
            })?;
            watched(lab, &vips, |lab| {
                lab.restart("kube-apiserver")?;
                lab.restart(&speaker)?;
                lab.wait_for_agents()?;
                pass_grace(lab, &vips)
            })
        },
    );
    suite.row(
        "two speakers may announce at once: pods go on with one of them",
        || {
            watched(lab, &vips, |lab| {
                for number in lab.node_numbers() {
                    lab.allow_announcing(number, true)?;
                }
                for (_, number) in
                    (0..3).flat_map(|turn| lab.node_numbers().map(move |n| (turn, n)))
                {
                    lab.allow_announcing(number, false)?;
                    lab.allow_announcing(number, true)?;
                }
                pass_grace(lab, &vips)
            })
        },
    );
    suite.row("a stranger's claim moves nothing, and is told", || {
        let vip = vip_of(&vips, Family::V4)?;
        watched(lab, &vips, |lab| {
            lab.forge_claim(vip)?;
            pass_grace(lab, &vips)
        })?;
        for number in lab.node_numbers() {
            eventually(SOON, "the claim is told", || {
                let log = lab.agent_log(number);
                Ok(log.contains("which is no node's, claims VIP").then_some(()))
            })?;
        }
        Ok(())
    });
}

/// Waits until another node announces a VIP: speakers notice that one is gone after some seconds.
fn taken_over(lab: &Lab, vip: IpAddr, from: usize) -> Result<()> {
    let announcer = || Ok(lab.announcer(vip)?.filter(|now| *now != from));
    eventually(Duration::from_secs(30), "another node announces", announcer).map(drop)
}

/// Between two rounds of connections: a pod of the lab has 1,000 source ports, which are used again after a minute.
const PACE: Duration = Duration::from_millis(100);

/// Lets the grace period pass, and sees that pods leave as ever.
fn pass_grace(lab: &Lab, vips: &[IpAddr]) -> Result<()> {
    std::thread::sleep(PAST_GRACE);
    settle(lab, &SHOP, vips)?;
    leave_as(lab, &SHOP, vips)
}

/// Does something to the lab while pods on every node dial all the time.
fn watched(
    lab: &mut Lab,
    vips: &[IpAddr],
    event: impl FnOnce(&mut Lab) -> Result<()>,
) -> Result<()> {
    let dialers = lab.dialers(&SHOP)?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| -> Result<()> {
            let mut seen_vip = 0_usize;
            while !done.load(Ordering::Relaxed) {
                std::thread::sleep(PACE);
                for (family, dialer) in every(dialers.iter()) {
                    let vip = vip_of(vips, family)?;
                    let seen = dialer.ask(Outside::Far, family, Protocol::Tcp)?;
                    match seen.address() {
                        Some(address) if address == vip => seen_vip += 1,
                        None => {}
                        Some(address) => bail!("{} was seen as {address}", dialer.pod()),
                    }
                }
            }
            ensure!(seen_vip > 0, "no connection came through");
            Ok(())
        });
        let result = event(lab);
        done.store(true, Ordering::Relaxed);
        let watched = watcher.join().ok().context("the watcher panicked")?;
        result.and(watched)
    })
}
