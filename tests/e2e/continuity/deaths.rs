//! Speakers, agents, the API server and a gateway die, and come back.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use metaleg_lab::{Family, Lab, SOON, ServiceSpec, eventually, net, say};
use nix::sys::signal::Signal;

use super::{AFTERMATH, Allowed, DIAL_GOAL, SHOP, Watch};
use crate::leaving::{Before, settle, settle_as_nodes, vip_of};
use crate::names;
use crate::runner::{Check, Row};
use crate::stage::Stage;

/// How often the announcer's speaker crashes, and comes back: each time the VIP moves twice.
const CRASHES: usize = 2;
/// A grace period so short that what outlives it is known from the wire, and a time that is longer.
const SHORT_GRACE: (&str, Duration) = ("3s", Duration::from_secs(4));
/// How long a pod of no Service may wait for its first packet to get out, after its address is known.
const RELEASE_GOAL: Duration = Duration::from_millis(20);
/// More steps than any change has.
const MOST_STEPS: usize = 100;

const LABEL_DEATHS: &str = "agents_die_before_any_step_of_a_label";

/// With whether the backend matters.
const ROWS: [(&str, Check, bool); 10] = [
    ("the_speaker_crashes_and_comes_back", speaker, false),
    ("a_rolling_update", update, false),
    ("the_object_is_lost", lost_object, false),
    ("two_speakers_announce_at_once", two_speakers, false),
    ("a_stranger_claims_the_vip", stranger, false),
    ("agents_are_killed_and_stopped", agents, false),
    ("a_rolling_update_to_a_strict_start", strict_update, false),
    ("first_packets_with_a_strict_start", first_packets, true),
    (LABEL_DEATHS, label_deaths, true),
    ("agents_die_before_any_step_of_a_move", move_deaths, true),
];

/// The API server goes last: who asks it, of MetalLB and Kubernetes, hears of what is new up to a minute late then.
const LAST_ROWS: [(&str, Check, bool); 3] = [
    ("a_gateway_reboots", reboot, false),
    ("the_api_server_has_another_history", other_history, false),
    ("the_api_server_and_the_announcer_die", both_die, false),
];

pub(super) fn rows(backend: &str) -> Vec<Row> {
    of(backend, &ROWS)
}

pub(super) fn last_rows(backend: &str) -> Vec<Row> {
    of(backend, &LAST_ROWS)
}

fn of(backend: &str, rows: &[(&str, Check, bool)]) -> Vec<Row> {
    let module = format!("continuity::deaths::{backend}");
    rows.iter()
        .filter(|(_, _, both)| *both || backend == "nftables")
        .map(|(name, check, _)| {
            let can_die = cfg!(feature = "kill-points") || !name.starts_with("agents_die");
            // A node that becomes a gateway guards itself against pods that it does not know late in its pass, and there
            // are many steps before with iptables: see Known limits of the data path.
            let is_known_to_leak = backend == "iptables" && *name == LABEL_DEATHS;
            Row::new(&module, name, *check).ignored_unless(can_die && !is_known_to_leak)
        })
        .collect()
}

fn speaker(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage {
        lab, vips, table, ..
    } = stage;
    let mut watch = Watch::start(lab, &SHOP, Allowed::vips(vips), table)?;
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
}

fn update(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    rolling_update(stage, &[("ANNOUNCER_GRACE_PERIOD", SHORT_GRACE.0)])
}

/// The wire is enough where MetalLB's object is lost, and the announcer's speaker restarts.
fn lost_object(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    stage.configured(&[("ANNOUNCER_GRACE_PERIOD", SHORT_GRACE.0)])?;
    stage.lab.lose_statuses("shop")?;
    let result = without_statuses(stage);
    stage.lab.allow_statuses()?;
    result
}

/// Two speakers may announce at once: pods go on with one of them.
fn two_speakers(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage {
        lab, vips, table, ..
    } = stage;
    let mut watch = Watch::start(lab, &SHOP, Allowed::vips(vips), table)?;
    let length = lab.agent_log(1).len();
    watch.unbroken(lab, "labels of all nodes change by turns", |lab| {
        for number in (0..3).flat_map(|_| lab.node_numbers()) {
            lab.allow_announcing(number, false)?;
            lab.allow_announcing(number, true)?;
        }
        lab.wait_for_announcer(vips[0], None)?;
        Ok(None)
    })?;
    let heard = lab.agent_log(1);
    let heard = heard.get(length..).unwrap_or_default();
    let claims = heard
        .lines()
        .filter_map(|line| line.split_once(" is claimed by "));
    let voices: BTreeSet<&str> = claims.map(|(_, mac)| mac).collect();
    ensure!(voices.len() > 1, "only {voices:?} announced");
    Ok(())
}

/// The claim of a host that is no node moves nothing, and is told.
fn stranger(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage {
        lab, vips, table, ..
    } = stage;
    let vip = vip_of(vips, Family::V4)?;
    let mut watch = Watch::start(lab, &SHOP, Allowed::vips(vips), table)?;
    watch.unbroken(lab, "a stranger claims the VIP", |lab| {
        lab.forge_claim(vip)?;
        still(lab, vips)
    })?;
    for number in lab.node_numbers() {
        eventually(SOON, "the claim is told", || {
            let log = lab.agent_log(number);
            Ok(log.contains("which is no node's, claims VIP").then_some(()))
        })?;
    }
    Ok(())
}

/// Nobody notices that agents are killed, and stopped.
fn agents(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage {
        lab, vips, table, ..
    } = stage;
    let mut watch = Watch::start(lab, &SHOP, Allowed::vips(vips), table)?;
    for (signal, name) in [
        (Signal::SIGKILL, "agents killed and started again"),
        (Signal::SIGTERM, "agents stopped and started again"),
    ] {
        let seen = watch.unbroken(lab, name, |lab| {
            for number in lab.node_numbers() {
                lab.restart_agent(number, signal)?;
            }
            still(lab, vips)
        })?;
        seen.within(DIAL_GOAL, DIAL_GOAL)?;
    }
    Ok(())
}

fn strict_update(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let settings = [("STRICT_START", "true"), ("ANNOUNCER_GRACE_PERIOD", "30s")];
    rolling_update(stage, &settings)
}

/// The gateway has not changed.
fn still(lab: &Lab, vips: &[IpAddr]) -> Result<super::Moved> {
    let gateway = lab.wait_for_announcer(vips[0], None)?;
    Ok(Some((gateway, gateway)))
}

/// MetalLB's objects name nobody, for longer than the grace period.
fn without_statuses(stage: &mut Stage) -> Result<()> {
    let Stage {
        lab, vips, table, ..
    } = stage;
    let mut watch = Watch::start(lab, &SHOP, Allowed::vips(vips), table)?;
    watch.unbroken(lab, "MetalLB's object is lost", |lab| {
        std::thread::sleep(SHORT_GRACE.1);
        still(lab, vips)
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
fn rolling_update(stage: &mut Stage, settings: &[(&str, &str)]) -> Result<()> {
    let Stage {
        lab, vips, table, ..
    } = stage;
    let mut watch = Watch::start(lab, &SHOP, Allowed::vips(vips), table)?;
    let seen = watch.unbroken(lab, "rolling update", |lab| {
        lab.configure_agents(settings)?;
        still(lab, vips)
    })?;
    seen.within(DIAL_GOAL, DIAL_GOAL)
}

/// While the agents see nothing, the API server is exchanged, and Services are deleted and created.
fn other_history(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage {
        lab, vips, table, ..
    } = stage;
    lab.create_pod("gone-1", 1, "gone")?;
    lab.create_pod("new-2", 2, "new")?;
    let gone = lab.create_service(&ServiceSpec::new("gone"))?;
    let new = lab.create_service(&ServiceSpec::new("new"))?;
    lab.label_service("gone", true)?;
    settle(lab, &["gone-1"], &gone, Before::Nodes)?;
    let mut watch = Watch::start(lab, &SHOP, Allowed::vips(vips), table)?;
    let seen = watch.unbroken(lab, "API server back with another history", |lab| {
        lab.signal_agents(Signal::SIGSTOP)?;
        let changed = other_objects(lab);
        lab.signal_agents(Signal::SIGCONT)?;
        changed?;
        still(lab, vips)
    });
    drop(watch);
    settle(lab, &["new-2"], &new, Before::Nodes)?;
    settle_as_nodes(lab, &["gone-1"], Before::Vips(&gone))?;
    let left = |lab: &Lab| -> Result<String> {
        let list = |number| {
            lab.node(number)
                .sh(&format!("nft list table {}", names::TABLE))
        };
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
fn both_die(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage {
        lab, vips, table, ..
    } = stage;
    let mut watch = Watch::start(lab, &SHOP, Allowed::vips(vips), table)?;
    let from = lab.wait_for_announcer(vips[0], None)?;
    let speaker = format!("speaker-node{from}");
    watch.unbroken(lab, "API server and speaker crash", |lab| {
        lab.kill("kube-apiserver")?;
        lab.kill(&speaker)?;
        let to = taken_over(lab, vips[0], from)?;
        Ok(Some((from, to)))
    })?;
    watch.unbroken(lab, "API server and speaker come back", |lab| {
        lab.restart_api_server()?;
        lab.restart(&speaker)?;
        lab.wait_for_agents()?;
        // The VIP may go back later.
        Ok(None)
    })?;
    Ok(())
}

/// The gateway loses power. It comes back with an empty kernel, and takes the VIP back before its agent runs: nothing
/// may be routed there, and connections wait.
fn reboot(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage {
        lab, vips, table, ..
    } = stage;
    let node = lab.wait_for_announcer(vips[0], None)?;
    let name = SHOP[node - 1];
    let others: Vec<&str> = SHOP.into_iter().filter(|pod| *pod != name).collect();
    lab.delete_pod(name)?;
    let mut watch = Watch::start(lab, &others, Allowed::vips(vips), table)?;
    let mut substitute = node;
    watch.unbroken(lab, "gateway loses power", |lab| {
        lab.crash_node(node)?;
        substitute = taken_over(lab, vips[0], node)?;
        Ok(Some((node, substitute)))
    })?;
    let seen = watch.during(lab, "gateway boots without its agent", |lab| {
        lab.boot_node(node)?;
        for vip in vips.iter() {
            lab.wait_for_announcer(*vip, Some(node))?;
        }
        Ok(Some((substitute, node)))
    })?;
    let broken = seen.suffered.iter().find(|flow| flow.broken.is_some());
    ensure!(broken.is_none(), "a connection broke: {broken:?}");
    watch.unbroken(lab, "the agent of the booted gateway starts", |lab| {
        lab.start_agent(node)?;
        lab.wait_for_agents()?;
        // Until then pods went through the node that had the VIP last, and was programmed.
        Ok(Some((substitute, node)))
    })?;
    drop(watch);
    lab.create_pod(name, node, "shop")?;
    settle(lab, &SHOP, vips, Before::Nodes)
}

/// Pods that send before anybody knows of them.
fn first_packets(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    stage.configured(&[("STRICT_START", "true")])?;
    let Stage { lab, vips, .. } = stage;
    let nodes = lab.node_numbers().count();
    let gateway = lab.wait_for_announcer(vips[0], None)?;
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
    capture
        .take()?
        .only(|node, source| node == gateway && vips.contains(&source))?;
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
    settle(lab, &SHOP, vips, Before::Same)?;
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

/// The agents of all nodes die before any step of a change; `once` makes the change, with agents that die after so many
/// steps.
fn die_before_any_step(
    lab: &mut Lab,
    goal: Goal,
    mut once: impl FnMut(&mut Lab, usize) -> Result<Round>,
) -> Result<()> {
    let mut died_before = Vec::new();
    let mut all_steps = || -> Result<()> {
        for steps in 0..MOST_STEPS {
            let round = once(lab, steps)?;
            if round.is_last(steps) {
                return Ok(());
            }
            died_before.extend(round.died_before);
        }
        bail!("still something to do after {MOST_STEPS} steps")
    };
    let result = all_steps();
    // Whatever came of it, the next rows need speakers that may announce, and agents that live.
    lab.disarm_kill_points()?;
    for number in lab.node_numbers() {
        lab.allow_announcing(number, true)?;
    }
    std::thread::sleep(AFTERMATH);
    result?;
    let deaths = died_before.len();
    let kinds: BTreeSet<String> = died_before.into_iter().collect();
    let named: Vec<&str> = kinds.iter().map(String::as_str).collect();
    say!("agents died {deaths} times, before: {}", named.join("; "));
    ensure!(deaths >= goal.times, "agents died {deaths} times only");
    ensure!(kinds.len() >= goal.kinds, "only before {kinds:?}");
    Ok(())
}

/// How often agents must have died, and before how many kinds of steps: else the loop has ended early.
struct Goal {
    times: usize,
    kinds: usize,
}

fn needs_kill_points() -> Result<()> {
    ensure!(
        cfg!(feature = "kill-points"),
        "agents die at will only with --features kill-points"
    );
    Ok(())
}

fn label_deaths(stage: &mut Stage) -> Result<()> {
    needs_kill_points()?;
    stage.shop()?;
    let Stage {
        lab, vips, table, ..
    } = stage;
    let from = lab.wait_for_announcer(vips[0], None)?;
    let node = from % lab.node_numbers().count() + 1;
    lab.create_pod("lone", node, "lone")?;
    let lone = lab.create_service(&ServiceSpec::new("lone"))?;
    for vip in &lone {
        lab.wait_for_announcer(*vip, None)?;
    }
    let allowed = Allowed::vips(&lone).and_nodes([node]).with_limits_of(lab);
    let mut watch = Watch::start(lab, &["lone"], allowed, table)?;
    watch.aftermath = Duration::from_millis(200);
    let goal = Goal {
        times: 60,
        kinds: 15,
    };
    let result = die_before_any_step(lab, goal, |lab, steps| {
        let mut round = Round::default();
        for (name, wanted) in [
            ("label set, agents die at step n", true),
            ("label removed, agents die at step n", false),
        ] {
            watch.during(lab, name, |lab| {
                round.add(deaths_during(lab, steps, |lab| {
                    lab.label_service("lone", wanted)?;
                    settle_lone(lab, wanted, &lone)
                })?);
                settle_lone(lab, wanted, &lone)?;
                // Where the agent died between the two, the pod is routed by its node again, and still translated there.
                Ok(None)
            })?;
        }
        Ok(round)
    });
    drop(watch);
    lab.delete_service("lone")?;
    lab.delete_pod("lone")?;
    result
}

fn move_deaths(stage: &mut Stage) -> Result<()> {
    needs_kill_points()?;
    stage.shop()?;
    let Stage {
        lab, vips, table, ..
    } = stage;
    let mut watch = Watch::start(lab, &SHOP, Allowed::vips(vips), table)?;
    watch.aftermath = Duration::from_millis(200);
    let goal = Goal {
        times: 60,
        kinds: 12,
    };
    die_before_any_step(lab, goal, |lab, steps| {
        let mut round = Round::default();
        watch.unbroken(lab, "VIP moves, agents die at step n", |lab| {
            let from = lab.wait_for_announcer(vips[0], None)?;
            let to = from % lab.node_numbers().count() + 1;
            round = deaths_during(lab, steps, |lab| lab.move_announcement(vips, to))?;
            Ok(Some((from, to)))
        })?;
        Ok(round)
    })
}

/// One change, and agents that die in it.
#[derive(Default)]
struct Round {
    /// The step before which each agent died, without its addresses and numbers.
    died_before: Vec<String>,
    /// How many steps an agent had to execute at most.
    most_steps: usize,
}

impl Round {
    fn add(&mut self, other: Round) {
        self.died_before.extend(other.died_before);
        self.most_steps = self.most_steps.max(other.most_steps);
    }

    /// Whether no agent had more to do than `steps`: not only nobody died, perhaps because a change came in parts.
    fn is_last(&self, steps: usize) -> bool {
        self.died_before.is_empty() && self.most_steps <= steps
    }
}

/// The steps that an agent has told since its log was so long.
fn steps_since(lab: &Lab, node: usize, length: usize) -> Vec<String> {
    let log = lab.agent_log(node);
    let lines = log.get(length..).unwrap_or_default().lines();
    let steps = lines.filter_map(|line| {
        let (_, step) = line.split_once(" DEBUG ")?;
        let (step, _) = step.split_once(" reason=")?;
        let words = step.split(' ').filter(|word| {
            let is_name = |c: char| !c.is_ascii_digit() && c != ':';
            word.chars().all(is_name)
        });
        Some(words.collect::<Vec<_>>().join(" "))
    });
    steps.collect()
}

/// The agent of every node dies before it executes its next step but `steps`.
fn deaths_during(
    lab: &Lab,
    steps: usize,
    change: impl FnOnce(&Lab) -> Result<()>,
) -> Result<Round> {
    let logs = lab.agent_log_lengths();
    lab.arm_kill_points(steps)?;
    change(lab)?;
    lab.wait_for_kill_points(&logs)?;
    let died = lab.disarm_kill_points()?;
    lab.wait_for_agents()?;
    let mut round = Round::default();
    for (node, length) in lab.node_numbers().zip(logs) {
        let mut told = steps_since(lab, node, length);
        round.most_steps = round.most_steps.max(told.len());
        if died.contains(&node) {
            ensure!(
                told.len() > steps,
                "node{node} died before step {steps} of {told:?}"
            );
            round.died_before.push(told.swap_remove(steps));
        }
    }
    Ok(round)
}

fn settle_lone(lab: &Lab, is_labelled: bool, vips: &[IpAddr]) -> Result<()> {
    match is_labelled {
        true => settle(lab, &["lone"], vips, Before::Nodes),
        false => settle_as_nodes(lab, &["lone"], Before::Vips(vips)),
    }
}
