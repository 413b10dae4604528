//! The server outside. It counts everything that reaches it, whatever the protocol: what it has not seen has not left.

use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use super::*;
use crate::states::VIPS;

/// Of TCP and UDP.
pub(crate) const PORT: u16 = 7;

/// What IP carries, in both families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Carried {
    Tcp,
    Udp,
    Icmp,
    Other(u64),
}

impl Carried {
    fn of(number: u64) -> Carried {
        match number {
            6 => Carried::Tcp,
            17 => Carried::Udp,
            1 | 58 => Carried::Icmp,
            other => Carried::Other(other),
        }
    }
}

/// Packets that the server has seen: what they carried, and where they came from.
pub(crate) type Seen = BTreeSet<(Carried, IpAddr)>;

/// Everything that pods send, with these sources.
pub(crate) fn all_from(sources: &BTreeSet<IpAddr>) -> Seen {
    let carried = [Carried::Tcp, Carried::Udp, Carried::Icmp];
    let all = carried.map(|carried| sources.iter().map(move |source| (carried, *source)));
    all.into_iter().flatten().collect()
}

/// The server outside.
pub(crate) struct Server {
    tcp: [TcpListener; 2],
    /// Nobody reads there, so that nobody is told that nobody listens.
    pub(crate) udp: [UdpSocket; 2],
    /// How many packets of a kind were seen at the last look.
    counted: BTreeMap<(Carried, IpAddr, String), u64>,
    /// Link-layer addresses of the nodes that may send with a VIP.
    announcers: BTreeSet<(IpAddr, String)>,
}

impl Server {
    pub(crate) fn start() -> Server {
        let here = mac();
        let gateway = on("gateway", mac);
        let announcers = Family::ALL.map(|family| {
            [
                (vip(family, 0), gateway.clone()),
                (vip(family, 1), here.clone()),
            ]
        });
        on("outside", || {
            // What routers say about the way is their own.
            sh("nft 'table inet seen {
                    set sources4 { type inet_proto . ipv4_addr . ether_addr; size 64; flags dynamic; }
                    set sources6 { type inet_proto . ipv6_addr . ether_addr; size 64; flags dynamic; }
                    chain arrivals {
                        type filter hook prerouting priority -300
                        icmp type redirect accept
                        icmpv6 type nd-redirect accept
                        ip daddr 198.51.100.10 add @sources4 { meta l4proto . ip saddr . ether saddr counter }
                        ip6 daddr 2001:db8:2::10 add @sources6 { meta l4proto . ip6 saddr . ether saddr counter }
                    }
                }'");
            let addresses = Family::ALL.map(outside);
            Server {
                tcp: addresses.map(|address| TcpListener::bind((address, PORT)).unwrap()),
                udp: addresses.map(|address| UdpSocket::bind((address, PORT)).unwrap()),
                counted: BTreeMap::new(),
                announcers: announcers.into_iter().flatten().collect(),
            }
        })
    }

    /// The first VIP is announced by this host, too.
    pub(crate) fn add_announcer(&mut self, host: &str) {
        let mac = on(host, mac);
        let vips = Family::ALL.map(|family| (vip(family, 0), mac.clone()));
        self.announcers.extend(vips);
    }

    /// What it has seen since the last look. A VIP comes from a node that announces it.
    pub(crate) fn seen(&mut self) -> Seen {
        let packets = self.packets();
        for (carried, source, mac) in &packets {
            assert!(
                !VIPS.as_flattened().iter().any(|vip| ip(vip) == *source)
                    || self.announcers.contains(&(*source, mac.clone())),
                "{carried:?} of {source} comes from {mac}"
            );
        }
        packets
            .into_iter()
            .map(|(c, source, _)| (c, source))
            .collect()
    }

    /// The same in the middle of a change, where a VIP may come from the pod's own node.
    pub(crate) fn seen_in_between(&mut self) -> Seen {
        let packets = self.packets().into_iter();
        packets.map(|(c, source, _)| (c, source)).collect()
    }

    /// With the link-layer addresses that they came from.
    fn packets(&mut self) -> BTreeSet<(Carried, IpAddr, String)> {
        let listed = on("outside", || sh("nft -j -p list table inet seen"));
        let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
        let objects = listed["nftables"].as_array().unwrap().iter();
        let elements = objects.filter_map(|object| object["set"]["elem"].as_array());
        let mut packets = BTreeSet::new();
        for element in elements.flatten() {
            let element = &element["elem"];
            let [carried, source, mac] = &element["val"]["concat"].as_array().unwrap()[..] else {
                panic!("{element}");
            };
            let carried = Carried::of(carried.as_u64().unwrap());
            let (source, mac) = (ip(source.as_str().unwrap()), mac.as_str().unwrap());
            let kind = (carried, source, mac.to_owned());
            let count = element["counter"]["packets"].as_u64().unwrap();
            if self.counted.insert(kind.clone(), count) != Some(count) {
                packets.insert(kind);
            }
        }
        packets
    }

    /// Ends all connections that nobody has accepted.
    pub(crate) fn hang_up(&self) {
        for listener in &self.tcp {
            listener.set_nonblocking(true).unwrap();
            while listener.accept().is_ok() {}
            listener.set_nonblocking(false).unwrap();
        }
    }

    /// Whatever was on the way when something was dropped has come: nothing.
    pub(crate) fn sees_nothing(&mut self) {
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(self.seen(), Seen::new());
    }

    /// Accepts the connections of a pod, one of each family, the oldest first.
    pub(crate) fn accept(&self) -> [TcpStream; 2] {
        self.tcp.each_ref().map(|tcp| tcp.accept().unwrap().0)
    }
}

/// The link-layer address of a node on the LAN.
fn mac() -> String {
    let listed: serde_json::Value = serde_json::from_str(&sh("ip -j link show eth0")).unwrap();
    listed[0]["address"].as_str().unwrap().to_owned()
}
