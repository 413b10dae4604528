//! What Services, slices, pods and settings make of a pod, in clusters whose agents have a single bit of the mark:
//! every gateway is one beyond the marks, and every pod is routed by its address.

use std::io::ErrorKind;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use metaleg_lab::probe::{PORT, Protocol};
use metaleg_lab::{
    EGRESS_LABEL, Family, KubeProxy, Masquerade, Outside, SOON, ServiceSpec, eventually, net,
};
use serde_json::json;

use crate::leaving::{
    Before, blocked, every, leave_as, leave_as_nodes, node_of, settle, settle_as_nodes,
    settle_for_good, settle_one, vip_of,
};
use crate::names;
use crate::runner::{Check, Group, Row};
use crate::stage::Stage;
use crate::startup;

/// A pod of the egress Service on every node.
const SHOP: [&str; 3] = ["shop-1", "shop-2", "shop-3"];
/// Pods of no egress Service, one on every node.
const PLAIN: [&str; 3] = ["plain-1", "plain-2", "plain-3"];
/// One bit of the mark.
const NARROW_MASK: &str = "0x00100000";
/// The same as `ip rule` shows it.
const NARROW_RULE: &str = "0x100000/0x100000";
/// How long an announcer that nobody hears of any more is kept.
const GRACE: &str = "3s";
/// How long a connection that cannot go on may take to end.
const END_GOAL: Duration = Duration::from_secs(1);
const SERVICES: &str = "/api/v1/namespaces/default/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
const PODS: &str = "/api/v1/namespaces/default/pods";

pub(crate) fn groups() -> [Group; 2] {
    ["nftables", "iptables"].map(|backend| {
        let name = format!("objects::{backend}");
        let settings = [
            ("FIREWALL_BACKEND", backend),
            ("FIREWALL_MASK", NARROW_MASK),
            ("ANNOUNCER_GRACE_PERIOD", GRACE),
        ];
        let mut rows: Vec<Row> = ROWS
            .into_iter()
            .filter(|(_, _, both)| *both || backend == "nftables")
            .map(|(row, check, _)| Row::new(&name, row, check))
            .collect();
        if backend == "nftables" {
            // They look at no backend, and need such a cluster. The first one before the agents are there.
            let [before_agents, last] = startup::rows_of_a_lab();
            rows.insert(0, before_agents);
            rows.push(last);
        }
        Group {
            options: Some(crate::lab(
                3,
                KubeProxy::Nftables,
                Masquerade::IptablesNft,
                &settings,
            )),
            alone: false,
            rows,
            name,
        }
    })
}

/// With whether the backend matters.
const ROWS: [(&str, Check, bool); 14] = [
    ("one_bit_of_the_mark_is_enough", one_bit, true),
    ("only_true_counts", only_true, false),
    ("two_services_claim_one_pod", two_services, false),
    ("a_family_that_the_service_lacks", single_stack, true),
    ("two_services_share_a_vip", shared_vip, true),
    ("a_hand_made_slice_captures_nobody", captured, false),
    ("a_host_name_lets_nothing_out", without_gateway, true),
    ("an_address_is_the_next_pods", next_pod, true),
    ("a_pod_that_no_slice_names_yet", new_pods, true),
    ("a_pod_has_completed", completed, false),
    ("excluded_destinations_change", excluded, true),
    ("an_interface_goes_down_and_up", interface, false),
    ("nodes_addresses_name_no_network", no_prefix, false),
    ("nobody_announces_any_more", no_announcer, true),
];

impl Stage {
    /// Pods of no egress Service.
    fn plain(&mut self) -> Result<()> {
        self.pods(&PLAIN, "back")
    }
}

fn one_bit(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
    leave_as(lab, &SHOP, vips)?;
    let gateway = lab.wait_for_announcer(vips[0], None)?;
    for number in lab.node_numbers().filter(|number| *number != gateway) {
        let rules = lab.node(number).sh("ip rule; ip -6 rule")?;
        for family in Family::BOTH {
            let pod = lab.pod(SHOP[number - 1])?.address(family);
            let from = format!("from {pod} fwmark {NARROW_RULE}");
            ensure!(rules.contains(&from), "no {from:?} in {rules}");
        }
    }
    Ok(())
}

fn only_true(stage: &mut Stage) -> Result<()> {
    stage.plain()?;
    stage.shop()?;
    stage.service(&ServiceSpec::new("back"))?;
    let Stage { lab, vips, .. } = stage;
    for value in ["True", "yes", "1", "false", ""] {
        lab.patch_service(
            "back",
            &json!({"metadata": {"labels": {EGRESS_LABEL: value}}}),
        )?;
        eventually(SOON, "the slices have the label", || {
            let slices = format!("{SLICES}?labelSelector=kubernetes.io/service-name=back");
            let slices = lab.api().get(&slices)?;
            let mut slices = slices["items"].as_array().into_iter().flatten();
            let all = slices.all(|slice| slice["metadata"]["labels"][EGRESS_LABEL] == value);
            Ok(all.then_some(()))
        })?;
        // What is seen to come later has come later.
        lab.label_service("shop", false)?;
        settle_as_nodes(lab, &SHOP, Before::Vips(vips))?;
        leave_as_nodes(lab, &PLAIN)?;
        lab.label_service("shop", true)?;
        settle(lab, &SHOP, vips, Before::Nodes)?;
    }
    lab.delete_service("back")
}

fn two_services(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let younger = stage.service(&ServiceSpec::new("younger"))?;
    let Stage { lab, vips, .. } = stage;
    let pods = json!({"app": "shop"});
    lab.patch_service("younger", &json!({"spec": {"selector": pods}}))?;
    lab.label_service("younger", true)?;
    let is_told = |number| {
        lab.agent_log(number)
            .contains("belongs to Service default/shop, which is older")
    };
    for number in lab.node_numbers() {
        eventually(SOON, "the younger Service is told", || {
            Ok(is_told(number).then_some(()))
        })?;
    }
    leave_as(lab, &SHOP, vips)?;
    lab.label_service("shop", false)?;
    settle(lab, &SHOP, &younger, Before::Vips(vips))?;
    leave_as(lab, &SHOP, &younger)?;
    lab.label_service("shop", true)?;
    settle(lab, &SHOP, vips, Before::Vips(&younger))?;
    lab.delete_service("younger")
}

fn next_pod(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
    let addresses = lab.pod("shop-1")?.addresses.clone();
    lab.replace_pod("shop-1", "next-1", "other")?;
    ensure!(
        lab.pod("next-1")?.addresses == addresses,
        "the address is another one"
    );
    settle_as_nodes(lab, &["next-1"], Before::Vips(vips))?;
    lab.replace_pod("next-1", "shop-1", "shop")?;
    settle(lab, &SHOP, vips, Before::Nodes)?;
    // The other nodes may still have the slice of the first pod of this address, and let it go before they know the third.
    settle_for_good(lab, &SHOP, vips, Before::Same)
}

fn completed(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
    // What a kubelet says of a pod whose containers have ended.
    let not = |kind: &str| json!({"type": kind, "status": "False", "reason": "PodCompleted"});
    let completed = json!({"status": {
        "phase": "Succeeded", "conditions": [not("Ready"), not("ContainersReady")]
    }});
    lab.create_pod("job-1", 1, "shop")?;
    settle(lab, &["job-1"], vips, Before::Nodes)?;
    lab.api()
        .patch(&format!("{PODS}/job-1/status"), &completed)?;
    settle_as_nodes(lab, &["job-1"], Before::Vips(vips))?;
    lab.delete_pod("job-1")
}

fn excluded(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    stage.configured(&[("FIREWALL_EXCLUDE_DST_CIDRS", "auto")])?;
    let Stage { lab, vips, .. } = stage;
    let mut streams = Vec::new();
    let mut pods = Vec::new();
    for (family, pod) in every(SHOP) {
        pods.push(lab.pod(pod)?.address(family));
        streams.push((pod, lab.open_stream(pod, Outside::Far, family)?));
    }
    let capture = lab.capture()?;
    lab.configure_agents(&[(
        "FIREWALL_EXCLUDE_DST_CIDRS",
        "auto,198.51.100.0/24,2001:db8:2::/64,198.51.100.0/25",
    )])?;
    for (family, pod) in every(SHOP) {
        let node = node_of(lab, pod, family)?;
        eventually(
            SOON,
            &format!("{pod} leaves as {node} to what is excluded"),
            || {
                let seen = lab.source_seen(pod, Outside::Far, family, Protocol::Tcp)?;
                Ok((seen.address() == Some(node)).then_some(()))
            },
        )?;
    }
    settle(lab, &SHOP, vips, Before::Same)?;
    for (pod, stream) in &mut streams {
        let went_on = stream.ask(Duration::from_secs(2)).is_ok();
        ensure!(!went_on, "a connection of {pod} goes on");
    }
    capture.take()?.only(|_, source| !pods.contains(&source))?;
    lab.configure_agents(&[("FIREWALL_EXCLUDE_DST_CIDRS", "auto")])?;
    settle(lab, &SHOP, vips, Before::Same)?;
    leave_as(lab, &SHOP, vips)
}

fn interface(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
    let gateway = lab.wait_for_announcer(vips[0], None)?;
    let mut others = lab.node_numbers().filter(|n| *n != gateway);
    let number = others.next().context("one node only")?;
    // What a node's own network configuration would bring back comes back with it.
    lab.node(number).sh(
        "sysctl -qw net.ipv6.conf.eth0.keep_addr_on_down=1
         ip route save table main > /run/routes4; ip -6 route save table main > /run/routes6
         ip link set eth0 down; sleep 0.3; ip link set eth0 up
         ip route restore < /run/routes4 2>/dev/null || true; ip -6 route restore < /run/routes6 2>/dev/null || true",
    )?;
    settle(lab, &SHOP, vips, Before::Same)?;
    leave_as(lab, &SHOP, vips)
}

/// As DHCPv6 gives addresses, and as some providers do: the LAN is a route, and no network of an address.
fn no_prefix(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
    let reached = |number: usize, script: &str| {
        let [v4, v6] = net::node(number);
        // What goes with an address is put back: routes through neighbours.
        lab.node(number).sh(&format!(
            "v4=$(ip route show table main | grep via); v6=$(ip -6 route show table main | grep via)
             {}
             echo \"$v4\" | while read -r route; do ip route replace $route; done
             echo \"$v6\" | while read -r route; do ip -6 route replace $route; done",
            script.replace("V4", &v4).replace("V6", &v6)
        ))
    };
    for number in lab.node_numbers() {
        reached(
            number,
            "ip addr add V4/32 dev eth0; ip addr del V4/24 dev eth0
             ip route add 192.0.2.0/24 dev eth0 scope link
             ip -6 addr del V6/64 dev eth0; ip -6 addr add V6/128 dev eth0 nodad
             ip -6 route add 2001:db8:1::/64 dev eth0 proto ra metric 100",
        )?;
    }
    lab.label_service("shop", false)?;
    let left = settle_as_nodes(lab, &SHOP, Before::Vips(vips));
    lab.label_service("shop", true)?;
    let left = left
        .and_then(|()| settle(lab, &SHOP, vips, Before::Nodes))
        .and_then(|()| leave_as(lab, &SHOP, vips));
    for number in lab.node_numbers() {
        reached(
            number,
            "ip route del 192.0.2.0/24 dev eth0
             ip addr add V4/24 dev eth0; ip addr del V4/32 dev eth0
             ip -6 addr del V6/128 dev eth0; ip -6 addr add V6/64 dev eth0 nodad
             ip -6 route del 2001:db8:1::/64 dev eth0 proto ra",
        )?;
    }
    left?;
    settle(lab, &SHOP, vips, Before::Same)?;
    leave_as(lab, &SHOP, vips)
}

/// Past the grace period pods are blocked: what they try anew is refused, connections that are open end at once, and
/// nothing leaves.
fn no_announcer(stage: &mut Stage) -> Result<()> {
    stage.plain()?;
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
    let mut streams = Vec::new();
    for (family, pod) in every(SHOP) {
        streams.push((pod, lab.open_stream(pod, Outside::Far, family)?));
    }
    for number in lab.node_numbers() {
        lab.allow_announcing(number, false)?;
    }
    blocked(lab, &SHOP, &Family::BOTH)?;
    let capture = lab.capture()?;
    for (pod, stream) in &mut streams {
        let what = || format!("an open connection of {pod}");
        let Err(error) = stream.ask(END_GOAL) else {
            bail!("{} goes on", what());
        };
        // The latter where the reset was there before.
        let by_reset = |cause: &std::io::Error| {
            matches!(
                cause.kind(),
                ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
            )
        };
        ensure!(
            error.downcast_ref().is_some_and(by_reset),
            "{} does not end with a reset: {error:#}",
            what()
        );
    }
    blocked(lab, &SHOP, &Family::BOTH)?;
    capture.take()?.nothing()?;
    // What does leave is seen.
    leave_as_nodes(lab, &PLAIN)?;
    capture.take()?.only(|node, source| {
        let own = Family::BOTH.map(|family| net::pick(&net::node(node), family));
        own.contains(&source)
    })?;
    for number in lab.node_numbers() {
        lab.allow_announcing(number, true)?;
    }
    settle(lab, &SHOP, vips, Before::Same)
}

fn single_stack(stage: &mut Stage) -> Result<()> {
    stage.installed()?;
    stage.pods(&["single-1", "single-2"], "single")?;
    let lab = &stage.lab;
    let pods = ["single-1", "single-2"];
    let vips = lab.create_service(&ServiceSpec::new("single").families(&[Family::V4]))?;
    lab.label_service("single", true)?;
    let vip = vip_of(&vips, Family::V4)?;
    for pod in pods {
        settle_one(lab, pod, Family::V4, vip, Before::Nodes)?;
        let node = node_of(lab, pod, Family::V6)?;
        let seen = lab.source_seen(pod, Outside::Far, Family::V6, Protocol::Tcp)?;
        ensure!(seen.address() == Some(node), "{pod} by IPv6: {seen}");
    }
    lab.delete_service("single")
}

fn shared_vip(stage: &mut Stage) -> Result<()> {
    stage.installed()?;
    let lab = &mut stage.lab;
    let names = ["share-1", "share-2"];
    for (number, name) in (1_u16..).zip(names) {
        lab.create_pod(name, usize::from(number), name)?;
        let service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "labels": {EGRESS_LABEL: "true"},
                         "annotations": {"metallb.io/allow-shared-ip": "both",
                                         "metallb.io/loadBalancerIPs": "192.0.2.240"}},
            "spec": {"type": "LoadBalancer", "selector": {"app": name}, "ipFamilies": ["IPv4"],
                     "ports": [{"port": 1000 + number, "targetPort": PORT}]},
        });
        lab.api().create(SERVICES, &service)?;
    }
    let vip: IpAddr = "192.0.2.240".parse()?;
    for name in names {
        settle_one(lab, name, Family::V4, vip, Before::Nodes)?;
    }
    // One of them goes: the other keeps the VIP.
    lab.delete_service("share-1")?;
    let node = node_of(lab, "share-1", Family::V4)?;
    settle_one(lab, "share-1", Family::V4, node, Before::Vips(&[vip]))?;
    let seen = lab.source_seen("share-2", Outside::Far, Family::V4, Protocol::Tcp)?;
    ensure!(seen.address() == Some(vip), "share-2: {seen}");
    lab.delete_service("share-2")?;
    names.iter().try_for_each(|name| lab.delete_pod(name))
}

/// Slices that claim another's pod, a node, the loopback, and nonsense for an egress Service.
fn captured(stage: &mut Stage) -> Result<()> {
    stage.plain()?;
    stage.shop()?;
    let lab = &stage.lab;
    let victim = lab.pod("plain-2")?.address(Family::V4).to_string();
    let slice = |name: &str, addresses: &[&str], target: serde_json::Value| {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": name, "labels": {EGRESS_LABEL: "true", "kubernetes.io/service-name": "shop"}},
            "endpoints": addresses.iter().map(|address| json!({
                "addresses": [address], "targetRef": target, "nodeName": "node2"
            })).collect::<Vec<_>>(),
            "ports": [],
        })
    };
    let foreign = json!({"kind": "Pod", "name": "plain-2", "namespace": "kube-system"});
    for object in [
        slice("by-hand", &[&victim], serde_json::Value::Null),
        slice("of-another-namespace", &[&victim], foreign),
        slice(
            "of-another-pod",
            &[&victim],
            json!({"kind": "Pod", "name": "x", "namespace": "default"}),
        ),
        slice(
            "of-a-node",
            &["192.0.2.12"],
            json!({"kind": "Pod", "name": "x", "namespace": "default"}),
        ),
    ] {
        lab.api().create(SLICES, &object)?;
    }
    for text in [
        "stands for nothing, not for a Pod",
        "stands for Pod kube-system/plain-2 of another namespace",
        "address of another Pod, default/plain-2",
        "a hostNetwork pod leaves as its node",
    ] {
        eventually(SOON, &format!("told: {text}"), || {
            Ok(lab.agent_log(2).contains(text).then_some(()))
        })?;
    }
    leave_as_nodes(lab, &PLAIN)?;
    let seen = lab.ask_from_node(2, Outside::Far.address(Family::V4), Protocol::Tcp)?;
    ensure!(
        seen.address() == Some(net::pick(&net::node(2), Family::V4)),
        "node2: {seen}"
    );
    for name in [
        "by-hand",
        "of-another-namespace",
        "of-another-pod",
        "of-a-node",
    ] {
        lab.api().delete(&format!("{SLICES}/{name}"))?;
    }
    Ok(())
}

fn without_gateway(stage: &mut Stage) -> Result<()> {
    stage.installed()?;
    stage.pods(&["lone-1"], "lone")?;
    let lab = &stage.lab;
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "lone", "labels": {EGRESS_LABEL: "true"}},
        "spec": {"type": "LoadBalancer", "loadBalancerClass": "example.com/nobody", "selector": {"app": "lone"},
                 "ipFamilies": ["IPv4"], "ports": [{"port": PORT}]},
    });
    lab.api().create(SERVICES, &service)?;
    let status = json!({"status": {"loadBalancer": {"ingress": [{"hostname": "lb.example"}]}}});
    lab.api()
        .patch(&format!("{SERVICES}/lone/status"), &status)?;
    let is_blocked = || blocked(lab, &["lone-1"], &[Family::V4]);
    is_blocked()?;
    eventually(SOON, "the host name is told", || {
        Ok(lab
            .agent_log(1)
            .contains("the ingress is the host name lb.example")
            .then_some(()))
    })?;
    // A VIP that nobody announces is no way out either.
    let status = json!({"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.239"}]}}});
    lab.api()
        .patch(&format!("{SERVICES}/lone/status"), &status)?;
    eventually(SOON, "the missing announcer is told", || {
        Ok(lab
            .agent_log(1)
            .contains("no node announces the VIP")
            .then_some(()))
    })?;
    is_blocked()?;
    let annotate = |value: &str| {
        lab.patch_service(
            "lone",
            &json!({"metadata": {"annotations": {"metaleg.de/on-no-gateway": value}}}),
        )
    };
    // `kubectl describe service` shows it, once for all nodes.
    eventually(SOON, "an Event tells it", || {
        let events = lab.kubectl(&["describe", "service", "lone"])?;
        Ok((events.contains("HostnameIngress") && events.contains("NoAnnouncer")).then_some(()))
    })?;
    annotate("node-address")?;
    settle_as_nodes(lab, &["lone-1"], Before::Same)?;
    annotate("perhaps")?;
    is_blocked()?;
    eventually(SOON, "the strange value is told", || {
        let log = lab.agent_log(1);
        Ok(log
            .contains("`perhaps` is neither reject nor node-address")
            .then_some(()))
    })?;
    lab.delete_service("lone")?;
    stage.lab.delete_pod("lone-1")
}

/// Slices come late: without the controller that writes them, what is known is known from the pods themselves.
fn new_pods(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage { lab, vips, .. } = stage;
    let controller = "kube-controller-manager";
    let gateway = lab.wait_for_announcer(vips[0], None)?;
    lab.kill(controller)?;
    let pods = ["early-1", "early-2", "early-3"];
    let mut elsewhere = Vec::new();
    for (number, pod) in (1..).zip(pods) {
        lab.create_pod(pod, number, "shop")?;
        for family in Family::BOTH {
            let vip = vip_of(vips, family)?;
            if number == gateway {
                settle_one(lab, pod, family, vip, Before::Nodes)?;
                continue;
            }
            elsewhere.push((pod, family));
            let (address, n) = match family {
                Family::V4 => (lab.pod(pod)?.address(family), 4),
                Family::V6 => (lab.pod(pod)?.address(family), 6),
            };
            let known = format!(
                "nft get element {} {}{n} '{{ {address} }}' 2>/dev/null || ipset test {}{n} {address}",
                names::TABLE,
                names::EGRESS_SET,
                names::EGRESS_IPSET,
            );
            eventually(SOON, &format!("node{number} knows {pod}"), || {
                lab.node(number).sh(&known).map(Some)
            })?;
        }
    }
    // Their gateway does not know them yet, and drops what they send rather than to lend them its address.
    let capture = lab.capture()?;
    let names: Vec<&str> = elsewhere.iter().map(|(pod, _)| *pod).collect();
    let dialers = lab.dialers(&names)?;
    std::thread::scope(|scope| {
        let dials: Vec<_> = dialers
            .iter()
            .zip(&elsewhere)
            .flat_map(|(dialer, (_, family))| {
                Protocol::ALL.map(|protocol| {
                    scope.spawn(move || dialer.ask(Outside::Far, *family, protocol))
                })
            })
            .collect();
        dials.into_iter().try_for_each(|dial| {
            let seen = dial
                .join()
                .map_err(|_| anyhow::anyhow!("a dialer panicked"))??;
            ensure!(seen.address().is_none(), "let out: {seen}");
            Ok(())
        })
    })?;
    // What does leave is seen.
    leave_as(lab, &SHOP, vips)?;
    capture
        .take()?
        .only(|node, source| node == gateway && vips.contains(&source))?;
    lab.restart(controller)?;
    settle(lab, &pods, vips, Before::Same)?;
    leave_as(lab, &pods, vips)?;
    pods.iter().try_for_each(|pod| lab.delete_pod(pod))
}
