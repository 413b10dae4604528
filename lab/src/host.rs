//! Hosts of the lab: a process that holds a network and a mount namespace, and programs that run in them.
//!
//! The namespaces have no name: when the holders end, everything in them is gone. Every process of the lab asks
//! the kernel to be killed when the thread that started it ends, so that nothing is left even when the lab
//! itself is killed.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The tools' usual places: nothing of the caller's environment reaches the lab.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What runs in every host first: a `/run` of its own, because iptables locks a file there.
const HOLD: &str =
    "mount -t tmpfs tmpfs /run && ip link set lo up && echo ready && exec sleep infinity";

/// A command, and where to say what has come of it; `None` is the last one.
type Job = Option<(Command, Sender<std::io::Result<Child>>)>;

static SPAWNER: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();

/// Starts processes from a thread that lives as long as the lab's process: the parent-death signal is sent when
/// the starting thread ends, not when the process does.
fn spawn(command: Command) -> Result<Child> {
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs) = channel::<Job>();
        thread::spawn(move || {
            while let Ok(Some((mut command, answer))) = jobs.recv() {
                // Nobody waits for the answer any more when this fails.
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(sender)
    });
    let (answer, result) = channel();
    let sender = spawner
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    sender
        .send(Some((command, answer)))
        .map_err(|_| anyhow!("the thread that starts processes is gone"))?;
    let child = result
        .recv()
        .context("the thread that starts processes is gone")?;
    child.context("cannot start a process of the lab")
}

/// Kills all processes of all labs, by the end of the thread that has started them. No more can be started.
pub(crate) fn end_all() {
    if let Some(spawner) = SPAWNER.get() {
        let spawner = spawner.lock().unwrap_or_else(PoisonError::into_inner);
        // Where that thread is gone they are, too.
        let _ = spawner.send(None);
    }
}

/// A command that is killed with the lab.
fn bound_command() -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--"])
        .env_clear()
        .env("PATH", PATH)
        .stdin(Stdio::null());
    command
}

/// One machine of the lab.
#[derive(Debug)]
pub struct Host {
    /// Its name, as in messages and logs.
    pub name: String,
    holder: Process,
}

impl Host {
    /// Makes a host without any interface but loopback.
    ///
    /// # Errors
    /// When namespaces cannot be made: needs root.
    pub fn new(name: &str) -> Result<Host> {
        let mut command = bound_command();
        command
            .args(["unshare", "--net", "--mount", "--", "sh", "-c", HOLD])
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let mut child = spawn(command)?;
        let stdout = child.stdout.take().context("no output of the holder")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        if line.trim() != "ready" {
            bail!("cannot make the namespaces of {name}");
        }
        Ok(Host {
            name: name.to_owned(),
            holder: Process {
                name: name.to_owned(),
                child,
            },
        })
    }

    /// The process that holds the namespaces, for `nsenter -t PID -n -m`.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.holder.child.id()
    }

    fn enter(&self, mut command: Command) -> Command {
        let pid = self.pid().to_string();
        command.args(["nsenter", "-t", &pid, "-n", "-m", "--"]);
        command
    }

    /// Runs a shell script that must succeed, and returns what it printed.
    ///
    /// # Errors
    /// With what it wrote to stderr when it fails.
    pub fn sh(&self, script: &str) -> Result<String> {
        let output = self.output(script)?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("on {}: {}: {}", self.name, script.trim(), stderr.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs a shell script, whatever comes of it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn output(&self, script: &str) -> Result<Output> {
        let mut command = self.enter(bound_command());
        command
            .args(["sh", "-euc", script])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        spawn(command)?
            .wait_with_output()
            .with_context(|| format!("cannot run a script on {}", self.name))
    }

    /// Starts a program that goes on, with its output in a log file.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, program: &Program) -> Result<Process> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(&program.log)
            .with_context(|| format!("cannot write {}", program.log.display()))?;
        let mut command = self.enter(bound_command());
        command.stdout(log.try_clone()?).stderr(log);
        // Not of setpriv and nsenter: a PATH of the program's own must not hide them.
        command.arg("env").arg("-i").arg(format!("PATH={PATH}"));
        for (name, value) in &program.env {
            command.arg(format!("{name}={value}"));
        }
        command.arg(&program.path).args(&program.args);
        Ok(Process {
            name: program.name.clone(),
            child: spawn(command)?,
        })
    }

    /// Does something in the host's network, on a thread of its own.
    ///
    /// # Errors
    /// When the network cannot be entered.
    pub fn inside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<thread::JoinHandle<T>> {
        let namespace = File::open(format!("/proc/{}/ns/net", self.pid()))
            .with_context(|| format!("cannot open the network of {}", self.name))?;
        let (entered, result) = channel();
        let handle = thread::Builder::new()
            .name(self.name.clone())
            .spawn(move || {
                let done = setns(&namespace, CloneFlags::CLONE_NEWNET);
                let failed = done.is_err();
                // The caller waits for it.
                let _ = entered.send(done);
                if failed { None } else { Some(work()) }
            })?;
        result
            .recv()?
            .with_context(|| format!("cannot enter the network of {}", self.name))?;
        let name = self.name.clone();
        // The outer thread only unwraps what is always there.
        Ok(thread::spawn(move || match handle.join() {
            Ok(Some(value)) => value,
            Ok(None) => unreachable!("{name} was entered"),
            Err(panic) => std::panic::resume_unwind(panic),
        }))
    }
}

/// What to start on a host.
#[derive(Clone, Debug)]
pub struct Program {
    /// Name for messages.
    pub name: String,
    /// The executable.
    pub path: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its environment, beside the usual PATH.
    pub env: Vec<(String, String)>,
    /// Where its output goes.
    pub log: PathBuf,
}

impl Program {
    /// A program with a log file of its name.
    #[must_use]
    pub fn new(name: &str, path: impl Into<PathBuf>, logs: &Path) -> Program {
        Program {
            name: name.to_owned(),
            path: path.into(),
            args: Vec::new(),
            env: Vec::new(),
            log: logs.join(format!("{name}.log")),
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Program {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Program {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_tail(&self, lines: usize) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

/// A running process; killed when it goes out of scope.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
}

impl Process {
    /// Sends a signal.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).map(Pid::from_raw)?;
        kill(pid, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// Whether it has ended, and how.
    #[must_use]
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// When it still runs at the end of the time.
    pub fn wait(&mut self, limit: Duration) -> Result<std::process::ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended() {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} still runs after {limit:?}", self.name);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ended already: then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
