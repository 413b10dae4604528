//! Connections that a dead agent did not come to forget.

use super::*;

/// A connection that connection tracking knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Connection {
    opened_by: IpAddr,
    to: IpAddr,
    /// Where the replies come from: not `to` after DNAT.
    other_end: IpAddr,
    /// The source that it leaves with.
    bound: IpAddr,
    tcp: bool,
}

impl Connection {
    fn outgoing(pod: IpAddr, bound: IpAddr) -> Connection {
        let to = outside(Family::of(pod));
        Connection {
            opened_by: pod,
            to,
            other_end: to,
            bound,
            tcp: false,
        }
    }

    /// The arguments of `conntrack -I`; the port tells the connection from others.
    fn insertion(&self, port: usize) -> String {
        let Connection {
            opened_by,
            to,
            other_end,
            bound,
            tcp,
        } = self;
        let protocol = if *tcp {
            "tcp --state ESTABLISHED"
        } else {
            "udp"
        };
        format!(
            "-I -s {opened_by} -d {to} -r {other_end} -q {bound} -t 600 -p {protocol} \
             --sport {port} --dport 53 --reply-port-src 53 --reply-port-dst {port}\n"
        )
    }
}

/// Each as UDP and as TCP.
fn both_protocols(connections: impl IntoIterator<Item = Connection>) -> Vec<Connection> {
    let both = |c: Connection| [c, Connection { tcp: true, ..c }];
    connections.into_iter().flat_map(both).collect()
}

/// Makes connection tracking know these and no others.
fn remember(connections: &[Connection]) {
    let insertions = (1000..).zip(connections).map(|(port, c)| c.insertion(port));
    let insertions: String = insertions.collect();
    sh(&format!(
        "conntrack -F 2>/dev/null; cat >/run/connections <<END\n{insertions}END\nconntrack -R /run/connections 2>/dev/null"
    ));
    assert_eq!(remembered(connections), connections);
}

/// Those of the connections that are still known.
fn remembered(connections: &[Connection]) -> Vec<Connection> {
    let listed = sh("conntrack -L -f ipv4 2>/dev/null; conntrack -L -f ipv6 2>/dev/null");
    let known = |(port, _): &(i32, &Connection)| listed.contains(&format!(" sport={port} "));
    let known = (1000..).zip(connections).filter(known);
    known.map(|(_, connection)| *connection).collect()
}

/// What nobody may forget: inbound connections, those within the cluster, and those of pods that are none of
/// ours.
fn protected(family: Family) -> Vec<Connection> {
    let (egress, ordinary, outside) = (pod(family, 12), pod(family, 99), outside(family));
    let (cluster_ip, backend) = match family {
        Family::V4 => (ip("10.96.0.10"), ip("10.244.2.11")),
        Family::V6 => (ip("fd00:10:96::a"), ip("fd00:10:244:2::11")),
    };
    let connection = |opened_by, to, other_end, bound| Connection {
        opened_by,
        to,
        other_end,
        bound,
        tcp: false,
    };
    let mut protected = vec![
        Connection::outgoing(ordinary, node(family)),
        Connection::outgoing(ordinary, ordinary),
        Connection::outgoing(node(family), node(family)),
    ];
    for pod in [12, 13, 14].map(|last| pod(family, last)) {
        protected.extend([
            connection(outside, vip(family, 0), pod, outside),
            connection(outside, pod, pod, outside),
            connection(outside, node(family), pod, node(family)),
            connection(pod, cluster_ip, backend, pod),
            connection(pod, backend, backend, pod),
            connection(pod, backend, backend, node(family)),
        ]);
    }
    protected.push(connection(ordinary, cluster_ip, egress, ordinary));
    both_protocols(protected)
}

/// Whatever a pod's connection to outside may have for a source: the node's address, the pod's own, and every VIP.
fn outgoing(family: Family) -> Vec<Connection> {
    let mut connections = Vec::new();
    for pod in (11..=16).map(|last| pod(family, last)) {
        let vips = (0..3).map(|number| vip(family, number));
        let sources = [node(family), pod].into_iter().chain(vips);
        connections.extend(sources.map(|source| Connection::outgoing(pod, source)));
    }
    both_protocols(connections)
}

/// Whether a connection may be there when this state was reached from that one.
fn may_stay(connection: &Connection, from: &KernelState, to: &KernelState) -> bool {
    let family = Family::of(connection.opened_by);
    let of = |state: &KernelState| -> PodState {
        let pods = &state.families[&family].firewall.pods;
        pods.get(&connection.opened_by).cloned().unwrap_or_default()
    };
    let (before, now) = (of(from), of(to));
    if now.mark.is_some() {
        connection.bound == connection.opened_by
    } else if now.gateway_here {
        now.vips.contains(&connection.bound)
    } else if !now.egress {
        // Otherwise it would go on with the pod's own address, or with a VIP that is none of its own any more.
        let was_here = before.mark.is_some() || before.gateway_here || before.blocked;
        !was_here || connection.bound == node(family)
    } else {
        // Elsewhere, or rejected.
        true
    }
}

async fn no_connection_keeps_a_wrong_source_after_a_death(mode: Mode) {
    let mut kernel = open(mode).await;
    let protected = Family::ALL.map(protected).concat();
    let outgoing = Family::ALL.map(outgoing).concat();
    let all = [protected.clone(), outgoing].concat();
    let mut deaths = 0;
    let mut wrong = BTreeSet::new();
    for (from, to) in [
        (unlabelled(), example()),
        (example(), changed()),
        (example(), unlabelled()),
    ] {
        let steps = diff(&from, &to);
        // Before the firewall nothing changes that matters to connections.
        let is_firewall = |step: &Step| matches!(step, Step::Firewall(_));
        let first = steps.iter().position(is_firewall).unwrap();
        let lengths = lengths(Deaths::OneOfEachKind, &steps);
        for length in lengths.into_iter().filter(|length| *length >= first) {
            reach(&mut kernel, &from).await;
            remember(&all);
            let done = &steps[..length];
            apply(&mut kernel, done).await;
            let (mut next, found) = start(mode).await;
            apply(&mut next, &diff(&found, &to)).await;
            kernel = next;
            deaths += 1;
            let left = remembered(&all);
            let said = |what: &str, connection: &Connection| {
                format!("dead after {:?}, {what}: {connection:?}", done.last())
            };
            for connection in &protected {
                assert!(left.contains(connection), "{}", said("lost", connection));
            }
            let strays = left.iter().filter(|c| !protected.contains(c));
            let strays = strays.filter(|c| !may_stay(c, &from, &to));
            wrong.extend(strays.map(|connection| said("kept", connection)));
        }
    }
    println!("{deaths} deaths");
    let some: Vec<&String> = wrong.iter().take(8).collect();
    assert!(wrong.is_empty(), "{} such as {some:#?}", wrong.len());
}

each_mode!(no_connection_keeps_a_wrong_source_after_a_death);

/// The last thing that an agent did was to change how pods are translated. Nothing but the connections tells the
/// next one so: all sets and maps are as they should be.
async fn only_connections_with_a_wrong_source_are_forgotten_after_a_death(mode: Mode) {
    let mut kernel = open(mode).await;
    let (mut from, to) = (example(), example());
    for (family, state) in &mut from.families {
        let pods = &mut state.firewall.pods;
        // It is to be labelled, and the VIP of this one to become another.
        pods.remove(&pod(*family, 12));
        pods.get_mut(&pod(*family, 13)).unwrap().vips = [vip(*family, 0)].into();
    }
    reach(&mut kernel, &from).await;
    let outgoing = Family::ALL.map(outgoing).concat();
    let all = [Family::ALL.map(protected).concat(), outgoing].concat();
    remember(&all);
    let steps = diff(&from, &to);
    let forgets = |step: &Step| matches!(step, Step::Connection(_));
    let done = &steps[..steps.iter().position(forgets).unwrap()];
    apply(&mut kernel, done).await;
    drop(kernel);

    let (mut next, found) = start(mode).await;
    let steps = diff(&found, &to);
    assert!(
        matches!(
            steps[..],
            [Step::Connection(ConnectionStep::ForgetWrongSource { .. })]
        ),
        "{steps:?}"
    );
    apply(&mut next, &steps).await;
    let is_right = |connection: &Connection| {
        let Connection {
            opened_by, bound, ..
        } = *connection;
        let family = Family::of(opened_by);
        let is_outgoing = connection.other_end == outside(family);
        if !is_outgoing {
            true
        } else if opened_by == pod(family, 12) {
            bound == opened_by
        } else if opened_by == pod(family, 13) {
            bound == vip(family, 1)
        } else {
            true
        }
    };
    let right: Vec<Connection> = all.iter().copied().filter(is_right).collect();
    assert_eq!(remembered(&all), right);
}

each_mode!(only_connections_with_a_wrong_source_are_forgotten_after_a_death);
