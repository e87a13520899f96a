//! Tests of hub downloads against a server on the loopback interface.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sha2::{Digest as _, Sha256};

use super::cache::{git_hasher, hex, list, pointer_id};
use super::http::Http;
use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const MODEL: &str = "someone/tiny";

/// What is wrong with how the server sends a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// Half of the announced bytes, then the connection closes.
    Cut,
    /// As `Cut`, the first time only.
    CutOnce,
    /// As `CutOnce`, and the rest where the rest is asked for.
    CutOnceAndGoesOn,
    /// All bytes, one of them changed.
    Flipped,
    /// Complete and well formed, but fewer bytes than the repository lists.
    Shorter,
    /// An error page with this status.
    Status(u16),
}

struct Remote {
    path: &'static str,
    content: Vec<u8>,
    large: bool,
    fault: Fault,
}

fn small(path: &'static str, content: &str) -> Remote {
    Remote { path, content: content.as_bytes().to_vec(), large: false, fault: Fault::None }
}

fn large(path: &'static str, content: &[u8]) -> Remote {
    Remote { path, content: content.to_vec(), large: true, fault: Fault::None }
}

fn tiny_model() -> Vec<Remote> {
    vec![
        small("config.json", "{\"model_type\": \"llama\"}"),
        small("tokenizer.json", "{}"),
        small("chat_template.jinja", "{{ messages }}"),
        small("README.md", "not needed"),
        large("model.safetensors", &[7; 3000]),
        large("pytorch_model.bin", &[1; 10]),
    ]
}

/// A hub of one repository, counting the files it sent.
struct Server {
    endpoint: String,
    sent: Arc<AtomicUsize>,
    cache: tempfile::TempDir,
}

impl Server {
    fn start(files: Vec<Remote>) -> Self {
        Self::start_with(files, COMMIT, None)
    }

    fn start_with(files: Vec<Remote>, commit: &'static str, token: Option<&'static str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let sent = Arc::new(AtomicUsize::new(0));
        let counter = sent.clone();
        let files = Arc::new(files);
        // Detached: lives as long as the test process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (files, counter) = (files.clone(), counter.clone());
                std::thread::spawn(move || {
                    answer(stream.unwrap(), &files, commit, token, &counter)
                });
            }
        });
        Self { endpoint, sent, cache: tempfile::tempdir().unwrap() }
    }

    fn hub(&self, offline: bool) -> Hub {
        let client = HFClient::builder()
            .endpoint(&self.endpoint)
            .cache_dir(self.cache.path())
            .retry_max_attempts(0);
        Hub::with(client, Some("secret".to_owned()), offline).unwrap()
    }

    /// Everything under the cache, locks apart.
    fn cached(&self) -> Vec<String> {
        let mut files = Vec::new();
        list(self.cache.path(), "", &mut files).unwrap();
        let mut paths: Vec<String> =
            files.into_iter().map(|f| f.path).filter(|path| !path.starts_with(".locks")).collect();
        // What there is of a download that broke off stays, to go on from.
        paths.retain(|path| !path.ends_with(".part") && !path.ends_with(".hashes.json"));
        paths.sort();
        paths
    }
}

fn answer(
    mut stream: TcpStream,
    files: &[Remote],
    commit: &str,
    token: Option<&str>,
    sent: &AtomicUsize,
) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = HashMap::new();
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        match header.trim().split_once(':') {
            Some((name, value)) => {
                headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
            }
            None => break,
        }
    }
    let path = target.split('?').next().unwrap();
    let mut reply = |status: u16, length: usize, body: &[u8]| {
        let head = format!(
            "HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nx-repo-commit: {commit}\r\n\
             etag: \"abc\"\r\nconnection: close\r\n\r\n"
        );
        let body = if method == "HEAD" { &[] } else { body };
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    };
    if let Some(token) = token
        && headers.get("authorization").map(String::as_str) != Some(&format!("Bearer {token}"))
    {
        return reply(401, 2, b"{}");
    }
    if path.ends_with("/revision/main") || path.ends_with(&format!("/revision/{commit}")) {
        let body = format!("{{\"id\": \"{MODEL}\", \"sha\": \"{commit}\"}}");
        return reply(200, body.len(), body.as_bytes());
    }
    if path.contains("/tree/") {
        let listed: Vec<serde_json::Value> = files.iter().map(listing).collect();
        let body = serde_json::to_vec(&listed).unwrap();
        return reply(200, body.len(), &body);
    }
    let file = path
        .split_once(&format!("/resolve/{commit}/"))
        .and_then(|(_, name)| files.iter().find(|file| file.path == name));
    let Some(file) = file else {
        return reply(404, 2, b"{}");
    };
    let before = if method == "GET" { sent.fetch_add(1, Ordering::SeqCst) } else { 0 };
    let n = file.content.len();
    match file.fault {
        Fault::Cut => reply(200, n, &file.content[..n / 2]),
        Fault::CutOnce | Fault::CutOnceAndGoesOn if before == 0 => {
            reply(200, n, &file.content[..n / 2]);
        }
        Fault::CutOnceAndGoesOn => {
            let range = headers.get("range").and_then(|range| range.strip_prefix("bytes="));
            let from = range.and_then(|range| range.split_once('-')?.0.parse::<usize>().ok());
            let from = from.expect("the rest is asked for");
            let head = format!(
                "HTTP/1.1 206 X\r\ncontent-length: {}\r\ncontent-range: bytes {from}-{}/{n}\r\nconnection: close\r\n\r\n",
                n - from,
                n - 1
            );
            let _ = stream
                .write_all(head.as_bytes())
                .and_then(|()| stream.write_all(&file.content[from..]));
        }
        Fault::None | Fault::CutOnce => reply(200, n, &file.content),
        Fault::Shorter => reply(200, n - 1, &file.content[..n - 1]),
        Fault::Flipped => {
            let mut content = file.content.clone();
            content[n / 2] ^= 1;
            reply(200, n, &content);
        }
        Fault::Status(status) => reply(status, 2, b"{}"),
    }
}

fn listing(file: &Remote) -> serde_json::Value {
    let n = file.content.len();
    if file.large {
        let sha256 = hex(&Sha256::digest(&file.content));
        let lfs = serde_json::json!({"oid": sha256, "size": n, "pointerSize": 130});
        let oid = pointer_id(&sha256, n as u64);
        return serde_json::json!({"type": "file", "path": file.path, "size": n, "oid": oid, "lfs": lfs});
    }
    let oid = hex(&git_hasher(n as u64).chain_update(&file.content).finalize());
    serde_json::json!({"type": "file", "path": file.path, "size": n, "oid": oid})
}

#[test]
fn git_ids_are_gits() {
    // `git hash-object --stdin` of "hello hub\n", and of the LFS pointer of that content.
    let content = b"hello hub\n";
    let id = hex(&git_hasher(content.len() as u64).chain_update(content).finalize());
    assert_eq!(id, "bc98243ce9b9c35cae6011dec7c54e66c850c702");
    let sha256 = "115d6c773e98b2115031cb9d0350d238da014c5f40c6d7dcb2f4f00afd524a20";
    assert_eq!(hex(&Sha256::digest(content)), sha256);
    assert_eq!(pointer_id(sha256, 10), "539ca8cee211c73471cda73afe88856fb0691f35");
}

#[test]
fn a_model_is_downloaded_once_and_without_what_is_not_needed() {
    let server = Server::start(tiny_model());
    let directory = server.hub(false).model(MODEL, None).unwrap();
    assert_eq!(directory, server.cache.path().join("models--someone--tiny/snapshots").join(COMMIT));
    assert_eq!(fs_err::read(directory.join("model.safetensors")).unwrap(), [7; 3000]);
    assert!(directory.join("chat_template.jinja").is_file());
    assert!(!directory.join("README.md").exists() && !directory.join("pytorch_model.bin").exists());
    assert_eq!(server.sent.load(Ordering::SeqCst), 4);

    // Large files lie under their SHA-256, as huggingface_hub has them; nothing else is left over.
    let blob = format!("models--someone--tiny/blobs/{}", hex(&Sha256::digest([7; 3000])));
    assert!(server.cached().contains(&blob), "{:?}", server.cached());
    assert_eq!(server.cached().len(), 4 + 4 + 1, "{:?}", server.cached());

    server.hub(false).model(MODEL, None).unwrap();
    assert_eq!(server.sent.load(Ordering::SeqCst), 4, "the second time from the cache");
    assert_eq!(server.hub(true).model(MODEL, None).unwrap(), directory, "offline too");
}

#[test]
fn shards_named_by_the_index_are_downloaded() {
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    let server = Server::start(vec![
        small("config.json", "{}"),
        small("tokenizer.json", "{}"),
        small("model.safetensors.index.json", index),
        large("model-00001-of-00002.safetensors", b"first"),
        large("model-00002-of-00002.safetensors", b"second"),
    ]);
    let directory = server.hub(false).model(MODEL, None).unwrap();
    assert_eq!(
        fs_err::read(directory.join("model-00002-of-00002.safetensors")).unwrap(),
        b"second"
    );
}

#[test]
fn an_index_cannot_name_files_elsewhere() {
    let server = Server::start(vec![
        small("config.json", "{}"),
        small("tokenizer.json", "{}"),
        small("model.safetensors.index.json", r#"{"weight_map": {"a": "../../x.safetensors"}}"#),
    ]);
    let message = server.hub(false).model(MODEL, None).unwrap_err().to_string();
    assert!(
        message.contains("model.safetensors.index.json") && message.contains("../../x"),
        "{message}"
    );
}

fn with_fault(fault: Fault) -> Server {
    let mut files = vec![small("config.json", "{}"), small("tokenizer.json", "{}")];
    files.push(Remote { fault, ..large("model.safetensors", &[9; 1000]) });
    Server::start(files)
}

#[test]
fn damaged_bodies_never_pass_for_complete_files() {
    for fault in
        [Fault::Cut, Fault::Flipped, Fault::Shorter, Fault::Status(503), Fault::Status(404)]
    {
        let server = with_fault(fault);
        let error = server.hub(false).model(MODEL, None).unwrap_err();
        let Error::Hub { what, .. } = &error else { panic!("{fault:?}: {error:?}") };
        assert!(what.contains("model.safetensors"), "{fault:?}: {error}");
        let left = server.cached();
        assert!(!left.iter().any(|path| path.contains("model.safetensors")), "{fault:?}: {left:?}");
        assert_eq!(left.len(), 3, "two links to one blob, as both files hold {{}}: {left:?}");
        assert!(
            server.hub(true).model(MODEL, None).is_err(),
            "{fault:?}: offline it is missing too"
        );
    }
}

#[test]
fn a_transfer_that_broke_is_tried_again() {
    let mut files = tiny_model();
    files[0].fault = Fault::CutOnce; // config.json, the first file asked for
    let server = Server::start(files);
    let directory = server.hub(false).model(MODEL, None).unwrap();
    assert_eq!(
        fs_err::read_to_string(directory.join("config.json")).unwrap(),
        "{\"model_type\": \"llama\"}"
    );
    assert_eq!(server.sent.load(Ordering::SeqCst), 5);
}

#[test]
fn a_cut_download_goes_on_where_it_stopped() {
    let mut files = tiny_model();
    files[0] = Remote { fault: Fault::CutOnceAndGoesOn, ..large("config.json", &[5; 4001]) };
    let server = Server::start(files);
    let directory = server.hub(false).model(MODEL, None).unwrap();
    assert_eq!(fs_err::read(directory.join("config.json")).unwrap(), [5; 4001]);
    assert_eq!(server.sent.load(Ordering::SeqCst), 5, "in two pieces");
}

/// As a disk does it: one bit of a file in the cache flips.
#[test]
fn a_damaged_file_of_the_cache_is_downloaded_again_and_refused_offline() {
    let server = Server::start(tiny_model());
    let directory = server.hub(false).model(MODEL, None).unwrap();
    for name in ["model.safetensors", "config.json"] {
        let blob = fs_err::canonicalize(directory.join(name)).unwrap();
        let sound = fs_err::read(&blob).unwrap();
        let mut bytes = sound.clone();
        bytes[sound.len() / 2] ^= 4;
        fs_err::write(&blob, bytes).unwrap();
        let message = server.hub(true).model(MODEL, None).unwrap_err().to_string();
        assert!(message.contains(name) && message.contains("damaged"), "{message}");
        server.hub(false).model(MODEL, None).unwrap();
        assert_eq!(fs_err::read(directory.join(name)).unwrap(), sound);
        server.hub(true).model(MODEL, None).unwrap();
    }
}

#[test]
fn closed_doors_name_the_page_and_the_token() {
    for (status, words) in [(401, "HF_TOKEN"), (403, "accept the conditions")] {
        let server = with_fault(Fault::Status(status));
        let message = server.hub(false).model(MODEL, None).unwrap_err().to_string();
        let page = format!("{}/{MODEL}", server.endpoint);
        assert!(message.contains(words) && message.contains(&page), "{message}");
        assert!(!message.contains("secret"), "{message}");
    }
}

#[test]
fn the_token_is_sent() {
    let server = Server::start_with(tiny_model(), COMMIT, Some("secret"));
    server.hub(false).model(MODEL, None).unwrap();
    let server = Server::start_with(tiny_model(), COMMIT, Some("another"));
    let message = server.hub(false).model(MODEL, None).unwrap_err().to_string();
    assert!(message.contains("HF_TOKEN"), "{message}");
}

#[test]
fn names_from_the_server_cannot_leave_the_cache() {
    let server = Server::start_with(tiny_model(), "../../../../etc", None);
    let message = server.hub(false).model(MODEL, None).unwrap_err().to_string();
    assert!(message.contains("40 hex digits"), "{message}");

    let server = Server::start(vec![small("../../evil.jsonl", "{}"), small("fine.jsonl", "{}")]);
    let message = server.hub(false).data_set("someone/data", "", None).unwrap_err().to_string();
    assert!(message.contains("evil.jsonl"), "{message}");
    assert!(!server.cache.path().join("evil.jsonl").exists());
}

#[test]
fn unsafe_paths_are_refused() {
    for good in ["a", "data/train-00000-of-00001.parquet", ".gitattributes", "a b/c"] {
        assert_eq!(safe_rel_path(good), Ok(PathBuf::from(good)));
    }
    let long = "x".repeat(256);
    for bad in [
        "",
        "/",
        "/etc/passwd",
        "..",
        "a/../b",
        "./a",
        "a//b",
        "a/",
        "C:/x",
        "C:x",
        "\\\\host\\x",
        "a\\b",
        "nul\0",
        "dot.",
        "space ",
        "new\nline",
        &long,
    ] {
        assert!(safe_rel_path(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn pickle_only_repositories_are_refused_with_the_conversion() {
    let mut files = tiny_model();
    files.retain(|file| file.path != "model.safetensors");
    let error = Server::start(files).hub(false).model(MODEL, None).unwrap_err();
    let Error::Pickle { path, command } = error else { panic!("{error}") };
    assert!(path.ends_with("pytorch_model.bin") && command.contains("'someone/tiny'"), "{command}");
}

#[test]
fn without_the_hub_a_verified_copy_is_used_and_nothing_else() {
    let server = Server::start(tiny_model());
    let directory = server.hub(false).model(MODEL, None).unwrap();
    let unreachable = || {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let client = HFClient::builder()
            .endpoint(format!("http://127.0.0.1:{port}"))
            .cache_dir(server.cache.path())
            .retry_max_attempts(0);
        Hub::with(client, None, false).unwrap()
    };
    assert_eq!(unreachable().model(MODEL, None).unwrap(), directory);
    let message = unreachable().model("someone/other", None).unwrap_err().to_string();
    assert!(
        message.contains("someone/other") && message.contains("cannot be reached"),
        "{message}"
    );
    let message = server.hub(true).model("someone/other", None).unwrap_err().to_string();
    assert!(message.contains("HF_HUB_OFFLINE"), "{message}");
}

/// Another process renames its finished download while this one looks through the blobs.
#[test]
fn files_that_vanish_from_the_blobs_are_passed_over() {
    let blobs = tempfile::tempdir().unwrap();
    let vanished = |name: &str| {
        fs_err::os::unix::fs::symlink("nowhere", blobs.path().join(name)).unwrap();
    };
    let oid = "0".repeat(40);
    let file = RemoteFile { path: "a".to_owned(), size: 3, oid: oid.clone(), is_pointer: false };
    vanished(&format!("{}.part", "1".repeat(40)));
    assert_eq!(cached_blob(blobs.path(), &file).unwrap(), None);
    vanished(&oid);
    assert_eq!(cached_blob(blobs.path(), &file).unwrap(), None);
    fs_err::remove_file(blobs.path().join(&oid)).unwrap();
    fs_err::write(blobs.path().join(&oid), "abc").unwrap();
    assert_eq!(cached_blob(blobs.path(), &file).unwrap(), Some(oid));
}

#[test]
fn links_in_use_are_kept_or_replaced_in_one_step() {
    let folder = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (folder.path().join("blobs"), folder.path().join("snapshots/c"));
    fs_err::create_dir_all(&blobs).unwrap();
    for name in ["one", "two"] {
        fs_err::write(blobs.join(name), name).unwrap();
    }
    let (relative, place) = (Path::new("data/x"), snapshot.join("data/x"));
    let read = || fs_err::read_to_string(&place).unwrap();
    link(&snapshot, relative, &blobs, "one").unwrap();
    assert_eq!(fs_err::read_link(&place).unwrap(), Path::new("../../../blobs/one"));
    assert_eq!(read(), "one");
    // Spelled otherwise, but right: kept as it is.
    fs_err::remove_file(&place).unwrap();
    fs_err::os::unix::fs::symlink(blobs.join("one"), &place).unwrap();
    link(&snapshot, relative, &blobs, "one").unwrap();
    assert_eq!(fs_err::read_link(&place).unwrap(), blobs.join("one"));
    // A file that was cut is replaced, and what a killed process left over is no hindrance.
    fs_err::remove_file(&place).unwrap();
    fs_err::write(&place, "o").unwrap();
    fs_err::write(blobs.join("one.link"), "").unwrap();
    link(&snapshot, relative, &blobs, "one").unwrap();
    assert_eq!(read(), "one");
    // A reader never finds nothing.
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                assert_eq!(read().len(), 3);
            }
        });
        let linked = (0..400)
            .try_for_each(|step| link(&snapshot, relative, &blobs, ["two", "one"][step % 2]));
        done.store(true, Ordering::SeqCst);
        linked.unwrap();
    });
    assert_eq!(fs_err::read_dir(&blobs).unwrap().count(), 2);
}

#[test]
fn data_files_of_a_folder_are_downloaded() {
    let server = Server::start(vec![
        large("harmless-base/train.jsonl.gz", b"train"),
        large("harmless-base/test.jsonl.gz", b"test"),
        large("helpful-base/train.jsonl.gz", b"other"),
        small("README.md", "text"),
    ]);
    let hub = server.hub(false);
    let directory = hub.data_set("someone/data", "harmless-base", None).unwrap();
    assert_eq!(fs_err::read(directory.join("harmless-base/test.jsonl.gz")).unwrap(), b"test");
    assert!(!directory.join("helpful-base").exists());
    let message = hub.data_set("someone/data", "harm", None).unwrap_err().to_string();
    assert!(message.contains("someone/data/harm"), "{message}");
}

/// Run by the test below in a process of its own: the environment belongs to the whole process.
#[test]
fn in_a_child_process() {
    if std::env::var("ARETE_TEST_CHILD").is_ok() {
        println!("at {}", download_model(MODEL, None).unwrap().display());
    }
}

#[test]
fn the_environment_names_hub_cache_and_token() {
    let server = Server::start_with(tiny_model(), COMMIT, Some("from-environment"));
    let child = |offline: &str| {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "hub::tests::in_a_child_process", "--nocapture"])
            .env("ARETE_TEST_CHILD", "1")
            .env("HF_ENDPOINT", &server.endpoint)
            .env("HF_HUB_CACHE", server.cache.path())
            .env("HF_TOKEN", "from-environment")
            .env("HF_HUB_OFFLINE", offline)
            .output()
            .unwrap()
    };
    assert!(!child("1").status.success(), "offline, and nothing cached yet");
    assert_eq!(server.sent.load(Ordering::SeqCst), 0);
    let out = child("0");
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && text.contains(COMMIT), "{text}");
    assert!(child("1").status.success(), "offline, from the cache");
}

/// A server that answers every request with `answer`, and the heads of those that came.
fn told(answer: String) -> (String, Arc<std::sync::Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let heads = Arc::new(std::sync::Mutex::new(Vec::new()));
    let kept = heads.clone();
    // Detached: lives as long as the test process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head).unwrap() > 0 {}
            kept.lock().unwrap().push(head.to_ascii_lowercase());
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    (address, heads)
}

#[test]
fn the_token_goes_to_the_hubs_own_origin_only() {
    let body = "HTTP/1.1 200 X\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}".to_owned();
    let (other, other_heads) = told(body);
    // Another port of the same host is another server.
    let leads = |to: &str| {
        format!(
            "HTTP/1.1 307 X\r\nlocation: {to}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        )
    };
    let (hub, hub_heads) = told(leads(&format!("{other}/api/models/a/b")));
    let http = Http::new(&hub, Some("hf_secret".to_owned())).unwrap();
    http.answer("/api/models/a/b").unwrap();
    let hub_heads = hub_heads.lock().unwrap();
    assert!(hub_heads[0].contains("authorization: bearer hf_secret"), "{hub_heads:?}");
    let other_heads = other_heads.lock().unwrap();
    assert!(other_heads[0].starts_with("get /api/models/a/b http/1.1"), "{other_heads:?}");
    assert!(!other_heads[0].contains("hf_secret"), "{other_heads:?}");

    // Within its own origin it goes along, for ten redirects.
    let (ring, heads) = told(leads("/again"));
    let failure = Http::new(&ring, Some("hf_secret".to_owned())).unwrap().answer("/a").err();
    assert!(format!("{failure:?}").contains("more than 10 redirects"), "{failure:?}");
    let heads = heads.lock().unwrap();
    assert!(heads.len() == 33 && heads.iter().all(|head| head.contains("hf_secret")), "{heads:?}");

    for to in ["file:///etc/passwd", "//elsewhere/a", "elsewhere", "ftp://a/b"] {
        let (hub, _) = told(leads(to));
        let failure = Http::new(&hub, None).unwrap().answer("/a").err();
        assert!(format!("{failure:?}").contains(to), "{failure:?}");
    }
}
