//! MetalEG: pods leave the cluster with the MetalLB address of their Service.
//!
//! A per-node agent for bare-metal Kubernetes. A pod of a labelled Service is marked and policy-routed to the
//! node that announces the Service's VIP, the *gateway*, and translated to the VIP there.
//!
//! # Promises
//!
//! | | promise | shown by |
//! |---|---|---|
//! | I1 | never leak: an egress pod's packet to outside leaves with its VIP or not at all | `i1_…` in [`plan`] and [`diff`], there also by a model of the data path, rows of `tests/e2e` |
//! | I2 | never steal: replies, traffic inside the cluster, other pods and hosts are not touched | the same model, rows of `tests/e2e` |
//! | I3 | never foreign: only objects that carry our name or protocol number are changed | `tests/kernel` |
//! | I4 | hitless: a restarted agent adopts what is there and changes nothing | `tests/e2e`, `slots_are_kept…` in [`plan`] |
//! | I5 | convergent: from any kernel state one pass reaches the desired one | `i5_…` in [`diff`], `damage_…` in `tests/kernel` |
//! | I6 | continuous: connections survive a move of their VIP | `tests/e2e`, in packets and milliseconds; every order of events in [`diff`] |
//! | I7 | quiet: work is proportional to the change | `i7_…` in [`diff`] |
//!
//! # Data flow
//!
//! One direction; each arrow is a plain value that can be printed:
//!
//! ```text
//! API server --watch--> View --plan--> Desired --diff--> Steps --apply--> kernel
//!                                                  ^                        |
//!                                                  +----- KernelState <-----+
//! ```
//!
//! # Layout
//!
//! * [`settings`]: what the operator asks for; the only place that reads the environment.
//! * [`view`]: Kubernetes objects reduced to facts; [`cluster::watch`] alone reads from the API server.
//! * [`wire`]: who announces a VIP, as heard on the LAN.
//! * [`mod@plan`]: every rule of the product, and why. Pure.
//! * [`state`]: what a kernel holds, and the steps that change it.
//! * [`mod@diff`]: which steps, in which order. Pure.
//! * [`kernel`]: reads and executes; knows nothing of Kubernetes.
//! * [`agent`]: the loop; one task owns the kernel.
//! * [`report`]: probes, metrics, Events, and the Lease that tells other nodes of this one.
//! * [`commands`]: what the operator can ask for beside the agent.
//! * [`client`]: the way to the API server.
//!
//! # Words
//!
//! *VIP*: the address that MetalLB gives a Service. *Announcer*: the node that answers for it on the LAN.
//! *Gateway*: the announcer, as the pods' way out. *Slot*: a gateway's mark and routing table on one node.
//! *Claim*: somebody's word that it announces a VIP. *Remnant*: what another backend or an earlier release left.
//! *Excluded*: destinations that are not egress. *Egress pod*: a pod of a labelled Service. *Free pod*: one that is known
//! not to be. *Programmed*: a node whose kernel its agent has made what it should be, since the node was booted.

pub mod agent;
pub mod announcers;
pub mod cluster;
pub mod commands;
pub mod diff;
mod error;
pub mod ethernet;
pub mod kernel;
pub mod lan;
pub mod names;
pub mod plan;
pub mod report;
pub mod settings;
pub mod state;

// So that tests here and in `tests/` name things in the same way, and share their fixtures.
#[cfg(test)]
extern crate self as metaleg;
#[cfg(test)]
#[path = "../tests/fixtures/mod.rs"]
mod fixtures;

#[cfg(test)]
mod tests {
    /// What decides must not do: no I/O, no clock, no cluster.
    #[test]
    fn plan_and_diff_are_pure() {
        for (file, text) in [
            ("plan/mod.rs", include_str!("plan/mod.rs")),
            ("plan/slots.rs", include_str!("plan/slots.rs")),
            ("plan/excluded.rs", include_str!("plan/excluded.rs")),
            ("diff.rs", include_str!("diff.rs")),
            ("state/mod.rs", include_str!("state/mod.rs")),
            ("state/routing.rs", include_str!("state/routing.rs")),
            ("state/step.rs", include_str!("state/step.rs")),
        ] {
            for word in [
                "tokio",
                "kube::",
                "std::fs",
                "std::process",
                "std::time",
                "std::env",
                "async ",
                "kernel::",
            ] {
                assert!(!text.contains(word), "{file} contains `{word}`");
            }
        }
    }
}
