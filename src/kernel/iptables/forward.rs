//! The FORWARD chain of the filter table, in any mode: what it drops, and the chain by which we accept packets there.
//!
//! An accept in a table of our own does not help against a drop here. Ours comes last: it only takes the place of the
//! policy, and what other rules drop stays dropped. It is there in the mode that the node's other programs use, whichever
//! the backend.

use std::collections::BTreeSet;

use ipnet::IpNet;

use crate::kernel::error::Error;
use crate::kernel::iptables::by_name::ByName;
use crate::kernel::iptables::detect::detect;
use crate::kernel::iptables::documents::{remove_document, table};
use crate::kernel::iptables::mode::{Variant, has_legacy_table};
use crate::kernel::iptables::save::{Line, restore, save_table};
use crate::kernel::netlink::OwnPorts;
use crate::kernel::tag::{Rule, TAG};
use crate::kernel::tool::ToolError;
use crate::state::{Accepted, Family};

pub(crate) const BASE: &str = "FORWARD";
pub(crate) const FILTER: &str = "filter";
/// Our chain there.
pub(crate) const ACCEPT: &str = "METALEG-ACCEPT";
const NAME: &str = "pods=";

/// The rules of the filter table, each with its chain, if its policy drops what is forwarded.
pub(crate) async fn dropping(
    variant: Variant,
    family: Family,
) -> Result<Option<Vec<(String, String)>>, ToolError> {
    if variant == Variant::Legacy && !has_legacy_table(family, FILTER).await {
        return Ok(None);
    }
    let (lines, policies) = match save_table(variant, family, FILTER).await {
        // Who has made these rules uses other tools.
        Err(ToolError::Start { .. }) if variant == Variant::Legacy => return Ok(None),
        saved => saved?,
    };
    if policies.get(BASE).is_none_or(|policy| policy != "DROP") {
        return Ok(None);
    }
    let rule = |line: Line| Some((line.chain, line.rule?));
    Ok(Some(lines.into_iter().filter_map(rule).collect()))
}

/// What our chain accepts, in any mode.
pub(crate) async fn accepted(family: Family) -> Result<Option<Accepted>, Error> {
    let mut accepted = None;
    for variant in Variant::BOTH {
        let found = found(&of_ours(variant, family).await?);
        accepted = match (accepted, found) {
            // One is enough.
            (Some(_), Some(_)) => Some(Accepted::Damaged),
            (one, other) => one.or(other),
        };
    }
    Ok(accepted)
}

/// Lets packets from some networks, and the answers to them, pass; without any, removes the chain that does so.
pub(crate) async fn accept(
    family: Family,
    sources: &BTreeSet<IpNet>,
    ports: &OwnPorts,
) -> Result<(), Error> {
    let wanted = match sources.is_empty() {
        true => None,
        false => Some(detect(&[family]).await?.0),
    };
    for variant in Variant::BOTH {
        let present = of_ours(variant, family).await?;
        let document = match wanted == Some(variant) {
            true => accept_document(sources, &present),
            false => remove_document(&present, |chain| chain == ACCEPT, |_| false),
        };
        restore(variant, family, document, ports).await?;
    }
    Ok(())
}

/// The lines that concern our chain; none where it is not.
async fn of_ours(variant: Variant, family: Family) -> Result<Vec<Line>, Error> {
    // The rules of others may be many: they are read only where ours are among them.
    let is_there = match variant {
        Variant::Nft => ByName::open()?.has_any(family, [(FILTER, ACCEPT)])?,
        Variant::Legacy => has_legacy_table(family, FILTER).await,
    };
    if !is_there {
        return Ok(Vec::new());
    }
    let mut lines = match save_table(variant, family, FILTER).await {
        Err(ToolError::Start { .. }) if variant == Variant::Legacy => return Ok(Vec::new()),
        saved => saved?.0,
    };
    lines.retain(|line| line.chain == ACCEPT || line.target() == Some(ACCEPT));
    Ok(lines)
}

fn jump() -> Rule {
    Rule::new("jump", format!("-j {ACCEPT}"))
}

fn rules(sources: &BTreeSet<IpNet>) -> Vec<Rule> {
    let answers = |net| {
        let text =
            format!("-m conntrack --ctstate RELATED,ESTABLISHED --ctorigsrc {net} -j ACCEPT");
        Rule::new(&format!("answers={net}"), text)
    };
    let pods = |net| Rule::new(&format!("{NAME}{net}"), format!("-s {net} -j ACCEPT"));
    // What most packets meet comes first.
    sources
        .iter()
        .map(answers)
        .chain(sources.iter().map(pods))
        .collect()
}

fn accept_document(sources: &BTreeSet<IpNet>, present: &[Line]) -> String {
    let rules = rules(sources);
    let rules = rules.iter().map(|rule| rule.append(ACCEPT));
    let jumps = present.iter().filter(|line| line.chain != ACCEPT);
    let declared = [format!(":{ACCEPT} - [0:0]")].into_iter();
    let lines = declared.chain(rules).chain(jumps.map(Line::delete));
    table(FILTER, lines.chain([jump().append(BASE)]))
}

/// What the lines of our chain say.
fn found(lines: &[Line]) -> Option<Accepted> {
    if lines.is_empty() {
        return None;
    }
    let own = lines.iter().filter(|line| line.chain == ACCEPT);
    let tags: Vec<_> = own
        .filter(|line| line.rule.is_some())
        .map(Line::tag)
        .collect();
    let source = |tag: &&str| {
        let (net, _) = tag
            .strip_prefix(TAG)?
            .strip_prefix(NAME)?
            .rsplit_once(':')?;
        net.parse().ok()
    };
    let sources: BTreeSet<IpNet> = tags.iter().flatten().filter_map(source).collect();
    let rules = rules(&sources);
    let is_whole = tags.iter().eq(rules
        .iter()
        .map(|rule| Some(rule.tag.as_str()))
        .collect::<Vec<_>>()
        .iter());
    let jumps: Vec<_> = lines.iter().filter(|line| line.chain != ACCEPT).collect();
    let is_entered = matches!(
        jumps.as_slice(),
        [line] if line.chain == BASE && line.tag() == Some(jump().tag.as_str())
    );
    Some(match is_whole && is_entered && !sources.is_empty() {
        true => Accepted::Sources(sources),
        false => Accepted::Damaged,
    })
}

#[cfg(test)]
mod tests {
    use nix::libc::NF_IP_PRI_FILTER;

    use super::*;
    use crate::kernel::iptables::save::parse;
    use crate::kernel::tests::documented;

    #[test]
    fn the_chain_is_as_documented() {
        let names = |rule: &Rule| rule.tag[TAG.len()..].split('=').next().unwrap().to_owned();
        let rules: Vec<String> = rules(&["10.244.0.0/16".parse().unwrap()].into())
            .iter()
            .map(names)
            .collect();
        let place = format!("{FILTER} {BASE}");
        let priority = NF_IP_PRI_FILTER.to_string();
        let row = [ACCEPT.to_owned(), place, priority, rules.join(" ")];
        assert_eq!(documented("With FORWARD_ACCEPT=true"), [row]);
    }

    #[test]
    fn what_is_written_is_what_is_found_and_a_change_of_it_is_damage() {
        let sources: BTreeSet<IpNet> = ["10.244.0.0/16", "10.245.0.0/16"]
            .map(|net| net.parse().unwrap())
            .into();
        let document = accept_document(&sources, &[]);
        let (lines, _) = parse(&document);
        assert_eq!(found(&lines), Some(Accepted::Sources(sources)));
        for left_out in 0..lines.len() {
            let mut lines = lines.clone();
            let line = lines.remove(left_out);
            let expected = match line.rule {
                // A declaration says nothing.
                None => continue,
                Some(_) => Some(Accepted::Damaged),
            };
            assert_eq!(found(&lines), expected, "without {line:?}");
        }
        assert_eq!(found(&[]), None);
    }
}
