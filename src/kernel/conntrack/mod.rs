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

/// What can go wrong with connection tracking.
#[derive(Debug, thiserror::Error)]
pub enum ConntrackError {
    /// No socket, or no answer.
    #[error("connection tracking")]
    Netlink(#[from] NetlinkError),
    /// The work was cut off.
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
    // Blocking: a dump of a large table takes milliseconds that the agent's other tasks must not wait for.
    tokio::task::spawn_blocking(move || {
        let mut all = Selected::default();
        for family in Family::ALL {
            if selection.concerns(family) {
                let take = |selected: &mut Selected, connection| {
                    selected.take(family, connection, &selection, &excluded);
                };
                all.append(dump(family, take)?);
            }
        }
        Ok(all)
    })
    .await?
}

impl Selected {
    fn take(
        &mut self,
        family: Family,
        connection: Connection,
        selection: &Selection,
        excluded: &BTreeSet<IpNet>,
    ) {
        match selection.choose(&connection, excluded) {
            Choice::Forget => {
                self.late_replies.extend(connection.late_reply());
                self.established.extend(connection.flow());
                self.forgotten.push((family, connection.identity()));
            }
            Choice::ForgetUnreplied => self.forgotten.push((family, connection.identity())),
            Choice::Resume => self.resumed.push((family, connection.resumption())),
            Choice::Leave => {}
        }
    }

    fn append(&mut self, other: Selected) {
        self.forgotten.extend(other.forgotten);
        self.resumed.extend(other.resumed);
        self.established.extend(other.established);
        self.late_replies.extend(other.late_replies);
    }
}

/// The established connections of pods to outside.
pub(crate) async fn established(
    pods: BTreeSet<IpAddr>,
    excluded: BTreeSet<IpNet>,
) -> Result<BTreeSet<Flow>, ConntrackError> {
    tokio::task::spawn_blocking(move || {
        let take = |flows: &mut BTreeSet<Flow>, connection: Connection| {
            if pods.contains(&connection.opener()) && is_to_outside(&connection, &excluded) {
                flows.extend(connection.flow());
            }
        };
        let mut flows = BTreeSet::new();
        for family in Family::ALL {
            if pods.iter().any(|pod| Family::of(*pod) == family) {
                flows.extend(dump(family, take)?);
            }
        }
        Ok(flows)
    })
    .await?
}

/// Hands every connection of a family to `take`.
fn dump<T: Default>(
    family: Family,
    take: impl Fn(&mut T, Connection),
) -> Result<T, ConntrackError> {
    let get = NetfilterMessageInner::Conntrack(ConntrackMessage::Get(Vec::new()));
    let take = |all: &mut T, answer: Message<'_>| {
        if let NetfilterMessageInner::Conntrack(ConntrackMessage::New(entry)) = answer.decode()?
            && let Some(connection) = Connection::parse(entry)
        {
            take(all, connection);
        }
        Ok(())
    };
    Ok(Netfilter::open()?.dump(proto(family), &get, take)?)
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
            for answer in answers {
                let Some(result) = answer.acknowledges() else {
                    continue;
                };
                missing = missing.saturating_sub(1);
                match result {
                    // Ended by itself in the meantime.
                    Err(error) if error.raw_os_error() != Some(ENOENT) => return Err(error.into()),
                    _ => {}
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
