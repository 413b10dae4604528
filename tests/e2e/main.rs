//! The product on real clusters. The oracle is what the other end of a connection sees.
//!
//! One lab for each combination of kube-proxy and CNI masquerade, the rows in it one after the other. Arguments
//! choose labs by a part of their name: `cargo test --test e2e -- legacy`.

mod bad_input;
mod continuity;
mod inputs;
mod rows;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use metaleg_lab::{KubeProxy, Lab, Masquerade, Options, say};

/// The agent of this build.
const AGENT: &str = env!("CARGO_BIN_EXE_metaleg-agent");

/// Counts and tells what passes.
#[derive(Default)]
struct Suite {
    passed: usize,
    failed: usize,
}

impl Suite {
    /// Runs a row; the following ones run whatever comes of it.
    fn row(&mut self, name: &str, check: impl FnOnce() -> Result<()>) {
        let started = Instant::now();
        let result = check();
        let ms = started.elapsed().as_millis();
        match result {
            Ok(()) => {
                self.passed += 1;
                say!("  ok      {name} ({ms} ms)");
            }
            Err(error) => {
                self.failed += 1;
                say!("  FAILED  {name} ({ms} ms)\n          {error:#}");
            }
        }
    }
}

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|part| name.contains(part));
    let mut suite = Suite::default();
    if !nix::unistd::geteuid().is_root() {
        say!("skipped: needs root");
        return if std::env::var_os("CI").is_some() {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        };
    }
    if is_wanted("bad input") {
        say!("bad input");
        bad_input::run(&mut suite);
    }
    // Every backend with every kube-proxy, and every masquerade with every backend that can beat it. The mode of
    // iptables is the masquerade's, as a kubelet would say it.
    for (backend, kube_proxy, masquerade) in [
        ("nftables", KubeProxy::Iptables, Masquerade::IptablesNft),
        ("nftables", KubeProxy::Nftables, Masquerade::IptablesLegacy),
        ("nftables", KubeProxy::Iptables, Masquerade::NftTable),
        ("nftables", KubeProxy::Nftables, Masquerade::NftTable),
        ("iptables", KubeProxy::Iptables, Masquerade::IptablesNft),
        ("iptables", KubeProxy::Nftables, Masquerade::IptablesNft),
        ("iptables", KubeProxy::Iptables, Masquerade::IptablesLegacy),
        ("iptables", KubeProxy::Nftables, Masquerade::IptablesLegacy),
        ("iptables", KubeProxy::Iptables, Masquerade::NftTable),
    ] {
        let name =
            format!("backend {backend}, kube-proxy {kube_proxy:?}, masquerade {masquerade:?}");
        if is_wanted(&name) {
            say!("{name}");
            let options = Options {
                nodes: 3,
                kube_proxy,
                masquerade,
                agent: AGENT.into(),
                settings: vec![("FIREWALL_BACKEND", backend)],
            };
            in_lab(&mut suite, &name, options, rows::run);
        }
    }
    let lab = |kube_proxy, settings| Options {
        nodes: 3,
        kube_proxy,
        masquerade: Masquerade::IptablesNft,
        agent: AGENT.into(),
        settings,
    };
    let both: [(_, Rows); 2] = [
        ("nftables", continuity::many_moves),
        ("iptables", continuity::some_moves),
    ];
    for (backend, rows) in both {
        let name = format!("moves, backend {backend}");
        if is_wanted(&name) {
            say!("{name}");
            let options = Options {
                nodes: 4,
                ..lab(KubeProxy::Iptables, vec![("FIREWALL_BACKEND", backend)])
            };
            in_lab(&mut suite, &name, options, rows);
        }
    }
    if is_wanted("deaths") {
        say!("deaths");
        let options = Options {
            nodes: 4,
            // Whoever dies leaves nothing else that tells how far it came.
            ..lab(
                KubeProxy::Iptables,
                vec![("RUST_LOG", "info,metaleg=debug")],
            )
        };
        in_lab(&mut suite, "deaths", options, continuity::deaths);
    }
    if is_wanted("inputs") {
        say!("inputs");
        let narrow = vec![("FIREWALL_MASK", inputs::NARROW_MASK)];
        let options = lab(KubeProxy::Nftables, narrow);
        in_lab(&mut suite, "inputs", options, inputs::run);
    }
    say!("{} passed, {} failed", suite.passed, suite.failed);
    if suite.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// What a lab must show.
type Rows = fn(&mut Suite, &mut Lab);

fn in_lab(suite: &mut Suite, name: &str, options: Options, rows: Rows) {
    let started = Instant::now();
    let mut lab = match Lab::start(options) {
        Ok(lab) => lab,
        Err(error) => return suite.row("the lab starts", || Err(error)),
    };
    say!("  lab up in {:.1} s", started.elapsed().as_secs_f64());
    let failed_before = suite.failed;
    rows(suite, &mut lab);
    if suite.failed > failed_before {
        let directory = name.replace(", ", "-").replace(' ', "-").to_lowercase();
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join("e2e")
            .join(directory);
        match lab.dump(&target) {
            Ok(()) => say!("  state and logs: {}", target.display()),
            Err(error) => say!("  no state and logs: {error:#}"),
        }
    }
}
