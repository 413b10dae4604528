//! What is rejected and dropped: packets of pods that have no way out, and what comes to a node that is not the
//! gateway, or does not know yet that it is.

use std::io::{ErrorKind, Write as _};
use std::net::SocketAddr;

use socket2::{Domain, Protocol, Socket, Type};

use super::*;
use crate::hosts::{connect_hosts, prepare_gateway, route_first_vip_to};
use crate::server::{Carried, Seen, Server, all_from};
use crate::states::{labelled, ordinary, slot};
use crate::talk::{Talk, echo_request, stream};

/// What a socket hears of an error that says "administratively prohibited".
const PROHIBITED: [i32; 2] = [nix::libc::EHOSTUNREACH, nix::libc::EACCES];

fn first_vips() -> BTreeSet<IpAddr> {
    Family::ALL.map(|family| vip(family, 0)).into()
}

fn tcp_from_first_vips() -> Seen {
    let vips = first_vips().into_iter();
    vips.map(|vip| (Carried::Tcp, vip)).collect()
}

/// The pod has lost its way out.
fn blocked(last: u8) -> KernelState {
    let mut state = labelled(last);
    for pod in state
        .families
        .values_mut()
        .flat_map(|family| family.firewall.pods.values_mut())
    {
        (pod.mark, pod.blocked) = (None, true);
        pod.vips.clear();
    }
    state
}

fn has_met(mode: Mode, rule: &str) -> bool {
    mode.met(rule).iter().all(|packets| *packets > 0)
}

async fn a_blocked_pod_is_told_so_and_nothing_leaves(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    let mut server = Server::start();
    reach_and_die(mode, &labelled(12));
    let talk = Talk::connected(12);
    let before = all_from(&first_vips());
    assert_eq!(talk.arrive(&mut server, &before), before);
    talk.wait_for_acknowledgements();
    // Also where the middle of a connection that is not known is INVALID.
    sh("sysctl -qw net.netfilter.nf_conntrack_tcp_loose=0");
    reach(&mut open(mode).await, &blocked(12)).await;
    server.seen();

    // What goes on ends at once, instead of hanging.
    for mut stream in &talk.tcp {
        let mut written = Ok(0);
        eventually("an end", || {
            written = stream.write(b"x");
            written.is_err()
        });
        assert_eq!(written.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    let new = Talk::of(12);
    for (place, family) in Family::ALL.into_iter().enumerate() {
        let refused = on("pods", || stream(pod(family, 12)).unwrap_err());
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{family}");
        for talk in [&talk, &new] {
            let (udp, icmp) = (&talk.udp[place], &talk.icmp[place]);
            let (mut of_udp, mut of_icmp) = (None, None);
            // What it heard before does not count.
            let _ = (udp.take_error(), icmp.take_error());
            udp.send(b"x").unwrap();
            icmp.send(&echo_request(icmp)).unwrap();
            eventually("errors", || {
                of_udp = of_udp.take().or(udp.take_error().unwrap());
                of_icmp = of_icmp.take().or(icmp.take_error().unwrap());
                of_udp.is_some() && of_icmp.is_some()
            });
            let heard = [of_udp, of_icmp].map(|error| error.unwrap().raw_os_error());
            assert_eq!(heard, [Some(PROHIBITED[place]); 2], "{family}");
        }
    }
    server.sees_nothing();
}

each_mode!(a_blocked_pod_is_told_so_and_nothing_leaves);

async fn what_others_accept_of_a_blocked_pod_does_not_leave(mode: Mode) {
    connect_hosts(mode);
    let mut server = Server::start();
    let mut kernel = open(mode).await;
    reach(&mut kernel, &blocked(12)).await;
    for tool in mode.tools() {
        sh(&format!("{tool} -I FORWARD 1 -j ACCEPT"));
    }
    let last_rule = match mode {
        Mode::Nftables => "reject",
        Mode::IptablesNft | Mode::IptablesLegacy => "leak",
    };
    let talk = Talk::of(12);
    eventually("packets", || {
        talk.send();
        has_met(mode, last_rule)
    });
    server.sees_nothing();
}

each_mode!(what_others_accept_of_a_blocked_pod_does_not_leave);

/// A gateway that lets its pod go: no VIP any more, and still an egress pod.
async fn a_pod_without_a_vip_falls_to_no_masquerade(mode: Mode) {
    connect_hosts(mode);
    let mut server = Server::start();
    let mut kernel = open(mode).await;
    let mut state = labelled(13);
    reach(&mut kernel, &state).await;
    let vips = all_from(&Family::ALL.map(|family| vip(family, 1)).into());
    assert_eq!(Talk::of(13).arrive(&mut server, &vips), vips);
    let pods = |family: &mut FamilyState| {
        family
            .firewall
            .pods
            .values_mut()
            .for_each(|pod| pod.vips.clear())
    };
    state.families.values_mut().for_each(pods);
    reach(&mut kernel, &state).await;
    server.seen();
    let talk = Talk::of(13);
    eventually("packets", || {
        talk.send();
        has_met(mode, "none")
    });
    server.sees_nothing();
}

each_mode!(a_pod_without_a_vip_falls_to_no_masquerade);

/// Where pods wait until they are classified.
async fn a_pod_that_is_not_classified_yet_waits(mode: Mode) {
    connect_hosts(mode);
    let mut server = Server::start();
    let mut state = ordinary();
    for (family, FamilyState { firewall, .. }) in &mut state.families {
        let pods = match family {
            Family::V4 => "10.244.1.0/24",
            Family::V6 => "fd00:10:244:1::/64",
        };
        firewall.local_pods = [pods.parse().unwrap()].into();
        let known = PodState {
            ordinary: true,
            ..PodState::default()
        };
        firewall.pods = [(pod(*family, 12), known)].into();
    }
    let mut kernel = open(mode).await;
    reach(&mut kernel, &state).await;
    let talk = Talk::of(13);
    talk.send();
    eventually("packets", || has_met(mode, "unclassified"));
    server.sees_nothing();
    let of_node = all_from(&Family::ALL.map(node).into());
    assert_eq!(Talk::of(12).arrive(&mut server, &of_node), of_node);
}

each_mode!(a_pod_that_is_not_classified_yet_waits);

async fn a_gateway_lends_no_address_to_pods_that_it_does_not_know(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    let mut server = Server::start();
    let mut kernel = open(mode).await;
    let mut state = labelled(12);
    for (family, FamilyState { firewall, .. }) in &mut state.families {
        let like_the_other = firewall.pods[&pod(*family, 12)].clone();
        firewall.pods.insert(pod(*family, 13), like_the_other);
    }
    reach(&mut kernel, &state).await;
    let talk = Talk::of(13);
    eventually("packets", || {
        talk.send();
        on("gateway", || has_met(mode, "unknown"))
    });
    server.sees_nothing();
    let vips = all_from(&first_vips());
    assert_eq!(Talk::of(12).arrive(&mut server, &vips), vips);
}

each_mode!(a_gateway_lends_no_address_to_pods_that_it_does_not_know);

/// Connections of a pod that was translated here go on with the VIP, which another node announces by now: its node lets
/// them out no more.
async fn what_was_translated_before_the_gateway_moved_does_not_leave(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    let mut server = Server::start();
    let here = labelled(13);
    let mut moved = labelled(12);
    for (family, FamilyState { firewall, .. }) in &mut moved.families {
        let pod = pod(*family, 13);
        let mut state = here.families[family].firewall.pods[&pod].clone();
        (state.mark, state.gateway_here) = (Some(slot(1)), false);
        firewall.vips.clone_from(&state.vips);
        firewall.pods = [(pod, state)].into();
    }
    reach_and_die(mode, &here);
    let talk = Talk::connected(13);
    let before = all_from(&Family::ALL.map(|family| vip(family, 1)).into());
    assert_eq!(talk.arrive(&mut server, &before), before);

    // As if the agent had died before it came to forget them.
    let mut kernel = open(mode).await;
    let mut steps = diff(&observe(&mut kernel).await, &moved);
    steps.retain(|step| !matches!(step, Step::Connection(_)));
    apply(&mut kernel, &steps).await;
    server.seen();
    eventually("packets", || {
        talk.send();
        has_met(mode, "moved")
    });
    server.sees_nothing();
}

each_mode!(what_was_translated_before_the_gateway_moved_does_not_leave);

/// A node may be the router of others, or the host of machines that the VIP's pods talk to.
async fn what_a_vip_sends_passes_other_nodes(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    route_first_vip_to(12);
    sh("ip -n pods addr add 192.0.2.200/32 dev eth0; ip -n pods addr add 2001:db8:1::c8/128 dev eth0 nodad
        ip route add 198.51.100.10 via 192.0.2.12; ip route add 2001:db8:2::10 via 2001:db8:1::12");
    let mut server = Server::start();
    let talk = Talk::by(Family::ALL.map(|family| vip(family, 0)));
    let seen: Seen = first_vips()
        .into_iter()
        .map(|vip| (Carried::Udp, vip))
        .collect();
    eventually("packets", || {
        talk.send();
        seen.is_subset(&server.seen())
    });
}

each_mode!(what_a_vip_sends_passes_other_nodes);

/// The VIP is here, the pod's own next packet is not yet.
async fn what_comes_to_a_vip_ahead_of_the_pod_begins_nothing(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    route_first_vip_to(12);
    let mut server = Server::start();
    reach_and_die(mode, &labelled(12));
    let talk = Talk::connected(12);
    let accepted = server.accept();
    talk.send_tcp();
    talk.wait_for_acknowledgements();
    on("gateway", || sh("conntrack -F 2>/dev/null"));
    server.seen();

    // An answer to nothing is INVALID.
    on("outside", || {
        Family::ALL.map(|family| answer_echo(outside(family), vip(family, 0)))
    });
    let met = |rule: &str| {
        let met = on("gateway", || mode.met(rule));
        met.iter().all(|packets| *packets > 0)
    };
    eventually("packets", || met("to-vip-other"));
    for mut stream in &accepted {
        stream.write_all(b"late").unwrap();
    }
    eventually("packets", || met("to-vip"));
    server.sees_nothing();
    let known = on("gateway", || {
        sh("conntrack -L -f ipv4 2>/dev/null; conntrack -L -f ipv6 2>/dev/null")
    });
    let by_server = |line: &&str| {
        let opened_by = line
            .split_whitespace()
            .find_map(|word| word.strip_prefix("src="));
        opened_by.is_some_and(|source| Family::ALL.map(outside).contains(&ip(source)))
    };
    assert_eq!(known.lines().find(by_server), None);

    talk.send_tcp();
    talk.hear(b"late");
    assert_eq!(server.seen(), tcp_from_first_vips());
}

each_mode!(what_comes_to_a_vip_ahead_of_the_pod_begins_nothing);

/// Sends the answer to an echo request that there was not.
fn answer_echo(from: IpAddr, to: IpAddr) {
    // Type, code, checksum, which the kernel makes with IPv6 only, number, place.
    let (domain, protocol, answer) = match from {
        IpAddr::V4(_) => (
            Domain::IPV4,
            Protocol::ICMPV4,
            [0, 0, 0xff, 0xff, 0, 0, 0, 0],
        ),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, [129, 0, 0, 0, 0, 0, 0, 0]),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol)).unwrap();
    socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
    socket
        .send_to(&answer, &SocketAddr::new(to, 0).into())
        .unwrap();
}

/// The gateway still knows a connection that this node does not: what the server says in the middle of it must begin
/// none from outside, whose answers would leave as they are.
async fn the_middle_of_a_connection_begins_none(mode: Mode) {
    connect_hosts(mode);
    prepare_gateway(mode);
    let mut server = Server::start();
    reach_and_die(mode, &labelled(12));
    let talk = Talk::connected(12);
    let accepted = server.accept();
    talk.send_tcp();
    // An acknowledgement that is still on its way would be dropped, too, and the pod would say the same again.
    talk.wait_for_acknowledgements();
    assert_eq!(server.seen(), tcp_from_first_vips());
    sh("conntrack -F 2>/dev/null");

    for mut stream in &accepted {
        stream.write_all(b"late").unwrap();
    }
    eventually("packets", || has_met(mode, "midway"));
    server.sees_nothing();

    // The pod's own next word takes them up.
    talk.send_tcp();
    talk.hear(b"late");
    assert_eq!(server.seen(), tcp_from_first_vips());
}

each_mode!(the_middle_of_a_connection_begins_none);
