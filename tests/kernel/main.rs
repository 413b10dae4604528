//! The backends against the real kernel: each test has a network namespace of its own.
//!
//! What the code wrote is also looked at with `ip`, `ipset` and `iptables-save`: a reader that shares the
//! writer's mistake would not see it. What packets experience is seen by a server outside, see `server.rs`.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and tells what it measured"
)]

#[macro_use]
mod mode;

mod hosts;
mod namespace;
mod server;
mod states;
mod talk;

mod challenge;
mod conntrack;
mod crash;
mod drift;
mod firewall;
mod foreign_nat;
mod guard;
mod inbound;
mod lan;
mod on_link;
mod remnants;
mod routes;
mod ways;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::process::Command;

use metaleg::diff::diff;
use metaleg::kernel::{Drift, Kernel, NodeKernel};
use metaleg::settings::FirewallBackend;
use metaleg::state::{
    ConnectionStep, Family, FamilyState, FirewallStep, KernelState, Landmark, Mark, NetSet,
    NextHop, PodSet, PodState, Remnant, RouteState, RouteStep, Rule, RuleAction, Skeleton, Step,
    Table, TableId, Way,
};

use crate::mode::{Mode, open, open_backend};
use crate::namespace::{eventually, in_namespace, on, sh};
use crate::states::{
    FLOOR, MASK, apply, changed, example, idle, ip, node, nothing, observe, outside, pod, reach,
    reach_and_die, rebuild_ways, rule, unlabelled, vip,
};
