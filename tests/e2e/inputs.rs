//! What Services, slices and settings may say, in one cluster whose agents have a single bit of the mark: every
//! gateway is one beyond the marks, and every pod is routed by its address.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use metaleg_lab::probe::{PORT, Protocol, http_get};
use metaleg_lab::{EGRESS_LABEL, Family, Lab, Outside, SOON, ServiceSpec, eventually, net};
use serde_json::json;

use crate::Suite;
use crate::rows::{PLAIN, SHOP, every, leave_as, leave_as_nodes, settle, settle_as_nodes, vip_of};

/// One bit of the mark.
pub(crate) const NARROW_MASK: &str = "0x00100000";
/// Within 25 s: TCP asks after 10 s of silence, and three times more every 5 s.
const SILENCE: Duration = Duration::from_secs(30);
const SERVICES: &str = "/api/v1/namespaces/default/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
const STATUSES: &str = "servicel2statuses.metallb.io";

pub(crate) fn run(suite: &mut Suite, lab: &mut Lab) {
    let mut vips = Vec::new();
    suite.row(
        "without MetalLB's ServiceL2Status agents wait and say so; when it comes they go on",
        || {
            for (number, (shop, plain)) in (1..).zip(SHOP.into_iter().zip(PLAIN)) {
                lab.create_pod(shop, number, "shop")?;
                lab.create_pod(plain, number, "back")?;
            }
            vips = lab.create_service(&ServiceSpec::new("shop"))?;
            crd_comes_late(lab)?;
            lab.label_service("shop", true)?;
            settle(lab, &SHOP, &vips)
        },
    );
    suite.row(
        "with one bit of the mark every pod is routed by its address",
        || {
            leave_as(lab, &SHOP, &vips)?;
            let gateway = lab.wait_for_announcer(vips[0], None)?;
            for number in lab.node_numbers().filter(|number| *number != gateway) {
                let rules = lab.node(number).sh("ip rule; ip -6 rule")?;
                for family in Family::BOTH {
                    let from = format!(
                        "from {} fwmark 0x100000/0x100000",
                        lab.pod(SHOP[number - 1])?.address(family)
                    );
                    ensure!(rules.contains(&from), "no {from:?} in {rules}");
                }
            }
            Ok(())
        },
    );
    suite.row("only the value `true` of the label counts", || {
        lab.create_service(&ServiceSpec::new("back"))?;
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
            settle_as_nodes(lab, &SHOP)?;
            leave_as_nodes(lab, &PLAIN)?;
            lab.label_service("shop", true)?;
            settle(lab, &SHOP, &vips)?;
        }
        Ok(())
    });
    suite.row(
        "of two Services the older one has a pod; without it the other has",
        || {
            let pods = json!({"app": "shop"});
            lab.patch_service("back", &json!({"spec": {"selector": pods}}))?;
            lab.label_service("back", true)?;
            let younger = lab.wait_for_vips("back")?;
            let is_told = |number| {
                lab.agent_log(number)
                    .contains("belongs to Service default/shop, which is older")
            };
            for number in lab.node_numbers() {
                eventually(SOON, "the younger Service is told", || {
                    Ok(is_told(number).then_some(()))
                })?;
            }
            leave_as(lab, &SHOP, &vips)?;
            lab.label_service("shop", false)?;
            settle(lab, &SHOP, &younger)?;
            leave_as(lab, &SHOP, &younger)?;
            lab.label_service("shop", true)?;
            settle(lab, &SHOP, &vips)?;
            lab.delete_service("back")
        },
    );
    suite.row(
        "a family that the Service does not have is not touched",
        || single_stack(lab),
    );
    suite.row("two Services share a VIP", || shared_vip(lab));
    suite.row("a hand-made slice captures nobody", || captured(lab));
    suite.row(
        "a Service with a host name lets nothing out, unless it says so",
        || without_gateway(lab),
    );
    suite.row(
        "an address that another pod gets at once is the other pod's",
        || {
            let addresses = lab.pod("shop-1")?.addresses.clone();
            lab.replace_pod("shop-1", "next-1", "other")?;
            ensure!(
                lab.pod("next-1")?.addresses == addresses,
                "the address is another one"
            );
            settle_as_nodes(lab, &["next-1"])?;
            lab.replace_pod("next-1", "shop-1", "shop")?;
            settle(lab, &SHOP, &vips)?;
            leave_as(lab, &SHOP, &vips)
        },
    );
    suite.row(
        "a pod that no slice names yet never leaves as its node",
        || {
            let result = new_pods(lab, &vips);
            if result.is_err() {
                lab.mend()?;
            }
            result
        },
    );
    suite.row("a pod that has completed is no egress pod any more", || {
        let pods = "/api/v1/namespaces/default/pods";
        // What a kubelet says of a pod whose containers have ended.
        let not = |kind: &str| json!({"type": kind, "status": "False", "reason": "PodCompleted"});
        let completed = json!({"status": {
            "phase": "Succeeded", "conditions": [not("Ready"), not("ContainersReady")]
        }});
        lab.create_pod("job-1", 1, "shop")?;
        settle(lab, &["job-1"], &vips)?;
        lab.api()
            .patch(&format!("{pods}/job-1/status"), &completed)?;
        settle_as_nodes(lab, &["job-1"])?;
        lab.delete_pod("job-1")
    });
    suite.row(
        "an API server that goes without a word is noticed, and heard again when it is back",
        || {
            let result = silent_api_server(lab, &vips);
            // After a failure it is still there.
            lab.node(1)
                .output("nft delete table inet silence 2>/dev/null")?;
            result
        },
    );
    suite.row(
        "destinations that the operator excludes are not egress, and again are",
        || {
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
                let node = net::pick(&net::node(lab.pod(pod)?.node), family);
                eventually(
                    SOON,
                    &format!("{pod} leaves as {node} to what is excluded"),
                    || {
                        let seen = lab.source_seen(pod, Outside::Far, family, Protocol::Tcp)?;
                        Ok((seen.address() == Some(node)).then_some(()))
                    },
                )?;
            }
            settle(lab, &SHOP, &vips)?;
            for (pod, stream) in &mut streams {
                let went_on = stream.ask(Duration::from_secs(2)).is_ok();
                ensure!(!went_on, "a connection of {pod} goes on");
            }
            let sources = capture.take()?;
            let wrong = sources
                .iter()
                .find(|((_, source), _)| pods.contains(source));
            ensure!(wrong.is_none(), "packets leaked: {wrong:?}");
            lab.configure_agents(&[("FIREWALL_EXCLUDE_DST_CIDRS", "auto")])?;
            settle(lab, &SHOP, &vips)?;
            leave_as(lab, &SHOP, &vips)
        },
    );
    suite.row("an interface that goes down and comes up again is a way again", || {
        let gateway = lab.wait_for_announcer(vips[0], None)?;
        let number = lab.node_numbers().find(|n| *n != gateway).context("one node only")?;
        // What a node's own network configuration would bring back comes back with it.
        lab.node(number).sh(
            "sysctl -qw net.ipv6.conf.eth0.keep_addr_on_down=1
             ip route save table main > /run/routes4; ip -6 route save table main > /run/routes6
             ip link set eth0 down; sleep 0.3; ip link set eth0 up
             ip route restore < /run/routes4 2>/dev/null || true; ip -6 route restore < /run/routes6 2>/dev/null || true",
        )?;
        settle(lab, &SHOP, &vips)?;
        leave_as(lab, &SHOP, &vips)
    });
}

fn crd_comes_late(lab: &mut Lab) -> Result<()> {
    let crd = lab.kubectl(&["get", "crd", STATUSES, "-o", "json"])?;
    let mut crd: serde_json::Value = serde_json::from_str(&crd)?;
    crd["metadata"] = json!({"name": STATUSES});
    crd.as_object_mut().context("no object")?.remove("status");
    lab.kubectl(&["delete", "crd", STATUSES, "--wait=true"])?;
    lab.apply_metaleg()?;
    for number in lab.node_numbers() {
        eventually(SOON, "the agent says what it waits for", || {
            let answer = http_get(lab.node(number), 21794, "/readyz")?;
            let is_told = answer.starts_with("HTTP/1.1 503")
                && answer.contains("ServiceL2Statuses")
                && answer.contains("is a MetalLB installed");
            ensure!(is_told, "{answer}");
            Ok(Some(()))
        })?;
    }
    lab.api().create(
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
        &crd,
    )?;
    lab.wait_for_agents()
}

/// Slices come late: without the controller that writes them, what is known is known from the pods themselves.
fn new_pods(lab: &mut Lab, vips: &[IpAddr]) -> Result<()> {
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
                eventually(SOON, &format!("{pod} leaves as {vip}"), || {
                    let seen = lab.source_seen(pod, Outside::Far, family, Protocol::Tcp)?;
                    Ok((seen.address() == Some(vip)).then_some(()))
                })?;
                continue;
            }
            elsewhere.push((pod, family));
            let (address, set) = match family {
                Family::V4 => (lab.pod(pod)?.address(family), "pods4"),
                Family::V6 => (lab.pod(pod)?.address(family), "pods6"),
            };
            eventually(SOON, &format!("node{number} knows {pod}"), || {
                let get = format!("nft get element inet metaleg {set} '{{ {address} }}'");
                lab.node(number).sh(&get).map(Some)
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
            .map(|(dialer, (_, family))| {
                scope.spawn(|| dialer.ask(Outside::Far, *family, Protocol::Tcp))
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
    let sources = capture.take()?;
    let wrong = sources
        .iter()
        .find(|((_, source), _)| !vips.contains(source));
    ensure!(wrong.is_none(), "packets leaked: {wrong:?}");
    lab.restart(controller)?;
    settle(lab, &pods, vips)?;
    leave_as(lab, &pods, vips)?;
    pods.iter().try_for_each(|pod| lab.delete_pod(pod))
}

fn single_stack(lab: &mut Lab) -> Result<()> {
    lab.create_pod("single-1", 1, "single")?;
    lab.create_pod("single-2", 2, "single")?;
    let pods = ["single-1", "single-2"];
    let vips = lab.create_service(&ServiceSpec::new("single").families(&[Family::V4]))?;
    lab.label_service("single", true)?;
    let vip = vip_of(&vips, Family::V4)?;
    for pod in pods {
        eventually(SOON, &format!("{pod} leaves as {vip}"), || {
            let seen = lab.source_seen(pod, Outside::Far, Family::V4, Protocol::Tcp)?;
            Ok((seen.address() == Some(vip)).then_some(()))
        })?;
        let node = net::pick(&net::node(lab.pod(pod)?.node), Family::V6);
        let seen = lab.source_seen(pod, Outside::Far, Family::V6, Protocol::Tcp)?;
        ensure!(seen.address() == Some(node), "{pod} by IPv6: {seen}");
    }
    lab.delete_service("single")
}

fn shared_vip(lab: &mut Lab) -> Result<()> {
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
        eventually(SOON, &format!("{name} leaves as {vip}"), || {
            let seen = lab.source_seen(name, Outside::Far, Family::V4, Protocol::Tcp)?;
            Ok((seen.address() == Some(vip)).then_some(()))
        })?;
    }
    // One of them goes: the other keeps the VIP.
    lab.delete_service("share-1")?;
    eventually(
        SOON,
        "the pod of the deleted Service leaves as its node",
        || {
            let seen = lab.source_seen("share-1", Outside::Far, Family::V4, Protocol::Tcp)?;
            let node = net::pick(&net::node(1), Family::V4);
            Ok((seen.address() == Some(node)).then_some(()))
        },
    )?;
    let seen = lab.source_seen("share-2", Outside::Far, Family::V4, Protocol::Tcp)?;
    ensure!(seen.address() == Some(vip), "share-2: {seen}");
    lab.delete_service("share-2")
}

/// As when its machine loses power: no packet says that connections have ended.
fn silent_api_server(lab: &mut Lab, vips: &[IpAddr]) -> Result<()> {
    let before = lab.agent_log(1).len();
    let is_told = |lab: &Lab, text: &str| {
        let log = lab.agent_log(1);
        log.get(before..).is_some_and(|log| log.contains(text))
    };
    lab.node(1).sh("nft 'table inet silence { \
         chain answers { type filter hook input priority raw; tcp sport 6443 drop; }; \
         chain questions { type filter hook output priority raw; tcp dport 6443 drop; }; \
     }'")?;
    eventually(SILENCE, "the silence is told", || {
        Ok(is_told(lab, "the API server does not answer").then_some(()))
    })?;
    leave_as(lab, &SHOP, vips)?;
    lab.node(1).sh("nft delete table inet silence")?;
    lab.create_pod("after-1", 1, "shop")?;
    settle(lab, &["after-1"], vips)?;
    // A watch that goes on says nothing before something changes.
    ensure!(
        is_told(lab, "the API server answers again"),
        "not told that the API server is back"
    );
    lab.delete_pod("after-1")
}

/// Slices that claim another's pod, a node, the loopback, and nonsense for an egress Service.
fn captured(lab: &Lab) -> Result<()> {
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

fn without_gateway(lab: &mut Lab) -> Result<()> {
    lab.create_pod("lone-1", 1, "lone")?;
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
    let is_rejected = || {
        eventually(SOON, "the pod is rejected", || {
            let seen = lab.source_seen("lone-1", Outside::Far, Family::V4, Protocol::Tcp)?;
            Ok(seen.is_rejected().then_some(()))
        })
    };
    is_rejected()?;
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
    is_rejected()?;
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
    settle_as_nodes(lab, &["lone-1"])?;
    annotate("perhaps")?;
    is_rejected()?;
    eventually(SOON, "the strange value is told", || {
        let log = lab.agent_log(1);
        Ok(log
            .contains("`perhaps` is neither reject nor node-address")
            .then_some(()))
    })?;
    lab.delete_service("lone")
}
