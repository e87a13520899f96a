//! Files without an end, settings without a sense, memory that is not there.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use crate::common::*;

#[test]
fn devices_and_pipes_are_no_files_of_a_model() {
    let scratch = Scratch::new();
    let files = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "model.safetensors",
    ];
    let pipe = scratch.at("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for file in files {
        for target in ["/dev/zero", text(&pipe)] {
            let model = scratch.copy(&golden("llama_untied"), &format!("{file} {}", target.len()));
            let _ = fs_err::remove_file(model.join(file));
            fs_err::os::unix::fs::symlink(target, model.join(file)).unwrap();
            // A single weight file that is none is passed over for shards, which are not there either.
            let words: &[&str] =
                if file == "model.safetensors" { &["weights"] } else { &["regular file", file] };
            refuses(&["generate", "--model", text(&model), "--prompt", "hi"], 65, words);
        }
    }
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let adapter = scratch.copy(&golden("peft/causal"), "adapter");
        fs_err::remove_file(adapter.join(file)).unwrap();
        fs_err::os::unix::fs::symlink("/dev/zero", adapter.join(file)).unwrap();
        let base = golden("llama_untied");
        let arguments =
            ["generate", "--model", text(&base), "--adapter", text(&adapter), "--prompt", "hi"];
        refuses(&arguments, 65, &["regular file", file]);
    }
    let large = scratch.copy(&golden("llama_untied"), "large");
    let file = fs_err::OpenOptions::new().write(true).open(large.join("config.json")).unwrap();
    file.set_len(1 << 33).unwrap();
    refuses(&["inspect", "--model", text(&large)], 65, &["file size", "at most"]);
}

#[test]
fn settings_out_of_range_name_their_flag() {
    let model = tiny_chat();
    let huge = u64::MAX.to_string();
    for (flag, values) in [
        ("--max-new-tokens", [huge.as_str(), "10000000000", "0"]),
        ("--temperature", ["inf", "NaN", "-1"]),
        ("--top-p", ["inf", "NaN", "0"]),
    ] {
        for value in values {
            let given = format!("{flag}={value}");
            refuses(&["generate", "--model", text(&model), "--prompt", "hi", &given], 2, &[flag]);
        }
    }
}

/// Libtorch's memory: a table of half a gibibyte where the process has room for itself and not for that.
#[test]
fn memory_that_is_not_there_is_exit_code_71() {
    let scratch = Scratch::new();
    let model = scratch.copy(&tiny_chat(), "model");
    let head_size =
        object(&model.join("config.json")).get("head_dim").and_then(|n| n.as_u64()).unwrap_or(16);
    edit(&model.join("config.json"), |config| {
        drop(
            config.insert("max_position_embeddings".to_owned(), ((1u64 << 27) / head_size).into()),
        );
    });
    let program = env!("CARGO_BIN_EXE_arete-model");
    let mut command = Command::new("sh");
    let script = format!(
        "ulimit -v 900000; exec '{program}' generate --dtype f32 --model '{}' --prompt hi --max-new-tokens 1",
        model.display()
    );
    let output = command
        .args(["-c", &script])
        .arg0("sh")
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(71), "{stderr}");
    assert!(stderr.contains("out of memory") && stderr.contains("--dtype bf16"), "{stderr}");
    assert!(!stderr.contains("frame #"), "{stderr}");
}
