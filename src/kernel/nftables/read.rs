//! Netlink answers about our table, as values. Pure.
//!
//! The numbers are those of nf_tables.h.

use nix::libc::{NF_ACCEPT, c_int};

use crate::kernel::netfilter::{Message, attribute, attributes};
use crate::kernel::netlink;
use crate::kernel::nftables::elements::{
    Kind, SetTraits, TELLING_FLAGS, Transient, Value, late_reply_of,
};
use crate::kernel::nftables::ruleset::TABLE;
use crate::kernel::tag::TAG;
use crate::state::{Family, LATE_REPLY_SECONDS};

const TABLE_NAME: u16 = 1;
const TABLE_FLAGS: u16 = 2;
const SET_TABLE: u16 = 1;
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_LENGTH: u16 = 5;
const SET_DATA_TYPE: u16 = 6;
const SET_DATA_LENGTH: u16 = 7;
const SET_DESCRIPTION: u16 = 9;
const SET_TIMEOUT: u16 = 11;
const SET_EXPRESSION: u16 = 17;
const SET_EXPRESSIONS: u16 = 18;
const DESCRIPTION_SIZE: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const COUNTER_PACKETS: u16 = 2;
const ELEMENTS: u16 = 3;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const ELEMENT_FLAGS: u16 = 3;
const ELEMENT_EXPIRATION: u16 = 5;
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
    pub(crate) hook: c_int,
    /// Place among the chains of the hook.
    pub(crate) priority: i32,
    pub(crate) accepts: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Element {
    pub(crate) key: Vec<u8>,
    pub(crate) value: Value,
    /// The key is the first address after an interval.
    pub(crate) is_end: bool,
}

/// The flags of our table.
pub(crate) fn own_table(message: Message<'_>) -> Option<u32> {
    named(message, TABLE_NAME, TABLE_NAME)?;
    Some(
        message
            .attribute(TABLE_FLAGS)
            .and_then(number)
            .unwrap_or_default(),
    )
}

/// A set of ours.
pub(crate) fn set(message: Message<'_>) -> Option<(String, SetTraits)> {
    let name = named(message, SET_TABLE, SET_NAME)?;
    let value = |kind| message.attribute(kind).and_then(number).unwrap_or_default();
    let has = |kind| message.attribute(kind).is_some();
    let milliseconds = message
        .attribute(SET_TIMEOUT)
        .and_then(|m| <[u8; 8]>::try_from(m).ok());
    let description = message.attribute(SET_DESCRIPTION).unwrap_or_default();
    let traits = SetTraits {
        flags: value(SET_FLAGS) & TELLING_FLAGS,
        key_type: value(SET_KEY_TYPE),
        key_length: value(SET_KEY_LENGTH),
        data_type: value(SET_DATA_TYPE),
        data_length: value(SET_DATA_LENGTH),
        milliseconds: milliseconds.map(u64::from_be_bytes).unwrap_or_default(),
        limits: attribute(description, DESCRIPTION_SIZE).is_some()
            || has(SET_EXPRESSION)
            || has(SET_EXPRESSIONS),
    };
    Some((name, traits))
}

/// Name and hook of a chain of ours.
pub(crate) fn chain(message: Message<'_>) -> Option<(String, Option<BaseChain>)> {
    let (table, name, base) = any_chain(message)?;
    (table == TABLE).then_some((name, base))
}

/// Table, name and hook of anybody's chain.
pub(crate) fn any_chain(message: Message<'_>) -> Option<(String, String, Option<BaseChain>)> {
    let words = |kind| message.attribute(kind).map(text);
    let base = match message.attribute(CHAIN_HOOK) {
        Some(hook) => Some(BaseChain {
            kind: words(CHAIN_TYPE)?.to_owned(),
            hook: number(attribute(hook, HOOK_NUMBER)?)?.cast_signed(),
            priority: number(attribute(hook, HOOK_PRIORITY)?)?.cast_signed(),
            accepts: number(message.attribute(CHAIN_POLICY)?)?.cast_signed() == NF_ACCEPT,
        }),
        None => None,
    };
    Some((
        words(CHAIN_TABLE)?.to_owned(),
        words(CHAIN_NAME)?.to_owned(),
        base,
    ))
}

/// The chain and our comment of a rule; a rule that has none has an empty comment.
pub(crate) fn rule(message: Message<'_>) -> Option<(String, String)> {
    let chain = text(message.attribute(RULE_CHAIN)?).to_owned();
    let tag = message.attribute(RULE_USERDATA).and_then(comment);
    Some((chain, tag.unwrap_or_default()))
}

/// Our comment of a rule, and how many packets have met its counter; nothing where it has none.
pub(crate) fn counted(message: Message<'_>) -> Option<(String, u64)> {
    let tag = message.attribute(RULE_USERDATA).and_then(comment)?;
    let expressions = attributes(message.attribute(RULE_EXPRESSIONS)?);
    let mut counters = expressions.filter_map(|(_, expression)| {
        let is_counter = text(attribute(expression, EXPRESSION_NAME)?) == "counter";
        let data = attribute(expression, EXPRESSION_DATA).filter(|_| is_counter)?;
        let packets = attribute(data, COUNTER_PACKETS)?;
        <[u8; 8]>::try_from(packets).ok().map(u64::from_be_bytes)
    });
    Some((tag, counters.next()?))
}

/// The elements in a message.
pub(crate) fn elements(message: Message<'_>) -> Vec<Element> {
    let lists = message.attributes().filter(|(kind, _)| *kind == ELEMENTS);
    lists
        .flat_map(|(_, list)| attributes(list))
        .filter_map(|(_, one)| element(one))
        .collect()
}

/// The late replies in a message; one without an expiration lives for the full time.
pub(crate) fn transients(kind: Kind, family: Family, message: Message<'_>) -> Vec<Transient> {
    let transient = |bytes| {
        let key = attribute(attribute(bytes, ELEMENT_KEY)?, DATA_VALUE)?;
        let expiration = attribute(bytes, ELEMENT_EXPIRATION).and_then(|ms| ms.try_into().ok());
        Some(Transient {
            late: late_reply_of(kind, family, key)?,
            milliseconds: expiration
                .map_or(u64::from(LATE_REPLY_SECONDS) * 1000, u64::from_be_bytes),
        })
    };
    let lists = message.attributes().filter(|(kind, _)| *kind == ELEMENTS);
    lists
        .flat_map(|(_, list)| attributes(list))
        .filter_map(|(_, one)| transient(one))
        .collect()
}

fn element(bytes: &[u8]) -> Option<Element> {
    let data = attribute(bytes, ELEMENT_DATA).unwrap_or_default();
    let chain = attribute(data, DATA_VERDICT).and_then(|verdict| attribute(verdict, VERDICT_CHAIN));
    let value = match (
        chain,
        attribute(data, DATA_VALUE).and_then(netlink::address),
    ) {
        (Some(chain), _) => Value::Chain(text(chain).to_owned()),
        (None, Some(address)) => Value::Address(address),
        (None, None) => Value::None,
    };
    let is_end = match attribute(bytes, ELEMENT_FLAGS) {
        Some(flags) => number(flags)? & INTERVAL_END != 0,
        None => false,
    };
    Some(Element {
        key: attribute(attribute(bytes, ELEMENT_KEY)?, DATA_VALUE)?.to_vec(),
        value,
        is_end,
    })
}

/// The name of an object, if it is of our table.
fn named(message: Message<'_>, table: u16, name: u16) -> Option<String> {
    if text(message.attribute(table)?) != TABLE {
        return None;
    }
    Some(text(message.attribute(name)?).to_owned())
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

fn number(bytes: &[u8]) -> Option<u32> {
    <[u8; 4]>::try_from(bytes).ok().map(u32::from_be_bytes)
}

/// Text up to its terminating zero; empty where it is none.
fn text(bytes: &[u8]) -> &str {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    std::str::from_utf8(text).unwrap_or_default()
}
