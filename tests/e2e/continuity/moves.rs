//! The VIP moves by intent.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::{Allowed, DIAL_GOAL, SHOP, Watch};
use crate::leaving::{Late, hear_over_a_move};
use crate::runner::{Check, Row};
use crate::stage::Stage;

/// How often a VIP is moved, with the backend that is the default, and with the other one.
const MOVES: [usize; 2] = [20, 8];
/// Between two moves. Every 1.1 s a speaker says again that it has the VIP, for 5 s: when it says so in the moment in which
/// it loses it, after the new one, servers ask the old one until the new one says so again. Between two such rounds it
/// does not happen.
const AFTER_MOVE: Duration = Duration::from_millis(2500);
/// How long a speaker says so. A Service may be new when the first move is due, and nobody knows when its rounds began.
const ROUNDS: Duration = Duration::from_secs(6);
/// How long a stream may be silent at a graceful move: packets that are lost are sent again after 0.2 s, and 0.6 s.
const STREAM_GOAL: Duration = Duration::from_secs(1);
/// How long servers take to answer while their clients' VIP moves.
const LATE: Duration = Duration::from_secs(3);

pub(super) fn rows(backend: &str) -> Vec<Row> {
    let module = format!("continuity::moves::{backend}");
    let graceful: Check = match backend {
        "nftables" => |stage| graceful(stage, MOVES[0]),
        _ => |stage| graceful(stage, MOVES[1]),
    };
    let rows: [(&str, Check); 3] = [
        ("graceful", graceful),
        ("only_the_server_has_something_to_say", only_the_server),
        ("the_announcement_flaps", flaps),
    ];
    rows.into_iter()
        .map(|(row, check)| Row::new(&module, row, check))
        .collect()
}

fn graceful(stage: &mut Stage, times: usize) -> Result<()> {
    stage.shop()?;
    let Stage {
        lab, vips, table, ..
    } = stage;
    let mut watch = Watch::start(lab, &SHOP, Allowed::vips(vips), table)?;
    watch.aftermath = AFTER_MOVE;
    std::thread::sleep(ROUNDS);
    for _ in 0..times {
        let seen = watch.unbroken(lab, "graceful move", |lab| {
            let from = lab.wait_for_announcer(vips[0], None)?;
            let to = from % lab.node_numbers().count() + 1;
            lab.move_announcement(vips, to)?;
            Ok(Some((from, to)))
        })?;
        seen.within(STREAM_GOAL, DIAL_GOAL)?;
    }
    Ok(())
}

fn only_the_server(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let late = Late {
        answer: LATE,
        patience: STREAM_GOAL,
        is_half_closed: false,
    };
    (0..4).try_for_each(|_| hear_over_a_move(&stage.lab, &SHOP, &stage.vips, &late))
}

fn flaps(stage: &mut Stage) -> Result<()> {
    stage.shop()?;
    let Stage {
        lab, vips, table, ..
    } = stage;
    let mut watch = Watch::start(lab, &SHOP, Allowed::vips(vips), table)?;
    watch.unbroken(lab, "flapping every 3 s for 20 s", |lab| {
        let from = lab.wait_for_announcer(vips[0], None)?;
        let to = from % lab.node_numbers().count() + 1;
        for turn in 0..7 {
            let next = if turn % 2 == 0 { to } else { from };
            let started = Instant::now();
            lab.move_announcement(vips, next)?;
            std::thread::sleep(Duration::from_secs(3).saturating_sub(started.elapsed()));
        }
        Ok(Some((from, to)))
    })?;
    let mut numbers = lab.node_numbers();
    numbers.try_for_each(|number| lab.allow_announcing(number, true))
}
