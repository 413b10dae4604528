//! Ethernet frames that tell who has an address: ARP (RFC 826) and IPv6 neighbour discovery (RFC 4861). Pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const ETHERNET_HEADER: usize = 14;
const ARP: [u8; 2] = [0x08, 0x06];
const IPV6: [u8; 2] = [0x86, 0xdd];
/// Hardware Ethernet, protocol IPv4, lengths 6 and 4.
const ARP_HEADER: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ARP_REQUEST: [u8; 2] = [0, 1];
const IPV6_HEADER: usize = 40;
const ICMPV6: u8 = 58;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const SOURCE_LINK_ADDRESS: u8 = 1;
const TARGET_LINK_ADDRESS: u8 = 2;
/// A packet with less was forwarded, and comes from another network (RFC 4861, 7.1).
const HOP_LIMIT: u8 = 255;

/// A link-layer address.
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

/// Somebody says that it has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The address.
    pub address: IpAddr,
    /// Who says so.
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
    // A probe for a duplicate (RFC 5227) claims nothing.
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
        // In units of 8 bytes; none would never end.
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
    /// The link-layer address.
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
            IpAddr::V4(target) => Some(self.arp_request(target, self.v4?)),
            IpAddr::V6(target) => Some(self.solicitation(target, self.v6?)),
        }
    }

    fn arp_request(&self, target: Ipv4Addr, source: Ipv4Addr) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend(self.mac.0);
        frame.extend(ARP);
        frame.extend(ARP_HEADER);
        frame.extend(ARP_REQUEST);
        frame.extend(self.mac.0);
        frame.extend(source.octets());
        frame.extend([0; 6]);
        frame.extend(target.octets());
        frame
    }

    fn solicitation(&self, target: Ipv6Addr, source: Ipv6Addr) -> Vec<u8> {
        let [.., a, b, c] = target.octets();
        // The solicited-node multicast address, and its link-layer address (RFC 4291, 2.7.1; RFC 2464, 7).
        let mut to = [0; 16];
        to[..2].copy_from_slice(&[0xff, 0x02]);
        to[11..].copy_from_slice(&[1, 0xff, a, b, c]);
        let mut message = vec![NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
        message.extend(target.octets());
        message.extend([SOURCE_LINK_ADDRESS, 1]);
        message.extend(self.mac.0);
        let checksum = checksum(&source.octets(), &to, ICMPV6, &message);
        message[2..4].copy_from_slice(&checksum.to_be_bytes());

        let mut frame = vec![0x33, 0x33, 0xff, a, b, c];
        frame.extend(self.mac.0);
        frame.extend(IPV6);
        frame.extend([0x60, 0, 0, 0]);
        frame.extend(length(&message).to_be_bytes());
        frame.extend([ICMPV6, HOP_LIMIT]);
        frame.extend(source.octets());
        frame.extend(to);
        frame.extend(message);
        frame
    }
}

/// Our messages have 32 bytes.
fn length(message: &[u8]) -> u16 {
    u16::try_from(message.len()).unwrap_or(u16::MAX)
}

/// The Internet checksum over message and pseudo header (RFC 8200, 8.1; that of RFC 9293, 3.1 adds up to the same).
pub(crate) fn checksum(source: &[u8], destination: &[u8], protocol: u8, message: &[u8]) -> u16 {
    let mut bytes = Vec::new();
    bytes.extend(source);
    bytes.extend(destination);
    bytes.extend(u32::from(length(message)).to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes.extend(message);
    sum(&bytes)
}

/// The Internet checksum (RFC 1071).
pub(crate) fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| {
        let high = u32::from(pair[0]) << 8;
        high | pair.get(1).copied().map_or(0, u32::from)
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
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
        let mut frame = own.arp_request(sender, sender);
        frame[21] = operation;
        frame
    }

    fn advertisement_frame(target: &str, hop_limit: u8) -> Vec<u8> {
        let own = Own { mac: OTHER, ..OWN };
        let IpAddr::V6(target) = ip(target) else {
            panic!("{target}")
        };
        let mut frame = own.solicitation(target, target);
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

    #[test]
    fn the_checksum_of_a_question_adds_up() {
        let question = OWN.question(ip("2001:db8:1::c8")).unwrap();
        let packet = &question[ETHERNET_HEADER..];
        let source = packet[8..24].first_chunk::<16>().unwrap();
        let destination = packet[24..40].first_chunk::<16>().unwrap();
        assert_eq!(checksum(source, destination, ICMPV6, &packet[40..]), 0);
        assert_eq!(&question[..6], [0x33, 0x33, 0xff, 0, 0, 0xc8]);
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
