//! The lab itself: it must leave nothing behind, however it ends.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use metaleg_lab::{KubeProxy, Lab, Masquerade, Options, ServiceSpec, eventually, say};

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    assert!(root || std::env::var_os("CI").is_none(), "needs root");
    if !root {
        say!("skipped: needs root");
    }
    root
}

/// Everything of labs that run as this process or below: their processes, and their files.
fn leftovers(of: u32) -> Vec<String> {
    let prefix = format!("metaleg-lab-{of}-");
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if command.contains(&prefix) {
            found.push(command);
        }
    }
    for entry in std::fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&prefix) {
            found.push(name);
        }
    }
    found
}

/// Interfaces, rules and routes of the machine itself.
fn machine() -> String {
    let look = "ip -o link | cut -d: -f2; ip rule; ip route; ip netns list";
    let output = Command::new("sh").args(["-c", look]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn two_labs_run_side_by_side_and_leave_nothing() {
    if !is_root() {
        return;
    }
    let before = machine();
    let start = || {
        Lab::start(Options {
            nodes: 2,
            kube_proxy: KubeProxy::Iptables,
            masquerade: Masquerade::IptablesNft,
            agent: "/bin/false".into(),
            settings: Vec::new(),
        })
    };
    let mut labs = [start().unwrap(), start().unwrap()];
    for lab in &mut labs {
        lab.create_pod("pod", 1, "app").unwrap();
        let vips = lab.create_service(&ServiceSpec::new("app")).unwrap();
        lab.wait_for_announcer(vips[0], None).unwrap();
    }
    drop(labs);
    assert_eq!(machine(), before);
    assert_eq!(leftovers(std::process::id()), Vec::<String>::new());
}

fn a_lab_that_gets_a_signal_leaves_nothing(signal: &str, files_too: bool) {
    if !is_root() {
        return;
    }
    let before = machine();
    let program = env!("CARGO_BIN_EXE_metaleg-lab");
    let mut lab = Command::new(program)
        .args(["up", "--agent", "/bin/false"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(lab.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("up in")));
    let pid = lab.id();
    Command::new("kill")
        .args([signal, &pid.to_string()])
        .status()
        .unwrap();
    lab.wait().unwrap();
    let mut left = Vec::new();
    let all_have_ended = eventually(Duration::from_secs(5), "all processes have ended", || {
        left = leftovers(pid);
        left.retain(|left| files_too || left.contains(' '));
        Ok(left.is_empty().then_some(()))
    });
    assert!(all_have_ended.is_ok(), "{left:#?}");
    assert_eq!(machine(), before);
}

#[test]
fn a_lab_that_is_interrupted_leaves_nothing() {
    a_lab_that_gets_a_signal_leaves_nothing("-INT", true);
}

#[test]
fn a_lab_that_is_killed_leaves_files_for_the_next_one_to_sweep_and_nothing_else() {
    a_lab_that_gets_a_signal_leaves_nothing("-KILL", false);
}
