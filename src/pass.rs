//! The head of a pass: from what the cluster says, what was heard on the LAN, what the kernel holds and what earlier
//! passes have learned, to the plan.
//!
//! Pure: no I/O, and the time comes in as a value. The agent and the `plan` command call the same function.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use crate::announcers::{Announcers, Resolved, Source, Sources};
use crate::cluster::View;
use crate::cluster::index::Snapshot;
use crate::lan::{Heard, Wanted};
use crate::names::{Interface, NodeName};
use crate::plan::slots::Slots;
use crate::plan::{Desired, adopt, plan};
use crate::settings::Settings;
use crate::state::Observed;

/// What a pass leaves for the next one.
#[derive(Clone, Debug)]
pub struct Memory {
    announcers: Announcers,
    /// VIPs that this node may not have been the gateway of meanwhile, since the last pass that worked.
    interrupted: BTreeSet<IpAddr>,
    last: Option<Desired>,
}

#[derive(Debug)]
pub struct Pass {
    pub view: View,
    pub desired: Desired,
    /// What to listen for on the LAN.
    pub wanted: Wanted,
    /// VIPs of which two sources have named different announcers for long.
    pub disagreements: BTreeMap<IpAddr, [(Source, NodeName); 2]>,
    /// When the plan changes by itself.
    pub changes_at: Option<Instant>,
}

impl Memory {
    pub fn new(settings: &Settings) -> Memory {
        Memory {
            announcers: Announcers::new(settings.node_name.clone(), settings.grace),
            interrupted: BTreeSet::new(),
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
        view.surroundings.clone_from(&kernel.surroundings);
        let is_start = self.last.is_none();
        if is_start {
            let adopted = adopt::gateways(&kernel.state, &view.nodes, &settings.node_name);
            for (vip, node) in adopted {
                self.announcers.adopt(vip, node, now);
            }
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
        let slots = match &self.last {
            Some(last) => last.slots.clone(),
            None => Slots::adopt(&kernel.state, settings),
        };
        let slots = slots.avoiding(kernel.occupied.clone());
        let families = kernel.state.families.keys().copied().collect();
        Pass {
            desired: plan(&view, settings, &families, &slots),
            view,
            wanted,
            disagreements: resolved.disagreements,
            changes_at: resolved.ends,
        }
    }
}

/// What of a view is of interest on the LAN.
fn wanted(view: &View, resolved: &Resolved, settings: &Settings) -> Wanted {
    let own = view.nodes.get(&settings.node_name);
    let is_lan = |interface: &&Interface| {
        let mut addresses = own.into_iter().flat_map(|node| &node.addresses);
        addresses.any(|a| interface.nets.iter().any(|net| net.contains(a)))
    };
    let found = || Some(view.interfaces.iter().find(is_lan)?.name.clone());
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
    use std::time::Duration;

    use super::*;
    use crate::cluster::Node;
    use crate::cluster::l2status::L2Status;
    use crate::cluster::leases::BootId;
    use crate::fixtures::{With, endpoint, ip, key, service, slice};
    use crate::plan::{Blocked, Verdict};
    use crate::state::{Family, FamilyState, KernelState, PodState, TableId};

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

    fn interface(name: &str, net: &str) -> Interface {
        Interface {
            name: name.to_owned(),
            nets: [net.parse().unwrap()].into(),
        }
    }

    fn kernel() -> Observed {
        Observed {
            state: KernelState {
                families: [(Family::V4, FamilyState::default())].into(),
                ..KernelState::default()
            },
            interfaces: vec![
                interface("cni0", "10.244.1.0/24"),
                interface("eth0", "192.0.2.0/24"),
            ],
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
            routes.tables.keys().copied().collect()
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
    fn the_interface_to_listen_on_is_the_named_one_or_that_of_the_nodes_address() {
        let named = |name: Option<&str>| Settings {
            lan_interface: name.map(str::to_owned),
            ..settings()
        };
        for (lan_interface, on, expected) in [
            (None, "node1", Some("eth0")),
            (Some("lan0"), "node1", Some("lan0")),
            (None, "unknown", None),
            (Some("lan0"), "unknown", Some("lan0")),
        ] {
            let settings = Settings {
                node_name: NodeName(on.to_owned()),
                ..named(lan_interface)
            };
            let view = View {
                interfaces: kernel().interfaces,
                ..facts().view
            };
            let wanted = wanted(&view, &Resolved::default(), &settings);
            assert_eq!(wanted.interface.as_deref(), expected);
            assert_eq!(wanted.own, Some(settings.node_name));
        }
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
