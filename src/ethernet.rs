//! Ethernet frames that we hear and send: ARP (RFC 826), IPv6 neighbour discovery (RFC 4861), bare SYNs of TCP. Pure.
//!
//! Heard frames are parsed here, by strict rules; frames to send are built by `etherparse`, which knows checksums.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use etherparse::{ArpEthIpv4Packet, ArpOperation, EtherType, Icmpv6Type, IpNumber, PacketBuilder};

const ETHERNET_HEADER: usize = 14;
const ARP: [u8; 2] = EtherType::ARP.0.to_be_bytes();
const IPV6: [u8; 2] = EtherType::IPV6.0.to_be_bytes();
/// Hardware Ethernet, protocol IPv4, lengths 6 and 4.
const ARP_HEADER: [u8; 6] = [0, 1, 8, 0, 6, 4];
const IPV6_HEADER: usize = 40;
const ICMPV6: u8 = IpNumber::IPV6_ICMP.0;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const SOURCE_LINK_ADDRESS: u8 = 1;
const TARGET_LINK_ADDRESS: u8 = 2;
/// A packet with less was forwarded, and comes from another network (RFC 4861, 7.1).
const HOP_LIMIT: u8 = 255;
/// TTL of what we send in a server's name.
const TTL: u8 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[derive(Debug, thiserror::Error)]
#[error("not a link-layer address: {0}")]
pub struct NotAMac(String);

impl FromStr for Mac {
    type Err = NotAMac;

    /// Six pairs of hexadecimal digits with colons between.
    fn from_str(text: &str) -> Result<Mac, NotAMac> {
        let octet = |part: &str| {
            u8::from_str_radix(part, 16)
                .ok()
                .filter(|_| part.len() == 2)
        };
        let octets: Option<Vec<u8>> = text.split(':').map(octet).collect();
        let octets = octets.and_then(|octets| octets.try_into().ok());
        octets.map(Mac).ok_or_else(|| NotAMac(text.to_owned()))
    }
}

/// A machine's statement that it has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    pub address: IpAddr,
    pub mac: Mac,
}

impl Claim {
    /// The claim in a frame, if it is one.
    #[must_use]
    pub fn of(frame: &[u8]) -> Option<Claim> {
        let source = mac(frame, 6)?;
        if source.is_multicast() {
            return None;
        }
        let kind = frame.get(12..ETHERNET_HEADER)?;
        let rest = frame.get(ETHERNET_HEADER..)?;
        let claim = if kind == ARP {
            arp(rest)
        } else if kind == IPV6 {
            advertisement(rest, source)
        } else {
            None
        };
        claim.filter(|claim| !claim.mac.is_multicast())
    }
}

/// Requests and replies alike name their sender; a gratuitous one is either.
fn arp(packet: &[u8]) -> Option<Claim> {
    if packet.get(..6)? != ARP_HEADER {
        return None;
    }
    let address = Ipv4Addr::from(*packet.get(14..)?.first_chunk::<4>()?);
    // A probe of address conflict detection (RFC 5227) claims nothing.
    (!address.is_unspecified()).then_some(Claim {
        address: address.into(),
        mac: mac(packet, 8)?,
    })
}

fn advertisement(packet: &[u8], source: Mac) -> Option<Claim> {
    let (next_header, hop_limit) = (*packet.get(6)?, *packet.get(7)?);
    let message = packet.get(IPV6_HEADER..)?;
    let is_advertisement = *message.first()? == NEIGHBOUR_ADVERTISEMENT;
    if next_header != ICMPV6 || hop_limit != HOP_LIMIT || !is_advertisement {
        return None;
    }
    let target = Ipv6Addr::from(*message.get(8..)?.first_chunk::<16>()?);
    let mut options = message.get(24..)?;
    let mut owner = source;
    while let [kind, length, ..] = *options {
        // In units of 8 bytes; 0 is invalid (RFC 4861, 4.6).
        let length = usize::from(length) * 8;
        if length == 0 {
            return None;
        }
        if kind == TARGET_LINK_ADDRESS {
            owner = mac(options, 2)?;
        }
        options = options.get(length..).unwrap_or_default();
    }
    Some(Claim {
        address: target.into(),
        mac: owner,
    })
}

fn mac(bytes: &[u8], at: usize) -> Option<Mac> {
    bytes.get(at..)?.first_chunk::<6>().copied().map(Mac)
}

/// Our own addresses on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Own {
    pub mac: Mac,
    /// An IPv4 address, to ask for IPv4 addresses.
    pub v4: Option<Ipv4Addr>,
    /// An IPv6 address, to ask for IPv6 addresses.
    pub v6: Option<Ipv6Addr>,
}

impl Own {
    /// A frame that asks who has an address; `None` without an address of the same family to ask from.
    #[must_use]
    pub fn question(&self, address: IpAddr) -> Option<Vec<u8>> {
        match address {
            IpAddr::V4(target) => self.arp_request(target, self.v4?),
            IpAddr::V6(target) => self.solicitation(target, self.v6?),
        }
    }

    fn arp_request(&self, target: Ipv4Addr, source: Ipv4Addr) -> Option<Vec<u8>> {
        let request = ArpEthIpv4Packet {
            operation: ArpOperation::REQUEST,
            sender_mac: self.mac.0,
            sender_ipv4: source.octets(),
            target_mac: [0; 6],
            target_ipv4: target.octets(),
        };
        let mut frame = Vec::new();
        let packet = PacketBuilder::ethernet2(self.mac.0, [0xff; 6]).arp(request.into());
        packet.write(&mut frame).ok().map(|()| frame)
    }

    fn solicitation(&self, target: Ipv6Addr, source: Ipv6Addr) -> Option<Vec<u8>> {
        let [.., a, b, c] = target.octets();
        // The solicited-node multicast address, and its link-layer address (RFC 4291, 2.7.1; RFC 2464, 7).
        let to = [0xff, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c];
        let mut payload = target.octets().to_vec();
        payload.extend([SOURCE_LINK_ADDRESS, 1]);
        payload.extend(self.mac.0);
        let mut frame = Vec::new();
        let packet = PacketBuilder::ethernet2(self.mac.0, [0x33, 0x33, 0xff, a, b, c])
            .ipv6(source.octets(), to, HOP_LIMIT)
            .icmpv6(Icmpv6Type::NeighborSolicitation);
        packet.write(&mut frame, &payload).ok().map(|()| frame)
    }
}

/// A bare SYN of TCP. Sequence number and window mean nothing where it meets an established connection.
pub(crate) fn syn(
    [from, to]: [Mac; 2],
    source: SocketAddr,
    destination: SocketAddr,
) -> Option<Vec<u8>> {
    let packet = PacketBuilder::ethernet2(from.0, to.0);
    let packet = match (source.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => packet.ipv4(from.octets(), to.octets(), TTL),
        (IpAddr::V6(from), IpAddr::V6(to)) => packet.ipv6(from.octets(), to.octets(), TTL),
        _ => return None,
    };
    let packet = packet.tcp(source.port(), destination.port(), 0, 0).syn();
    let mut frame = Vec::new();
    packet.write(&mut frame, &[]).ok().map(|()| frame)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OWN: Own = Own {
        mac: Mac([2, 0, 0, 0, 0, 0x11]),
        v4: Some(Ipv4Addr::new(192, 0, 2, 11)),
        v6: Some(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x11)),
    };
    const OTHER: Mac = Mac([2, 0, 0, 0, 0, 0x12]);

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// What an ARP reply or a gratuitous ARP looks like.
    fn arp_frame(operation: u8, sender: Ipv4Addr) -> Vec<u8> {
        let own = Own { mac: OTHER, ..OWN };
        let mut frame = own.arp_request(sender, sender).unwrap();
        frame[21] = operation;
        frame
    }

    fn advertisement_frame(target: &str, hop_limit: u8) -> Vec<u8> {
        let own = Own { mac: OTHER, ..OWN };
        let IpAddr::V6(target) = ip(target) else {
            panic!("{target}")
        };
        let mut frame = own.solicitation(target, target).unwrap();
        frame[ETHERNET_HEADER + IPV6_HEADER] = NEIGHBOUR_ADVERTISEMENT;
        frame[ETHERNET_HEADER + 7] = hop_limit;
        frame[ETHERNET_HEADER + IPV6_HEADER + 24] = TARGET_LINK_ADDRESS;
        frame
    }

    #[test]
    fn arp_requests_replies_and_announcements_claim_their_sender() {
        let vip = Ipv4Addr::new(192, 0, 2, 200);
        for operation in [1, 2] {
            let claim = Claim {
                address: vip.into(),
                mac: OTHER,
            };
            assert_eq!(Claim::of(&arp_frame(operation, vip)), Some(claim));
        }
        assert_eq!(Claim::of(&arp_frame(1, Ipv4Addr::UNSPECIFIED)), None);
    }

    #[test]
    fn advertisements_of_this_network_claim_their_target() {
        let claim = Claim {
            address: ip("2001:db8:1::c8"),
            mac: OTHER,
        };
        assert_eq!(
            Claim::of(&advertisement_frame("2001:db8:1::c8", 255)),
            Some(claim)
        );
        assert_eq!(Claim::of(&advertisement_frame("2001:db8:1::c8", 254)), None);
    }

    #[test]
    fn a_question_claims_our_own_address_only() {
        let question = OWN.question(ip("192.0.2.200")).unwrap();
        let own = Claim {
            address: ip("192.0.2.11"),
            mac: OWN.mac,
        };
        assert_eq!(Claim::of(&question), Some(own));
        assert_eq!(question.len(), 42);
        assert_eq!(
            Claim::of(&OWN.question(ip("2001:db8:1::c8")).unwrap()),
            None
        );
        let silent = Own { v4: None, ..OWN };
        assert_eq!(silent.question(ip("192.0.2.200")), None);
    }

    fn hex(frame: &[u8]) -> String {
        frame.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn a_solicitation_goes_to_the_multicast_address_of_its_target() {
        let question = OWN.question(ip("2001:db8:1::c8")).unwrap();
        assert_eq!(
            hex(&question),
            "3333ff0000c802000000001186dd60000000\
             00203aff20010db8000100000000000000000011ff0200000000000000000001ff0000c8\
             87001a790000000020010db80001000000000000000000c80101020000000011"
        );
    }

    #[test]
    fn a_syn_has_the_bytes_of_its_addresses_and_right_checksums() {
        let macs = [Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2])];
        for (server, pod, frame) in [
            (
                "198.51.100.10:8080",
                "10.244.1.11:40000",
                "020000000002020000000001080045000028000040004006\
                 0494c633640a0af4010b1f909c40000000000000000050020000bdd50000",
            ),
            (
                "[2001:db8:2::10]:8080",
                "[fd00:10:244:1::b]:40000",
                "02000000000202000000000186dd6000000000140640\
                 20010db8000200000000000000000010fd00001002440001000000000000000b\
                 1f909c40000000000000000050020000c6e60000",
            ),
        ] {
            let (server, pod) = (server.parse().unwrap(), pod.parse().unwrap());
            assert_eq!(hex(&syn(macs, server, pod).unwrap()), frame);
        }
        let mixed = ("192.0.2.1:1".parse().unwrap(), "[::1]:1".parse().unwrap());
        assert_eq!(syn(macs, mixed.0, mixed.1), None);
    }

    proptest! {
        #[test]
        fn no_frame_is_too_strange(mut frame in proptest::collection::vec(any::<u8>(), 0..120), kind in 0..3_u8) {
            for (at, byte) in (12..).zip(match kind { 0 => ARP, 1 => IPV6, _ => [0, 0] }) {
                if let Some(place) = frame.get_mut(at) {
                    *place = byte;
                }
            }
            let _ = Claim::of(&frame);
        }
    }
}
