//! Nothing is lost when things move, restart or die.
//!
//! Pods on every node have connections that go on all the time. At the outside of every node packets are counted by
//! their source: one with another address than the VIP is a failure, whatever became of its connection.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use metaleg_lab::capture::Capture;
use metaleg_lab::traffic::{Kind, Suffered, Traffic};
use metaleg_lab::{Family, Lab, SOON, ServiceSpec, eventually, net, say};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::Suite;
use crate::rows::{settle, settle_as_nodes};

/// A pod of the egress Service on every node.
const SHOP: [&str; 4] = ["shop-1", "shop-2", "shop-3", "shop-4"];
/// How often a VIP is moved by intent.
const MOVES: usize = 20;
/// How often the announcer's speaker crashes, and comes back: each time the VIP moves twice.
const CRASHES: usize = 3;
/// Between two events. A speaker that has lost a VIP and takes it over again within 6 s does not announce it at once but
/// at its next round, up to 1.1 s later: with four nodes by turns that does not happen.
const AFTERMATH: Duration = Duration::from_secs(2);
/// How long a stream may be silent at a graceful move: packets that are lost are sent again after 0.2 s, and 0.6 s.
const STREAM_GOAL: Duration = Duration::from_secs(1);
/// How long no new connection may come through at a graceful move.
const DIAL_GOAL: Duration = Duration::from_millis(500);
/// How long a connection that cannot go on may take to end.
const END_GOAL: Duration = Duration::from_secs(1);

/// Where a pod is when a VIP moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    OldGateway,
    NewGateway,
    Elsewhere,
    Anywhere,
}

impl Place {
    fn of(node: usize, moved: Option<(usize, usize)>) -> Place {
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
struct Table {
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

    fn print(&self) {
        say!(
            "  {:<44} {:<12} {:>5} {:>14} {:>14} {:>14} {:>7} {:>7}",
            "event (silence: median/longest)",
            "pod's place",
            "times",
            "TCP streams",
            "UDP",
            "new TCP",
            "broken",
            "leaked"
        );
        for event in &self.events {
            let of_event = self.cells.iter().filter(|((name, _), _)| name == event);
            for ((_, place), cell) in of_event {
                say!(
                    "  {event:<44} {:<12} {:>5} {:>14} {:>14} {:>14} {:>7} {:>7}",
                    place.name(),
                    cell.times,
                    cell.of(Kind::Stream),
                    cell.of(Kind::Datagrams),
                    cell.of(Kind::Dials),
                    cell.broken,
                    cell.leaked
                );
            }
        }
    }
}

/// Traffic of pods, and the packets that leave the nodes.
struct Watch<'a> {
    table: &'a mut Table,
    traffic: Traffic,
    capture: Capture,
    /// The sources that packets may have outside.
    allowed: BTreeSet<IpAddr>,
}

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
        allowed: impl IntoIterator<Item = IpAddr>,
        table: &'a mut Table,
    ) -> Result<Watch<'a>> {
        let traffic = lab.traffic(pods)?;
        traffic.wait_for_signs_of_life()?;
        let capture = lab.capture()?;
        Ok(Watch {
            table,
            traffic,
            capture,
            allowed: allowed.into_iter().collect(),
        })
    }

    /// Does something to the lab, and notes what the pods suffered. `event` says from where to where a VIP moved.
    fn during(
        &mut self,
        lab: &mut Lab,
        name: &'static str,
        event: impl FnOnce(&mut Lab) -> Result<Option<(usize, usize)>>,
    ) -> Result<Seen> {
        drop(self.traffic.take());
        let moved = event(lab)?;
        std::thread::sleep(AFTERMATH);
        self.note(lab, name, moved)
    }

    fn note(
        &mut self,
        lab: &Lab,
        name: &'static str,
        moved: Option<(usize, usize)>,
    ) -> Result<Seen> {
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
        let mut leaks = Vec::new();
        for ((node, source), packets) in &sources {
            if !self.allowed.contains(source) {
                self.table.cell(name, Place::of(*node, moved)).leaked += packets;
                leaks.push(format!("{packets} from node{node} as {source}"));
            }
        }
        ensure!(leaks.is_empty(), "packets leaked: {}", leaks.join(", "));
        ensure!(!sources.is_empty(), "no packet was seen at all");
        Ok(Seen { suffered, longest })
    }

    /// The same, and no connection may break or stay silent.
    fn unbroken(
        &mut self,
        lab: &mut Lab,
        name: &'static str,
        event: impl FnOnce(&mut Lab) -> Result<Option<(usize, usize)>>,
    ) -> Result<Seen> {
        drop(self.traffic.take());
        let moved = event(lab)?;
        std::thread::sleep(AFTERMATH);
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

/// Moves by MetalLB.
pub(crate) fn moves(suite: &mut Suite, lab: &mut Lab) {
    let mut table = Table::default();
    let vips = start(suite, lab);
    suite.row("graceful moves", || {
        let mut watch = Watch::start(lab, &SHOP, vips.clone(), &mut table)?;
        for _ in 0..MOVES {
            let seen = watch.unbroken(lab, "graceful move", |lab| {
                let from = lab.wait_for_announcer(vips[0], None)?;
                let to = from % lab.node_numbers().count() + 1;
                lab.move_announcement(&vips, to)?;
                Ok(Some((from, to)))
            })?;
            seen.within(STREAM_GOAL, DIAL_GOAL)?;
        }
        Ok(())
    });
    suite.row("the announcement flaps between two nodes", || {
        let mut watch = Watch::start(lab, &SHOP, vips.clone(), &mut table)?;
        watch.unbroken(lab, "flapping every 3 s for 20 s", |lab| {
            let from = lab.wait_for_announcer(vips[0], None)?;
            let to = from % lab.node_numbers().count() + 1;
            for turn in 0..7 {
                let next = if turn % 2 == 0 { to } else { from };
                let started = Instant::now();
                lab.move_announcement(&vips, next)?;
                std::thread::sleep(Duration::from_secs(3).saturating_sub(started.elapsed()));
            }
            Ok(Some((from, to)))
        })?;
        for number in lab.node_numbers() {
            lab.allow_announcing(number, true)?;
        }
        Ok(())
    });
    table.print();
}

/// Everything that may die: speakers, agents, the API server, a gateway.
pub(crate) fn deaths(suite: &mut Suite, lab: &mut Lab) {
    let mut table = Table::default();
    let vips = start(suite, lab);
    suite.row("the announcer's speaker crashes, and comes back", || {
        let mut watch = Watch::start(lab, &SHOP, vips.clone(), &mut table)?;
        for _ in 0..CRASHES {
            let from = lab.wait_for_announcer(vips[0], None)?;
            let speaker = format!("speaker-node{from}");
            watch.unbroken(lab, "speaker crashes", |lab| {
                lab.kill(&speaker)?;
                let to = taken_over(lab, vips[0], from)?;
                Ok(Some((from, to)))
            })?;
            watch.unbroken(lab, "speaker comes back", |lab| {
                let from = lab.wait_for_announcer(vips[0], None)?;
                lab.restart(&speaker)?;
                std::thread::sleep(AFTERMATH);
                let to = lab.wait_for_announcer(vips[0], None)?;
                Ok(Some((from, to)))
            })?;
        }
        Ok(())
    });
    suite.row("the announcer's speaker restarts at once", || {
        let mut watch = Watch::start(lab, &SHOP, vips.clone(), &mut table)?;
        for _ in 0..CRASHES {
            watch.unbroken(lab, "speaker restarts", |lab| {
                let from = lab.wait_for_announcer(vips[0], None)?;
                let speaker = format!("speaker-node{from}");
                lab.kill(&speaker)?;
                lab.restart(&speaker)?;
                std::thread::sleep(AFTERMATH);
                let to = lab.wait_for_announcer(vips[0], None)?;
                Ok(Some((from, to)))
            })?;
        }
        Ok(())
    });
    suite.row("agents are killed, and stopped: nobody notices", || {
        let mut watch = Watch::start(lab, &SHOP, vips.clone(), &mut table)?;
        for (signal, name) in [
            (Signal::SIGKILL, "agents killed and started again"),
            (Signal::SIGTERM, "agents stopped and started again"),
        ] {
            let seen = watch.unbroken(lab, name, |lab| {
                for number in lab.node_numbers() {
                    lab.restart_agent(number, signal)?;
                }
                Ok(None)
            })?;
            seen.within(DIAL_GOAL, DIAL_GOAL)?;
        }
        Ok(())
    });
    suite.row("a rolling update of the DaemonSet: nobody notices", || {
        let mut watch = Watch::start(lab, &SHOP, vips.clone(), &mut table)?;
        let seen = watch.unbroken(lab, "rolling update", |lab| {
            lab.configure_agents(&[("STRICT_START", "true")])?;
            Ok(None)
        })?;
        seen.within(DIAL_GOAL, DIAL_GOAL)
    });
    suite.row(
        "the API server and the announcer die together: the wire is enough",
        || {
            let mut watch = Watch::start(lab, &SHOP, vips.clone(), &mut table)?;
            let from = lab.wait_for_announcer(vips[0], None)?;
            let speaker = format!("speaker-node{from}");
            watch.unbroken(lab, "API server and speaker crash", |lab| {
                lab.kill("kube-apiserver")?;
                lab.kill(&speaker)?;
                let to = taken_over(lab, vips[0], from)?;
                Ok(Some((from, to)))
            })?;
            watch.unbroken(lab, "API server and speaker come back", |lab| {
                let from = lab.wait_for_announcer(vips[0], None)?;
                lab.restart_api_server()?;
                lab.restart(&speaker)?;
                lab.wait_for_agents()?;
                std::thread::sleep(AFTERMATH);
                let to = lab.wait_for_announcer(vips[0], None)?;
                Ok(Some((from, to)))
            })?;
            Ok(())
        },
    );
    suite.row(
        "the API server is back with another history: what was deleted goes, what lives stays",
        || other_history(lab, &vips, &mut table),
    );
    suite.row(
        "a gateway reboots, and its speaker is faster than its agent",
        || reboot(lab, &vips, &mut table),
    );
    suite.row("connections that cannot go on end at once", || {
        endings(lab, &vips, &mut table)
    });
    table.print();
}

fn start(suite: &mut Suite, lab: &mut Lab) -> Vec<IpAddr> {
    let mut vips = Vec::new();
    suite.row("pods on every node leave as the VIP", || {
        for (number, pod) in (1..).zip(SHOP) {
            lab.create_pod(pod, number, "shop")?;
        }
        vips = lab.create_service(&ServiceSpec::new("shop"))?;
        lab.install_metaleg()?;
        lab.label_service("shop", true)?;
        settle(lab, &SHOP, &vips)
    });
    vips
}

/// Waits until another node announces a VIP: speakers notice that one is gone after some seconds.
fn taken_over(lab: &Lab, vip: IpAddr, from: usize) -> Result<usize> {
    let announcer = || Ok(lab.announcer(vip)?.filter(|now| *now != from));
    eventually(SOON, "another node announces", announcer)
}

/// While the agents see nothing, the API server is exchanged, and Services are deleted and created.
fn other_history(lab: &mut Lab, vips: &[IpAddr], table: &mut Table) -> Result<()> {
    lab.create_pod("gone-1", 1, "gone")?;
    lab.create_pod("new-2", 2, "new")?;
    let gone = lab.create_service(&ServiceSpec::new("gone"))?;
    let new = lab.create_service(&ServiceSpec::new("new"))?;
    lab.label_service("gone", true)?;
    settle(lab, &["gone-1"], &gone)?;
    let mut watch = Watch::start(lab, &SHOP, vips.to_vec(), table)?;
    let seen = watch.unbroken(lab, "API server back with another history", |lab| {
        lab.signal_agents(Signal::SIGSTOP)?;
        lab.kill("kube-apiserver")?;
        let changed = lab
            .restart_api_server()
            .and_then(|()| lab.delete_service("gone"))
            .and_then(|()| lab.label_service("new", true));
        lab.signal_agents(Signal::SIGCONT)?;
        changed?;
        Ok(None)
    });
    drop(watch);
    settle(lab, &["new-2"], &new)?;
    settle_as_nodes(lab, &["gone-1"])?;
    let left = |lab: &Lab| -> Result<String> {
        let list = |number| lab.node(number).sh("nft list table inet metaleg");
        lab.node_numbers().map(list).collect()
    };
    let vip = gone[0].to_string();
    let all_gone = || Ok((!left(lab)?.contains(&vip)).then_some(()));
    eventually(SOON, "nothing of the deleted Service is left", all_gone)?;
    lab.delete_service("new")?;
    lab.delete_pod("gone-1")?;
    lab.delete_pod("new-2")?;
    seen?.within(DIAL_GOAL, DIAL_GOAL)
}

/// The gateway loses power. It comes back with an empty kernel, and takes the VIP back before its agent runs: nothing
/// may be routed there, and connections wait.
fn reboot(lab: &mut Lab, vips: &[IpAddr], table: &mut Table) -> Result<()> {
    let node = lab.wait_for_announcer(vips[0], None)?;
    let name = SHOP[node - 1];
    let others: Vec<&str> = SHOP.into_iter().filter(|pod| *pod != name).collect();
    lab.delete_pod(name)?;
    let mut watch = Watch::start(lab, &others, vips.to_vec(), table)?;
    watch.unbroken(lab, "gateway loses power", |lab| {
        lab.crash_node(node)?;
        let to = taken_over(lab, vips[0], node)?;
        Ok(Some((node, to)))
    })?;
    let seen = watch.during(lab, "gateway boots without its agent", |lab| {
        let from = lab.wait_for_announcer(vips[0], None)?;
        lab.boot_node(node)?;
        for vip in vips {
            lab.wait_for_announcer(*vip, Some(node))?;
        }
        Ok(Some((from, node)))
    })?;
    let broken = seen.suffered.iter().find(|flow| flow.broken.is_some());
    ensure!(broken.is_none(), "a connection broke: {broken:?}");
    watch.unbroken(lab, "the agent of the booted gateway starts", |lab| {
        lab.start_agent(node)?;
        lab.wait_for_agents()?;
        Ok(Some((node, node)))
    })?;
    drop(watch);
    lab.create_pod(name, node, "shop")?;
    settle(lab, &SHOP, vips)
}

/// Label on, label off, another VIP, Service deleted.
fn endings(lab: &mut Lab, vips: &[IpAddr], table: &mut Table) -> Result<()> {
    let nodes: Vec<IpAddr> = lab
        .node_numbers()
        .flat_map(|number| Family::BOTH.map(|family| net::pick(&net::node(number), family)))
        .collect();
    let other: Vec<IpAddr> = ["192.0.2.230", "2001:db8:1::230"]
        .iter()
        .map(|vip| vip.parse())
        .collect::<Result<_, _>>()?;
    let all = |lists: [&[IpAddr]; 2]| lists.concat();
    ending(
        lab,
        "label removed",
        all([vips, &nodes]),
        |lab| lab.label_service("shop", false),
        |lab| settle_as_nodes(lab, &SHOP),
        table,
    )?;
    ending(
        lab,
        "label set",
        all([vips, &nodes]),
        |lab| lab.label_service("shop", true),
        |lab| settle(lab, &SHOP, vips),
        table,
    )?;
    ending(
        lab,
        "VIP changed",
        all([vips, &other]),
        |lab| {
            let text = format!("{},{}", other[0], other[1]);
            let annotations = json!({"metallb.io/loadBalancerIPs": text});
            lab.patch_service("shop", &json!({"metadata": {"annotations": annotations}}))
        },
        |lab| settle(lab, &SHOP, &other),
        table,
    )?;
    ending(
        lab,
        "Service deleted",
        all([&other, &nodes]),
        |lab| lab.delete_service("shop"),
        |lab| settle_as_nodes(lab, &SHOP),
        table,
    )
}

/// A change after which no connection can go on: each must end soon, with nothing but the addresses from before and
/// after on the wire, and datagrams and new connections must go on with the new one.
fn ending(
    lab: &mut Lab,
    name: &'static str,
    allowed: Vec<IpAddr>,
    change: impl FnOnce(&mut Lab) -> Result<()>,
    settled: impl FnOnce(&Lab) -> Result<()>,
    table: &mut Table,
) -> Result<()> {
    let mut watch = Watch::start(lab, &SHOP, allowed, table)?;
    let mut changed = Instant::now();
    let seen = watch
        .during(lab, name, |lab| {
            change(lab)?;
            changed = Instant::now();
            Ok(None)
        })
        .context(name)?;
    for flow in &seen.suffered {
        let what = || format!("{name}: {:?} {} of {}", flow.kind, flow.family, flow.pod);
        match (flow.kind, &flow.broken) {
            (Kind::Stream, None) => bail!("{} goes on or hangs", what()),
            (Kind::Stream, Some(why)) => {
                let after = flow.last.saturating_duration_since(changed);
                ensure!(after < END_GOAL, "{} ended after {after:?}: {why}", what());
                ensure!(why.contains("reset"), "{} ended with {why}", what());
            }
            (_, Some(why)) => bail!("{}: {why}", what()),
            (_, None) => ensure!(flow.last.elapsed() < AFTERMATH, "{} is silent", what()),
        }
    }
    settled(lab).context(name)
}
