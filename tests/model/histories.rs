//! What a node goes through: clusters that follow each other, restarts with other settings, agents that die half way,
//! VIPs that were elsewhere for a while; and what damage leaves.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use metaleg::cluster::View;
use metaleg::plan::slots::Slots;
use metaleg::plan::{Desired, plan};
use metaleg::settings::Settings;
use metaleg::state::{
    Family, FamilyState, KernelState, PodState, Remnant, Skeleton, Table, Traits,
};
use proptest::prelude::*;

use crate::data_path::Backend;
use crate::fixtures::ip;
use crate::fixtures::worlds::{
    NODES, World, any_settings, any_world, calico_pods, name_of, pod_address, vip,
};

/// A cluster that a node has to follow, and what happens on the way there.
#[derive(Clone)]
pub(crate) struct Moment {
    pub(crate) view: View,
    pub(crate) settings: Settings,
    /// The agent is started anew: it reads the kernel, and trusts nothing that came about before.
    pub(crate) restarted: bool,
    /// VIPs that were elsewhere for a while.
    pub(crate) interrupted: BTreeSet<IpAddr>,
    /// What another backend left.
    pub(crate) remnants: BTreeSet<Remnant>,
    /// The agent dies after so many steps, and is started anew.
    pub(crate) death: Option<usize>,
}

/// One line for each object: what proptest shows is read by people.
impl fmt::Debug for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let view = &self.view;
        writeln!(
            f,
            "restarted {} after interruptions of {:?}",
            self.restarted, self.interrupted
        )?;
        writeln!(
            f,
            "  with remnants {:?}, death {:?}",
            self.remnants, self.death
        )?;
        let s = &self.settings;
        let flags = (s.filter_endpoints_for_node, s.guard_transit, s.strict_start);
        let places = (s.rule_priority, s.table_offset, &s.lan_interface);
        writeln!(f, "  rules, tables and LAN {places:?}")?;
        writeln!(
            f,
            "  filter, guard, strict {flags:?}, {:?}, {:?}",
            s.mask, s.excluded
        )?;
        for (name, node) in &view.nodes {
            let at = (&node.addresses, &node.pod_cidrs);
            writeln!(
                f,
                "  {name}: {at:?} boot {:?} programmed {:?}",
                node.boot, node.programmed
            )?;
        }
        for (key, service) in &view.services {
            writeln!(f, "  Service {key}: {service:?}")?;
        }
        for (key, slice) in &view.slices {
            for endpoint in &slice.endpoints {
                writeln!(f, "  slice {key} of {}: {endpoint:?}", slice.service)?;
            }
        }
        for (key, pod) in &view.pods {
            writeln!(f, "  own pod {key}: {pod:?}")?;
        }
        writeln!(f, "  announcers {:?}", view.announcers)?;
        let nets = (&view.service_cidrs, &view.pod_pools);
        writeln!(
            f,
            "  Service and pod networks {nets:?}, links {:?}",
            view.interfaces
        )
    }
}

impl Moment {
    /// Nothing special happens.
    pub(crate) fn of(view: View, settings: Settings) -> Moment {
        Moment {
            view,
            settings,
            restarted: false,
            interrupted: BTreeSet::new(),
            remnants: BTreeSet::new(),
            death: None,
        }
    }

    /// As its agent finds or remembers the kernel.
    pub(crate) fn found(&self, kernel: &KernelState, restarted: bool) -> KernelState {
        let mut found = kernel.clone();
        if restarted {
            found.doubt = true;
            // Nobody listened before.
            found.interrupt(&self.view.announcers.keys().copied().collect());
        }
        found.interrupt(&self.interrupted);
        found
    }

    pub(crate) fn by(&self) -> Backend {
        match self.view.traits.marks_before_dnat {
            true => Backend::Iptables,
            false => Backend::Nftables,
        }
    }

    pub(crate) fn plan(&self, slots: &Slots) -> Desired {
        plan(&self.view, &self.settings, &Family::ALL.into(), slots)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct History {
    pub(crate) by: Backend,
    /// The first moment is the agent's first on this node; else it is what the node is like when it begins.
    pub(crate) from_nothing: bool,
    pub(crate) moments: Vec<Moment>,
}

/// A kernel without anything of ours.
pub(crate) fn nothing() -> KernelState {
    KernelState {
        families: Family::ALL
            .map(|family| (family, FamilyState::default()))
            .into(),
        ..KernelState::default()
    }
}

/// All pods, of this node and of others; which of them are egress pods is the Services' matter.
pub(crate) fn all_pods(family: Family) -> impl Iterator<Item = IpAddr> {
    let of_nodes = (1..=NODES).flat_map(move |n| [11, 12].map(|last| pod_address(family, n, last)));
    of_nodes.chain(calico_pods(family))
}

/// Always outside; outside unless the pod networks are unknown or it is listed; a node; a pod; cloud metadata or
/// something else that is never outside; a ClusterIP that nobody translated.
pub(crate) fn destinations(family: Family) -> [IpAddr; 6] {
    match family {
        Family::V4 => [
            "203.0.113.7",
            "10.9.0.1",
            "192.0.2.12",
            "10.244.1.99",
            "169.254.169.254",
            "10.96.0.10",
        ],
        Family::V6 => [
            "2001:db8:f::7",
            "fd09::1",
            "2001:db8:1::12",
            "fd00:10:244:1::63",
            "ff05::2",
            "fd00:10:96::a",
        ],
    }
    .map(ip)
}

pub(crate) fn pairs(family: Family) -> impl Iterator<Item = (IpAddr, IpAddr)> {
    all_pods(family).flat_map(move |pod| destinations(family).map(|to| (pod, to)))
}

fn any_remnants() -> impl Strategy<Value = BTreeSet<Remnant>> {
    let all = vec![
        Remnant::IptablesNft,
        Remnant::Ipsets,
        Remnant::EarlierRelease,
    ];
    let some = proptest::sample::subsequence(all, 0..=3);
    some.prop_map(|some| some.into_iter().collect())
}

/// What the node sees of a world; besides, whether marks are set before DNAT, whether others use the mask, and whether the
/// node was a gateway a moment ago.
fn seen(world: &World, settings: &Settings, flags: (bool, bool, bool)) -> View {
    let (marks_before_dnat, mask_is_shared, was_gateway) = flags;
    let mut view = world.seen_from(&settings.node_name);
    view.traits = Traits {
        marks_before_dnat,
        mask_is_shared,
    };
    let mut announcers = view.announcers.values();
    view.lingers = was_gateway;
    view.is_gateway = was_gateway || announcers.any(|node| *node == settings.node_name);
    view
}

fn any_moment() -> impl Strategy<Value = Moment> {
    let vips = Family::ALL.map(|family| (0..3).map(move |n| vip(family, n)));
    let vips: Vec<IpAddr> = vips.into_iter().flatten().collect();
    (
        any_world(),
        any_settings(name_of(1)),
        prop::bool::weighted(0.3),
        proptest::sample::subsequence(vips, 0..=6),
        any_remnants(),
        prop::option::weighted(0.3, 0..40_usize),
        (any::<bool>(), prop::bool::weighted(0.2), any::<bool>()),
    )
        .prop_map(
            |(world, settings, restarted, interrupted, remnants, death, flags)| Moment {
                view: seen(&world, &settings, flags),
                settings,
                restarted,
                interrupted: interrupted.into_iter().collect(),
                remnants: remnants.into_iter().filter(|_| restarted).collect(),
                death,
            },
        )
}

pub(crate) fn any_history() -> impl Strategy<Value = History> {
    let moments = proptest::collection::vec(any_moment(), 2..4);
    (prop::bool::weighted(0.2), moments).prop_map(|(from_nothing, mut moments)| {
        // Settings are those of a start. Not promised: what happens while a start changes FIREWALL_MASK (packets with marks
        // of the old one pass the new rules as unmarked) or ROUTE_RULE_PRIORITY (the old rules reject marked packets to
        // excluded destinations, once the old exceptions are gone).
        let (mask, priority) = (moments[0].settings.mask, moments[0].settings.rule_priority);
        let mut settings = moments[0].settings.clone();
        // A node keeps its backend.
        let (by, traits) = (moments[0].by(), moments[0].view.traits);
        for moment in &mut moments {
            moment.view.traits = traits;
            if moment.restarted {
                settings = moment.settings.clone();
                (settings.mask, settings.rule_priority) = (mask, priority);
            }
            moment.settings = settings.clone();
        }
        History {
            by,
            from_nothing,
            moments,
        }
    })
}

/// What a node should be, and what damage may have left of that, or of what it was before.
pub(crate) fn any_damage() -> impl Strategy<Value = (Moment, KernelState)> {
    let kept = proptest::collection::vec(prop::bool::weighted(0.8), 128);
    let kept = (kept.clone(), kept);
    let flags = any::<[bool; 2]>();
    (any_moment(), any_moment(), flags, kept).prop_map(
        |(old, mut moment, [changed, whole], (kept, kept_here))| {
            moment.settings = old.settings.clone();
            moment.view.traits = old.view.traits;
            let old = if changed { &old } else { &moment };
            let mut kernel = old.plan(&Slots::default()).kernel;
            let mut kept = kept.iter().chain(&kept_here).copied().cycle();
            let mut keep = || kept.next().unwrap_or(true);
            for state in kernel.families.values_mut() {
                damage(state, whole, &mut keep);
            }
            kernel.remnants.clone_from(&moment.remnants);
            (moment, kernel)
        },
    )
}

fn damage(state: &mut FamilyState, whole: bool, keep: &mut impl FnMut() -> bool) {
    state.routes.rules.retain(|_| keep());
    for table in state.routes.tables.values_mut() {
        table.fallback = keep();
        table.gateway = table.gateway.take().filter(|_| keep());
        table.throws.retain(|_| keep());
    }
    let firewall = &mut state.firewall;
    firewall.excluded.retain(|_| keep());
    firewall.remote_pods.retain(|_| keep());
    firewall.local_pods.retain(|_| keep());
    firewall.landmarks.retain(|_| keep());
    for pod in firewall.pods.values_mut() {
        pod.egress &= keep();
        pod.mark = pod.mark.filter(|_| keep());
        pod.vips.retain(|_| keep());
        pod.blocked ^= !keep();
        pod.gateway_here &= keep();
        pod.ordinary ^= !keep();
    }
    // What is empty cannot be observed.
    state.routes.tables.retain(|_, t| *t != Table::default());
    firewall.pods.retain(|_, pod| *pod != PodState::default());
    if !whole {
        firewall.vips.retain(|_| keep());
        firewall.skeleton = Skeleton::Damaged("a jump is missing".to_owned());
    }
}
