//! Reading from the hub over HTTP: answers of its interface within a size and a time, files in as many requests as it takes.

use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::time::Duration;

use arete_records::proxy;
use arete_records::redact::{self, redacted};
use serde_json::Value;

/// Largest answer of the interface that is read: a list of ten thousand files.
const MAX_ANSWER_BYTES: u64 = 16 << 20;
/// Most seconds for an answer of the interface, for a connection, and for one read of a file.
const ANSWER_S: u64 = 60;
const CONNECT_S: u64 = 20;
const READ_S: u64 = 30;
/// Slowest transfer that is waited for, in bytes a second.
const SLOWEST: u64 = 20 << 10;
/// How often a request is made in all, and the first pause between two.
const ATTEMPTS: usize = 3;
const PAUSE: Duration = Duration::from_millis(200);
/// Longest pause that a server may ask for before it counts as closed.
const LONGEST_PAUSE_S: u64 = 20;
/// Most redirects that are followed from one address.
const MAX_REDIRECTS: usize = 10;

/// The hub's address, and how it is spoken to.
#[derive(Debug)]
pub(super) struct Http {
    agent: ureq::Agent,
    endpoint: String,
    token: Option<Token>,
}

/// A text that is never printed.
struct Token(String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(redact::HIDDEN)
    }
}

/// Why a request came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// No connection.
    Unreachable(String),
    /// A connection that broke, an answer that is none; another attempt may mend it.
    Broken(String),
    /// The hub refuses, with this status.
    Refused(u16, String),
}

impl Failure {
    fn broken(reason: impl AsRef<str>) -> Self {
        Self::Broken(redacted(reason.as_ref()).into_owned())
    }

    fn of(error: &ureq::Error) -> Self {
        let reason = redacted(&error.to_string()).into_owned();
        match error {
            ureq::Error::HostNotFound | ureq::Error::ConnectionFailed => Self::Unreachable(reason),
            ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => {
                Self::Unreachable(reason)
            }
            ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                Self::Unreachable(reason)
            }
            _ => Self::Broken(reason),
        }
    }
}

/// An answer of the interface.
pub(super) struct Answer {
    pub(super) body: Value,
    /// Address of the next page, if there is one.
    pub(super) next: Option<String>,
}

impl Http {
    pub(super) fn new(endpoint: &str, token: Option<String>) -> Result<Self, String> {
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        if let Some(token) = &token {
            redact::hide(token);
            if !token.bytes().all(|byte| (0x21..0x7f).contains(&byte)) {
                return Err(
                    "HF_TOKEN: expected a token in plain letters, found one that cannot be sent"
                        .to_owned(),
                );
            }
        }
        let proxy = match proxy::of(endpoint, |name| std::env::var(name).ok()) {
            None => None,
            Some((name, value)) => Some(ureq::Proxy::new(&value).map_err(|error| {
                format!(
                    "{name}: expected the address of a proxy, found {} ({error})",
                    redacted(&value)
                )
            })?),
        };
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(CONNECT_S)))
            .timeout_recv_response(Some(Duration::from_secs(ANSWER_S)))
            .timeout_per_read(Some(Duration::from_secs(READ_S)))
            .max_redirects(0) // followed in `get`, which knows where the token belongs
            .proxy(proxy)
            .build()
            .into();
        Ok(Self {
            agent,
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.map(Token),
        })
    }

    /// An answer of the interface, of a path below the address (or of a whole address below it).
    pub(super) fn answer(&self, path: &str) -> Result<Answer, Failure> {
        let url = match path.strip_prefix(self.endpoint.as_str()) {
            Some(rest) if rest.starts_with('/') => path.to_owned(),
            _ if path.starts_with('/') => format!("{}{path}", self.endpoint),
            _ => return Err(Failure::broken(format!("a page at another address: {path}"))),
        };
        self.repeated(|| self.answer_once(&url))
    }

    fn answer_once(&self, url: &str) -> Result<Answer, Failure> {
        let mut response = self.get(url, |request| {
            request.config().timeout_global(Some(Duration::from_secs(ANSWER_S))).build()
        })?;
        let status = response.status().as_u16();
        let header = |name: &str| {
            response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
        };
        let (link, pause) = (header("link"), header("retry-after"));
        let text = match response.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_string()
        {
            Ok(text) => text,
            Err(ureq::Error::BodyExceedsLimit(_)) => {
                return Err(Failure::Refused(
                    status,
                    format!("an answer of more than {MAX_ANSWER_BYTES} bytes"),
                ));
            }
            Err(error) => return Err(Failure::of(&error)),
        };
        check_status(status, &text, pause.as_deref())?;
        let body = serde_json::from_str(&text)
            .map_err(|error| Failure::broken(format!("an answer that is not JSON: {error}")))?;
        Ok(Answer { body, next: link.as_deref().and_then(next_page) })
    }

    /// A file of `size` bytes into `part`, going on from what is there of it; `on_bytes` is told of every piece.
    pub(super) fn download(
        &self,
        path: &str,
        part: &Path,
        size: u64,
        on_bytes: &mut dyn FnMut(u64),
    ) -> Result<(), Failure> {
        let url = format!("{}{path}", self.endpoint);
        self.repeated(|| self.download_once(&url, part, size, on_bytes))
    }

    fn download_once(
        &self,
        url: &str,
        part: &Path,
        size: u64,
        on_bytes: &mut dyn FnMut(u64),
    ) -> Result<(), Failure> {
        let io = |error: std::io::Error| Failure::Refused(0, error.to_string());
        let mut file = fs_err::OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(part)
            .map_err(io)?;
        let mut have = file.metadata().map_err(io)?.len();
        if have > size {
            file.set_len(0).map_err(io)?;
            have = 0;
        }
        if have == size {
            return Ok(());
        }
        let whole_s = ANSWER_S + (size - have) / SLOWEST;
        let mut response = self.get(url, |request| {
            let request = request
                .config()
                .timeout_recv_body(Some(Duration::from_secs(whole_s)))
                .build()
                // Packed on the way, its bytes could not be counted.
                .header("Accept-Encoding", "identity");
            match have {
                0 => request,
                _ => request.header("Range", format!("bytes={have}-{}", size - 1)),
            }
        })?;
        let status = response.status().as_u16();
        let header = |name: &str| {
            response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
        };
        let (range, pause) = (header("content-range"), header("retry-after"));
        let goes_on = status == 206
            && range.is_some_and(|range| range.starts_with(&format!("bytes {have}-")));
        if !goes_on {
            if !(200..300).contains(&status) {
                let limited = response.body_mut().with_config().limit(64 << 10).read_to_string();
                check_status(status, &limited.unwrap_or_default(), pause.as_deref())?;
            }
            // The server sends the whole file, whatever it was asked for.
            file.set_len(0).map_err(io)?;
            have = 0;
        }
        file.seek(SeekFrom::Start(have)).map_err(io)?;
        let mut body = response.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 16];
        while have < size {
            let room = usize::try_from(size - have).unwrap_or(usize::MAX).min(buffer.len());
            let n = match body.read(&mut buffer[..room]) {
                Ok(0) => return Err(Failure::broken(format!("expected {size} bytes, got {have}"))),
                Ok(n) => n,
                Err(error) => {
                    return Err(Failure::broken(format!(
                        "broken off after {have} of {size} bytes: {error}"
                    )));
                }
            };
            file.write_all(&buffer[..n]).map_err(io)?;
            have += n as u64;
            on_bytes(n as u64);
        }
        file.sync_all().map_err(io)
    }

    /// The answer to `prepare`'s request, redirects followed. The token goes to the hub's own origin only: another port of its
    /// host is another server.
    fn get(
        &self,
        url: &str,
        prepare: impl Fn(Unsent) -> Unsent,
    ) -> Result<ureq::http::Response<ureq::Body>, Failure> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = prepare(self.agent.get(&url));
            if let Some(Token(token)) = &self.token
                && origin(&url) == origin(&self.endpoint)
            {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            let response = request.call().map_err(|error| Failure::of(&error))?;
            if ![301, 302, 303, 307, 308].contains(&response.status().as_u16()) {
                return Ok(response);
            }
            let to = response.headers().get("location").and_then(|to| to.to_str().ok());
            url = redirected(&url, to)?;
        }
        Err(Failure::broken(format!("more than {MAX_REDIRECTS} redirects")))
    }

    /// Repeats what broke.
    fn repeated<T>(&self, mut ask: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
        let mut pause = PAUSE;
        for attempt in 1.. {
            match ask() {
                Err(Failure::Broken(reason)) if attempt < ATTEMPTS => {
                    tracing::warn!(attempt, reason, "the hub's answer broke off, trying again");
                }
                Err(Failure::Broken(reason)) => {
                    return Err(Failure::Broken(format!("{reason} (tried {ATTEMPTS} times)")));
                }
                other => return other,
            }
            std::thread::sleep(pause);
            pause *= 4;
        }
        unreachable!("the loop returns")
    }
}

type Unsent = ureq::RequestBuilder<ureq::typestate::WithoutBody>;

/// Scheme, host and port of an address, as they are written.
fn origin(url: &str) -> &str {
    let after = url.find("://").map_or(0, |at| at + 3);
    url[after..].find(['/', '?', '#']).map_or(url, |at| &url[..after + at])
}

/// Where a redirect from `url` leads.
fn redirected(url: &str, to: Option<&str>) -> Result<String, Failure> {
    match to {
        Some(to) if to.starts_with("http://") || to.starts_with("https://") => {
            match url.starts_with("https://") && to.starts_with("http://") {
                true => Err(Failure::broken(format!("a redirect to an open connection: {to}"))),
                false => Ok(to.to_owned()),
            }
        }
        Some(to) if to.starts_with('/') && !to.starts_with("//") => {
            Ok(format!("{}{to}", origin(url)))
        }
        to => Err(Failure::broken(format!(
            "a redirect: expected a path or an address of http, found {}",
            to.unwrap_or("none")
        ))),
    }
}

fn check_status(status: u16, text: &str, pause: Option<&str>) -> Result<(), Failure> {
    let short: String = redacted(text).trim().chars().take(200).collect();
    match status {
        200..=299 => Ok(()),
        429 | 500..=599 => {
            let asks = pause.and_then(|pause| pause.parse::<u64>().ok()).unwrap_or(0);
            let reason = format!("status {status}: {short}");
            if asks > LONGEST_PAUSE_S {
                return Err(Failure::Refused(
                    status,
                    format!("{reason} (it asks to wait {asks} s)"),
                ));
            }
            Err(Failure::Broken(reason))
        }
        _ => Err(Failure::Refused(status, short)),
    }
}

/// The address of the next page in a `Link` header.
pub fn next_page(link: &str) -> Option<String> {
    link.split(',').find_map(|entry| {
        let (address, rest) = entry.trim().strip_prefix('<')?.split_once('>')?;
        rest.replace(' ', "").contains("rel=\"next\"").then(|| address.to_owned())
    })
}

/// A part of a path, percent-encoded: everything but letters, digits and `-._~`; `/` stays if `is_path`.
pub(super) fn encoded(text: &str, is_path: bool) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || is_path && byte == b'/' {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("writing to a String cannot fail");
        }
        out
    })
}

/// The token of the environment, where Python's `huggingface_hub` looks for it.
pub(super) fn token_of_environment() -> Option<String> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    if set("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some() {
        return None;
    }
    let read = |path: std::path::PathBuf| fs_err::read_to_string(path).ok();
    set("HF_TOKEN")
        .or_else(|| read(set("HF_TOKEN_PATH")?.into()))
        .or_else(|| {
            let home = match (set("HF_HOME"), set("XDG_CACHE_HOME"), set("HOME")) {
                (Some(home), ..) => home.into(),
                (None, Some(cache), _) => Path::new(&cache).join("huggingface"),
                (None, None, home) => Path::new(&home?).join(".cache/huggingface"),
            };
            read(home.join("token"))
        })
        .map(|token| token.trim().to_owned())
        .filter(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_and_paths_are_spelled_as_the_hub_does() {
        let link = r#"<http://h/api/x?cursor=a%3D>; rel="next", <http://h/y>; rel="prev""#;
        assert_eq!(next_page(link).as_deref(), Some("http://h/api/x?cursor=a%3D"));
        assert_eq!(next_page(r#"<http://h/y>; rel="prev""#), None);
        assert_eq!(encoded("refs/pr/1", false), "refs%2Fpr%2F1");
        assert_eq!(encoded("data/a b+é.json", true), "data/a%20b%2B%C3%A9.json");
    }

    #[test]
    fn pages_elsewhere_are_not_followed() {
        let http = Http::new("http://127.0.0.1:9/", Some("hf_secret".to_owned())).unwrap();
        for page in ["http://127.0.0.1:90/x", "http://evil/", "x"] {
            assert!(matches!(http.answer(page), Err(Failure::Broken(_))), "{page}");
        }
        assert!(Http::new("http://h", Some("a\nb".to_owned())).is_err());
        assert!(!format!("{http:?}").contains("hf_secret"));
    }
}
