//! Settings that make no sense, and an API server that does not answer: one clear line, nothing changed.

use std::time::Duration;

use anyhow::{Result, ensure};
use metaleg_lab::eventually;
use metaleg_lab::host::{Host, Program};
use metaleg_lab::probe::http_get;
use nix::sys::signal::Signal;

use crate::{AGENT, Suite};

/// Everything that the agent could have changed.
const LOOK: &str = "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; \
                    ipset save; nft list ruleset; cat /proc/net/ip_tables_names 2>/dev/null || true";

const KUBECONFIG: &str = "{apiVersion: v1, kind: Config, current-context: x,
  clusters: [{name: x, cluster: {server: 'https://127.0.0.1:1'}}],
  users: [{name: x, user: {token: x}}], contexts: [{name: x, context: {cluster: x, user: x}}]}";

pub(crate) fn run(suite: &mut Suite) {
    for (name, value, line) in [
        (
            "FIREWALL_MASK",
            "0x0F0F0000",
            "FIREWALL_MASK=0x0F0F0000: is not contiguous",
        ),
        (
            "FIREWALL_MASK",
            "many",
            "FIREWALL_MASK=many: must be a hexadecimal number",
        ),
        (
            "RECONCILIATION_INTERVAL",
            "5 parsecs",
            "RECONCILIATION_INTERVAL=5 parsecs: must be a duration",
        ),
        (
            "FIREWALL_BACKEND",
            "ebpf",
            "FIREWALL_BACKEND=ebpf: unknown, must be auto or nftables or iptables",
        ),
        (
            "FIREWALL_EXCLUDE_DST_CIDRS",
            "10.0.0.0/40",
            "FIREWALL_EXCLUDE_DST_CIDRS=10.0.0.0/40: `10.0.0.0/40` is neither",
        ),
        ("NODE_NAME", "", "NODE_NAME is not set"),
        ("RUST_LOG", "metaleg=loud", "RUST_LOG=metaleg=loud: "),
    ] {
        suite.row(
            &format!("{name}={value:?} is one line and exit code 2"),
            || refused(name, value, 2, line),
        );
    }
    suite.row(
        "without a way to the API server: one line and exit code 1",
        || {
            refused(
                "KUBECONFIG",
                "/nowhere/kubeconfig",
                1,
                "no way to the API server",
            )
        },
    );
    suite.row(
        "without nft: `nftables` is refused, `auto` uses iptables and says why",
        without_nft,
    );
    suite.row(
        "an API server that does not answer: one line, not ready, nothing changed",
        unreachable,
    );
}

fn agent(host: &Host, directory: &std::path::Path, name: &str, value: &str) -> Program {
    let mut program = Program::new(&host.name, AGENT, directory);
    for (default, of) in [
        ("NODE_NAME", "node1"),
        ("KUBECONFIG", "/nowhere/kubeconfig"),
    ] {
        if default != name {
            program = program.env(default, of);
        }
    }
    program.env(name, value)
}

fn refused(name: &str, value: &str, code: i32, line: &str) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let host = Host::new("agent")?;
    let before = host.sh(LOOK)?;
    let program = agent(&host, directory.path(), name, value);
    let status = host.start(&program)?.wait(Duration::from_secs(5))?;
    let said = program.log_tail(100);
    ensure!(status.code() == Some(code), "ended with {status}: {said}");
    ensure!(said.lines().count() == 1, "not one line: {said}");
    ensure!(
        said.starts_with(&format!("metaleg-agent: {line}")),
        "says: {said}"
    );
    ensure!(host.sh(LOOK)? == before, "the kernel was changed");
    Ok(())
}

fn without_nft() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let kubeconfig = directory.path().join("kubeconfig");
    std::fs::write(&kubeconfig, KUBECONFIG)?;
    let tools = directory.path().join("tools");
    std::fs::create_dir(&tools)?;
    let host = Host::new("agent")?;
    host.sh(&format!(
        "for tool in ipset iptables-nft-save iptables-nft-restore ip6tables-nft-save ip6tables-nft-restore; do
           ln -s $(command -v $tool) {}/; done",
        tools.display()
    ))?;
    let kubeconfig = kubeconfig.display().to_string();
    let tools = tools.display().to_string();
    for (backend, says) in [
        (
            "nftables",
            "metaleg-agent: cannot start `nft` (Debian package nftables)",
        ),
        (
            "auto",
            "because nftables cannot be used: cannot start `nft`",
        ),
    ] {
        let program = agent(&host, directory.path(), "KUBECONFIG", &kubeconfig)
            .env("PATH", &tools)
            .env("FIREWALL_BACKEND", backend);
        let mut process = host.start(&program)?;
        eventually(
            Duration::from_secs(5),
            &format!("{backend}: {says}"),
            || Ok(program.log_tail(100).contains(says).then_some(())),
        )?;
        if backend == "nftables" {
            let status = process.wait(Duration::from_secs(5))?;
            ensure!(status.code() == Some(1), "ended with {status}");
        } else {
            process.signal(Signal::SIGTERM)?;
            process.wait(Duration::from_secs(5))?;
        }
    }
    Ok(())
}

fn unreachable() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let kubeconfig = directory.path().join("kubeconfig");
    std::fs::write(&kubeconfig, KUBECONFIG)?;
    let host = Host::new("agent")?;
    let before = host.sh(LOOK)?;
    let program = agent(
        &host,
        directory.path(),
        "KUBECONFIG",
        &kubeconfig.display().to_string(),
    );
    let mut process = host.start(&program)?;
    let complains = "the API server does not answer";
    eventually(Duration::from_secs(5), "the agent complains", || {
        Ok(program.log_tail(100).contains(complains).then_some(()))
    })?;
    // Long enough for further tries, which must not be told again.
    std::thread::sleep(Duration::from_secs(3));
    let said = program.log_tail(100);
    let warnings: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("WARN") || line.contains("ERROR"))
        .collect();
    ensure!(warnings.len() == 1, "not one line: {said}");

    let answer = http_get(&host, 21794, "/readyz")?;
    ensure!(answer.starts_with("HTTP/1.1 503"), "/readyz says: {answer}");
    ensure!(
        answer.contains("waiting for watches: Services: the API server does not answer"),
        "/readyz says: {answer}"
    );
    ensure!(host.sh(LOOK)? == before, "the kernel was changed");
    process.signal(Signal::SIGTERM)?;
    let status = process.wait(Duration::from_secs(5))?;
    ensure!(status.success(), "ended with {status}");
    Ok(())
}
