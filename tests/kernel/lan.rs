//! What is heard on the LAN, and what is asked there.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::time::Duration;

use metaleg::ethernet::{Mac, Own};
use metaleg::lan::{Anomaly, Lan, Wanted};
use metaleg::names::NodeName;
use metaleg::tasks::Tasks;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::bind;
use socket2::{Domain, Protocol, Socket, Type};

use super::*;

const VIPS: [&str; 2] = ["192.0.2.200", "2001:db8:1::c8"];

/// A packet socket on an interface, to play other hosts.
struct Host(Socket);

impl Host {
    fn on(interface: &str) -> Host {
        let everything = Protocol::from(i32::from(3_u16.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(everything)).unwrap();
        let mut addresses = getifaddrs().unwrap();
        let link = addresses.find_map(|a| {
            let link = a.address?.as_link_addr().copied();
            link.filter(|_| a.interface_name == interface)
        });
        bind(socket.as_raw_fd(), &link.unwrap()).unwrap();
        Host(socket)
    }

    fn gratuitous_arp(&self, mac: Mac, address: IpAddr) {
        let IpAddr::V4(v4) = address else {
            panic!("{address}")
        };
        let own = Own {
            mac,
            v4: Some(v4),
            v6: None,
        };
        self.0.send(&own.question(address).unwrap()).unwrap();
    }

    fn advertisement(&self, mac: Mac, address: IpAddr) {
        let IpAddr::V6(v6) = address else {
            panic!("{address}")
        };
        let own = Own {
            mac,
            v4: None,
            v6: Some(v6),
        };
        // The question of the same host, turned into an answer: type and option differ.
        let mut frame = own.question(address).unwrap();
        frame[54] = 136;
        frame[78] = 2;
        self.0.send(&frame).unwrap();
    }

    /// Whether somebody asks for an IPv4 address within a time.
    fn hears_question(&self, for_address: &str, within: Duration) -> bool {
        let deadline = std::time::Instant::now() + within;
        self.0
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        let IpAddr::V4(target) = ip(for_address) else {
            panic!("{for_address}")
        };
        while std::time::Instant::now() < deadline {
            let mut frame = [0; 256];
            let Ok(_) = (&self.0).read(&mut frame) else {
                continue;
            };
            if frame.get(12..14) == Some(&[8, 6]) && frame.get(38..42) == Some(&target.octets()) {
                return true;
            }
        }
        false
    }
}

fn mac(n: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, n])
}

fn node(n: u8) -> NodeName {
    NodeName(format!("node{n}"))
}

fn wanted(unsettled: &[&str]) -> Wanted {
    Wanted {
        interface: Some("eth0".to_owned()),
        own: Some(node(1)),
        nodes: (1..=3)
            .map(|n| (IpAddr::from([192, 0, 2, 10 + n]), node(n)))
            .collect(),
        vips: VIPS.map(|vip| (ip(vip), None)).into(),
        unsettled: unsettled.iter().map(|vip| ip(vip)).collect(),
        audit: Duration::from_secs(300),
    }
}

/// Waits until a VIP is heard from a node.
async fn hears(listener: &Lan, vip: &str, from: u8, mut say: impl FnMut()) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
    loop {
        say();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let heard = listener.heard();
        if heard
            .get(&ip(vip))
            .is_some_and(|heard| heard.node == node(from))
        {
            return;
        }
        assert!(
            tokio::time::Instant::now() < deadline,
            "{vip} from node{from}: {heard:?}"
        );
    }
}

/// The packet sockets of this namespace, by inode.
fn packet_sockets() -> BTreeSet<String> {
    let listed = std::fs::read_to_string("/proc/thread-self/net/packet").unwrap();
    let inodes = listed
        .lines()
        .skip(1)
        .filter_map(|line| line.split(' ').next_back());
    inodes.map(str::to_owned).collect()
}

fn neighbours() {
    sh("ip link set eth0 address 02:00:00:00:00:01
        for n in 2 3; do ip neigh add 192.0.2.1$n lladdr 02:00:00:00:00:0$n dev eth0 nud stale; done");
}

#[test]
fn announcements_of_nodes_are_heard_in_both_families_and_our_own_too() {
    in_namespace(|| async {
        neighbours();
        let mut tasks = Tasks::default();
        let listener = Lan::start(&mut tasks);
        listener.want(wanted(&[]));
        let (lan, own) = (Host::on("wire"), Host::on("eth0"));
        hears(&listener, VIPS[0], 2, || {
            lan.gratuitous_arp(mac(2), ip(VIPS[0]))
        })
        .await;
        hears(&listener, VIPS[1], 3, || {
            lan.advertisement(mac(3), ip(VIPS[1]))
        })
        .await;
        // What this node's own speaker sends goes out of the interface.
        hears(&listener, VIPS[0], 1, || {
            own.gratuitous_arp(mac(1), ip(VIPS[0]))
        })
        .await;
    });
}

#[test]
fn a_node_is_known_by_the_address_that_it_has_on_this_interface() {
    in_namespace(|| async {
        neighbours();
        sh(
            "ip link add eth1 type veth peer name wire1; ip link set wire1 up; ip link set eth1 up
            ip addr add 203.0.113.11/24 dev eth1; ip addr add 2001:db8:3::11/64 dev eth1 nodad",
        );
        let mut tasks = Tasks::default();
        let listener = Lan::start(&mut tasks);
        listener.want(Wanted {
            interface: Some("eth1".to_owned()),
            ..wanted(&[])
        });
        let lan = Host::on("wire1");
        // What node2 has at eth0 is another one; asked for its address here, it answers.
        hears(&listener, VIPS[0], 2, || {
            lan.gratuitous_arp(mac(22), ip(VIPS[0]));
            lan.gratuitous_arp(mac(22), ip("192.0.2.12"));
        })
        .await;
        hears(&listener, VIPS[1], 2, || {
            lan.advertisement(mac(22), ip(VIPS[1]))
        })
        .await;
    });
}

#[test]
fn a_stranger_is_told_and_not_believed() {
    in_namespace(|| async {
        neighbours();
        let mut tasks = Tasks::default();
        let listener = Lan::start(&mut tasks);
        listener.want(wanted(&[]));
        let lan = Host::on("wire");
        hears(&listener, VIPS[0], 2, || {
            lan.gratuitous_arp(mac(2), ip(VIPS[0]))
        })
        .await;
        let deadline = tokio::time::Instant::now() + Duration::from_secs(8);
        let stranger = Anomaly::UnknownSender(ip(VIPS[0]), mac(66));
        while !listener.anomalies().contains(&stranger) {
            assert!(
                tokio::time::Instant::now() < deadline,
                "{:?}",
                listener.anomalies()
            );
            lan.gratuitous_arp(mac(66), ip(VIPS[0]));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(listener.heard()[&ip(VIPS[0])].node, node(2));
    });
}

#[test]
fn a_vip_in_doubt_is_asked_for_every_second_and_the_others_are_not() {
    in_namespace(|| async {
        neighbours();
        let mut tasks = Tasks::default();
        let listener = Lan::start(&mut tasks);
        listener.want(wanted(&[VIPS[0]]));
        for _ in 0..3 {
            // The test's runtime must go on listening meanwhile.
            let heard = tokio::task::spawn_blocking(|| {
                Host::on("wire").hears_question(VIPS[0], Duration::from_millis(1500))
            });
            assert!(heard.await.unwrap());
        }
        listener.want(wanted(&[]));
        // One that was on its way may still come.
        let falls_silent = tokio::task::spawn_blocking(|| {
            let lan = Host::on("wire");
            let hears = || lan.hears_question(VIPS[0], Duration::from_millis(1500));
            !hears() || !hears()
        });
        assert!(falls_silent.await.unwrap());
    });
}

#[test]
fn an_interface_that_goes_down_and_comes_up_again_is_heard_again() {
    in_namespace(|| async {
        neighbours();
        let mut tasks = Tasks::default();
        let listener = Lan::start(&mut tasks);
        listener.want(wanted(&[]));
        let lan = Host::on("wire");
        hears(&listener, VIPS[0], 2, || {
            lan.gratuitous_arp(mac(2), ip(VIPS[0]))
        })
        .await;
        let before = packet_sockets();
        sh("ip link set eth0 down");
        eventually("another try to listen", || {
            !packet_sockets().is_subset(&before)
        });
        sh("ip link set eth0 up");
        neighbours();
        hears(&listener, VIPS[0], 3, || {
            lan.gratuitous_arp(mac(3), ip(VIPS[0]))
        })
        .await;
    });
}
