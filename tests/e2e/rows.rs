//! What every lab must show.

use std::net::IpAddr;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use metaleg_lab::probe::{PORT, Protocol, Seen, http_get};
use metaleg_lab::{Family, Lab, Outside, SOON, ServiceSpec, eventually, net};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::{CALM, Suite};

const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];
/// A pod of the egress Service on every node.
pub(crate) const SHOP: [&str; 3] = ["shop-1", "shop-2", "shop-3"];
/// Pods of no egress Service, one on every node.
pub(crate) const PLAIN: [&str; 3] = ["plain-1", "plain-2", "plain-3"];
/// How long established connections may be silent at a move: lost packets are sent again after 0.2 s, 0.6 s,
/// 1.4 s and 3 s.
const STREAM_PATIENCE: Duration = Duration::from_secs(8);

pub(crate) fn run(suite: &mut Suite, lab: &mut Lab) {
    let mut vips = Vec::new();
    suite.row(
        "before: pods, Services and VIPs are there, and pods leave as their nodes",
        || {
            vips = prepare(lab)?;
            leave_as_nodes(lab, &SHOP)?;
            leave_as_nodes(lab, &PLAIN)
        },
    );
    let before = match Inside::look(lab, &vips) {
        Ok(before) => before,
        Err(error) => {
            return suite.row("what happens inside the cluster can be seen", || Err(error));
        }
    };
    suite.row(
        "MetalEG is installed with kubectl apply -k, and every agent is ready",
        || lab.install_metaleg(),
    );
    suite.row("as long as no Service is labelled nothing changes", || {
        leave_as_nodes(lab, &SHOP)?;
        before.is_as_now(lab, &vips)
    });
    suite.row(
        "labelled while the agents run: every pod leaves as the VIP",
        || {
            lab.label_service("shop", true)?;
            lab.label_service("local", true)?;
            settle(lab, &SHOP, &vips)?;
            leave_as(lab, &SHOP, &vips)
        },
    );
    suite.row(
        "the agents are ready, alive, and count what they do",
        || {
            for number in lab.node_numbers() {
                for path in ["/readyz", "/healthz"] {
                    let answer = http_get(lab.node(number), 21794, path)?;
                    ensure!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
                }
                let metrics = http_get(lab.node(number), 21793, "/metrics")?;
                for line in [
                    "metaleg_ready 1",
                    "metaleg_services{family=\"IPv4\",verdict=\"Active\"} 2",
                    "metaleg_watch_synced{watch=\"ServiceL2Statuses\"} 1",
                ] {
                    ensure!(
                        metrics.lines().any(|found| found == line),
                        "no {line} in {metrics}"
                    );
                }
                ensure!(
                    metrics.contains("metaleg_steps_total{executor=\"firewall\"}"),
                    "no count of steps in {metrics}"
                );
            }
            Ok(())
        },
    );
    suite.row(
        "the plan is told, for people and programs, and changes nothing",
        || plan_is_told(lab, &vips),
    );
    suite.row("unlabelled pods and host processes leave as before", || {
        leave_as_nodes(lab, &PLAIN)?;
        for number in lab.node_numbers() {
            for (family, outside) in every(Outside::BOTH) {
                let seen = lab.ask_from_node(number, outside.address(family), Protocol::Tcp)?;
                expect(
                    &seen,
                    net::pick(&net::node(number), family),
                    &format!("node{number} to {outside:?}"),
                )?;
            }
        }
        Ok(())
    });
    suite.row(
        "inside the cluster nothing changes: pods, ClusterIPs, nodes, own VIP",
        || before.is_as_now(lab, &vips),
    );
    suite.row(
        "downloads fit through a way to the pod that is narrower than the LAN",
        || narrow_way(lab, &vips),
    );
    suite.row("inbound to the VIP works", || inbound_to_vip(lab, &vips));
    suite.row(
        "inbound to a VIP and a NodePort of policy Local keeps the client's address",
        || inbound_local(lab),
    );
    suite.row("inbound to a pod's address works", || inbound_to_pods(lab));
    suite.row(
        "a pod that is added leaves as the VIP, and its successor with the same labels, too",
        || {
            lab.create_pod("shop-new", 3, "shop")?;
            settle(lab, &["shop-new"], &vips)?;
            leave_as(lab, &["shop-new"], &vips)?;
            delete_and_wait(lab, "shop-new")?;
            lab.create_pod("shop-next", 1, "shop")?;
            settle(lab, &["shop-next"], &vips)?;
            delete_and_wait(lab, "shop-next")
        },
    );
    for (signal, name) in [(Signal::SIGTERM, "stopped"), (Signal::SIGKILL, "killed")] {
        suite.row(
            &format!("agents that are {name} and started again change nothing"),
            || restart(lab, signal, &vips),
        );
    }
    suite.row(
        "what others delete is back within a second, and nothing leaks meanwhile",
        || damage(lab, &vips),
    );
    suite.row(
        "the announcement moves: connections go on, new ones show the same address",
        || {
            for _ in 0..2 {
                move_announcement(lab, &vips)?;
            }
            Ok(())
        },
    );
    suite.row("a labelled Service without a VIP lets nothing out", || {
        without_vip(lab)
    });
    suite.row(
        "the label removed: pods leave as their nodes, old connections end at once",
        || unlabel(lab, &vips),
    );
    suite.row(
        "labelled again, then deleted: pods leave as their nodes",
        || {
            lab.label_service("shop", true)?;
            settle(lab, &SHOP, &vips)?;
            lab.delete_service("shop")?;
            settle_as_nodes(lab, &SHOP)?;
            lab.delete_service("local")?;
            for number in lab.node_numbers() {
                eventually(SOON, "sets of pods and VIPs are empty", || {
                    let sets = lab.node(number).sh(
                        "ipset save | grep -v -e '^create METALEG-.*-[46] ' -e EXCLUDED -e REMOTE -e LATE || true
                         for s in pods vips blocked gatewayed slot vip; do for n in 4 6; do
                           for kind in set map; do
                             nft list $kind inet metaleg $s$n 2>/dev/null | sed -n \"s/elements/$s$n: &/p\"
                           done
                         done; done",
                    )?;
                    ensure!(sets.is_empty(), "on node{number}: {sets}");
                    Ok(Some(()))
                })?;
            }
            Ok(())
        },
    );
    suite.row(
        "another backend takes over, and back: connections go on, nothing leaks, nothing is left",
        || {
            lab.create_service(&ServiceSpec::new("shop"))?;
            vips = lab.wait_for_vips("shop")?;
            lab.label_service("shop", true)?;
            settle(lab, &SHOP, &vips)?;
            let (now, other) = match lab.node(1).sh("nft list tables")?.contains("inet metaleg") {
                true => ("nftables", "iptables"),
                false => ("iptables", "nftables"),
            };
            switch_backend(lab, other, &vips)?;
            switch_backend(lab, now, &vips)
        },
    );
    suite.row("no agent complained", || {
        for number in lab.node_numbers() {
            let log = lab.agent_log(number);
            // The hostNetwork pod is ignored, and a masquerade in a table of its own is a rival of iptables.
            let expected = |line: &str| {
                line.contains("ignoring endpoint") && line.contains("hostNetwork")
                    || line.contains("FIREWALL_BACKEND=nftables would be ahead of it")
            };
            let complaint = log
                .lines()
                .find(|line| (line.contains("WARN") || line.contains("ERROR")) && !expected(line));
            ensure!(
                complaint.is_none(),
                "node{number}: {}",
                complaint.unwrap_or_default()
            );
        }
        Ok(())
    });
    suite.row(
        "uninstalled, pods leave as before; cleaned up, nothing is left",
        || clean_up(lab, &vips),
    );
}

fn plan_is_told(lab: &Lab, vips: &[IpAddr]) -> Result<()> {
    let before = programmed(lab)?;
    let gateway = lab.wait_for_announcer(vips[0], None)?;
    for number in lab.node_numbers() {
        let table = lab.agent_command(number, "plan")?;
        let vip = vip_of(vips, Family::V4)?;
        let verdict = format!("Active: {vip} through node{gateway}");
        ensure!(table.contains(&verdict), "no {verdict:?} in\n{table}");
        ensure!(
            table.contains("a hostNetwork pod leaves as its node"),
            "{table}"
        );
        let json: serde_json::Value =
            serde_json::from_str(&lab.agent_command(number, "plan -o json")?)?;
        let address = lab.pod(SHOP[number - 1])?.address(Family::V4).to_string();
        let pods = json["pods"].as_array().context("no pods")?;
        let pod = pods.iter().find(|pod| pod["address"] == address.as_str());
        let here = pod.and_then(|pod| pod["here"].as_str()).unwrap_or_default();
        let expected = match number == gateway {
            true => format!("translated to {vip}: this node is the gateway"),
            false => format!("routed to {} dev eth0", net::node(gateway)[0]),
        };
        ensure!(
            here.starts_with(&expected),
            "{address} on node{number}: {here:?}, not {expected:?}"
        );
        let yaml = lab.agent_command(number, "plan -o yaml")?;
        ensure!(yaml.contains("verdict: Active"), "{yaml}");
    }
    ensure!(before == programmed(lab)?, "the kernel was changed");
    Ok(())
}

fn switch_backend(lab: &Lab, to: &str, vips: &[IpAddr]) -> Result<()> {
    let mut streams = Vec::new();
    for (family, pod) in every(SHOP) {
        streams.push((pod, lab.open_stream(pod, Outside::Far, family)?));
    }
    let done = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| -> Result<usize> {
            let mut count = 0;
            while !done.load(Ordering::Relaxed) {
                for (family, pod) in every(SHOP) {
                    let seen = lab.source_seen(pod, Outside::Lan, family, Protocol::Tcp)?;
                    expect(
                        &seen,
                        vip_of(vips, family)?,
                        &format!("{pod} while {to} takes over"),
                    )?;
                    count += 1;
                }
            }
            Ok(count)
        });
        let result = lab.configure_agents(&[("FIREWALL_BACKEND", to)]);
        done.store(true, Ordering::Relaxed);
        let seen = watcher
            .join()
            .map_err(|_| anyhow::anyhow!("the watcher panicked"))?;
        result.and(seen)
    })?;
    ensure!(seen > 0, "nothing was tried meanwhile");
    for (pod, stream) in &mut streams {
        let answer = stream.ask(Duration::from_secs(2));
        answer.with_context(|| format!("a connection of {pod} broke"))?;
    }
    let text = programmed(lab)?;
    let (has_table, has_chains) = (
        text.contains("table inet metaleg"),
        text.contains("METALEG-"),
    );
    ensure!(
        (has_table, has_chains) == (to == "nftables", to == "iptables"),
        "left behind: {text}"
    );
    leave_as(lab, &SHOP, vips)
}

fn clean_up(lab: &mut Lab, vips: &[IpAddr]) -> Result<()> {
    leave_as(lab, &SHOP, vips)?;
    lab.uninstall_metaleg()?;
    // What a stopped agent has programmed goes on.
    leave_as(lab, &SHOP, vips)?;
    for number in lab.node_numbers() {
        for again in [false, true] {
            let told = lab.agent_command(number, "cleanup")?;
            ensure!(
                told.ends_with("nothing of MetalEG is left on this node\n"),
                "{told}"
            );
            ensure!(again != told.contains("done: "), "{told}");
        }
    }
    ensure!(
        programmed(lab)?.is_empty(),
        "left behind: {}",
        programmed(lab)?
    );
    leave_as_nodes(lab, &SHOP)
}

/// Pods on every node, an egress Service to be, one with policy Local, and one that is only inside.
fn prepare(lab: &mut Lab) -> Result<Vec<IpAddr>> {
    for (number, (shop, plain)) in (1..).zip(SHOP.into_iter().zip(PLAIN)) {
        lab.create_pod(shop, number, "shop")?;
        lab.create_pod(plain, number, "back")?;
    }
    lab.create_pod("local-1", 1, "local")?;
    lab.create_pod("local-2", 2, "local")?;
    lab.create_host_network_pod("shop-host", 1, "shop")?;
    lab.create_service(&ServiceSpec::new("back"))?;
    lab.create_service(&ServiceSpec::new("local").traffic_policy("Local"))?;
    let vips = lab.create_service(&ServiceSpec::new("shop"))?;
    for vip in &vips {
        lab.wait_for_announcer(*vip, None)?;
    }
    // kube-proxy programs the nodes by itself, in its own time.
    for (pod, family) in every(SHOP).map(|(family, pod)| (pod, family)) {
        for address in [lab.cluster_ip("back", family)?, vip_of(&vips, family)?] {
            eventually(SOON, &format!("kube-proxy knows {address}"), || {
                let seen = lab.ask_from_pod(pod, address, PORT, Protocol::Tcp)?;
                Ok(seen.address().map(drop))
            })?;
        }
    }
    let port = lab.node_port("local")?;
    for (family, number) in every([1, 2]) {
        let node = net::pick(&net::node(number), family);
        eventually(SOON, &format!("kube-proxy knows {node}:{port}"), || {
            let seen = lab.ask_from_outside(Outside::Lan, node, port, Protocol::Tcp)?;
            Ok(seen.address().map(drop))
        })?;
    }
    Ok(vips)
}

/// All pairs of a family and one of the others.
pub(crate) fn every<T: Copy>(
    others: impl IntoIterator<Item = T>,
) -> impl Iterator<Item = (Family, T)> {
    others
        .into_iter()
        .flat_map(|other| Family::BOTH.map(|family| (family, other)))
}

fn expect(seen: &Seen, address: IpAddr, what: &str) -> Result<()> {
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

/// Every pod, to both outside servers, by both families and protocols.
pub(crate) fn leave_as(lab: &Lab, pods: &[&str], vips: &[IpAddr]) -> Result<()> {
    for pod in pods {
        for (family, outside) in every(Outside::BOTH) {
            for protocol in PROTOCOLS {
                let seen = lab.source_seen(pod, outside, family, protocol)?;
                expect(
                    &seen,
                    vip_of(vips, family)?,
                    &format!("{pod} to {outside:?} by {protocol:?}"),
                )?;
            }
        }
    }
    Ok(())
}

pub(crate) fn leave_as_nodes(lab: &Lab, pods: &[&str]) -> Result<()> {
    for pod in pods {
        let node = net::node(lab.pod(pod)?.node);
        for (family, outside) in every(Outside::BOTH) {
            for protocol in PROTOCOLS {
                let seen = lab.source_seen(pod, outside, family, protocol)?;
                expect(
                    &seen,
                    net::pick(&node, family),
                    &format!("{pod} to {outside:?} by {protocol:?}"),
                )?;
            }
        }
    }
    Ok(())
}

/// Waits until a change of the cluster has reached the pods' nodes.
pub(crate) fn settle(lab: &Lab, pods: &[&str], vips: &[IpAddr]) -> Result<()> {
    for (family, pod) in every(pods.iter().copied()) {
        let vip = vip_of(vips, family)?;
        eventually(SOON, &format!("{pod} leaves as {vip}"), || {
            let seen = lab.source_seen(pod, Outside::Lan, family, Protocol::Tcp)?;
            Ok((seen.address() == Some(vip)).then_some(()))
        })?;
    }
    Ok(())
}

pub(crate) fn settle_as_nodes(lab: &Lab, pods: &[&str]) -> Result<()> {
    for (family, pod) in every(pods.iter().copied()) {
        let node = net::pick(&net::node(lab.pod(pod)?.node), family);
        eventually(SOON, &format!("{pod} leaves as {node}"), || {
            let seen = lab.source_seen(pod, Outside::Lan, family, Protocol::Tcp)?;
            Ok((seen.address() == Some(node)).then_some(()))
        })?;
    }
    leave_as_nodes(lab, pods)
}

/// What is seen of connections inside the cluster.
#[derive(Debug, PartialEq)]
struct Inside(Vec<(String, Option<IpAddr>)>);

impl Inside {
    fn look(lab: &Lab, vips: &[IpAddr]) -> Result<Inside> {
        let mut seen = Vec::new();
        for family in Family::BOTH {
            for (from, to) in [
                ("shop-1", "plain-1"),
                ("shop-1", "plain-2"),
                ("shop-2", "shop-3"),
                ("plain-1", "shop-2"),
            ] {
                for protocol in PROTOCOLS {
                    let address = lab.pod(to)?.address(family);
                    let answer = lab.ask_from_pod(from, address, PORT, protocol)?;
                    expect(
                        &answer,
                        lab.pod(from)?.address(family),
                        &format!("{from} to {to}"),
                    )?;
                    seen.push((format!("{from} to {to}"), answer.address()));
                }
            }
            for pod in SHOP {
                let cluster_ip = lab.cluster_ip("back", family)?;
                let answer = lab.ask_from_pod(pod, cluster_ip, PORT, Protocol::Tcp)?;
                expect(
                    &answer,
                    lab.pod(pod)?.address(family),
                    &format!("{pod} to ClusterIP {cluster_ip}"),
                )?;
                for number in lab.node_numbers() {
                    let node = net::pick(&net::node(number), family);
                    let answer = lab.ask_from_pod(pod, node, PORT, Protocol::Tcp)?;
                    ensure!(answer.address().is_some(), "{pod} to {node}: {answer}");
                    seen.push((format!("{pod} to node{number} {family}"), answer.address()));
                }
                // Which pod answers is chance; when it is the asking one itself, kube-proxy hides its address.
                let vip = vip_of(vips, family)?;
                let answer = lab.ask_from_pod(pod, vip, PORT, Protocol::Tcp)?;
                match &answer {
                    Seen::As { by, address }
                        if by.starts_with("shop-") || by.starts_with("node") =>
                    {
                        ensure!(*address != vip, "{pod} to its own VIP is seen as the VIP");
                    }
                    other => bail!("{pod} to its own VIP {vip}: {other}"),
                }
            }
        }
        Ok(Inside(seen))
    }

    fn is_as_now(&self, lab: &Lab, vips: &[IpAddr]) -> Result<()> {
        let now = Inside::look(lab, vips)?;
        for (before, now) in self.0.iter().zip(&now.0) {
            ensure!(before == now, "was {before:?}, is {now:?}");
        }
        Ok(())
    }
}

/// On the last piece to the pod, or between nodes as in a tunnel, packets have less room than on the LAN: the pod's
/// node and the gateway must be able to say so to the server.
fn narrow_way(lab: &Lab, vips: &[IpAddr]) -> Result<()> {
    let gateway = lab.wait_for_announcer(vips[0], None)?;
    let elsewhere = lab.node_numbers().find(|number| *number != gateway);
    let elsewhere = elsewhere.context("one node only")?;
    // In this order: a server that has learned the size for the VIP needs no second word.
    let mut ways = vec![(elsewhere, "dev pod", 1400), (gateway, "via ", 1300)];
    if !lab.node(1).sh("nft list tables")?.contains("inet metaleg") {
        // The iptables backend cannot send what the pod's node has to say over the gateway.
        ways.remove(0);
    }
    for (number, routes, mtu) in ways {
        let set = |mtu: &str| {
            lab.node(number).sh(&format!(
                "for ip in 'ip -4' 'ip -6'; do $ip route show | grep -E '^(10.244|fd00:10:244).* {routes}' | \
                 sed 's/ mtu [0-9]*//' | while read route; do $ip route change $route {mtu}; done; done"
            ))
        };
        set(&format!("mtu {mtu}"))?;
        let pod = SHOP[elsewhere - 1];
        for family in Family::BOTH {
            let mut stream = lab.open_stream(pod, Outside::Far, family)?;
            stream
                .download(2000, STREAM_PATIENCE)
                .with_context(|| format!("{pod} by {family}, narrow: {routes}"))?;
        }
        set("")?;
    }
    Ok(())
}

fn inbound_to_vip(lab: &Lab, vips: &[IpAddr]) -> Result<()> {
    for (family, from) in every(Outside::BOTH) {
        for protocol in PROTOCOLS {
            let vip = vip_of(vips, family)?;
            // Several times, for different pods on different nodes.
            for _ in 0..4 {
                let seen = lab.ask_from_outside(from, vip, PORT, protocol)?;
                ensure!(
                    seen.address().is_some(),
                    "{from:?} to {vip} by {protocol:?}: {seen}"
                );
            }
        }
    }
    Ok(())
}

fn inbound_local(lab: &Lab) -> Result<()> {
    let vips = lab.wait_for_vips("local")?;
    let port = lab.node_port("local")?;
    for (family, from) in every(Outside::BOTH) {
        let client = from.address(family);
        let vip = vip_of(&vips, family)?;
        lab.wait_for_announcer(vip, None)?;
        let seen = lab.ask_from_outside(from, vip, PORT, Protocol::Tcp)?;
        expect(&seen, client, &format!("{from:?} to VIP {vip}"))?;
        for number in [1, 2] {
            let node = net::pick(&net::node(number), family);
            let seen = lab.ask_from_outside(from, node, port, Protocol::Tcp)?;
            expect(
                &seen,
                client,
                &format!("{from:?} to NodePort {node}:{port}"),
            )?;
        }
    }
    Ok(())
}

fn inbound_to_pods(lab: &Lab) -> Result<()> {
    for pod in SHOP {
        for (family, from) in every(Outside::BOTH) {
            for protocol in PROTOCOLS {
                let address = lab.pod(pod)?.address(family);
                let seen = lab.ask_from_outside(from, address, PORT, protocol)?;
                expect(
                    &seen,
                    from.address(family),
                    &format!("{from:?} to {pod} by {protocol:?}"),
                )?;
            }
        }
    }
    Ok(())
}

/// What of the kernel must not change when an agent restarts: all but what expires by itself.
fn programmed(lab: &Lab) -> Result<String> {
    let mut text = String::new();
    for number in lab.node_numbers() {
        text += &lab.node(number).sh(
            "ip rule | grep 'proto 77' || true; ip -6 rule | grep 'proto 77' || true
             ip route show table all proto 77; ip -6 route show table all proto 77
             ipset save | grep METALEG- | grep -v 'add METALEG-LATE-' | sort || true
             nft list table inet metaleg 2>/dev/null | sed 's/packets [0-9]* bytes [0-9]*//; /expires/d' || true
             for t in iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do
               $t-save 2>/dev/null | grep -- '-A .*METALEG-' || true
             done",
        )?;
    }
    Ok(text)
}

fn restart(lab: &Lab, signal: Signal, vips: &[IpAddr]) -> Result<()> {
    let before = programmed(lab)?;
    let mut streams = Vec::new();
    for (family, pod) in every(SHOP) {
        streams.push(lab.open_stream(pod, Outside::Far, family)?);
    }
    for number in lab.node_numbers() {
        lab.restart_agent(number, signal)?;
        leave_as(lab, &[SHOP[number - 1]], vips)?;
    }
    for stream in &mut streams {
        stream
            .ask(Duration::from_secs(2))
            .context("a connection broke")?;
    }
    let after = programmed(lab)?;
    if let Some((old, new)) = before
        .lines()
        .zip(after.lines())
        .find(|(old, new)| old != new)
    {
        bail!("the kernel was changed: {old:?} became {new:?}");
    }
    ensure!(before == after, "the kernel was changed");
    Ok(())
}

/// Damages of which the kernel tells; legacy iptables and ipset are looked at once in an interval only.
fn damage(lab: &Lab, vips: &[IpAddr]) -> Result<()> {
    let _calm = CALM.lock().unwrap_or_else(PoisonError::into_inner);
    let before = programmed(lab)?;
    let mut damages = vec![
        "ip rule del pref 1000",
        "ip -6 rule del pref 1099",
        "for n in 1 2 3; do ip route del default table 10000$n metric 100 2>/dev/null || true; done",
    ];
    if before.contains("table inet metaleg") {
        damages.extend([
            "nft delete table inet metaleg",
            "nft flush chain inet metaleg translation",
            "nft insert rule inet metaleg guard accept",
        ]);
    }
    let nft_tools = lab.node(1).sh("iptables-nft-save")?;
    if nft_tools.contains("METALEG-NAT") {
        damages.extend([
            "iptables-nft -t nat -D POSTROUTING 1",
            "ip6tables-nft -t mangle -F METALEG-MARK",
            "iptables-nft -t nat -I POSTROUTING -s 10.244.0.0/16 -o eth0 -j MASQUERADE",
        ]);
    }
    if before.contains("table inet metaleg") {
        // Registered after ours, as by a CNI plugin that is restarted: ours has a priority of its own.
        for number in lab.node_numbers() {
            lab.node(number).sh(
                "nft 'table ip latecomer { chain p { type nat hook postrouting priority 100; \
                 ip saddr 10.244.0.0/16 ip daddr != 10.0.0.0/8 masquerade; }; }'",
            )?;
        }
        leave_as(lab, &SHOP, vips).context("with a masquerade that came later")?;
        for number in lab.node_numbers() {
            lab.node(number).sh("nft delete table ip latecomer")?;
        }
    }
    // Rules have no order among equals.
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    for damage in damages {
        for number in lab.node_numbers() {
            lab.node(number).sh(damage)?;
        }
        eventually(Duration::from_secs(1), &format!("healed: {damage}"), || {
            let mut healed = sorted(&programmed(lab)?) == sorted(&before);
            // A masquerade ahead of ours would win.
            if damage.contains("MASQUERADE") {
                for number in lab.node_numbers() {
                    let rules = lab.node(number).sh("iptables-nft -t nat -S POSTROUTING")?;
                    let first = rules.lines().nth(1).unwrap_or_default();
                    healed &= first.contains("METALEG-NAT");
                }
            }
            Ok(healed.then_some(()))
        })?;
        leave_as(lab, &SHOP, vips).with_context(|| format!("after {damage}"))?;
        if damage.contains("MASQUERADE") {
            for number in lab.node_numbers() {
                lab.node(number).sh(&damage.replace("-I ", "-D "))?;
            }
        }
    }
    Ok(())
}

fn move_announcement(lab: &Lab, vips: &[IpAddr]) -> Result<()> {
    let from = lab.wait_for_announcer(vips[0], None)?;
    let to = lab
        .node_numbers()
        .find(|number| *number != from)
        .context("one node only")?;
    let mut streams = Vec::new();
    for (family, pod) in every(SHOP) {
        streams.push((pod, lab.open_stream(pod, Outside::Far, family)?));
    }
    lab.move_announcement(vips, to)?;
    // From now on a connection may fail for a moment, but not show another address.
    for _ in 0..10 {
        for (family, pod) in every(SHOP) {
            let seen = lab.source_seen(pod, Outside::Far, family, Protocol::Tcp)?;
            let vip = vip_of(vips, family)?;
            ensure!(
                seen.address().is_none_or(|address| address == vip),
                "{pod} at the move: {seen}"
            );
        }
    }
    settle(lab, &SHOP, vips)?;
    leave_as(lab, &SHOP, vips)?;
    for (pod, stream) in &mut streams {
        stream
            .ask(STREAM_PATIENCE)
            .with_context(|| format!("a connection of {pod} broke, node{from} to node{to}"))?;
    }
    Ok(())
}

/// Ends a pod and waits until no node knows it any more.
fn delete_and_wait(lab: &mut Lab, pod: &str) -> Result<()> {
    let addresses = lab.pod(pod)?.addresses.clone();
    lab.delete_pod(pod)?;
    for number in lab.node_numbers() {
        eventually(SOON, &format!("node{number} has forgotten {pod}"), || {
            let sets = lab.node(number).sh(
                "ipset save; nft list table inet metaleg 2>/dev/null | sed '/expires/d' | tr -c 'a-z0-9.:\\n' ' ' || true",
            )?;
            let gone = |address: &String| {
                !sets
                    .lines()
                    .any(|line| line.split(' ').any(|word| word == address))
            };
            Ok(addresses.iter().all(gone).then_some(()))
        })?;
    }
    Ok(())
}

fn without_vip(lab: &mut Lab) -> Result<()> {
    lab.create_pod("pending-1", 1, "pending")?;
    lab.create_pod("pending-2", 2, "pending")?;
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "pending", "labels": {metaleg_lab::EGRESS_LABEL: "true"}},
        "spec": {"type": "LoadBalancer", "loadBalancerClass": "example.com/nobody", "selector": {"app": "pending"},
                 "ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"],
                 "ports": [{"port": PORT}]},
    });
    lab.api()
        .create("/api/v1/namespaces/default/services", &service)?;
    for (family, pod) in every(["pending-1", "pending-2"]) {
        eventually(SOON, &format!("{pod} is rejected by {family}"), || {
            let seen = lab.source_seen(pod, Outside::Far, family, Protocol::Tcp)?;
            Ok(seen.is_rejected().then_some(()))
        })?;
        let inside = lab.pod("plain-1")?.address(family);
        let seen = lab.ask_from_pod(pod, inside, PORT, Protocol::Tcp)?;
        expect(
            &seen,
            lab.pod(pod)?.address(family),
            "a blocked pod to a pod",
        )?;
        let seen = lab.ask_from_outside(
            Outside::Lan,
            lab.pod(pod)?.address(family),
            PORT,
            Protocol::Tcp,
        )?;
        expect(
            &seen,
            Outside::Lan.address(family),
            "inbound to a blocked pod",
        )?;
    }
    lab.delete_service("pending")?;
    settle_as_nodes(lab, &["pending-1", "pending-2"])
}

fn unlabel(lab: &Lab, vips: &[IpAddr]) -> Result<()> {
    settle(lab, &SHOP, vips)?;
    let mut streams = Vec::new();
    for (family, pod) in every(SHOP) {
        streams.push((pod, lab.open_stream(pod, Outside::Far, family)?));
    }
    lab.label_service("shop", false)?;
    settle_as_nodes(lab, &SHOP)?;
    for (pod, stream) in &mut streams {
        // The server knows no connection from the node's address, and resets it.
        let answer = stream.ask(Duration::from_secs(2));
        let error = answer
            .err()
            .with_context(|| format!("the connection of {pod} goes on"))?;
        let reset = error
            .downcast_ref::<std::io::Error>()
            .map(std::io::Error::kind);
        ensure!(
            matches!(
                reset,
                Some(std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe)
            ),
            "the connection of {pod} does not end at once: {error:#}"
        );
    }
    Ok(())
}
