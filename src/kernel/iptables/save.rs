//! Reads and writes the rules of a mode: `iptables-save` and `iptables-restore`.

use std::collections::BTreeMap;

use crate::kernel::iptables::mode::{Variant, legacy_tables};
use crate::kernel::netlink::OwnPorts;
use crate::kernel::tag::TAG;
use crate::kernel::tool::{ToolError, run, run_as};
use crate::state::Family;

/// Seconds to wait for the xtables lock, below the deadline for the tool.
const LOCK_SECONDS: &str = "20";

/// The rules of a mode.
pub(super) async fn save(variant: Variant, family: Family) -> Result<Vec<Line>, ToolError> {
    let text = run(&variant.tool(family, "save"), &[], String::new()).await?;
    Ok(parse(&text).0)
}

/// The rules of one table, and the policies of its chains.
pub(super) async fn save_table(
    variant: Variant,
    family: Family,
    table: &str,
) -> Result<(Vec<Line>, BTreeMap<String, String>), ToolError> {
    let tool = variant.tool(family, "save");
    let text = run(&tool, &["-t", table], String::new()).await?;
    Ok(parse(&text))
}

/// The rules of a mode; none where nobody uses it, or its tools are not there.
pub(super) async fn save_if_used(variant: Variant, family: Family) -> Result<Vec<Line>, ToolError> {
    if variant == Variant::Legacy && legacy_tables(family).await.is_empty() {
        return Ok(Vec::new());
    }
    match save(variant, family).await {
        Err(ToolError::Start { .. }) => Ok(Vec::new()),
        saved => saved,
    }
}

/// Executes a document, as a change from one of our ports; nothing when it is empty.
pub(super) async fn restore(
    variant: Variant,
    family: Family,
    document: String,
    ports: &OwnPorts,
) -> Result<(), ToolError> {
    if document.is_empty() {
        return Ok(());
    }
    let args = ["--noflush", "--wait", LOCK_SECONDS];
    let done = run_as(ports, &variant.tool(family, "restore"), &args, document).await;
    done.map(drop)
}

/// A line of `iptables-save` that is a chain or a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) table: String,
    pub(super) chain: String,
    /// The text after `-A CHAIN`; `None` declares the chain.
    pub(super) rule: Option<String>,
}

impl Line {
    /// What the rule does.
    pub(super) fn target(&self) -> Option<&str> {
        let mut words = self.rule.as_deref()?.split(' ').skip_while(|w| *w != "-j");
        words.nth(1)
    }

    /// The line that removes the rule.
    pub(super) fn delete(&self) -> String {
        format!(
            "-D {} {}",
            self.chain,
            self.rule.as_deref().unwrap_or_default()
        )
    }

    /// Our tag in the rule's comment.
    pub(super) fn tag(&self) -> Option<&str> {
        let (_, rest) = self.rule.as_ref()?.split_once("--comment ")?;
        let comment = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split('"').next()?,
            None => rest.split(' ').next()?,
        };
        comment.starts_with(TAG).then_some(comment)
    }
}

/// Chains and rules, and the policies of built-in chains.
pub(super) fn parse(text: &str) -> (Vec<Line>, BTreeMap<String, String>) {
    let mut table = String::new();
    let mut lines = Vec::new();
    let mut policies = BTreeMap::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            name.clone_into(&mut table);
            continue;
        }
        let declaration = line.strip_prefix(':');
        let rest = declaration.or_else(|| line.strip_prefix("-A "));
        let Some((chain, rule)) = rest.and_then(|rest| rest.split_once(' ')) else {
            continue;
        };
        if let (Some(_), Some(policy)) = (declaration, rule.split(' ').next()) {
            policies.insert(chain.to_owned(), policy.to_owned());
        }
        lines.push(Line {
            table: table.clone(),
            chain: chain.to_owned(),
            rule: declaration.is_none().then(|| rule.to_owned()),
        });
    }
    (lines, policies)
}
