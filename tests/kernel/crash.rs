//! An agent may die at any moment, and the next one finds what it left: after every step of a change the state
//! of the kernel is one that a new agent reads as it is, and takes to its goal from there.

use std::collections::HashSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use metaleg::state::{ConnectionStep, Step};
use socket2::{Domain, Socket, Type};

use super::*;

/// Variants of `Step`.
const KINDS_OF_STEPS: usize = 34;
/// This node, in both families.
const NODE: [&str; 2] = ["192.0.2.11", "2001:db8:1::11"];
/// VIPs: the two of the example, and a new one.
const VIPS: [[&str; 3]; 2] = [
    ["192.0.2.200", "192.0.2.201", "192.0.2.210"],
    [
        "2001:db8:1::c8",
        "2001:db8:1:ffff:ffff:ffff:ffff:ffff",
        "2001:db8:1::d2",
    ],
];
const OUTSIDE: [&str; 2] = ["198.51.100.10", "2001:db8:2::10"];

fn place(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

fn node(family: Family) -> IpAddr {
    ip(NODE[place(family)])
}

fn vip(family: Family, number: usize) -> IpAddr {
    ip(VIPS[place(family)][number])
}

fn outside(family: Family) -> IpAddr {
    ip(OUTSIDE[place(family)])
}

fn pod(family: Family, last: u8) -> IpAddr {
    let net = ["10.244.1.", "fd00:10:244:1::"][place(family)];
    ip(&format!("{net}{last}"))
}

fn slot(number: u32) -> Mark {
    Mark {
        value: number << MASK.trailing_zeros(),
        mask: MASK,
    }
}

// === the states that agents go between ===

/// The example after a day in its life: VIPs moved to this node, away from it and between others, one VIP became
/// another, a pod went, new ones came, one got its way out, and the networks of the cluster changed.
fn changed() -> KernelState {
    let mut state = example();
    for (family, old_net, new_net, remote, via) in [
        (
            Family::V4,
            "192.0.2.11/32",
            "10.96.0.0/12",
            "10.244.3.0/24",
            ["192.0.2.13", "192.0.2.14"],
        ),
        (
            Family::V6,
            "fe80::/10",
            "fd00:10:96::/112",
            "fd00:10:244:3::/64",
            ["2001:db8:1::13", "2001:db8:1::14"],
        ),
    ] {
        let FamilyState { routes, firewall } = state.families.get_mut(&family).unwrap();
        let [old_net, new_net, remote] =
            [old_net, new_net, remote].map(|net| net.parse::<IpNet>().unwrap());
        let to = |net| Rule {
            to: Some(net),
            ..rule(1, RuleAction::Goto(1099))
        };
        routes.rules.remove(&to(old_net));
        routes.rules.insert(to(new_net));
        for (number, via) in (1..).zip(via) {
            let table = TableId(100_000 + number);
            routes.rules.insert(Rule {
                mark: Some(slot(number)),
                ..rule(2, RuleAction::Lookup(table))
            });
            let gateway = NextHop {
                via: ip(via),
                dev: "eth0".to_owned(),
            };
            let table_state = Table {
                fallback: true,
                gateway: Some(gateway),
            };
            routes.tables.insert(table, table_state);
        }
        firewall.excluded.remove(&old_net);
        firewall.excluded.insert(new_net);
        firewall.remote_pods = [remote].into();
        firewall.vips = [vip(family, 0), vip(family, 2)].into();
        let with_vip = |number| PodState {
            egress: true,
            vips: [vip(family, number)].into(),
            ..PodState::default()
        };
        let to_slot = |number, mark| PodState {
            mark: Some(slot(mark)),
            ..with_vip(number)
        };
        let here = |number| PodState {
            gateway_here: true,
            ..with_vip(number)
        };
        let blocked = PodState {
            blocked: true,
            vips: BTreeSet::new(),
            ..with_vip(0)
        };
        let pods = [
            (12, here(0)),
            (13, to_slot(2, 2)),
            (14, to_slot(0, 1)),
            (15, blocked),
            (16, here(2)),
        ];
        firewall.pods = pods.map(|(last, state)| (pod(family, last), state)).into();
    }
    state
}

/// The chains of a node that has nothing to do.
fn idle() -> KernelState {
    let mut state = nothing();
    for family in state.families.values_mut() {
        family.firewall.skeleton = Skeleton::Intact;
    }
    state
}

/// The example before any Service was labelled.
fn unlabelled() -> KernelState {
    let mut state = example();
    for family in state.families.values_mut() {
        family.firewall.pods.clear();
        family.firewall.vips.clear();
    }
    state
}

/// Changes there and back; every kind of step is in one of them.
fn changes() -> [(&'static str, KernelState, KernelState, Deaths); 3] {
    [
        ("nothing and example", nothing(), example(), Deaths::All),
        ("example and changed", example(), changed(), Deaths::All),
        ("changed and idle", changed(), idle(), Deaths::OneOfEachKind),
    ]
}

// === agents and their deaths ===

/// What an agent that has just been started finds. The mode of iptables has been said before.
async fn start(mode: Mode) -> (NodeKernel, KernelState) {
    let mut kernel = open_backend(mode.backend()).await;
    let found = kernel.observe().await.unwrap().state;
    // Else the new agent would trust connections that the old one did not come to forget.
    assert!(found.doubt);
    (kernel, found)
}

async fn apply(kernel: &mut NodeKernel, steps: &[Step]) {
    let failed = kernel.apply(steps).await;
    assert!(failed.is_empty(), "{failed:?}");
}

/// What a new agent must find after these steps of the old one.
fn after(mode: Mode, from: &KernelState, steps: &[Step]) -> KernelState {
    let mut state = from.clone();
    for step in steps {
        state.apply(step);
    }
    if mode == Mode::Own {
        // One table holds the chains of both families, its map one translation of a pod, and its sets of networks
        // have no borders within.
        let is_whole = |family: &FamilyState| family.firewall.skeleton == Skeleton::Intact;
        let whole = state.families.values().any(is_whole);
        for FamilyState { firewall, .. } in state.families.values_mut() {
            if whole {
                firewall.skeleton = Skeleton::Intact;
            }
            for nets in [
                &mut firewall.excluded,
                &mut firewall.remote_pods,
                &mut firewall.local_pods,
            ] {
                let all: Vec<IpNet> = std::mem::take(nets).into_iter().collect();
                nets.extend(IpNet::aggregate(&all));
            }
            for pod in firewall.pods.values_mut() {
                pod.vips = pod.vips.pop_last().into_iter().collect();
            }
        }
    }
    state.doubt = true;
    state
}

/// Tells a difference as the steps that would make it.
fn assert_same(found: &KernelState, expected: &KernelState, said: &str) {
    let steps: Vec<String> = diff(expected, found).iter().map(Step::to_string).collect();
    assert!(
        found == expected,
        "{said}, instead of what is expected: {steps:#?}"
    );
}

/// How many deaths a change is worth.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Deaths {
    /// One after every step.
    All,
    /// One after the first step of each kind: a look at the kernel takes a dozen processes with iptables.
    OneOfEachKind,
}

/// What kind of step it is: its variant, and the set that it changes.
fn kind(step: &Step) -> String {
    let text = format!("{step:?}");
    let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
    let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    let has_set = matches!(
        words.get(1),
        Some(&("AddPod" | "RemovePod" | "AddNet" | "RemoveNet"))
    );
    words[..words.len().min(if has_set { 3 } else { 2 })].join(" ")
}

/// The numbers of steps after which an agent dies.
fn lengths(deaths: Deaths, steps: &[Step]) -> Vec<usize> {
    let mut seen = HashSet::new();
    (0..=steps.len())
        .filter(|length| {
            let last = length.checked_sub(1).map(|at| kind(&steps[at]));
            seen.insert(last) || deaths == Deaths::All || *length == steps.len()
        })
        .collect()
}

/// An agent dies after these steps on its way, the next one, now and then, after some of its own, and the last
/// one arrives.
async fn die_and_arrive(
    mode: Mode,
    mut kernel: NodeKernel,
    (from, to): (&KernelState, &KernelState),
    steps: &[Step],
) -> NodeKernel {
    apply(&mut kernel, steps).await;
    drop(kernel);
    let mut said = format!("dead after {:?}", steps.last());
    let (mut next, mut found) = start(mode).await;
    assert_same(&found, &after(mode, from, steps), &said);
    if steps.len().is_multiple_of(4) {
        let rest = diff(&found, to);
        let (done, _) = rest.split_at(steps.len() * 7 % (rest.len() + 1));
        apply(&mut next, done).await;
        drop(next);
        let expected = after(mode, &found, done);
        said = format!("{said} and {:?}", done.last());
        (next, found) = start(mode).await;
        assert_same(&found, &expected, &said);
    }
    apply(&mut next, &diff(&found, to)).await;
    assert_same(&observe(&mut next).await, to, &said);
    next
}

fn a_death_after_any_step_is_survived(mode: Mode) {
    in_namespace(move || async move {
        let mut kinds = HashSet::new();
        let mut kernel = open(mode).await;
        for (what, one, other, deaths) in changes() {
            let started = Instant::now();
            reach(&mut kernel, &one).await;
            let there = match mode {
                Mode::Own => deaths,
                Mode::Nft | Mode::Legacy => Deaths::OneOfEachKind,
            };
            let ways = [(&one, &other, there), (&other, &one, Deaths::OneOfEachKind)].map(
                |(from, to, deaths)| {
                    let steps = diff(from, to);
                    (from, to, lengths(deaths, &steps), steps)
                },
            );
            let turns = ways.iter().map(|(_, _, lengths, _)| lengths.len());
            for turn in 0..turns.clone().max().unwrap() {
                for (from, to, lengths, steps) in &ways {
                    match lengths.get(turn) {
                        Some(length) => {
                            let done = &steps[..*length];
                            kinds.extend(done.last().map(kind));
                            kernel = die_and_arrive(mode, kernel, (from, to), done).await;
                        }
                        None => reach(&mut kernel, to).await,
                    }
                }
            }
            println!(
                "{what}: {} deaths in {:?}",
                turns.sum::<usize>(),
                started.elapsed()
            );
        }
        // All but those that only one with another backend, or a gateway that was none for a while has to do.
        assert_eq!(kinds.len(), KINDS_OF_STEPS - 2);
    });
}

#[test]
fn own_a_death_after_any_step_is_survived() {
    a_death_after_any_step_is_survived(Mode::Own);
}

#[test]
fn nft_a_death_after_any_step_is_survived() {
    a_death_after_any_step_is_survived(Mode::Nft);
}

#[test]
fn legacy_a_death_after_any_step_is_survived() {
    a_death_after_any_step_is_survived(Mode::Legacy);
}

// === connections that a dead agent did not come to forget ===

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

fn no_connection_keeps_a_wrong_source_after_a_death(mode: Mode) {
    in_namespace(move || async move {
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
    });
}

#[test]
fn own_no_connection_keeps_a_wrong_source_after_a_death() {
    no_connection_keeps_a_wrong_source_after_a_death(Mode::Own);
}

#[test]
fn nft_no_connection_keeps_a_wrong_source_after_a_death() {
    no_connection_keeps_a_wrong_source_after_a_death(Mode::Nft);
}

#[test]
fn legacy_no_connection_keeps_a_wrong_source_after_a_death() {
    no_connection_keeps_a_wrong_source_after_a_death(Mode::Legacy);
}

/// The last thing that an agent did was to change how pods are translated. Nothing but the connections tells the
/// next one so: all sets and maps are as they should be.
#[test]
fn only_connections_with_a_wrong_source_are_forgotten_after_a_death() {
    for mode in [Mode::Own, Mode::Nft, Mode::Legacy] {
        in_namespace(move || async move {
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
        });
    }
}

// === what a server outside sees of it ===

/// Hosts beside this node, each a namespace: a server outside, the node that announces the first VIP, and the pods
/// of this node. The other VIP is announced by this node.
fn connect_hosts(mode: Mode) {
    sh("for host in lan outside gateway pods; do ip netns add $host; ip -n $host link set lo up; done
        ip link set wire netns lan; ip -n lan link add bridge type bridge; ip -n lan link set bridge up
        ip -n lan link set wire master bridge up
        for host in outside gateway; do
            ip link add eth0 netns $host type veth peer name $host netns lan
            ip -n lan link set $host master bridge up; ip -n $host link set eth0 up
        done
        ip -n outside addr add 192.0.2.254/24 dev eth0; ip -n outside addr add 2001:db8:1::fe/64 dev eth0 nodad
        ip -n outside addr add 198.51.100.10/32 dev lo; ip -n outside addr add 2001:db8:2::10/128 dev lo
        for address in 192.0.2.12/24 192.0.2.200/32 2001:db8:1::12/64 2001:db8:1::c8/128; do
            ip -n gateway addr add $address dev eth0 nodad preferred_lft 0
        done
        ip -n gateway route add 10.244.1.0/24 via 192.0.2.11
        ip -n gateway route add fd00:10:244:1::/64 via 2001:db8:1::11
        for address in 192.0.2.201/32 2001:db8:1:ffff:ffff:ffff:ffff:ffff/128; do
            ip addr add $address dev eth0 nodad preferred_lft 0
        done
        ip -n outside route add 2001:db8:1:ffff:ffff:ffff:ffff:ffff via 2001:db8:1::11
        for host in '' '-n gateway'; do
            ip $host route add default via 192.0.2.254; ip $host route add default via 2001:db8:1::fe
        done
        ip link add pods type veth peer name eth0 netns pods
        ip link set pods up; ip -n pods link set eth0 up
        ip addr add 10.244.1.1/24 dev pods; ip addr add fd00:10:244:1::1/64 dev pods nodad
        for last in 12 13; do
            ip -n pods addr add 10.244.1.$last/24 dev eth0
            ip -n pods addr add fd00:10:244:1::$last/64 dev eth0 nodad
        done
        ip -n pods route add default via 10.244.1.1; ip -n pods route add default via fd00:10:244:1::1
        forward='echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding'
        sh -c \"$forward\"; ip netns exec gateway sh -c \"$forward\"
        ip netns exec outside nft 'table inet seen {
            set sources4 { type ipv4_addr; size 64; flags dynamic; }
            set sources6 { type ipv6_addr; size 64; flags dynamic; }
            chain arrivals {
                type filter hook prerouting priority -300
                meta l4proto { tcp, udp } ip daddr 198.51.100.10 add @sources4 { ip saddr }
                meta l4proto { tcp, udp } ip6 daddr 2001:db8:2::10 add @sources6 { ip6 saddr }
            }
        }'");
    for (tool, pods) in mode
        .tools()
        .iter()
        .zip(["10.244.0.0/16", "fd00:10:244::/48"])
    {
        // As CNI plugins do.
        sh(&format!(
            "{tool} -t nat -A POSTROUTING -s {pods} ! -d {pods} -j MASQUERADE"
        ));
    }
}

/// Does something on another host. What it opens there stays there.
fn on<T: Send>(host: &str, work: impl FnOnce() -> T + Send) -> T {
    let namespace = std::fs::File::open(format!("/run/netns/{host}")).unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            nix::sched::setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

/// The agent of the gateway has done its work.
fn prepare_gateway() {
    on("gateway", || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(async {
            let mut state = unlabelled();
            for (family, FamilyState { routes, firewall }) in &mut state.families {
                *routes = RouteState::default();
                let net = match family {
                    Family::V4 => "10.244.1.0/24",
                    Family::V6 => "fd00:10:244:1::/64",
                };
                firewall.remote_pods = [net.parse().unwrap()].into();
                firewall.vips = [vip(*family, 0)].into();
                let here = PodState {
                    egress: true,
                    vips: firewall.vips.clone(),
                    gateway_here: true,
                    ..PodState::default()
                };
                firewall.pods = [(pod(*family, 12), here)].into();
            }
            reach(&mut open(Mode::Own).await, &state).await;
        });
    });
}

/// What the server outside has seen since the last look. What comes in the moment of a look is lost.
fn seen() -> BTreeSet<IpAddr> {
    let all = seen_so_far();
    sh("ip netns exec outside nft 'flush set inet seen sources4; flush set inet seen sources6'");
    all
}

/// The same, without a new beginning.
fn seen_so_far() -> BTreeSet<IpAddr> {
    let listed = sh("ip netns exec outside nft list table inet seen");
    let is_apart = |c: char| !(c.is_ascii_hexdigit() || ".:".contains(c));
    let elements = listed
        .lines()
        .filter_map(|line| Some(line.split_once("elements")?.1));
    let words = elements.flat_map(|line| line.split(is_apart));
    words.filter_map(|word| word.parse().ok()).collect()
}

/// Connections of one pod to the server, in both families.
struct Open {
    udp: Vec<UdpSocket>,
    tcp: Vec<TcpStream>,
}

impl Open {
    fn by(last: u8) -> Open {
        let addresses = || Family::ALL.map(|family| (pod(family, last), outside(family)));
        on("pods", || Open {
            udp: addresses().map(|(pod, to)| datagrams(pod, to)).into(),
            tcp: addresses().map(|(pod, to)| stream(pod, to)).into(),
        })
    }

    /// Waits until the server's word has come on all of TCP.
    fn hear(&self, expected: &[u8; 4]) {
        for mut stream in &self.tcp {
            stream.set_nonblocking(false).unwrap();
            stream
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            let mut word = [0; 4];
            stream.read_exact(&mut word).unwrap();
            assert_eq!(&word, expected);
        }
    }

    /// Sends on all of them, and as somebody new.
    fn send(&self, last: u8) {
        let sockets = on("pods", || {
            Family::ALL.map(|f| datagrams(pod(f, last), outside(f)))
        });
        for socket in self.udp.iter().chain(&sockets) {
            // It may hear that there is no way.
            let _ = socket.send(b"x");
        }
        for mut stream in &self.tcp {
            let _ = stream.write(b"x");
        }
    }

    /// Sends until the server has seen all of these sources, and returns all that it has seen by then: the first
    /// packets wait for the answers of neighbours.
    fn arrive(&self, last: u8, sources: &BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
        let deadline = Instant::now() + Duration::from_secs(3);
        let mut all = BTreeSet::new();
        while !all.is_superset(sources) && Instant::now() < deadline {
            self.send(last);
            all.extend(seen());
        }
        all
    }
}

fn datagrams(from: IpAddr, to: IpAddr) -> UdpSocket {
    let socket = UdpSocket::bind((from, 0)).unwrap();
    socket.connect((to, 7)).unwrap();
    socket
}

fn stream(from: IpAddr, to: IpAddr) -> TcpStream {
    let domain = match Family::of(from) {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    let socket = Socket::new(domain, Type::STREAM, None).unwrap();
    // Ends at once, and does not disturb the next connections.
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
    let server = SocketAddr::new(to, 7).into();
    socket
        .connect_timeout(&server, Duration::from_secs(5))
        .unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.into()
}

/// One pod of this node is labelled: the route to its gateway comes with it.
fn labelled(last: u8) -> KernelState {
    let mut state = example();
    for FamilyState { routes, firewall } in state.families.values_mut() {
        firewall
            .pods
            .retain(|pod, _| pod.to_string().ends_with(&last.to_string()));
        let vips = firewall.pods.values().flat_map(|pod| &pod.vips);
        firewall.vips = vips.copied().collect();
        if firewall.pods.values().all(|pod| pod.mark.is_none()) {
            let is_lookup = |rule: &Rule| matches!(rule.action, RuleAction::Lookup(_));
            routes.rules.retain(|rule| !is_lookup(rule));
            routes.tables.clear();
        }
    }
    state
}

fn ordinary() -> KernelState {
    let mut state = labelled(13);
    for FamilyState { firewall, .. } in state.families.values_mut() {
        firewall.pods.clear();
        firewall.vips.clear();
    }
    state
}

fn no_packet_leaves_with_another_source(mode: Mode) {
    in_namespace(move || async move {
        connect_hosts(mode);
        prepare_gateway();
        let _servers = on("outside", || {
            OUTSIDE.map(|address| TcpListener::bind((ip(address), 7)).unwrap())
        });
        let mut kernel = open(mode).await;
        let mut deaths = 0;
        for (last, number) in [(12, 0), (13, 1)] {
            let of_node: BTreeSet<IpAddr> = Family::ALL.map(node).into();
            let of_service: BTreeSet<IpAddr> = Family::ALL.map(|f| vip(f, number)).into();
            let unlabelled = (ordinary(), of_node);
            let labelled = (labelled(last), of_service);
            for ((from, source_before), (to, source_after)) in
                [(&unlabelled, &labelled), (&labelled, &unlabelled)]
            {
                let steps = diff(from, to);
                for length in 0..=steps.len() {
                    let done = &steps[..length];
                    let said = format!("dead after {:?}", done.last());
                    reach(&mut kernel, from).await;
                    sh("conntrack -F 2>/dev/null; ip netns exec gateway conntrack -F 2>/dev/null");
                    seen();
                    let connections = Open::by(last);
                    assert_eq!(
                        &connections.arrive(last, source_before),
                        source_before,
                        "{said}"
                    );

                    apply(&mut kernel, done).await;
                    connections.send(last);
                    for source in seen() {
                        let is_right =
                            source_before.contains(&source) || source_after.contains(&source);
                        assert!(is_right, "{source}, {said}");
                    }
                    let (mut next, found) = start(mode).await;
                    connections.send(last);
                    apply(&mut next, &diff(&found, to)).await;
                    kernel = next;
                    for source in seen() {
                        let is_right =
                            source_before.contains(&source) || source_after.contains(&source);
                        assert!(is_right, "{source}, while the next one starts, {said}");
                    }
                    assert_eq!(
                        &connections.arrive(last, source_after),
                        source_after,
                        "{said}"
                    );
                    deaths += 1;
                }
            }
        }
        println!("{deaths} deaths");
    });
}

#[test]
fn own_no_packet_leaves_with_another_source() {
    no_packet_leaves_with_another_source(Mode::Own);
}

#[test]
fn nft_no_packet_leaves_with_another_source() {
    no_packet_leaves_with_another_source(Mode::Nft);
}

#[test]
fn legacy_no_packet_leaves_with_another_source() {
    no_packet_leaves_with_another_source(Mode::Legacy);
}

/// The gateway still knows a connection that this node does not: what the server says in the middle of it must begin
/// none from outside, whose answers would leave as they are.
fn the_middle_of_a_connection_begins_none(mode: Mode) {
    in_namespace(move || async move {
        connect_hosts(mode);
        prepare_gateway();
        let servers = on("outside", || {
            OUTSIDE.map(|address| TcpListener::bind((ip(address), 7)).unwrap())
        });
        let mut kernel = open(mode).await;
        reach(&mut kernel, &labelled(12)).await;
        let vips: BTreeSet<IpAddr> = Family::ALL.map(|f| vip(f, 0)).into();
        let connections = Open::by(12);
        assert_eq!(connections.arrive(12, &vips), vips);
        let accepted = servers.map(|server| server.accept().unwrap().0);
        sh("conntrack -F 2>/dev/null");
        seen();

        for mut stream in &accepted {
            stream.write_all(b"late").unwrap();
        }
        // The server tries again.
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(seen(), BTreeSet::new(), "the pod has answered");

        // The pod's own next word takes them up.
        assert_eq!(connections.arrive(12, &vips), vips);
        connections.hear(b"late");
    });
}

#[test]
fn own_the_middle_of_a_connection_begins_none() {
    the_middle_of_a_connection_begins_none(Mode::Own);
}

#[test]
fn nft_the_middle_of_a_connection_begins_none() {
    the_middle_of_a_connection_begins_none(Mode::Nft);
}

#[test]
fn legacy_the_middle_of_a_connection_begins_none() {
    the_middle_of_a_connection_begins_none(Mode::Legacy);
}

/// The pods of this node are on a bridge, as most CNI plugins have them.
fn put_pods_on_a_bridge() {
    sh("ip link set pods down; ip link set pods name pod; ip link add pods type bridge; ip link set pod master pods
        ip addr flush dev pod; ip link set pod up; ip link set pods up
        ip addr add 10.244.1.1/24 dev pods; ip addr add fd00:10:244:1::1/64 dev pods nodad
        sysctl -qw net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1 2>/dev/null || true");
}

/// A gateway that is new knows nothing of connections on which only the server has something to say.
fn a_pod_that_says_nothing_is_woken(connect_pods: fn()) {
    in_namespace(move || async move {
        connect_hosts(Mode::Own);
        connect_pods();
        prepare_gateway();
        let servers = on("outside", || {
            OUTSIDE.map(|address| TcpListener::bind((ip(address), 7)).unwrap())
        });
        // By an agent that does nothing any more afterwards.
        let labelling = std::thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(async {
                reach(&mut open(Mode::Own).await, &labelled(12)).await;
            });
        });
        labelling.join().unwrap();
        let mut kernel = open(Mode::Own).await;
        let vips: BTreeSet<IpAddr> = Family::ALL.map(|f| vip(f, 0)).into();
        let mut connections = Open::by(12);
        assert_eq!(connections.arrive(12, &vips), vips);
        let accepted = servers.map(|server| server.accept().unwrap().0);
        connections.udp.clear();
        // Until everything that was sent is acknowledged.
        loop {
            seen();
            std::thread::sleep(Duration::from_millis(500));
            if seen().is_empty() {
                break;
            }
        }
        sh("ip netns exec gateway conntrack -F 2>/dev/null");
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(
            seen(),
            BTreeSet::new(),
            "the pod has something to say by itself"
        );

        let wakes =
            Family::ALL.map(|family| Step::Connection(ConnectionStep::ElicitAck(pod(family, 12))));
        apply(&mut kernel, &wakes).await;
        let deadline = Instant::now() + Duration::from_secs(3);
        while seen_so_far() != vips && Instant::now() < deadline {}
        assert_eq!(seen_so_far(), vips);
        // So the new gateway knows the way back.
        for mut stream in &accepted {
            stream.write_all(b"late").unwrap();
        }
        connections.hear(b"late");
        // What the pod said was no answer: nothing began at the server.
        for (name, family) in [("ipv4", Family::V4), ("ipv6", Family::V6)] {
            let all = sh(&format!("conntrack -L -f {name} -p tcp 2>/dev/null"));
            let opened_by = all
                .split_whitespace()
                .find_map(|word| word.strip_prefix("src="));
            let pod = pod(family, 12).to_string();
            assert_eq!((all.lines().count(), opened_by), (1, Some(&*pod)), "{all}");
        }
    });
}

#[test]
fn a_pod_on_a_link_that_says_nothing_is_woken() {
    a_pod_that_says_nothing_is_woken(|| {});
}

#[test]
fn a_pod_on_a_bridge_that_says_nothing_is_woken() {
    a_pod_that_says_nothing_is_woken(put_pods_on_a_bridge);
}
