//! The head of a pass: from what the cluster says, what was heard on the LAN, what the kernel holds and what earlier
//! passes have learned, to the plan.
//!
//! Pure: no I/O, and the time comes in as a value. The agent and the `plan` command call the same function.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::announcers::{Announcers, Resolved, Source, Sources};
use crate::cluster::View;
use crate::cluster::index::Snapshot;
use crate::lan::{Heard, Wanted};
use crate::names::{Interface, NodeName, Reach};
use crate::plan::slots::Slots;
use crate::plan::{Desired, adopt, plan};
use crate::settings::Settings;
use crate::state::{Asked, KernelState, LATE_REPLY_SECONDS, Observed, Skeleton};

/// What a pass leaves for the next one.
#[derive(Clone, Debug)]
pub struct Memory {
    announcers: Announcers,
    /// VIPs that this node may not have been the gateway of meanwhile, since the last pass that worked.
    interrupted: BTreeSet<IpAddr>,
    /// This node is a gateway. It counts as one for the grace period after, because others may learn late that it is none
    /// any more.
    gateway: Lasting,
    /// Something of ours is in the kernel. The guards stay until late replies have come.
    work: Lasting,
    last: Option<Desired>,
}

#[derive(Debug)]
pub struct Pass {
    pub view: View,
    pub desired: Desired,
    /// Whether this node is a gateway, or was one within the grace period.
    pub is_gateway: bool,
    /// What to listen for on the LAN.
    pub wanted: Wanted,
    /// VIPs of which two sources have named different announcers for long.
    pub disagreements: BTreeMap<IpAddr, [(Source, NodeName); 2]>,
    /// When the plan changes by itself.
    pub changes_at: Option<Instant>,
}

impl Pass {
    /// Whether other nodes do not know yet that this one is a gateway.
    pub fn becomes_gateway(&self, own: &NodeName) -> bool {
        let own = self.view.nodes.get(own);
        self.is_gateway && own.is_some_and(|own| own.guards != Some(true))
    }
}

impl Memory {
    pub fn new(settings: &Settings) -> Memory {
        Memory {
            announcers: Announcers::new(settings.node_name.clone(), settings.grace),
            interrupted: BTreeSet::new(),
            gateway: Lasting::default(),
            work: Lasting::default(),
            last: None,
        }
    }

    pub fn last(&self) -> Option<&Desired> {
        self.last.as_ref()
    }

    /// Keeps the plan of a pass. What was interrupted is taken up again by a pass that `worked`.
    pub fn keep(&mut self, desired: Desired, worked: bool) {
        self.last = Some(desired);
        if worked {
            self.interrupted.clear();
        }
    }

    /// Makes the plan of a pass, and notes in `kernel` which pods' connections are to be taken up anew.
    pub fn plan(
        &mut self,
        facts: Snapshot,
        heard: &BTreeMap<IpAddr, Heard>,
        kernel: &mut Observed,
        settings: &Settings,
        now: Instant,
    ) -> Pass {
        let mut view = facts.view;
        view.interfaces.clone_from(&kernel.interfaces);
        view.traits = kernel.traits;
        view.reach.clone_from(&kernel.reach);
        view.neighbours.clone_from(&kernel.neighbours);
        view.surroundings.clone_from(&kernel.surroundings);
        let is_start = self.last.is_none();
        let own = view.nodes.get(&settings.node_name);
        let is_taken_for_gateway = own.is_some_and(|own| own.guards == Some(true));
        if is_start {
            let adopted = adopt::gateways(&kernel.state, &view.nodes, &settings.node_name);
            // By its Lease, too: a run that died may have come to take everything else back.
            if is_taken_for_gateway || adopted.values().any(|node| *node == settings.node_name) {
                self.gateway = Lasting(Some(now));
            }
            for (vip, node) in adopted {
                self.announcers.adopt(vip, node, now);
            }
        }
        if facts.away {
            // A node that becomes a gateway cannot say so now. Nor can there be a pod that it does not know.
            view.nodes.values_mut().for_each(|node| node.guards = None);
        }
        let sources = Sources {
            services: &view.services,
            statuses: &facts.statuses,
            heard,
            nodes: &view.nodes,
            away: facts.away,
        };
        let resolved = self.announcers.resolve(sources, now);
        for name in &resolved.still_programmed {
            if let Some(node) = view.nodes.get_mut(name) {
                node.programmed.clone_from(&node.boot);
                node.guards = None;
            }
        }
        let wanted = wanted(&view, &resolved, settings);
        self.interrupted.extend(&resolved.interrupted);
        if is_start {
            // Nobody listened before.
            self.interrupted.extend(resolved.announcers.keys());
        }
        kernel.state.interrupt(&self.interrupted);
        view.announcers = resolved.announcers;
        let is_gateway = view
            .announcers
            .values()
            .any(|node| *node == settings.node_name);
        let (is_gateway, gateway_ends) = self.gateway.lasts(is_gateway, settings.grace, now);
        let mut families = kernel.state.families.values();
        let is_left = is_start && families.any(|f| f.firewall.skeleton != Skeleton::Absent);
        let late_replies = Duration::from_secs(LATE_REPLY_SECONDS.into());
        let has_work = is_left || guards(&kernel.state);
        (view.lingers, _) = self.work.lasts(has_work, late_replies, now);
        // Guards go when the others know that they go.
        view.is_gateway = is_gateway || is_taken_for_gateway;
        let slots = match &self.last {
            Some(last) => last.slots.clone(),
            None => Slots::adopt(&kernel.state, settings),
        };
        let slots = slots.avoiding(kernel.occupied.clone());
        let families = kernel.state.families.keys().copied().collect();
        let desired = plan(&view, settings, &families, &slots);
        // Where nothing else is left to do.
        let (_, work_ends) = self.work.lasts(guards(&desired.kernel), late_replies, now);
        let changes = [resolved.ends, gateway_ends, work_ends];
        Pass {
            desired,
            view,
            is_gateway,
            wanted,
            disagreements: resolved.disagreements,
            changes_at: changes.into_iter().flatten().min(),
        }
    }
}

/// Whether a kernel guards pods or VIPs.
fn guards(kernel: &KernelState) -> bool {
    let mut firewalls = kernel.families.values().map(|family| &family.firewall);
    firewalls.any(|firewall| !firewall.pods.is_empty() || !firewall.vips.is_empty())
}

/// What is so, or was so a moment ago.
#[derive(Clone, Copy, Debug, Default)]
struct Lasting(Option<Instant>);

impl Lasting {
    /// Whether it still counts, and until when if nothing else happens.
    fn lasts(&mut self, is_so: bool, how_long: Duration, now: Instant) -> (bool, Option<Instant>) {
        if is_so {
            self.0 = Some(now);
            return (true, None);
        }
        let until = self.0.map(|last| last + how_long);
        let until = until.filter(|until| now < *until);
        (until.is_some(), until)
    }
}

/// The addresses that a plan must know how to reach: those of the nodes, and VIPs that are in no network of an interface.
pub fn to_look_up(facts: &Snapshot, interfaces: &[Interface]) -> Asked {
    let nodes = facts.view.nodes.values();
    let nodes = nodes.flat_map(|node| &node.addresses);
    let vips = facts.view.services.values().flat_map(|s| s.vips.values());
    let vips = vips.filter(|vip| connected(**vip, interfaces).is_none());
    Asked {
        nodes: nodes.copied().collect(),
        vips: vips.copied().collect(),
    }
}

/// The interface whose network holds an address: the longest such network, as in the kernel. An address that stands for
/// itself is no network: kube-proxy in IPVS mode gives VIPs to an interface of its own.
fn connected(address: IpAddr, interfaces: &[Interface]) -> Option<&str> {
    let nets = interfaces.iter().flat_map(|interface| {
        let nets = interface.nets.iter();
        let nets = nets.filter(|net| net.contains(&address));
        let nets = nets.filter(|net| net.prefix_len() < net.max_prefix_len());
        nets.map(|net| (net.prefix_len(), interface.name.as_str()))
    });
    // Of the same length it is the first.
    let longest = nets.reduce(|one, other| if other.0 > one.0 { other } else { one });
    Some(longest?.1)
}

/// The interface on which VIPs are announced: where most of them are on link, else where this node's own address is.
fn lan<'a>(view: &'a View, own: &NodeName) -> Option<&'a str> {
    let interface = |vip: &IpAddr| {
        let on_link = || match view.reach.get(vip)? {
            Reach::OnLink(name) => Some(name.as_str()),
            Reach::Router(_) | Reach::Own | Reach::Unreachable(_) => None,
        };
        connected(*vip, &view.interfaces).or_else(on_link)
    };
    let vips = view.services.values().flat_map(|s| s.vips.values());
    let vips: BTreeSet<&IpAddr> = vips.collect();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for name in vips.into_iter().filter_map(interface) {
        *counts.entry(name).or_default() += 1;
    }
    // Of the same number it is the first by name.
    let most = counts.into_iter().rev().max_by_key(|(_, count)| *count);
    let own = || {
        let addresses = &view.nodes.get(own)?.addresses;
        let has = |link: &&Interface| addresses.iter().any(|a| link.addresses.contains(a));
        Some(view.interfaces.iter().find(has)?.name.as_str())
    };
    most.map(|(name, _)| name).or_else(own)
}

/// What of a view is of interest on the LAN.
fn wanted(view: &View, resolved: &Resolved, settings: &Settings) -> Wanted {
    let found = || lan(view, &settings.node_name).map(str::to_owned);
    let nodes = view.nodes.iter().flat_map(|(name, node)| {
        let addresses = node.addresses.iter();
        addresses.map(move |address| (*address, name.clone()))
    });
    let vips = view.services.values().flat_map(|s| s.vips.values());
    Wanted {
        interface: settings.lan_interface.clone().or_else(found),
        own: Some(settings.node_name.clone()),
        nodes: nodes.collect(),
        vips: vips
            .map(|vip| (*vip, resolved.claimed.get(vip).cloned()))
            .collect(),
        unsettled: resolved.unsettled.clone(),
        audit: settings.reconciliation_interval,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Node;
    use crate::cluster::l2status::L2Status;
    use crate::cluster::leases::BootId;
    use crate::fixtures::{With, endpoint, ip, key, service, slice};
    use crate::plan::{Blocked, Verdict};
    use crate::state::{Family, FamilyState, PodState, TableId};

    const VIPS: [&str; 2] = ["192.0.2.200", "2001:db8:1::c8"];

    fn node(n: u8) -> NodeName {
        NodeName(format!("node{n}"))
    }

    fn settings() -> Settings {
        Settings::default_on("node1")
    }

    /// Three nodes, Service `a` with a pod on node1, and no announcer.
    fn facts() -> Snapshot {
        let facts = |n: u8| Node {
            addresses: vec![IpAddr::from([192, 0, 2, 10 + n])],
            ready: true,
            boot: Some(BootId("first".to_owned())),
            programmed: Some(BootId("first".to_owned())),
            ..Node::default()
        };
        let view = View {
            nodes: (1..=3).map(|n| (node(n), facts(n))).collect(),
            ..View::default()
        };
        let [v4, v6] = VIPS;
        let endpoint = endpoint("10.244.1.11", "node1");
        Snapshot {
            view: view
                .with(service("a").created(1).vip(v4).vip(v6))
                .with(slice("a-4", "a", [endpoint])),
            ..Snapshot::default()
        }
    }

    fn announced_by(n: u8) -> Snapshot {
        let status = L2Status {
            service: key("a"),
            node: node(n),
            version: 1,
        };
        Snapshot {
            statuses: [(key("l2"), status)].into(),
            ..facts()
        }
    }

    /// With an address, and its prefix length.
    fn interface(name: &str, address: &str) -> Interface {
        let net: ipnet::IpNet = address.parse().unwrap();
        Interface {
            name: name.to_owned(),
            addresses: [net.addr()].into(),
            nets: [net.trunc()].into(),
        }
    }

    fn kernel() -> Observed {
        Observed {
            state: KernelState {
                families: [(Family::V4, FamilyState::default())].into(),
                ..KernelState::default()
            },
            interfaces: vec![
                interface("cni0", "10.244.1.1/24"),
                interface("eth0", "192.0.2.11/24"),
            ],
            reach: [2, 3]
                .map(|n| {
                    let on_link = Reach::OnLink("eth0".to_owned());
                    (IpAddr::from([192, 0, 2, 10 + n]), on_link)
                })
                .into(),
            ..Observed::default()
        }
    }

    fn pass(memory: &mut Memory, facts: Snapshot, kernel: &mut Observed, now: Instant) -> Pass {
        memory.plan(facts, &BTreeMap::new(), kernel, &settings(), now)
    }

    fn verdict(pass: &Pass) -> &Verdict {
        &pass.desired.services[&key("a")][&Family::V4]
    }

    fn through(n: u8) -> Verdict {
        Verdict::Active {
            vip: ip(VIPS[0]),
            gateway: node(n),
        }
    }

    #[test]
    fn a_start_adopts_what_the_kernel_holds_and_nothing_changes() {
        let now = Instant::now();
        let mut kernel = kernel();
        let mut memory = Memory::new(&settings());
        let before = pass(&mut memory, announced_by(3), &mut kernel, now);
        assert_eq!(*verdict(&before), through(3));
        kernel.state = before.desired.kernel.clone();
        // The object is gone, and the agent has lost its memory.
        let mut memory = Memory::new(&settings());
        let after = pass(&mut memory, facts(), &mut kernel, now);
        assert_eq!(after.desired, before.desired);
        assert_eq!(after.changes_at, Some(now + settings().grace));
        // Without the kernel nobody knows.
        let lost = pass(
            &mut Memory::new(&settings()),
            facts(),
            &mut self::kernel(),
            now,
        );
        assert_eq!(*verdict(&lost), Verdict::Blocked(Blocked::NoAnnouncer));
    }

    #[test]
    fn slots_are_those_of_the_last_plan_but_for_tables_that_others_use() {
        let now = Instant::now();
        let mut kernel = kernel();
        let mut memory = Memory::new(&settings());
        let tables = |pass: &Pass| -> Vec<TableId> {
            let routes = &pass.desired.kernel.families[&Family::V4].routes;
            let tables = routes.tables.iter();
            let to_gateways = tables.filter(|(_, table)| table.gateway.is_some());
            to_gateways.map(|(id, _)| *id).collect()
        };
        let first = pass(&mut memory, announced_by(3), &mut kernel, now);
        assert_eq!(tables(&first), [TableId(100_001)]);
        memory.keep(first.desired, true);
        let moved = pass(&mut memory, announced_by(2), &mut kernel, now);
        assert_eq!(tables(&moved), [TableId(100_002)]);
        memory.keep(moved.desired, true);
        kernel.occupied = [(Family::V4, TableId(100_002))].into();
        let avoiding = pass(&mut memory, announced_by(2), &mut kernel, now);
        assert_ne!(tables(&avoiding), [TableId(100_002)]);
    }

    #[test]
    fn guards_outlast_the_last_service_by_the_time_of_late_replies() {
        let now = Instant::now();
        let mut kernel = kernel();
        let mut memory = Memory::new(&settings());
        let skeleton = |pass: &Pass| {
            let firewall = &pass.desired.kernel.families[&Family::V4].firewall;
            assert!(firewall.pods.is_empty() && firewall.vips.is_empty());
            firewall.skeleton.clone()
        };
        let busy = pass(&mut memory, announced_by(3), &mut kernel, now);
        kernel.state = busy.desired.kernel.clone();
        memory.keep(busy.desired, true);
        let nothing = || Snapshot {
            view: View {
                services: BTreeMap::new(),
                ..facts().view
            },
            ..Snapshot::default()
        };
        let ends = now + Duration::from_secs(60);
        let unlabelled = pass(&mut memory, nothing(), &mut kernel, now);
        assert_eq!(skeleton(&unlabelled), Skeleton::Intact);
        assert_eq!(unlabelled.changes_at, Some(ends));
        kernel.state = unlabelled.desired.kernel.clone();
        memory.keep(unlabelled.desired, true);
        let last = pass(&mut memory, nothing(), &mut kernel, ends);
        assert_eq!(skeleton(&last), Skeleton::Absent);
        assert_eq!(last.changes_at, None);
        // What a run before has left waits as long.
        let mut memory = Memory::new(&settings());
        let started = pass(&mut memory, nothing(), &mut kernel, ends);
        assert_eq!(skeleton(&started), Skeleton::Intact);
    }

    #[test]
    fn a_gateway_is_one_for_the_grace_period_after() {
        let now = Instant::now();
        let mut kernel = kernel();
        let mut memory = Memory::new(&settings());
        let ends = now + settings().grace;
        for (what, announcer, at, is_gateway, changes_at) in [
            ("another node is", 3, now, false, None),
            ("this node is", 1, now, true, None),
            ("it was a moment ago", 3, now, true, Some(ends)),
            ("it was long ago", 3, ends, false, None),
        ] {
            let pass = pass(&mut memory, announced_by(announcer), &mut kernel, at);
            assert_eq!(
                (pass.view.is_gateway, pass.changes_at),
                (is_gateway, changes_at),
                "{what}"
            );
            memory.keep(pass.desired, true);
        }
    }

    #[test]
    fn what_was_interrupted_stays_so_until_a_pass_works() {
        let now = Instant::now();
        let mut kernel = kernel();
        let gateway_here = PodState {
            egress: true,
            vips: [ip(VIPS[0])].into(),
            gateway_here: true,
            ..PodState::default()
        };
        let family = kernel.state.families.get_mut(&Family::V4).unwrap();
        let pod = ip("10.244.1.11");
        family.firewall.pods.insert(pod, gateway_here);
        let held = kernel.clone();
        let is_interrupted = |kernel: &Observed| {
            let pods = &kernel.state.families[&Family::V4].firewall.pods;
            pods[&pod].interrupted
        };
        let mut memory = Memory::new(&settings());
        for (what, worked, expected) in [
            ("nobody listened before the start", false, true),
            ("the first pass has failed", true, true),
            ("the second one has worked", true, false),
        ] {
            let mut kernel = held.clone();
            let pass = pass(&mut memory, announced_by(1), &mut kernel, now);
            assert_eq!(is_interrupted(&kernel), expected, "{what}");
            memory.keep(pass.desired, worked);
        }
        let mut heard = Heard::new(node(1), now);
        heard.others = 1;
        let heard = [(ip(VIPS[0]), heard)].into();
        let mut kernel = held;
        memory.plan(announced_by(1), &heard, &mut kernel, &settings(), now);
        assert!(is_interrupted(&kernel), "another node has claimed the VIP");
    }

    #[test]
    fn a_node_that_becomes_a_gateway_gets_pods_of_others_once_it_guards() {
        let now = Instant::now();
        let mut kernel = kernel();
        let mut memory = Memory::new(&settings());
        let guarding = |guards, away| {
            let mut facts = announced_by(3);
            facts.view.nodes.get_mut(&node(3)).unwrap().guards = guards;
            facts.away = away;
            facts
        };
        let waits = Verdict::Blocked(Blocked::GatewayNotProgrammed(node(3)));
        for (what, guards, away, expected) in [
            ("it is none yet", Some(false), false, waits),
            ("it has said so", Some(true), false, through(3)),
            ("its agent never says", None, false, through(3)),
            ("it cannot say so now", Some(false), true, through(3)),
        ] {
            let pass = pass(&mut memory, guarding(guards, away), &mut kernel, now);
            assert_eq!(*verdict(&pass), expected, "{what}");
            memory = Memory::new(&settings());
        }
    }

    #[test]
    fn guards_go_when_the_others_know_that_they_go() {
        let now = Instant::now();
        let mut kernel = kernel();
        let mut memory = Memory::new(&settings());
        // It was none at its start.
        let first = pass(&mut memory, announced_by(3), &mut kernel, now);
        memory.keep(first.desired, true);
        for (guards, away, is_guarding) in [
            (Some(true), false, true),
            (Some(true), true, true),
            (Some(false), false, false),
        ] {
            let mut facts = announced_by(3);
            facts.view.nodes.get_mut(&node(1)).unwrap().guards = guards;
            facts.away = away;
            let pass = pass(&mut memory, facts, &mut kernel, now);
            assert!(!pass.is_gateway);
            assert_eq!(pass.view.is_gateway, is_guarding);
        }
    }

    #[test]
    fn a_start_whose_lease_says_that_it_guards_is_a_gateway_for_the_grace_period() {
        let now = Instant::now();
        let mut facts = announced_by(3);
        facts.view.nodes.get_mut(&node(1)).unwrap().guards = Some(true);
        // A run that died has taken back all else.
        let (mut kernel, mut memory) = (kernel(), Memory::new(&settings()));
        let mut at = |after| {
            let pass = pass(&mut memory, facts.clone(), &mut kernel, now + after);
            memory.keep(pass.desired, true);
            (pass.is_gateway, pass.view.is_gateway)
        };
        assert_eq!(at(Duration::ZERO), (true, true));
        assert_eq!(at(settings().grace), (false, true), "it says so first");
    }

    #[test]
    fn an_announcer_whose_lease_vanished_stays_gateway_for_the_grace_period() {
        let now = Instant::now();
        let mut kernel = kernel();
        let mut memory = Memory::new(&settings());
        let first = pass(&mut memory, announced_by(3), &mut kernel, now);
        memory.keep(first.desired, true);
        let mut facts = announced_by(3);
        facts.view.nodes.get_mut(&node(3)).unwrap().programmed = None;
        let ends = now + settings().grace;
        let early = pass(&mut memory, facts.clone(), &mut kernel, now);
        assert_eq!(
            (verdict(&early), early.changes_at),
            (&through(3), Some(ends))
        );
        let late = pass(&mut memory, facts, &mut kernel, ends);
        let blocked = Blocked::GatewayNotProgrammed(node(3));
        assert_eq!(*verdict(&late), Verdict::Blocked(blocked));
    }

    #[test]
    fn the_interface_to_listen_on_is_the_named_one_or_that_of_the_vips_or_of_the_nodes_address() {
        let usual = || {
            vec![
                interface("cni0", "10.244.1.1/24"),
                interface("eth0", "192.0.2.11/24"),
            ]
        };
        let with = |more: Interface| [usual(), vec![more]].concat();
        // DHCPv6 and some providers give such addresses.
        let alone = || {
            vec![
                interface("cni0", "10.244.1.1/24"),
                interface("eth0", "192.0.2.11/32"),
            ]
        };
        let on_link = [(ip(VIPS[0]), Reach::OnLink("eth7".to_owned()))];
        let by_router = [(ip(VIPS[0]), Reach::Router(ip("192.0.2.254")))];
        let cases: [(&str, _, &[_], _, _, _); 9] = [
            ("the usual", usual(), &[], None, "node1", Some("eth0")),
            ("named", usual(), &[], Some("lan0"), "node1", Some("lan0")),
            ("named", alone(), &[], Some("lan0"), "unknown", Some("lan0")),
            (
                "a VIP's network",
                usual(),
                &[],
                None,
                "unknown",
                Some("eth0"),
            ),
            (
                "the longer network",
                [vec![interface("eth8", "192.0.0.1/16")], usual()].concat(),
                &[],
                None,
                "node1",
                Some("eth0"),
            ),
            (
                "a VIP that kube-proxy has given to an interface",
                with(interface("kube-ipvs0", "192.0.2.200/32")),
                &[],
                None,
                "node1",
                Some("eth0"),
            ),
            (
                "a VIP on link",
                alone(),
                &on_link,
                None,
                "node1",
                Some("eth7"),
            ),
            (
                "its own address",
                alone(),
                &by_router,
                None,
                "node1",
                Some("eth0"),
            ),
            ("none", alone(), &by_router, None, "unknown", None),
        ];
        for (what, interfaces, reach, lan_interface, on, expected) in cases {
            let settings = Settings {
                node_name: NodeName(on.to_owned()),
                lan_interface: lan_interface.map(str::to_owned),
                ..settings()
            };
            let view = View {
                interfaces,
                reach: reach.iter().cloned().collect(),
                ..facts().view
            };
            let wanted = wanted(&view, &Resolved::default(), &settings);
            assert_eq!(wanted.interface.as_deref(), expected, "{what}");
            assert_eq!(wanted.own, Some(settings.node_name));
        }
    }

    #[test]
    fn the_interface_of_most_vips_is_listened_on() {
        let view = View {
            interfaces: vec![
                interface("eth0", "192.0.2.11/24"),
                interface("eth1", "198.51.100.11/24"),
            ],
            ..facts().view
        };
        let view = view.with(service("b").vip("198.51.100.200"));
        assert_eq!(
            lan(&view, &node(1)),
            Some("eth0"),
            "the first of the same number"
        );
        let view = view.with(service("c").vip("198.51.100.201"));
        assert_eq!(lan(&view, &node(1)), Some("eth1"));
    }

    #[test]
    fn the_way_to_nodes_is_looked_up_and_to_vips_where_no_network_of_an_interface_tells() {
        let nodes: BTreeSet<IpAddr> = (1..=3).map(|n| IpAddr::from([192, 0, 2, 10 + n])).collect();
        let mut expected = Asked {
            nodes,
            vips: [ip(VIPS[1])].into(),
        };
        assert_eq!(to_look_up(&facts(), &kernel().interfaces), expected);
        expected.vips.insert(ip(VIPS[0]));
        assert_eq!(to_look_up(&facts(), &[]), expected);
        let none = Snapshot::default();
        assert_eq!(to_look_up(&none, &kernel().interfaces), Asked::default());
    }

    #[test]
    fn every_vip_is_listened_for_and_asked_for_while_it_is_in_doubt() {
        let view = facts().view;
        let resolved = Resolved {
            // The gateway is another node than the announcer, for a while.
            announcers: [(ip(VIPS[0]), node(3))].into(),
            claimed: [(ip(VIPS[0]), node(2))].into(),
            unsettled: [ip(VIPS[1])].into(),
            ..Resolved::default()
        };
        let settings = Settings {
            reconciliation_interval: Duration::from_secs(77),
            ..settings()
        };
        let expected = Wanted {
            interface: None,
            own: Some(node(1)),
            nodes: (1..=3)
                .map(|n| (IpAddr::from([192, 0, 2, 10 + n]), node(n)))
                .collect(),
            vips: [(ip(VIPS[0]), Some(node(2))), (ip(VIPS[1]), None)].into(),
            unsettled: [ip(VIPS[1])].into(),
            audit: Duration::from_secs(77),
        };
        assert_eq!(wanted(&view, &resolved, &settings), expected);
    }
}
