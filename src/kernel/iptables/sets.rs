//! The sets, and the `ipset restore` lines that change them.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use ipnet::IpNet;

use crate::kernel::LATE_REPLY_SECONDS;
use crate::kernel::conntrack::LateReply;
use crate::kernel::tool::{ToolError, run};
use crate::state::{Family, Step};

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
    /// Destinations that are not egress.
    Excluded,
    /// Pod networks of other nodes.
    Remote,
    /// Pod networks of this node whose pods wait to be classified.
    Local,
    /// Pods of this node that are no egress pods.
    Free,
    /// VIPs to guard.
    Vips,
    /// Egress pods.
    Pods,
    /// Marks of pods that are routed to another node.
    Mark,
    /// Pods whose gateway this node is: no rule asks, a restarted agent does.
    Gateway,
    /// Pods without a way out.
    Blocked,
    /// Replies of forgotten connections: the kernel removes them by itself, and nobody reads them.
    LateReplies,
}

impl StaticSet {
    pub(super) const ALL: [StaticSet; 10] = [
        StaticSet::Excluded,
        StaticSet::Remote,
        StaticSet::Local,
        StaticSet::Free,
        StaticSet::Vips,
        StaticSet::Pods,
        StaticSet::Mark,
        StaticSet::Gateway,
        StaticSet::Blocked,
        StaticSet::LateReplies,
    ];

    pub(super) fn name(self, family: Family) -> String {
        let what = match self {
            StaticSet::Excluded => "EXCLUDED",
            StaticSet::Remote => "REMOTE",
            StaticSet::Local => "LOCAL",
            StaticSet::Free => "FREE",
            StaticSet::Vips => "VIPS",
            StaticSet::Pods => "PODS",
            StaticSet::Mark => "MARK",
            StaticSet::Gateway => "GATEWAY",
            StaticSet::Blocked => "BLOCKED",
            StaticSet::LateReplies => "LATE",
        };
        let number = match family {
            Family::V4 => 4,
            Family::V6 => 6,
        };
        format!("{PREFIX}{what}-{number}")
    }

    pub(super) fn create(self, family: Family) -> String {
        let kind = match self {
            StaticSet::Excluded | StaticSet::Remote | StaticSet::Local => "hash:net",
            StaticSet::LateReplies => "hash:ip,port,ip",
            _ => "hash:ip",
        };
        let extension = match self {
            StaticSet::Mark => " skbinfo".to_owned(),
            StaticSet::LateReplies => format!(" timeout {LATE_REPLY_SECONDS}"),
            _ => String::new(),
        };
        create(&self.name(family), kind, family, &extension)
    }
}

pub(super) fn create(name: &str, kind: &str, family: Family, extension: &str) -> String {
    let inet = match family {
        Family::V4 => "inet",
        Family::V6 => "inet6",
    };
    format!("create {name} {kind} family {inet} maxelem {MAX_ELEMENTS}{extension}")
}

/// The set of the pods that are translated to a VIP. A set's name has at most 31 characters, so that an IPv6
/// address does not fit as text: it is written in base 64 (RFC 4648, URL-safe), 22 characters.
pub(super) fn vip_set(vip: IpAddr) -> String {
    match vip {
        IpAddr::V4(v4) => format!("{PREFIX}VIP-{v4}"),
        IpAddr::V6(v6) => {
            let bits = u128::from(v6);
            let digit = |n: u32| {
                // 22 digits of 6 bits are 132: the last one has 2 bits of the address.
                let six = if n < 21 {
                    (bits >> (122 - 6 * n)) & 63
                } else {
                    (bits << 4) & 63
                };
                usize::try_from(six)
                    .ok()
                    .and_then(|six| BASE64.get(six).copied())
                    .map(char::from)
            };
            (0..22)
                .filter_map(digit)
                .fold(format!("{PREFIX}6"), |name, c| {
                    name + c.encode_utf8(&mut [0; 4])
                })
        }
    }
}

pub(super) const BASE64: &[u8; 64] =
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// The VIP that a set belongs to, if it is one of these.
pub(super) fn vip_of_set(name: &str) -> Option<IpAddr> {
    let rest = name.strip_prefix(PREFIX)?;
    if let Some(v4) = rest.strip_prefix("VIP-") {
        return v4.parse().ok().map(IpAddr::V4);
    }
    let digits = rest.strip_prefix('6').filter(|digits| digits.len() == 22)?;
    let mut bits: u128 = 0;
    for (n, c) in digits.bytes().enumerate() {
        let six = u128::try_from(BASE64.iter().position(|digit| *digit == c)?).ok()?;
        bits = if n < 21 {
            (bits << 6) | six
        } else {
            (bits << 2) | (six >> 4)
        };
    }
    Some(IpAddr::V6(Ipv6Addr::from(bits)))
}

pub(super) fn create_vip(vip: IpAddr) -> String {
    let family = Family::of(vip);
    let set = create(&vip_set(vip), "hash:ip", family, "");
    format!("{set}\nadd {} {vip}\n", StaticSet::Vips.name(family))
}

/// The `ipset restore` line of a step that changes one member of a set.
pub(super) fn member_line(step: &Step) -> Option<String> {
    let (verb, set, member) = match step {
        Step::Exclude(net) => ("add", StaticSet::Excluded, *net),
        Step::Include(net) => ("del", StaticSet::Excluded, *net),
        Step::AddRemotePods(net) => ("add", StaticSet::Remote, *net),
        Step::RemoveRemotePods(net) => ("del", StaticSet::Remote, *net),
        Step::AddLocalPods(net) => ("add", StaticSet::Local, *net),
        Step::RemoveLocalPods(net) => ("del", StaticSet::Local, *net),
        Step::Free(pod) => ("add", StaticSet::Free, IpNet::from(*pod)),
        Step::Unfree(pod) => ("del", StaticSet::Free, IpNet::from(*pod)),
        Step::Know(pod) => ("add", StaticSet::Pods, IpNet::from(*pod)),
        Step::Unknow(pod) => ("del", StaticSet::Pods, IpNet::from(*pod)),
        Step::Unmark(pod) => ("del", StaticSet::Mark, IpNet::from(*pod)),
        Step::Gateway(pod) => ("add", StaticSet::Gateway, IpNet::from(*pod)),
        Step::Ungateway(pod) => ("del", StaticSet::Gateway, IpNet::from(*pod)),
        Step::Block(pod) => ("add", StaticSet::Blocked, IpNet::from(*pod)),
        Step::Unblock(pod) => ("del", StaticSet::Blocked, IpNet::from(*pod)),
        Step::Mark { pod, mark } => {
            let set = StaticSet::Mark.name(Family::of(*pod));
            return Some(format!("add {set} {pod} skbmark {mark}"));
        }
        Step::Translate { pod, vip } => return Some(format!("add {} {pod}", vip_set(*vip))),
        Step::Untranslate { pod, vip } => return Some(format!("del {} {pod}", vip_set(*vip))),
        _ => return None,
    };
    let set_name = set.name(Family::of_net(member));
    match set {
        StaticSet::Excluded | StaticSet::Remote | StaticSet::Local => {
            Some(format!("{verb} {set_name} {member}"))
        }
        _ => Some(format!("{verb} {set_name} {}", member.addr())),
    }
}

/// The `ipset restore` line that expects late replies.
pub(super) fn late_line(late: &LateReply) -> String {
    let set = StaticSet::LateReplies.name(Family::of(late.pod.0));
    let ((pod, port), (outside, _)) = (late.pod, late.outside);
    format!("add {set} {pod},{}:{port},{outside}\n", late.protocol)
}

pub(super) async fn ipset(document: String) -> Result<(), ToolError> {
    if document.is_empty() {
        return Ok(());
    }
    run("ipset", &["-exist", "restore"], document)
        .await
        .map(drop)
}

/// Destroys sets that no rule uses any more; absent is fine.
pub(super) async fn destroy(mut sets: Vec<String>) -> Result<(), ToolError> {
    let mut tries = 0;
    while !sets.is_empty() {
        let document = sets.iter().map(|set| format!("destroy {set}\n")).collect();
        let Err(error) = ipset(document).await else {
            return Ok(());
        };
        let ToolError::Failed { message, .. } = &error else {
            return Err(error);
        };
        let bad = error.line().and_then(|line| line.checked_sub(1));
        let bad = bad.filter(|bad| *bad < sets.len());
        match bad {
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

pub(super) fn parse_sets(text: &str) -> Sets {
    let mut sets = Sets::new();
    for line in text.lines() {
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
    sets
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
    let is_static = |family: Family| StaticSet::ALL.iter().any(|set| set.name(family) == name);
    Family::ALL.into_iter().any(is_static) || vip_of_set(name).is_some()
}

/// Whether a set is one that releases before 0.3 made.
pub(super) fn is_earlier_set(name: &str) -> bool {
    let name = name.strip_prefix("inet6:").unwrap_or(name);
    name.starts_with("METALEG-SRC-") || name.starts_with("METALEG-EXCLUDE-DST-")
}
