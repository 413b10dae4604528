//! What the cluster's objects want, by a second and naive reading of them: nothing here comes from the plan that is
//! judged by it. Slow and simple: every question is asked of the objects anew.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use metaleg::cluster::{Endpoint, OnNoGateway, Service, Target, View};
use metaleg::names::{NodeName, ObjectKey, Reach};
use metaleg::plan::{Blocked, Verdict};
use metaleg::settings::Settings;
use metaleg::state::Family;

use crate::data_path::{Fate, Packet, Tracking, without_us};
use crate::fixtures::net;
use crate::histories::{all_pods, destinations};

/// What becomes of a pod's packets to outside on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Not an egress pod, and here: as without us.
    Ordinary,
    /// Here, not known to be ordinary yet, and asked to wait.
    Waits,
    /// Not an egress pod, and elsewhere: its own node's matter.
    Elsewhere,
    /// There is no way out.
    Rejected,
    /// With the VIP from here.
    Here(IpAddr),
    /// To a gateway, untranslated.
    Through(IpAddr),
}

/// One pod.
#[derive(Clone, Debug)]
pub(crate) struct PodTruth {
    pub(crate) way: Way,
    /// Its Service's VIP, also while there is no gateway.
    pub(crate) vip: Option<IpAddr>,
    /// Its packets begin their way on this node, or pass it as their gateway.
    pub(crate) passes: bool,
}

impl PodTruth {
    pub(crate) fn is_egress(&self) -> bool {
        !matches!(self.way, Way::Ordinary | Way::Waits | Way::Elsewhere)
    }
}

/// The truth of one family.
#[derive(Clone, Debug)]
pub(crate) struct Truth {
    pub(crate) pods: BTreeMap<IpAddr, PodTruth>,
    pub(crate) excluded: BTreeSet<IpAddr>,
    /// VIPs of Services that count.
    pub(crate) vips: BTreeSet<IpAddr>,
    pub(crate) services: BTreeMap<ObjectKey, Verdict>,
}

impl Truth {
    pub(crate) fn of(family: Family, view: &View, settings: &Settings) -> Truth {
        let reader = Reader {
            family,
            view,
            settings,
        };
        let pods: BTreeMap<IpAddr, PodTruth> =
            all_pods(family).map(|pod| (pod, reader.pod(pod))).collect();
        let excluded = destinations(family).into_iter();
        let excluded = excluded.filter(|d| reader.is_excluded(*d)).collect();
        let services = reader.services();
        Truth {
            pods,
            excluded,
            vips: services
                .iter()
                .filter_map(|(_, s)| s.vips.get(&family))
                .copied()
                .collect(),
            services: services
                .iter()
                .map(|(key, service)| ((*key).clone(), reader.verdict(service)))
                .collect(),
        }
    }

    /// Nobody has told anything.
    pub(crate) fn nothing(family: Family) -> Truth {
        let ordinary = PodTruth {
            way: Way::Ordinary,
            vip: None,
            passes: true,
        };
        Truth {
            pods: all_pods(family)
                .map(|pod| (pod, ordinary.clone()))
                .collect(),
            excluded: BTreeSet::new(),
            vips: BTreeSet::new(),
            services: BTreeMap::new(),
        }
    }

    pub(crate) fn is_excluded(&self, destination: IpAddr) -> bool {
        self.excluded.contains(&destination)
    }

    /// The fate of what a pod begins; `None` where nothing is promised here.
    pub(crate) fn wanted(&self, packet: &Packet) -> Option<Fate> {
        if self.is_excluded(packet.destination) {
            return Some(without_us(packet));
        }
        Some(match self.pods[&packet.source].way {
            Way::Ordinary => without_us(packet),
            Way::Waits => Fate::Dropped,
            Way::Elsewhere => return None,
            Way::Rejected => Fate::Rejected,
            Way::Here(vip) => Fate::Direct(vip),
            Way::Through(via) => Fate::ToGateway {
                via,
                source: packet.source,
            },
        })
    }
}

struct Reader<'a> {
    family: Family,
    view: &'a View,
    settings: &'a Settings,
}

impl<'a> Reader<'a> {
    fn me(&self) -> &'a NodeName {
        &self.settings.node_name
    }

    /// The Services that count, the oldest first.
    fn services(&self) -> Vec<(&'a ObjectKey, &'a Service)> {
        let counts = |s: &Service| s.load_balancer && s.families.contains(&self.family);
        let mut all: Vec<_> = self
            .view
            .services
            .iter()
            .filter(|(_, s)| counts(s))
            .collect();
        all.sort_by_key(|(key, s)| (s.created, key.namespace.clone(), key.name.clone()));
        all
    }

    fn pod(&self, pod: IpAddr) -> PodTruth {
        let mut services = self.services().into_iter();
        let owner =
            services.find(|(key, s)| self.is_named(key, pod) || self.is_selected(key, s, pod));
        let is_known = self.view.pods.values().any(|p| p.addresses.contains(&pod));
        let Some((key, service)) = owner.filter(|(_, service)| !self.is_released(service)) else {
            let here = is_known || is_of_node1(pod);
            let way = match here {
                true if !is_known && self.may_wait(pod) => Way::Waits,
                true => Way::Ordinary,
                false => Way::Elsewhere,
            };
            let vip = None;
            return PodTruth {
                way,
                vip,
                passes: here,
            };
        };
        let local = self.is_local(key, service, pod);
        let is_gateway = matches!(self.gateway(service), Ok((_, node, None)) if node == *self.me());
        let vip = service.vips.get(&self.family).copied();
        let way = match (vip, self.gateway(service)) {
            (None, _) if !local && !self.has_work() => Way::Elsewhere,
            (None, _) => Way::Rejected,
            (Some(vip), Ok((_, _, None))) => Way::Here(vip),
            // Its own node routes it; should it pass here, it has its VIP all the same.
            (Some(vip), _) if !local => Way::Here(vip),
            (Some(_), Ok((_, _, Some(via)))) => Way::Through(via),
            (Some(_), Err(_)) => Way::Rejected,
        };
        PodTruth {
            way,
            vip,
            passes: local || is_gateway,
        }
    }

    /// Something concerns this node: a VIP, an egress pod of its own, or pods that wait.
    fn has_work(&self) -> bool {
        let has_vip = |service: &Service| service.vips.contains_key(&self.family);
        let has_pod = |key: &ObjectKey, service: &Service| {
            !self.is_released(service)
                && all_pods(self.family).any(|pod| self.owns_local(key, service, pod))
        };
        let mut services = self.services().into_iter();
        self.settings.strict_start || services.any(|(key, s)| has_vip(s) || has_pod(key, s))
    }

    /// The endpoints of a Service's slices that stand for this pod: of its namespace, and nobody knows better.
    fn endpoints(&self, service: &ObjectKey, pod: IpAddr) -> Vec<&'a Endpoint> {
        let slices = self.view.slices.values().filter(|s| s.service == *service);
        let endpoints = slices.flat_map(|s| &s.endpoints);
        let holders = self
            .view
            .pods
            .iter()
            .filter(|(_, p)| p.addresses.contains(&pod));
        let holders: Vec<&ObjectKey> = holders.map(|(key, _)| key).collect();
        let is_of = |name: &ObjectKey| {
            name.namespace == service.namespace && (holders.is_empty() || holders.contains(&name))
        };
        let is_meant = |e: &&Endpoint| {
            e.addresses.contains(&pod.to_string())
                && matches!(&e.target, Target::Pod(name) if is_of(name))
        };
        endpoints.filter(is_meant).collect()
    }

    fn is_named(&self, service: &ObjectKey, pod: IpAddr) -> bool {
        !self.endpoints(service, pod).is_empty()
    }

    fn is_selected(&self, key: &ObjectKey, service: &Service, pod: IpAddr) -> bool {
        let has = |labels: &BTreeMap<String, String>| {
            let mut selector = service.selector.iter();
            !service.selector.is_empty() && selector.all(|(k, v)| labels.get(k) == Some(v))
        };
        self.view.pods.iter().any(|(of, p)| {
            of.namespace == key.namespace && p.addresses.contains(&pod) && has(&p.labels)
        })
    }

    fn is_local(&self, key: &ObjectKey, service: &Service, pod: IpAddr) -> bool {
        if self.is_selected(key, service, pod) || !self.settings.filter_endpoints_for_node {
            return true;
        }
        let own = self.view.nodes.get(self.me());
        let is_own = own.is_some_and(|n| n.pod_cidrs.iter().any(|net| net.contains(&pod)));
        self.endpoints(key, pod).into_iter().any(|e| match &e.node {
            Some(node) => node == self.me(),
            None => is_own,
        })
    }

    /// VIP, gateway, and its address where it is another node; or why there is none.
    fn gateway(&self, service: &Service) -> Result<(IpAddr, NodeName, Option<IpAddr>), Blocked> {
        let Some(vip) = service.vips.get(&self.family).copied() else {
            return Err(match &service.hostname {
                Some(name) => Blocked::HostnameIngress(name.clone()),
                None => Blocked::NoVip,
            });
        };
        let Some(name) = self.view.announcers.get(&vip).cloned() else {
            return Err(Blocked::NoAnnouncer);
        };
        let Some(node) = self.view.nodes.get(&name) else {
            return Err(Blocked::UnknownGateway(name));
        };
        if name == *self.me() {
            return Ok((vip, name, None));
        }
        if node.guards == Some(false) {
            return Err(Blocked::GatewayNotProgrammed(name));
        }
        match (&node.programmed, &node.boot) {
            (Some(programmed), Some(boot)) if programmed == boot => {}
            (Some(_), None) => {}
            _ => return Err(Blocked::GatewayNotProgrammed(name)),
        }
        let address = node
            .addresses
            .iter()
            .find(|a| Family::of(**a) == self.family);
        let Some(via) = address.copied() else {
            return Err(Blocked::GatewayWithoutAddress(name));
        };
        let named = self.settings.lan_interface.as_deref();
        match &self.view.reach[&via] {
            Reach::OnLink(link) if named.is_none() || named == Some(link) => {
                Ok((vip, name, Some(via)))
            }
            Reach::OnLink(link) => {
                let why = format!(
                    "on link at {link}, and LAN_INTERFACE is {}",
                    named.unwrap_or("")
                );
                Err(Blocked::GatewayOffLink(name, via, why))
            }
            reach => Err(Blocked::GatewayOffLink(name, via, reach.to_string())),
        }
    }

    fn is_released(&self, service: &Service) -> bool {
        service.on_no_gateway == OnNoGateway::NodeAddress && self.gateway(service).is_err()
    }

    fn verdict(&self, service: &Service) -> Verdict {
        match self.gateway(service) {
            Ok((vip, gateway, _)) => Verdict::Active { vip, gateway },
            Err(reason) if self.is_released(service) => Verdict::Released(reason),
            Err(reason) => Verdict::Blocked(reason),
        }
    }

    /// Pods of these networks wait until they are classified.
    fn may_wait(&self, pod: IpAddr) -> bool {
        let own = self.view.nodes.get(self.me()).into_iter();
        let nets = own.flat_map(|n| &n.pod_cidrs).chain(&self.view.pod_pools);
        self.settings.strict_start && nets.into_iter().any(|net| net.contains(&pod))
    }

    fn is_excluded(&self, destination: IpAddr) -> bool {
        let excluded = &self.settings.excluded;
        if excluded.listed.iter().any(|net| net.contains(&destination)) {
            return true;
        }
        if !excluded.auto {
            return false;
        }
        let nodes = || self.view.nodes.values();
        let is_node = nodes().any(|n| n.addresses.contains(&destination));
        let pods: Vec<_> = nodes()
            .flat_map(|n| &n.pod_cidrs)
            .chain(&self.view.pod_pools)
            .collect();
        let is_pod = pods.iter().any(|net| net.contains(&destination));
        let is_service = self
            .view
            .service_cidrs
            .iter()
            .any(|net| net.contains(&destination));
        let never = [
            "127.0.0.0/8",
            "169.254.0.0/16",
            "224.0.0.0/4",
            "255.255.255.255/32",
            "::1/128",
            "fe80::/10",
            "ff00::/8",
        ];
        let private = [
            "10.0.0.0/8",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "100.64.0.0/10",
            "fc00::/7",
        ];
        let is_in = |texts: &[&str]| texts.iter().any(|text| net(text).contains(&destination));
        // An egress pod of this node in no known network: nobody knows the pod networks.
        let is_lost = || {
            self.services().into_iter().any(|(key, service)| {
                all_pods(self.family).any(|pod| {
                    !pods.iter().any(|net| net.contains(&pod)) && self.owns_local(key, service, pod)
                })
            })
        };
        is_node || is_pod || is_service || is_in(&never) || (is_in(&private) && is_lost())
    }

    /// A pod of this node is the Service's, whatever becomes of its packets.
    fn owns_local(&self, key: &ObjectKey, service: &Service, pod: IpAddr) -> bool {
        let mut services = self.services().into_iter();
        let owner = services.find(|(k, s)| self.is_named(k, pod) || self.is_selected(k, s, pod));
        owner.is_some_and(|(k, _)| k == key) && self.is_local(key, service, pod)
    }
}

/// Where the pod really is.
pub(crate) fn is_of_node1(pod: IpAddr) -> bool {
    ["10.244.1.0/24", "fd00:10:244:1::/64"]
        .iter()
        .any(|text| net(text).contains(&pod))
}

/// A packet of a pod.
pub(crate) fn packet(source: IpAddr, destination: IpAddr, tracking: Tracking) -> Packet {
    Packet {
        source,
        host: false,
        destination,
        tracking,
    }
}
