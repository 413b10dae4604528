//! What every cluster must show: each backend with each kube-proxy and each masquerade.

use std::net::IpAddr;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use metaleg_lab::capture::{Capture, Forwarded};
use metaleg_lab::probe::{PORT, Protocol, Seen, http_get};
use metaleg_lab::traffic::Traffic;
use metaleg_lab::{
    EGRESS_LABEL, Family, KubeProxy, Lab, Masquerade, Outside, SOON, ServiceSpec, eventually, net,
};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::leaving::{
    Before, blocked, every, expect, leave_as, leave_as_nodes, settle, settle_as_nodes, vip_of,
};
use crate::names;
use crate::runner::{CALM, Check, Group, Row};
use crate::stage::Stage;

/// A pod of the egress Service on every node.
const SHOP: [&str; 3] = ["shop-1", "shop-2", "shop-3"];
/// Pods of no egress Service, one on every node.
const PLAIN: [&str; 3] = ["plain-1", "plain-2", "plain-3"];
/// How long established connections may be silent at a move: lost packets are sent again after 0.2 s, 0.6 s,
/// 1.4 s and 3 s.
const STREAM_PATIENCE: Duration = Duration::from_secs(8);

/// Every backend with every kube-proxy, and every masquerade with every backend that can beat it. The mode of
/// iptables is the masquerade's, as a kubelet would say it.
const CLUSTERS: [(&str, KubeProxy, Masquerade); 9] = [
    ("nftables", KubeProxy::Iptables, Masquerade::IptablesNft),
    ("nftables", KubeProxy::Nftables, Masquerade::IptablesLegacy),
    ("nftables", KubeProxy::Iptables, Masquerade::NftTable),
    ("nftables", KubeProxy::Nftables, Masquerade::NftTable),
    ("iptables", KubeProxy::Iptables, Masquerade::IptablesNft),
    ("iptables", KubeProxy::Nftables, Masquerade::IptablesNft),
    ("iptables", KubeProxy::Iptables, Masquerade::IptablesLegacy),
    ("iptables", KubeProxy::Nftables, Masquerade::IptablesLegacy),
    ("iptables", KubeProxy::Iptables, Masquerade::NftTable),
];

pub(crate) fn groups() -> impl Iterator<Item = Group> {
    CLUSTERS
        .into_iter()
        .map(|(backend, kube_proxy, masquerade)| {
            let name = format!(
                "matrix::{backend}::kube_proxy_{}::masquerade_{}",
                match kube_proxy {
                    KubeProxy::Iptables => "iptables",
                    KubeProxy::Nftables => "nftables",
                },
                match masquerade {
                    Masquerade::IptablesNft => "iptables_nft",
                    Masquerade::IptablesLegacy => "iptables_legacy",
                    Masquerade::NftTable => "nft",
                }
            );
            let row = |(row, check): (&str, Check)| Row::new(&name, row, check);
            Group {
                rows: ROWS.into_iter().map(row).collect(),
                options: Some(crate::lab(
                    3,
                    kube_proxy,
                    masquerade,
                    &[("FIREWALL_BACKEND", backend)],
                )),
                alone: false,
                name,
            }
        })
}

/// In the order in which a user comes to them.
const ROWS: [(&str, Check); 23] = [
    ("without_metaleg_pods_leave_as_their_nodes", without_metaleg),
    ("is_installed_with_kubectl", is_installed),
    ("changes_nothing_without_a_label", without_a_label),
    ("leaves_as_its_vip", leaves_as_its_vip),
    ("agents_are_ready_alive_and_count", agents_count),
    ("plan_says_what_is_programmed", plan_is_told),
    ("others_leave_as_before", others_leave_as_before),
    ("changes_nothing_inside_the_cluster", inside_the_cluster),
    ("downloads_fit_a_narrow_way", narrow_way),
    ("inbound_to_the_vip", inbound_to_vip),
    ("inbound_of_policy_local_keeps_the_client", inbound_local),
    ("inbound_to_pods", inbound_to_pods),
    ("a_new_pod_and_its_successor_leave_as_the_vip", new_pods),
    ("stopped_agents_change_nothing", |stage| {
        restart(stage, Signal::SIGTERM)
    }),
    ("killed_agents_change_nothing", |stage| {
        restart(stage, Signal::SIGKILL)
    }),
    ("what_others_delete_is_back_within_a_second", damage),
    ("the_announcement_moves", |stage| {
        (0..2).try_for_each(|_| move_announcement(stage))
    }),
    ("without_a_vip_nothing_leaves", without_vip),
    ("label_removed", unlabel),
    ("service_deleted", service_deleted),
    ("another_backend_takes_over_and_back", other_backend),
    ("no_agent_complains", no_complaint),
    ("cleanup_leaves_nothing", clean_up),
];

impl Stage {
    /// Pods on every node, an egress Service to be, one with policy Local, and one that is only inside.
    fn cluster(&mut self) -> Result<()> {
        self.pods(&SHOP, "shop")?;
        self.pods(&PLAIN, "back")?;
        self.pods(&["local-1", "local-2"], "local")?;
        self.service(&ServiceSpec::new("back"))?;
        self.service(&ServiceSpec::new("local").traffic_policy("Local"))?;
        self.vips = self.service(&ServiceSpec::new("shop"))?;
        if self.inside.is_some() {
            return Ok(());
        }
        let lab = &self.lab;
        lab.create_host_network_pod("shop-host", 1, "shop")?;
        for vip in &self.vips {
            lab.wait_for_announcer(*vip, None)?;
        }
        // kube-proxy programs the nodes by itself, in its own time.
        for (family, pod) in every(SHOP) {
            for address in [lab.cluster_ip("back", family)?, vip_of(&self.vips, family)?] {
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
        self.inside = Some(Inside::look(lab, &self.vips)?);
        Ok(())
    }

    /// Both Services are labelled, and pods leave as their VIPs.
    fn labelled(&mut self) -> Result<()> {
        self.cluster()?;
        self.shop()?;
        if !self.lab.is_labelled("local")? {
            self.lab.label_service("local", true)?;
            let vips = self.lab.wait_for_vips("local")?;
            settle(&self.lab, &["local-1", "local-2"], &vips, Before::Nodes)?;
        }
        Ok(())
    }

    /// MetalEG runs, and neither Service is labelled.
    fn unlabelled(&mut self) -> Result<()> {
        self.cluster()?;
        self.installed()?;
        self.lab.label_service("local", false)?;
        self.lab.label_service("shop", false)?;
        settle_as_nodes(&self.lab, &SHOP, Before::Vips(&self.vips))
    }
}

fn without_metaleg(stage: &mut Stage) -> Result<()> {
    stage.cluster()?;
    leave_as_nodes(&stage.lab, &SHOP)?;
    leave_as_nodes(&stage.lab, &PLAIN)
}

fn is_installed(stage: &mut Stage) -> Result<()> {
    stage.cluster()?;
    stage.installed()
}

fn without_a_label(stage: &mut Stage) -> Result<()> {
    stage.unlabelled()?;
    inside_is_as_before(stage)
}

fn leaves_as_its_vip(stage: &mut Stage) -> Result<()> {
    stage.unlabelled()?;
    stage.labelled()?;
    leave_as(&stage.lab, &SHOP, &stage.vips)
}

fn agents_count(stage: &mut Stage) -> Result<()> {
    stage.labelled()?;
    let lab = &stage.lab;
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
}

fn others_leave_as_before(stage: &mut Stage) -> Result<()> {
    stage.labelled()?;
    let lab = &stage.lab;
    leave_as_nodes(lab, &PLAIN)?;
    for number in lab.node_numbers() {
        for (family, outside) in every(Outside::BOTH) {
            for protocol in Protocol::ALL {
                let seen = lab.ask_from_node(number, outside.address(family), protocol)?;
                let node = net::pick(&net::node(number), family);
                expect(&seen, node, &format!("node{number} to {outside:?}"))?;
            }
        }
    }
    Ok(())
}

fn inside_the_cluster(stage: &mut Stage) -> Result<()> {
    stage.labelled()?;
    inside_is_as_before(stage)
}

fn inside_is_as_before(stage: &Stage) -> Result<()> {
    let before = stage.inside.as_ref().context("nobody has looked")?;
    before.is_as_now(&stage.lab, &stage.vips)
}

fn new_pods(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
    lab.create_pod("shop-new", 3, "shop")?;
    settle(lab, &["shop-new"], vips, Before::Nodes)?;
    leave_as(lab, &["shop-new"], vips)?;
    delete_and_wait(lab, "shop-new")?;
    lab.create_pod("shop-next", 1, "shop")?;
    settle(lab, &["shop-next"], vips, Before::Nodes)?;
    delete_and_wait(lab, "shop-next")
}

fn service_deleted(stage: &mut Stage) -> Result<()> {
    stage.labelled()?;
    let lab = &stage.lab;
    lab.delete_service("shop")?;
    settle_as_nodes(lab, &SHOP, Before::Vips(&stage.vips))?;
    lab.delete_service("local")?;
    let of_guards: String = names::IPSETS_OF_GUARDS
        .iter()
        .map(|name| format!(" -e {name}"))
        .collect();
    let look = format!(
        "ipset save | grep -v -e '^create {}.*-[46] '{of_guards} || true
         for s in {}; do for n in 4 6; do
           for kind in set map; do
             nft list $kind {} $s$n 2>/dev/null | sed -n \"s/elements/$s$n: &/p\"
           done
         done; done",
        names::CHAINS,
        names::SETS_OF_PODS.join(" "),
        names::TABLE,
    );
    for number in lab.node_numbers() {
        eventually(SOON, "sets of pods and VIPs are empty", || {
            let sets = lab.node(number).sh(&look)?;
            ensure!(sets.is_empty(), "on node{number}: {sets}");
            Ok(Some(()))
        })?;
    }
    Ok(())
}

fn other_backend(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let (now, other) = match is_nftables(&stage.lab)? {
        true => ("nftables", "iptables"),
        false => ("iptables", "nftables"),
    };
    switch_backend(&stage.lab, other, &stage.vips)?;
    switch_backend(&stage.lab, now, &stage.vips)
}

fn is_nftables(lab: &Lab) -> Result<bool> {
    Ok(lab.node(1).sh("nft list tables")?.contains(names::TABLE))
}

fn no_complaint(stage: &mut Stage) -> Result<()> {
    stage.labelled()?;
    let lab = &stage.lab;
    for number in lab.node_numbers() {
        let log = lab.agent_log(number);
        // The hostNetwork pod is ignored, a masquerade in a table of its own is a rival of iptables, and another row has
        // removed all routing rules.
        let expected = |line: &str| {
            line.contains("ignoring endpoint") && line.contains("hostNetwork")
                || line.contains("FIREWALL_BACKEND=nftables would be ahead of it")
                || line.contains("kind=\"RulesRemoved\"")
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
}

/// Pods that talk all the time, and what leaves the nodes.
fn watch(lab: &Lab) -> Result<(Traffic, Capture)> {
    let traffic = lab.traffic(&SHOP)?;
    traffic.wait_for_signs_of_life()?;
    Ok((traffic, lab.capture()?))
}

/// Only VIPs have left, and only the gateway.
fn only_vips(left: &Forwarded, gateway: usize, vips: &[IpAddr]) -> Result<()> {
    left.only(|node, source| node == gateway && vips.contains(&source))
}

fn plan_is_told(stage: &mut Stage) -> Result<()> {
    stage.labelled()?;
    let Stage { lab, vips, .. } = stage;
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
    let gateway = lab.wait_for_announcer(vips[0], None)?;
    // What the watcher sends is enough to look at: more would only keep the servers from answering at once.
    let capture = lab.capture()?;
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
    only_vips(&capture.take()?, gateway, vips)?;
    let text = programmed(lab)?;
    let (has_table, has_chains) = (is_nftables(lab)?, text.contains(names::CHAINS));
    ensure!(
        (has_table, has_chains) == (to == "nftables", to == "iptables"),
        "left behind: {text}"
    );
    leave_as(lab, &SHOP, vips)
}

fn clean_up(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
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

/// What is seen of connections inside the cluster.
#[derive(Debug, PartialEq)]
pub(crate) struct Inside(Vec<(String, Option<IpAddr>)>);

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
                for protocol in Protocol::WITH_PORTS {
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
fn narrow_way(stage: &mut Stage) -> Result<()> {
    stage.labelled()?;
    let Stage { lab, vips, .. } = stage;
    let gateway = lab.wait_for_announcer(vips[0], None)?;
    let elsewhere = lab.node_numbers().find(|number| *number != gateway);
    let elsewhere = elsewhere.context("one node only")?;
    // In this order: a server that has learned the size for the VIP needs no second word.
    let mut ways = vec![(elsewhere, "dev pod", 1400), (gateway, "via ", 1300)];
    if !is_nftables(lab)? {
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

fn inbound_to_vip(stage: &mut Stage) -> Result<()> {
    stage.labelled()?;
    let Stage { lab, vips, .. } = stage;
    for (family, from) in every(Outside::BOTH) {
        for protocol in Protocol::WITH_PORTS {
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

fn inbound_local(stage: &mut Stage) -> Result<()> {
    stage.labelled()?;
    let lab = &stage.lab;
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

fn inbound_to_pods(stage: &mut Stage) -> Result<()> {
    stage.labelled()?;
    let lab = &stage.lab;
    for pod in SHOP {
        for (family, from) in every(Outside::BOTH) {
            for protocol in Protocol::WITH_PORTS {
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
        text += &lab.node(number).sh(&format!(
            "ip rule | grep '{protocol}' || true; ip -6 rule | grep '{protocol}' || true
             ip route show table all {protocol}; ip -6 route show table all {protocol}
             ipset save | grep {chains} | grep -v 'add {late}' | sort || true
             nft list table {table} 2>/dev/null | sed 's/packets [0-9]* bytes [0-9]*//; /expires/d' || true
             for t in iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do
               $t-save 2>/dev/null | grep -- '-A .*{chains}' || true
             done",
            protocol = names::PROTOCOL,
            chains = names::CHAINS,
            late = names::LATE_REPLIES_IPSET,
            table = names::TABLE,
        ))?;
    }
    Ok(text)
}

fn restart(stage: &mut Stage, signal: Signal) -> Result<()> {
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
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

/// What the pods experience until a damage is repaired.
#[derive(Clone, Copy, Debug)]
enum Meanwhile {
    /// What is left of ours keeps every packet in.
    NothingLeaks,
    /// What was deleted was all that kept them in, or routed them: for some milliseconds packets leave as their nodes,
    /// as their pods, or as the VIP from another node.
    Exposed,
}

/// Damages of which the kernel tells; legacy iptables and ipset are looked at once in an interval only.
fn damages(text: &str, nft_tools: &str) -> Vec<(String, Meanwhile)> {
    use Meanwhile::{Exposed, NothingLeaks};
    let (table, nat, mark) = (names::TABLE, names::NAT_CHAIN, names::MARK_CHAIN);
    let is_nftables = text.contains(&format!("table {table}"));
    // The gateway has no rules of routing.
    let rules = |family: &str, priority: &str| {
        format!("ip {family} rule del pref {priority} 2>/dev/null || true")
    };
    // As systemd-networkd does when it is restarted.
    let all_routing = format!(
        "for f in -4 -6; do
           ip $f rule | sed -n 's/^\\([0-9]*\\):.*{protocol}.*/rule del pref \\1/p' | ip $f -force -batch - 2>/dev/null || true
           ip $f route flush table all {protocol} 2>/dev/null || true
         done",
        protocol = names::PROTOCOL
    );
    let mut damages = vec![
        (rules("-4", names::FIRST_RULE), NothingLeaks),
        (rules("-6", names::LAST_RULE), NothingLeaks),
        // With iptables nothing sees where packets of IPv6 go.
        (
            all_routing,
            if is_nftables { NothingLeaks } else { Exposed },
        ),
        (
            format!(
                "for n in 1 2 3; do ip route del default table {}$n metric 100 2>/dev/null || true; done",
                names::ROUTE_TABLES
            ),
            NothingLeaks,
        ),
    ];
    if is_nftables {
        damages.extend([
            (format!("nft delete table {table}"), Exposed),
            (
                format!("nft flush chain {table} {}", names::TRANSLATION_CHAIN),
                NothingLeaks,
            ),
            (
                format!("nft insert rule {table} {} accept", names::GUARD_CHAIN),
                NothingLeaks,
            ),
        ]);
    }
    if nft_tools.contains(nat) {
        damages.extend([
            ("iptables-nft -t nat -D POSTROUTING 1".to_owned(), Exposed),
            (format!("ip6tables-nft -t mangle -F {mark}"), Exposed),
            (
                "iptables-nft -t nat -I POSTROUTING -s 10.244.0.0/16 -o eth0 -j MASQUERADE"
                    .to_owned(),
                Exposed,
            ),
        ]);
    }
    damages
}

fn damage(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
    let _calm = CALM.lock().unwrap_or_else(PoisonError::into_inner);
    let gateway = lab.wait_for_announcer(vips[0], None)?;
    let before = programmed(lab)?;
    let (_traffic, capture) = watch(lab)?;
    if is_nftables(lab)? {
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
    let nft_tools = lab.node(1).sh("iptables-nft-save")?;
    for (damage, meanwhile) in damages(&before, &nft_tools) {
        only_vips(&capture.take()?, gateway, vips).with_context(|| format!("before {damage}"))?;
        for number in lab.node_numbers() {
            lab.node(number).sh(&damage)?;
        }
        eventually(Duration::from_secs(1), &format!("healed: {damage}"), || {
            let mut healed = sorted(&programmed(lab)?) == sorted(&before);
            // A masquerade ahead of ours would win.
            if damage.contains("MASQUERADE") {
                for number in lab.node_numbers() {
                    let rules = lab.node(number).sh("iptables-nft -t nat -S POSTROUTING")?;
                    let first = rules.lines().nth(1).unwrap_or_default();
                    healed &= first.contains(names::NAT_CHAIN);
                }
            }
            Ok(healed.then_some(()))
        })?;
        let left = only_vips(&capture.take()?, gateway, vips);
        match meanwhile {
            Meanwhile::NothingLeaks => {
                left.with_context(|| format!("between {damage} and its repair"))?;
            }
            // Connections that have begun meanwhile are forgotten when the rules are back.
            Meanwhile::Exposed => eventually(Duration::from_secs(1), "nothing leaks", || {
                std::thread::sleep(Duration::from_millis(100));
                only_vips(&capture.take()?, gateway, vips).map(Some)
            })?,
        }
        leave_as(lab, &SHOP, vips).with_context(|| format!("after {damage}"))?;
        if damage.contains("MASQUERADE") {
            for number in lab.node_numbers() {
                lab.node(number).sh(&damage.replace("-I ", "-D "))?;
            }
        }
    }
    only_vips(&capture.take()?, gateway, vips)
}

fn move_announcement(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
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
    settle(lab, &SHOP, vips, Before::Same)?;
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
            let sets = lab.node(number).sh(&format!(
                "ipset save; nft list table {} 2>/dev/null | sed '/expires/d' | tr -c 'a-z0-9.:\\n' ' ' || true",
                names::TABLE
            ))?;
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

fn without_vip(stage: &mut Stage) -> Result<()> {
    stage.labelled()?;
    let lab = &mut stage.lab;
    lab.create_pod("pending-1", 1, "pending")?;
    lab.create_pod("pending-2", 2, "pending")?;
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "pending", "labels": {EGRESS_LABEL: "true"}},
        "spec": {"type": "LoadBalancer", "loadBalancerClass": "example.com/nobody", "selector": {"app": "pending"},
                 "ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"],
                 "ports": [{"port": PORT}]},
    });
    lab.api()
        .create("/api/v1/namespaces/default/services", &service)?;
    blocked(lab, &["pending-1", "pending-2"], &Family::BOTH)?;
    for (family, pod) in every(["pending-1", "pending-2"]) {
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
    settle_as_nodes(lab, &["pending-1", "pending-2"], Before::Same)?;
    lab.delete_pod("pending-1")?;
    lab.delete_pod("pending-2")
}

fn unlabel(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
    let mut streams = Vec::new();
    for (family, pod) in every(SHOP) {
        streams.push((pod, lab.open_stream(pod, Outside::Far, family)?));
    }
    lab.label_service("shop", false)?;
    settle_as_nodes(lab, &SHOP, Before::Vips(vips))?;
    for (pod, stream) in &mut streams {
        // Its node forgets it a moment after new ones leave as the node: until then it goes on as it was.
        let end = eventually(SOON, &format!("the connection of {pod} ends"), || {
            let answer = stream.ask(Duration::from_secs(2));
            let as_before = |seen: &Seen| seen.address().is_some_and(|seen| vips.contains(&seen));
            Ok((!answer.as_ref().is_ok_and(as_before)).then_some(answer))
        })?;
        let error = end
            .err()
            .with_context(|| format!("the connection of {pod} goes on as another"))?;
        // The server knows no connection from the node's address, and resets it.
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
