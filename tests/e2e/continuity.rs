//! Nothing is lost when things move, restart or die.
//!
//! Pods on every node have connections that go on all the time. At the outside of every node packets are counted by
//! their source: one with another address than the VIP is a failure, whatever became of its connection.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use metaleg_lab::capture::{Capture, Packets};
use metaleg_lab::traffic::{Kind, Suffered, Traffic};
use metaleg_lab::{Family, Lab, Outside, SOON, ServiceSpec, eventually, net, say};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::Suite;
use crate::rows::{every, settle, settle_as_nodes, vip_of};

/// A pod of the egress Service on every node.
const SHOP: [&str; 4] = ["shop-1", "shop-2", "shop-3", "shop-4"];
/// How often a VIP is moved by intent, with the backend that is the default, and with the other one.
const MOVES: [usize; 2] = [20, 8];
/// How often the announcer's speaker crashes, and comes back: each time the VIP moves twice.
const CRASHES: usize = 2;
/// Between two events. A speaker that has lost a VIP and takes it over again within 6 s does not announce it at once but
/// at its next round, up to 1.1 s later: with four nodes by turns that does not happen.
const AFTERMATH: Duration = Duration::from_secs(2);
/// Between two moves. Every 1.1 s a speaker says again that it has the VIP, for 5 s: when it says so in the moment in which
/// it loses it, after the new one, servers ask the old one until the new one says so again. Between two such rounds it
/// does not happen.
const AFTER_MOVE: Duration = Duration::from_millis(2500);
/// A grace period so short that what outlives it is known from the wire, and a time that is longer.
const SHORT_GRACE: (&str, Duration) = ("3s", Duration::from_secs(4));
/// How long a stream may be silent at a graceful move: packets that are lost are sent again after 0.2 s, and 0.6 s.
const STREAM_GOAL: Duration = Duration::from_secs(1);
/// How long servers take to answer while their clients' VIP moves.
const LATE: Duration = Duration::from_secs(3);
/// How long no new connection may come through at a graceful move.
const DIAL_GOAL: Duration = Duration::from_millis(500);
/// How long a pod of no Service may wait for its first packet to get out, after its address is known.
const RELEASE_GOAL: Duration = Duration::from_millis(20);
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
    /// How long an event is looked after.
    aftermath: Duration,
}

/// From where to where a VIP moved, if it did.
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
            aftermath: AFTERMATH,
        })
    }

    /// Does something to the lab, and notes what the pods suffered. `event` says from where to where a VIP moved.
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
        let mut leaks = Vec::new();
        for ((node, source), packets) in &sources {
            if !self.allowed.contains(source) {
                self.table.cell(name, Place::of(*node, moved)).leaked += packets.count;
                let Packets { count, first } = packets;
                leaks.push(format!("{count} from node{node}, first {first}"));
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

/// Moves by MetalLB, looked at closely.
pub(crate) fn many_moves(suite: &mut Suite, lab: &mut Lab) {
    moves(suite, lab, MOVES[0]);
}

/// Some moves by MetalLB.
pub(crate) fn some_moves(suite: &mut Suite, lab: &mut Lab) {
    moves(suite, lab, MOVES[1]);
}

fn moves(suite: &mut Suite, lab: &mut Lab, times: usize) {
    let mut table = Table::default();
    let Some(vips) = start(suite, lab) else {
        return;
    };
    suite.row("graceful moves", || {
        let mut watch = Watch::start(lab, &SHOP, vips.clone(), &mut table)?;
        watch.aftermath = AFTER_MOVE;
        for _ in 0..times {
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
    suite.row(
        "connections go on on which only the server has something to say",
        || {
            for _ in 0..4 {
                late_answers(lab, &vips)?;
            }
            Ok(())
        },
    );
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
    let Some(vips) = start(suite, lab) else {
        return;
    };
    mending_row(
        suite,
        lab,
        "the announcer's speaker crashes, and comes back",
        |lab| {
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
        },
    );
    suite.row("a rolling update of the DaemonSet: nobody notices", || {
        let settings = [("ANNOUNCER_GRACE_PERIOD", SHORT_GRACE.0)];
        rolling_update(lab, &vips, &settings, &mut table)
    });
    mending_row(
        suite,
        lab,
        "MetalLB's object is lost, the announcer's speaker restarts: the wire is enough",
        |lab| {
            lab.lose_statuses("shop")?;
            let result = without_statuses(lab, &vips, &mut table);
            lab.allow_statuses()?;
            result
        },
    );
    mending_row(
        suite,
        lab,
        "two speakers may announce at once: pods go on with one of them",
        |lab| {
            let mut watch = Watch::start(lab, &SHOP, vips.clone(), &mut table)?;
            let length = lab.agent_log(1).len();
            watch.unbroken(lab, "labels of all nodes change by turns", |lab| {
                let from = lab.wait_for_announcer(vips[0], None)?;
                for number in (0..3).flat_map(|_| lab.node_numbers()) {
                    lab.allow_announcing(number, false)?;
                    lab.allow_announcing(number, true)?;
                }
                let to = lab.wait_for_announcer(vips[0], None)?;
                Ok(Some((from, to)))
            })?;
            let heard = lab.agent_log(1);
            let heard = heard.get(length..).unwrap_or_default();
            let claims = heard
                .lines()
                .filter_map(|line| line.split_once(" is claimed by "));
            let voices: BTreeSet<&str> = claims.map(|(_, mac)| mac).collect();
            ensure!(voices.len() > 1, "only {voices:?} announced");
            Ok(())
        },
    );
    suite.row("a stranger's claim moves nothing, and is told", || {
        let vip = vip_of(&vips, Family::V4)?;
        let mut watch = Watch::start(lab, &SHOP, vips.clone(), &mut table)?;
        watch.unbroken(lab, "a stranger claims the VIP", |lab| {
            lab.forge_claim(vip)?;
            Ok(None)
        })?;
        for number in lab.node_numbers() {
            eventually(SOON, "the claim is told", || {
                let log = lab.agent_log(number);
                Ok(log.contains("which is no node's, claims VIP").then_some(()))
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
    suite.row(
        "a rolling update that makes the start strict: nobody notices",
        || {
            let settings = [("STRICT_START", "true"), ("ANNOUNCER_GRACE_PERIOD", "30s")];
            rolling_update(lab, &vips, &settings, &mut table)
        },
    );
    mending_row(
        suite,
        lab,
        "with a strict start no packet of a pod is wrong, not even the first",
        |lab| first_packets(lab, &vips),
    );
    if cfg!(feature = "kill-points") {
        suite.row("agents die before any step of a change", || {
            let result = kill_points(lab, &vips, &mut table);
            // Whatever came of it, the next rows need speakers that may announce, and agents that live.
            lab.disarm_kill_points()?;
            for number in lab.node_numbers() {
                lab.allow_announcing(number, true)?;
            }
            std::thread::sleep(AFTERMATH);
            result
        });
    } else {
        say!("  skipped: agents that die before any step need --features kill-points");
    }
    mending_row(
        suite,
        lab,
        "a gateway reboots, and its speaker is faster than its agent",
        |lab| reboot(lab, &vips, &mut table),
    );
    suite.row("connections that cannot go on end at once", || {
        endings(lab, &vips, &mut table)
    });
    // The API server goes last: who asks it, of MetalLB and Kubernetes, hears of what is new up to a minute late then.
    let mut vips = Vec::new();
    suite.row("the Service is created anew", || {
        vips = open_shop(lab)?;
        Ok(())
    });
    if vips.is_empty() {
        return table.print();
    }
    mending_row(
        suite,
        lab,
        "the API server is back with another history: what was deleted goes, what lives stays",
        |lab| other_history(lab, &vips, &mut table),
    );
    mending_row(
        suite,
        lab,
        "the API server and the announcer die together: the wire is enough",
        |lab| both_die(lab, &vips, &mut table),
    );
    table.print();
}

/// The VIPs of the egress Service; `None` when pods do not leave as them.
fn start(suite: &mut Suite, lab: &mut Lab) -> Option<Vec<IpAddr>> {
    let mut vips = None;
    suite.row("pods on every node leave as the VIP", || {
        for (number, pod) in (1..).zip(SHOP) {
            lab.create_pod(pod, number, "shop")?;
        }
        lab.install_metaleg()?;
        vips = Some(open_shop(lab)?);
        Ok(())
    });
    vips
}

/// Creates the egress Service, and waits until every pod leaves as its VIPs.
fn open_shop(lab: &Lab) -> Result<Vec<IpAddr>> {
    let vips = lab.create_service(&ServiceSpec::new("shop"))?;
    lab.label_service("shop", true)?;
    settle(lab, &SHOP, &vips)?;
    Ok(vips)
}

/// A row that stops what the next ones need: a failure must not be theirs.
fn mending_row(
    suite: &mut Suite,
    lab: &mut Lab,
    name: &str,
    check: impl FnOnce(&mut Lab) -> Result<()>,
) {
    suite.row(name, || {
        let result = check(lab);
        if result.is_err() {
            lab.mend().context("cannot mend the lab after a failure")?;
        }
        result
    });
}

/// Pods wait for an answer while their VIP moves: nothing but the agents makes them send.
fn late_answers(lab: &Lab, vips: &[IpAddr]) -> Result<()> {
    let mut streams = Vec::new();
    for (family, pod) in every(SHOP) {
        let mut stream = lab.open_stream(pod, Outside::Far, family)?;
        stream.ask_for_later(LATE)?;
        streams.push((pod, family, stream));
    }
    let asked = Instant::now();
    let from = lab.wait_for_announcer(vips[0], None)?;
    let to = from % lab.node_numbers().count() + 1;
    lab.move_announcement(vips, to)?;
    let after = asked.elapsed();
    ensure!(after < LATE, "the announcement moved after {after:?} only");
    for (pod, family, stream) in &mut streams {
        let limit = (LATE + STREAM_GOAL).saturating_sub(asked.elapsed());
        let node = lab.pod(pod)?.node;
        let what = || format!("{pod} on node{node}, {family}, node{from} to node{to}");
        let seen = stream
            .hear(limit.max(Duration::from_millis(1)))
            .with_context(what)?;
        let vip = vip_of(vips, *family)?;
        ensure!(seen.address() == Some(vip), "{pod} is seen as {seen}");
    }
    Ok(())
}

/// MetalLB's objects name nobody, for longer than the grace period.
fn without_statuses(lab: &mut Lab, vips: &[IpAddr], table: &mut Table) -> Result<()> {
    let mut watch = Watch::start(lab, &SHOP, vips.to_vec(), table)?;
    watch.unbroken(lab, "MetalLB's object is lost", |_| {
        std::thread::sleep(SHORT_GRACE.1);
        Ok(None)
    })?;
    watch.unbroken(lab, "speaker restarts", |lab| {
        let from = lab.wait_for_announcer(vips[0], None)?;
        let speaker = format!("speaker-node{from}");
        lab.kill(&speaker)?;
        lab.restart(&speaker)?;
        let to = lab.wait_for_announcer(vips[0], None)?;
        Ok(Some((from, to)))
    })?;
    let named = lab.status_names("shop")?;
    ensure!(named.is_empty(), "MetalLB's objects name {named:?}");
    Ok(())
}

/// Waits until another node announces a VIP: speakers notice that one is gone after some seconds.
fn taken_over(lab: &Lab, vip: IpAddr, from: usize) -> Result<usize> {
    let announcer = || Ok(lab.announcer(vip)?.filter(|now| *now != from));
    eventually(SOON, "another node announces", announcer)
}

/// The DaemonSet's pods are exchanged one after the other.
fn rolling_update(
    lab: &mut Lab,
    vips: &[IpAddr],
    settings: &[(&str, &str)],
    table: &mut Table,
) -> Result<()> {
    let mut watch = Watch::start(lab, &SHOP, vips.to_vec(), table)?;
    let seen = watch.unbroken(lab, "rolling update", |lab| {
        lab.configure_agents(settings)?;
        Ok(None)
    })?;
    seen.within(DIAL_GOAL, DIAL_GOAL)
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
        let changed = other_objects(lab);
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

fn other_objects(lab: &mut Lab) -> Result<()> {
    lab.delete_service("gone")?;
    lab.label_service("new", true)?;
    // The label is copied to the slices by a controller, which an API server that was away keeps waiting.
    std::thread::sleep(AFTERMATH);
    lab.kill("kube-apiserver")?;
    lab.restart_api_server()
}

/// The API server runs on the node that crashes.
fn both_die(lab: &mut Lab, vips: &[IpAddr], table: &mut Table) -> Result<()> {
    let mut watch = Watch::start(lab, &SHOP, vips.to_vec(), table)?;
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
        let to = lab.wait_for_announcer(vips[0], None)?;
        Ok(Some((from, to)))
    })?;
    Ok(())
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

/// Pods that send before anybody knows of them.
fn first_packets(lab: &mut Lab, vips: &[IpAddr]) -> Result<()> {
    let nodes = lab.node_numbers().count();
    let capture = lab.capture()?;
    for (turn, family) in (0..4).flat_map(|turn| Family::BOTH.map(|family| (turn, family))) {
        let node = turn % nodes + 1;
        let vip = vip_of(vips, family)?;
        let (beginning, _) = lab.create_pod_that_sends("early", node, "shop", family)?;
        let first = || Ok(beginning.first_answer());
        eventually(SOON, "a new pod of the Service is answered", first)?;
        std::thread::sleep(Duration::from_millis(200));
        let sources = beginning.sources();
        ensure!(
            sources.iter().eq([&vip]),
            "on node{node} seen as {sources:?}"
        );
        drop(beginning);
        lab.delete_pod("early")?;
    }
    let sources = capture.take()?;
    let wrong = sources
        .iter()
        .find(|((_, source), _)| !vips.contains(source));
    ensure!(wrong.is_none(), "packets leaked: {wrong:?}");
    drop(capture);

    let mut waits = Vec::new();
    for (turn, family) in (0..10).flat_map(|turn| Family::BOTH.map(|family| (turn, family))) {
        let node = turn % nodes + 1;
        let own = net::pick(&net::node(node), family);
        let (beginning, known) = lab.create_pod_that_sends("plain", node, "none", family)?;
        let first = || Ok(beginning.first_answer());
        let first = eventually(SOON, "a pod of no Service is answered", first)?;
        waits.push(first.saturating_duration_since(known));
        let sources = beginning.sources();
        ensure!(sources.iter().eq([&own]), "seen as {sources:?}");
        drop(beginning);
        lab.delete_pod("plain")?;
    }
    waits.sort();
    let (median, longest) = (waits[waits.len() / 2], waits[waits.len() - 1]);
    say!(
        "  a pod of no Service waits after its address is known: median {median:?}, longest {longest:?}"
    );
    ensure!(median <= RELEASE_GOAL, "released after {median:?}");

    lab.stop_agent(1)?;
    settle(lab, &SHOP, vips)?;
    let (beginning, _) = lab.create_pod_that_sends("plain", 1, "none", Family::V4)?;
    std::thread::sleep(Duration::from_millis(500));
    let sources = beginning.sources();
    ensure!(sources.is_empty(), "let out without an agent: {sources:?}");
    lab.start_agent(1)?;
    let first = || Ok(beginning.first_answer());
    eventually(SOON, "the pod is answered when the agent is back", first)?;
    drop(beginning);
    lab.wait_for_agents()?;
    lab.delete_pod("plain")
}

/// All agents die in the middle of a change, at every step of it.
fn kill_points(lab: &mut Lab, vips: &[IpAddr], table: &mut Table) -> Result<()> {
    let from = lab.wait_for_announcer(vips[0], None)?;
    let nodes = lab.node_numbers().count();
    lab.create_pod("lone", from % nodes + 1, "lone")?;
    let lone = lab.create_service(&ServiceSpec::new("lone"))?;
    for vip in &lone {
        lab.wait_for_announcer(*vip, None)?;
    }
    let own: Vec<IpAddr> = Family::BOTH
        .map(|family| net::pick(&net::node(from % nodes + 1), family))
        .into();
    let mut watch = Watch::start(lab, &["lone"], [lone.clone(), own].concat(), table)?;
    watch.aftermath = Duration::from_millis(200);
    let mut deaths = 0;
    for steps in 0.. {
        let mut died = 0;
        for (name, wanted) in [
            ("label set, agents die at step n", true),
            ("label removed, agents die at step n", false),
        ] {
            watch.during(lab, name, |lab| {
                died += deaths_during(lab, steps, |lab| {
                    lab.label_service("lone", wanted)?;
                    settle_lone(lab, wanted, &lone)
                })?;
                settle_lone(lab, wanted, &lone)?;
                Ok(None)
            })?;
        }
        deaths += died;
        if died == 0 {
            break;
        }
    }
    drop(watch);
    lab.delete_service("lone")?;
    lab.delete_pod("lone")?;

    let mut watch = Watch::start(lab, &SHOP, vips.to_vec(), table)?;
    watch.aftermath = Duration::from_millis(200);
    for steps in 0.. {
        let mut died = 0;
        watch.unbroken(lab, "VIP moves, agents die at step n", |lab| {
            let from = lab.wait_for_announcer(vips[0], None)?;
            let to = from % nodes + 1;
            died = deaths_during(lab, steps, |lab| lab.move_announcement(vips, to))?;
            Ok(Some((from, to)))
        })?;
        deaths += died;
        if died == 0 {
            break;
        }
    }
    say!("  agents died {deaths} times");
    ensure!(deaths > 20, "agents died {deaths} times only");
    Ok(())
}

/// The agent of every node dies before it executes its next step but `steps`; returns how many have.
fn deaths_during(
    lab: &Lab,
    steps: usize,
    change: impl FnOnce(&Lab) -> Result<()>,
) -> Result<usize> {
    let logs = lab.agent_log_lengths();
    lab.arm_kill_points(steps)?;
    change(lab)?;
    lab.wait_for_kill_points(&logs)?;
    let died = lab.disarm_kill_points()?;
    lab.wait_for_agents()?;
    Ok(died)
}

fn settle_lone(lab: &Lab, is_labelled: bool, vips: &[IpAddr]) -> Result<()> {
    match is_labelled {
        true => settle(lab, &["lone"], vips),
        false => settle_as_nodes(lab, &["lone"]),
    }
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
