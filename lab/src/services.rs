//! Services and their VIPs.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::pods::PODS;
use crate::probe::PORT;
use crate::{BACK_OFF, Family, Lab, eventually};

/// Label that makes a Service an egress Service.
pub const EGRESS_LABEL: &str = "metaleg.de/rewriteSrcIP";
const SERVICES: &str = "/api/v1/namespaces/default/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
/// A label that means nothing.
const HEARD: &str = "heard";

/// A LoadBalancer Service of the lab.
#[derive(Clone, Debug)]
pub struct ServiceSpec {
    /// Its name; its pods are those with the label `app` of this value.
    pub name: String,
    /// `Cluster` or `Local`.
    pub traffic_policy: &'static str,
    /// Its families.
    pub families: Vec<Family>,
}

impl ServiceSpec {
    /// A dual-stack Service whose traffic keeps the client's address.
    #[must_use]
    pub fn new(name: &str) -> ServiceSpec {
        ServiceSpec {
            name: name.to_owned(),
            traffic_policy: "Cluster",
            families: Family::BOTH.into(),
        }
    }

    /// Chooses the traffic policy.
    #[must_use]
    pub fn traffic_policy(mut self, policy: &'static str) -> ServiceSpec {
        self.traffic_policy = policy;
        self
    }

    /// Chooses the families.
    #[must_use]
    pub fn families(mut self, families: &[Family]) -> ServiceSpec {
        self.families = families.into();
        self
    }
}

impl Lab {
    /// Creates a LoadBalancer Service and waits for its VIPs.
    ///
    /// # Errors
    /// When MetalLB gives none.
    pub fn create_service(&self, spec: &ServiceSpec) -> Result<Vec<IpAddr>> {
        let families: Vec<String> = spec.families.iter().map(Family::to_string).collect();
        let policy = if families.len() > 1 {
            "RequireDualStack"
        } else {
            "SingleStack"
        };
        let service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": spec.name},
            "spec": {
                "type": "LoadBalancer", "selector": {"app": spec.name},
                "externalTrafficPolicy": spec.traffic_policy,
                "ipFamilyPolicy": policy, "ipFamilies": families,
                "ports": [{"name": "tcp", "protocol": "TCP", "port": PORT},
                          {"name": "udp", "protocol": "UDP", "port": PORT}],
            },
        });
        self.api.create(SERVICES, &service)?;
        self.wait_for_vips(&spec.name)
    }

    /// Waits until a Service has a VIP for each of its families, and returns them in the order of the families.
    ///
    /// # Errors
    /// When MetalLB gives none.
    pub fn wait_for_vips(&self, service: &str) -> Result<Vec<IpAddr>> {
        eventually(BACK_OFF, "MetalLB assigns the VIPs", || {
            let object = self.service(service)?;
            let families = object["spec"]["ipFamilies"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            let ingress = object["status"]["loadBalancer"]["ingress"]
                .as_array()
                .cloned();
            let vips: Vec<IpAddr> = ingress
                .unwrap_or_default()
                .iter()
                .filter_map(|ingress| ingress["ip"].as_str()?.parse().ok())
                .collect();
            let of = |family: &Value| {
                vips.iter()
                    .find(|vip| vip.is_ipv4() == (*family == "IPv4"))
                    .copied()
            };
            let ordered: Vec<IpAddr> = families.iter().filter_map(of).collect();
            Ok((ordered.len() == families.len() && !ordered.is_empty()).then_some(ordered))
        })
    }

    /// Waits until MetalLB's speakers and the controllers of Kubernetes hear of a change of a Service and of its pods,
    /// which have its name as label `app`: after the API server was away each asks it again in its own time.
    ///
    /// # Errors
    /// When one stays deaf.
    pub fn wait_until_heard(&self, service: &str) -> Result<()> {
        let logs = || {
            let of_node = |number| self.log(&format!("speaker-node{number}"));
            self.node_numbers().map(of_node)
        };
        let before: Vec<usize> = logs().map(|log| log.len()).collect();
        // Never the same twice; a controller copies labels to the slices.
        let label = before.iter().sum::<usize>().to_string();
        self.patch_service(service, &json!({"metadata": {"labels": {HEARD: label}}}))?;
        let reconciled = format!("\"start reconcile\":\"default/{service}\"");
        let slices = format!("{SLICES}?labelSelector=kubernetes.io/service-name={service}");
        let pods = format!("{PODS}?labelSelector=app={service}");
        eventually(BACK_OFF, "everybody hears of the Service", || {
            let mut all = logs().zip(&before);
            let speakers_hear = all.all(|(log, before)| log[*before..].contains(&reconciled));
            let slices = self.api.get(&slices)?;
            let slices = || slices["items"].as_array().into_iter().flatten();
            let label_is_known = slices().all(|s| s["metadata"]["labels"][HEARD] == *label);
            let of_slices: BTreeSet<&str> = slices()
                .flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten())
                .flat_map(|endpoint| endpoint["addresses"].as_array().into_iter().flatten())
                .filter_map(Value::as_str)
                .collect();
            let pods = self.api.get(&pods)?;
            let pods = pods["items"].as_array().into_iter().flatten();
            let of_pods: BTreeSet<&str> = pods
                .flat_map(|pod| pod["status"]["podIPs"].as_array().into_iter().flatten())
                .filter_map(|address| address["ip"].as_str())
                .collect();
            let controllers_hear = label_is_known && of_slices == of_pods;
            Ok((speakers_hear && controllers_hear).then_some(()))
        })
    }

    /// Whether there is a Service of that name.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub fn has_service(&self, name: &str) -> Result<bool> {
        let path = format!("{SERVICES}/{name}");
        Ok(self.api.request("GET", &path, None)?.is_some())
    }

    /// Whether a Service is opted in.
    ///
    /// # Errors
    /// When there is none.
    pub fn is_labelled(&self, name: &str) -> Result<bool> {
        Ok(self.service(name)?["metadata"]["labels"][EGRESS_LABEL] == "true")
    }

    fn service(&self, name: &str) -> Result<Value> {
        self.api.get(&format!("{SERVICES}/{name}"))
    }

    /// Changes a Service by a merge patch.
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn patch_service(&self, name: &str, change: &Value) -> Result<()> {
        self.api.patch(&format!("{SERVICES}/{name}"), change)
    }

    /// Opts a Service in or out.
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn label_service(&self, name: &str, egress: bool) -> Result<()> {
        let value = if egress { json!("true") } else { Value::Null };
        self.patch_service(
            name,
            &json!({"metadata": {"labels": {EGRESS_LABEL: value}}}),
        )
    }

    /// Deletes a Service.
    ///
    /// # Errors
    /// With the API server's reason.
    pub fn delete_service(&self, name: &str) -> Result<()> {
        self.api.delete(&format!("{SERVICES}/{name}"))
    }

    /// A port of a Service on the nodes.
    ///
    /// # Errors
    /// When it has none.
    pub fn node_port(&self, service: &str) -> Result<u16> {
        let port = self.service(service)?["spec"]["ports"][0]["nodePort"].as_u64();
        Ok(u16::try_from(port.context("no node port")?)?)
    }

    /// The ClusterIP of a Service in a family.
    ///
    /// # Errors
    /// When it has none.
    pub fn cluster_ip(&self, service: &str, family: Family) -> Result<IpAddr> {
        let object = self.service(service)?;
        let ips = object["spec"]["clusterIPs"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let mut ips = ips
            .iter()
            .filter_map(|ip| ip.as_str()?.parse::<IpAddr>().ok());
        ips.find(|ip| ip.is_ipv4() == (family == Family::V4))
            .context("no ClusterIP of this family")
    }
}
