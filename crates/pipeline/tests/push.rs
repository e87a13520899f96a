//! `arete push` against a hub on the loopback interface, which keeps what it is sent.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

const REPOSITORY: &str = "someone/thing";
const TOKEN: &str = "hf_secret";

/// A file as the hub keeps it.
#[derive(Clone, Debug, PartialEq)]
enum Stored {
    Git(Vec<u8>),
    /// Sent to the store of large files; the repository holds its SHA-256 and size.
    Pointer(String, u64),
}

#[derive(Debug, Default)]
struct State {
    /// Bodies of requests that made a repository.
    made: Vec<Value>,
    files: BTreeMap<String, Stored>,
    n_commits: usize,
    /// What the store of large files received.
    large: Vec<u8>,
    /// Paths asked for, in order.
    requests: Vec<String>,
    /// Before the next commit somebody else commits.
    is_outrun: bool,
    /// Commits are answered by something that is no hub.
    is_portal: bool,
}

impl State {
    fn head(&self) -> String {
        format!("{:040x}", self.n_commits + 1)
    }
}

struct Loopback {
    endpoint: String,
    state: Arc<Mutex<State>>,
    home: tempfile::TempDir,
}

impl Loopback {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State::default()));
        let (shared, address) = (state.clone(), endpoint.clone());
        // Detached: lives as long as the test process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (state, address) = (shared.clone(), address.clone());
                std::thread::spawn(move || answer(stream.unwrap(), &state, &address));
            }
        });
        Self { endpoint, state, home: tempfile::tempdir().unwrap() }
    }

    fn push(&self, directory: &Path, token: Option<&str>, more: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_arete"));
        command.args(["push", "--repository", REPOSITORY, "--directory"]).arg(directory).args(more);
        command.env("HF_ENDPOINT", &self.endpoint).env("HF_HOME", self.home.path());
        command.env_remove("HF_TOKEN").env_remove("HF_HUB_OFFLINE").env("NO_PROXY", "127.0.0.1");
        if let Some(token) = token {
            command.env("HF_TOKEN", token);
        }
        command.output().unwrap()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn text(&self, path: &str) -> String {
        match &self.state().files[path] {
            Stored::Git(bytes) => String::from_utf8(bytes.clone()).unwrap(),
            Stored::Pointer(..) => panic!("{path} is a pointer"),
        }
    }
}

struct Asked {
    method: String,
    path: String,
    headers: HashMap<String, String>,
    body: Vec<u8>,
}

fn read_request(stream: &TcpStream) -> Option<Asked> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((name, value)) = header.trim().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let mut body = Vec::new();
    if let Some(length) = headers.get("content-length") {
        body.resize(length.parse().ok()?, 0);
        reader.read_exact(&mut body).ok()?;
    } else if headers.contains_key("transfer-encoding") {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size).ok()?;
            let size = usize::from_str_radix(size.trim(), 16).ok()?;
            let mut chunk = vec![0; size + 2];
            reader.read_exact(&mut chunk).ok()?;
            if size == 0 {
                break;
            }
            body.extend(&chunk[..size]);
        }
    }
    let path = target.split('?').next()?.to_owned();
    Some(Asked { method, path, headers, body })
}

fn answer(mut stream: TcpStream, state: &Mutex<State>, address: &str) {
    let Some(asked) = read_request(&stream) else { return };
    let (status, body) = respond(&asked, &mut state.lock().unwrap(), address);
    let body = body.to_string();
    let head = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
}

fn respond(asked: &Asked, state: &mut State, address: &str) -> (u16, Value) {
    let path = asked.path.as_str();
    state.requests.push(format!("{} {path}", asked.method));
    let body = || serde_json::from_slice::<Value>(&asked.body).unwrap();
    // The store of large files, which has a token of its own.
    if path.starts_with("/v1/xorbs/") {
        state.large.extend(&asked.body);
        return (200, json!({"was_inserted": true}));
    }
    if path == "/v1/shards" {
        return (200, json!({"result": 1}));
    }
    if path.starts_with("/v1/") || path.starts_with("/v2/") {
        return (404, json!({}));
    }
    if asked.headers.get("authorization") != Some(&format!("Bearer {TOKEN}")) {
        return (401, json!({"error": "no"}));
    }
    if path == "/api/repos/create" {
        let is_new = state.made.is_empty();
        state.made.push(body());
        return (if is_new { 200 } else { 409 }, json!({"url": format!("{address}/{REPOSITORY}")}));
    }
    if path.ends_with(".git/info/lfs/objects/batch") {
        return (200, json!({"transfer": "xet", "objects": []}));
    }
    let Some((_, action)) = path.split_once(&format!("/{REPOSITORY}/")) else {
        return (404, json!({}));
    };
    match action.split('/').next().unwrap() {
        "revision" => (200, json!({"id": REPOSITORY, "sha": state.head()})),
        "tree" => (200, state.files.iter().map(|(path, file)| listing(path, file)).collect()),
        "xet-write-token" => {
            (200, json!({"accessToken": "t", "exp": 4_000_000_000u64, "casUrl": address}))
        }
        "preupload" => {
            let files = body()["files"].as_array().unwrap().clone();
            let mode = |file: &Value| {
                let path = file["path"].as_str().unwrap();
                let large = path.ends_with(".safetensors") || path.ends_with(".parquet");
                json!({"path": path, "uploadMode": if large { "lfs" } else { "regular" }})
            };
            (200, json!({"files": files.iter().map(mode).collect::<Vec<_>>()}))
        }
        "commit" if state.is_portal => (200, json!({"commitOid": state.head(), "commitUrl": "x"})),
        "commit" => commit(&asked.body, state),
        _ => (404, json!({})),
    }
}

fn commit(body: &[u8], state: &mut State) -> (u16, Value) {
    if std::mem::take(&mut state.is_outrun) {
        state.n_commits += 1;
    }
    for line in String::from_utf8_lossy(body).lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let (value, text) = (&line["value"], |key: &str| line["value"][key].as_str().unwrap());
        match line["key"].as_str().unwrap() {
            "header" => {
                if value["parentCommit"] != state.head().as_str() {
                    return (412, json!({"error": "a commit has happened since"}));
                }
            }
            "file" => {
                let content = base64(text("content"));
                state.files.insert(text("path").to_owned(), Stored::Git(content));
            }
            "lfsFile" => {
                let size = value["size"].as_u64().unwrap();
                let pointer = Stored::Pointer(text("oid").to_owned(), size);
                state.files.insert(text("path").to_owned(), pointer);
            }
            other => panic!("unexpected line {other}"),
        }
    }
    state.n_commits += 1;
    (200, json!({"commitOid": state.head(), "commitUrl": "x"}))
}

fn base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut out, mut bits, mut n_bits) = (Vec::new(), 0u32, 0);
    for byte in text.bytes().filter(|&byte| byte != b'=') {
        let digit = DIGITS.iter().position(|&digit| digit == byte).unwrap();
        (bits, n_bits) = (bits << 6 | u32::try_from(digit).unwrap(), n_bits + 6);
        if n_bits >= 8 {
            n_bits -= 8;
            out.push((bits >> n_bits & 0xff) as u8);
        }
    }
    out
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn git_id(content: &[u8]) -> String {
    let header = format!("blob {}\0", content.len());
    let mut hasher = sha1::Sha1::new_with_prefix(header);
    hasher.update(content);
    hex(&hasher.finalize())
}

fn listing(path: &str, file: &Stored) -> Value {
    match file {
        Stored::Git(content) => {
            json!({"type": "file", "path": path, "size": content.len(), "oid": git_id(content)})
        }
        Stored::Pointer(sha256, size) => {
            let pointer = format!(
                "version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
            );
            let lfs = json!({"oid": sha256, "size": size, "pointerSize": pointer.len()});
            let oid = git_id(pointer.as_bytes());
            json!({"type": "file", "path": path, "size": size, "oid": oid, "lfs": lfs})
        }
    }
}

/// Bytes that no compression shortens.
fn noise(n: usize, seed: u8) -> Vec<u8> {
    (0..n.div_ceil(32))
        .flat_map(|i| Sha256::digest([seed, i as u8, (i >> 8) as u8]))
        .take(n)
        .collect()
}

fn write(path: &Path, content: impl AsRef<[u8]>) {
    fs_err::create_dir_all(path.parent().unwrap()).unwrap();
    fs_err::write(path, content).unwrap();
}

/// What `arete-reward train` leaves of a reward model; returns the adapter's directory.
fn reward_model(dir: &Path) -> PathBuf {
    let home = dir.join("reward/action");
    let run = json!({
        "stage": "reward", "seed": 7, "device": "cpu", "dtype": "f32", "fingerprint": "f00d",
        "config": {"aspect": "action", "learning_rate": 1e-4, "rank": 16, "max_length": 512,
            "over_length": "truncate-left", "targets": ["q", "v"], "nf4": true, "model": null},
        "inputs": {"train": "aa11", "model": "bb22"}, "versions": {"arete": "0.1.0"},
        "counts": {"train": 1321, "validation": 330}, "outputs": {},
    });
    write(&home.join("run.json"), run.to_string());
    let evaluation = json!({"split": "validation", "n": 330, "expected_calibration_error": 0.0625,
        "accuracy": {"estimate": 0.6125, "low": 0.559, "high": 0.663}, "pearson_score_length": null});
    write(&home.join("evaluation.json"), evaluation.to_string());
    let stats =
        json!({"mean": -0.25, "std": 1.5, "n": 40, "split": "validation", "base_sha256": "cc"});
    write(&home.join("score_stats.json"), stats.to_string());
    write(
        &home.join("metrics.jsonl"),
        "{\"step\": 1, \"loss\": 0.7}\n{\"step\": 2, \"loss\": 0.5}\n",
    );
    write(&home.join("timings.jsonl"), "{}\n");
    let adapter = home.join("adapter");
    let base = dir.join("secret-place/base");
    let config = json!({"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 16,
        "base_model_name_or_path": base.to_str().unwrap(), "modules_to_save": ["score"]});
    write(&adapter.join("adapter_config.json"), config.to_string());
    let meta = json!({"base_model": base.to_str().unwrap(), "base_sha256": "cc",
        "quantization": "nf4", "task": "SEQ_CLS"});
    write(&adapter.join("arete_adapter.json"), meta.to_string());
    write(&adapter.join("adapter_model.safetensors"), noise(100_000, 1));
    adapter
}

fn line(output: &Output) -> Value {
    assert!(output.status.success(), "{}", message(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn message(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn an_adapter_is_pushed_with_its_card_and_only_once() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = reward_model(dir.path());
    let hub = Loopback::start();
    let flags = ["--base-model", "someone/base", "--license", "apache-2.0", "--private"];
    let first = line(&hub.push(&adapter, Some(TOKEN), &flags));
    let expected = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "arete_adapter.json",
        "score_stats.json",
    ];
    assert_eq!(first["changed"], json!(expected));
    assert_eq!(first["page"], format!("{}/{REPOSITORY}", hub.endpoint));
    assert_eq!(hub.state().files.keys().collect::<Vec<_>>(), expected);
    let made = &hub.state().made[0].clone();
    assert_eq!((&made["type"], &made["private"]), (&json!("model"), &json!(true)));

    // The weights went to the store of large files, whole, and the commit names their hash.
    let weights = noise(100_000, 1);
    let sha256 = hex(&Sha256::digest(&weights));
    let stored = hub.state().files["adapter_model.safetensors"].clone();
    assert_eq!(stored, Stored::Pointer(sha256, 100_000));
    let large = hub.state().large.clone();
    assert!(large.windows(4096).any(|window| window == &weights[..4096]), "the start was sent");
    assert!(large.windows(4096).any(|window| window == &weights[95_904..]), "the end was sent");

    // peft finds the base where everybody does; nothing tells of this machine.
    let config: Value = serde_json::from_str(&hub.text("adapter_config.json")).unwrap();
    assert_eq!(config["base_model_name_or_path"], "someone/base");
    for path in expected.iter().filter(|path| !path.ends_with("safetensors")) {
        assert!(!hub.text(path).contains("secret-place"), "{path}");
    }

    let card = hub.text("README.md");
    for part in [
        "---\nlibrary_name: peft\nlicense: apache-2.0\nbase_model: someone/base\nbase_model_relation: adapter\n",
        "pipeline_tag: text-classification\n",
        "# someone/thing\n",
        "aspect `action`",
        "held in NF4",
        "| train | `aa11` |",
        "| train | 1321 |",
        "| learning_rate | 1e-4 |",
        "| targets | q, v |",
        "| accuracy.low | 0.559 |",
        "| expected_calibration_error | 0.0625 |",
        "| std | 1.5 |",
        "| loss | 0.5 |",
        "from_pretrained(\"someone/base\", num_labels=1)",
        "## Limits",
        "longer than 512 tokens were cut",
        "Seed 7, cpu, f32; arete 0.1.0.",
    ] {
        assert!(card.contains(part), "{part:?} is not in\n{card}");
    }

    // The same again: nothing is sent.
    let n_commits = hub.state().n_commits;
    let again = hub.push(&adapter, Some(TOKEN), &flags);
    assert!(message(&again).contains("up to date"), "{}", message(&again));
    assert_eq!(line(&again)["changed"], json!([]));
    assert_eq!(line(&again)["commit"], first["commit"]);
    assert_eq!(hub.state().n_commits, n_commits);

    // One file changes: that file alone is sent.
    write(&adapter.join("adapter_model.safetensors"), noise(100_000, 2));
    let third = line(&hub.push(&adapter, Some(TOKEN), &flags));
    assert_eq!(third["changed"], json!(["adapter_model.safetensors"]));
    assert_eq!(hub.state().n_commits, n_commits + 1);
}

#[test]
fn a_merged_model_is_pushed_without_what_lies_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let merged = dir.path().join("merged");
    write(&merged.join("config.json"), r#"{"architectures": ["LlamaForCausalLM"]}"#);
    write(&merged.join("tokenizer.json"), "{}");
    write(&merged.join("model.safetensors"), noise(5000, 3));
    write(&merged.join("notes.txt"), "private");
    write(&merged.join(".lock"), "");
    write(&merged.join("checkpoint-000010/tensors.safetensors"), "x");
    let hub = Loopback::start();
    let pushed = line(&hub.push(&merged, Some(TOKEN), &[]));
    let expected = ["README.md", "config.json", "model.safetensors", "tokenizer.json"];
    assert_eq!(pushed["changed"], json!(expected));
    let card = hub.text("README.md");
    assert!(
        card.contains("library_name: transformers") && card.contains("text-generation"),
        "{card}"
    );
    assert!(card.contains("Not named by the files"), "{card}");

    // Shards take the place of the one file: the old weights are named, and left.
    fs_err::rename(
        merged.join("model.safetensors"),
        merged.join("model-00001-of-00001.safetensors"),
    )
    .unwrap();
    let output = hub.push(&merged, Some(TOKEN), &[]);
    assert_eq!(line(&output)["changed"], json!(["model-00001-of-00001.safetensors"]));
    assert!(message(&output).contains("stale=[\"model.safetensors\"]"), "{}", message(&output));
}

#[test]
fn a_data_set_names_its_splits() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("preferences");
    for name in
        ["action/train", "action/validation", "motivation/train", "judgements", "shards/000"]
    {
        write(&data.join(format!("{name}.parquet")), noise(2000, name.len() as u8));
    }
    let hub = Loopback::start();
    let pushed = line(&hub.push(&data, Some(TOKEN), &["--license", "mit"]));
    let expected = [
        "README.md",
        "action/train.parquet",
        "action/validation.parquet",
        "judgements.parquet",
        "motivation/train.parquet",
    ];
    assert_eq!(pushed["changed"], json!(expected));
    assert_eq!(hub.state().made[0]["type"], "dataset");
    assert!(pushed["page"].as_str().unwrap().ends_with("/datasets/someone/thing"));
    let configs = "configs:\n- config_name: action\n  data_files:\n  - split: train\n    path: action/train.parquet\n  \
                   - split: validation\n    path: action/validation.parquet\n- config_name: judgements\n";
    let card = hub.text("README.md");
    assert!(card.contains(configs), "{card}");
}

/// Of a run, rows go by split where they lie so, once, and nothing that was set aside.
#[test]
fn a_run_is_pushed_by_split() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let names =
        ["conversations/conversations", "conversations/splits/test", "conversations/splits/train"];
    for name in names.iter().chain(&["ppo.old-1/rollouts/iteration-000001"]) {
        write(&run.join(format!("{name}.parquet")), noise(2000, name.len() as u8));
    }
    let hub = Loopback::start();
    let pushed = line(&hub.push(&run, Some(TOKEN), &[]));
    let expected =
        ["README.md", "conversations/splits/test.parquet", "conversations/splits/train.parquet"];
    assert_eq!(pushed["changed"], json!(expected));
    let card = hub.text("README.md");
    assert!(
        card.contains("- config_name: conversations\n  data_files:\n  - split: test\n"),
        "{card}"
    );

    let mut nameless = Command::new(env!("CARGO_BIN_EXE_arete"));
    nameless.args(["push", "--dry-run", "--repository", "me", "--directory"]).arg(&run);
    let nameless = nameless.output().unwrap();
    assert!(message(&nameless).contains("owner/name"), "{}", message(&nameless));
    assert_eq!(nameless.status.code(), Some(2));
}

#[test]
fn without_a_good_token_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = reward_model(dir.path());
    let hub = Loopback::start();
    let base = ["--base-model", "someone/base"];
    // A token in a file, where `hf auth login` leaves it, is not taken.
    write(&hub.home.path().join("token"), TOKEN);
    let none = hub.push(&adapter, None, &base);
    assert_eq!(none.status.code(), Some(2), "{}", message(&none));
    assert!(message(&none).contains("set HF_TOKEN"), "{}", message(&none));
    assert_eq!(hub.state().requests, Vec::<String>::new());

    let wrong = hub.push(&adapter, Some("hf_wrong"), &base);
    assert!(!wrong.status.success() && wrong.stdout.is_empty());
    assert!(message(&wrong).contains("refuses the token"), "{}", message(&wrong));
    assert!(!message(&wrong).contains("hf_wrong"), "{}", message(&wrong));
    assert!(hub.state().files.is_empty());

    // Neither is a base that others cannot find, nor a directory with nothing in it.
    let local = hub.push(&adapter, Some(TOKEN), &[]);
    assert!(message(&local).contains("--base-model owner/name"), "{}", message(&local));
    let empty = hub.push(dir.path().join("reward").as_path(), Some(TOKEN), &[]);
    assert!(message(&empty).contains("expected adapter_config.json"), "{}", message(&empty));
    assert!(hub.state().files.is_empty());

    // A dry run shows the card and asks nobody.
    let asked = hub.state().requests.len();
    let dry = hub.push(&adapter, None, &["--base-model", "someone/base", "--dry-run"]);
    let shown = String::from_utf8_lossy(&dry.stdout).into_owned();
    assert!(dry.status.success() && shown.contains("100000 adapter_model.safetensors"), "{shown}");
    assert!(shown.contains("## Hyper-parameters"), "{shown}");
    assert_eq!(hub.state().requests.len(), asked);
}

#[test]
fn somebody_elses_commit_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = reward_model(dir.path());
    let hub = Loopback::start();
    hub.state().is_outrun = true;
    let base = ["--base-model", "someone/base"];
    let outrun = hub.push(&adapter, Some(TOKEN), &base);
    assert!(!outrun.status.success());
    assert!(message(&outrun).contains("repeat the command"), "{}", message(&outrun));
    assert!(hub.state().files.is_empty());
    assert_eq!(
        line(&hub.push(&adapter, Some(TOKEN), &base))["changed"].as_array().unwrap().len(),
        5
    );
}

/// A portal or a proxy answers anything with 200: an upload is believed only when the branch holds it.
#[test]
fn an_upload_that_nobody_kept_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = reward_model(dir.path());
    let hub = Loopback::start();
    hub.state().is_portal = true;
    let done = hub.push(&adapter, Some(TOKEN), &["--base-model", "someone/base"]);
    assert_eq!(done.status.code(), Some(69), "{}", message(&done));
    assert!(message(&done).contains("not uploaded"), "{}", message(&done));
    assert_eq!(hub.state().n_commits, 0);
}
