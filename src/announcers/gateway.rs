//! Through which node pods leave: the announcer of their VIP, once it is programmed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::cluster::Node;
use crate::cluster::leases::BootId;
use crate::names::NodeName;

#[derive(Clone, Debug, Default)]
pub(super) struct Gateway {
    /// The last announcer that was programmed, and in which boot.
    last: Option<(NodeName, Option<BootId>)>,
    /// Since when the announcer is one that is not programmed.
    waiting: Option<Instant>,
}

impl Gateway {
    pub(super) fn adopt(&mut self, node: NodeName) {
        self.last.get_or_insert((node, None));
    }

    /// The node to leave through, and when that changes by itself.
    ///
    /// What is routed to a node that is not programmed would leave with that node's address. So while the announcer is
    /// not, pods keep the gateway before it, which still translates: their connections are only silent. After the grace
    /// period it is the announcer all the same, and the plan blocks: pods learn that there is no way.
    pub(super) fn hold(
        &mut self,
        announcer: &NodeName,
        own: &NodeName,
        nodes: &BTreeMap<NodeName, Node>,
        now: Instant,
        grace: Duration,
    ) -> (NodeName, Option<Instant>) {
        let is_programmed =
            |node: &NodeName| node == own || nodes.get(node).is_some_and(Node::is_programmed);
        let boot = |node: &NodeName| nodes.get(node)?.boot.clone();
        if is_programmed(announcer) {
            self.waiting = None;
            self.last = Some((announcer.clone(), boot(announcer)));
            return (announcer.clone(), None);
        }
        let end = *self.waiting.get_or_insert(now) + grace;
        match self.last.as_ref().filter(|_| now < end) {
            Some((last, _)) if last != announcer && is_programmed(last) => {
                (last.clone(), Some(end))
            }
            // Its Lease was deleted by mistake, or with a Node that is created anew: its agent writes it again.
            Some((last, Some(known)))
                if last == announcer && boot(last).as_ref() == Some(known) =>
            {
                (last.clone(), Some(end))
            }
            _ => (announcer.clone(), None),
        }
    }
}
