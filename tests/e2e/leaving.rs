//! As whom pods are seen outside.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use metaleg_lab::probe::{Protocol, Seen};
use metaleg_lab::{Family, Lab, Outside, SOON, eventually, net};

/// All pairs of a family and one of the others.
pub(crate) fn every<T: Copy>(
    others: impl IntoIterator<Item = T>,
) -> impl Iterator<Item = (Family, T)> {
    others
        .into_iter()
        .flat_map(|other| Family::BOTH.map(|family| (family, other)))
}

pub(crate) fn expect(seen: &Seen, address: IpAddr, what: &str) -> Result<()> {
    ensure!(
        seen.address() == Some(address),
        "{what}: expected {address}, got {seen}"
    );
    Ok(())
}

pub(crate) fn vip_of(vips: &[IpAddr], family: Family) -> Result<IpAddr> {
    let mut vips = vips
        .iter()
        .filter(|vip| vip.is_ipv4() == (family == Family::V4));
    vips.next().copied().context("no VIP of this family")
}

/// The address of a pod's node.
pub(crate) fn node_of(lab: &Lab, pod: &str, family: Family) -> Result<IpAddr> {
    Ok(net::pick(&net::node(lab.pod(pod)?.node), family))
}

/// Every pod, to both outside servers, by both families and all protocols.
pub(crate) fn leave_as(lab: &Lab, pods: &[&str], vips: &[IpAddr]) -> Result<()> {
    leave(lab, pods, |_, family| vip_of(vips, family))
}

/// The same as the pods' nodes.
pub(crate) fn leave_as_nodes(lab: &Lab, pods: &[&str]) -> Result<()> {
    leave(lab, pods, |pod, family| node_of(lab, pod, family))
}

fn leave(lab: &Lab, pods: &[&str], wanted: impl Fn(&str, Family) -> Result<IpAddr>) -> Result<()> {
    for pod in pods {
        for (family, outside) in every(Outside::BOTH) {
            for protocol in Protocol::ALL {
                let seen = lab.source_seen(pod, outside, family, protocol)?;
                let what = format!("{pod} to {outside:?} by {protocol:?}");
                expect(&seen, wanted(pod, family)?, &what)?;
            }
        }
    }
    Ok(())
}

/// As whom pods may be seen, besides nobody, until a change has reached their nodes.
#[derive(Clone, Copy)]
pub(crate) enum Before<'a> {
    /// As nobody else than afterwards.
    Same,
    /// As their nodes.
    Nodes,
    /// As these VIPs.
    Vips(&'a [IpAddr]),
}

/// Waits until a change of the cluster has reached the pods' nodes: they leave as VIPs.
pub(crate) fn settle(lab: &Lab, pods: &[&str], vips: &[IpAddr], before: Before<'_>) -> Result<()> {
    for (family, pod) in every(pods.iter().copied()) {
        settle_one(lab, pod, family, vip_of(vips, family)?, before)?;
    }
    Ok(())
}

/// The same, and they leave as their nodes.
pub(crate) fn settle_as_nodes(lab: &Lab, pods: &[&str], before: Before<'_>) -> Result<()> {
    for (family, pod) in every(pods.iter().copied()) {
        settle_one(lab, pod, family, node_of(lab, pod, family)?, before)?;
    }
    leave_as_nodes(lab, pods)
}

/// The same, to both outside servers and by all protocols.
pub(crate) fn settle_for_good(
    lab: &Lab,
    pods: &[&str],
    vips: &[IpAddr],
    before: Before<'_>,
) -> Result<()> {
    for (family, pod) in every(pods.iter().copied()) {
        let wanted = vip_of(vips, family)?;
        for outside in Outside::BOTH {
            for protocol in Protocol::ALL {
                settle_by(lab, pod, (outside, family, protocol), wanted, before)?;
            }
        }
    }
    Ok(())
}

/// One pod and family.
pub(crate) fn settle_one(
    lab: &Lab,
    pod: &str,
    family: Family,
    wanted: IpAddr,
    before: Before<'_>,
) -> Result<()> {
    let way = (Outside::Lan, family, Protocol::Tcp);
    settle_by(lab, pod, way, wanted, before)
}

fn settle_by(
    lab: &Lab,
    pod: &str,
    (outside, family, protocol): (Outside, Family, Protocol),
    wanted: IpAddr,
    before: Before<'_>,
) -> Result<()> {
    let node = node_of(lab, pod, family)?;
    let mut wrong = None;
    eventually(SOON, &format!("{pod} leaves as {wanted}"), || {
        let seen = lab.source_seen(pod, outside, family, protocol)?;
        Ok(match (seen.address(), before) {
            (Some(address), _) if address == wanted => Some(()),
            (None, _) => None,
            (Some(address), Before::Nodes) if address == node => None,
            (Some(address), Before::Vips(vips)) if vips.contains(&address) => None,
            _ => {
                wrong = Some(seen);
                Some(())
            }
        })
    })?;
    match wrong {
        Some(seen) => bail!("{pod} on its way to leave as {wanted}: {seen}"),
        None => Ok(()),
    }
}

/// Waits until pods are let out by no gateway, and told so: TCP by a reset, UDP and ICMP by an error.
pub(crate) fn blocked(lab: &Lab, pods: &[&str], families: &[Family]) -> Result<()> {
    for (pod, family) in pods
        .iter()
        .flat_map(|pod| families.iter().map(move |family| (*pod, *family)))
    {
        eventually(SOON, &format!("{pod} is reset by {family}"), || {
            let seen = lab.source_seen(pod, Outside::Far, family, Protocol::Tcp)?;
            Ok((seen == Seen::Refused).then_some(()))
        })?;
        for outside in Outside::BOTH {
            for (protocol, told) in [
                (Protocol::Tcp, Seen::Refused),
                (Protocol::Udp, Seen::Unreachable),
                (Protocol::Icmp, Seen::Unreachable),
            ] {
                let seen = lab.source_seen(pod, outside, family, protocol)?;
                ensure!(
                    seen == told,
                    "{pod} to {outside:?} by {protocol:?} and {family}: {seen}, not {told}"
                );
            }
        }
    }
    Ok(())
}

/// Servers that take their time.
pub(crate) struct Late {
    /// How long they take to answer: their clients' VIP moves within that.
    pub(crate) answer: Duration,
    /// How much later the answer may come.
    pub(crate) patience: Duration,
    /// Clients end their half of the connection when they have asked.
    pub(crate) is_half_closed: bool,
}

/// Pods wait for an answer while their VIP moves to the next node: nothing but the agents makes them send.
pub(crate) fn hear_over_a_move(
    lab: &Lab,
    pods: &[&str],
    vips: &[IpAddr],
    late: &Late,
) -> Result<()> {
    let mut streams = Vec::new();
    for (family, pod) in every(pods.iter().copied()) {
        let mut stream = lab.open_stream(pod, Outside::Far, family)?;
        stream.ask_for_later(late.answer)?;
        if late.is_half_closed {
            stream.say_no_more()?;
        }
        streams.push((pod, family, stream));
    }
    let asked = Instant::now();
    let from = lab.wait_for_announcer(vip_of(vips, Family::V4)?, None)?;
    let to = from % lab.node_numbers().count() + 1;
    lab.move_announcement(vips, to)?;
    let after = asked.elapsed();
    ensure!(
        after < late.answer,
        "the announcement moved after {after:?} only"
    );
    for (pod, family, stream) in &mut streams {
        let limit = (late.answer + late.patience).saturating_sub(asked.elapsed());
        let node = lab.pod(pod)?.node;
        let what = || format!("{pod} on node{node}, {family}, node{from} to node{to}");
        let seen = stream
            .hear(limit.max(Duration::from_millis(1)))
            .with_context(what)?;
        let vip = vip_of(vips, *family)?;
        ensure!(seen.address() == Some(vip), "{pod} is seen as {seen}");
    }
    Ok(())
}
