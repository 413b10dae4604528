//! Firewall backend on iptables and ipset, in whichever mode the node's other programs use.
//!
//! Chains are static, but for one translation rule for each VIP; which pods they concern is in sets, so that
//! most changes are one `ipset restore`. Every rule of ours carries a comment with a hash of what we sent:
//! what is read back is compared by these, because iptables prints rules in other words than it was given.
//!
//! What a packet experiences is written beside each rule in [`chains`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use ipnet::IpNet;

use crate::kernel::tag::{TAG, tag};
use crate::kernel::tool::{ToolError, run};
use crate::kernel::{Error, Firewall, StepError, tryable};
use crate::state::{Family, FirewallState, Mark, PodState, Skeleton, Step};

/// What every set and chain of ours is called.
const PREFIX: &str = "METALEG-";
/// ipset's default of 65,536 would refuse the pods of a large cluster.
const MAX_ELEMENTS: u32 = 1_048_576;
/// Seconds to wait for the xtables lock, below the deadline for the tool.
const LOCK_SECONDS: &str = "20";
/// How many input lines a batch may lose before it is given up.
const MOST_BAD_LINES: usize = 32;
/// The kernel releases a set some time after the rule that used it is gone: how often and how long to wait.
const RELEASE_TRIES: u32 = 40;
const RELEASE_PAUSE: Duration = Duration::from_millis(50);

/// Which kernel interface the iptables tools speak to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    /// nf_tables.
    Nft,
    /// ip_tables.
    Legacy,
}

impl Variant {
    fn tool(self, family: Family, what: &str) -> String {
        let iptables = match family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        let variant = match self {
            Variant::Nft => "nft",
            Variant::Legacy => "legacy",
        };
        format!("{iptables}-{variant}-{what}")
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Variant::Nft => "nf_tables",
            Variant::Legacy => "legacy",
        })
    }
}

/// The iptables backend of one node.
#[derive(Debug)]
pub(crate) struct Iptables {
    variant: Variant,
    why: &'static str,
    mask: u32,
    families: Vec<Family>,
    /// VIPs that have a translation rule, as far as we know: keeps a repeated `AddVip` from doubling it.
    translated: BTreeSet<IpAddr>,
}

impl Iptables {
    /// Finds out which mode to use. Changes nothing.
    pub(crate) async fn open(mask: u32, families: Vec<Family>) -> Result<Iptables, Error> {
        let (variant, why) = detect(&families).await?;
        Ok(Iptables {
            variant,
            why,
            mask,
            families,
            translated: BTreeSet::new(),
        })
    }

    /// Mode and why, for the log.
    pub(crate) fn describe(&self) -> String {
        format!("iptables ({}: {})", self.variant, self.why)
    }

    async fn save(&self, family: Family) -> Result<Vec<Line>, ToolError> {
        let tool = self.variant.tool(family, "save");
        Ok(parse_save(&run(&tool, &[], String::new()).await?))
    }

    async fn restore(&self, family: Family, document: String) -> Result<(), ToolError> {
        let tool = self.variant.tool(family, "restore");
        let args = ["--noflush", "--wait", LOCK_SECONDS];
        run(&tool, &args, document).await.map(drop)
    }

    async fn install(&mut self, family: Family, vips: &BTreeSet<IpAddr>) -> Result<(), ToolError> {
        let mut sets = String::new();
        for set in StaticSet::ALL {
            // Writing into a String cannot fail.
            let _ = writeln!(sets, "{}", set.create(family));
        }
        for vip in vips {
            sets.push_str(&create_vip(*vip));
        }
        ipset(sets).await?;
        let present = self.save(family).await?;
        let document = install_document(family, self.mask, vips, &present);
        self.restore(family, document).await?;
        self.translated.retain(|vip| Family::of(*vip) != family);
        self.translated.extend(vips);

        let sets = parse_sets(&run("ipset", &["save"], String::new()).await?);
        let guarded = StaticSet::Vips.name(family);
        let surplus = sets
            .get(&guarded)
            .into_iter()
            .flatten()
            .filter(|(vip, _)| vip.parse().is_ok_and(|vip| !vips.contains(&vip)));
        let lines = surplus.fold(String::new(), |lines, (vip, _)| {
            lines + &format!("del {guarded} {vip}\n")
        });
        ipset(lines).await?;
        let is_surplus = |name: &&String| {
            let vip = vip_of_set(name).filter(|vip| Family::of(*vip) == family);
            vip.is_some_and(|vip| !vips.contains(&vip))
        };
        destroy(sets.keys().filter(is_surplus).cloned().collect()).await
    }

    async fn remove(&mut self, family: Family) -> Result<(), ToolError> {
        let present = self.save(family).await?;
        let document = remove_document(&present);
        if !document.is_empty() {
            self.restore(family, document).await?;
        }
        self.translated.retain(|vip| Family::of(*vip) != family);
        let sets = parse_sets(&run("ipset", &["save"], String::new()).await?);
        let is_ours = |name: &&String| {
            StaticSet::ALL.iter().any(|set| set.name(family) == **name)
                || vip_of_set(name).is_some_and(|vip| Family::of(vip) == family)
        };
        destroy(sets.keys().filter(is_ours).cloned().collect()).await
    }

    /// Sets and guards of new VIPs first: a rule cannot name a set that is not there.
    async fn add_vips(&mut self, vips: &[IpAddr]) -> Result<(), ToolError> {
        ipset(vips.iter().map(|vip| create_vip(*vip)).collect()).await?;
        for family in self.families.clone() {
            let new =
                |vip: &&IpAddr| Family::of(**vip) == family && !self.translated.contains(*vip);
            let new: Vec<IpAddr> = vips.iter().filter(new).copied().collect();
            if !new.is_empty() {
                let rules = new.iter().map(|vip| translation(*vip).append(NAT));
                self.restore(family, table("nat", rules)).await?;
                self.translated.extend(new);
            }
        }
        Ok(())
    }

    async fn remove_vips(&mut self, vips: &[IpAddr]) -> Result<(), ToolError> {
        for family in self.families.clone() {
            let old = |vip: &&IpAddr| Family::of(**vip) == family && self.translated.contains(*vip);
            let old: Vec<IpAddr> = vips.iter().filter(old).copied().collect();
            if !old.is_empty() {
                let rules = old.iter().map(|vip| translation(*vip).delete(NAT));
                self.restore(family, table("nat", rules)).await?;
                self.translated.retain(|vip| !old.contains(vip));
            }
        }
        let unguard =
            |vip: &IpAddr| format!("del {} {vip}\n", StaticSet::Vips.name(Family::of(*vip)));
        ipset(vips.iter().map(unguard).collect()).await?;
        destroy(vips.iter().map(|vip| vip_set(*vip)).collect()).await
    }

    /// Executes steps that all add or all remove a VIP.
    async fn vips(&mut self, steps: &[&Step]) -> Result<(), ToolError> {
        let vips_of = |wanted: Kind| -> Vec<IpAddr> {
            let of_kind = steps.iter().filter(|step| kind(step) == wanted);
            of_kind.filter_map(|step| vip_of(step)).collect()
        };
        self.add_vips(&vips_of(Kind::AddVips)).await?;
        self.remove_vips(&vips_of(Kind::RemoveVips)).await
    }

    async fn one_by_one(&mut self, steps: &[&Step], failed: &mut Vec<StepError>) {
        for step in steps {
            let result = match step {
                Step::InstallFirewall(family, vips) => self.install(*family, vips).await,
                Step::RemoveFirewall(family) => self.remove(*family).await,
                _ => self.vips(&[step]).await,
            };
            if let Err(error) = result {
                failed.push(step_error(step, error));
            }
        }
    }

    /// Changes members of sets, all in one process; a bad line costs only its own step and those that rely on
    /// it.
    async fn members(&self, steps: &[&Step], failed: &mut Vec<StepError>) {
        let mut rest: Vec<(&Step, String)> = steps
            .iter()
            .filter_map(|step| Some((*step, member_line(step)?)))
            .collect();
        let mut bad_lines = 0;
        while !rest.is_empty() {
            let document = rest.iter().map(|(_, line)| format!("{line}\n")).collect();
            let Err(error) = ipset(document).await else {
                return;
            };
            bad_lines += 1;
            let bad = error.line().and_then(|line| line.checked_sub(1));
            match bad.filter(|bad| *bad < rest.len() && bad_lines < MOST_BAD_LINES) {
                Some(bad) => {
                    // All others again: ipset may not have sent the lines before the bad one yet.
                    let (step, _) = rest.remove(bad);
                    failed.push(step_error(step, error));
                    let (done, later) = rest.split_at(bad);
                    let later: Vec<&Step> = later.iter().map(|(step, _)| *step).collect();
                    let keep = tryable(&later, failed);
                    let done = done.iter().map(|(step, _)| *step);
                    rest = done
                        .chain(keep)
                        .filter_map(|step| Some((step, member_line(step)?)))
                        .collect();
                }
                None => {
                    let text = error.to_string();
                    for (step, _) in rest.drain(..) {
                        failed.push(StepError {
                            step: step.clone(),
                            source: Error::Batch(text.clone()),
                        });
                    }
                }
            }
        }
    }
}

impl Firewall for Iptables {
    async fn observe(&mut self) -> Result<BTreeMap<Family, FirewallState>, Error> {
        let sets = parse_sets(&run("ipset", &["save"], String::new()).await?);
        let mut states = BTreeMap::new();
        self.translated.clear();
        for family in self.families.clone() {
            let lines = self.save(family).await?;
            self.translated.extend(translated_vips(&lines));
            states.insert(family, state(family, self.mask, &lines, &sets));
        }
        Ok(states)
    }

    async fn apply(&mut self, steps: &[&Step], failed: &mut Vec<StepError>) {
        for batch in steps.chunk_by(|a, b| kind(a) == kind(b)) {
            let batch = tryable(batch, failed);
            match batch.first().map(|step| kind(step)) {
                None => {}
                Some(Kind::Members) => self.members(&batch, failed).await,
                Some(Kind::Single) => self.one_by_one(&batch, failed).await,
                Some(Kind::AddVips | Kind::RemoveVips) => {
                    if let Err(error) = self.vips(&batch).await {
                        match batch.as_slice() {
                            [only] => failed.push(step_error(only, error)),
                            // Which one it was cannot be told: one bad VIP must cost no other.
                            _ => self.one_by_one(&batch, failed).await,
                        }
                    }
                }
            }
        }
    }
}

fn step_error(step: &Step, error: ToolError) -> StepError {
    StepError {
        step: step.clone(),
        source: error.into(),
    }
}

/// Which steps can be executed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Members,
    AddVips,
    RemoveVips,
    Single,
}

fn kind(step: &Step) -> Kind {
    match step {
        Step::AddVip(_) => Kind::AddVips,
        Step::RemoveVip(_) => Kind::RemoveVips,
        Step::InstallFirewall(..) | Step::RemoveFirewall(_) => Kind::Single,
        _ => Kind::Members,
    }
}

fn vip_of(step: &Step) -> Option<IpAddr> {
    match step {
        Step::AddVip(vip) | Step::RemoveVip(vip) => Some(*vip),
        _ => None,
    }
}

/// Finds out the mode as Kubernetes' iptables-wrappers does: what the kubelet uses, else what has more rules.
async fn detect(families: &[Family]) -> Result<(Variant, &'static str), Error> {
    let of_kubelet = "the kubelet uses it";
    let nft = survey(Variant::Nft, families).await?;
    if nft.kubelet {
        return Ok((Variant::Nft, of_kubelet));
    }
    let legacy = survey(Variant::Legacy, families).await?;
    if legacy.kubelet {
        return Ok((Variant::Legacy, of_kubelet));
    }
    if legacy.rules > nft.rules {
        return Ok((Variant::Legacy, "it has more rules"));
    }
    Ok((Variant::Nft, "nothing speaks for legacy"))
}

/// What speaks for a mode.
#[derive(Debug, Default)]
struct Survey {
    kubelet: bool,
    rules: usize,
}

async fn survey(variant: Variant, families: &[Family]) -> Result<Survey, Error> {
    let mut survey = Survey::default();
    for family in families {
        if variant == Variant::Legacy && !has_legacy_tables(*family).await {
            continue;
        }
        let text = run(&variant.tool(*family, "save"), &[], String::new()).await?;
        let hint = |line: &str| {
            line.starts_with(":KUBE-IPTABLES-HINT ") || line.starts_with(":KUBE-KUBELET-CANARY ")
        };
        survey.kubelet |= text.lines().any(hint);
        survey.rules += text.lines().filter(|line| line.starts_with('-')).count();
    }
    Ok(survey)
}

/// Whether anybody uses the legacy tables here: asking the legacy tools would register them.
async fn has_legacy_tables(family: Family) -> bool {
    let file = match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    // Absent until the module is loaded.
    tokio::fs::read_to_string(file)
        .await
        .is_ok_and(|names| !names.trim().is_empty())
}

// === sets ===

/// The sets that are always there, one of each for each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StaticSet {
    /// Destinations that are not egress.
    Excluded,
    /// Pod networks of other nodes.
    Remote,
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
}

impl StaticSet {
    const ALL: [StaticSet; 7] = [
        StaticSet::Excluded,
        StaticSet::Remote,
        StaticSet::Vips,
        StaticSet::Pods,
        StaticSet::Mark,
        StaticSet::Gateway,
        StaticSet::Blocked,
    ];

    fn name(self, family: Family) -> String {
        let what = match self {
            StaticSet::Excluded => "EXCLUDED",
            StaticSet::Remote => "REMOTE",
            StaticSet::Vips => "VIPS",
            StaticSet::Pods => "PODS",
            StaticSet::Mark => "MARK",
            StaticSet::Gateway => "GATEWAY",
            StaticSet::Blocked => "BLOCKED",
        };
        let number = match family {
            Family::V4 => 4,
            Family::V6 => 6,
        };
        format!("{PREFIX}{what}-{number}")
    }

    fn create(self, family: Family) -> String {
        let kind = match self {
            StaticSet::Excluded | StaticSet::Remote => "hash:net",
            _ => "hash:ip",
        };
        let extension = match self {
            StaticSet::Mark => " skbinfo",
            _ => "",
        };
        create(&self.name(family), kind, family, extension)
    }
}

fn create(name: &str, kind: &str, family: Family, extension: &str) -> String {
    let inet = match family {
        Family::V4 => "inet",
        Family::V6 => "inet6",
    };
    format!("create {name} {kind} family {inet} maxelem {MAX_ELEMENTS}{extension}")
}

/// The set of the pods that are translated to a VIP. A set's name has at most 31 characters, so that an IPv6
/// address does not fit as text: it is written in base 64 (RFC 4648, URL-safe), 22 characters.
fn vip_set(vip: IpAddr) -> String {
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

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// The VIP that a set belongs to, if it is one of these.
fn vip_of_set(name: &str) -> Option<IpAddr> {
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

fn create_vip(vip: IpAddr) -> String {
    let family = Family::of(vip);
    let set = create(&vip_set(vip), "hash:ip", family, "");
    format!("{set}\nadd {} {vip}\n", StaticSet::Vips.name(family))
}

/// The `ipset restore` line of a step that changes one member of a set.
fn member_line(step: &Step) -> Option<String> {
    let (verb, set, member) = match step {
        Step::Exclude(net) => ("add", StaticSet::Excluded, *net),
        Step::Include(net) => ("del", StaticSet::Excluded, *net),
        Step::AddRemotePods(net) => ("add", StaticSet::Remote, *net),
        Step::RemoveRemotePods(net) => ("del", StaticSet::Remote, *net),
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
        StaticSet::Excluded | StaticSet::Remote => Some(format!("{verb} {set_name} {member}")),
        _ => Some(format!("{verb} {set_name} {}", member.addr())),
    }
}

async fn ipset(document: String) -> Result<(), ToolError> {
    if document.is_empty() {
        return Ok(());
    }
    run("ipset", &["-exist", "restore"], document)
        .await
        .map(drop)
}

/// Destroys sets that no rule uses any more; absent is fine.
async fn destroy(mut sets: Vec<String>) -> Result<(), ToolError> {
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
type Sets = BTreeMap<String, Vec<(String, String)>>;

fn parse_sets(text: &str) -> Sets {
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

// === chains ===

const NAT: &str = "METALEG-NAT";

/// A rule without its chain: the text after `-A CHAIN`, comment included.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    tag: String,
    text: String,
}

impl Rule {
    fn new(name: &str, text: &str) -> Rule {
        let tag = tag(name, text);
        let text = format!("-m comment --comment \"{tag}\" {text}");
        Rule { tag, text }
    }

    fn append(&self, chain: &str) -> String {
        format!("-A {chain} {}", self.text)
    }

    fn delete(&self, chain: &str) -> String {
        format!("-D {chain} {}", self.text)
    }
}

/// A chain of ours and how packets come into it.
struct Chain {
    table: &'static str,
    name: &'static str,
    /// The built-in chain with the jump.
    base: &'static str,
    jump: Rule,
    /// The jump must be the first rule of its chain: what another rule accepts or translates ahead of it would
    /// leak.
    first: bool,
    rules: Vec<Rule>,
}

fn chains(family: Family, mask: u32) -> Vec<Chain> {
    let set = |set: StaticSet| set.name(family);
    let (pods, excluded) = (set(StaticSet::Pods), set(StaticSet::Excluded));
    let (vips, blocked) = (set(StaticSet::Vips), set(StaticSet::Blocked));
    let (remote, marks) = (set(StaticSet::Remote), set(StaticSet::Mark));
    let (everything, prohibited) = match family {
        Family::V4 => ("0.0.0.0/0", "icmp-admin-prohibited"),
        Family::V6 => ("::/0", "icmp6-adm-prohibited"),
    };
    let to_excluded = Rule::new(
        "excluded",
        &format!("-m set --match-set {excluded} dst -j RETURN"),
    );
    // `! --ctdir ORIGINAL` would not do: an untracked packet has no direction, and must not slip through.
    let reply = Rule::new("reply", "-m conntrack --ctdir REPLY -j RETURN");
    let jump = |name: &str, gate: &str| Rule::new("jump", &format!("{gate}-j {name}"));
    vec![
        Chain {
            table: "nat",
            name: NAT,
            base: "POSTROUTING",
            jump: jump(NAT, &format!("-m set --match-set {pods} src ")),
            first: true,
            // Then one rule for each VIP, see `translation`.
            rules: vec![
                to_excluded.clone(),
                // On its way to the gateway a packet keeps its source. Translating it to itself takes the
                // decision away from the masquerade of the CNI plugin.
                Rule::new(
                    "identity",
                    &format!("-m mark ! --mark 0x0/{mask:#x} -j NETMAP --to {everything}"),
                ),
            ],
        },
        Chain {
            table: "filter",
            name: "METALEG-BLOCK",
            base: "FORWARD",
            jump: jump("METALEG-BLOCK", ""),
            first: true,
            rules: vec![
                to_excluded.clone(),
                reply.clone(),
                // A connection that cannot go on ends at once instead of hanging.
                Rule::new(
                    "reset",
                    &format!(
                        "-p tcp -m set --match-set {blocked} src -j REJECT --reject-with tcp-reset"
                    ),
                ),
                // Says why, unlike port-unreachable.
                Rule::new(
                    "reject",
                    &format!(
                        "-m set --match-set {blocked} src -j REJECT --reject-with {prohibited}"
                    ),
                ),
            ],
        },
        Chain {
            table: "mangle",
            name: "METALEG-MARK",
            base: "PREROUTING",
            jump: jump("METALEG-MARK", ""),
            first: false,
            rules: vec![
                // The answer to an inbound connection goes back the way that it came.
                reply.clone(),
                // Destinations are not looked at here, before DNAT: the routing rules do it, after DNAT.
                Rule::new("mark", &format!("-j SET --map-set {marks} src --map-mark")),
            ],
        },
        Chain {
            table: "mangle",
            name: "METALEG-GUARD",
            base: "FORWARD",
            jump: jump("METALEG-GUARD", ""),
            first: false,
            rules: vec![
                // A VIP moves before routes and objects do. A packet of an outside server that arrives here
                // before the pod's own next packet would make a connection entry that clashes with the pod's.
                Rule::new(
                    "new-to-vip",
                    &format!("-m conntrack --ctstate NEW -m set --match-set {vips} dst -j DROP"),
                ),
                // Translated by a node that was the gateway and is none any more.
                Rule::new(
                    "from-vip",
                    &format!("-m set --match-set {vips} src -j DROP"),
                ),
                to_excluded.clone(),
                reply.clone(),
                // To be rejected in METALEG-BLOCK; what gets past it is dropped in METALEG-LEAK.
                Rule::new(
                    "blocked",
                    &format!("-m set --match-set {blocked} src -j RETURN"),
                ),
                // INVALID packets skip NAT.
                Rule::new(
                    "invalid",
                    &format!(
                        "-m set --match-set {pods} src -m conntrack --ctstate INVALID -j DROP"
                    ),
                ),
                // Of a connection that is older than what we decided: neither routed nor translated.
                Rule::new(
                    "untranslated",
                    &format!(
                        "-m mark --mark 0x0/{mask:#x} -m set --match-set {pods} src \
                         -m conntrack --ctdir ORIGINAL ! --ctstate NEW,SNAT -j DROP"
                    ),
                ),
                // Another node takes us for its pod's gateway, and we do not know the pod yet: the masquerade
                // of the CNI plugin would give it this node's address.
                Rule::new(
                    "unknown",
                    &format!(
                        "-m set --match-set {remote} src -m set ! --match-set {pods} src -j DROP"
                    ),
                ),
            ],
        },
        Chain {
            table: "mangle",
            name: "METALEG-LEAK",
            base: "POSTROUTING",
            jump: jump("METALEG-LEAK", ""),
            first: false,
            rules: vec![
                to_excluded,
                reply,
                Rule::new("leak", &format!("-m set --match-set {blocked} src -j DROP")),
            ],
        },
    ]
}

/// The rule that translates the pods of a VIP's set to it.
fn translation(vip: IpAddr) -> Rule {
    let text = format!(
        "-m set --match-set {} src -j SNAT --to-source {vip}",
        vip_set(vip)
    );
    Rule::new(&format!("vip={vip}"), &text)
}

fn table(name: &str, lines: impl Iterator<Item = String>) -> String {
    let lines: String = lines.map(|line| line + "\n").collect();
    format!("*{name}\n{lines}COMMIT\n")
}

/// The document that puts all chains and jumps in place, whatever was there. Each table is exchanged
/// atomically; NAT comes first and marks last, because a marked packet needs the NAT.
fn install_document(
    family: Family,
    mask: u32,
    vips: &BTreeSet<IpAddr>,
    present: &[Line],
) -> String {
    let chains = chains(family, mask);
    let mut document = String::new();
    for name in ["nat", "filter", "mangle"] {
        let own = || chains.iter().filter(|chain| chain.table == name);
        let mut lines: Vec<String> = own().map(|c| format!(":{} - [0:0]", c.name)).collect();
        for chain in own() {
            lines.extend(chain.rules.iter().map(|rule| rule.append(chain.name)));
        }
        if name == "nat" {
            lines.extend(vips.iter().map(|vip| translation(*vip).append(NAT)));
        }
        let jumps = present
            .iter()
            .filter(|line| line.table == name && line.jumps_to_us());
        lines.extend(jumps.map(Line::delete));
        lines.extend(own().map(|chain| format!("-I {} 1 {}", chain.base, chain.jump.text)));
        document += &table(name, lines.into_iter());
    }
    document
}

/// The document that removes jumps and chains; empty when there are none.
fn remove_document(present: &[Line]) -> String {
    let mut document = String::new();
    for name in ["mangle", "filter", "nat"] {
        let ours = || present.iter().filter(|line| line.table == name);
        let mut lines: Vec<String> = ours()
            .filter(|l| l.jumps_to_us())
            .map(Line::delete)
            .collect();
        let own_chains = || ours().filter(|line| line.rule.is_none() && is_own_chain(&line.chain));
        lines.extend(own_chains().map(|line| format!("-F {}", line.chain)));
        lines.extend(own_chains().map(|line| format!("-X {}", line.chain)));
        if !lines.is_empty() {
            document += &table(name, lines.into_iter());
        }
    }
    document
}

fn is_own_chain(name: &str) -> bool {
    let own = [
        "METALEG-BLOCK",
        "METALEG-MARK",
        "METALEG-GUARD",
        "METALEG-LEAK",
    ];
    name == NAT || own.contains(&name)
}

/// A line of `iptables-save` that is a chain or a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    table: String,
    chain: String,
    /// The text after `-A CHAIN`; `None` declares the chain.
    rule: Option<String>,
}

impl Line {
    fn jumps_to_us(&self) -> bool {
        let target = self.rule.as_deref().and_then(|rule| {
            let mut words = rule.split(' ').skip_while(|word| *word != "-j");
            words.nth(1)
        });
        target.is_some_and(is_own_chain) && !is_own_chain(&self.chain)
    }

    fn delete(&self) -> String {
        format!(
            "-D {} {}",
            self.chain,
            self.rule.as_deref().unwrap_or_default()
        )
    }

    /// Our tag in the rule's comment.
    fn tag(&self) -> Option<&str> {
        let (_, rest) = self.rule.as_ref()?.split_once("--comment ")?;
        let comment = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split('"').next()?,
            None => rest.split(' ').next()?,
        };
        comment.starts_with(TAG).then_some(comment)
    }
}

fn parse_save(text: &str) -> Vec<Line> {
    let mut table = String::new();
    let mut lines = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            name.clone_into(&mut table);
        } else if let Some(chain) = line.strip_prefix(':') {
            lines.push(Line {
                table: table.clone(),
                chain: chain.split(' ').next().unwrap_or_default().to_owned(),
                rule: None,
            });
        } else if let Some((chain, rule)) = line
            .strip_prefix("-A ")
            .and_then(|rest| rest.split_once(' '))
        {
            lines.push(Line {
                table: table.clone(),
                chain: chain.to_owned(),
                rule: Some(rule.to_owned()),
            });
        }
    }
    lines
}

/// The VIPs that have a translation rule.
fn translated_vips(lines: &[Line]) -> impl Iterator<Item = IpAddr> {
    lines
        .iter()
        .filter(|line| line.table == "nat" && line.chain == NAT)
        .filter_map(|line| vip_of_tag(line.tag()?))
}

fn vip_of_tag(tag: &str) -> Option<IpAddr> {
    let (vip, _) = tag
        .strip_prefix(TAG)?
        .strip_prefix("vip=")?
        .rsplit_once(':')?;
    vip.parse().ok()
}

// === reading back ===

fn state(family: Family, mask: u32, lines: &[Line], sets: &Sets) -> FirewallState {
    let members = |set: StaticSet| sets.get(&set.name(family)).map_or(&[][..], Vec::as_slice);
    let addresses = |set: StaticSet| {
        members(set)
            .iter()
            .filter_map(|(ip, _)| ip.parse::<IpAddr>().ok())
    };
    let nets = |set: StaticSet| -> BTreeSet<IpNet> {
        let net = |text: &str| {
            text.parse()
                .ok()
                .or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
        };
        members(set)
            .iter()
            .filter_map(|(text, _)| net(text))
            .collect()
    };
    let mut pods: BTreeMap<IpAddr, PodState> = BTreeMap::new();
    for pod in addresses(StaticSet::Pods) {
        pods.entry(pod).or_default().known = true;
    }
    for pod in addresses(StaticSet::Gateway) {
        pods.entry(pod).or_default().gatewayed = true;
    }
    for pod in addresses(StaticSet::Blocked) {
        pods.entry(pod).or_default().blocked = true;
    }
    for (pod, rest) in members(StaticSet::Mark) {
        if let (Ok(pod), Some(mark)) = (pod.parse(), skbmark(rest)) {
            pods.entry(pod).or_default().mark = Some(mark);
        }
    }
    let mut with_set = BTreeSet::new();
    for (name, members) in sets {
        let Some(vip) = vip_of_set(name).filter(|vip| Family::of(*vip) == family) else {
            continue;
        };
        with_set.insert(vip);
        for pod in members.iter().filter_map(|(pod, _)| pod.parse().ok()) {
            pods.entry(pod).or_default().vips.insert(vip);
        }
    }
    let guarded: BTreeSet<IpAddr> = addresses(StaticSet::Vips).collect();
    let with_rule: BTreeSet<IpAddr> = translated_vips(lines).collect();
    let skeleton = skeleton(family, mask, lines, sets, [&with_set, &guarded, &with_rule]);
    FirewallState {
        skeleton,
        excluded: nets(StaticSet::Excluded),
        remote_pods: nets(StaticSet::Remote),
        vips: with_set
            .into_iter()
            .filter(|vip| guarded.contains(vip) && with_rule.contains(vip))
            .collect(),
        pods,
    }
}

/// `skbmark 0x100000/0xf00000`; without a mask all bits count.
fn skbmark(rest: &str) -> Option<Mark> {
    let mut words = rest.split(' ').skip_while(|word| *word != "skbmark");
    let text = words.nth(1)?;
    let number = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    let (value, mask) = match text.split_once('/') {
        Some((value, mask)) => (number(value)?, number(mask)?),
        None => (number(text)?, u32::MAX),
    };
    Some(Mark { value, mask })
}

fn skeleton(
    family: Family,
    mask: u32,
    lines: &[Line],
    sets: &Sets,
    [with_set, guarded, with_rule]: [&BTreeSet<IpAddr>; 3],
) -> Skeleton {
    let own_sets = StaticSet::ALL.map(|set| set.name(family));
    let has_chain = lines
        .iter()
        .any(|line| is_own_chain(&line.chain) || line.jumps_to_us());
    if !has_chain && with_set.is_empty() && !own_sets.iter().any(|set| sets.contains_key(set)) {
        return Skeleton::Absent;
    }
    if let Some(missing) = own_sets.iter().find(|set| !sets.contains_key(*set)) {
        return Skeleton::Damaged(format!("set {missing} is missing"));
    }
    for chain in chains(family, mask) {
        if let Some(what) = damage(&chain, lines) {
            return Skeleton::Damaged(what);
        }
    }
    let expected = chains(family, mask).len();
    let jumps = lines.iter().filter(|line| line.jumps_to_us()).count();
    if jumps != expected {
        return Skeleton::Damaged(format!("{jumps} jumps to our chains instead of {expected}"));
    }
    if with_set != guarded || with_set != with_rule {
        return Skeleton::Damaged("VIPs without set, guard or translation".to_owned());
    }
    Skeleton::Intact
}

/// What is wrong with a chain or the jump to it.
fn damage(chain: &Chain, lines: &[Line]) -> Option<String> {
    let name = chain.name;
    let rules_of = |wanted: &'static str| {
        let of_chain = move |line: &&Line| {
            line.table == chain.table && line.chain == wanted && line.rule.is_some()
        };
        lines.iter().filter(of_chain)
    };
    let found: Vec<Option<&str>> = rules_of(name).map(Line::tag).collect();
    let mut expected: Vec<Option<&str>> = chain
        .rules
        .iter()
        .map(|rule| Some(rule.tag.as_str()))
        .collect();
    let vip_rules: Vec<String> = if name == NAT {
        translated_vips(lines)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .map(|vip| translation(vip).tag)
            .collect()
    } else {
        Vec::new()
    };
    let (fixed, rest) = found.split_at(expected.len().min(found.len()));
    let mut rest: Vec<_> = rest.to_vec();
    rest.sort_unstable();
    let mut expected_rest: Vec<_> = vip_rules.iter().map(|tag| Some(tag.as_str())).collect();
    expected_rest.sort_unstable();
    if fixed != expected.as_mut_slice() || rest != expected_rest {
        return Some(format!("chain {name} is missing or changed"));
    }
    let jumps: Vec<usize> = rules_of(chain.base)
        .enumerate()
        .filter(|(_, line)| line.tag() == Some(chain.jump.tag.as_str()))
        .map(|(position, _)| position)
        .collect();
    match jumps.as_slice() {
        [0] => None,
        [_] if !chain.first => None,
        [_] => Some(format!(
            "the jump from {} to {name} is not the first rule",
            chain.base
        )),
        [] => Some(format!("the jump from {} to {name} is missing", chain.base)),
        _ => Some(format!(
            "the jump from {} to {name} is there {} times",
            chain.base,
            jumps.len()
        )),
    }
}
