//! The backends against the real kernel: each test has a network namespace of its own.
//!
//! What the code wrote is also looked at with `ip`, `ipset` and `iptables-save`: a reader that shares the
//! writer's mistake would not see it.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking and tells what it measured"
)]

mod conntrack;
mod crash;
mod drift;
mod firewall;
mod lan;
mod routes;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::future::Future;
use std::net::IpAddr;
use std::process::Command;

use metaleg::diff::diff;
use metaleg::kernel::{Kernel, NodeKernel};
use metaleg::settings::FirewallBackend;
use metaleg::state::{
    Family, FamilyState, FirewallState, KernelState, Mark, NextHop, PodState, RouteState, Rule,
    RuleAction, Skeleton, Table, TableId,
};
use nix::mount::MsFlags;
use nix::sched::CloneFlags;

const MASK: u32 = 0x00f0_0000;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Runs a test in new network and mount namespaces, with `eth0` up.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "needs root");
        println!("skipped: needs root");
        return;
    }
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        // A /run of its own, so that parallel tests do not wait for each other's xtables lock.
        let none = None::<&str>;
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        nix::mount::mount(none, "/", none, private, none).unwrap();
        nix::mount::mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
        sh(
            "ip link set lo up; ip link add eth0 type veth peer name wire; ip link set wire up; ip link set eth0 up;
            ip addr add 192.0.2.11/24 dev eth0; ip addr add 2001:db8:1::11/64 dev eth0 nodad",
        );
        // What goes on beside a test goes on while it looks at something.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build();
        runtime.unwrap().block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a shell script that must succeed, and returns what it printed.
fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-euc", script]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// What the agent is to use.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// iptables on nf_tables.
    Nft,
    /// iptables on ip_tables.
    Legacy,
    /// A table of its own.
    Own,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::Nft | Mode::Own => "nft",
            Mode::Legacy => "legacy",
        }
    }

    fn backend(self) -> FirewallBackend {
        match self {
            Mode::Own => FirewallBackend::Nftables,
            Mode::Nft | Mode::Legacy => FirewallBackend::Iptables,
        }
    }

    /// `iptables-nft` or `iptables-legacy`, and the same for IPv6.
    fn tools(self) -> [String; 2] {
        ["iptables", "ip6tables"].map(|tool| format!("{tool}-{}", self.name()))
    }

    /// Everything that the tools show in both families.
    fn save(self) -> String {
        match self {
            Mode::Own => sh("nft list ruleset"),
            Mode::Nft | Mode::Legacy => self
                .tools()
                .map(|tool| sh(&format!("{tool}-save")))
                .concat(),
        }
    }
}

/// The mode of iptables is said the way a kubelet does.
async fn open(mode: Mode) -> NodeKernel {
    for tool in mode.tools() {
        sh(&format!(
            "{tool} -t mangle -N KUBE-IPTABLES-HINT 2>/dev/null || true"
        ));
    }
    open_backend(mode.backend()).await
}

async fn open_backend(backend: FirewallBackend) -> NodeKernel {
    let name = match backend {
        FirewallBackend::Auto => "auto",
        FirewallBackend::Nftables => "nftables",
        FirewallBackend::Iptables => "iptables",
    };
    let backend = format!("--firewall-backend={name}");
    let args = ["agent", "--node-name=node1", &backend];
    let (_, settings) = metaleg::cli::load(args.map(Into::into)).unwrap();
    assert_eq!(settings.mask.bits(), MASK);
    NodeKernel::open(&settings).await.unwrap()
}

/// What there is, apart from the doubt about connections that comes with looking.
async fn observe(kernel: &mut NodeKernel) -> KernelState {
    KernelState {
        doubt: false,
        ..kernel.observe().await.unwrap().state
    }
}

fn rule(place: u32, action: RuleAction) -> Rule {
    Rule {
        priority: 1000 + place,
        action,
        mark: None,
        not: false,
        from: None,
        to: None,
    }
}

/// What a plan for a small cluster looks like: pods in every state, in both families.
fn example() -> KernelState {
    let slot_1 = Mark {
        value: 0x0010_0000,
        mask: MASK,
    };
    let unmarked = Some(Mark {
        value: 0,
        mask: MASK,
    });
    let mut families = BTreeMap::new();
    for (family, pod, vip, via, nets) in [
        (
            Family::V4,
            "10.244.1.",
            ["192.0.2.200", "192.0.2.201"],
            "192.0.2.12",
            [
                "10.244.2.0/24",
                "127.0.0.0/8",
                "10.244.1.0/24",
                "192.0.2.11/32",
            ],
        ),
        (
            Family::V6,
            "fd00:10:244:1::",
            ["2001:db8:1::c8", "2001:db8:1:ffff:ffff:ffff:ffff:ffff"],
            "2001:db8:1::12",
            [
                "fd00:10:244:2::/64",
                "::1/128",
                "fe80::/10",
                "2001:db8:1::11/128",
            ],
        ),
    ] {
        let vips: BTreeSet<IpAddr> = vip.map(ip).into();
        let translated = PodState {
            egress: true,
            vips: [ip(vip[0])].into(),
            ..PodState::default()
        };
        let states = [
            translated.clone(),
            PodState {
                mark: Some(slot_1),
                ..translated.clone()
            },
            PodState {
                gateway_here: true,
                vips: [ip(vip[1])].into(),
                ..translated.clone()
            },
            PodState {
                blocked: true,
                vips: BTreeSet::new(),
                ..translated
            },
            PodState {
                ordinary: true,
                ..PodState::default()
            },
        ];
        let pods = (11..)
            .zip(states)
            .map(|(last, state)| (ip(&format!("{pod}{last}")), state));
        let nets = nets.map(|net| net.parse().unwrap());
        let table = TableId(100_001);
        let mut rules = BTreeSet::from([
            Rule {
                mark: unmarked,
                ..rule(0, RuleAction::Goto(1099))
            },
            Rule {
                mark: Some(slot_1),
                ..rule(2, RuleAction::Lookup(table))
            },
            Rule {
                mark: unmarked,
                not: true,
                ..rule(98, RuleAction::Unreachable)
            },
            rule(99, RuleAction::Nop),
        ]);
        rules.extend(nets.iter().map(|net| Rule {
            to: Some(*net),
            ..rule(1, RuleAction::Goto(1099))
        }));
        let gateway = NextHop {
            via: ip(via),
            dev: "eth0".to_owned(),
        };
        let table_state = Table {
            fallback: true,
            gateway: Some(gateway),
        };
        let state = FamilyState {
            routes: RouteState {
                rules,
                tables: [(table, table_state)].into(),
            },
            firewall: FirewallState {
                skeleton: Skeleton::Intact,
                excluded: nets.into(),
                remote_pods: [nets[0]].into(),
                local_pods: [nets[0]].into(),
                vips,
                pods: pods.collect(),
            },
        };
        families.insert(family, state);
    }
    KernelState {
        families,
        ..KernelState::default()
    }
}

/// Nothing of ours, as the agent wants it before it goes.
fn nothing() -> KernelState {
    KernelState {
        families: Family::ALL
            .map(|family| (family, FamilyState::default()))
            .into(),
        ..KernelState::default()
    }
}

/// Brings the kernel to a state, from whatever is there.
async fn reach(kernel: &mut NodeKernel, desired: &KernelState) {
    let observed = observe(kernel).await;
    let steps = diff(&observed, desired);
    let failed = kernel.apply(&steps).await;
    let text = failed.iter().fold(String::new(), |mut text, error| {
        let source = std::error::Error::source(error).map(ToString::to_string);
        let _ = writeln!(text, "{error}: {}", source.unwrap_or_default());
        text
    });
    assert!(failed.is_empty(), "{text}");
    assert_eq!(&observe(kernel).await, desired);
}
