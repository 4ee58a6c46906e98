//! A network of addresses, as `trusted_proxies` names it: an address, or one with the length of its prefix.
//! Promises that IPv4 addresses mapped into IPv6 count as what they are.

use std::fmt;
use std::net::IpAddr;

/// A network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    address: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// Reads `10.0.0.0/8`, `2001:db8::/32`, or one address.
    pub fn parse(text: &str) -> Result<Cidr, String> {
        const FORM: &str = "must be addresses or networks, as in 192.0.2.7 or 10.0.0.0/8";
        let (address, length) = text
            .split_once('/')
            .map_or((text, None), |(a, l)| (a, Some(l)));
        let written: IpAddr = address.trim().parse().map_err(|_| FORM)?;
        let prefix = match length {
            None => width(written),
            Some(length) => {
                let length = length.trim().parse().ok();
                length
                    .filter(|length| *length <= width(written))
                    .ok_or(FORM)?
            }
        };
        let address = written.to_canonical();
        let prefix = match width(written) - width(address) {
            0 => prefix,
            // A prefix that is shorter than theirs holds more than mapped addresses.
            mapped => prefix.checked_sub(mapped).ok_or(FORM)?,
        };
        let start = first(address, prefix);
        if start != address {
            let whole = Cidr {
                address: start,
                prefix,
            };
            return Err(format!(
                "has the network {text}, which has bits behind its prefix; write {whole} for all of it, or the \
                 address alone"
            ));
        }
        Ok(Cidr { address, prefix })
    }

    /// Whether an address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        width(address) == width(self.address) && first(address, self.prefix) == self.address
    }

    /// Whether every address of its family is in it.
    pub fn is_everything(&self) -> bool {
        self.prefix == 0
    }

    /// The networks of this machine's own addresses: 127.0.0.0/8 and ::1.
    pub fn loopback() -> Vec<Cidr> {
        ["127.0.0.0/8", "::1"]
            .map(|text| Cidr::parse(text).expect("a constant network parses"))
            .into()
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.prefix == width(self.address) {
            return self.address.fmt(f);
        }
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// Bits of an address.
fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The first address of the network that this one is in: the bits behind the prefix are zero.
fn first(address: IpAddr, prefix: u8) -> IpAddr {
    let behind = u32::from(width(address) - prefix);
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(behind).unwrap_or(0);
            IpAddr::V4((v4.to_bits() & mask).into())
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(behind).unwrap_or(0);
            IpAddr::V6((v6.to_bits() & mask).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_contain_their_addresses_and_no_others() {
        let cases = [
            ("10.0.0.0/8", "10.255.0.1", true),
            ("10.0.0.0/8", "11.0.0.1", false),
            ("10.0.0.0/8", "::ffff:10.1.2.3", true),
            ("::ffff:10.0.0.0/104", "10.1.2.3", true),
            ("192.0.2.7", "192.0.2.7", true),
            ("192.0.2.7", "192.0.2.6", false),
            ("0.0.0.0/0", "203.0.113.9", true),
            ("0.0.0.0/0", "2001:db8::1", false),
            ("::/0", "2001:db8::1", true),
            ("2001:db8::/33", "2001:db8:7fff::1", true),
            ("2001:db8::/33", "2001:db8:8000::1", false),
            ("::1", "::1", true),
        ];
        for (network, address, inside) in cases {
            let network = Cidr::parse(network).expect(network);
            let shown = Cidr::parse(&network.to_string());
            assert_eq!(shown, Ok(network));
            assert_eq!(
                network.contains(address.parse().expect("an address")),
                inside,
                "{network} {address}"
            );
        }
        for bad in [
            "",
            "10",
            "10.0.0.0/33",
            "10.0.0.0/-1",
            "10.0.0.0/8/8",
            "10.0.0.1/8",
            "example.com",
            "::/129",
            "::ffff:0:0/64",
        ] {
            assert!(Cidr::parse(bad).is_err(), "{bad}");
        }
        let error = Cidr::parse("10.1.2.3/8").expect_err("bits behind the prefix");
        assert!(error.contains("write 10.0.0.0/8"), "{error}");
    }
}
