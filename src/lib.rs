//! MetalEG: pods leave the cluster with the MetalLB address of their Service.
//!
//! A per-node agent for bare-metal Kubernetes. A pod of a labelled Service is marked and policy-routed to the
//! node that announces the Service's VIP, the *gateway*, and translated to the VIP there.
//!
//! # Promises
//!
//! | | promise | shown by |
//! |---|---|---|
//! | I1 | never leak: an egress pod's packet to outside leaves with its VIP or not at all | `i1_…` in [`plan`] and [`diff`], `tests/model`: what every packet experiences after each step, rows of `tests/e2e` |
//! | I2 | never steal: replies, traffic inside the cluster, other pods and hosts are not touched | the same model, rows of `tests/e2e` |
//! | I3 | never foreign: only objects that carry our name or protocol number are changed | `tests/kernel` |
//! | I4 | hitless: a restarted agent adopts what is there and changes nothing | `tests/e2e`, `a_start_adopts…` in [`pass`], `slots_are_kept…` in [`plan`] |
//! | I5 | convergent: from any kernel state one pass reaches the desired one | `i5_…` in [`diff`], `damage_…` in `tests/kernel` |
//! | I6 | continuous: connections survive a move of their VIP | `tests/e2e`, in packets and milliseconds; every order of events in `tests/model` |
//! | I7 | quiet: what is written to the kernel is proportional to the change | `i7_…` in [`diff`] |
//!
//! # Data flow
//!
//! One direction; each arrow is a plain value that can be printed:
//!
//! ```text
//! API server --watch--> facts --+
//! LAN -----listen-----> claims -+--pass--> View --plan--> Desired --diff--> Steps --apply--> kernel
//! memory of the last pass ------+                            ^                                 |
//!                               ^                            |                                 |
//!                               +---------------------- KernelState <---------observe----------+
//! ```
//!
//! # Layout
//!
//! From top to bottom; a module imports only from those below it (tested here).
//!
//! * [`agent`]: the loop; one task owns the kernel. [`commands`]: what the operator can ask for beside it.
//! * [`report`]: log, Events, metrics, probes, and the Lease by which other nodes know that this one is programmed.
//! * [`pass`]: the head of a pass, from facts to plan, for agent and `plan` command. Pure.
//! * [`announcers`]: who announces each VIP, and through which node its pods leave. Pure.
//! * [`mod@plan`]: every rule of the product, and why. Pure. [`mod@diff`]: which steps, in which order. Pure.
//! * [`lan`]: who announces a VIP, as heard on the LAN.
//! * [`kernel`]: reads and executes; knows nothing of Kubernetes.
//! * [`cluster`]: Kubernetes objects reduced to facts; [`cluster::watch`] follows them.
//! * [`cli`]: commands and flags; the only place that reads the environment. [`settings`]: what the operator asks for.
//! * [`state`]: what a kernel holds, and the steps that change it. [`ethernet`]: frames. [`tasks`]: what must not end.
//!   [`names`]: names that belong to nobody.
//!
//! # Words
//!
//! * *VIP*: the address that MetalLB gives a Service. *Excluded*: destinations that are not egress.
//! * *Egress pod*: a pod of a labelled Service. *Ordinary pod*: one that is known not to be.
//! * *Claim*: a source's word that a node announces a VIP. *Announcer*: the node of the newest claim.
//!   *Settled*: nothing contradicts it. *Anomaly*: a claim on the LAN of an unknown sender, or two nodes that claim by turns.
//! * *Gateway*: the node that a VIP's pods leave through: the announcer, once it is programmed. *Programmed*: a node whose
//!   kernel its agent has made what it should be, since the node was booted.
//! * *Slot*: a gateway's mark and routing table on one node. *Fallback*: a table's `unreachable` default.
//! * *Guard*: what keeps packets from outside from creating conntrack entries of pods. *Interrupted*: a VIP that another
//!   node may have announced meanwhile: conntrack entries here may be old.
//! * *Skeleton*: the static part of the firewall. *Drift*: a change of ours by others. *Doubt*: connections may have been
//!   opened under other rules. *Remnant*: what another backend or an earlier release left.
//! * *Surroundings*: what of a node decides with us about packets. *Obstacle*: what of them is in a Service's way.

pub mod agent;
pub mod announcers;
mod backoff;
pub mod cli;
pub mod cluster;
pub mod commands;
pub mod diff;
mod error;
pub mod ethernet;
pub mod kernel;
pub mod lan;
pub mod names;
pub mod pass;
pub mod plan;
pub mod report;
pub mod settings;
pub mod state;
pub mod tasks;

// So that tests here and in `tests/` name things in the same way, and share their fixtures.
#[cfg(test)]
extern crate self as metaleg;
#[cfg(test)]
#[path = "../tests/fixtures/mod.rs"]
mod fixtures;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::{Path, PathBuf};

    /// What decides, by path below `src`: no effects, no clock, no cluster.
    const PURE: [&str; 12] = [
        "announcers",
        "cluster/index.rs",
        "cluster/l2status.rs",
        "cluster/mod.rs",
        "cluster/pools.rs",
        "diff",
        "ethernet.rs",
        "lan/hearing.rs",
        "names.rs",
        "pass.rs",
        "plan",
        "state",
    ];
    const EFFECTS: [&str; 10] = [
        "tokio",
        "std::fs",
        "std::process",
        "std::env",
        "std::net::Tcp",
        "Instant::now",
        "SystemTime",
        "async ",
        "kernel::",
        "super::kernel",
    ];

    /// From the ground to the roof: a module imports only from floors below its own.
    const FLOORS: [&[&str]; 10] = [
        &["backoff", "error", "ethernet", "names", "tasks"],
        &["state"],
        &["settings"],
        &["cli", "cluster", "kernel"],
        &["diff", "lan", "plan"],
        &["announcers"],
        &["pass"],
        &["report"],
        &["agent", "commands"],
        &["lib", "main"],
    ];

    /// The production code of every file below `src`: path, and text without comments and tests.
    fn sources() -> Vec<(String, String)> {
        fn collect(folder: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => collect(&path, found),
                    false => found.push(path),
                }
            }
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut found = Vec::new();
        collect(&root, &mut found);
        let relative = |path: &Path| path.strip_prefix(&root).unwrap().display().to_string();
        let sources = found.iter().map(|path| {
            let text = fs::read_to_string(path).unwrap();
            let code = text.split("#[cfg(test)]\nmod ").next().unwrap();
            let lines = code
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"));
            (relative(path), lines.collect::<Vec<_>>().join("\n"))
        });
        sources
            .filter(|(path, _)| !path.ends_with("tests.rs"))
            .collect()
    }

    fn module_of(path: &str) -> &str {
        path.split(['/', '.']).next().unwrap()
    }

    #[test]
    fn what_decides_is_pure() {
        let sources = sources();
        for pure in PURE {
            let is_part = |path: &str| path == pure || module_of(path) == pure;
            let mut parts = sources.iter().filter(|(path, _)| is_part(path)).peekable();
            assert!(parts.peek().is_some(), "no file is {pure}");
            for (path, code) in parts {
                for word in EFFECTS {
                    assert!(!code.contains(word), "{path} contains `{word}`");
                }
            }
        }
    }

    #[test]
    fn imports_run_downward_only_and_so_in_no_circle() {
        let floor = |module: &str| FLOORS.iter().position(|floor| floor.contains(&module));
        for (path, code) in sources() {
            let module = module_of(&path);
            let own = floor(module).unwrap_or_else(|| panic!("{path} is on no floor"));
            for import in code.split("crate::").skip(1) {
                let is_end = |c: char| !c.is_ascii_lowercase();
                let import = import.split(is_end).next().unwrap();
                let is_below = floor(import).is_some_and(|floor| floor < own);
                assert!(
                    import == module || is_below,
                    "{path} imports {import}, which is not below"
                );
            }
        }
        let all: BTreeSet<_> = FLOORS.concat().into_iter().collect();
        assert_eq!(
            all.len(),
            FLOORS.concat().len(),
            "a module is on two floors"
        );
    }
}
