//! Forgets connections that pods opened to outside, so that their address translation is decided anew.
//!
//! One look for all that is asked at a time, a pure choice, and requests sent in batches: thousands of entries cost
//! milliseconds, where a process for each took 20 s.

mod connection;
mod dump;
mod select;

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use netlink_packet_core::NLM_F_ACK;
use nix::libc::{EBUSY, ENOENT};

use self::connection::{Connection, Entry, Named};
pub(crate) use self::connection::{Flow, LateReply};
use self::dump::{CHANGE, DELETE, Filters, GET, Scope, proto, request};
pub(crate) use self::select::Selection;
use self::select::{Choice, is_to_outside, of_family};
use crate::kernel::netfilter::{Message, Netfilter, NetlinkError, message};
use crate::state::Family;

/// How many requests are sent before their answers are read. An answer takes 832 bytes of the receive buffer where it was
/// measured, and more with other build options of the kernel: these fit many times over.
const ENTRIES_AT_ONCE: usize = 256;
/// The same for whole entries, of up to 5 KiB each in the kernel's memory.
const ANSWERS_AT_ONCE: usize = 64;
/// How often and how long apart an entry is tried that is busy. Kernels before 6.4 delete no entry of a flow that is in a
/// flow table, and take it out of there only when it has been silent for a while.
const BUSY_TRIES: u32 = 3;
const BUSY_PAUSE: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
pub enum ConntrackError {
    #[error("connection tracking")]
    Netlink(#[from] NetlinkError),
    #[error("looking at connections was cut off")]
    CutOff(#[from] tokio::task::JoinError),
    /// The kernel keeps some entries as they are; all others are done.
    #[error("connection tracking keeps {flow}, and {others} more")]
    Kept {
        flow: String,
        others: usize,
        source: io::Error,
    },
}

/// Connection tracking of this node.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conntrack {
    filters: Filters,
}

/// What a look has found.
#[derive(Debug, Default)]
pub(crate) struct Selected {
    /// Connections to forget, and others to resume.
    pub(crate) changes: Vec<Change>,
    /// Open ones of the pods that are challenged, also of those to forget: their ends may go on talking.
    pub(crate) flows: BTreeSet<Flow>,
    /// Of those to forget: replies that may still come.
    pub(crate) late_replies: Vec<LateReply>,
}

/// A request about one entry.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    /// Why: the connection is of this pod, or to this address.
    about: IpAddr,
    /// Delete the entry, or set it liberal.
    request: u8,
    entry: Entry,
    name: Named,
}

/// An entry that the kernel does not change.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) about: IpAddr,
    pub(crate) name: Named,
    pub(crate) error: io::Error,
}

impl Conntrack {
    /// Finds the connections to forget or to resume; those to destinations in `excluded` stay. With the same look, finds
    /// the open connections of the pods that are `challenged`.
    pub(crate) async fn select(
        &mut self,
        selection: Selection,
        challenged: BTreeSet<IpAddr>,
        excluded: BTreeSet<IpNet>,
    ) -> Result<Selected, ConntrackError> {
        let scopes = Family::ALL.map(|family| {
            if selection.is_about_others(family) {
                return (family, Scope::All);
            }
            let mut openers = selection.openers(family);
            openers.extend(of_family(challenged.iter(), family));
            (family, Scope::OpenedBy(openers))
        });
        let choose = move |connection: &Connection<'_>| {
            let choice = selection.choose(connection, &excluded);
            let is_challenged =
                challenged.contains(&connection.opener()) && is_to_outside(connection, &excluded);
            let found = Found {
                change: change(choice, connection),
                flow: open_flow(connection).filter(|_| is_challenged),
                late_reply: match choice {
                    Choice::Forget => connection.late_reply(),
                    Choice::ForgetInbound | Choice::Resume | Choice::Leave => None,
                },
            };
            (found.change.is_some() || found.flow.is_some()).then_some(found)
        };
        let mut selected = Selected::default();
        for found in self.look(scopes, choose).await? {
            selected.changes.extend(found.change);
            selected.flows.extend(found.flow);
            selected.late_replies.extend(found.late_reply);
        }
        Ok(selected)
    }

    /// The open TCP connections of pods to outside.
    pub(crate) async fn flows(
        &mut self,
        pods: BTreeSet<IpAddr>,
        excluded: BTreeSet<IpNet>,
    ) -> Result<BTreeSet<Flow>, ConntrackError> {
        let scopes = Family::ALL.map(|family| {
            let pods = of_family(pods.iter(), family).collect();
            (family, Scope::OpenedBy(pods))
        });
        let flow = move |connection: &Connection<'_>| {
            let is_wanted =
                pods.contains(&connection.opener()) && is_to_outside(connection, &excluded);
            open_flow(connection).filter(|_| is_wanted)
        };
        Ok(self.look(scopes, flow).await?.into_iter().collect())
    }

    /// What `take` picks of the connections in scope.
    async fn look<T: Send + 'static>(
        &mut self,
        scopes: [(Family, Scope); 2],
        take: impl Fn(&Connection<'_>) -> Option<T> + Send + 'static,
    ) -> Result<Vec<T>, ConntrackError> {
        let mut filters = self.filters.clone();
        // Blocking: a dump of a large table takes milliseconds that the agent's other tasks must not wait for.
        let looked = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            for (family, scope) in scopes {
                all.extend(filters.dump(family, &scope, &take)?);
            }
            Ok::<_, NetlinkError>((all, filters))
        });
        let (all, filters) = looked.await??;
        self.filters = filters;
        Ok(all)
    }
}

/// What one connection is found for.
struct Found {
    change: Option<Change>,
    flow: Option<Flow>,
    late_reply: Option<LateReply>,
}

fn change(choice: Choice, connection: &Connection<'_>) -> Option<Change> {
    let (about, request, entry) = match choice {
        Choice::Forget => (connection.opener(), DELETE, connection.identity()),
        Choice::ForgetInbound => (connection.answerer(), DELETE, connection.identity()),
        Choice::Resume => (connection.opener(), CHANGE, connection.resumption()),
        Choice::Leave => return None,
    };
    Some(Change {
        about,
        request,
        entry,
        name: connection.name(),
    })
}

fn open_flow(connection: &Connection<'_>) -> Option<Flow> {
    let (flow, is_open) = connection.flow()?;
    is_open.then_some(flow)
}

/// Those of some connections that begin or have ended, not those that are not known. Each is asked for by itself, without a
/// look at all others.
pub(crate) async fn not_open(flows: BTreeSet<Flow>) -> Result<BTreeSet<Flow>, ConntrackError> {
    let asked = tokio::task::spawn_blocking(move || {
        let netfilter = Netfilter::open()?;
        let mut not_open = BTreeSet::new();
        let flows: Vec<Flow> = flows.into_iter().collect();
        for part in flows.chunks(ANSWERS_AT_ONCE) {
            let mut batch = Vec::new();
            for flow in part {
                let family = proto(Family::of(flow.pod.ip()));
                batch.extend(message(family, NLM_F_ACK, 0, request(GET, flow.entry())));
            }
            netfilter.send(&batch)?;
            let mut missing = part.len();
            while missing > 0 {
                netfilter.receive(|answers| {
                    for answer in &answers {
                        // Whether it is known or not.
                        if answer.acknowledges().is_some() {
                            missing = missing.saturating_sub(1);
                        } else if let Some(connection) = Connection::parse(answer)
                            && let Some((flow, false)) = connection.flow()
                        {
                            not_open.insert(flow);
                        }
                    }
                    Ok(())
                })?;
            }
        }
        Ok::<_, NetlinkError>(not_open)
    });
    Ok(asked.await??)
}

/// Forgets and resumes what was selected, as far as the kernel does; returns what it keeps.
pub(crate) async fn execute(changes: Vec<Change>) -> Result<Vec<Kept>, ConntrackError> {
    insist(changes, async |changes| {
        Ok(tokio::task::spawn_blocking(move || request_all(changes)).await??)
    })
    .await
}

type Answered = Vec<(Change, io::Result<()>)>;

/// Makes changes with `request`, those of busy entries again.
async fn insist(
    mut changes: Vec<Change>,
    request: impl AsyncFn(Vec<Change>) -> Result<Answered, ConntrackError>,
) -> Result<Vec<Kept>, ConntrackError> {
    let mut kept = Vec::new();
    for attempt in 1..=BUSY_TRIES {
        if changes.is_empty() {
            break;
        }
        if attempt > 1 {
            tokio::time::sleep(BUSY_PAUSE).await;
        }
        let refused = request(changes).await?.into_iter().filter_map(refusal);
        let is_tried_again =
            |(_, error): &(Change, io::Error)| is_busy(error) && attempt < BUSY_TRIES;
        let (again, refused): (Vec<_>, Vec<_>) = refused.partition(is_tried_again);
        changes = again.into_iter().map(|(change, _)| change).collect();
        kept.extend(refused.into_iter().map(|(change, error)| Kept {
            about: change.about,
            name: change.name,
            error,
        }));
    }
    Ok(kept)
}

/// A change that was not made. What is not there has ended by itself in the meantime.
fn refusal((change, answer): (Change, io::Result<()>)) -> Option<(Change, io::Error)> {
    let error = answer.err()?;
    (error.raw_os_error() != Some(ENOENT)).then_some((change, error))
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(EBUSY)
}

/// The kernel's answer to each request.
fn request_all(changes: Vec<Change>) -> Result<Answered, NetlinkError> {
    let netfilter = Netfilter::open()?;
    let mut results = Vec::new();
    for part in changes.chunks(ENTRIES_AT_ONCE) {
        let mut batch = Vec::new();
        for change in part {
            let request = request(change.request, change.entry.clone());
            let family = Family::of(change.about);
            batch.extend(message(proto(family), NLM_F_ACK, 0, request));
        }
        netfilter.send(&batch)?;
        let asked = results.len() + part.len();
        while results.len() < asked {
            // In the order of the requests.
            results.extend(netfilter.receive(|answers| {
                let results = answers.iter().filter_map(Message::acknowledges);
                Ok(results.collect::<Vec<_>>())
            })?);
        }
    }
    Ok(changes.into_iter().zip(results).collect())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use netlink_packet_netfilter::conntrack::Protocol;
    use nix::libc::EPERM;

    use super::*;
    use crate::kernel::conntrack::connection::tests::{entry, told};

    fn forget(pod: &str) -> Change {
        let ends = [pod, "198.51.100.10:443"];
        let entry = entry(Protocol::Tcp, ends, [ends[1], ends[0]]);
        change(Choice::Forget, &told(entry).unwrap()).unwrap()
    }

    impl Kept {
        /// A busy connection.
        pub(crate) fn busy(about: IpAddr) -> Kept {
            Kept {
                about,
                name: forget("10.244.1.11:40000").name,
                error: io::Error::from_raw_os_error(EBUSY),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_kernel_refuses_costs_no_other_and_what_is_busy_is_tried_again() {
        let (done, ended) = ("10.244.1.11:1", "10.244.1.12:1");
        let (refused, busy, soon_free) = ("10.244.1.13:1", "10.244.1.14:1", "10.244.1.15:1");
        let asked: RefCell<Vec<Vec<String>>> = RefCell::default();
        let answer = async |changes: Vec<Change>| {
            let names: Vec<String> = changes.iter().map(|c| c.name.to_string()).collect();
            let tries = asked.borrow().len();
            let code = |name: &str| match name.split_once(" to ").unwrap().0 {
                name if name == done => None,
                name if name == ended => Some(ENOENT),
                name if name == refused => Some(EPERM),
                name if name == busy || tries == 0 => Some(EBUSY),
                _ => None,
            };
            let answers: Vec<_> = names.iter().map(|name| code(name)).collect();
            asked.borrow_mut().push(names);
            let answers = answers.into_iter().map(|code| match code {
                None => Ok(()),
                Some(code) => Err(io::Error::from_raw_os_error(code)),
            });
            Ok(changes.into_iter().zip(answers).collect())
        };
        let changes = [done, refused, busy, ended, soon_free].map(forget).into();
        let kept = insist(changes, answer).await.unwrap();
        let kept: Vec<_> = kept
            .iter()
            .map(|kept| (kept.about, kept.error.raw_os_error()))
            .collect();
        let ip = |text: &str| text.parse().unwrap();
        assert_eq!(
            kept,
            [
                (ip("10.244.1.13"), Some(EPERM)),
                (ip("10.244.1.14"), Some(EBUSY))
            ]
        );
        let name = |pod: &str| format!("{pod} to 198.51.100.10:443 (protocol 6)");
        let expected = [
            [done, refused, busy, ended, soon_free].map(name).to_vec(),
            [busy, soon_free].map(name).to_vec(),
            [busy].map(name).to_vec(),
        ];
        assert_eq!(*asked.borrow(), expected);
    }
}
