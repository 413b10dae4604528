//! Runs a command-line tool with input and a deadline.
//!
//! The only place that starts processes.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::kernel::netlink::OwnPorts;

/// A batch of 10,000 elements takes less than a second; what takes this long waits for a lock that nobody
/// releases.
const DEADLINE: Duration = Duration::from_secs(30);

/// Why a tool did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    #[error("cannot start `{tool}` (Debian package {package})")]
    Start {
        tool: String,
        package: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("`{tool}` did not end within {} s", DEADLINE.as_secs())]
    TimedOut { tool: String },
    #[error("`{tool}` failed: {message}")]
    Failed {
        tool: String,
        /// The first line that it wrote to stderr, or its exit status.
        message: String,
        /// The line of its input that it names, from 1.
        line: Option<usize>,
    },
}

impl ToolError {
    /// The place of the input line that the tool complained about, from 0.
    pub(crate) fn bad_line(&self) -> Option<usize> {
        match self {
            ToolError::Failed { line, .. } => line.and_then(|line| line.checked_sub(1)),
            ToolError::Start { .. } | ToolError::TimedOut { .. } => None,
        }
    }
}

/// Runs a tool with `input` and returns what it wrote to stdout.
pub(crate) async fn run(tool: &str, args: &[&str], input: String) -> Result<String, ToolError> {
    run_as(&OwnPorts::default(), tool, args, input).await
}

/// The same; what it changes is no drift.
pub(crate) async fn run_as(
    ports: &OwnPorts,
    tool: &str,
    args: &[&str],
    input: String,
) -> Result<String, ToolError> {
    let start_error = |source| ToolError::Start {
        tool: tool.to_owned(),
        package: match tool {
            "nft" => "nftables",
            ipset if ipset.starts_with("ipset") => "ipset",
            _ => "iptables",
        },
        source,
    };
    let mut child = Command::new(tool)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(start_error)?;
    if let Some(process) = child.id() {
        ports.started(process);
    }
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A tool that stops reading says why on stderr.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
    };
    let work = async { tokio::join!(feed, child.wait_with_output()).1 };
    let output = tokio::time::timeout(DEADLINE, work)
        .await
        .map_err(|_| ToolError::TimedOut {
            tool: tool.to_owned(),
        })?
        .map_err(start_error)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let (message, line) = complaint(&String::from_utf8_lossy(&output.stderr), output.status);
    Err(ToolError::Failed {
        tool: tool.to_owned(),
        message,
        line,
    })
}

/// What a tool complains about: the line that says so, and the input line that it names. ipset says `Error in
/// line 3: …`; iptables-restore says `line 3 failed`, `Error occurred at line: 3` or `…: line 3: …`, depending
/// on the mode, often after the reason itself.
fn complaint(stderr: &str, status: ExitStatus) -> (String, Option<usize>) {
    let said: Vec<&str> = stderr
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#') && !line.starts_with("Try "))
        .collect();
    let line = said.iter().find_map(|text| {
        let (_, rest) = text.split_once("line")?;
        let digits: String = rest
            .trim_start_matches([':', ' '])
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        digits.parse().ok()
    });
    let message = match said.first() {
        Some(first) => (*first).to_owned(),
        None => status.to_string(),
    };
    (message, line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_a_tool_complains_about_is_found() {
        for (stderr, message, line) in [
            (
                "ipset v7.17: Error in line 3: Syntax error: '300.0.0.1' is out of range\n",
                "ipset v7.17: Error in line 3: Syntax error: '300.0.0.1' is out of range",
                Some(3),
            ),
            (
                "iptables-restore: line 12 failed\n",
                "iptables-restore: line 12 failed",
                Some(12),
            ),
            (
                "iptables-nft-restore v1.8.9 (nf_tables): Set X doesn't exist.\n\nError occurred at line: 4\nTry `iptables-restore -h' for more information.\n",
                "iptables-nft-restore v1.8.9 (nf_tables): Set X doesn't exist.",
                Some(4),
            ),
            ("", "exit status: 0", None),
        ] {
            assert_eq!(
                complaint(stderr, ExitStatus::default()),
                (message.to_owned(), line)
            );
        }
    }

    #[tokio::test]
    async fn a_tool_that_is_missing_names_its_package() {
        let error = run("ipset-that-is-not-there", &[], String::new())
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot start `ipset-that-is-not-there` (Debian package ipset)"
        );
    }
}
