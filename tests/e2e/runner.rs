//! Runs rows: those of one lab one after the other, some labs at a time, and each that looks at speed alone.
//!
//! What is selected and what is printed is libtest's: a row is a trial that waits for what its lab says of it. A lab
//! starts when its first selected row is due, and ends after its last one.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Error, Result, anyhow};
use libtest_mimic::{Arguments, Failed, Trial};
use metaleg_lab::{Lab, Options, say};

use crate::stage::Stage;

/// Labs at a time where speed is not looked at: most of their time is waiting.
const SIDE_BY_SIDE: usize = 2;
/// Rows that are named when a lab has ended.
const LONGEST: usize = 3;

/// Held by whoever starts or ends a lab, which keeps both cores busy, and by whoever looks at speed.
pub(crate) static CALM: Mutex<()> = Mutex::new(());

/// A lab, and what it must show.
pub(crate) struct Group {
    pub(crate) name: String,
    /// `None` where the rows need no lab.
    pub(crate) options: Option<Options>,
    /// It looks at speed, which a lab beside it would spoil.
    pub(crate) alone: bool,
    pub(crate) rows: Vec<Row>,
}

/// One thing that must be so. It makes what it needs itself, as far as the rows before it have not.
pub(crate) struct Row {
    name: String,
    check: Kind,
    ignored: bool,
}

/// What must be so of a lab.
pub(crate) type Check = fn(&mut Stage) -> Result<()>;

enum Kind {
    Alone(Box<dyn FnOnce() -> Result<()> + Send>),
    OnStage(Check),
}

impl Row {
    pub(crate) fn new(module: &str, name: &str, check: Check) -> Row {
        Row {
            name: format!("{module}::{name}"),
            check: Kind::OnStage(check),
            ignored: false,
        }
    }

    /// A row that needs no lab.
    pub(crate) fn alone(name: String, check: impl FnOnce() -> Result<()> + Send + 'static) -> Row {
        Row {
            name,
            check: Kind::Alone(Box::new(check)),
            ignored: false,
        }
    }

    /// Not run unless libtest's `--ignored` or `--include-ignored` says so.
    pub(crate) fn ignored_unless(mut self, can_run: bool) -> Row {
        self.ignored = !can_run;
        self
    }
}

/// A selected row, and who waits for what becomes of it.
type Due = (Row, Sender<Result<(), Failed>>);

/// Runs what the command line selects.
pub(crate) fn run(groups: Vec<Group>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    let mut trials = Vec::new();
    let mut due = VecDeque::new();
    let mut selected = 0;
    for mut group in groups {
        let mut rows: Vec<Due> = Vec::new();
        for row in std::mem::take(&mut group.rows) {
            let (answer, result) = channel();
            let wait = move || result.recv().unwrap_or_else(|_| Err("never run".into()));
            let trial = Trial::test(&row.name, wait).with_ignored_flag(row.ignored);
            if !arguments.is_filtered_out(&trial) {
                selected += 1;
                if !arguments.is_ignored(&trial) {
                    rows.push((row, answer));
                }
            }
            trials.push(trial);
        }
        if !rows.is_empty() {
            due.push_back((group, rows));
        }
    }
    if arguments.list {
        return libtest_mimic::run(&arguments, trials).exit_code();
    }
    if selected == 0 {
        say!("no row matches: `-- --list` lists all");
        return ExitCode::FAILURE;
    }
    if !due.is_empty() && !nix::unistd::geteuid().is_root() {
        say!("skipped: needs root");
        return match std::env::var_os("CI") {
            Some(_) => ExitCode::FAILURE,
            None => ExitCode::SUCCESS,
        };
    }
    let side_by_side = arguments.test_threads.unwrap_or(SIDE_BY_SIDE);
    if side_by_side > 1 {
        // Trials only wait: one thread each, and each tells at once what became of its row.
        arguments.test_threads = Some(trials.len().max(2));
    }
    let labs = std::thread::spawn(move || run_all(due, side_by_side));
    let conclusion = libtest_mimic::run(&arguments, trials);
    match labs.join() {
        Ok(()) => conclusion.exit_code(),
        Err(_) => ExitCode::FAILURE,
    }
}

fn run_all(groups: VecDeque<(Group, Vec<Due>)>, side_by_side: usize) {
    let (alone, others): (VecDeque<_>, VecDeque<_>) =
        groups.into_iter().partition(|(group, _)| group.alone);
    let others = Mutex::new(others);
    let next = || {
        let mut others = others.lock().unwrap_or_else(PoisonError::into_inner);
        others.pop_front()
    };
    std::thread::scope(|scope| {
        for _ in 0..side_by_side {
            scope.spawn(|| {
                while let Some((group, rows)) = next() {
                    run_group(group, rows);
                }
            });
        }
    });
    for (group, rows) in alone {
        run_group(group, rows);
    }
}

fn run_group(group: Group, rows: Vec<Due>) {
    let calm = || CALM.lock().unwrap_or_else(PoisonError::into_inner);
    let started = Instant::now();
    let lab = group.options.map(|options| {
        let _calm = calm();
        Lab::start(options)
    });
    let mut stage = match lab.transpose() {
        Ok(lab) => lab.map(Stage::new),
        Err(error) => {
            for (_, answer) in rows {
                // Whoever does not wait any more needs no answer, here and below.
                let _ = answer.send(Err(format!("the lab does not start: {error:#}").into()));
            }
            return;
        }
    };
    let up = started.elapsed().as_secs_f64();
    let mut times = Vec::new();
    for (row, answer) in rows {
        let started = Instant::now();
        let result = check(row.check, stage.as_mut());
        let result = result.map_err(|error| match &mut stage {
            Some(stage) => after_failure(stage, &row.name, error),
            None => error,
        });
        times.push((started.elapsed().as_secs_f64(), row.name));
        let _ = answer.send(result.map_err(|error| format!("{error:#}").into()));
    }
    let Some(stage) = stage else {
        return;
    };
    let table = stage.table.to_string();
    if !table.is_empty() {
        say!("{table}");
    }
    {
        let _calm = calm();
        drop(stage);
    }
    let total = started.elapsed().as_secs_f64();
    let rows = times.len();
    times.sort_by(|(one, _), (other, _)| other.total_cmp(one));
    let longest: Vec<String> = times
        .iter()
        .take(LONGEST)
        .map(|(seconds, name)| {
            let row = name.rsplit("::").next().unwrap_or(name);
            format!("{row} {seconds:.1} s")
        })
        .collect();
    say!(
        "lab {}: up in {up:.1} s, {rows} rows, {total:.1} s in all; longest: {}",
        group.name,
        longest.join(", ")
    );
}

fn check(check: Kind, stage: Option<&mut Stage>) -> Result<()> {
    let result = catch_unwind(AssertUnwindSafe(|| match (check, stage) {
        (Kind::Alone(check), _) => check(),
        (Kind::OnStage(check), Some(stage)) => check(stage),
        (Kind::OnStage(_), None) => Err(anyhow!("the row needs a lab")),
    }));
    result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(anyhow!("panicked: {}", text.unwrap_or_default()))
    })
}

/// Keeps what explains the failure, and lets the next rows begin with a lab in which everything runs.
fn after_failure(stage: &mut Stage, name: &str, error: Error) -> Error {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("e2e")
        .join(name.replace("::", "-"));
    let kept = match stage.lab.dump(&target) {
        Ok(()) => format!("state and logs: {}", target.display()),
        Err(error) => format!("no state and logs: {error:#}"),
    };
    let mended = match stage.lab.mend() {
        Ok(()) => String::new(),
        Err(error) => format!("\nthe lab cannot be mended: {error:#}"),
    };
    anyhow!("{error:#}\n{kept}{mended}")
}
