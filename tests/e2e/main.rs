//! The product on real clusters. The oracle is what the other end of a connection sees.
//!
//! One lab for each combination of backend, kube-proxy and CNI masquerade, two at a time, then those that look at speed,
//! one by one; the rows in each one after the other. Arguments choose labs by a part of their name: `cargo test --test e2e -- legacy`.

mod bad_input;
mod continuity;
mod inputs;
mod rows;

use std::path::Path;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::Result;
use metaleg_lab::{KubeProxy, Lab, Masquerade, Options, say};

/// The agent of this build.
const AGENT: &str = env!("CARGO_BIN_EXE_metaleg-agent");

/// Labs at a time where speed is not looked at: most of their time is waiting.
const SIDE_BY_SIDE: usize = 2;

/// Held by whoever starts or ends a lab, which keeps both cores busy, and by whoever looks at speed.
pub(crate) static CALM: Mutex<()> = Mutex::new(());

/// Counts and tells what passes.
#[derive(Default)]
struct Suite {
    passed: usize,
    failed: usize,
    /// What is to be told at the end, where others talk meanwhile.
    held_back: Option<String>,
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
                self.tell(&format!("  ok      {name} ({ms} ms)"));
            }
            Err(error) => {
                self.failed += 1;
                self.tell(&format!("  FAILED  {name} ({ms} ms)\n          {error:#}"));
            }
        }
    }

    fn tell(&mut self, text: &str) {
        match &mut self.held_back {
            Some(told) => told.extend([text, "\n"]),
            None => say!("{text}"),
        }
    }

    fn add(&mut self, other: &Suite) {
        self.passed += other.passed;
        self.failed += other.failed;
        if let Some(told) = &other.held_back {
            self.tell(told.trim_end());
        }
    }
}

/// What a lab must show.
type Rows = fn(&mut Suite, &mut Lab);

/// A lab, and what it must show.
struct Trial {
    name: String,
    options: Options,
    rows: Rows,
    /// It looks at speed, which a lab beside it would spoil.
    alone: bool,
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
    let (alone, others): (Vec<Trial>, Vec<Trial>) = trials()
        .into_iter()
        .filter(|trial| is_wanted(&trial.name))
        .partition(|trial| trial.alone);
    let others = Mutex::new(others.into_iter());
    let next = || others.lock().unwrap_or_else(PoisonError::into_inner).next();
    let all = Mutex::new(&mut suite);
    std::thread::scope(|scope| {
        for _ in 0..SIDE_BY_SIDE {
            scope.spawn(|| {
                while let Some(trial) = next() {
                    let mut suite = Suite {
                        held_back: Some(String::new()),
                        ..Suite::default()
                    };
                    run(&mut suite, trial);
                    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                    all.add(&suite);
                }
            });
        }
    });
    for trial in alone {
        run(&mut suite, trial);
    }
    say!("{} passed, {} failed", suite.passed, suite.failed);
    if suite.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// The labs.
fn trials() -> Vec<Trial> {
    let lab = |nodes, kube_proxy, masquerade, settings: Vec<_>| Options {
        nodes,
        kube_proxy,
        masquerade,
        agent: AGENT.into(),
        // Every step, to be found in the logs of a row that fails.
        settings: [vec![("RUST_LOG", "info,metaleg=debug")], settings].concat(),
    };
    let mut trials = Vec::new();
    // The longest of those side by side.
    let narrow = vec![("FIREWALL_MASK", inputs::NARROW_MASK)];
    trials.push(Trial {
        name: "inputs".to_owned(),
        options: lab(3, KubeProxy::Nftables, Masquerade::IptablesNft, narrow),
        rows: inputs::run,
        alone: false,
    });
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
        let settings = vec![("FIREWALL_BACKEND", backend)];
        trials.push(Trial {
            name: format!(
                "backend {backend}, kube-proxy {kube_proxy:?}, masquerade {masquerade:?}"
            ),
            options: lab(3, kube_proxy, masquerade, settings),
            rows: rows::run,
            alone: false,
        });
    }
    let common = |nodes, settings| {
        lab(
            nodes,
            KubeProxy::Iptables,
            Masquerade::IptablesNft,
            settings,
        )
    };
    let both: [(_, Rows); 2] = [
        ("nftables", continuity::many_moves),
        ("iptables", continuity::some_moves),
    ];
    for (backend, rows) in both {
        trials.push(Trial {
            name: format!("moves, backend {backend}"),
            options: common(4, vec![("FIREWALL_BACKEND", backend)]),
            rows,
            alone: true,
        });
    }
    trials.push(Trial {
        name: "deaths".to_owned(),
        options: common(4, Vec::new()),
        rows: continuity::deaths,
        alone: true,
    });
    trials
}

fn run(suite: &mut Suite, trial: Trial) {
    suite.tell(&trial.name);
    let started = Instant::now();
    let calm = || CALM.lock().unwrap_or_else(PoisonError::into_inner);
    let lab = {
        let _calm = calm();
        Lab::start(trial.options)
    };
    let mut lab = match lab {
        Ok(lab) => lab,
        Err(error) => return suite.row("the lab starts", || Err(error)),
    };
    let seconds = started.elapsed().as_secs_f64();
    suite.tell(&format!("  lab up in {seconds:.1} s"));
    let failed_before = suite.failed;
    (trial.rows)(suite, &mut lab);
    if suite.failed > failed_before {
        let directory = trial.name.replace(", ", "-").replace(' ', "-");
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join("e2e")
            .join(directory.to_lowercase());
        suite.tell(&match lab.dump(&target) {
            Ok(()) => format!("  state and logs: {}", target.display()),
            Err(error) => format!("  no state and logs: {error:#}"),
        });
    }
    let _calm = calm();
    drop(lab);
}
