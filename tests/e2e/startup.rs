//! Settings that make no sense, and an API server or objects that are not there: one clear line, nothing changed.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use metaleg_lab::host::{Host, Program};
use metaleg_lab::probe::http_get;
use metaleg_lab::{Lab, SOON, eventually};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::AGENT;
use crate::leaving::{Before, leave_as, settle};
use crate::runner::{Group, Row};
use crate::stage::Stage;

/// Pods of the egress Service.
const SHOP: [&str; 3] = ["shop-1", "shop-2", "shop-3"];
/// Within 25 s: TCP asks after 10 s of silence, and three times more every 5 s.
const SILENCE: Duration = Duration::from_secs(30);
const STATUSES: &str = "servicel2statuses.metallb.io";

/// Everything that the agent could have changed.
const LOOK: &str = "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; \
                    ipset save; nft list ruleset; cat /proc/net/ip_tables_names 2>/dev/null || true";

const KUBECONFIG: &str = "{apiVersion: v1, kind: Config, current-context: x,
  clusters: [{name: x, cluster: {server: 'https://127.0.0.1:1'}}],
  users: [{name: x, user: {token: x}}], contexts: [{name: x, context: {cluster: x, user: x}}]}";

/// What becomes of a setting: a name, the setting, and the line that refuses it.
const REFUSED: [(&str, &str, &str, &str); 7] = [
    (
        "a_mask_with_gaps",
        "FIREWALL_MASK",
        "0x0F0F0000",
        "FIREWALL_MASK=0x0F0F0000: is not contiguous",
    ),
    (
        "a_mask_that_is_no_number",
        "FIREWALL_MASK",
        "many",
        "FIREWALL_MASK=many: must be a hexadecimal number",
    ),
    (
        "an_interval_without_a_unit",
        "RECONCILIATION_INTERVAL",
        "5 parsecs",
        "RECONCILIATION_INTERVAL=5 parsecs: must be a duration",
    ),
    (
        "an_unknown_backend",
        "FIREWALL_BACKEND",
        "ebpf",
        "FIREWALL_BACKEND=ebpf: unknown, must be auto or nftables or iptables",
    ),
    (
        "a_cidr_that_is_none",
        "FIREWALL_EXCLUDE_DST_CIDRS",
        "10.0.0.0/40",
        "FIREWALL_EXCLUDE_DST_CIDRS=10.0.0.0/40: `10.0.0.0/40` is neither",
    ),
    ("no_node_name", "NODE_NAME", "", "NODE_NAME is not set"),
    (
        "an_unknown_log_level",
        "RUST_LOG",
        "metaleg=loud",
        "RUST_LOG=metaleg=loud: ",
    ),
];

/// The rows that need no cluster.
pub(crate) fn group() -> Group {
    let refusals = REFUSED.into_iter().map(|(row, name, value, line)| {
        Row::alone(format!("startup::refuses::{row}"), move || {
            refused(name, value, 2, line)
        })
    });
    let alone = |row, check: fn() -> Result<()>| Row::alone(format!("startup::{row}"), check);
    let others: [Row; 3] = [
        alone("without_a_kubeconfig", without_kubeconfig),
        alone("without_nft", without_nft),
        alone("api_server_does_not_answer", unreachable),
    ];
    Group {
        name: "startup".to_owned(),
        options: None,
        alone: false,
        rows: refusals.chain(others).collect(),
    }
}

/// The rows that need a cluster, whatever its kind.
pub(crate) fn rows_of_a_lab() -> [Row; 2] {
    [
        Row::new("startup", "crd_comes_late", crd_comes_late),
        Row::new("startup", "api_server_goes_silent", |stage| {
            stage.shop()?;
            let Stage { lab, vips, .. } = stage;
            let result = silent_api_server(lab, vips);
            // After a failure it is still there.
            lab.node(1)
                .output("nft delete table inet silence 2>/dev/null")?;
            result
        }),
    ]
}

fn without_kubeconfig() -> Result<()> {
    refused(
        "KUBECONFIG",
        "/nowhere/kubeconfig",
        1,
        "no way to the API server",
    )
}

/// Without MetalLB's ServiceL2Status agents wait and say so; when it comes they go on.
fn crd_comes_late(stage: &mut Stage) -> Result<()> {
    if stage.lab.is_installed() {
        stage.lab.uninstall_metaleg()?;
    }
    let lab = &mut stage.lab;
    let crd = lab.kubectl(&["get", "crd", STATUSES, "-o", "json"])?;
    let mut crd: serde_json::Value = serde_json::from_str(&crd)?;
    crd["metadata"] = json!({"name": STATUSES});
    crd.as_object_mut().context("no object")?.remove("status");
    lab.kubectl(&["delete", "crd", STATUSES, "--wait=true"])?;
    lab.apply_metaleg()?;
    for number in lab.node_numbers() {
        eventually(SOON, "the agent says what it waits for", || {
            let answer = http_get(lab.node(number), 21794, "/readyz")?;
            let is_told = answer.starts_with("HTTP/1.1 503")
                && answer.contains("ServiceL2Statuses")
                && answer.contains("is a MetalLB installed");
            ensure!(is_told, "{answer}");
            Ok(Some(()))
        })?;
    }
    lab.api().create(
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
        &crd,
    )?;
    lab.wait_for_agents()?;
    stage.shop()
}

/// As when its machine loses power: no packet says that connections have ended.
fn silent_api_server(lab: &mut Lab, vips: &[IpAddr]) -> Result<()> {
    let before = lab.agent_log(1).len();
    let is_told = |lab: &Lab, text: &str| {
        let log = lab.agent_log(1);
        log.get(before..).is_some_and(|log| log.contains(text))
    };
    lab.node(1).sh("nft 'table inet silence { \
         chain answers { type filter hook input priority raw; tcp sport 6443 drop; }; \
         chain questions { type filter hook output priority raw; tcp dport 6443 drop; }; \
     }'")?;
    eventually(SILENCE, "the silence is told", || {
        Ok(is_told(lab, "the API server does not answer").then_some(()))
    })?;
    leave_as(lab, &SHOP, vips)?;
    lab.node(1).sh("nft delete table inet silence")?;
    lab.create_pod("after-1", 1, "shop")?;
    settle(lab, &["after-1"], vips, Before::Nodes)?;
    // A watch that goes on says nothing before something changes.
    ensure!(
        is_told(lab, "the API server answers again"),
        "not told that the API server is back"
    );
    lab.delete_pod("after-1")
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
