//! Which proxy leads to an address, as curl and Python's requests read the environment: `https_proxy` is for https addresses,
//! `http_proxy` for http ones, `all_proxy` for both; what `no_proxy` names is asked directly.

use std::net::IpAddr;

/// The proxy for an address: the variable that names it, and its value.
#[must_use]
pub fn of(url: &str, variable: impl Fn(&str) -> Option<String>) -> Option<(String, String)> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let set = |name: String| {
        // The lower-case name first, as curl does.
        [name.clone(), name.to_ascii_uppercase()].into_iter().find_map(|name| {
            let value = variable(&name)?;
            (!value.trim().is_empty()).then(|| (name, value.trim().to_owned()))
        })
    };
    if set("no_proxy".to_owned()).is_some_and(|(_, list)| is_named(&list, authority)) {
        return None;
    }
    set(format!("{}_proxy", scheme.to_ascii_lowercase())).or_else(|| set("all_proxy".to_owned()))
}

/// Whether a list of hosts, domains, addresses and networks names a host (with or without its port).
fn is_named(list: &str, authority: &str) -> bool {
    let host = host_of(authority).to_ascii_lowercase();
    let address: Option<IpAddr> = host.parse().ok();
    list.split([',', ' ']).map(str::trim).filter(|entry| !entry.is_empty()).any(|entry| {
        let entry = entry.to_ascii_lowercase();
        if entry == "*" || entry == authority.to_ascii_lowercase() {
            return true;
        }
        match (address, entry.split_once('/')) {
            (Some(address), Some((network, bits))) => is_within(address, network, bits),
            (Some(address), None) => host_of(&entry).parse() == Ok(address),
            _ => {
                let domain = entry.trim_start_matches('*').trim_start_matches('.');
                host == domain || host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.'))
            }
        }
    })
}

/// A host without its port and without the brackets of an IPv6 address.
fn host_of(authority: &str) -> &str {
    match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, _)) => host,
        None if authority.matches(':').count() == 1 => authority.split(':').next().unwrap_or(authority),
        None => authority,
    }
}

/// Whether an address lies in a network, `127.0.0.0/8` say.
fn is_within(address: IpAddr, network: &str, bits: &str) -> bool {
    let bits = bits.parse::<u32>().ok();
    match (address, network.parse(), bits) {
        (IpAddr::V4(address), Ok(IpAddr::V4(network)), Some(bits @ 0..=32)) => {
            let shift = |ip: u32| u64::from(ip) >> (32 - bits);
            shift(address.to_bits()) == shift(network.to_bits())
        }
        (IpAddr::V6(address), Ok(IpAddr::V6(network)), Some(bits @ 0..=128)) => {
            let shift = |ip: u128| ip.checked_shr(128 - bits).unwrap_or(0);
            shift(address.to_bits()) == shift(network.to_bits())
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Expected: what curl 7.88 and Python's requests do with each of them.
    #[test]
    fn the_scheme_chooses_and_no_proxy_excepts() {
        let proxy = |url: &str, variables: &[(&str, &str)]| {
            let get = |name: &str| {
                let found = variables.iter().find(|(other, _)| *other == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            of(url, get).map(|(name, _)| name)
        };
        let both = [("HTTPS_PROXY", "http://p:9"), ("http_proxy", "http://q:9")];
        assert_eq!(proxy("http://127.0.0.1:8123/v1", &both[..1]), None);
        assert_eq!(proxy("https://h/v1", &both[..1]).as_deref(), Some("HTTPS_PROXY"));
        assert_eq!(proxy("http://h/v1", &both).as_deref(), Some("http_proxy"));
        assert_eq!(proxy("http://h", &[("ALL_PROXY", "http://p")]).as_deref(), Some("ALL_PROXY"));
        assert_eq!(proxy("http://h", &[("http_proxy", "")]), None);
        for (no_proxy, url, direct) in [
            ("127.0.0.0/8", "http://127.0.0.1:8123/ok", true),
            ("10.0.0.0/8", "http://127.0.0.1:8123/ok", false),
            ("localhost,127.0.0.1", "http://127.0.0.1:1", true),
            ("example.com", "http://api.example.com/", true),
            (".example.com", "http://u:p@api.example.com:80/", true),
            ("example.com", "http://badexample.com/", false),
            ("h:8000", "http://h:8000/v1", true),
            ("h:8000", "http://h:8001/v1", false),
            ("*", "http://h", true),
            ("::1", "http://[::1]:80/", true),
            ("fd00::/8", "http://[fd00::1]:80/", true),
        ] {
            let set = [("http_proxy", "http://p"), ("no_proxy", no_proxy)];
            assert_eq!(proxy(url, &set).is_none(), direct, "{no_proxy} {url}");
        }
    }
}
