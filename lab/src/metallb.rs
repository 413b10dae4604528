//! MetalLB: who announces a VIP on the LAN, and what its objects say of it.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{BACK_OFF, Lab, QUIET, SOON, eventually, net};

const EXCLUDE_LABEL: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
const SPEAKER_ROLE: &str = "/apis/rbac.authorization.k8s.io/v1/clusterroles/metallb-system:speaker";

impl Lab {
    /// The node that answers for a VIP on the wire, if any. Asked from a host that has nothing else to do with VIPs: what
    /// servers and router know of them is not touched.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn announcer(&self, vip: IpAddr) -> Result<Option<usize>> {
        let look = format!(
            "ip neigh del {vip} dev eth0 2>/dev/null || true
             ip neigh add {vip} dev eth0 nud none 2>/dev/null || true
             ip neigh change {vip} dev eth0 use 2>/dev/null || true
             for i in 1 2 3 4 5 6 7 8 9 10; do
               line=$(ip neigh show {vip} dev eth0)
               case \"$line\" in *lladdr*) break;; esac
               sleep 0.05
             done
             echo \"$line\""
        );
        // Something must be sent for the kernel to ask who has the address.
        let target = SocketAddr::new(vip, 9);
        let sent = self.control_plane.inside(move || {
            let any: IpAddr = if vip.is_ipv4() {
                [0; 4].into()
            } else {
                [0_u16; 8].into()
            };
            std::net::UdpSocket::bind((any, 0))
                .and_then(|socket| socket.send_to(b"?", target))
                .is_ok()
        })?;
        // What matters is the question, not the datagram.
        let _ = sent.join();
        let line = self.control_plane.sh(&look)?;
        Ok(self
            .node_numbers()
            .find(|number| line.contains(&net::node_mac(*number))))
    }

    /// Waits until some node, or a certain one, answers for a VIP, and returns it.
    ///
    /// # Errors
    /// When none does in time.
    pub fn wait_for_announcer(&self, vip: IpAddr, wanted: Option<usize>) -> Result<usize> {
        eventually(
            BACK_OFF,
            &format!("{vip} is announced by {wanted:?}"),
            || {
                let found = self.announcer(vip)?;
                Ok(found.filter(|node| wanted.is_none_or(|wanted| wanted == *node)))
            },
        )
    }

    /// Makes a node the only one that may announce, and waits until it does.
    ///
    /// # Errors
    /// When the VIPs do not move.
    pub fn move_announcement(&self, vips: &[IpAddr], to: usize) -> Result<()> {
        // The new one first, the present one last: in between there is always one that may, and it goes nowhere else.
        self.allow_announcing(to, true)?;
        let now = vips.first().map(|vip| self.announcer(*vip)).transpose()?;
        let mut others: Vec<usize> = self.node_numbers().filter(|n| *n != to).collect();
        others.sort_by_key(|number| now.flatten() == Some(*number));
        for number in others {
            self.allow_announcing(number, false)?;
        }
        for vip in vips {
            self.wait_for_announcer(*vip, Some(to))?;
        }
        Ok(())
    }

    /// The nodes that MetalLB's objects name as announcers of a Service.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn status_names(&self, service: &str) -> Result<Vec<String>> {
        let path = "/apis/metallb.io/v1beta1/namespaces/metallb-system/servicel2statuses";
        let path = format!("{path}?labelSelector=metallb.io/service-name={service}");
        let list = self.api.get(&path)?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let label = |item: &Value| {
            Some(
                item["metadata"]["labels"]["metallb.io/node"]
                    .as_str()?
                    .to_owned(),
            )
        };
        Ok(items.iter().filter_map(label).collect())
    }

    /// Removes MetalLB's objects about a Service's announcer, and lets speakers write none until [`Lab::allow_statuses`].
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn lose_statuses(&self, service: &str) -> Result<()> {
        self.let_speakers(&["get", "list", "watch"])?;
        let of_service = format!("--selector=metallb.io/service-name={service}");
        eventually(SOON, "MetalLB's objects are lost", || {
            let delete = ["delete", "servicel2statuses.metallb.io", &of_service];
            self.kubectl(&[&["-n", "metallb-system"], &delete[..]].concat())?;
            // A speaker that has not heard yet that it may not writes it again at once.
            std::thread::sleep(QUIET);
            Ok(self.status_names(service)?.is_empty().then_some(()))
        })
    }

    /// Lets speakers write their objects again.
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn allow_statuses(&self) -> Result<()> {
        self.let_speakers(&["*"])
    }

    /// What speakers may do with their objects.
    fn let_speakers(&self, verbs: &[&str]) -> Result<()> {
        let mut rules = self.api.get(SPEAKER_ROLE)?["rules"].clone();
        for rule in rules.as_array_mut().context("a role without rules")? {
            let kinds = rule["resources"].as_array().into_iter().flatten();
            if kinds.into_iter().any(|kind| *kind == "servicel2statuses") {
                rule["verbs"] = json!(verbs);
            }
        }
        self.api.patch(SPEAKER_ROLE, &json!({"rules": rules}))
    }

    /// Says whether a node may announce VIPs.
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn allow_announcing(&self, node: usize, allowed: bool) -> Result<()> {
        let value = if allowed { Value::Null } else { json!("true") };
        let change = json!({"metadata": {"labels": {EXCLUDE_LABEL: value}}});
        self.api
            .patch(&format!("/api/v1/nodes/node{node}"), &change)
    }
}
