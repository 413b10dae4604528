//! Firewall backend on nftables: one table of our own, ahead of every masquerade.
//!
//! The table as a whole is written by one `nft` process, in one transaction; after that each change is a
//! transaction of set elements over netlink, without a process. Steps that come together are one transaction: no packet
//! meets the state between two of them.

mod elements;
mod intervals;
mod read;
mod ruleset;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE};
use netlink_packet_netfilter::nftables::{
    ChainMessage, DataAttribute, ListAttribute, NfTablesMessage, RuleAttribute, RuleMessage,
    SetAttribute, SetElementAttribute, SetElementFlags, SetElementList, SetElementMessage,
    SetMessage, TableAttribute, TableMessage, Verdict, VerdictAttribute,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterMessageInner, NetfilterProtoFamily};

use self::elements::{
    Elements, Key, Kind, SetTraits, Transient, Value, late_reply_key, late_set, octets,
};
pub(crate) use self::read::BaseChain;
use self::read::any_chain;
pub(crate) use self::ruleset::TABLE;
use self::ruleset::{Chain, TRANSLATION_PRIORITY, chains};
use crate::kernel::backend::{Profile, Watched};
use crate::kernel::conntrack::LateReply;
use crate::kernel::error::{Error, StepError, executable};
use crate::kernel::netfilter::{Message, Netfilter, NetlinkError, message};
use crate::kernel::netlink::{OwnPorts, address};
use crate::kernel::ours::Ranges;
use crate::kernel::tag::TAG;
use crate::kernel::tool::{run, run_as};
use crate::state::{
    Family, FirewallState, FirewallStep, KernelState, LATE_REPLY_SECONDS, Remnant, Skeleton,
};

/// `NFNL_SUBSYS_NFTABLES` of nfnetlink.h: the subsystem that a transaction is for.
const SUBSYSTEM: u16 = 10;
/// The chain that sets marks.
const MARKING: &str = "marking";
/// The length of an attribute is 16 bits: this many elements fit into one, of which the largest, late replies of IPv6,
/// have 80 bytes.
const ELEMENTS_AT_ONCE: usize = 500;

#[derive(Debug)]
pub(crate) struct Nftables {
    /// The socket of our changes; opened again after it has failed.
    netfilter: Option<Netfilter>,
    ports: OwnPorts,
    families: Vec<Family>,
    ranges: Ranges,
    /// What the table holds, as read or confirmed last: an element of a map is deleted by its key and old value.
    held: KernelState,
}

impl Nftables {
    pub(crate) fn new(ranges: Ranges, families: Vec<Family>, ports: OwnPorts) -> Nftables {
        Nftables {
            netfilter: None,
            ports,
            families,
            ranges,
            held: KernelState::default(),
        }
    }

    /// Whether kernel and tool can do what this backend needs: both are asked to check the whole table.
    pub(crate) async fn check(ranges: Ranges, families: &[Family]) -> Result<(), Error> {
        let document = document(families, ranges, &KernelState::default(), &[]);
        run("nft", &["--check", "--file", "-"], document).await?;
        Ok(())
    }

    /// Reads everything, with a socket of its own: one that has failed once cannot make the next look fail.
    fn read(&self) -> Result<BTreeMap<Family, FirewallState>, NetlinkError> {
        let look = Look(Netfilter::open()?);
        let sets = look.sets()?;
        let damage = self.damage(&look, &sets)?;
        let mut states = BTreeMap::new();
        for &family in &self.families {
            let mut elements = Elements::new();
            for kind in Kind::all().filter(|kind| !kind.is_transient()) {
                // What is in a set of another type means something else.
                if sets.get(&kind.name(family)) == Some(&kind.shape(family).traits()) {
                    elements.insert(kind, look.members(kind, family, self.ranges.mask)?);
                }
            }
            let skeleton = match &damage {
                None if sets.is_empty() => Skeleton::Absent,
                None => Skeleton::Intact,
                Some(damage) => Skeleton::Damaged(damage.clone()),
            };
            let state = elements::state_of(&elements, self.ranges.mask, skeleton);
            states.insert(family, state);
        }
        Ok(states)
    }

    /// What is wrong with the table; nothing where there is none.
    fn damage(
        &self,
        look: &Look,
        sets: &BTreeMap<String, SetTraits>,
    ) -> Result<Option<String>, NetlinkError> {
        let present = look.chains()?;
        let flags = look.table_flags()?;
        let Some(flags) = flags else {
            return Ok(None);
        };
        if flags != 0 {
            // A dormant table (1) has rules that no packet meets.
            return Ok(Some(format!("table {TABLE} has flags {flags:#x}")));
        }
        for &family in &self.families {
            for kind in Kind::all() {
                let name = kind.name(family);
                match sets.get(&name) {
                    None => return Ok(Some(format!("set {name} is missing"))),
                    Some(found) if *found != kind.shape(family).traits() => {
                        return Ok(Some(format!("set {name} is of another type")));
                    }
                    Some(_) => {}
                }
            }
        }
        let mut tags: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (chain, tag) in look.rules()? {
            tags.entry(chain).or_default().push(tag);
        }
        let expected = chains(&self.families, self.ranges);
        let changed = expected.iter().find(|chain| {
            let found = tags.get(&chain.name).into_iter().flatten();
            let same_rules = found.eq(chain.rules.iter().map(|rule| &rule.tag));
            !same_rules || present.get(&chain.name) != Some(&base_of(chain))
        });
        Ok(changed.map(|chain| format!("chain {} is missing or changed", chain.name)))
    }

    /// What a table that is replaced must go on to hold.
    fn transients(&self) -> Result<Vec<Transient>, NetlinkError> {
        let look = Look(Netfilter::open()?);
        let sets = look.sets()?;
        let mut all = Vec::new();
        for &family in &self.families {
            for kind in Kind::all().filter(|kind| kind.is_transient()) {
                if sets.get(&kind.name(family)) != Some(&kind.shape(family).traits()) {
                    continue;
                }
                let found: Vec<Transient> = look.dump(elements_in(kind, family), |message| {
                    read::transients(kind, family, message)
                })?;
                all.extend(found);
            }
        }
        Ok(all)
    }

    /// Executes steps in one transaction: all of them or none. After a failure what is held must be read again.
    async fn transaction(&mut self, steps: &[&FirewallStep]) -> Result<(), Error> {
        let before = self.concerned(steps);
        for step in steps {
            self.held.apply_firewall(step);
        }
        let nothing = FirewallState::default();
        let mut families = self.held.families.values();
        let is_whole = |step: &&FirewallStep| {
            matches!(step, FirewallStep::Install(..) | FirewallStep::Remove(_))
        };
        if !steps.iter().any(is_whole) {
            let batch = changes(&before, &self.concerned(steps));
            if !batch.is_empty() {
                self.commit(&batch)?;
            }
        } else if families.all(|family| family.firewall == nothing) {
            self.commit(&removal())?;
        } else {
            let transients = self.transients()?;
            let document = document(&self.families, self.ranges, &self.held, &transients);
            run_as(&self.ports, "nft", &["--file", "-"], document).await?;
        }
        Ok(())
    }

    /// Sends a transaction. Returns the first failure; without one it is in force.
    fn commit(&mut self, messages: &[u8]) -> Result<(), NetlinkError> {
        let netfilter = match &self.netfilter {
            Some(netfilter) => netfilter,
            None => {
                let netfilter = Netfilter::open()?;
                self.ports.opened(netfilter.port);
                self.netfilter.insert(netfilter)
            }
        };
        let done = netfilter.commit(&transaction(messages));
        // What the kernel refuses is not the socket's fault.
        if let Err(error) = &done
            && error.code().is_none()
            && let Some(netfilter) = self.netfilter.take()
        {
            self.ports.closed(netfilter.port);
        }
        done
    }

    /// The elements that steps concern, as held.
    fn concerned(&self, steps: &[&FirewallStep]) -> BTreeMap<Family, Elements> {
        let pods: BTreeSet<IpAddr> = steps.iter().filter_map(|step| step.pod()).collect();
        let networks = steps.iter().any(|step| step.pod().is_none());
        let mut concerned = BTreeMap::new();
        for (family, state) in &self.held.families {
            let elements: &mut Elements = concerned.entry(*family).or_default();
            if networks {
                elements::of_networks(&state.firewall, elements);
            }
            for pod in &pods {
                if let Some(state) = state.firewall.pods.get(pod) {
                    elements::of_pod(*pod, state, elements);
                }
            }
        }
        concerned
    }

    pub(crate) fn profile(&self) -> Profile {
        Profile {
            name: "nftables".to_owned(),
            watched: Watched {
                tables: &[TABLE],
                chains: None,
                base_chains: &[],
            },
            nat_priority: TRANSLATION_PRIORITY,
            nat_table: Some(TABLE),
            advice: "give it a priority after ours, or remove it",
            marks_before_dnat: false,
            ways_are_routes: false,
            remnants: vec![Remnant::Nftables],
        }
    }

    /// What the rule `foreign` has counted. Of both families, so that it is told in both.
    pub(crate) fn foreign_marks(&self) -> Result<BTreeMap<Family, u64>, NetlinkError> {
        let counted = Look(Netfilter::open()?).counted(MARKING)?;
        let name = format!("{TAG}foreign:");
        let of_name = counted.iter().find(|(tag, _)| tag.starts_with(&name));
        let families = self.families.iter();
        let counts = families.filter_map(|family| Some((*family, of_name?.1)));
        Ok(counts.collect())
    }

    pub(crate) fn observe(
        &mut self,
        strict_tcp: bool,
    ) -> Result<BTreeMap<Family, FirewallState>, NetlinkError> {
        self.ranges.strict_tcp = strict_tcp;
        let states = self.read()?;
        self.held = KernelState::default();
        for (family, state) in &states {
            self.held.families.entry(*family).or_default().firewall = state.clone();
        }
        Ok(states)
    }

    pub(crate) async fn apply(&mut self, steps: &[&FirewallStep], failed: &mut Vec<StepError>) {
        let batch = executable(steps, failed);
        if batch.is_empty() || self.transaction(&batch).await.is_ok() {
            return;
        }
        // The table may differ from what we held: read it again. Then one by one, so that a bad step costs no other.
        if let Err(error) = self.observe(self.ranges.strict_tcp) {
            failed.extend(StepError::of_batch(batch, error));
            return;
        }
        for step in batch {
            for step in executable(&[step], failed) {
                if let Err(error) = self.transaction(&[step]).await {
                    failed.push(StepError::new(step, error));
                }
            }
        }
    }

    pub(crate) fn expect_late_replies(
        &mut self,
        replies: &[LateReply],
    ) -> Result<(), NetlinkError> {
        let mut sets: BTreeMap<String, Vec<&LateReply>> = BTreeMap::new();
        for late in replies {
            let set = late_set(late).name(Family::of(late.pod));
            sets.entry(set).or_default().push(late);
        }
        let key =
            |late: &LateReply| SetElementAttribute::Key(DataAttribute::Value(late_reply_key(late)));
        let time = u64::from(LATE_REPLY_SECONDS) * 1000;
        let mut messages = Vec::new();
        for (set, replies) in sets {
            let present = |late: &&LateReply| [ListAttribute::Element(vec![key(late)])];
            let anew = |late: &&LateReply| {
                let timeout = SetElementAttribute::Timeout(time);
                [ListAttribute::Element(vec![key(late), timeout])]
            };
            // An element that is there would keep its time (kernels before 6.12). To delete one that is not there would
            // fail; so it is added first.
            messages.extend(Change::Add.messages(&set, &replies, present));
            messages.extend(Change::Delete.messages(&set, &replies, present));
            messages.extend(Change::Add.messages(&set, &replies, anew));
        }
        self.commit(&messages)
    }
}

/// One look at the table.
struct Look(Netfilter);

impl Look {
    fn dump<T: Default + Extend<X>, X, I: IntoIterator<Item = X>>(
        &self,
        question: NfTablesMessage,
        read: impl Fn(Message<'_>) -> I,
    ) -> Result<T, NetlinkError> {
        match dump(&self.0, NetfilterProtoFamily::Inet, question, read) {
            // Without a table or a set there is nothing in it.
            Err(error) if error.is_absent() => Ok(T::default()),
            all => all,
        }
    }

    /// The flags of the table; `None` where there is none.
    fn table_flags(&self) -> Result<Option<u32>, NetlinkError> {
        let attributes = Vec::new();
        let question = NfTablesMessage::GetTable(TableMessage { attributes });
        let flags: Vec<u32> = self.dump(question, read::own_table)?;
        Ok(flags.first().copied())
    }

    fn sets(&self) -> Result<BTreeMap<String, SetTraits>, NetlinkError> {
        let attributes = vec![SetAttribute::Table(TABLE.to_owned())];
        let question = NfTablesMessage::GetSet(SetMessage { attributes });
        self.dump(question, read::set)
    }

    fn chains(&self) -> Result<BTreeMap<String, Option<BaseChain>>, NetlinkError> {
        let attributes = Vec::new();
        let question = NfTablesMessage::GetChain(ChainMessage { attributes });
        self.dump(question, read::chain)
    }

    /// The rules, by chain and tag.
    fn rules(&self) -> Result<Vec<(String, String)>, NetlinkError> {
        let attributes = vec![RuleAttribute::Table(TABLE.to_owned())];
        let question = NfTablesMessage::GetRule(RuleMessage { attributes });
        self.dump(question, read::rule)
    }

    /// What the rules of a chain have counted, by tag.
    fn counted(&self, chain: &str) -> Result<Vec<(String, u64)>, NetlinkError> {
        let attributes = vec![
            RuleAttribute::Table(TABLE.to_owned()),
            RuleAttribute::Chain(chain.to_owned()),
        ];
        let question = NfTablesMessage::GetRule(RuleMessage { attributes });
        self.dump(question, read::counted)
    }

    fn members(
        &self,
        kind: Kind,
        family: Family,
        mask: u32,
    ) -> Result<BTreeMap<Key, Value>, NetlinkError> {
        let elements: Vec<read::Element> = self.dump(elements_in(kind, family), read::elements)?;
        if kind.of_networks() {
            let end = |element: &read::Element| Some((address(&element.key)?, element.is_end));
            let ends = elements.iter().filter_map(end);
            let nets = intervals::networks(family, ends.collect());
            let nets = nets.into_iter().map(Key::Net);
            return Ok(nets.map(|net| (net, Value::None)).collect());
        }
        let member = |element: read::Element| {
            let key = Key::parse(kind, &element.key, mask)?;
            Some((key, element.value))
        };
        Ok(elements.into_iter().filter_map(member).collect())
    }
}

/// The question for the elements of a set.
fn elements_in(kind: Kind, family: Family) -> NfTablesMessage {
    let attributes = vec![
        SetElementList::Table(TABLE.to_owned()),
        SetElementList::Set(kind.name(family)),
    ];
    NfTablesMessage::GetSetElement(SetElementMessage { attributes })
}

fn dump<T: Default + Extend<X>, X, I: IntoIterator<Item = X>>(
    netfilter: &Netfilter,
    family: NetfilterProtoFamily,
    question: NfTablesMessage,
    read: impl Fn(Message<'_>) -> I,
) -> Result<T, NetlinkError> {
    let question = NetfilterMessageInner::NfTables(question);
    netfilter.dump(family, &question, |all: &mut T, answer| {
        all.extend(read(answer));
        Ok(())
    })
}

/// Whether our table is there.
pub(crate) fn exists() -> Result<bool, NetlinkError> {
    match Look(Netfilter::open()?).table_flags() {
        Err(error) if error.is_unsupported() => Ok(false),
        flags => Ok(flags?.is_some()),
    }
}

/// The base chains in the tables of everybody: family, table, name and hook. None where the kernel has no nf_tables.
pub(crate) fn base_chains()
-> Result<Vec<(NetfilterProtoFamily, String, String, BaseChain)>, NetlinkError> {
    let attributes = Vec::new();
    let question = NfTablesMessage::GetChain(ChainMessage { attributes });
    // Of thousands of chains, a handful have a hook.
    let base = |answer: Message<'_>| {
        let (table, name, base) = any_chain(answer)?;
        Some((answer.family(), table, name, base?))
    };
    let unspecified = NetfilterProtoFamily::Unspec;
    match dump(&Netfilter::open()?, unspecified, question, base) {
        Err(error) if error.is_unsupported() => Ok(Vec::new()),
        chains => chains,
    }
}

/// Removes our table; absent is fine.
pub(crate) fn remove() -> Result<(), NetlinkError> {
    Netfilter::open()?.commit(&transaction(&removal()))
}

/// The messages that remove the table.
fn removal() -> Vec<u8> {
    let name = || vec![TableAttribute::Name(TABLE.to_owned())];
    let add = NfTablesMessage::NewTable(TableMessage { attributes: name() });
    let delete = NfTablesMessage::DeleteTable(TableMessage { attributes: name() });
    // Added first, so that there is one to delete.
    let mut batch = inet(NLM_F_CREATE, add);
    batch.extend(inet(NLM_F_ACK, delete));
    batch
}

fn base_of(chain: &Chain) -> Option<BaseChain> {
    let hook = chain.hook?;
    Some(BaseChain {
        kind: hook.kind.to_owned(),
        hook: hook.number,
        priority: hook.priority,
        accepts: true,
    })
}

/// The whole table as `nft` takes it, replacing whatever there is.
fn document(
    families: &[Family],
    ranges: Ranges,
    state: &KernelState,
    transients: &[Transient],
) -> String {
    // Maps name chains and rules name sets: nft resolves both within a table, whatever the order.
    let mut text =
        format!("add table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n");
    for &family in families {
        let state = state.families.get(&family);
        let elements = state.map_or_else(Elements::new, |s| elements::of_state(&s.firewall));
        for kind in Kind::all() {
            let members = elements.get(&kind).into_iter().flatten();
            text += &kind.text(family, members, transients);
        }
    }
    for chain in chains(families, ranges) {
        text += &chain.text();
    }
    text + "}\n"
}

/// The messages that turn some elements into others. Deletions come first: the value of an element cannot be changed,
/// only replaced.
fn changes(from: &BTreeMap<Family, Elements>, to: &BTreeMap<Family, Elements>) -> Vec<u8> {
    let mut batch = Vec::new();
    for family in Family::ALL {
        let (old, new) = (from.get(&family), to.get(&family));
        for (operation, these, those) in [(Change::Delete, old, new), (Change::Add, new, old)] {
            for kind in Kind::all() {
                let these = these.and_then(|elements| elements.get(&kind));
                let those = those.and_then(|elements| elements.get(&kind));
                let differs = |(key, value): &(&Key, &Value)| {
                    those.and_then(|those| those.get(*key)) != Some(*value)
                };
                let differing: Vec<_> = these.into_iter().flatten().filter(differs).collect();
                let elements = |(key, value): &(&Key, &Value)| elements_of(key, value);
                batch.extend(operation.messages(&kind.name(family), &differing, elements));
            }
        }
    }
    batch
}

type Element = ListAttribute<SetElementAttribute>;

#[derive(Clone, Copy)]
enum Change {
    Add,
    Delete,
}

impl Change {
    /// The messages that add elements to a set or delete them from it.
    fn messages<T, E: IntoIterator<Item = Element>>(
        self,
        set: &str,
        members: &[T],
        elements: impl Fn(&T) -> E,
    ) -> Vec<u8> {
        let message = |part: &[T]| {
            let attributes = vec![
                SetElementList::Table(TABLE.to_owned()),
                SetElementList::Set(set.to_owned()),
                SetElementList::Elements(part.iter().flat_map(&elements).collect()),
            ];
            let message = SetElementMessage { attributes };
            match self {
                Change::Add => {
                    let add = NfTablesMessage::NewSetElement(message);
                    inet(NLM_F_CREATE | NLM_F_ACK, add)
                }
                Change::Delete => inet(NLM_F_ACK, NfTablesMessage::DeleteSetElement(message)),
            }
        };
        members.chunks(ELEMENTS_AT_ONCE).flat_map(message).collect()
    }
}

/// The elements of one key of a set or map: those of networks are intervals, with two ends.
fn elements_of(key: &Key, value: &Value) -> Vec<Element> {
    let mut elements = vec![element(key.bytes(), value, false)];
    if let Key::Net(net) = key {
        elements.extend(intervals::after(net).map(|end| element(octets(end), value, true)));
    }
    elements
}

fn element(key: Vec<u8>, value: &Value, is_end: bool) -> Element {
    let mut attributes = Vec::new();
    if is_end {
        attributes.push(SetElementAttribute::Flags(SetElementFlags::IntervalEnd));
    }
    attributes.push(SetElementAttribute::Key(DataAttribute::Value(key)));
    let data = match value {
        Value::None => None,
        Value::Address(address) => Some(DataAttribute::Value(octets(*address))),
        Value::Chain(chain) => Some(DataAttribute::Verdict(vec![
            VerdictAttribute::Code(Verdict::Goto),
            VerdictAttribute::Chain(chain.clone()),
        ])),
    };
    attributes.extend(data.map(SetElementAttribute::Data));
    ListAttribute::Element(attributes)
}

fn inet(flags: u16, inner: NfTablesMessage) -> Vec<u8> {
    let inner = NetfilterMessageInner::NfTables(inner);
    message(NetfilterProtoFamily::Inet, flags, 0, inner)
}

/// Messages between begin and end of a transaction: all of them or none.
fn transaction(messages: &[u8]) -> Vec<u8> {
    let mark = |inner: ControlMessage| {
        let inner = NetfilterMessageInner::None(inner);
        message(NetfilterProtoFamily::Unspec, 0, SUBSYSTEM, inner)
    };
    let mut batch = mark(ControlMessage::BatchBegin);
    batch.extend_from_slice(messages);
    batch.extend(mark(ControlMessage::BatchEnd));
    batch
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ethernet::Mac;
    use crate::state::{Landmark, Mark, NetSet, PodSet, Way};

    #[test]
    fn the_table_is_as_written_down() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let ranges = Ranges {
            mask: 0x0060_0000,
            slots: 3,
            table_offset: 100_000,
            priority: 1000,
            strict_tcp: false,
        };
        let mark = Mark {
            value: 0x0040_0000,
            mask: ranges.mask,
        };
        let mut state = KernelState::default();
        for (family, pod, vip, node, net) in [
            (
                Family::V4,
                "10.244.1.11",
                "192.0.2.200",
                "192.0.2.12",
                "10.244.0.0/16",
            ),
            (
                Family::V6,
                "fd00:10:244:1::b",
                "2001:db8:1::c8",
                "2001:db8:1::12",
                "fd00:10:244::/48",
            ),
        ] {
            let (pod, vip, node) = (ip(pod), ip(vip), ip(node));
            for step in [
                FirewallStep::Install(family, [vip].into()),
                FirewallStep::AddNet(NetSet::Excluded, net.parse().unwrap()),
                FirewallStep::AddPod(PodSet::Egress, pod),
                FirewallStep::Translate { pod, vip },
                FirewallStep::Mark { pod, mark },
                FirewallStep::AddLandmark(family, Landmark::Way(Way { mark, via: node })),
                FirewallStep::AddLandmark(family, Landmark::Node(Mac([2, 0, 0, 0, 0, 12]))),
                FirewallStep::AddLandmark(family, Landmark::Lan("eth0".to_owned())),
            ] {
                state.apply_firewall(&step);
            }
        }
        let document = document(&Family::ALL, ranges, &state, &[]);
        assert_eq!(document, include_str!("testdata/table.nft"));
    }
}
