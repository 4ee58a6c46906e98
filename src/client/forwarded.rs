//! The client that proxies name in `X-Forwarded-For` and `Forwarded` (RFC 7239).
//! Promises that only trusted proxies count: each list is read from its end, where the nearest proxy wrote. Where the two
//! headers do not name the same client, a proxy did not write one of them, and neither counts.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::HeaderMap;
use http::header::{FORWARDED, HeaderName};

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Longest port behind an address, obfuscated ones (RFC 7239 section 6.3) included.
const MAX_PORT_CHARS: usize = 16;

/// The content of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Named {
    /// There is no such header.
    Nothing,
    /// A client that is not known.
    Nobody,
    Client(IpAddr),
}

/// The client behind a trusted peer, where its headers name one.
pub(super) fn client(headers: &HeaderMap, is_trusted: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
    let listed = named_by(headers, &X_FORWARDED_FOR, hops_of_list, &is_trusted);
    let forwarded = named_by(headers, &FORWARDED, hops_of_elements, &is_trusted);
    match (listed, forwarded) {
        (Named::Client(client), Named::Nothing) | (Named::Nothing, Named::Client(client)) => {
            Some(client)
        }
        (Named::Client(one), Named::Client(other)) if one == other => Some(one),
        _ => None,
    }
}

/// The last address of a header that is no trusted proxy's; where all are, the first one.
fn named_by(
    headers: &HeaderMap,
    name: &HeaderName,
    hops: fn(&str) -> Vec<Option<IpAddr>>,
    is_trusted: impl Fn(IpAddr) -> bool,
) -> Named {
    let mut named = Named::Nothing;
    for line in headers.get_all(name).iter().rev() {
        let hops = line.to_str().map_or(vec![None], hops);
        for hop in hops.into_iter().rev() {
            match hop {
                Some(proxy) if is_trusted(proxy) => named = Named::Client(proxy),
                Some(client) => return Named::Client(client),
                None => return Named::Nobody,
            }
        }
    }
    named
}

/// The addresses of one line of `X-Forwarded-For`; `None` for what is no address.
fn hops_of_list(line: &str) -> Vec<Option<IpAddr>> {
    line.split(',').map(|hop| node(hop.trim())).collect()
}

/// The `for` of the elements of one line of `Forwarded`; a line that breaks the grammar names nobody.
fn hops_of_elements(line: &str) -> Vec<Option<IpAddr>> {
    elements(line).unwrap_or_else(|| vec![None])
}

fn elements(line: &str) -> Option<Vec<Option<IpAddr>>> {
    let mut elements = Vec::new();
    let mut rest = line;
    loop {
        let mut client = None;
        loop {
            let (name, behind) = rest.split_once('=')?;
            let name = name.trim_matches([' ', '\t']);
            let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
            if name.is_empty() || !name.bytes().all(is_name) {
                return None;
            }
            let (text, behind) = value(behind)?;
            if name.eq_ignore_ascii_case("for") && client.replace(node(&text)).is_some() {
                return None;
            }
            rest = behind.trim_start_matches([' ', '\t']);
            let Some(next) = rest.strip_prefix(';') else {
                break;
            };
            rest = next;
        }
        elements.push(client.flatten());
        match rest.strip_prefix(',') {
            Some(next) => rest = next,
            None => return rest.is_empty().then_some(elements),
        }
    }
}

/// A value, quoted or bare, and what is behind it.
fn value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ';', ' ', '\t']).unwrap_or(text.len());
        let (bare, behind) = text.split_at(end);
        return (!bare.contains('"')).then(|| (bare.to_owned(), behind));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

/// An address, perhaps with a port: `192.0.2.7`, `192.0.2.7:80`, `2001:db8::1`, `[2001:db8::1]:80`.
fn node(text: &str) -> Option<IpAddr> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(address.to_canonical());
    }
    let (address, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (address, behind) = rest.split_once(']')?;
            let address = IpAddr::V6(address.parse::<Ipv6Addr>().ok()?);
            match behind {
                "" => return Some(address.to_canonical()),
                behind => (address, behind.strip_prefix(':')?),
            }
        }
        None => {
            let (address, port) = text.split_once(':')?;
            (IpAddr::V4(address.parse::<Ipv4Addr>().ok()?), port)
        }
    };
    let is_port = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let fits = (1..=MAX_PORT_CHARS).contains(&port.len()) && port.bytes().all(is_port);
    fits.then(|| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use proptest::prelude::*;

    /// Headers as a peer on 127.0.0.0/8 or 10.0.0.0/8 sends them, and the client they name.
    fn named(lines: &[(&'static str, &str)]) -> Option<String> {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_str(value).expect("a value"));
        }
        let trusted = |address: IpAddr| match address {
            IpAddr::V4(v4) => v4.is_loopback() || v4.octets()[0] == 10,
            IpAddr::V6(v6) => v6.is_loopback(),
        };
        client(&headers, trusted).map(|client| client.to_string())
    }

    #[test]
    fn the_last_address_that_is_no_proxy_is_the_client() {
        const LIST: &str = "x-forwarded-for";
        let cases: [(&[&str], Option<&str>); 14] = [
            (&[], None),
            (&["192.0.2.7"], Some("192.0.2.7")),
            (&["6.6.6.6, 192.0.2.7"], Some("192.0.2.7")),
            (&["6.6.6.6", "2001:db8::1"], Some("2001:db8::1")),
            (&["6.6.6.6, 192.0.2.7, 10.0.0.2"], Some("192.0.2.7")),
            (&["192.0.2.7", "10.0.0.3, 10.0.0.2"], Some("192.0.2.7")),
            (&["10.0.0.9, 10.0.0.2"], Some("10.0.0.9")),
            (&["192.0.2.7:4711"], Some("192.0.2.7")),
            (&["[2001:db8::1]:4711"], Some("2001:db8::1")),
            (&["::ffff:192.0.2.7"], Some("192.0.2.7")),
            (&["nonsense"], None),
            (&["192.0.2.7, nonsense"], None),
            (&["192.0.2.7, nonsense, 10.0.0.2"], None),
            (&["192.0.2.7, "], None),
        ];
        for (lines, expected) in cases {
            let lines: Vec<_> = lines.iter().map(|line| (LIST, *line)).collect();
            assert_eq!(named(&lines).as_deref(), expected, "{lines:?}");
        }
    }

    #[test]
    fn forwarded_is_read_by_its_grammar() {
        let cases: [(&str, Option<&str>); 16] = [
            ("for=192.0.2.43", Some("192.0.2.43")),
            ("For=192.0.2.43;proto=https;by=10.0.0.1", Some("192.0.2.43")),
            ("for=6.6.6.6, for=192.0.2.43", Some("192.0.2.43")),
            ("for=192.0.2.43 , for=10.0.0.2", Some("192.0.2.43")),
            (
                r#"for="[2001:db8:cafe::17]:4711""#,
                Some("2001:db8:cafe::17"),
            ),
            (r#"for="[2001:db8:cafe::17]""#, Some("2001:db8:cafe::17")),
            (r#"proto=http; for="192.0.2.43:_x""#, Some("192.0.2.43")),
            (r#"host="a,b;c\"d";for=192.0.2.43"#, Some("192.0.2.43")),
            ("for=unknown", None),
            ("for=_hidden", None),
            ("for=192.0.2.43, for=_hidden", None),
            ("by=10.0.0.1", None),
            ("for=6.6.6.6;for=192.0.2.43", None),
            // A quote that a client leaves open must not swallow what the proxy appends, and be believed.
            (r#"for=6.6.6.6;x=", for=192.0.2.43"#, None),
            ("192.0.2.43", None),
            ("", None),
        ];
        for (line, expected) in cases {
            assert_eq!(named(&[("forwarded", line)]).as_deref(), expected, "{line}");
        }
    }

    #[test]
    fn two_headers_count_only_where_they_agree() {
        let both = |list, forwarded| named(&[("x-forwarded-for", list), ("forwarded", forwarded)]);
        let agreed = both("192.0.2.7", "for=192.0.2.7");
        assert_eq!(agreed.as_deref(), Some("192.0.2.7"));
        for (list, forwarded) in [
            ("192.0.2.7", "for=6.6.6.6"),
            ("192.0.2.7", "for=unknown"),
            ("nonsense", "for=192.0.2.7"),
        ] {
            assert_eq!(both(list, forwarded), None, "{list} {forwarded}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(list in "\\PC*", forwarded in "[a-z=;,\"\\\\ :.0-9\\[\\]]*") {
            hops_of_list(&list);
            hops_of_elements(&list);
            hops_of_elements(&forwarded);
        }
    }
}
