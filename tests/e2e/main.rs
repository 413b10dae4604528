//! The product on real clusters. The oracle is what the other end of a connection sees.
//!
//! | file | what its rows ask |
//! |---|---|
//! | `startup` | What becomes of bad settings, and of an API server or objects that are not there? |
//! | `objects` | What do Services, slices, pods and settings make of a pod? |
//! | `matrix` | Does everything work with each backend, kube-proxy and masquerade? |
//! | `obstacles` | Is it told what of a node itself is in the way of its pods? |
//! | `others` | What of others is on a node, and what of ours is not? |
//! | `continuity` | What do connections experience when things move, die or end? |
//!
//! `cargo test --all-features --test e2e -- --list` lists all rows; each can be run alone, by its name.

mod continuity;
mod leaving;
mod matrix;
mod names;
mod objects;
mod obstacles;
mod others;
mod runner;
mod stage;
mod startup;

use std::process::ExitCode;

use metaleg_lab::{KubeProxy, Masquerade, Options};

/// The agent of this build.
const AGENT: &str = env!("CARGO_BIN_EXE_metaleg-agent");

fn main() -> ExitCode {
    let mut groups = vec![startup::group()];
    // The longest of those side by side come first.
    groups.extend(objects::groups());
    groups.extend(matrix::groups());
    groups.extend(obstacles::groups());
    groups.extend(others::groups());
    groups.extend(continuity::groups());
    runner::run(groups)
}

/// A lab with this build's agent.
fn lab(
    nodes: usize,
    kube_proxy: KubeProxy,
    masquerade: Masquerade,
    settings: &[(&'static str, &'static str)],
) -> Options {
    Options {
        nodes,
        kube_proxy,
        masquerade,
        agent: AGENT.into(),
        // Every step, to be found in the logs of a row that fails.
        settings: [&[("RUST_LOG", "info,metaleg=debug")], settings].concat(),
    }
}
