//! Forgets connections that pods opened to outside, so that their address translation is decided anew.
//!
//! One dump for each family, a pure choice, and deletes sent in batches: thousands of entries cost milliseconds,
//! where a process for each took 20 s.

mod connection;
mod select;

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::NLM_F_ACK;
use netlink_packet_netfilter::conntrack::ConntrackMessage;
use netlink_packet_netfilter::{NetfilterMessageInner, NetfilterProtoFamily};
use nix::libc::ENOENT;

use self::connection::{Connection, Entry};
pub(crate) use self::connection::{Flow, LateReply};
pub(crate) use self::select::Selection;
use self::select::{Choice, is_to_outside};
use crate::kernel::netfilter::{Message, Netfilter, NetlinkError, message};
use crate::state::Family;

/// How many requests are sent before their answers are read. An answer takes 832 bytes of the receive buffer where it was
/// measured, and more with other build options of the kernel: these fit many times over.
const ENTRIES_AT_ONCE: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum ConntrackError {
    #[error("connection tracking")]
    Netlink(#[from] NetlinkError),
    #[error("forgetting connections was cut off")]
    CutOff(#[from] tokio::task::JoinError),
}

/// Connections to forget, and others to resume.
#[derive(Debug, Default)]
pub(crate) struct Selected {
    forgotten: Vec<(Family, Entry)>,
    resumed: Vec<(Family, Entry)>,
    /// Of those to forget: established ones, whose ends may go on talking.
    pub(crate) established: Vec<Flow>,
    /// Of those to forget: replies that may still come.
    pub(crate) late_replies: Vec<LateReply>,
}

/// Finds the connections to forget or to resume; those to destinations in `excluded` stay.
pub(crate) async fn select(
    selection: Selection,
    excluded: BTreeSet<IpNet>,
) -> Result<Selected, ConntrackError> {
    let mut families = Family::ALL.to_vec();
    families.retain(|family| selection.concerns(*family));
    let choose = move |connection: Connection| match selection.choose(&connection, &excluded) {
        Choice::Leave => None,
        choice => Some((choice, connection)),
    };
    let mut selected = Selected::default();
    for (choice, connection) in dump(families, choose).await? {
        let family = Family::of(connection.opener());
        match choice {
            Choice::Forget => {
                selected.late_replies.extend(connection.late_reply());
                selected.established.extend(connection.flow());
                selected.forgotten.push((family, connection.identity()));
            }
            Choice::ForgetUnreplied => selected.forgotten.push((family, connection.identity())),
            Choice::Resume => selected.resumed.push((family, connection.resumption())),
            Choice::Leave => {}
        }
    }
    Ok(selected)
}

/// The established connections of pods to outside.
pub(crate) async fn established(
    pods: BTreeSet<IpAddr>,
    excluded: BTreeSet<IpNet>,
) -> Result<BTreeSet<Flow>, ConntrackError> {
    let mut families = Family::ALL.to_vec();
    families.retain(|family| pods.iter().any(|pod| Family::of(*pod) == *family));
    let flow = move |connection: Connection| {
        let is_wanted =
            pods.contains(&connection.opener()) && is_to_outside(&connection, &excluded);
        connection.flow().filter(|_| is_wanted)
    };
    Ok(dump(families, flow).await?.into_iter().collect())
}

/// What `take` picks of the connections of families.
async fn dump<T: Send + 'static>(
    families: Vec<Family>,
    take: impl Fn(Connection) -> Option<T> + Send + 'static,
) -> Result<Vec<T>, ConntrackError> {
    let take = move |all: &mut Vec<T>, answer: Message<'_>| {
        if let NetfilterMessageInner::Conntrack(ConntrackMessage::New(entry)) = answer.decode()? {
            all.extend(Connection::parse(entry).and_then(&take));
        }
        Ok(())
    };
    // Blocking: a dump of a large table takes milliseconds that the agent's other tasks must not wait for.
    tokio::task::spawn_blocking(move || {
        let get = NetfilterMessageInner::Conntrack(ConntrackMessage::Get(Vec::new()));
        let mut all = Vec::new();
        for family in families {
            all.extend(Netfilter::open()?.dump(proto(family), &get, &take)?);
        }
        Ok(all)
    })
    .await?
}

/// Forgets and resumes what was selected.
pub(crate) async fn execute(selected: Selected) -> Result<(), ConntrackError> {
    if selected.forgotten.is_empty() && selected.resumed.is_empty() {
        return Ok(());
    }
    tokio::task::spawn_blocking(move || {
        let netfilter = Netfilter::open()?;
        for batch in selected.forgotten.chunks(ENTRIES_AT_ONCE) {
            request(&netfilter, batch, ConntrackMessage::Delete)?;
        }
        for batch in selected.resumed.chunks(ENTRIES_AT_ONCE) {
            request(&netfilter, batch, ConntrackMessage::New)?;
        }
        Ok(())
    })
    .await?
}

/// One request for each entry. Without `NLM_F_CREATE`, `New` changes what is there.
fn request(
    netfilter: &Netfilter,
    entries: &[(Family, Entry)],
    request: fn(Entry) -> ConntrackMessage,
) -> Result<(), ConntrackError> {
    let mut batch = Vec::new();
    for (family, entry) in entries {
        let request = NetfilterMessageInner::Conntrack(request(entry.clone()));
        batch.extend(message(proto(*family), NLM_F_ACK, 0, request));
    }
    netfilter.send(&batch)?;
    let mut missing = entries.len();
    while missing > 0 {
        netfilter.receive(|answers| {
            for result in answers.iter().filter_map(Message::acknowledges) {
                missing = missing.saturating_sub(1);
                // What is not there has ended by itself in the meantime.
                if let Err(error) = result
                    && error.raw_os_error() != Some(ENOENT)
                {
                    return Err(error.into());
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn proto(family: Family) -> NetfilterProtoFamily {
    match family {
        Family::V4 => NetfilterProtoFamily::IPv4,
        Family::V6 => NetfilterProtoFamily::IPv6,
    }
}
