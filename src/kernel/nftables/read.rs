//! Netlink answers about our table, as values. Pure.
//!
//! The numbers are those of nf_tables.h.

use std::net::IpAddr;

use nix::libc::{NF_ACCEPT, c_int};

use crate::kernel::netfilter::{Message, attributes};
use crate::kernel::nftables::elements::Value;
use crate::kernel::nftables::ruleset::TABLE;
use crate::kernel::tag::TAG;

const TABLE_NAME: u16 = 1;
const SET_TABLE: u16 = 1;
const SET_NAME: u16 = 2;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_CHAIN: u16 = 2;
const RULE_USERDATA: u16 = 7;
const ELEMENTS: u16 = 3;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const ELEMENT_FLAGS: u16 = 3;
const INTERVAL_END: u32 = 1;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CHAIN: u16 = 2;
/// `NFTNL_UDATA_RULE_COMMENT` of libnftnl: a rule's comment among its user data.
const UDATA_COMMENT: u8 = 0;

/// What makes a chain a base chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BaseChain {
    /// `filter`, `nat` or `route`.
    pub(crate) kind: String,
    /// Number of the hook.
    pub(crate) hook: c_int,
    /// Place among the chains of the hook.
    pub(crate) priority: i32,
    /// Its policy is `accept`.
    pub(crate) accepts: bool,
}

/// An element of a set or map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Element {
    pub(crate) key: IpAddr,
    pub(crate) value: Value,
    /// The key is the first address after an interval.
    pub(crate) is_end: bool,
}

/// Whether a table is ours.
pub(crate) fn is_own_table(message: Message<'_>) -> bool {
    named(message, TABLE_NAME, TABLE_NAME).is_some()
}

/// The name of a set of ours.
pub(crate) fn set(message: Message<'_>) -> Option<String> {
    let name = named(message, SET_TABLE, SET_NAME)?;
    Some(name.to_owned())
}

/// Name and hook of a chain of ours.
pub(crate) fn chain(message: Message<'_>) -> Option<(String, Option<BaseChain>)> {
    let (table, name, base) = any_chain(message)?;
    (table == TABLE).then_some((name, base))
}

/// Table, name and hook of anybody's chain.
pub(crate) fn any_chain(message: Message<'_>) -> Option<(String, String, Option<BaseChain>)> {
    let (mut table, mut name) = (None, None);
    let mut base = BaseChain::default();
    let mut has_hook = false;
    for (kind, value) in message.attributes() {
        match kind {
            CHAIN_TABLE => table = Some(text(value).to_owned()),
            CHAIN_NAME => name = Some(text(value).to_owned()),
            CHAIN_TYPE => text(value).clone_into(&mut base.kind),
            CHAIN_POLICY => base.accepts = number(value)?.cast_signed() == NF_ACCEPT,
            CHAIN_HOOK => {
                has_hook = true;
                for (kind, value) in attributes(value) {
                    match kind {
                        HOOK_NUMBER => base.hook = number(value)?.cast_signed(),
                        HOOK_PRIORITY => base.priority = number(value)?.cast_signed(),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some((table?, name?, has_hook.then_some(base)))
}

/// The chain and our comment of a rule; a rule that has none has an empty comment.
pub(crate) fn rule(message: Message<'_>) -> Option<(String, String)> {
    let (mut chain, mut tag) = (None, String::new());
    for (kind, value) in message.attributes() {
        match kind {
            RULE_CHAIN => chain = Some(text(value).to_owned()),
            RULE_USERDATA => tag = comment(value).unwrap_or_default(),
            _ => {}
        }
    }
    Some((chain?, tag))
}

/// The elements in a message.
pub(crate) fn elements(message: Message<'_>) -> Vec<Element> {
    let lists = message.attributes().filter(|(kind, _)| *kind == ELEMENTS);
    lists
        .flat_map(|(_, list)| attributes(list))
        .filter_map(|(_, one)| element(one))
        .collect()
}

fn element(bytes: &[u8]) -> Option<Element> {
    let (mut key, mut value, mut is_end) = (None, Value::None, false);
    for (kind, content) in attributes(bytes) {
        match kind {
            ELEMENT_KEY => key = data(content).and_then(address),
            ELEMENT_FLAGS => is_end = number(content)? & INTERVAL_END != 0,
            ELEMENT_DATA => {
                let verdict = attributes(content).find(|(kind, _)| *kind == DATA_VERDICT);
                value = match verdict {
                    Some((_, verdict)) => attributes(verdict)
                        .find(|(kind, _)| *kind == VERDICT_CHAIN)
                        .map_or(Value::None, |(_, chain)| {
                            Value::Chain(text(chain).to_owned())
                        }),
                    None => data(content)
                        .and_then(address)
                        .map_or(Value::None, Value::Address),
                };
            }
            _ => {}
        }
    }
    Some(Element {
        key: key?,
        value,
        is_end,
    })
}

/// The name of an object, if it is of our table.
fn named<'a>(message: Message<'a>, table: u16, name: u16) -> Option<&'a str> {
    let value = |wanted: u16| {
        let mut attributes = message.attributes();
        attributes
            .find(|(kind, _)| *kind == wanted)
            .map(|(_, v)| text(v))
    };
    (value(table)? == TABLE).then(|| value(name)).flatten()
}

/// The comment in a rule's user data: type, length and value one after the other.
fn comment(mut data: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = data {
        let value = rest.get(..usize::from(*length))?;
        if *kind == UDATA_COMMENT {
            let text = text(value);
            return text.starts_with(TAG).then(|| text.to_owned());
        }
        data = rest.get(usize::from(*length)..)?;
    }
    None
}

fn data(bytes: &[u8]) -> Option<&[u8]> {
    let mut attributes = attributes(bytes);
    attributes
        .find(|(kind, _)| *kind == DATA_VALUE)
        .map(|(_, value)| value)
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
    let v6 = || <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from);
    v4().or_else(v6)
}

fn number(bytes: &[u8]) -> Option<u32> {
    <[u8; 4]>::try_from(bytes).ok().map(u32::from_be_bytes)
}

/// Text up to its terminating zero; empty where it is none.
fn text(bytes: &[u8]) -> &str {
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    std::str::from_utf8(bytes.get(..end).unwrap_or_default()).unwrap_or_default()
}
