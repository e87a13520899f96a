//! `arete-model` from outside: what it prints, where, and how it refuses.

#![expect(clippy::unwrap_used, reason = "a test: a failure here is the finding")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

fn tiny_chat() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-chat")
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

fn program(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_arete-model"))
        .args(arguments)
        .env("RUST_LOG", "info")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Standard output of a run that must succeed.
#[track_caller]
fn prints(arguments: &[&str]) -> String {
    let output = program(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs what must fail with `code`, nothing on standard output, and every one of `words` in the message.
#[track_caller]
fn refuses(arguments: &[&str], code: i32, words: &[&str]) {
    let output = program(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
    for word in words {
        assert!(stderr.contains(word), "{word}: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
}

struct Lines(tempfile::NamedTempFile);

impl Lines {
    fn of(text: &str) -> Self {
        let file = tempfile::Builder::new().suffix(".jsonl").tempfile().unwrap();
        fs_err::write(file.path(), text).unwrap();
        Self(file)
    }

    fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }
}

fn parsed(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn logprobs_are_one_line_each_with_null_first() {
    let lines = Lines::of(
        "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"assistant\", \"content\": \"Yes.\"}]}\n\
         \n\
         {\"text\": \"abc\"}\n\
         {\"text\": \"\"}\n",
    );
    let model = tiny_chat();
    let arguments = ["logprobs", "--model", model.to_str().unwrap(), "--jsonl", lines.path()];
    let rows = parsed(&prints(&arguments));
    assert_eq!(rows.len(), 3, "the blank line is none");
    for row in &rows {
        let keys: Vec<&String> = row.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["token_ids", "logprobs"], "nothing else");
        let (ids, logprobs) =
            (row["token_ids"].as_array().unwrap(), row["logprobs"].as_array().unwrap());
        assert_eq!(ids.len(), logprobs.len());
        for (at, logprob) in logprobs.iter().enumerate() {
            match at {
                0 => assert!(logprob.is_null()),
                _ => assert!(logprob.as_f64().unwrap() <= 0.0),
            }
        }
    }
    assert!(rows[0]["token_ids"].as_array().unwrap().len() > 4);
    // Lines alone have the numbers they have together.
    let alone = Lines::of("{\"text\": \"abc\"}\n");
    let arguments = ["logprobs", "--model", model.to_str().unwrap(), "--jsonl", alone.path()];
    assert_eq!(parsed(&prints(&arguments))[0], rows[1]);
}

/// The logits of transformers for a whole sequence, as log-probabilities of its own tokens.
#[test]
fn logprobs_are_those_of_transformers() {
    use arete_model::checkpoint::safetensors::SafetensorsFile;
    use arete_model::{Kind, Tokenizer};
    let model = golden("llama_untied");
    let file = SafetensorsFile::open(&model.join("golden.safetensors")).unwrap();
    let ids = Vec::<i64>::try_from(file.tensor("ids").unwrap().view([-1])).unwrap();
    let text = Tokenizer::from_directory(&model).unwrap().decode_with_special(&ids).unwrap();
    let lines = Lines::of(&format!("{}\n", json!({ "text": text })));
    let path = model.to_str().unwrap();
    let printed = prints(&["logprobs", "--model", path, "--dtype", "f32", "--jsonl", lines.path()]);
    let row = &parsed(&printed)[0];
    let found: Vec<i64> = serde_json::from_value(row["token_ids"].clone()).unwrap();
    // The tokenizer may put a <s> before the text; the goldens were made from these ids alone.
    assert_eq!(found, ids, "{text}");
    let logits = file.tensor("logits").unwrap().squeeze_dim(0).log_softmax(-1, Kind::Double);
    for (at, logprob) in row["logprobs"].as_array().unwrap().iter().enumerate().skip(1) {
        let expected = logits.double_value(&[at as i64 - 1, ids[at]]);
        assert!((logprob.as_f64().unwrap() - expected).abs() < 1e-5, "token {at}");
    }
}

#[test]
fn generate_prints_text_or_lines() {
    let model = tiny_chat();
    let model = model.to_str().unwrap();
    let prompt = ["generate", "--model", model, "--prompt", "Hi", "--max-new-tokens", "6"];
    let text = prints(&prompt);
    assert!(text.ends_with('\n'));
    assert_eq!(text, prints(&prompt), "the same seed gives the same text");

    let lines = Lines::of(
        "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}\n{\"text\": \"abc\"}\n",
    );
    let more = ["--max-new-tokens", "6", "--seed", "0", "--temperature", "0"];
    let arguments = [&["generate", "--model", model, "--jsonl", lines.path()], &more[..]].concat();
    let rows = parsed(&prints(&arguments));
    assert_eq!(rows.len(), 2);
    for row in &rows {
        let ids = row["token_ids"].as_array().unwrap();
        assert!((1..=6).contains(&ids.len()));
        assert_eq!(ids.len(), row["logprobs"].as_array().unwrap().len());
        let length = row["finish_reason"] == "length";
        assert!(length || row["finish_reason"] == "stop");
        assert_eq!(length, ids.len() == 6 && row["finish_reason"] == "length");
    }
    // One prompt is answered as the line that says the same.
    let one = [&["generate", "--model", model, "--prompt", "Hi"], &more[..]].concat();
    assert_eq!(prints(&one).trim_end(), rows[0]["text"].as_str().unwrap());
}

#[test]
fn chat_answers_line_by_line() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_arete-model"))
        .args(["chat", "--model", tiny_chat().to_str().unwrap(), "--max-new-tokens", "4"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"Hi\nAnd you?\n\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.matches("> ").count(), 3, "two questions and the empty line: {text:?}");
    // What is said before the talk is what a system turn of the file form says.
    let model = tiny_chat();
    let flags = ["generate", "--model", model.to_str().unwrap(), "--max-new-tokens", "4"];
    let told = [&flags[..], &["--prompt", "Hi", "--system", "Be terse."]].concat();
    let turns = "{\"messages\": [{\"role\": \"system\", \"content\": \"Be terse.\"}, {\"role\": \"user\", \"content\": \"Hi\"}]}\n";
    let lines = Lines::of(turns);
    let rows = parsed(&prints(&[&flags[..], &["--jsonl", lines.path()]].concat()));
    assert_eq!(prints(&told).trim_end(), rows[0]["text"].as_str().unwrap());
    assert_ne!(prints(&told), prints(&[&flags[..], &["--prompt", "Hi"]].concat()));
}

#[test]
fn inspect_describes_and_lists() {
    let model = tiny_chat();
    let model = model.to_str().unwrap();
    let found: Value = serde_json::from_str(&prints(&["inspect", "--model", model])).unwrap();
    assert_eq!(found["config"]["hidden_size"], 64);
    // Two layers of 64 × (64 + 32 + 32 + 64 + 3 · 128) weights and two norms, 512 × 64 embeddings, one norm.
    let n_weights = 2 * (64 * (64 + 32 + 32 + 64 + 3 * 128) + 2 * 64) + 512 * 64 + 64;
    assert_eq!(found["n_weights"], n_weights);
    let listed: Value =
        serde_json::from_str(&prints(&["inspect", "--model", model, "--tensors"])).unwrap();
    assert_eq!(listed["tensors"].as_array().unwrap().len(), 2 * 9 + 2);
}

#[test]
fn quantized_and_merged_directories_load_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (base, adapter) = (golden("llama_untied"), golden("peft/causal"));
    let (base, adapter) = (base.to_str().unwrap(), adapter.to_str().unwrap());
    let merged = path("merged");
    let arguments =
        ["merge", "--model", base, "--adapter", adapter, "--dtype", "f32", "--output", &merged];
    let output = program(&arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("largest difference of logits"), "{stderr}");

    let lines = Lines::of("{\"text\": \"The quick brown fox\"}\n");
    let score = |arguments: &[&str]| {
        let more = ["--dtype", "f32", "--jsonl", lines.path()];
        let row = parsed(&prints(&[&["logprobs"], arguments, &more[..]].concat())).remove(0);
        serde_json::from_value::<Vec<Option<f64>>>(row["logprobs"].clone()).unwrap()
    };
    let largest = |a: &[Option<f64>], b: &[Option<f64>]| {
        a.iter().zip(b).skip(1).map(|(a, b)| (a.unwrap() - b.unwrap()).abs()).fold(0.0, f64::max)
    };
    let adapted = score(&["--model", base, "--adapter", adapter]);
    assert!(largest(&score(&["--model", &merged]), &adapted) < 1e-4);
    assert!(largest(&score(&["--model", base]), &adapted) > 1e-2, "the adapter does something");

    // `llama_untied` has rows of half a block; this base has whole ones.
    let base = golden("gradients/base");
    let base = base.to_str().unwrap();
    let packed = path("packed");
    prints(&["quantize", "--model", base, "--dtype", "f32", "--output", &packed]);
    let rounded = score(&["--model", &packed]);
    assert!(largest(&rounded, &score(&["--model", base, "--nf4"])) == 0.0);
    assert!(largest(&rounded, &score(&["--model", base])) > 1e-3);
    refuses(
        &["quantize", "--model", "/nowhere/at/all", "--output", &path("nothing")],
        2,
        &["/nowhere/at/all", "expected"],
    );
    assert!(!Path::new(&path("nothing")).exists());
}

#[test]
fn flags_that_cannot_be_are_usage_errors() {
    let model = tiny_chat();
    let model = model.to_str().unwrap();
    refuses(&["generate", "--model", model], 2, &["--prompt"]);
    let both = ["generate", "--model", model, "--prompt", "a", "--jsonl", "b"];
    refuses(&both, 2, &["--jsonl"]);
    refuses(&["logprobs", "--model", model, "--jsonl", "x", "--device", "tpu"], 2, &["cuda:N"]);
    refuses(&["logprobs", "--model", model, "--jsonl", "x", "--dtype", "f64"], 2, &["bf16"]);
    refuses(&["merge", "--model", model, "--output", "x"], 2, &["--adapter"]);
    let hot = ["generate", "--model", model, "--prompt", "a", "--temperature=-1"];
    refuses(&hot, 2, &["temperature"]);
    let none = ["generate", "--model", model, "--prompt", "a", "--top-p", "0"];
    refuses(&none, 2, &["top-p"]);
    let long = ["generate", "--model", model, "--prompt", "a", "--max-new-tokens", "5000"];
    refuses(&long, 2, &["2048 tokens"]);
    let zero = ["generate", "--model", model, "--prompt", "a", "--max-new-tokens", "0"];
    refuses(&zero, 2, &["--max-new-tokens", "from 1"]);
}

#[test]
fn bad_lines_are_named() {
    let model = tiny_chat();
    let model = model.to_str().unwrap();
    let check = |text: &str, words: &[&str]| {
        let lines = Lines::of(text);
        for command in ["logprobs", "generate"] {
            refuses(&[command, "--model", model, "--jsonl", lines.path()], 65, words);
        }
    };
    check("{\"text\": \"a\"}\n{\"text\": \"b\"\n", &["line 2"]);
    check("{\"txt\": \"a\"}\n", &["line 1", "messages"]);
    check("{\"text\": 3}\n", &["line 1"]);
    check("{\"messages\": []}\n", &["line 1", "at least one message"]);
    check("{\"messages\": [{\"role\": \"poet\", \"content\": \"a\"}]}\n", &["line 1", "role"]);
    check(&format!("\n{{\"text\": \"{}\"}}\n", "a ".repeat(3000)), &["line 2", "2048 tokens"]);
    refuses(&["logprobs", "--model", model, "--jsonl", "/nowhere.jsonl"], 74, &["/nowhere.jsonl"]);
    // No lines: nothing to print, no error.
    let empty = Lines::of("");
    for command in ["logprobs", "generate"] {
        assert_eq!(prints(&[command, "--model", model, "--jsonl", empty.path()]), "");
    }
}

/// A copy of the tiny chat model in which one file is replaced.
fn damaged(name: &str, change: impl Fn(Vec<u8>) -> Vec<u8>) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for entry in fs_err::read_dir(tiny_chat()).unwrap() {
        let entry = entry.unwrap();
        fs_err::copy(entry.path(), directory.path().join(entry.file_name())).unwrap();
    }
    let path = directory.path().join(name);
    let content = fs_err::read(&path).unwrap_or_default();
    fs_err::write(path, change(content)).unwrap();
    directory
}

#[test]
fn damaged_models_are_refused_by_file_and_field() {
    let replace = |from: &'static str, to: &'static str| {
        move |content: Vec<u8>| {
            let text = String::from_utf8(content).unwrap();
            assert!(text.contains(from), "{from}");
            text.replace(from, to).into_bytes()
        }
    };
    let cut = |content: Vec<u8>| content[..content.len() / 2].to_vec();
    let flipped = |mut content: Vec<u8>| {
        content[3] ^= 0x40; // the header's length
        content
    };
    let endless = |_| {
        let (open, close) = ("{% for a in range(1000) %}", "{% endfor %}");
        [open.repeat(3), close.repeat(3)].concat().into_bytes()
    };
    let cases: Vec<(&str, tempfile::TempDir, &[&str])> = vec![
        ("cut weights", damaged("model.safetensors", cut), &["model.safetensors", "file size"]),
        ("long header", damaged("model.safetensors", flipped), &["header length", "at most"]),
        (
            "architecture",
            damaged("config.json", replace("LlamaForCausalLM", "GPT2LMHeadModel")),
            &["config.json", "GPT2LMHeadModel"],
        ),
        (
            "shape",
            damaged(
                "config.json",
                replace("\"intermediate_size\": 128", "\"intermediate_size\": 130"),
            ),
            &["mlp", "expected", "found"],
        ),
        ("config", damaged("config.json", |_| b"{".to_vec()), &["config.json"]),
        ("tokenizer", damaged("tokenizer.json", cut), &["tokenizer.json"]),
        ("template", damaged("chat_template.jinja", endless), &["chat template", "at most"]),
        (
            "template syntax",
            damaged("chat_template.jinja", |_| b"{% if %}".to_vec()),
            &["chat_template.jinja"],
        ),
    ];
    for (name, directory, words) in &cases {
        let model = directory.path().to_str().unwrap();
        eprintln!("{name}");
        refuses(&["generate", "--model", model, "--prompt", "Hi"], 65, words);
        let output = directory.path().join("output");
        if name.starts_with("template") {
            continue; // quantising needs no template
        }
        let output = output.to_str().unwrap();
        refuses(&["quantize", "--model", model, "--output", output], 65, words);
        let left: Vec<_> = fs_err::read_dir(directory.path())
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().path().to_str().unwrap().contains("output"))
            .collect();
        assert!(left.is_empty(), "{name}: {left:?}");
    }
}

#[test]
fn pickle_is_refused_with_the_conversion() {
    let directory = damaged("pytorch_model.bin", |_| b"\x80\x02}q\x00.".to_vec());
    fs_err::remove_file(directory.path().join("model.safetensors")).unwrap();
    let file = directory.path().join("pytorch_model.bin");
    for model in [directory.path(), &file] {
        let model = model.to_str().unwrap();
        let words = ["pickle", "python -c", "save_pretrained"];
        refuses(&["generate", "--model", model, "--prompt", "Hi"], 65, &words);
    }
}

/// Many flips of single bits in a GGUF file and in safetensors: an error or a model, never a crash.
#[test]
fn flipped_bits_never_crash() {
    let gguf = fs_err::read(golden("gguf/llama.gguf")).unwrap();
    let weights = fs_err::read(tiny_chat().join("model.safetensors")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    for step in 0..24usize {
        let (content, name) = match step % 2 {
            0 => (&gguf, "model.gguf"),
            _ => (&weights, "model.safetensors"),
        };
        let mut content = content.clone();
        let at = step * step * 7919 % content.len().min(4096); // headers, where flips hurt
        content[at] ^= 1 << (step % 8);
        let model = match step % 2 {
            0 => directory.path().join(name),
            _ => {
                for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
                    fs_err::copy(tiny_chat().join(file), directory.path().join(file)).unwrap();
                }
                directory.path().to_path_buf()
            }
        };
        fs_err::write(directory.path().join(name), content).unwrap();
        let output = program(&["inspect", "--model", model.to_str().unwrap(), "--tensors"]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            matches!(output.status.code(), Some(0 | 65)),
            "{name}, byte {at}: {:?} {stderr}",
            output.status
        );
        assert_eq!(output.status.success(), !output.stdout.is_empty());
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let lines = Lines::of(&"{\"text\": \"abc\"}\n".repeat(400));
    let mut child = Command::new(env!("CARGO_BIN_EXE_arete-model"))
        .args(["logprobs", "--model", tiny_chat().to_str().unwrap(), "--jsonl", lines.path()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_model_without_a_template_continues_text() {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs_err::read_dir(tiny_chat()).unwrap() {
        let entry = entry.unwrap();
        let (name, from) = (entry.file_name(), entry.path());
        if name == "tokenizer_config.json" {
            let text = fs_err::read_to_string(&from).unwrap();
            let mut config: Value = serde_json::from_str(&text).unwrap();
            config.as_object_mut().unwrap().remove("chat_template");
            fs_err::write(dir.path().join(name), config.to_string()).unwrap();
        } else if from.is_file() && name != "chat_template.jinja" {
            fs_err::copy(&from, dir.path().join(name)).unwrap();
        }
    }
    let model = dir.path().to_str().unwrap();
    let lines = Lines::of("{\"text\": \"abc\"}\n");
    let flags = ["generate", "--model", model, "--jsonl", lines.path(), "--max-new-tokens", "3"];
    assert_eq!(parsed(&prints(&flags)).len(), 1);
    assert_eq!(parsed(&prints(&["logprobs", "--model", model, "--jsonl", lines.path()])).len(), 1);
    refuses(&["generate", "--model", model, "--prompt", "Hi"], 65, &["chat template"]);
}

#[test]
fn adapters_of_a_double_quantised_base_can_be_named() {
    let model = tiny_chat();
    let model = model.to_str().unwrap();
    let flags = ["generate", "--model", model, "--prompt", "Hi", "--max-new-tokens", "2"];
    let single = program(&[&flags[..], &["--nf4"]].concat());
    let double = program(&[&flags[..], &["--nf4", "--double-quantize"]].concat());
    let named = program(&[&flags[..], &["--nf4", "--double-quantize", "false"]].concat());
    assert!(double.status.success() && single.status.success());
    assert_eq!(named.stdout, single.stdout);
}
