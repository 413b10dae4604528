//! Nothing is lost when things move, restart or die.
//!
//! Pods on every node have connections that go on all the time. At the outside of every node packets are counted by
//! their source: one with another address than the VIP, or from another node than the gateway, is a failure, whatever
//! became of its connection.

mod deaths;
mod endings;
mod moves;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use metaleg_lab::capture::Capture;
use metaleg_lab::traffic::{Kind, Suffered, Traffic};
use metaleg_lab::{Family, KubeProxy, Lab, Masquerade, net};

use crate::runner::Group;
pub(crate) use crate::stage::SHOP;

/// Between two events. A speaker that has lost a VIP and takes it over again within 6 s does not announce it at once but
/// at its next round, up to 1.1 s later: with four nodes by turns that does not happen.
const AFTERMATH: Duration = Duration::from_secs(2);
/// How long no new connection may come through at a graceful move.
const DIAL_GOAL: Duration = Duration::from_millis(500);

/// Labs of four nodes: a VIP moves from one node to another while there are pods on both, and elsewhere.
pub(crate) fn groups() -> Vec<Group> {
    let mut groups = Vec::new();
    for backend in ["nftables", "iptables"] {
        for (question, mut rows) in [
            ("moves", moves::rows(backend)),
            ("deaths", deaths::rows(backend)),
        ] {
            if question == "deaths" {
                rows.extend(endings::rows(backend));
                rows.extend(deaths::last_rows(backend));
            }
            groups.push(Group {
                name: format!("continuity::{question}::{backend}"),
                options: Some(crate::lab(
                    4,
                    KubeProxy::Iptables,
                    Masquerade::IptablesNft,
                    &[("FIREWALL_BACKEND", backend)],
                )),
                alone: true,
                rows,
            });
        }
    }
    groups
}

/// Where a pod is when a VIP moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    OldGateway,
    NewGateway,
    Elsewhere,
    Anywhere,
}

impl Place {
    fn of(node: usize, moved: Moved) -> Place {
        match moved {
            Some((from, to)) if from != to => match node {
                node if node == from => Place::OldGateway,
                node if node == to => Place::NewGateway,
                _ => Place::Elsewhere,
            },
            _ => Place::Anywhere,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Place::OldGateway => "old gateway",
            Place::NewGateway => "new gateway",
            Place::Elsewhere => "elsewhere",
            Place::Anywhere => "any node",
        }
    }
}

/// What the pods of one place suffered from one kind of event, over all its repetitions.
#[derive(Debug, Default)]
struct Cell {
    times: usize,
    /// The longest silence of each repetition.
    silences: BTreeMap<Kind, Vec<Duration>>,
    /// Streams that broke.
    broken: usize,
    /// Packets that left a node of the place with another source than allowed.
    leaked: usize,
}

impl Cell {
    fn of(&self, kind: Kind) -> String {
        let mut sorted = self.silences.get(&kind).cloned().unwrap_or_default();
        sorted.sort();
        let ms = |silence: Option<&Duration>| silence.map_or(0, Duration::as_millis);
        let (median, longest) = (sorted.get(sorted.len() / 2), sorted.last());
        format!("{}/{} ms", ms(median), ms(longest))
    }
}

/// Event × place, in the order of the events.
#[derive(Debug, Default)]
pub(crate) struct Table {
    events: Vec<&'static str>,
    cells: BTreeMap<(&'static str, Place), Cell>,
}

impl Table {
    fn cell(&mut self, event: &'static str, place: Place) -> &mut Cell {
        if !self.events.contains(&event) {
            self.events.push(event);
        }
        self.cells.entry((event, place)).or_default()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.events.is_empty() {
            return Ok(());
        }
        write!(
            f,
            "  {:<44} {:<12} {:>5} {:>14} {:>14} {:>14} {:>7} {:>7}",
            "event (silence: median/longest)",
            "pod's place",
            "times",
            "TCP streams",
            "UDP",
            "new TCP",
            "broken",
            "leaked"
        )?;
        for event in &self.events {
            let of_event = self.cells.iter().filter(|((name, _), _)| name == event);
            for ((_, place), cell) in of_event {
                write!(
                    f,
                    "\n  {event:<44} {:<12} {:>5} {:>14} {:>14} {:>14} {:>7} {:>7}",
                    place.name(),
                    cell.times,
                    cell.of(Kind::Stream),
                    cell.of(Kind::Datagrams),
                    cell.of(Kind::Dials),
                    cell.broken,
                    cell.leaked
                )?;
            }
        }
        Ok(())
    }
}

/// Traffic of pods, and the packets that leave the nodes.
struct Watch<'a> {
    table: &'a mut Table,
    traffic: Traffic,
    capture: Capture,
    allowed: Allowed,
    /// How long an event is looked after.
    aftermath: Duration,
}

/// Which packets may leave.
#[derive(Clone, Debug, Default)]
struct Allowed {
    /// By the gateway, with these VIPs.
    vips: BTreeSet<IpAddr>,
    /// By these nodes, with the node's address.
    nodes: BTreeSet<usize>,
    /// By the gateway, with the address of one of these nodes.
    through_gateway: bool,
}

impl Allowed {
    fn vips(vips: &[IpAddr]) -> Allowed {
        Allowed {
            vips: vips.iter().copied().collect(),
            ..Allowed::default()
        }
    }

    fn and_nodes(mut self, nodes: impl IntoIterator<Item = usize>) -> Allowed {
        self.nodes.extend(nodes);
        self
    }

    /// The iptables backend has nothing like the `leak` chain for what has a translation: until a connection that is older
    /// than the label is forgotten, its packets keep the address of the pod's node, and already go through the gateway.
    fn with_limits_of(mut self, lab: &Lab) -> Allowed {
        let backend = ("FIREWALL_BACKEND", "iptables");
        self.through_gateway = lab.options().settings.contains(&backend);
        self
    }

    fn includes(&self, node: usize, source: IpAddr, moved: Moved) -> bool {
        let is_gateway = moved.is_none_or(|(from, to)| node == from || node == to);
        let is_of = |node: usize| {
            Family::BOTH
                .iter()
                .any(|family| net::pick(&net::node(node), *family) == source)
        };
        let is_relayed =
            || self.through_gateway && is_gateway && self.nodes.iter().any(|node| is_of(*node));
        self.vips.contains(&source) && is_gateway
            || self.nodes.contains(&node) && is_of(node)
            || is_relayed()
    }
}

/// The gateway before and after an event; `None` where others may have been it meanwhile.
type Moved = Option<(usize, usize)>;

/// What an event did.
struct Seen {
    suffered: Vec<Suffered>,
    /// The longest silence, by place and kind of flow.
    longest: BTreeMap<(Place, Kind), Duration>,
}

impl<'a> Watch<'a> {
    fn start(
        lab: &Lab,
        pods: &[&str],
        allowed: Allowed,
        table: &'a mut Table,
    ) -> Result<Watch<'a>> {
        let traffic = lab.traffic(pods)?;
        traffic.wait_for_signs_of_life()?;
        let capture = lab.capture()?;
        Ok(Watch {
            table,
            traffic,
            capture,
            allowed,
            aftermath: AFTERMATH,
        })
    }

    /// Does something to the lab, and notes what the pods suffered. `event` says who was the gateway.
    fn during(
        &mut self,
        lab: &mut Lab,
        name: &'static str,
        event: impl FnOnce(&mut Lab) -> Result<Moved>,
    ) -> Result<Seen> {
        let moved = self.happens(lab, event)?;
        self.note(lab, name, moved)
    }

    fn happens(
        &self,
        lab: &mut Lab,
        event: impl FnOnce(&mut Lab) -> Result<Moved>,
    ) -> Result<Moved> {
        drop(self.traffic.take());
        let moved = event(lab)?;
        std::thread::sleep(self.aftermath);
        Ok(moved)
    }

    fn note(&mut self, lab: &Lab, name: &'static str, moved: Moved) -> Result<Seen> {
        let suffered = self.traffic.take();
        let sources = self.capture.take()?;
        let mut longest: BTreeMap<(Place, Kind), Duration> = BTreeMap::new();
        for flow in &suffered {
            let place = Place::of(lab.pod(&flow.pod)?.node, moved);
            let silence = longest.entry((place, flow.kind)).or_default();
            *silence = flow.silence.max(*silence);
            if flow.broken.is_some() {
                self.table.cell(name, place).broken += 1;
            }
        }
        for ((place, kind), silence) in &longest {
            let cell = self.table.cell(name, *place);
            cell.silences.entry(*kind).or_default().push(*silence);
        }
        let places: BTreeSet<Place> = longest.keys().map(|(place, _)| *place).collect();
        for place in places {
            self.table.cell(name, place).times += 1;
        }
        let may_leave = |node, source| self.allowed.includes(node, source, moved);
        for (node, source, packets) in sources.iter() {
            if !may_leave(node, source) {
                self.table.cell(name, Place::of(node, moved)).leaked += packets.count;
            }
        }
        sources.only(may_leave)?;
        Ok(Seen { suffered, longest })
    }

    /// The same, and no connection may break or stay silent.
    fn unbroken(
        &mut self,
        lab: &mut Lab,
        name: &'static str,
        event: impl FnOnce(&mut Lab) -> Result<Moved>,
    ) -> Result<Seen> {
        let moved = self.happens(lab, event)?;
        let alive = self.traffic.wait_for_signs_of_life();
        let seen = self.note(lab, name, moved)?;
        for flow in &seen.suffered {
            if let Some(why) = &flow.broken {
                bail!("{:?} {} of {}: {why}", flow.kind, flow.family, flow.pod);
            }
        }
        alive.map(|()| seen)
    }
}

impl Seen {
    /// The silences that an event may bring.
    fn within(&self, streams: Duration, dials: Duration) -> Result<()> {
        for ((place, kind), silence) in &self.longest {
            let goal = match kind {
                Kind::Stream | Kind::Datagrams => streams,
                Kind::Dials => dials,
            };
            let place = place.name();
            ensure!(
                *silence <= goal,
                "{kind:?} silent for {silence:?} ({place})"
            );
        }
        Ok(())
    }
}
