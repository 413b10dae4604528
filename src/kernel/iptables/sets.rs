//! The sets, and the `ipset restore` lines that change them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ipnet::IpNet;
use nix::libc::IPPROTO_DCCP;

use crate::kernel::conntrack::LateReply;
use crate::kernel::ours::{OwnSet, digit};
use crate::kernel::tool::{ToolError, run};
use crate::state::{Family, FirewallStep, LATE_REPLY_SECONDS, Landmark};

/// What every set of ours is called.
const PREFIX: &str = "METALEG-";
/// ipset's default of 65,536 would refuse the pods of a large cluster.
const MAX_ELEMENTS: u32 = 1_048_576;
/// The kernel releases a set some time after the rule that used it is gone: how often and how long to wait.
const RELEASE_TRIES: u32 = 40;
const RELEASE_PAUSE: Duration = Duration::from_millis(50);

/// The sets that are always there, one of each for each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StaticSet {
    /// A set that the other backend has, too.
    Set(OwnSet),
    /// Marks of pods that are routed to another node.
    Mark,
    /// LAN interfaces, with any address.
    Lans,
    /// Pods that are in the set of a VIP.
    Translated,
}

impl StaticSet {
    pub(super) fn all() -> impl Iterator<Item = StaticSet> {
        let sets = OwnSet::all().map(StaticSet::Set);
        sets.chain([StaticSet::Mark, StaticSet::Lans, StaticSet::Translated])
    }

    pub(super) fn name(self, family: Family) -> String {
        let word = match self {
            StaticSet::Set(set) => set.word(),
            StaticSet::Mark => "mark",
            StaticSet::Lans => "lans",
            StaticSet::Translated => "translated",
        };
        let word = word.to_uppercase().replace('_', "-");
        format!("{PREFIX}{word}-{}", digit(family))
    }

    pub(super) fn create(self, family: Family) -> String {
        let (kind, extension) = match self {
            StaticSet::Set(OwnSet::Nets(_)) => ("hash:net", String::new()),
            StaticSet::Set(OwnSet::Pods(_) | OwnSet::Vips) | StaticSet::Translated => {
                ("hash:ip", String::new())
            }
            StaticSet::Set(OwnSet::LateReplies) => {
                ("hash:ip,port,ip", format!(" timeout {LATE_REPLY_SECONDS}"))
            }
            StaticSet::Mark => ("hash:ip", " skbinfo".to_owned()),
            StaticSet::Lans => ("hash:net,iface", String::new()),
        };
        create(&self.name(family), kind, family, &extension)
    }
}

fn create(name: &str, kind: &str, family: Family, extension: &str) -> String {
    let inet = match family {
        Family::V4 => "inet",
        Family::V6 => "inet6",
    };
    format!("create {name} {kind} family {inet} maxelem {MAX_ELEMENTS}{extension}\n")
}

/// The set of the pods that are translated to a VIP. A set's name has at most 31 characters, so that an IPv6
/// address does not fit as text: it is written in base 64 (RFC 4648, URL-safe), 22 characters.
pub(super) fn vip_set(vip: IpAddr) -> String {
    match vip {
        IpAddr::V4(v4) => format!("{PREFIX}VIP-{v4}"),
        IpAddr::V6(v6) => format!("{PREFIX}6{}", URL_SAFE_NO_PAD.encode(v6.octets())),
    }
}

/// The VIP that a set belongs to, if it is one of these.
pub(super) fn vip_of_set(name: &str) -> Option<IpAddr> {
    let rest = name.strip_prefix(PREFIX)?;
    if let Some(v4) = rest.strip_prefix("VIP-") {
        return v4.parse().ok().map(IpAddr::V4);
    }
    let octets = URL_SAFE_NO_PAD.decode(rest.strip_prefix('6')?).ok()?;
    Some(IpAddr::from(<[u8; 16]>::try_from(octets).ok()?))
}

pub(super) fn create_vip(vip: IpAddr) -> String {
    let family = Family::of(vip);
    let guard = StaticSet::Set(OwnSet::Vips).name(family);
    create(&vip_set(vip), "hash:ip", family, "") + &format!("add {guard} {vip}\n")
}

/// The network of all addresses.
pub(super) fn everything(family: Family) -> &'static str {
    match family {
        Family::V4 => "0.0.0.0/0",
        Family::V6 => "::/0",
    }
}

/// How a step is executed.
#[derive(Debug)]
pub(super) enum Work<'a> {
    /// By a line for `ipset restore`.
    Member(String),
    /// By lines that depend on the pod's other VIPs.
    Translate(IpAddr, IpAddr),
    Untranslate(IpAddr, IpAddr),
    Install(Family, &'a BTreeSet<IpAddr>),
    Remove(Family),
    AddVip,
    RemoveVip,
    AddNode,
    RemoveNode,
    /// The routes' matter.
    Nothing,
}

pub(super) fn work_of(step: &FirewallStep) -> Work<'_> {
    let of_nets = |set, net: &IpNet| StaticSet::Set(OwnSet::Nets(set)).name(Family::of_net(*net));
    let of_pods = |set, pod: &IpAddr| StaticSet::Set(OwnSet::Pods(set)).name(Family::of(*pod));
    let marks = |pod: &IpAddr| StaticSet::Mark.name(Family::of(*pod));
    let lans = |family: &Family| StaticSet::Lans.name(*family);
    Work::Member(match step {
        FirewallStep::AddLandmark(family, Landmark::Lan(name)) => {
            format!("add {} {},{name}\n", lans(family), everything(*family))
        }
        FirewallStep::RemoveLandmark(family, Landmark::Lan(name)) => {
            format!("del {} {},{name}\n", lans(family), everything(*family))
        }
        FirewallStep::AddLandmark(_, Landmark::Node(_)) => return Work::AddNode,
        FirewallStep::RemoveLandmark(_, Landmark::Node(_)) => return Work::RemoveNode,
        FirewallStep::AddLandmark(_, Landmark::Way(_))
        | FirewallStep::RemoveLandmark(_, Landmark::Way(_)) => return Work::Nothing,
        FirewallStep::AddNet(set, net) => format!("add {} {net}\n", of_nets(*set, net)),
        FirewallStep::RemoveNet(set, net) => format!("del {} {net}\n", of_nets(*set, net)),
        FirewallStep::AddPod(set, pod) => format!("add {} {pod}\n", of_pods(*set, pod)),
        FirewallStep::RemovePod(set, pod) => format!("del {} {pod}\n", of_pods(*set, pod)),
        FirewallStep::Mark { pod, mark } => format!("add {} {pod} skbmark {mark}\n", marks(pod)),
        FirewallStep::Unmark(pod) => format!("del {} {pod}\n", marks(pod)),
        FirewallStep::Translate { pod, vip } => return Work::Translate(*pod, *vip),
        FirewallStep::Untranslate { pod, vip } => return Work::Untranslate(*pod, *vip),
        FirewallStep::Install(family, vips) => return Work::Install(*family, vips),
        FirewallStep::Remove(family) => return Work::Remove(*family),
        FirewallStep::AddVip(_) => return Work::AddVip,
        FirewallStep::RemoveVip(_) => return Work::RemoveVip,
    })
}

/// The `ipset restore` line that expects late replies.
pub(super) fn late_reply_line(late: &LateReply) -> String {
    let LateReply {
        protocol,
        outside,
        pod,
        ports,
    } = late;
    let set = StaticSet::Set(OwnSet::LateReplies).name(Family::of(*pod));
    // The port of whatever is not in its list is 0 for ipset.
    let ports = ports.filter(|_| i32::from(*protocol) != IPPROTO_DCCP);
    let [_, port] = ports.unwrap_or_default();
    format!("add {set} {pod},{protocol}:{port},{outside}\n")
}

pub(super) async fn ipset(document: String) -> Result<(), ToolError> {
    if document.is_empty() {
        return Ok(());
    }
    let done = run("ipset", &["-exist", "restore"], document).await;
    done.map(drop)
}

/// Destroys sets that no rule uses any more; absent is fine.
pub(super) async fn destroy(sets: impl Iterator<Item = String>) -> Result<(), ToolError> {
    let mut sets: Vec<String> = sets.collect();
    let mut tries = 0;
    while !sets.is_empty() {
        let document = sets.iter().map(|set| format!("destroy {set}\n")).collect();
        let Err(error) = ipset(document).await else {
            return Ok(());
        };
        let ToolError::Failed { message, .. } = &error else {
            return Err(error);
        };
        match error.bad_line().filter(|bad| *bad < sets.len()) {
            // ipset sends each of these lines by itself: those before the bad one are done.
            Some(bad) if message.contains("does not exist") => drop(sets.drain(..=bad)),
            Some(bad) if message.contains("in use") && tries < RELEASE_TRIES => {
                tries += 1;
                sets.drain(..bad);
                tokio::time::sleep(RELEASE_PAUSE).await;
            }
            _ => return Err(error),
        }
    }
    Ok(())
}

/// Members of the sets of ours by set, with the rest of their line.
pub(super) type Sets = BTreeMap<String, Vec<(String, String)>>;

pub(super) async fn read_sets() -> Result<Sets, ToolError> {
    let mut sets = Sets::new();
    for line in run("ipset", &["save"], String::new()).await?.lines() {
        let mut words = line.splitn(4, ' ');
        let (Some(verb), Some(name)) = (words.next(), words.next()) else {
            continue;
        };
        if !name.starts_with(PREFIX) {
            continue;
        }
        let members = sets.entry(name.to_owned()).or_default();
        if let ("add", Some(member)) = (verb, words.next()) {
            let rest = words.next().unwrap_or_default();
            members.push((member.to_owned(), rest.to_owned()));
        }
    }
    Ok(sets)
}

/// The names of all sets; none where there is no `ipset` to make any.
pub(super) async fn names() -> Result<Vec<String>, ToolError> {
    match run("ipset", &["list", "-name"], String::new()).await {
        Ok(names) => Ok(names.lines().map(str::to_owned).collect()),
        Err(ToolError::Start { .. }) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Whether a set is of this backend.
pub(super) fn is_own_set(name: &str) -> bool {
    let is_static = |family: Family| StaticSet::all().any(|set| set.name(family) == name);
    Family::ALL.into_iter().any(is_static) || vip_of_set(name).is_some()
}

/// Whether a set is one that releases before 0.3 made.
pub(super) fn is_earlier_set(name: &str) -> bool {
    let name = name.strip_prefix("inet6:").unwrap_or(name);
    name.starts_with("METALEG-SRC-") || name.starts_with("METALEG-EXCLUDE-DST-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::tests::{documented_sets, page_name};

    #[test]
    fn the_sets_are_as_documented() {
        let name = |set: OwnSet| (page_name(set), StaticSet::Set(set).name(Family::V4));
        let mut sets: BTreeMap<String, String> = OwnSet::all().map(name).collect();
        sets.insert("slot".to_owned(), StaticSet::Mark.name(Family::V4));
        sets.insert("lans".to_owned(), StaticSet::Lans.name(Family::V4));
        let translated = StaticSet::Translated.name(Family::V4);
        sets.insert("translated".to_owned(), translated);
        sets.insert("vip".to_owned(), vip_set("192.0.2.200".parse().unwrap()));
        assert_eq!(sets, documented_sets(2));
    }

    #[test]
    fn the_set_of_a_vip_has_a_name_that_fits_and_gives_the_vip_back() {
        for (vip, set) in [
            ("192.0.2.200", "METALEG-VIP-192.0.2.200"),
            ("2001:db8:1::c8", "METALEG-6IAENuAABAAAAAAAAAAAAyA"),
            (
                "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
                "METALEG-6_____________________w",
            ),
        ] {
            let vip: IpAddr = vip.parse().unwrap();
            assert_eq!(vip_set(vip), set);
            assert!(set.len() <= 31);
            assert_eq!(vip_of_set(set), Some(vip));
        }
        for other in ["METALEG-VIPS-4", "METALEG-6", "METALEG-6IAENuAAB", "OTHER"] {
            assert_eq!(vip_of_set(other), None);
        }
    }
}
